"""A loop that stood still is noticed, however it did and whoever asks first."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable, Coroutine

import pytest
import uvloop

from gateway.stalls import INTERVAL, SHORTEST, Stalls, stalled_since, stalls_of_loop
from tests.unit.gateway.fakes import Clock
from tests.unit.gateway.virtual import run

LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


async def noticed(clock: Clock, stalls: Stalls, *, runs: float, stands_still: float) -> None:
    """Let the loop run, then stand still."""
    await asyncio.sleep(runs)
    clock.forward(stands_still)  # nobody waits meanwhile


def of_virtual(story: Callable[[Clock, Stalls], Coroutine[None, None, None]]) -> None:
    async def begun(clock: Clock) -> None:
        stalls = Stalls(clock)
        stalls.begin()
        await story(clock, stalls)

    run(begun)


def test_a_loop_that_runs_has_no_stalls() -> None:
    async def story(clock: Clock, stalls: Stalls) -> None:
        began = clock()
        for _ in range(100):
            await noticed(clock, stalls, runs=0.07, stands_still=SHORTEST / 2)
        assert stalls.since(began) == 0
        assert 0 < stalls.worst() < SHORTEST

    of_virtual(story)


def test_a_stall_counts_from_the_moment_at_which_the_loop_should_have_looked() -> None:
    async def story(clock: Clock, stalls: Stalls) -> None:
        began = clock()
        await noticed(clock, stalls, runs=1.03, stands_still=3)
        before_any_look = stalls.since(began)
        await asyncio.sleep(0.01)
        assert 3 - INTERVAL <= before_any_look <= 3
        assert stalls.since(began) == pytest.approx(before_any_look, abs=0.001)
        assert stalls.worst() == pytest.approx(before_any_look, abs=0.001)

    of_virtual(story)


def test_only_what_came_after_the_instant_counts() -> None:
    async def story(clock: Clock, stalls: Stalls) -> None:
        began = clock()
        await noticed(clock, stalls, runs=1, stands_still=3)
        in_the_middle = clock() - 1
        await asyncio.sleep(1)
        afterwards = clock()
        await noticed(clock, stalls, runs=1, stands_still=2)
        assert stalls.since(began) == pytest.approx(5, abs=2 * INTERVAL)
        assert stalls.since(in_the_middle) == pytest.approx(3, abs=INTERVAL)
        assert stalls.since(afterwards) == pytest.approx(2, abs=INTERVAL)
        assert stalls.since(clock() - 0.5) == pytest.approx(0.5, abs=0.001)
        await asyncio.sleep(0.5)
        assert stalls.since(clock() - 0.4) == 0

    of_virtual(story)


def test_the_worst_delay_is_shown_for_fifteen_seconds() -> None:
    async def story(clock: Clock, stalls: Stalls) -> None:
        await noticed(clock, stalls, runs=1, stands_still=3)
        await asyncio.sleep(14)
        assert stalls.worst() > 2.8
        await asyncio.sleep(2)
        assert stalls.worst() < SHORTEST

    of_virtual(story)


@pytest.mark.parametrize("new_loop", LOOPS.values(), ids=LOOPS.keys())
def test_every_timer_of_a_loop_asks_the_same_stalls(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    async def story() -> None:
        assert stalled_since(0) == 0, "nobody has begun to notice"
        stalls = stalls_of_loop()
        assert stalls_of_loop() is stalls
        began = time.monotonic()
        time.sleep(0.5)  # noqa: ASYNC251 - the loop stands still
        assert 0.5 - INTERVAL <= stalled_since(began) <= stalls.since(began)
        await asyncio.sleep(2 * INTERVAL)
        assert stalled_since(began) >= 0.5 - INTERVAL

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(story())


def test_the_stalls_of_a_loop_go_with_it() -> None:
    async def story() -> weakref.ref[Stalls]:
        return weakref.ref(stalls_of_loop())

    with asyncio.Runner() as runner:
        stalls = runner.run(story())
    del runner
    gc.collect()
    assert stalls() is None
