"""When an event loop stood still: its process was stopped, its machine was busy or asleep, a callback took long.

In that time nothing that arrives is read and nothing that is due is sent, so it counts against nobody. Only timers that
have come due ask for it; the ordinary way of a request costs nothing.
"""

import asyncio
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Callable

INTERVAL = 0.1
"""Seconds between two looks at the clock: of each stall at most so much goes unnoticed."""
SHORTEST = 0.05
"""Seconds; being late by less is no stall."""
REMEMBERED = 1000
"""Stalls that are remembered."""
SHOWN = 15.0
"""Seconds of which the worst delay is shown: a scrape every 15 s sees every stall."""


class Stalls:
    """Looks at the clock at short intervals: when a look comes late, the loop stood still. `begin` it in its loop.

    Args:
        clock: seconds, monotonic; as the loop's.
    """

    def __init__(self, clock: "Callable[[], float]" = monotonic) -> None:
        self._clock = clock
        self._due = clock() + INTERVAL
        self._stalls: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)
        self._delays: deque[float] = deque(maxlen=round(SHOWN / INTERVAL))

    def begin(self) -> None:
        """Look at the clock from now on, for as long as the running loop runs."""
        self._due = self._clock() + INTERVAL
        asyncio.get_running_loop().call_later(INTERVAL, self._look)

    def since(self, instant: float) -> float:
        """Return the seconds since an instant of the clock in which the loop stood still, up to now."""
        now = self._clock()
        seconds = now - max(self._due, instant) if now - self._due >= SHORTEST else 0.0  # not looked at yet
        for began, ended in reversed(self._stalls):
            if ended <= instant:
                break
            seconds += ended - max(began, instant)
        return max(0.0, seconds)

    def worst(self) -> float:
        """Return by how many seconds the loop was late at worst in the last 15 s."""
        return max(0.0, self._clock() - self._due, *self._delays)

    def _look(self) -> None:
        now = self._clock()
        delay = now - self._due
        self._delays.append(delay)
        if delay >= SHORTEST:
            self._stalls.append((self._due, now))
        self.begin()


_of_loops: "WeakKeyDictionary[asyncio.AbstractEventLoop, Stalls]" = WeakKeyDictionary()


def stalls_of_loop() -> Stalls:
    """Return the stalls of the running loop, which are noticed from the first call on.

    They are the loop's own, not handed to each timer: there is one loop, and all of its timers stand still with it.
    """
    loop = asyncio.get_running_loop()
    stalls = _of_loops.get(loop)
    if stalls is None:
        stalls = _of_loops[loop] = Stalls()
        stalls.begin()
    return stalls


def stalled_since(instant: float) -> float:
    """Return the seconds since an instant (of a monotonic clock) in which the running loop stood still.

    0 where nobody has begun to notice: see `stalls_of_loop`.
    """
    stalls = _of_loops.get(asyncio.get_running_loop())
    return stalls.since(instant) if stalls is not None else 0.0
