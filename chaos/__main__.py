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
from chaos.report import report
from chaos.stages import SERVICES, ComposeStage, LocalStage, RemoteStage, Stage, published, running
from testkit.limits_server import why_no_server
from testkit.processes import ProcessError

CONTROL = "http://127.0.0.1:8002"


def arguments() -> argparse.Namespace:
    """Read the command line."""
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

    def __init__(self, options: argparse.Namespace, experiments: dict[str, Experiment]) -> None:
        self._options = options
        self._experiments = experiments
        self._seed = options.seed if options.seed is not None else random.randrange(1_000_000)
        self._where = "processes on this machine"
        self.results: list[Played] = []

    async def run(self) -> None:
        """Play them.

        Raises:
            ProcessError: There are no containers.
            ExperimentError: Nothing can be played.
        """
        _end_in_order()
        await self._choose()
        seconds = sum(experiment.steady_state.seconds for experiment in self._experiments.values())
        tell(f"seed {self._seed}; {seconds:.0f} s of load in all, on {self._where}")
        async with aiohttp.ClientSession() as session:
            for number, (name, experiment) in enumerate(self._experiments.items(), 1):
                tell(f"\n[{number}/{len(self._experiments)}] {name}: {experiment.title}")
                played = Played(experiment, self._seed, self._command([name]))
                self.results.append(played)
                try:
                    await play(played, self._stage(experiment, session), session, tell)
                finally:
                    for verdict in played.verdicts:
                        tell(f"  {verdict}")
                    if played.problem:
                        tell(f"  PROBLEM {played.problem}")
                    self._write()

    async def _choose(self) -> None:
        """Find out what is there; leave out what cannot be played on it."""
        options, kind = self._options, RemoteStage
        if options.compose:
            kind = ComposeStage
            options.target = options.target or await published("gateway", 8000)
            options.mock_control = options.mock_control or [await published(SERVICES[0], 8002)]
            mocks = len(await running(SERVICES))
        elif options.target:
            options.mock_control = options.mock_control or [CONTROL]
            mocks = len(options.mock_control)
        else:
            if reason := why_no_server():
                for name in [name for name, experiment in self._experiments.items() if experiment.system.limits]:
                    tell(f"left out: {name}: {reason}")
                    del self._experiments[name]
            return
        self._where = f"{options.target}{' (containers)' if options.compose else ''}"
        for name, experiment in list(self._experiments.items()):
            if obstacle := experiment.obstacle(kind.actions, mocks, len(options.mock_control)):
                tell(f"left out: {name}: {obstacle}")
                del self._experiments[name]
        if not self._experiments:
            raise ExperimentError("nothing is left to play")

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
            command=self._command(list(self._experiments)),
        )
        self._options.out.write_text(page, encoding="utf-8")

    def _command(self, names: list[str]) -> str:
        """Return the command that repeats this, without the key."""
        options = self._options
        words = [*names, "--seed", str(self._seed)]
        words += ["--compose"] if options.compose else ["--target", options.target] if options.target else []
        if options.target:
            words += [word for control in options.mock_control for word in ("--mock-control", control)]
        words += ["--key", "KEY"] if options.key else []
        return f"make chaos ARGS={shlex.quote(shlex.join(words))}"


def _end_in_order() -> None:
    """Let SIGINT and SIGTERM put everything back before the program ends; a second one ends it at once."""
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
    """Print progress; it does not matter whether it is read."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)


def show(experiments: dict[str, Experiment]) -> None:
    """Print the list for `--list`."""
    for name, experiment in experiments.items():
        where = "anywhere"
        if reason := experiment.obstacle(RemoteStage.actions, experiment.system.mocks, experiment.system.mocks):
            where = "at home or --compose"
            if reason := experiment.obstacle(ComposeStage.actions, len(SERVICES), 1):
                where = f"at home only: {reason}"
        if experiment.system.mocks > 1:
            where += f", {experiment.system.mocks} mock models"
        tell(f"{name:20} {experiment.title} ({experiment.steady_state.seconds:.0f} s, {where})")


def prepare(options: argparse.Namespace) -> dict[str, Experiment]:
    """Read what is to be played.

    Raises:
        ExperimentError: The command line or a definition is wrong.
    """
    if options.out.is_dir() or not options.out.parent.is_dir():
        raise ExperimentError(f"--out {options.out}: no file can be written there")
    return load_experiments(options.experiments)


def run() -> int:
    """Return the exit code: 0: every promise was kept; 1: one was not; 2: nothing could be played; 130: stopped."""
    options = arguments()
    try:
        experiments = prepare(options)
        if options.list:
            show(experiments)
            return 0
        game_day = GameDay(options, experiments)
        asyncio.run(game_day.run())
    except (ExperimentError, ProcessError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    except (asyncio.CancelledError, KeyboardInterrupt):
        print(f"chaos: stopped; what was played is in {options.out}", file=sys.stderr)
        return 130
    passed = sum(played.passed for played in game_day.results)
    tell(f"\n{passed} of {len(game_day.results)} experiments passed; the report is in {options.out}")
    return 0 if passed == len(game_day.results) else 1


if __name__ == "__main__":
    sys.exit(run())
