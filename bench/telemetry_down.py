"""What a dead collector costs: `python -m bench.telemetry_down`.

Four gateways side by side, alike but for where their spans go: a collector, the same again (what differs between these
two is noise), a port where nobody listens, and a socket that takes connections and never answers. They are loaded in
turn, in alternating order; each run is compared with the one of the same round at the first gateway.
"""

import argparse
import asyncio
import socket
import statistics
import sys
import tempfile
from contextlib import AsyncExitStack, closing
from pathlib import Path

from bench.caller import Spec
from bench.load import Load, aimed
from bench.machine import BenchError, Cores
from bench.systems import GATEWAY, Bench, Site, System, gateway
from testkit.exposition import Exposition
from testkit.http import ask
from testkit.otlp import Sink
from testkit.ports import LOOPBACK, free_port
from testkit.processes import ProcessError
from testkit.quantiles import median_and_p99

UP = "up"
GOAL = 5.0
"""Per cent by which the p99 may move."""


class Figures:
    """Of one gateway: p50 and p99 of each run, in milliseconds."""

    def __init__(self) -> None:
        self.p50: list[float] = []
        self.p99: list[float] = []

    def add(self, p50: float, p99: float) -> None:
        """Add a run."""
        self.p50.append(p50)
        self.p99.append(p99)


def shift(here: list[float], there: list[float]) -> float:
    """Return by how many per cent `here` is above `there`: the median of the rounds."""
    return statistics.median(100 * (one / other - 1) for one, other in zip(here, there, strict=True))


async def start(bench: Bench, stack: AsyncExitStack, backends: list[int], sink: Sink, silent: int) -> list[System]:
    """Start one gateway for each place where spans can go; at the port `silent` they get no answer."""
    urls = {
        UP: sink.url,
        f"{UP} again": sink.url,
        "refused": f"http://{LOOPBACK}:{free_port()}",
        "black-holed": f"http://{LOOPBACK}:{silent}",
    }
    systems = []
    for state, url in urls.items():
        name = state.replace(" ", "-")
        folder = bench.folder / name
        folder.mkdir()
        site = Site(name=name, port=free_port(), backends=backends, sink=url, folder=folder)
        process = await bench.process(stack, name, gateway(site), site.port, measured=True, folder=folder)
        systems.append(System(state, site.port, process, {}, sink))
    return systems


async def loaded(
    load: Load, systems: list[System], *, rounds: int, seconds: float, connections: int
) -> dict[str, Figures]:
    """Put each gateway under load, in turn."""
    found = {system.name: Figures() for system in systems}
    spec = Spec(mode="load", seconds=seconds, connections=connections)
    for number in range(-1, rounds):  # the first round warms up
        for system in systems[::-1] if number % 2 else systems:
            tally = await load.call(aimed(spec, system))
            if tally.failed:
                raise BenchError(f"{system.name}: {tally.failed} calls failed: {tally.problem}")
            if number >= 0:
                found[system.name].add(tally.p50, tally.p99)
                print(f"{system.name}: round {number + 1}, p99 {tally.p99:.2f} ms", file=sys.stderr, flush=True)
    return found


async def paired(load: Load, systems: list[System], *, rounds: int, calls: int) -> dict[str, Figures]:
    """Let one caller call each gateway after the other."""
    found = {system.name: Figures() for system in systems}
    for _ in range(rounds):
        tally = await load.call(aimed(Spec(mode="paired", calls=calls), *systems))
        for system, times in zip(systems, tally.pairs, strict=True):
            found[system.name].add(*median_and_p99(times))
    return found


async def dropped(system: System) -> int:
    """Return the number of spans that the gateway says it has lost."""
    answer = await ask(f"http://{LOOPBACK}:{system.port}/metrics")
    return int(Exposition.parse(answer.body.decode()).value("gateway_telemetry_dropped_spans_total"))


def table(title: str, found: dict[str, Figures]) -> float:
    """Print a table; return the worst shift of the p99 among the dead collectors, in per cent."""
    print(f"\n{title}\n\n| collector | p50 ms | p99 ms | p50 shift | p99 shift |\n| --- | --- | --- | --- | --- |")
    reference = found[UP]
    shifts = {}
    for state, figures in found.items():
        shifts[state] = shift(figures.p99, reference.p99)
        print(
            f"| {state} | {statistics.median(figures.p50):.2f} | {statistics.median(figures.p99):.2f}"
            f" | {shift(figures.p50, reference.p50):+.1f} % | {shifts[state]:+.1f} % |"
        )
    return max(moved for state, moved in shifts.items() if not state.startswith(UP))


async def measure(asked: argparse.Namespace, folder: Path) -> float:
    """Measure and print; return the worst shift of the p99, in per cent."""
    cores = Cores.of_this_machine()
    bench, load = Bench([GATEWAY], cores, folder), Load(cores, folder)
    async with AsyncExitStack() as stack:
        silent = stack.enter_context(closing(socket.create_server((LOOPBACK, 0), backlog=1024)))
        backends = await stack.enter_async_context(bench.backend())
        sink = await stack.enter_async_context(bench.sink("sink"))
        systems = await start(bench, stack, backends, sink, silent.getsockname()[1])
        under_load = await loaded(
            load, systems, rounds=asked.rounds, seconds=asked.seconds, connections=asked.connections
        )
        alone = await paired(load, systems, rounds=asked.rounds, calls=asked.calls)
        worst = max(
            table(f"{asked.connections} connections, {asked.rounds} rounds of {asked.seconds:g} s", under_load),
            table(f"one connection, {asked.rounds} rounds of {asked.calls} calls", alone),
        )
        print("\n| collector | spans dropped | RSS MB |\n| --- | --- | --- |")
        for system in systems:
            print(f"| {system.name} | {await dropped(system):,} | {system.rss():.1f} |")
    return worst


def main() -> int:
    """Return the exit code: 1: a dead collector moved the p99 by more than the goal; 2: nothing was measured."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry_down", description="What a dead collector costs.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--calls", type=int, default=1000, help="of each paired round, to each gateway")
    try:
        with tempfile.TemporaryDirectory() as folder:
            worst = asyncio.run(measure(parser.parse_args(), Path(folder)))
    except (BenchError, ProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    print(f"\nthe p99 moved by at most {worst:+.1f} % (goal: less than {GOAL:g} %)")
    return int(worst >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
