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
    HeadersTooLarge,
    InternalError,
    InvalidRequest,
    NotFound,
    UnsupportedHttpVersion,
    drop_frames,
)

if TYPE_CHECKING:
    from collections import deque

    from aiohttp import StreamReader
    from aiohttp.http_parser import RawRequestMessage

    from gateway.server.in_flight import InFlight

FIRST_REQUEST = 30.0
"""Seconds that a new connection may take until its first request line and headers have come."""
LAST_ANSWERS = 1.0
"""Seconds that aiohttp waits for answers when it stops."""
OTHER_VERSION = ("Bad status line:\n  Invalid HTTP version:", "Pause on PRI/Upgrade:")
"""How aiohttp's parser begins its complaint about a version that it does not know, and about HTTP/2's preface."""

AnswerUnhandled = Callable[[GatewayError, BaseException | None], web.Response]
"""Makes the answer to what fails outside of the app."""


class Protocol(RequestHandler):
    """One connection."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        answer_unhandled: AnswerUnhandled,
        in_flight: "InFlight",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._in_flight = in_flight
        self._first_request_timer: asyncio.TimerHandle | None = None
        self._connection: asyncio.Transport | None = None  # as `transport`, which aiohttp forgets when it closes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start a timer: a connection that never sends a whole request is closed."""
        super().connection_made(transport)
        self._connection = self.transport
        if self._connection is not None:
            self._in_flight.add_connection(self._connection)
        self._first_request_timer = asyncio.get_running_loop().call_later(FIRST_REQUEST, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timer."""
        if self._first_request_timer is not None:
            self._first_request_timer.cancel()
            self._first_request_timer = None
        if self._connection is not None:
            self._in_flight.remove_connection(self._connection)
            self._connection = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Look at what the parser has made of the data before it is handled."""
        super().data_received(data)
        messages = self._messages
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
        answer = self._answer_unhandled(error, exc)
        if exc is not None:
            drop_frames(exc)
        return answer

    def _close_if_silent(self) -> None:
        if self._request_count == 0 and self.transport is not None:
            self.transport.close()


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
        in_flight: "InFlight",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(handler, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._in_flight = in_flight

    def __call__(self) -> Protocol:
        """Return the protocol of a new connection."""
        return Protocol(
            self,
            loop=self._loop,
            answer_unhandled=self._answer_unhandled,
            in_flight=self._in_flight,
            **self._kwargs,
        )


class Runner(web.AppRunner):
    """aiohttp's runner with our protocol. A caller who leaves cancels its request; aiohttp writes no access log."""

    def __init__(self, app: web.Application, *, answer_unhandled: AnswerUnhandled, in_flight: "InFlight") -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            shutdown_timeout=LAST_ANSWERS,
            lingering_time=1.0,
        )
        self._answer_unhandled = answer_unhandled
        self._in_flight = in_flight

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return Server(
            server.request_handler,
            request_factory=server.request_factory,
            answer_unhandled=self._answer_unhandled,
            in_flight=self._in_flight,
            handler_cancellation=server.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **server._kwargs,  # noqa: SLF001
        )
