"""How long the model takes, alone and under load."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import monotonic

from mock_model.draws import draw

FULL_LOAD_FACTOR = 2.0
"""How many times as long a decoding step takes at full capacity as for a single call."""
SLICE = 0.02
"""Seconds of work after which a call looks again how many others there are."""


class Load:
    """The calls that are being answered, and those that wait for a place.

    At most `capacity` calls are answered at a time; the others wait in the order in which they came. The more there
    are, the longer each answer takes. With capacity 0 each call is answered as if it were alone.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.running = 0
        self.waiting = 0
        self._places = asyncio.Semaphore(capacity) if capacity else None

    def factor(self) -> float:
        """By how much the load stretches each wait: 1 for a call that is alone, 2 at full capacity."""
        if self.capacity <= 1 or self.running <= 1:
            return 1.0
        return 1.0 + (FULL_LOAD_FACTOR - 1.0) * (self.running - 1) / (self.capacity - 1)

    async def work(self, seconds: float) -> None:
        """Take the time of `seconds` of work: the more calls there are at a moment, the longer."""
        due = monotonic()
        while seconds > 0:
            part = min(seconds, SLICE) if self.capacity > 1 else seconds
            seconds -= part
            due += part * self.factor()
            await asyncio.sleep(due - monotonic())

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place and keep it while the call is answered."""
        if self._places is not None:
            self.waiting += 1
            try:
                await self._places.acquire()
            finally:
                self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            if self._places is not None:
                self._places.release()


@dataclass(frozen=True, slots=True)
class Pace:
    """The time of each decoding step, in seconds.

    Attributes:
        seed: decides the jitter.
        first_token: until the first token.
        interval: between two tokens.
        jitter: the share of a wait, 0 to 1, by which it may be shorter or longer.
    """

    seed: int
    first_token: float
    interval: float
    jitter: float

    def wait(self, fingerprint: str, occurrence: int, step: int) -> float:
        """Return the time before token number `step` (from 0) of a call, without load."""
        base = self.interval if step else self.first_token
        if not base or not self.jitter:
            return base
        return base * (1 + self.jitter * (2 * draw(self.seed, "pace", fingerprint, occurrence, step) - 1))

    def total(self, fingerprint: str, occurrence: int, steps: int) -> float:
        """Return the time of an unstreamed answer of `steps` tokens, without load."""
        if not steps:
            return 0.0
        if not self.jitter:
            return self.first_token + (steps - 1) * self.interval
        return sum(self.wait(fingerprint, occurrence, step) for step in range(steps))
