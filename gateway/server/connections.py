"""The connections of callers: how many there may be, and which one is closed for a new one."""

import asyncio
import fcntl
import resource
import struct
import termios
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.server.aiohttp_protocol import Protocol

CloseReason = Literal["keepalive_timeout", "headers_timeout", "made_room", "write_timeout"]
"""Why we close a connection that its caller would have kept."""
RESERVE = 192
"""Descriptors that callers and backends leave to logs, probes, the collector, and to connections that just close."""
EXTRA = 32
"""Connections above the limit while none is idle: they ask how the gateway is, or are told that it is full."""
FRESH = 0.25
"""Seconds in which a new connection is about to send its request, and is not closed for another."""
NOT_TAKEN = 2.0
"""Seconds without a byte taken after which a stop waits no longer for what callers have yet to take."""
POLL = 0.02
"""Seconds between two looks at what they have taken."""


class Connections:
    """The open connections of callers.

    Beyond `limit` the one that has been idle for longest is closed for a new one. Where none is idle the new one is
    one of few `EXTRA`, on which prompts are refused; beyond those it waits until there is a place.

    Args:
        limit: of connections on which prompts are answered.
        closed: counts a connection that is closed for a reason of ours.
    """

    def __init__(self, limit: int, closed: "Callable[[CloseReason], None]") -> None:
        self.limit = limit
        self.closed = closed
        self._regular: dict[Protocol, None] = {}  # in the order in which they came: several become idle at one time
        self._extra: dict[Protocol, None] = {}
        self._idlest: deque[tuple[float, Protocol]] = deque()

    def __len__(self) -> int:
        return len(self._regular) + len(self._extra)

    def make_room(self) -> bool:
        """Return whether there is a place for a new connection; if need be an idle one is closed for it."""
        if len(self._regular) < self.limit:
            self._idlest.clear()
            return True
        return self.close_idlest() or len(self._extra) < EXTRA or self._close_idlest_extra()

    def add(self, connection: "Protocol") -> None:
        """Give a new connection the place that `make_room` has found."""
        if len(self._regular) < self.limit:
            self._regular[connection] = None
        else:
            self._extra[connection] = None
            connection.refuse_prompts()

    def remove(self, connection: "Protocol") -> None:
        """Give back the place of a connection that is closed."""
        self._regular.pop(connection, None)
        self._extra.pop(connection, None)

    def close_idlest(self) -> bool:
        """Close the connection that has been idle for longest; return whether there was one."""
        idlest = self._find_idlest()
        if idlest is None:
            return False
        self._close_for_another(idlest)
        return True

    async def answers_taken(self) -> None:
        """Wait until callers have taken what was sent to them, or take nothing of it any more."""
        loop = asyncio.get_running_loop()
        least, since = float("inf"), 0.0
        while left := sum(map(unsent, self._regular)) + sum(map(unsent, self._extra)):
            if left < least:
                least, since = left, loop.time()
            elif loop.time() - since >= NOT_TAKEN:
                return
            await asyncio.sleep(POLL)

    def abort_untaken(self) -> None:
        """Abort connections whose callers have not taken what was sent to them."""
        for connection in (*self._regular, *self._extra):
            if connection.connection is not None and unsent(connection):
                connection.connection.abort()

    def _close_idlest_extra(self) -> bool:
        for connection in self._extra:
            if connection.idle_since is not None:
                self._close_for_another(connection)
                return True
        return False

    def _close_for_another(self, connection: "Protocol") -> None:
        self.remove(connection)
        connection.close_for("made_room")

    def _find_idlest(self) -> "Protocol | None":
        """Return the regular connection that has been idle for longest.

        All are looked at once, and those that were idle then go in their turn unless a request has come since: whatever
        became idle later has been so for less long.
        """
        while self._idlest:
            idle_then, connection = self._idlest.popleft()
            if connection.idle_since == idle_then:
                return connection
        settled = asyncio.get_running_loop().time() - FRESH
        idle = [
            (since, connection)
            for connection in self._regular
            if (since := connection.idle_since) is not None and (connection.has_asked or since <= settled)
        ]
        idle.sort(key=lambda each: each[0])
        self._idlest.extend(idle)
        return self._idlest.popleft()[1] if self._idlest else None


def unsent(connection: "Protocol") -> int:
    """Return the bytes that wait here and in the system until the caller takes them; 0 where only the system has any.

    The system tells most truly whether a caller takes anything: it asks for more only when a good part has gone.
    """
    transport = connection.connection
    size = 0 if transport is None else transport.get_write_buffer_size()
    if transport is None or not size:
        return 0
    with suppress(OSError, ValueError):
        descriptor = transport.get_extra_info("socket").fileno()
        size += struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0"))[0]
    return size


def connections_allowed(wanted: int | None, max_in_flight: int) -> int:
    """Return how many connections of callers the limit of open files has room for.

    Each request in flight needs one to a backend too. There are as many for callers as for backends at least.

    Args:
        wanted: how many there are to be at most; None for as many as there is room for.
        max_in_flight: requests at once.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        limit = 1 << 30
    free = limit - min(RESERVE, limit // 4)
    allowed = max(free - max_in_flight, free // 2)
    return allowed if wanted is None else min(wanted, free)


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one: each request takes two sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
