"""The bench counts right: a wrong count would be a wrong figure."""

import asyncio
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bench.backend import HEAD, LAST, ROLE, content_event
from bench.caller import Caller, Lost, Spec, Tally
from bench.http import Incoming
from bench.load import Sample
from bench.machine import BenchError
from bench.measures import QUICK, Session, _pairs
from bench.report import Figures, goals
from bench.systems import BARE, GATEWAY, System
from bench.workers import Cost, Run, cost, counts_in
from testkit import REPOSITORY
from testkit.processes import python


def test_a_request_is_whole_however_it_is_cut() -> None:
    data = b"POST / HTTP/1.1\r\nhost: x\r\nContent-Length: 5\r\n\r\nhello"
    for cut in range(1, len(data)):
        incoming = Incoming()
        assert incoming.take(data[:cut]) is None
        assert incoming.take(data[cut:]) == (data[:-5], b"hello")


class _Transport:
    def write(self, data: bytes) -> None:
        pass


async def _answered(pieces: list[bytes], events: int) -> Tally:
    tally = Tally()
    caller = Caller(Spec(mode="once", stream=True, events=events), b"", tally, [])
    caller.connection_made(cast("asyncio.BaseTransport", _Transport()))
    call = asyncio.create_task(caller.call())
    await asyncio.sleep(0)
    for piece in pieces:
        caller.data_received(piece)
    await asyncio.wait_for(call, 30)
    return tally


@pytest.mark.parametrize("size", [1, 2, 7, 100, 10_000])
async def test_the_caller_counts_each_event_once_however_the_reads_cut_them(size: int) -> None:
    data = HEAD + ROLE + b"".join(content_event() for _ in range(5)) + LAST
    tally = await _answered([data[at : at + size] for at in range(0, len(data), size)], 5)
    assert tally.events == 5


async def test_a_stream_with_an_event_too_few_is_no_good_call() -> None:
    with pytest.raises(Lost, match="4 of 5 events"):
        await _answered([HEAD + ROLE + b"".join(content_event() for _ in range(4)) + LAST], 5)


async def test_what_a_system_adds_is_the_difference_to_the_direct_call_of_the_same_round() -> None:
    class Given:
        async def call(self, spec: Spec) -> Tally:
            assert spec.ports == [1, 2, 3], "the backend first"
            return Tally(pairs=[[1, 10, 1], [3, 11, 9], [1, 9, 1]])

    systems = [
        cast("System", SimpleNamespace(name=name, port=port, headers={})) for name, port in ((BARE, 2), ("x", 3))
    ]
    session = Session(cast("Any", None), cast("Any", Given()), QUICK)
    await _pairs(session, "overhead", 1, systems, Spec(mode="paired"))

    assert {(sample.system, sample.round): sample.values for sample in session.samples} == {
        (BARE, 0): {"added_p50": 2, "added_p99": 8},
        ("x", 0): {"added_p50": 0, "added_p99": 0},
        ("(direct)", 0): {"p50": 1},
    }


def test_a_goal_is_judged_by_the_median_of_the_rounds_ratios() -> None:
    def sample(system: str, number: int, rps: float) -> Sample:
        return Sample(
            measure="throughput", setting="32 connections", system=system, round=number, values={"rps": rps, "p99": 1.0}
        )

    def judged(gateway: list[float]) -> Any:  # noqa: ANN401
        samples = [sample(GATEWAY, number, rps) for number, rps in enumerate(gateway)]
        samples += [sample(BARE, number, 1000 * (number + 1)) for number in range(len(gateway))]
        return next(goal for goal in goals(Figures(samples)) if goal.name.startswith("rps / bare"))

    assert judged([610, 1220, 300]).met
    assert judged([610, 1220, 300]).measured == "0.61 (0.10 to 0.61)"
    assert not judged([590, 1180, 3000]).met
    assert all(goal.met is None for goal in goals(Figures([])))


@pytest.mark.parametrize("folder", ["bare", "."])
@pytest.mark.parametrize("events", ["0", "5"])
def test_the_way_inside_the_process_is_measured(folder: str, events: str) -> None:
    asked = python("bench.inside", "--child", "--calls", "64", "--events", events, "--traced", folder)
    done = subprocess.run(asked, cwd=REPOSITORY, input="\n\n", capture_output=True, text=True, check=False, timeout=100)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert all(float(line) > 0 for line in done.stdout.split()), done.stdout
    assert len(done.stdout.split()) == 2, done.stdout


def test_what_a_call_takes_is_told_from_what_is_spent_each_second() -> None:
    def run(calls: int, seconds: float) -> Run:
        return Run(int(5_000_000 + 800_000 * calls + 14_000_000 * seconds), calls, seconds)

    found = cost(run(100, 4), run(3000, 22), run(90, 31))

    assert found == pytest.approx(Cost(call=800_000, second=14_000_000))


def test_runs_that_do_not_differ_tell_nothing() -> None:
    same = Run(5_000_000, 100, 4)
    with pytest.raises(BenchError, match="--seconds"):
        cost(same, same, same)


def test_a_process_that_was_killed_has_no_count(tmp_path: Path) -> None:
    (tmp_path / "count.1").write_text("==1== Cachegrind\n==1== \n==1== I   refs:      2,656,629,104\n")
    (tmp_path / "count.2").write_text("==2== Cachegrind\n==2== Command: python -m gateway worker 1\n")

    assert counts_in(tmp_path) == [2_656_629_104]
