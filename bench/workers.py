"""What workers cost: instructions of all processes of a gateway, per call and per second, counted by valgrind.

`python -m bench.workers [--workers 2] [--seconds 30]`: one process, then so many workers with their parent, each run
three times over real sockets: under load for a moment, under load for `seconds`, and for a moment with a rest after
it. What the runs differ in gives two figures: what a call takes, and what is spent each second, whatever is called.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import NamedTuple

from bench.caller import Spec
from bench.load import Load
from bench.machine import BenchError, Cores, tool
from bench.systems import GATEWAY, Bench, Site, gateway
from testkit.ports import free_port
from testkit.processes import ProcessError

MOMENT = 3.0
"""Seconds of the short load."""
CONNECTIONS = 32
LEAST_REST = 10.0
STOP_WITHIN = 180.0
"""Seconds: under valgrind all takes fifty times as long."""
PATIENT = {"GATEWAY_CONNECT_TIMEOUT": "20", "GATEWAY_PROBE_PATH": "", "PYTHONHASHSEED": "0"}


class Run(NamedTuple):
    """What all processes took for so many calls, and for so many seconds from the first of them on."""

    instructions: int
    calls: int
    seconds: float


class Cost(NamedTuple):
    """Instructions."""

    call: float
    second: float


def cost(short: Run, long: Run, resting: Run) -> Cost:
    """Return what a call and a second take: start and stop are the same in all three.

    Raises:
        BenchError: the runs do not differ enough to tell the two apart.
    """
    calls, seconds = long.calls - short.calls, long.seconds - short.seconds
    rest_calls, rest_seconds = resting.calls - short.calls, resting.seconds - short.seconds
    more, rest_more = long.instructions - short.instructions, resting.instructions - short.instructions
    determinant = calls * rest_seconds - rest_calls * seconds
    if determinant <= 0:
        raise BenchError("the machine is too busy: the runs do not differ in calls and rest; give more --seconds")
    return Cost(
        call=(more * rest_seconds - rest_more * seconds) / determinant,
        second=(rest_more * calls - more * rest_calls) / determinant,
    )


async def run(workers: int, seconds: float, rest: float) -> Run:
    """Start a gateway, call it for so many seconds, let it rest, stop it, and add up what its processes took.

    Raises:
        BenchError: a call failed, or a process has left no count.
        ProcessError: it did not start or stop.
    """
    valgrind = [tool("valgrind", "apt install valgrind"), "--tool=cachegrind", "--cache-sim=no", "--trace-children=yes"]
    everywhere = frozenset(os.sched_getaffinity(0))
    cores = Cores(everywhere, everywhere)
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        bench, load, port = Bench([GATEWAY], cores, folder), Load(cores, folder), free_port()
        async with AsyncExitStack() as stack:
            backends = await stack.enter_async_context(bench.backend())
            sink = await stack.enter_async_context(bench.sink("sink"))
            site = Site(name=GATEWAY, port=port, backends=backends, sink=sink.url, folder=folder, workers=workers)
            start = gateway(site, **PATIENT)
            counting = [*valgrind, "--cachegrind-out-file=/dev/null", f"--log-file={folder}/count.%p"]
            process = await bench.process(stack, GATEWAY, replace(start, argv=[*counting, *start.argv]), port)
            began = monotonic()
            tally = await load.call(
                Spec(mode="load", ports=[port], headers=[{}], seconds=seconds, connections=CONNECTIONS)
            )
            if tally.failed or not tally.calls:
                raise BenchError(f"{tally.failed} calls failed, {tally.calls} did not: {tally.problem}")
            await asyncio.sleep(rest)
            lasted = monotonic() - began
            await process.stop(STOP_WITHIN)
        counts = counts_in(folder)
    if len(counts) != (1 if workers == 1 else workers + 1):
        raise BenchError(f"{len(counts)} processes have left a count")
    return Run(sum(counts), tally.calls, lasted)


def counts_in(folder: Path) -> list[int]:
    """Return the instructions of each process that ended well."""
    found = [re.search(r"I\s+refs:\s+([\d,]+)", log.read_text(errors="replace")) for log in folder.glob("count.*")]
    return [int(count[1].replace(",", "")) for count in found if count]


async def measured(workers: int, seconds: float) -> Cost:
    """Return what a call and a second take. Raises: BenchError, ProcessError."""
    short = await run(workers, MOMENT, 0)
    long = await run(workers, seconds, 0)
    return cost(short, long, await run(workers, MOMENT, max(seconds, LEAST_REST)))


async def compare(workers: int, seconds: float) -> None:
    """Measure one process and so many workers, and print both. Raises: BenchError, ProcessError."""
    first = None
    for count in (1, workers):
        found = await measured(count, seconds)
        first = first or found
        ratio = found.call / first.call
        who = "process" if count == 1 else "workers"
        print(f"{count:2} {who}  {found.call:9,.0f} a call  {ratio:.3f}  {found.second:11,.0f} a second", flush=True)


def main() -> int:
    """Return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30.0)
    options = parser.parse_args()
    try:
        asyncio.run(compare(options.workers, options.seconds))
    except (BenchError, ProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
