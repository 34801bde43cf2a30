"""Requests that wait: for the end of an outage, or of a cooldown. First in, first out."""

import asyncio
import math
from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from gateway.errors import GatewayDraining

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_RELEASE = 2
"""Requests released at once after the first success; doubled at each step."""
RELEASE_STEP = 0.05
"""Seconds between two steps: a thousand are released within half a second."""


class Chance(Enum):
    """What the wait of a request ended with."""

    TRIAL = "trial"
    RELEASED = "released"


class Hope(Protocol):
    """What a request waits for."""

    def due(self) -> float:
        """Return the instant of the next trial."""

    def until(self) -> float:
        """Return the instant at which the wait ends in vain."""


class WaitingLimit:
    """How many requests wait in all rooms together, and how many bytes they hold; `drain` sends all of them away."""

    def __init__(self, *, max_requests: int, max_bytes: int) -> None:
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._rooms: set[WaitingRoom] = set()
        self._bytes = 0
        self._requests = 0
        self._draining = False

    def __len__(self) -> int:
        return self._requests

    def resize(self, *, max_requests: int, max_bytes: int) -> None:
        """Have other limits from now on; who waits stays."""
        self._max_requests = max_requests
        self._max_bytes = max_bytes

    def takes(self, size: int) -> bool:
        """Return whether one more request, which holds `size` bytes, may wait."""
        return not self._draining and self._requests < self._max_requests and self._bytes + size <= self._max_bytes

    def drain(self) -> None:
        """Send everybody away: the gateway is stopping."""
        self._draining = True
        for room in self._rooms:
            room.send_away()

    def check_open(self) -> None:
        """Raise: GatewayDraining, when the gateway is stopping."""
        if self._draining:
            raise GatewayDraining

    def enter(self, room: "WaitingRoom", size: int) -> None:
        """Count a request that waits in a room."""
        self._rooms.add(room)
        self._requests += 1
        self._bytes += size

    def leave(self, room: "WaitingRoom", size: int) -> None:
        """Count it no longer."""
        self._requests -= 1
        self._bytes -= size
        if not room.queue:
            self._rooms.discard(room)


class Waiter:
    """A request that waits.

    Attributes:
        chance: what the wait ends with; None: the wait was in vain, or the gateway stops.
    """

    __slots__ = ("alarm", "chance", "hope", "released", "since", "size", "tried")

    def __init__(self, size: int, since: float, hope: Hope, *, tried: bool) -> None:
        self.size = size
        self.since = since
        self.hope = hope
        self.tried = tried
        self.released = False
        self.alarm: asyncio.Handle | None = None
        self.chance: asyncio.Future[Chance | None] = asyncio.get_running_loop().create_future()


class WaitingRoom:
    """A queue of requests that wait for the same thing.

    The first one that has not yet tried in vain makes the next trial: what fails may be wrong itself. After a success
    the others are released in order, 2, 4, 8 ... at a time, until a failure.

    Args:
        limit: of all rooms.
        clock: seconds, monotonic.
        released: called with the number of requests released in a step.

    Attributes:
        queue: the requests that wait, in order.
    """

    def __init__(
        self,
        limit: WaitingLimit,
        *,
        clock: "Callable[[], float]",
        released: "Callable[[int], None]" = lambda _number: None,
    ) -> None:
        self._limit = limit
        self._clock = clock
        self._released = released
        self.queue: deque[Waiter] = deque()
        self._step: asyncio.TimerHandle | None = None

    def enter(self, size: int, since: float, hope: Hope, *, tried: bool = False) -> Waiter:
        """Begin to wait for a chance to make an attempt; `leave` afterwards, however the wait ended.

        Args:
            size: bytes that the request holds.
            since: when it came, for its place in the queue.
            hope: what it waits for.
            tried: whether it made a trial in vain.

        Raises:
            GatewayDraining: the gateway is stopping.
        """
        self._limit.check_open()
        waiter = Waiter(size, since, hope, tried=tried)
        place = next((at for at, other in enumerate(self.queue) if other.since > since), len(self.queue))
        self.queue.insert(place, waiter)
        self._limit.enter(self, size)
        self._look(waiter)
        return waiter

    def leave(self, waiter: Waiter) -> None:
        """End a wait."""
        if waiter.alarm is not None:
            waiter.alarm.cancel()
        if not waiter.released:
            was_next = self._next() is waiter
            self.queue.remove(waiter)
            if was_next:
                self.wake()
        self._limit.leave(self, waiter.size)

    def _look(self, waiter: Waiter) -> None:
        """Look whether the chance of a request has come, or its wait has ended."""
        if waiter.chance.done():
            return
        if waiter.released:
            waiter.chance.set_result(Chance.RELEASED)
            return
        trial = waiter.hope.due() if self._next() is waiter else math.inf
        end = waiter.hope.until()
        now = self._clock()  # after the instants, one of which may be "now"
        if min(trial, end) <= now:
            waiter.chance.set_result(Chance.TRIAL if trial <= now else None)
        else:
            waiter.alarm = asyncio.get_running_loop().call_later(min(trial, end) - now, self._look, waiter)

    def _wake(self, waiter: Waiter) -> None:
        """Let a request look again, when what is under way now is done."""
        if waiter.alarm is not None:
            waiter.alarm.cancel()
        waiter.alarm = asyncio.get_running_loop().call_soon(self._look, waiter)

    def wake(self) -> None:
        """Let the next one look again: what it waits for may have changed."""
        if self.queue:
            self._wake(self._next())

    def wake_all(self) -> None:
        """Let everybody look again."""
        for waiter in self.queue:
            self._wake(waiter)

    def send_away(self) -> None:
        """End everybody's wait without a chance; who has been released already goes on."""
        for waiter in self.queue:
            if not waiter.chance.done():
                waiter.chance.set_result(None)

    def release(self) -> None:
        """Release everybody, step by step."""
        if self._step is None:
            self._release(FIRST_RELEASE)

    def hold(self) -> None:
        """Release nobody any more."""
        if self._step is not None:
            self._step.cancel()
            self._step = None

    def _release(self, number: int) -> None:
        self._step = None
        now = min(number, len(self.queue))
        for _ in range(now):
            waiter = self.queue.popleft()
            waiter.released = True
            self._wake(waiter)
        if now:
            self._released(now)
        if self.queue:
            self._step = asyncio.get_running_loop().call_later(RELEASE_STEP, self._release, 2 * number)

    def _next(self) -> Waiter:
        """Return who makes the next trial."""
        return next((waiter for waiter in self.queue if not waiter.tried), self.queue[0])
