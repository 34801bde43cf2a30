"""Waiting for what no event announces."""

import asyncio
import itertools

import pytest

from testkit.polling import until, wait_for


async def test_it_waits_for_a_function_or_a_coroutine() -> None:
    numbers = itertools.count()

    async def true_at_last() -> bool:
        await asyncio.sleep(0)
        return next(numbers) > 5

    await until(lambda: next(numbers) > 2)
    await until(true_at_last)
    assert next(numbers) == 7


async def test_what_does_not_happen_is_told() -> None:
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s: 3 of 4 spans"):
        await until(lambda: False, lambda: "3 of 4 spans", seconds=0.05)
    with pytest.raises(TimeoutError, match="the end"):
        await until(lambda: False, "the end", seconds=0)


async def test_a_timeout_around_it_is_not_its_own() -> None:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.05):
            await until(lambda: False, "the end", seconds=60)
    assert "the end" not in str(caught.value)


def test_without_asyncio_what_fails_is_tried_again_and_the_result_is_given() -> None:
    numbers = itertools.count()

    def third() -> int:
        number = next(numbers)
        if number == 0:
            raise ConnectionRefusedError
        assert number > 1
        return number

    assert wait_for(third, "the third", 5, every=0) == 2


def test_without_asyncio_the_last_failure_is_told() -> None:
    with pytest.raises(TimeoutError, match=r"not within 0 s: a key; last seen: KeyError\('x'\)"):
        wait_for(lambda: dict[str, int]()["x"], "a key", 0)
