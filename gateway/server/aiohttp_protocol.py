"""Every override of aiohttp's server: malformed HTTP in our envelope, and repairs.

What is used here is not documented by aiohttp: its version is bounded in pyproject.toml, and
tests/unit/gateway/test_aiohttp.py asserts that each name exists and does what is assumed.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.streams import EMPTY_PAYLOAD
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.errors import (
    GatewayError,
    GatewayOverloaded,
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    NotFound,
    UnsupportedHttpVersion,
    drop_frames,
)
from gateway.server.paths import SERVICE

if TYPE_CHECKING:
    from collections import deque

    from aiohttp import StreamReader
    from aiohttp.http_parser import RawRequestMessage

    from gateway.server.connections import CloseReason, Connections

HEADERS_TIMEOUT = 30.0
"""Seconds that a request's line and headers may take from their first byte; those of the first, from the connect."""
LAST_ANSWERS = 1.0
"""Seconds that aiohttp waits for answers when it stops."""
OTHER_VERSION = ("Bad status line:\n  Invalid HTTP version:", "Pause on PRI/Upgrade:")
"""How aiohttp's parser begins its complaint about a version that it does not know, and about HTTP/2's preface."""

AnswerUnhandled = Callable[[GatewayError, BaseException | None, web.BaseRequest | None], web.Response]
"""Makes the answer to what fails outside of the app; without the request where it is malformed."""


class Protocol(RequestHandler):
    """One connection.

    Attributes:
        connection: as aiohttp's `transport`, which is forgotten before all that was sent has been taken.
    """

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        answer_unhandled: AnswerUnhandled,
        connections: "Connections",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._connections = connections
        self._headers_timer: asyncio.TimerHandle | None = None
        self.connection: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start a timer: a connection that never sends a whole request is closed."""
        super().connection_made(transport)
        self.connection = self.transport
        self._start_headers_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timer."""
        self._stop_headers_timer()
        self._connections.remove(self)
        self.connection = None
        super().connection_lost(exc)

    @property
    def has_asked(self) -> bool:
        """Whether a request has come."""
        return self._request_count > 0

    @property
    def idle_since(self) -> float | None:
        """When it became idle, by the loop's clock; None while there is a request, or an answer is yet to be taken."""
        if not self._awaits_headers() or (self.connection is not None and self.connection.get_write_buffer_size()):
            return None
        return self._next_keepalive_close_time - self._keepalive_timeout

    def close_for(self, reason: "CloseReason") -> None:
        """Close it, and count why."""
        self._connections.closed(reason)
        self.force_close()

    def refuse_prompts(self) -> None:
        """Answer one request only, with 503 unless it asks how the gateway is."""
        answer = self._request_handler
        if answer is None:
            return

        async def refuse(request: web.BaseRequest) -> web.StreamResponse:
            if request.path in SERVICE:
                response = await answer(request)
            else:
                error = GatewayOverloaded("The gateway has no free connection.", reason="connections")
                response = self._answer_unhandled(error, None, request)
            response.force_close()
            return response

        self._request_handler = refuse

    def data_received(self, data: bytes) -> None:
        """Limit the time of headers, and look at what the parser has made of the data before it is handled."""
        super().data_received(data)
        messages = self._messages
        if self._current_request is None:
            if messages:
                if self._headers_timer is not None:
                    self._stop_headers_timer()
            elif self._headers_timer is None and self._awaits_headers():
                self._start_headers_timer()
        if messages:
            newest = messages[-1][0]
            if isinstance(newest, _ErrInfo):
                self._end_body_of_current_request(newest)
            elif newest.version is not HttpVersion11 or newest.upgrade or newest.path[0] != "/" or len(messages) > 1:
                _judge(messages)

    def _end_body_of_current_request(self, malformed: _ErrInfo) -> None:
        """Tell the reader of a body that its chunks have turned malformed; aiohttp would let it wait."""
        request = self._current_request
        if request is None or request.content.is_eof():
            return
        self._messages.pop()
        drop_frames(malformed.exc)
        request.content.set_exception(web.RequestPayloadError("malformed"))
        request.content.feed_eof()
        self.close()

    async def _drain_helper(self) -> None:
        """Forget what a cancelled writer waited for; aiohttp keeps it, and would cancel the next one that waits."""
        if self._drain_waiter is not None and self._drain_waiter.cancelled():
            self._drain_waiter = None
        await super()._drain_helper()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what aiohttp's parser refuses in our envelope; aiohttp would quote the caller's bytes (`message`)."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer has already begun")
        error: GatewayError = InvalidRequest("The request is malformed HTTP.")
        if isinstance(exc, GatewayError):
            error = exc
        elif (message or "").startswith(OTHER_VERSION):
            error = UnsupportedHttpVersion()
        elif status >= 500:  # noqa: PLR2004
            error = InternalError()
        elif isinstance(exc, LineTooLong) or (message or "").startswith("Too many "):
            error = HeadersTooLarge("The request line or the headers are too large.")
        answer = self._answer_unhandled(error, exc, None)
        if exc is not None:
            drop_frames(exc)
        return answer

    def _process_keepalive(self) -> None:
        """Close an idle connection, but not while headers arrive, which have their own timer, or an answer is taken."""
        if self._headers_timer is not None:
            self._keepalive_handle = None
            return
        if self.connection is not None and self.connection.get_write_buffer_size():
            self._keepalive_handle = self._loop.call_later(self._keepalive_timeout, self._process_keepalive)
            return
        was_closing = self._force_close
        super()._process_keepalive()
        if self._force_close and not was_closing:
            self._connections.closed("keepalive_timeout")

    def _awaits_headers(self) -> bool:
        """Return whether no request is under way: at most a part of its headers has come."""
        return self._waiter is not None and not self._waiter.done()

    def _start_headers_timer(self) -> None:
        self._headers_timer = self._loop.call_later(HEADERS_TIMEOUT, self._close_without_headers)

    def _stop_headers_timer(self) -> None:
        if self._headers_timer is not None:
            self._headers_timer.cancel()
            self._headers_timer = None

    def _close_without_headers(self) -> None:
        self._headers_timer = None
        if not self._force_close:
            self.close_for("headers_timeout")


def _judge(messages: "deque[tuple[RawRequestMessage | _ErrInfo, StreamReader]]") -> None:
    """Refuse requests that no route could answer, and have the connection closed after those that ask for an upgrade.

    Of what comes in one read with the latter, aiohttp's parser drops all that is behind: its caller would take the next
    answer for that to the request that was dropped.
    """
    for place, (message, payload) in enumerate(messages):
        if isinstance(message, _ErrInfo):
            continue
        refusal = _refusal(message)
        if refusal is not None:
            messages[place] = _ErrInfo(refusal.status, refusal, refusal.message), EMPTY_PAYLOAD
            continue
        url = message.url
        if url.absolute:  # it may have no path, which stands for "/"
            url = url.with_path(url.raw_path, encoded=True, keep_query=True)
        close = message.should_close or message.upgrade
        messages[place] = message._replace(url=url, should_close=close), payload


def _refusal(message: "RawRequestMessage") -> GatewayError | None:
    """Return why no route could answer a request, or None."""
    if message.version not in {HttpVersion10, HttpVersion11}:
        return UnsupportedHttpVersion()
    if message.method == "CONNECT" or message.path == "*":
        return NotFound("There is nothing at this path; GET / lists what there is.")
    return None


class Server(web.Server):
    """Makes one `Protocol` per connection."""

    def __init__(
        self,
        handler: Any,  # noqa: ANN401
        *,
        answer_unhandled: AnswerUnhandled,
        connections: "Connections",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(handler, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._registry = connections  # aiohttp has `_connections` of its own

    def __call__(self) -> Protocol:
        """Return the protocol of a new connection."""
        return Protocol(
            self,
            loop=self._loop,
            answer_unhandled=self._answer_unhandled,
            connections=self._registry,
            **self._kwargs,
        )


class Runner(web.AppRunner):
    """aiohttp's runner with our protocol. A caller who leaves cancels its request; aiohttp writes no access log."""

    def __init__(
        self,
        app: web.Application,
        *,
        answer_unhandled: AnswerUnhandled,
        connections: "Connections",
        keepalive_timeout: float,
    ) -> None:
        super().__init__(
            app,
            keepalive_timeout=keepalive_timeout,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            shutdown_timeout=LAST_ANSWERS,
            lingering_time=1.0,
        )
        self._answer_unhandled = answer_unhandled
        self._connections = connections

    def new_protocol(self) -> Protocol:
        """Return the protocol of a new connection. Raises: TypeError, before `setup`."""
        if not isinstance(self.server, Server):
            raise TypeError("the runner has not been set up")
        return self.server()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return Server(
            server.request_handler,
            request_factory=server.request_factory,
            answer_unhandled=self._answer_unhandled,
            connections=self._connections,
            handler_cancellation=server.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **server._kwargs,  # noqa: SLF001
        )
