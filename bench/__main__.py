"""`python -m bench`: measure, print, save."""

import argparse
import asyncio
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec

from bench.chart import Result, draw
from bench.load import Load
from bench.machine import BenchError, Cores
from bench.measures import FULL, MEASURES, QUICK, QUICK_MEASURES, QUICK_SYSTEMS, Session
from bench.report import Figures, goals, goals_table, tables
from bench.systems import OURS, SYSTEMS, Bench
from testkit import REPOSITORY
from testkit.processes import ProcessError

RESULTS = REPOSITORY / "bench" / "results"
OPEN_FILES = 20_000


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure what the gateway costs.")
    parser.add_argument("--quick", action="store_true", help="one short round without the slow peers: a first look")
    parser.add_argument(
        "--only", nargs="+", choices=MEASURES, default=None, metavar="MEASURE", help=", ".join(MEASURES)
    )
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=SYSTEMS,
        default=None,
        metavar="SYSTEM",
        help=", ".join(SYSTEMS).replace("%", "%%"),
    )
    parser.add_argument("--workers", type=int, default=1, help="processes of our own gateway, each with a core")
    parser.add_argument("--rounds", type=int, help="instead of the plan's")
    parser.add_argument("--seconds", type=int, help="of each load, instead of the plan's")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for the JSON and the chart")
    return parser.parse_args()


def commit() -> str:
    """Describe the commit that is measured; empty without git or outside of a clone."""
    try:
        told = subprocess.run(
            ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty"],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return ""
    return told.stdout.strip()


def machine(load: Load, cores: Cores) -> dict[str, str]:
    """Describe what this runs on."""
    info = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": f"measured on {sorted(cores.measured)}, all else on {sorted(cores.others)} of {os.cpu_count()}",
        "kernel": platform.release(),
        "python": f"Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "uvloop")),
        "load": load.generator,
        "commit": commit() or "unknown",
    }


async def measure(options: argparse.Namespace, folder: Path) -> Result:
    """Run the measures; SIGTERM ends them, and their processes."""
    if task := asyncio.current_task():
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    cores = Cores.of_this_machine(options.workers)
    os.sched_setaffinity(0, cores.others)
    plan = QUICK if options.quick else FULL
    plan = replace(plan, rounds=options.rounds or plan.rounds, seconds=options.seconds or plan.seconds)
    bench, load = (
        Bench(options.systems or (QUICK_SYSTEMS if options.quick else list(SYSTEMS)), cores, folder),
        Load(cores, folder),
    )
    session = Session(bench, load, plan)
    for name in options.only or (QUICK_MEASURES if options.quick else MEASURES):
        await MEASURES[name](session)
    return Result(
        when=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=machine(load, cores),
        samples=session.samples,
        problems=session.problems,
        missing=list(bench.missing.values()),
    )


def report(result: Result) -> str:
    """Return the whole report as text."""
    figures = Figures(result.samples)
    measures = list(dict.fromkeys(sample.measure for sample in result.samples))
    parts = ["\n".join(f"{name}: {value}" for name, value in result.machine.items()), tables(figures, measures)]
    parts.append(goals_table(goals(figures)))
    notes = [f"not measured: {line}" for line in result.missing]
    notes += [f"problem: {line}" for line in result.problems]
    parts.append("\n".join(notes))
    return "\n\n".join(part.strip() for part in parts if part)


def main() -> int:
    """Return the exit code: 0; 1: calls through our gateway failed; 2: the bench cannot run; 143: it was stopped."""
    options = arguments()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, OPEN_FILES) if hard > 0 else OPEN_FILES, hard))
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            result = asyncio.run(measure(options, Path(folder)))
    except (BenchError, ProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except asyncio.CancelledError:
        return 143
    options.results.mkdir(parents=True, exist_ok=True)
    path = options.results / f"{result.when[:19].replace(':', '')}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    path.with_suffix(".svg").write_text(draw(result))
    print(report(result))
    print(f"\nsaved: {path}, and a chart beside it")
    return 1 if any(line.startswith(OURS) for line in result.problems) else 0


if __name__ == "__main__":
    sys.exit(main())
