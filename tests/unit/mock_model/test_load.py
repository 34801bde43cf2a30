import asyncio
from collections.abc import Callable, Coroutine

import pytest

from mock_model.load import SLICE, Load, Pace
from tests.unit.gateway.fakes import Clock
from tests.unit.gateway.virtual import run

Story = Callable[[Clock], Coroutine[None, None, list[float]]]


@pytest.fixture
def seconds_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[Story], list[float]]:
    """Plays a story in virtual time and returns the seconds it tells of."""

    def played(story: Story) -> list[float]:
        async def begun(clock: Clock) -> list[float]:
            monkeypatch.setattr("mock_model.load.monotonic", clock)
            return await story(clock)

        return run(begun)

    return played


async def test_a_call_alone_takes_its_own_time() -> None:
    load = Load(4)
    async with load.place():
        assert load.factor() == 1.0


async def test_latency_grows_with_the_calls_in_flight_up_to_twice() -> None:
    load = Load(3)
    factors = []
    async with load.place():
        factors.append(load.factor())
        async with load.place():
            factors.append(load.factor())
            async with load.place():
                factors.append(load.factor())

    assert factors == [1.0, 1.5, 2.0]
    assert load.running == 0


def test_work_takes_longer_as_soon_as_there_is_company(seconds_of: Callable[[Story], list[float]]) -> None:
    async def story(clock: Clock) -> list[float]:
        load = Load(2)

        async def work() -> float:
            async with load.place():
                start = clock()
                await load.work(0.3)
                return clock() - start

        alone = await work()
        first = asyncio.create_task(work())
        await asyncio.sleep(0.1)
        second = asyncio.create_task(work())
        return [alone, *await asyncio.gather(first, second)]

    alone, first, second = seconds_of(story)

    assert alone == pytest.approx(0.3, abs=0.001)
    assert first == pytest.approx(0.5, abs=SLICE), "0.1 s alone, the other 0.2 s at half the speed"
    assert second == pytest.approx(0.5, abs=SLICE), "0.2 s at half the speed, the other 0.1 s alone"


def test_work_without_a_capacity_takes_its_own_time(seconds_of: Callable[[Story], list[float]]) -> None:
    async def story(clock: Clock) -> list[float]:
        load, start = Load(0), clock()
        async with load.place(), load.place():
            await load.work(0.1)
            await load.work(0.0)
        return [clock() - start]

    assert seconds_of(story) == pytest.approx([0.1], abs=0.001)


async def test_without_a_capacity_there_is_neither_queue_nor_growth() -> None:
    load = Load(0)
    async with load.place(), load.place(), load.place():
        assert (load.running, load.waiting, load.factor()) == (3, 0, 1.0)


async def test_calls_beyond_the_capacity_wait_in_the_order_they_came() -> None:
    load, order, gate = Load(1), list[int](), asyncio.Event()

    async def call(number: int) -> None:
        async with load.place():
            order.append(number)
            await gate.wait()

    tasks = [asyncio.create_task(call(number)) for number in range(3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (load.running, load.waiting, order) == (1, 2, [0])
    gate.set()
    await asyncio.gather(*tasks)

    assert order == [0, 1, 2]
    assert (load.running, load.waiting) == (0, 0)


async def test_a_caller_that_leaves_the_queue_gives_its_place_away() -> None:
    load = Load(1)

    async def call() -> None:
        async with load.place():
            pass

    async with load.place():
        left, stays = asyncio.create_task(call()), asyncio.create_task(call())
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        assert load.waiting == 1
    await stays

    assert (load.running, load.waiting) == (0, 0)


def test_a_pace_is_first_token_then_intervals() -> None:
    pace = Pace(0, 1.0, 0.25, 0.0)

    assert [pace.wait("a", 0, step) for step in range(3)] == [1.0, 0.25, 0.25]
    assert pace.total("a", 0, 3) == 1.5
    assert pace.total("a", 0, 0) == 0.0


def test_jitter_is_seeded_and_within_its_part() -> None:
    pace = Pace(1, 1.0, 1.0, 0.2)
    waits = [pace.wait("a", 0, step) for step in range(100)]

    assert all(0.8 <= wait <= 1.2 for wait in waits)
    assert len(set(waits)) == 100
    assert waits == [Pace(1, 1.0, 1.0, 0.2).wait("a", 0, step) for step in range(100)]
    assert waits != [Pace(2, 1.0, 1.0, 0.2).wait("a", 0, step) for step in range(100)]
    assert waits[0] != pace.wait("a", 1, 0)
    assert pace.total("a", 0, 100) == sum(waits)
