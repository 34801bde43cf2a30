"""What a dead collector costs: `python -m bench.telemetry_down`.

Four gateways side by side, alike but for where their spans go: a collector, the same again (what differs between these
two is noise), a port where nobody listens, and a socket that takes connections and never answers. They are loaded in
turn, in alternating order; each run is compared with the one of the same round at the first gateway.
"""

import argparse
import re
import socket
import statistics
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path

from bench.caller import Spec, percentiles
from bench.load import Load, aimed
from bench.processes import LOOPBACK, BenchError, Cores, fetch, free_ports, python
from bench.systems import GATEWAY, Bench, Site, Start, System, gateway

UP = "up"
GOAL = 5.0
"""Per cent by which the p99 may move."""


class Figures:
    """Of one gateway: p50 and p99 of each run, in milliseconds."""

    def __init__(self) -> None:
        self.p50: list[float] = []
        self.p99: list[float] = []

    def add(self, p50: float, p99: float) -> None:
        """One more run."""
        self.p50.append(p50)
        self.p99.append(p99)


def shift(here: list[float], there: list[float]) -> float:
    """By how many per cent `here` is above `there`: the median of the rounds."""
    return statistics.median(100 * (one / other - 1) for one, other in zip(here, there, strict=True))


def start(bench: Bench, stack: ExitStack, backends: list[int], collectors: dict[str, int]) -> list[System]:
    """One gateway for each place where spans can go."""
    systems = []
    for state, collector in collectors.items():
        (port,) = free_ports(1)
        name = state.replace(" ", "-")
        folder = bench.folder / name
        folder.mkdir()
        sink = f"http://{LOOPBACK}:{collector}"
        site = Site(name=name, port=port, backends=backends, sink=sink, folder=folder)
        process = bench.process(stack, name, gateway(site), port, measured=True, folder=folder)
        systems.append(System(state, port, process, {}, sink))
    return systems


def loaded(load: Load, systems: list[System], *, rounds: int, seconds: float, connections: int) -> dict[str, Figures]:
    """Each gateway in turn under load."""
    found = {system.name: Figures() for system in systems}
    spec = Spec(mode="load", seconds=seconds, connections=connections)
    for number in range(-1, rounds):  # the first round warms up
        for system in systems[::-1] if number % 2 else systems:
            tally = load.call(aimed(spec, system))
            if tally.failed:
                raise BenchError(f"{system.name}: {tally.failed} calls failed: {tally.problem}")
            if number >= 0:
                found[system.name].add(tally.p50, tally.p99)
                print(f"{system.name}: round {number + 1}, p99 {tally.p99:.2f} ms", file=sys.stderr, flush=True)
    return found


def paired(load: Load, systems: list[System], *, rounds: int, calls: int) -> dict[str, Figures]:
    """One caller, one call to each gateway after the other."""
    found = {system.name: Figures() for system in systems}
    for _ in range(rounds):
        tally = load.call(aimed(Spec(mode="paired", calls=calls), *systems))
        for system, times in zip(systems, tally.pairs, strict=True):
            found[system.name].add(*percentiles(times))
    return found


def dropped(system: System) -> int:
    """Spans that the gateway says it has lost."""
    text = fetch(f"http://{LOOPBACK}:{system.port}/metrics").decode()
    found = re.search(r"^gateway_telemetry_dropped_spans_total (\S+)", text, flags=re.MULTILINE)
    return int(float(found[1])) if found else -1


def table(title: str, found: dict[str, Figures]) -> float:
    """Print a table; the worst shift of the p99 among the dead collectors, in per cent."""
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


def main() -> int:
    """1 when a dead collector moved the p99 by more than the goal."""
    parser = argparse.ArgumentParser(prog="python -m bench.telemetry_down", description="What a dead collector costs.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each load")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--calls", type=int, default=1000, help="of each paired round, to each gateway")
    asked = parser.parse_args()
    cores = Cores.of_this_machine()
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(socket.create_server((LOOPBACK, 0), backlog=1024)) as silent,
        ExitStack() as stack,
    ):
        bench = Bench([GATEWAY], cores, Path(folder))
        load = Load(cores, bench.folder)
        backends = stack.enter_context(bench.backend())
        sink, refused = free_ports(2)
        bench.process(stack, "sink", Start(argv=python("bench.sink", str(sink)), ready="/"), sink)
        collectors = {UP: sink, f"{UP} again": sink, "refused": refused, "black-holed": silent.getsockname()[1]}
        systems = start(bench, stack, backends, collectors)
        under_load = loaded(load, systems, rounds=asked.rounds, seconds=asked.seconds, connections=asked.connections)
        alone = paired(load, systems, rounds=asked.rounds, calls=asked.calls)
        worst = max(
            table(f"{asked.connections} connections, {asked.rounds} rounds of {asked.seconds:g} s", under_load),
            table(f"one connection, {asked.rounds} rounds of {asked.calls} calls", alone),
        )
        print("\n| collector | spans dropped | RSS MB |\n| --- | --- | --- |")
        for system in systems:
            print(f"| {system.name} | {dropped(system):,} | {system.process.rss():.1f} |")
    print(f"\nthe p99 moved by at most {worst:+.1f} % (goal: less than {GOAL:g} %)")
    return int(worst >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
