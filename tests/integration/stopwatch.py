"""Time, as far as the machine gave any: so that a promise in milliseconds can be tested on a busy one."""

import asyncio
from contextlib import suppress
from time import monotonic
from typing import Self

STEP = 0.005
FINE = 0.003
"""Seconds that a sleep may always be late."""


class Stopwatch:
    """Measures a block, and beside it how late the event loop ran: everything in these tests shares that loop.

    Attributes:
        took: seconds from entering to leaving (or until now).
        starved: seconds by which the loop's own timers were late meanwhile, added up.
    """

    def __init__(self) -> None:
        self.started = 0.0
        self.starved = 0.0
        self._ended: float | None = None
        self._task: asyncio.Task[None]

    @property
    def took(self) -> float:
        """Seconds."""
        return (self._ended if self._ended is not None else monotonic()) - self.started

    def within(self, seconds: float) -> bool:
        """Whether the block took no longer than that, the machine's own delays left aside."""
        return self.took <= seconds + self.starved

    def until(self, instant: float) -> float:
        """Seconds from the start to an instant of the monotonic clock, the machine's own delays left aside."""
        return instant - self.started - self.starved

    async def __aenter__(self) -> Self:
        self.started = monotonic()
        self._task = asyncio.create_task(self._look())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._ended = monotonic()
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    async def _look(self) -> None:
        due = self.started + STEP  # this begins only when the block waits for the first time
        while True:
            try:
                await asyncio.sleep(due - monotonic())
            finally:
                late = monotonic() - due
                if late > FINE:
                    self.starved += late
            due = monotonic() + STEP

    def __str__(self) -> str:
        return f"took {self.took:.3f} s, of which the machine was late for {self.starved:.3f} s"
