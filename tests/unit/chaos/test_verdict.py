"""What the chaos suite makes of a machine that stood still: it is told, and does not count; all else does."""

import time
from datetime import UTC, datetime
from typing import cast

import pytest

from chaos.arena import Arena
from testkit.load import Call, Load
from testkit.stalls import MachineStalls
from tests.chaos.test_overload import goodput
from tests.chaos.verdict import _ran, recovers, seconds_in_gateway, seconds_of_callers, soon, undisturbed

NOW = time.monotonic() - 100
"""So long ago that the stalls of the machine that runs these tests are no part of it."""


class Scene:
    """An arena, as far as verdicts ask about it."""

    def __init__(self, *stalls: tuple[float, float]) -> None:
        self.stalls = MachineStalls()
        self.stalls._found = [(NOW + begun, NOW + ended) for begun, ended in stalls]

    @property
    def arena(self) -> Arena:
        return cast("Arena", self)


class Sent:
    """A load, as far as verdicts ask about it."""

    def __init__(self, *calls: Call) -> None:
        self.calls = calls

    async def until(self, true: object, seconds: float) -> None:
        """It is so."""


def call(started: float, seconds: float, outcome: str = "ok") -> Call:
    return Call(id="c", kind="answer", started=NOW + started, ended=NOW + started + seconds, outcome=outcome)


@pytest.mark.parametrize(
    ("stalls", "kept", "measured"),
    [
        ([], False, "1.500 s"),
        ([(0.2, 0.5)], False, "1.500 s, 0.300 s of it stalls of the machine"),
        ([(0.2, 0.5), (0.4, 0.8)], True, "1.500 s, 0.600 s of it stalls of the machine"),
        ([(-1, 0.4), (1.3, 3)], True, "1.500 s, 0.600 s of it stalls of the machine"),
        ([(-1, 0), (1.5, 3)], False, "1.500 s"),
    ],
)
async def test_what_is_soon_is_so_by_the_time_in_which_the_machine_ran(
    stalls: list[tuple[float, float]],
    kept: bool,  # noqa: FBT001
    measured: str,
) -> None:
    verdict = soon(Scene(*stalls).stalls, "it is back", NOW, NOW + 1.5, 1.0)
    assert (verdict.promise, verdict.measured, verdict.kept) == ("it is back within 1 s", measured, kept)
    load = Sent(call(0.2, 0.1, outcome="backend_unavailable"), call(0.1, 1.9), call(0.4, 1.1), call(-1, 0.5))
    recovery = await recovers(Scene(*stalls).arena, cast("Load", load), NOW)
    assert (recovery.measured, recovery.kept) == (measured, kept)


def test_what_is_fast_is_so_beside_a_stall_and_the_catching_up_after_it() -> None:
    scene = Scene((1, 2))
    calls = [call(0, 0.3), call(0.5, 2.0), call(2.5, 0.2), call(2.9, 0.3), call(3, 0.3)]
    assert seconds_of_callers(scene.arena, calls) == pytest.approx([0.3, 0.5, 0, 0.2, 0.3])


def test_the_log_of_the_gateway_is_placed_on_the_clock_of_the_stalls() -> None:
    began = time.monotonic()
    scene = Scene()
    scene.stalls._found = [(began - 2, began - 1.5)]
    at = datetime.fromtimestamp(time.time() + began - 1.4 - time.monotonic(), UTC)
    line = {"time": at.isoformat().replace("+00:00", "Z"), "seconds": 1.0}
    assert seconds_in_gateway(scene.arena, [line]) == pytest.approx([0.4], abs=0.01)


def test_who_was_under_way_in_a_long_stall_says_nothing() -> None:
    calls = [call(0, 0.9), call(0.5, 1.2, outcome="backend_timeout"), call(1.9, 0.3), call(0, 9)]
    assert undisturbed(Scene((1, 1.3)).arena, calls) == calls
    assert undisturbed(Scene((1, 2)).arena, calls) == [calls[0], calls[2]], "whose share of it is 0.1 s"
    assert undisturbed(Scene(*((at, at + 0.3) for at in range(9))).arena, calls) == calls
    assert undisturbed(Scene((7.7, 8.2)).arena, calls) == calls[:3]


def test_a_machine_that_stood_still_under_most_calls_is_no_ground_for_a_judgement() -> None:
    calls = [call(0, 1), call(1, 1), call(2, 1)]
    verdict = _ran(Scene((0, 0.5)).arena, calls)
    assert (verdict.measured, verdict.kept) == ("2 of 3", True)
    verdict = _ran(Scene((0, 0.5), (1, 1.5)).arena, calls)
    assert (verdict.measured, verdict.kept) == ("1 of 3", False)


def test_an_answer_that_ends_in_a_stall_counts_as_little_as_its_seconds() -> None:
    calls = [call(at / 10, 0.15) for at in range(20)]
    assert goodput(Scene().arena, calls, NOW, NOW + 2) == pytest.approx(9.5, abs=0.6)
    assert goodput(Scene((0.5, 1.3)).arena, calls, NOW, NOW + 2) == pytest.approx(9.5, abs=0.9)


async def test_an_arena_watches_the_machine_while_it_is_entered() -> None:
    async with Arena(1, mocks=0, gateways=0) as arena:
        assert arena.stalls._thread.is_alive()
        assert arena._pids() == []
    assert not arena.stalls._thread.is_alive()
