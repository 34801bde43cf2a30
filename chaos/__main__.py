"""`python -m chaos`: a game day. Breaks a gateway's backend on purpose, under load, and writes a report."""

import argparse
import asyncio
import random
import sys
from pathlib import Path
from time import strftime

import aiohttp

from chaos.experiment import Experiment, ExperimentError, load_experiments
from chaos.gameday import Played, RemoteStage, play, play_at_home
from chaos.report import report


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make chaos ARGS=...", description=__doc__)
    parser.add_argument("experiments", nargs="*", help="names of ours, or YAML files of your own; none: all of ours")
    parser.add_argument("--list", action="store_true", help="tell what there is, and stop")
    parser.add_argument("--target", metavar="URL", help="a gateway that runs already, e.g. http://127.0.0.1:8000")
    parser.add_argument(
        "--mock-control", metavar="URL", default="http://127.0.0.1:8002", help="with --target: its mock model's control"
    )
    parser.add_argument("--key", help="with --target: a gateway key")
    parser.add_argument("--seed", type=int, default=None, help="of prompts, answers and draws; else one is drawn")
    parser.add_argument("--out", type=Path, default=Path("chaos-report.html"), help="where the report goes")
    return parser.parse_args()


async def main(options: argparse.Namespace, experiments: list[Experiment]) -> list[Played]:
    """Play the experiments, one after the other."""
    seed = options.seed if options.seed is not None else random.randrange(1_000_000)
    tell(f"seed {seed}; {sum(experiment.seconds for experiment in experiments):.0f} s of load in all")
    results = []
    async with aiohttp.ClientSession() as session:
        for number, experiment in enumerate(experiments, 1):
            tell(f"\n[{number}/{len(experiments)}] {experiment.name}: {experiment.title}")
            if options.target:
                stage = RemoteStage(options.target, options.mock_control, session, options.key)
                played = await play(experiment, stage, seed, session, tell)
            else:
                played = await play_at_home(experiment, seed, session, tell)
            results.append(played)
            for verdict in played.verdicts:
                tell(f"  {verdict}")
            if played.problem:
                tell(f"  PROBLEM {played.problem}")
    return results


def tell(line: str) -> None:
    """Live progress."""
    print(line, flush=True)


def run() -> int:
    """The exit code: 0 when every promise was kept, 1 when one was not, 2 for a wrong definition."""
    options = arguments()
    try:
        experiments = load_experiments(options.experiments)
    except ExperimentError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    if options.list:
        for experiment in experiments:
            where = "anywhere" if experiment.remote else "at home only"
            tell(f"{experiment.name:20} {experiment.title} ({experiment.seconds:.0f} s, {where})")
        return 0
    if options.target:
        for experiment in (e for e in experiments if not e.remote):
            tell(f"left out: {experiment.name} needs processes of our own")
        experiments = [experiment for experiment in experiments if experiment.remote]
    if not experiments:
        print("chaos: there is nothing to play", file=sys.stderr)
        return 2
    try:
        results = asyncio.run(main(options, experiments))
    except KeyboardInterrupt:
        print("\nchaos: stopped; no report was written", file=sys.stderr)
        return 130
    where = options.target or "processes on this machine"
    options.out.write_text(report(results, where=where, when=strftime("%Y-%m-%d %H:%M")), encoding="utf-8")
    passed = sum(played.passed for played in results)
    tell(f"\n{passed} of {len(results)} experiments passed; the report is in {options.out}")
    return 0 if passed == len(results) else 1


if __name__ == "__main__":
    sys.exit(run())
