"""What the machine takes for itself is no part of what a block took, wherever it comes."""

import asyncio
import time

import pytest

from tests.integration.stopwatch import Stopwatch

STALL = 0.3


def stand_still() -> None:
    time.sleep(STALL)


@pytest.mark.parametrize("before", [0.0, 0.05])
@pytest.mark.parametrize("after", [0.0, 0.05])
async def test_a_loop_that_stood_still_was_starved(before: float, after: float) -> None:
    async with Stopwatch() as watch:
        if before:
            await asyncio.sleep(before)
        stand_still()
        await asyncio.sleep(after)
    assert watch.took >= STALL
    assert watch.starved >= STALL - 0.02, watch
