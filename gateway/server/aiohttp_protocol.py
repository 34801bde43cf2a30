"""Every override of aiohttp's server: malformed HTTP in our envelope, and repairs.

What is used here is not documented by aiohttp: its version is bounded in pyproject.toml, and
tests/unit/gateway/test_aiohttp.py asserts that each name exists and does what is assumed.
"""

import asyncio
from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

from aiohttp import HttpVersion, HttpVersion10, HttpVersion11, StreamReader, web
from aiohttp.http import HttpRequestParser
from aiohttp.http import StreamWriter as AiohttpWriter
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
from gateway.server.hang_ups import HangUps
from gateway.server.paths import SERVICE
from gateway.server.tcp import bytes_taken, limit_unsent

if TYPE_CHECKING:
    from aiohttp.http_parser import RawRequestMessage

    from gateway.server.connections import CloseReason, Connections

HEADERS_TIMEOUT = 30.0
"""Seconds that a request's line and headers may take from their first byte; those of the first, from the connect."""
UNSENT = 131_072
"""Bytes of answers that the kernel holds for a caller beyond what is under way to him."""
MAX_HEAD = 65_536
"""Bytes of a request's line and headers; aiohttp alone would hold a hundred lines of 8 KiB of each connection."""
LOOKS = 10
"""Looks at what a caller takes in the time after which he counts as taking nothing."""
LAST_ANSWERS = 1.0
"""Seconds that aiohttp waits for answers when it stops."""
OTHER_VERSION = ("Bad status line:\n  Invalid HTTP version:", "Pause on PRI/Upgrade:")
"""How aiohttp's parser begins its complaint about a version that it does not know, and about HTTP/2's preface."""

AnswerUnhandled = Callable[[GatewayError, BaseException | None, web.BaseRequest | None], web.Response]
"""Makes the answer to what fails outside of the app; without the request where it is malformed."""


class _Explained(web.StreamResponse):
    """An answer with further lines in its head, which are written as they are.

    What explains a request is most of the head: as headers, each line would be copied and looked through three times.

    Attributes:
        lines: headers as lines of HTTP, and the empty one that ends a head; names that `headers` has not.
    """

    lines = b""

    async def _write_headers(self) -> None:
        request, writer = self._req, self._payload_writer
        if request is None or not isinstance(writer, AiohttpWriter):
            raise RuntimeError("the answer is not prepared")
        await writer.write_headers(_status_line(request.version, self._status, self._reason), self._headers)
        if self.lines and writer._headers_buf is not None:  # noqa: SLF001
            writer._headers_buf = writer._headers_buf[:-2] + self.lines  # noqa: SLF001
        if self._send_headers_immediately:
            writer.send_headers()


class Answer(_Explained, web.Response):
    """A whole answer."""


class OpenAnswer(_Explained):
    """An answer that is sent as it comes."""


@lru_cache(maxsize=256)
def _status_line(version: HttpVersion, status: int, reason: str) -> str:
    return f"HTTP/{version[0]}.{version[1]} {status} {reason}"


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
        hang_ups: HangUps,
        write_timeout: float,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._connections = connections
        self._hang_ups = hang_ups
        self._write_timeout = write_timeout
        self._headers_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self.connection: asyncio.Transport | None = None
        self._body: StreamReader | None = None  # of the request that has not been answered yet
        self._further = b""  # what came behind it
        self._head = 0  # bytes that have come of a request's line and headers
        self._msg_queue_resume_size = -1  # it is read on when the answer has been sent, not when its handling begins
        self._parser = HttpRequestParser(
            self,
            self._loop,
            self._read_bufsize,
            max_line_size=self.max_line_size,
            max_field_size=self.max_field_size,
            max_headers=self.max_headers,
            payload_exception=web.RequestPayloadError,
            auto_decompress=False,
            max_msg_queue_size=1,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start a timer: a connection that never sends a whole request is closed."""
        super().connection_made(transport)
        self.connection = self.transport
        if self.connection is not None:
            self.connection.set_write_buffer_limits(0)  # nothing is written while something has yet to be taken
            limit_unsent(self.connection, UNSENT)
        self._start_headers_timer()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timers."""
        self._stop_headers_timer()
        self._stop_write_timer()
        self._connections.remove(self)
        if self.connection is not None:
            self._hang_ups.forget(self.connection)
            self.connection = None
        super().connection_lost(exc)
        self._body, self._further = None, b""  # a body refers to its connection: a cycle
        self._messages.clear()

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
        """Parse one request at a time: what comes behind it waits, one read of it, until the answer has been sent.

        aiohttp would hold 32 of them, each with what has come of its body; and would let the reader of a body wait when
        its chunks turn malformed.
        """
        body = self._body
        if body is None:
            self._head += len(data)
            self._parse(data)
            if self._body is None:  # what came may begin with the end of a body that nobody read for its answer
                self._parse(b"")
            if self._body is not None:
                self._head = 0
                if self._headers_timer is not None:
                    self._stop_headers_timer()
            elif self._awaits_headers():
                self._limit_head()
            else:
                self._head = 0  # it was the rest of a body
            return
        if body.is_eof():
            self._further += data
            if not self._buffer_paused:
                self._pause_reading_for_buffer()
            return
        super().data_received(data)
        malformed = self._messages[-1][0] if self._messages else None
        if isinstance(malformed, _ErrInfo):
            self._messages.pop()
            drop_frames(malformed.exc)
            body.set_exception(web.RequestPayloadError("malformed"))
            body.feed_eof()
            self.close()

    def _limit_head(self) -> None:
        """Limit the time and the bytes of headers that have not all come: they are in no other limit."""
        if self._headers_timer is None:
            self._start_headers_timer()
        if self._head <= MAX_HEAD:
            return
        error = HeadersTooLarge()
        self._body = EMPTY_PAYLOAD
        self._messages.append((_ErrInfo(error.status, error, error.message), EMPTY_PAYLOAD))
        if self._waiter is not None:
            self._waiter.set_result(None)

    def log_access(self, _request: web.BaseRequest, response: web.StreamResponse, _time: float | None) -> None:
        """Go on to what came behind a request whose answer has been sent: aiohttp would log it at this point."""
        if not response.keep_alive:
            return
        self._parse(b"")  # the rest of the read that it came with
        if not self._buffer_paused:
            return
        if self._body is None or not self._body.is_eof():
            further, self._further = self._further, b""
            self.data_received(further)
        if not self._further:
            self._resume_reading_for_buffer()

    def _parse(self, data: bytes) -> None:
        """Parse up to the end of the next request."""
        super().data_received(data)
        self._body = None
        if self._messages:
            message, self._body = self._messages[0]
            if not isinstance(message, _ErrInfo) and (
                message.version is not HttpVersion11
                or message.upgrade
                or message.path[0] != "/"
                or (self._head > MAX_HEAD and _size_of(message) > MAX_HEAD)
            ):
                self._messages[0] = _judged(message, self._body)
                self._body = self._messages[0][1]

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """Resume reading only where it was paused; aiohttp asks the parser for more after every read of a body."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def _pause_transport_reading(self) -> None:
        """Watch for a hang-up while nothing is read."""
        super()._pause_transport_reading()
        if self.transport is not None:
            self._hang_ups.watch(self.transport)

    def _resume_transport_reading(self) -> None:
        """Read again, which notices a hang-up as well."""
        if self.transport is not None:
            self._hang_ups.forget(self.transport)
        super()._resume_transport_reading()

    def pause_writing(self) -> None:
        """Start a timer: a caller who takes nothing of what waits for him is cut off."""
        super().pause_writing()
        if self.connection is not None:
            self._look_at_caller(bytes_taken(self.connection), self._loop.time())

    def resume_writing(self) -> None:
        """Stop the timer: all has been taken."""
        self._stop_write_timer()
        super().resume_writing()

    def _look_at_caller(self, taken: int, since: float) -> None:
        """Cut the caller off if he has taken no more than `taken` bytes `since` so long; else look again later."""
        connection, now = self.connection, self._loop.time()
        if connection is None:
            return
        taken_by_now = bytes_taken(connection)
        if taken_by_now > taken:
            taken, since = taken_by_now, now
        if now - since >= self._write_timeout:
            self._connections.closed("write_timeout")
            connection.abort()
            return
        self._write_timer = self._loop.call_later(self._write_timeout / LOOKS, self._look_at_caller, taken, since)

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

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
            error = HeadersTooLarge()
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


def _judged(message: "RawRequestMessage", body: StreamReader) -> "tuple[RawRequestMessage | _ErrInfo, StreamReader]":
    """Refuse a request that no route could answer, and have the connection closed after one that asks for an upgrade.

    aiohttp's parser drops what comes in one read behind the latter: its caller would take the next answer for that to
    the request that was dropped.
    """
    refusal = _refusal(message)
    if refusal is not None:
        return _ErrInfo(refusal.status, refusal, refusal.message), EMPTY_PAYLOAD
    url = message.url
    if url.absolute:  # it may have no path, which stands for "/"
        url = url.with_path(url.raw_path, encoded=True, keep_query=True)
    return message._replace(url=url, should_close=message.should_close or message.upgrade), body


def _size_of(message: "RawRequestMessage") -> int:
    """Return the bytes of a request's target and headers."""
    return len(message.path) + sum(map(len, chain.from_iterable(message.raw_headers)))


def _refusal(message: "RawRequestMessage") -> GatewayError | None:
    """Return why no route could answer a request, or None."""
    if message.version not in {HttpVersion10, HttpVersion11}:
        return UnsupportedHttpVersion()
    if _size_of(message) > MAX_HEAD:
        return HeadersTooLarge()
    if message.method == "CONNECT" or message.path == "*":
        return NotFound()
    return None


class Server(web.Server):
    """Makes one `Protocol` per connection."""

    def __init__(
        self,
        handler: Any,  # noqa: ANN401
        *,
        answer_unhandled: AnswerUnhandled,
        connections: "Connections",
        hang_ups: HangUps,
        write_timeout: float,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(handler, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._registry = connections  # aiohttp has `_connections` of its own
        self._hang_ups = hang_ups
        self._write_timeout = write_timeout

    def __call__(self) -> Protocol:
        """Return the protocol of a new connection."""
        return Protocol(
            self,
            loop=self._loop,
            answer_unhandled=self._answer_unhandled,
            connections=self._registry,
            hang_ups=self._hang_ups,
            write_timeout=self._write_timeout,
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
        write_timeout: float,
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
        self._write_timeout = write_timeout
        self._hang_ups = HangUps()

    def new_protocol(self) -> Protocol:
        """Return the protocol of a new connection. Raises: TypeError, before `setup`."""
        if not isinstance(self.server, Server):
            raise TypeError("the runner has not been set up")
        return self.server()

    async def cleanup(self) -> None:
        """Close all connections."""
        await super().cleanup()
        self._hang_ups.close()

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        return Server(
            server.request_handler,
            request_factory=server.request_factory,
            answer_unhandled=self._answer_unhandled,
            connections=self._connections,
            hang_ups=self._hang_ups,
            write_timeout=self._write_timeout,
            handler_cancellation=server.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **server._kwargs,  # noqa: SLF001
        )
