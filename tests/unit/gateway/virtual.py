"""An event loop whose time passes only while everybody waits: timers fire in order, at once, on any machine."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from tests.unit.gateway.fakes import Clock

T = TypeVar("T")
TICK = 1e-6
"""Added to each wait, so that rounding never wakes anybody too early."""


READING = 1e-9
"""Passes with each look at the clock, as in reality: no two looks find the same instant."""


class _Moving(Clock):
    def __call__(self) -> float:
        self.now += READING
        return self.now


class _Selector(selectors.SelectSelector):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise RuntimeError("everybody waits, and no timer runs: a deadlock")
        if timeout > 0:
            self._clock.forward(timeout + TICK)
        return super().select(0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_Selector(clock))
        self._virtual = clock

    def time(self) -> float:
        return self._virtual()


def run(story: Callable[[Clock], Coroutine[Any, Any, T]]) -> T:
    """Run `story` in virtual time; what it is handed is the clock of the loop."""
    clock = _Moving()
    with asyncio.Runner(loop_factory=lambda: _Loop(clock)) as runner:
        return runner.run(story(clock))


async def settle() -> None:
    """Let every task run until it waits for something."""
    for _ in range(10):
        await asyncio.sleep(0)
