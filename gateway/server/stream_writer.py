"""The caller's side of an answer that is sent as it comes: commit, heartbeats, and an end that is never silent."""

import asyncio
import socket
import struct
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

from gateway.errors import BackendError, CallerLeft, GatewayError
from gateway.server.aiohttp_protocol import OpenAnswer
from gateway.server.responses import SERVER, explaining

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType
    from typing import Self

    from gateway.dialects.dialect import Dialect, StreamState
    from gateway.forwarding.call import HeldUp
    from gateway.policy.admission import Admission
    from gateway.record import Record

LARGE = 16_384
"""Bytes of events that are sent together without a copy."""
POLL = 0.005
"""Seconds between two looks at whether the caller's side has taken the last event."""
LAST_WORD = 0.05
"""Seconds that an error event may take to a caller who does not read; then the connection is aborted."""
HEARTBEAT = b": waiting for the model\n\n"
EVENT_STREAM = "text/event-stream"
UNBUFFERED = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Headers of event streams, so that no proxy holds them back."""


class StreamWriter:
    """One answer that is sent as it comes: a stream, or what is passed through.

    Nothing is sent before `commit`, except heartbeats when they are on.

    Args:
        request: of the caller.
        record: its status is set.
        dialect: words an error event.
        admission: knows whether the gateway is stopping, and the connection not kept.
        heartbeat: seconds, or 0.
        clock: seconds, monotonic.

    Attributes:
        committed: the first byte of a backend's answer has gone out.
        opened: headers have gone out, by commit or by a heartbeat before it.
    """

    def __init__(
        self,
        request: web.Request,
        record: "Record",
        dialect: "Dialect",
        *,
        admission: "Admission",
        heartbeat: float,
        clock: "Callable[[], float]",
    ) -> None:
        self._request = request
        self._protocol = request.protocol  # asked for each time, it costs as much as a call
        self._record = record
        self._dialect = dialect
        self._admission = admission
        self._heartbeat = heartbeat
        self._clock = clock
        self._response: OpenAnswer | None = None
        self._state: StreamState | None = None
        self._held_up: HeldUp | None = None
        self._beating: asyncio.Task[None] | None = None
        self._last_write = clock()
        self._opening = asyncio.Lock()
        self._ended = False
        self._chunked = request.version >= HttpVersion11
        self._length: int | None = None
        self.committed = False

    @property
    def opened(self) -> bool:
        """Whether the status has gone out."""
        return self._response is not None

    @property
    def response(self) -> OpenAnswer:
        """The answer that has been sent."""
        if self._response is None:
            raise RuntimeError("nothing has been sent")
        return self._response

    async def __aenter__(self) -> "Self":
        if self._heartbeat > 0:
            self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: "TracebackType | None"
    ) -> None:
        if self._beating is not None:
            self._beating.cancel()
            with suppress(asyncio.CancelledError, CallerLeft):
                await self._beating
            self._beating = None

    async def commit(
        self,
        headers: "Mapping[str, str]",
        events: bytes,
        state: "StreamState | None",
        held_up: "HeldUp",
        *,
        status: int = 200,
        length: int | None = None,
    ) -> None:
        """Send the status, the headers and the first events: from here on nothing is retried. Raises: CallerLeft."""
        self.committed = True
        self._state = state
        self._held_up = held_up
        if length is not None:
            self._length, self._chunked = length, False
        first = events if len(events) < LARGE else b""
        opened = await self._open(first, headers, status)
        if (not opened and events) or len(first) < len(events):
            await self.write(events, held=len(events))

    async def write(self, events: bytes, held: int = 0) -> None:
        """Send whole events; waits while the caller does not read. Raises: CallerLeft.

        Of what then waits for the caller, `held` bytes are counted as held already.

        They go straight to the transport: aiohttp's writer takes 10,000 instructions more for each event
        (docs/performance.md). Large ones are not copied.
        """
        protocol = self._protocol
        transport = protocol.transport
        if transport is None or transport.is_closing():
            raise CallerLeft
        if not self._chunked:
            transport.write(events)
        elif len(events) < LARGE:
            transport.write(b"%x\r\n%b\r\n" % (len(events), events))
        else:
            transport.writelines((b"%x\r\n" % len(events), events, b"\r\n"))
        if self._beating is not None:
            self._last_write = self._clock()
        if protocol.writing_paused:
            await self._until_taken(max(0, transport.get_write_buffer_size() - held))

    async def _until_taken(self, size: int) -> None:
        """Wait until the caller's side has taken what was sent, of which `size` bytes nobody else counts as held.

        Meanwhile nothing more comes from the backend.
        """
        with nullcontext() if self._held_up is None else self._held_up(size):
            try:
                await self._request.writer.drain()
            except ConnectionError:
                raise CallerLeft from None

    async def end(self) -> None:
        """End a complete answer; waits while the caller does not read. Raises: CallerLeft."""
        self._ended = True
        try:
            await self.response.write_eof()
        except ConnectionError:
            raise CallerLeft from None

    async def end_with_error(self, error: GatewayError) -> OpenAnswer:
        """End with one error event, and then without the body's proper end.

        Clients that skip events they do not know see it too. Never waits longer than `LAST_WORD` for the caller.
        """
        own = error.event if isinstance(error, BackendError) and self.committed else None
        event = own or self._dialect.error_event(error, self._state)
        taken = False
        try:
            taken = not self._ended and await self._take_last(event)
        finally:
            transport = self._request.transport
            if transport is not None:
                if not taken:
                    transport.abort()
                elif self._chunked or self._length is not None:
                    transport.close()
                else:
                    _reset(transport)
        return self.response

    async def _take_last(self, event: bytes) -> bool:
        """Send the last event; return whether the caller's side took it within `LAST_WORD`."""
        transport = self._request.transport
        try:
            async with asyncio.timeout(LAST_WORD):
                await self.response.write(event)
                while transport is not None and transport.get_write_buffer_size():  # noqa: ASYNC110 - nothing tells
                    await asyncio.sleep(POLL)
        except (TimeoutError, ConnectionError):
            return False
        return True

    async def _open(self, events: bytes, headers: "Mapping[str, str]", status: int = 200) -> bool:
        """Send the status, the headers and the first events in one; return False when the status has gone out."""
        async with self._opening:
            if self._response is not None:
                return False
            unbuffered = headers.get("content-type", "").lower().startswith(EVENT_STREAM)
            own = UNBUFFERED if unbuffered else {}
            response = OpenAnswer(status=status, headers={**own, **headers, "server": SERVER})
            response.lines = explaining(self._record, self._clock())
            if self._length is not None:
                response.content_length = self._length
            if self._admission.stopping:
                response.force_close()
            try:
                await response.prepare(self._request)
                self._response = response
                self._record.status = response.status
                self._last_write = self._clock()
                # Without its own wait for a slow caller, of which the backend would not be told.
                await self._request.writer.write(events, drain=False)  # type: ignore[call-arg]  # of aiohttp's own writer
            except ConnectionError:
                raise CallerLeft from None
        if self._request.protocol.writing_paused:
            await self._until_taken(0)
        return True

    async def _beat(self) -> None:
        """Send one comment per interval in which nothing else was sent."""
        while not self._ended:
            await asyncio.sleep(max(0.0, self._last_write + self._heartbeat - self._clock()))
            if self._ended or self._clock() - self._last_write < self._heartbeat:
                continue
            opened = await self._open(HEARTBEAT, {"content-type": EVENT_STREAM})
            if not opened and not self._ended:
                await self.write(HEARTBEAT)


def _reset(transport: asyncio.Transport) -> None:
    """Reset a connection whose bytes have been taken: before HTTP/1.1 its plain end is the proper end of a body."""
    connection: socket.socket | None = transport.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()
