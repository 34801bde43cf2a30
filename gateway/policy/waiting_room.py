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
        self._waiters: set[Waiter] = set()
        self._bytes = 0
        self._draining = False

    def __len__(self) -> int:
        return len(self._waiters)

    def takes(self, size: int) -> bool:
        """Return whether one more request, which holds `size` bytes, may wait."""
        return not self._draining and len(self._waiters) < self._max_requests and self._bytes + size <= self._max_bytes

    def drain(self) -> None:
        """Send everybody away: the gateway is stopping."""
        self._draining = True
        for waiter in self._waiters:
            waiter.wake()

    def check_open(self) -> None:
        """Raise: GatewayDraining, when the gateway is stopping."""
        if self._draining:
            raise GatewayDraining

    def enter(self, waiter: "Waiter") -> None:
        """Count a request that waits."""
        self._waiters.add(waiter)
        self._bytes += waiter.size

    def leave(self, waiter: "Waiter") -> None:
        """Count it no longer."""
        self._waiters.discard(waiter)
        self._bytes -= waiter.size


class Waiter:
    """A request that waits."""

    __slots__ = ("released", "since", "size", "tried", "woken")

    def __init__(self, size: int, since: float, *, tried: bool) -> None:
        self.size = size
        self.since = since
        self.tried = tried
        self.released = False
        self.woken: asyncio.Future[None] | None = None

    def wake(self) -> None:
        """Let it look again whether its chance has come."""
        if self.woken is not None and not self.woken.done():
            self.woken.set_result(None)


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

    async def wait(self, size: int, since: float, hope: Hope, *, tried: bool = False) -> Chance | None:
        """Wait for a chance to make an attempt.

        Args:
            size: bytes that the request holds.
            since: when it came, for its place in the queue.
            hope: what it waits for.
            tried: whether it made a trial in vain.

        Returns:
            The chance, or None at the end of the wait.

        Raises:
            GatewayDraining: the gateway is stopping.
        """
        waiter = Waiter(size, since, tried=tried)
        place = next((at for at, other in enumerate(self.queue) if other.since > since), len(self.queue))
        self.queue.insert(place, waiter)
        self._limit.enter(waiter)
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._limit.check_open()
                if waiter.released:
                    return Chance.RELEASED
                trial = hope.due() if self._next() is waiter else math.inf
                end = hope.until()
                now = self._clock()  # after the instants, one of which may be "now"
                if min(trial, end) <= now:
                    return Chance.TRIAL if trial <= now else None
                waiter.woken = loop.create_future()
                alarm = loop.call_later(min(trial, end) - now, waiter.wake)
                try:
                    await waiter.woken
                finally:
                    alarm.cancel()
        finally:
            self._limit.leave(waiter)
            self._remove(waiter)

    def wake(self) -> None:
        """Let the next one look again: what it waits for may have changed."""
        if self.queue:
            self._next().wake()

    def wake_all(self) -> None:
        """Let everybody look again."""
        for waiter in self.queue:
            waiter.wake()

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
            waiter.wake()
        if now:
            self._released(now)
        if self.queue:
            self._step = asyncio.get_running_loop().call_later(RELEASE_STEP, self._release, 2 * number)

    def _remove(self, waiter: Waiter) -> None:
        if waiter.released:
            return
        was_next = self._next() is waiter
        self.queue.remove(waiter)
        if was_next:
            self.wake()

    def _next(self) -> Waiter:
        """Return who makes the next trial."""
        return next((waiter for waiter in self.queue if not waiter.tried), self.queue[0])
