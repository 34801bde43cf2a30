"""`python -m chaos`: a game day. Breaks a gateway's backend on purpose, under load, and writes a report."""

import argparse
import asyncio
import contextlib
import random
import shlex
import signal
import sys
from pathlib import Path
from time import strftime
from urllib.parse import urlsplit

import aiohttp

from chaos.experiment import Experiment, ExperimentError, load_experiments
from chaos.gameday import Played, play
from chaos.processes import ProcessFailed
from chaos.report import report
from chaos.stages import SERVICES, ComposeStage, LocalStage, RemoteStage, Stage, published

CONTROL = "http://127.0.0.1:8002"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make chaos ARGS=...", description=__doc__)
    parser.add_argument("experiments", nargs="*", help="names of ours, or YAML files of your own; none: all of ours")
    parser.add_argument("--list", action="store_true", help="tell what there is, and stop")
    parser.add_argument("--target", metavar="URL", type=_url, help="a gateway that runs already")
    parser.add_argument(
        "--compose", action="store_true", help="the containers of `make up`: kills, freezes and starts them, too"
    )
    parser.add_argument(
        "--mock-control",
        metavar="URL",
        type=_url,
        action="append",
        help=f"with --target or --compose: control of its mock model, once for each ({CONTROL})",
    )
    parser.add_argument("--key", help="with --target or --compose: a gateway key")
    parser.add_argument("--seed", type=int, default=None, help="of prompts, answers and draws; else one is drawn")
    parser.add_argument("--out", type=Path, default=Path("chaos-report.html"), help="where the report goes")
    return parser.parse_args()


def _url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise argparse.ArgumentTypeError(f"{text!r} is no http:// address")
    return text


class GameDay:
    """All experiments, one after the other; the report is written anew after each."""

    def __init__(self, options: argparse.Namespace, experiments: list[Experiment]) -> None:
        self._options = options
        self._experiments = experiments
        self._seed = options.seed if options.seed is not None else random.randrange(1_000_000)
        self._where = "processes on this machine"
        self.results: list[Played] = []

    async def run(self) -> None:
        """Play them. Raises: ProcessFailed, when there are no containers."""
        _end_in_order()
        if self._options.compose:
            await self._find_containers()
        if self._options.target:
            self._where = self._options.target
        seconds = sum(experiment.steady_state.seconds for experiment in self._experiments)
        tell(f"seed {self._seed}; {seconds:.0f} s of load in all, on {self._where}")
        async with aiohttp.ClientSession() as session:
            for number, experiment in enumerate(self._experiments, 1):
                tell(f"\n[{number}/{len(self._experiments)}] {experiment.name}: {experiment.title}")
                played = Played(experiment, self._seed, self._command([self._options.experiments[number - 1]]))
                self.results.append(played)
                try:
                    await play(played, self._stage(experiment, session), session, tell)
                finally:
                    for verdict in played.verdicts:
                        tell(f"  {verdict}")
                    if played.problem:
                        tell(f"  PROBLEM {played.problem}")
                    self._write()

    async def _find_containers(self) -> None:
        options = self._options
        options.target = options.target or await published("gateway", 8000)
        options.mock_control = options.mock_control or [await published(SERVICES[0], 8002)]

    def _stage(self, experiment: Experiment, session: aiohttp.ClientSession) -> Stage:
        options = self._options
        if not options.target:
            return LocalStage(experiment, self._seed)
        kind = ComposeStage if options.compose else RemoteStage
        return kind(options.target, options.mock_control, session, options.key)

    def _write(self) -> None:
        page = report(
            self.results,
            chosen=len(self._experiments),
            where=self._where,
            when=strftime("%Y-%m-%d %H:%M"),
            command=self._command(self._options.experiments),
        )
        self._options.out.write_text(page, encoding="utf-8")

    def _command(self, names: list[str]) -> str:
        """What repeats this; a key is left out."""
        options = self._options
        words = [*names, "--seed", str(self._seed)]
        words += ["--compose"] if options.compose else ["--target", options.target] if options.target else []
        if options.target:
            words += [word for control in options.mock_control for word in ("--mock-control", control)]
        words += ["--key", "KEY"] if options.key else []
        return f"make chaos ARGS={shlex.quote(shlex.join(words))}"


def _end_in_order() -> None:
    """SIGINT and SIGTERM put everything back before the program ends; a second one ends it at once."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()

    def stop() -> None:
        tell("\nstopping: putting everything back; once more to end at once")
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)


def tell(line: str) -> None:
    """Live progress; nobody has to read it."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def fail(line: str) -> int:
    """Say why there is nothing to play; the exit code."""
    print(f"chaos: {line}", file=sys.stderr)
    return 2


def choose(options: argparse.Namespace, experiments: list[Experiment]) -> list[Experiment]:
    """Those that can be played there; tells which cannot."""
    if not options.target and not options.compose:
        return experiments
    controls = len(options.mock_control)
    kind, mocks = (ComposeStage, len(SERVICES)) if options.compose else (RemoteStage, controls)
    chosen = []
    for experiment in experiments:
        obstacle = experiment.obstacle(kind.actions, mocks, controls)
        if obstacle is None:
            chosen.append(experiment)
        else:
            tell(f"left out: {experiment.name}: {obstacle}")
    return chosen


def show(experiments: list[Experiment]) -> None:
    """`--list`."""
    for experiment in experiments:
        where = "anywhere"
        if reason := experiment.obstacle(RemoteStage.actions, experiment.system.mocks, experiment.system.mocks):
            where = "at home or --compose"
            if reason := experiment.obstacle(ComposeStage.actions, len(SERVICES), 1):
                where = f"at home only: {reason}"
        tell(f"{experiment.name:20} {experiment.title} ({experiment.steady_state.seconds:.0f} s, {where})")


def run() -> int:
    """The exit code: 0 when every promise was kept, 1 when one was not, 2 when nothing could be played, 130: stopped."""
    options = arguments()
    try:
        experiments = load_experiments(options.experiments)
    except ExperimentError as error:
        return fail(str(error))
    if options.list:
        show(experiments)
        return 0
    if options.target and options.mock_control is None:
        options.mock_control = [CONTROL]
    experiments = choose(options, experiments)
    if not experiments:
        return fail("there is nothing to play")
    game_day = GameDay(options, experiments)
    try:
        asyncio.run(game_day.run())
    except ProcessFailed as error:
        return fail(str(error))
    except (asyncio.CancelledError, KeyboardInterrupt):
        tell(f"\nstopped; the report of what was played is in {options.out}")
        return 130
    passed = sum(played.passed for played in game_day.results)
    tell(f"\n{passed} of {len(game_day.results)} experiments passed; the report is in {options.out}")
    return 0 if passed == len(game_day.results) else 1


if __name__ == "__main__":
    sys.exit(run())
