"""Every override of aiohttp's server: malformed HTTP in our envelope, and repairs.

What is used here is not documented by aiohttp: its version is bounded in pyproject.toml, and
tests/unit/gateway/test_aiohttp.py asserts that each name exists and does what is assumed.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aiohttp import StreamReader, web
from aiohttp.http import HttpRequestParser
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway.errors import GatewayError, HeadersTooLarge, InternalError, InvalidRequest, drop_frames
from gateway.server.hang_ups import HangUps
from gateway.server.tcp import bytes_taken, limit_unsent

if TYPE_CHECKING:
    from gateway.server.in_flight import InFlight

FIRST_REQUEST = 30.0
"""Seconds that a new connection may take until its first request line and headers have come."""
UNSENT = 131_072
"""Bytes of answers that the kernel holds for a caller beyond what is under way to him."""
LOOKS = 10
"""Looks at what a caller takes in the time after which he counts as taking nothing."""
LAST_ANSWERS = 1.0
"""Seconds that aiohttp waits for answers when it stops."""

AnswerUnhandled = Callable[[GatewayError, BaseException | None], web.Response]
"""Makes the answer to what fails outside of the app."""


class Protocol(RequestHandler):
    """One connection."""

    def __init__(
        self,
        *args: Any,  # noqa: ANN401
        answer_unhandled: AnswerUnhandled,
        in_flight: "InFlight",
        hang_ups: HangUps,
        write_timeout: float,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(*args, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._in_flight = in_flight
        self._hang_ups = hang_ups
        self._write_timeout = write_timeout
        self._write_timer: asyncio.TimerHandle | None = None
        self._first_request_timer: asyncio.TimerHandle | None = None
        self._connection: asyncio.Transport | None = None  # as `transport`, which aiohttp forgets when it closes
        self._body: StreamReader | None = None  # of the request that has not been answered yet
        self._further = b""  # what came behind it
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
        self._connection = self.transport
        if self._connection is not None:
            self._in_flight.add_connection(self._connection)
            self._connection.set_write_buffer_limits(0)  # nothing is written while something has yet to be taken
            limit_unsent(self._connection, UNSENT)
        self._first_request_timer = asyncio.get_running_loop().call_later(FIRST_REQUEST, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop the timer."""
        if self._first_request_timer is not None:
            self._first_request_timer.cancel()
            self._first_request_timer = None
        self._stop_write_timer()
        if self._connection is not None:
            self._in_flight.remove_connection(self._connection)
            self._hang_ups.forget(self._connection)
            self._connection = None
        super().connection_lost(exc)
        self._body, self._further = None, b""  # a body refers to its connection: a cycle
        self._messages.clear()

    def data_received(self, data: bytes) -> None:
        """Parse one request at a time: what comes behind it waits, one read of it, until the answer has been sent.

        aiohttp would hold 32 of them, each with what has come of its body; and would let the reader of a body wait when
        its chunks turn malformed.
        """
        body = self._body
        if body is None:
            self._parse(data)
            if self._body is None:  # what came may begin with the end of a body that nobody read for its answer
                self._parse(b"")
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
        self._body = self._messages[0][1] if self._messages else None

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
        if self._connection is not None:
            self._look_at_caller(bytes_taken(self._connection), self._loop.time())

    def resume_writing(self) -> None:
        """Stop the timer: all has been taken."""
        self._stop_write_timer()
        super().resume_writing()

    def _look_at_caller(self, taken: int, since: float) -> None:
        """Cut the caller off if he has taken no more than `taken` bytes `since` so long; else look again later."""
        connection, now = self._connection, self._loop.time()
        if connection is None:
            return
        taken_by_now = bytes_taken(connection)
        if taken_by_now > taken:
            taken, since = taken_by_now, now
        if now - since >= self._write_timeout:
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
        if status >= 500:  # noqa: PLR2004
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


class Server(web.Server):
    """Makes one `Protocol` per connection."""

    def __init__(
        self,
        handler: Any,  # noqa: ANN401
        *,
        answer_unhandled: AnswerUnhandled,
        in_flight: "InFlight",
        hang_ups: HangUps,
        write_timeout: float,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(handler, **kwargs)
        self._answer_unhandled = answer_unhandled
        self._in_flight = in_flight
        self._hang_ups = hang_ups
        self._write_timeout = write_timeout

    def __call__(self) -> Protocol:
        """Return the protocol of a new connection."""
        return Protocol(
            self,
            loop=self._loop,
            answer_unhandled=self._answer_unhandled,
            in_flight=self._in_flight,
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
        in_flight: "InFlight",
        write_timeout: float,
    ) -> None:
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
        self._write_timeout = write_timeout
        self._hang_ups = HangUps()

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
            in_flight=self._in_flight,
            hang_ups=self._hang_ups,
            write_timeout=self._write_timeout,
            handler_cancellation=server.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **server._kwargs,  # noqa: SLF001
        )
