"""The caller's side of a streamed answer: commit, events, heartbeats, and an end that is never silent."""

import asyncio
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11, web

from gateway.errors import CallerLeft, ErrorEvent, GatewayError
from gateway.server.responses import error_event, explaining

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Self

    from gateway.record import Record

LAST_WORD = 0.05
"""Seconds an error event may take to a caller who does not read; then the connection is aborted."""
HEARTBEAT = b": waiting for the model\n\n"


class Outlet:
    """One streamed answer. Nothing is sent before `commit`, but for heartbeats when they are on.

    Attributes:
        committed: the first byte of a backend's answer has gone out.
        opened: headers have gone out (by commit, or by a heartbeat before it).
        sequence_number: the number an error event gets, None where events have none.
    """

    def __init__(
        self, request: web.Request, record: "Record", *, heartbeat: float, sequence_number: int | None = None
    ) -> None:
        self._request = request
        self._record = record
        self._heartbeat = heartbeat
        self._response: web.StreamResponse | None = None
        self._beating: asyncio.Task[None] | None = None
        self._last_write = monotonic()
        self._opening = asyncio.Lock()
        self._ended = False
        self._chunked = request.version >= HttpVersion11
        self.committed = False
        self.sequence_number = sequence_number

    @property
    def opened(self) -> bool:
        """Whether the status has gone out."""
        return self._response is not None

    @property
    def response(self) -> web.StreamResponse:
        """The answer that has been sent."""
        if self._response is None:
            raise RuntimeError("nothing has gone out")
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

    async def commit(self, headers: "Mapping[str, str]", events: bytes) -> None:
        """Send the status, the headers and the first events: from here on nothing is retried.

        Raises:
            CallerLeft: nobody is there any more.
        """
        self.committed = True
        if not await self._opened_with(events, headers):
            await self.write(events)

    async def write(self, events: bytes) -> None:
        """Send whole events; waits while the caller does not read. Raises: CallerLeft.

        Straight to the transport: aiohttp's writer takes 10,000 instructions more for each event (bench/README.md).
        """
        request = self._request
        transport = request.transport
        if transport is None or transport.is_closing():
            raise CallerLeft("The caller left.")
        transport.write(b"%x\r\n%b\r\n" % (len(events), events) if self._chunked else events)
        if self._beating is not None:
            self._last_write = monotonic()
        if request.protocol.writing_paused:
            try:
                await request.writer.drain()
            except ConnectionError:
                raise CallerLeft("The caller left.") from None

    async def end(self) -> None:
        """End a whole answer; waits while the caller does not read. Raises: CallerLeft."""
        self._ended = True
        try:
            await self.response.write_eof()
        except ConnectionError:
            raise CallerLeft("The caller left.") from None

    async def fail(self, error: GatewayError) -> web.StreamResponse:
        """End with one error event; never waits longer than `LAST_WORD` for the caller."""
        event = error.event if isinstance(error, ErrorEvent) else error_event(error, self.sequence_number)
        taken = False
        try:
            taken = not self._ended and await self._end_with(event)
        finally:
            if not taken and self._request.transport is not None:
                self._request.transport.abort()
        return self.response

    async def _end_with(self, event: bytes) -> bool:
        """Send the last event and the end; whether the caller took them within `LAST_WORD`."""
        try:
            async with asyncio.timeout(LAST_WORD):
                await self.response.write(event)
                await self.response.write_eof()
        except (TimeoutError, ConnectionError):
            return False
        return True

    async def _opened_with(self, events: bytes, headers: "Mapping[str, str]") -> bool:
        """Send the status, the headers and the first events in one; False when the status has gone out already."""
        async with self._opening:
            if self._response is not None:
                return False
            response = web.StreamResponse(
                headers={"cache-control": "no-cache", **headers, **explaining(self._record, monotonic())}
            )
            try:
                await response.prepare(self._request)
                self._response = response
                self._record.status = response.status
                self._last_write = monotonic()
                await self._request.writer.write(events)
            except ConnectionError:
                raise CallerLeft("The caller left.") from None
            return True

    async def _beat(self) -> None:
        """One comment per interval in which nothing else was sent."""
        while not self._ended:
            await asyncio.sleep(max(0.0, self._last_write + self._heartbeat - monotonic()))
            if self._ended or monotonic() - self._last_write < self._heartbeat:
                continue
            opened = await self._opened_with(HEARTBEAT, {"content-type": "text/event-stream"})
            if not opened and not self._ended:
                await self.write(HEARTBEAT)
