"""How many retries a replica may receive: a share of its first attempts.

After the retry budget of Finagle and the retry throttling of gRPC (gRFC A6): without a budget, retries multiply the
load on a backend at the very moment it cannot carry what it has.
"""

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOW = 10.0
"""Seconds looked back on."""
BUCKETS = 100


class RetryBudget:
    """In any `WINDOW` seconds: retries <= max(`ratio` x first attempts, `floor`); with ratio 0 none at all.

    Retries are counted exactly, first attempts in buckets of a tenth of a second that expire slightly early: a rounding
    error never allows a retry too many.
    """

    __slots__ = ("_buckets", "_clock", "_firsts", "_floor", "_ratio", "_retries", "_slot")

    def __init__(self, *, ratio: float, floor: int, clock: "Callable[[], float]") -> None:
        self._ratio = ratio
        self._floor = floor
        self._clock = clock
        self._buckets = [0] * BUCKETS
        self._slot = int(clock() * BUCKETS / WINDOW)
        self._firsts = 0
        self._retries: deque[float] = deque()

    @property
    def allows_any(self) -> bool:
        """Whether retries are allowed at all."""
        return self._ratio > 0

    def count_first(self) -> None:
        """Count a first attempt at this replica."""
        self._expire(self._clock())
        self._buckets[self._slot % BUCKETS] += 1
        self._firsts += 1

    def left(self) -> int:
        """Return how many retries may be sent now."""
        if not self.allows_any:
            return 0
        now = self._clock()
        self._expire(now)
        while self._retries and self._retries[0] <= now - WINDOW:
            self._retries.popleft()
        share = self._ratio * self._firsts
        allowed, sent = int(share) if share > self._floor else self._floor, len(self._retries)
        return allowed - sent if allowed > sent else 0

    def take(self) -> bool:
        """Take one retry; return False when the budget is spent."""
        if self.left() < 1:
            return False
        self._retries.append(self._clock())
        return True

    def _expire(self, now: float) -> None:
        """Empty the buckets that are older than the window."""
        slot = int(now * BUCKETS / WINDOW)
        if slot == self._slot:
            return
        expired = min(slot - self._slot, BUCKETS)
        for step in range(1, expired + 1):
            index = (self._slot + step) % BUCKETS
            self._firsts -= self._buckets[index]
            self._buckets[index] = 0
        self._slot = max(slot, self._slot)
