"""Something is done to the gateways under a steady load of open streams and short calls, and judged."""

import asyncio
import os
from collections.abc import Callable, Sequence

from chaos.experiment import Experiment, Promise, SteadyState
from chaos.gameday import Played
from chaos.load import Plan
from chaos.measures import Findings
from chaos.promises import Verdict, all_good, well_formed
from gateway import __version__
from testkit.load import Call, Load, now
from tests.chaos.verdict import keep
from tests.cluster.cluster import VALUES, Release

SEED = 1
DEADLINE = 90.0
TOKENS = int(VALUES["mockModel"]["settings"]["MOCK_TOKENS"])
INTERVAL = float(VALUES["mockModel"]["settings"]["MOCK_TOKEN_INTERVAL"])
RATE = 6
"""Short calls a second, each on a connection of its own."""
KEPT = 4
"""Callers with one short call after the other on a kept connection."""
SHORT, LONG = 8, TOKENS
"""Tokens of short calls (2 s) and of long streams (20 s): longer than a pod that ends takes requests."""
STREAMS = 6
"""Long streams that are always open."""
NO_FAILURE = Promise(text="no caller notices", measure="failures", at_most=0)
Judge = Callable[[Sequence[Call]], list[Verdict]]


def nobody_notices(calls: Sequence[Call]) -> list[Verdict]:
    """Every call ended well, and every stream whole."""
    return [all_good(calls), well_formed(calls)]


class Rollouts:
    """Plays one operation after the other, and keeps what is needed for a report.

    Attributes:
        played: Each with its calls and verdicts.
    """

    def __init__(self, release: Release) -> None:
        self.played: list[Played] = []
        self._release = release

    def _plans(self, key: str | None) -> list[Plan]:
        common = {
            "urls": [self._release.url],
            "seed": SEED,
            "deadline": DEADLINE,
            "key": key,
            "mock_seed": 0,
            "mock_tokens": TOKENS,
        }
        return [
            Plan(**common, prefix="new", rate=RATE, max_tokens=SHORT),  # type: ignore[arg-type]
            Plan(**common, prefix="kept", callers=KEPT, max_tokens=SHORT, keep_alive=True),  # type: ignore[arg-type]
            Plan(**common, prefix="long", callers=STREAMS, kinds=("stream",), max_tokens=LONG),  # type: ignore[arg-type]
        ]

    async def play(
        self,
        title: str,
        story: str,
        operation: Callable[[Callable[[str], None]], object],
        judge: Judge = nobody_notices,
        *,
        key: str | None = None,
    ) -> None:
        """Do something under load.

        Args:
            title: What is done.
            story: More about it.
            operation: Does it, in a thread; is given what notes a moment by its name.
            judge: Gives the verdicts.
            key: A gateway key of the callers.

        Raises:
            AssertionError: A promise was broken.
        """
        steady = SteadyState(seconds=1, rate=RATE, deadline=DEADLINE)
        story += f" Besides, {KEPT} callers on kept connections, and {STREAMS} streams of {LONG * INTERVAL:g} s."
        experiment = Experiment(
            name=title, title=title, story=story, steady_state=steady, method=(), promises=(NO_FAILURE,)
        )
        test = os.environ["PYTEST_CURRENT_TEST"].split("::")[-1].split()[0]
        played = Played(experiment, SEED, f"make test-cluster ARGS='-k {test}'", gateway=__version__)
        self.played.append(played)
        findings = played.findings
        try:
            async with Load(*self._plans(key), caller="chaos.load") as load:
                await load.until(lambda calls: len(calls) >= 20, 60)
                findings.began = now()
                mark = _Marks(findings)
                await asyncio.to_thread(operation, mark)
                mark("over")
                sent = len(load.calls)
                await load.until(lambda calls: len(calls) >= sent + 20, 60)
        except (AssertionError, TimeoutError) as error:
            played.problem = str(error)
            raise
        findings.calls = load.calls
        over = findings.marks[-1][0] + findings.began
        open_then = [c for c in load.calls if c.kind == "stream" and c.started < findings.began < c.ended]
        played.verdicts = [
            *judge(load.calls),
            Verdict("streams were open when it began", f"{len(open_then)}", len(open_then) >= STREAMS),
            Verdict("calls came until it was over", "", any(c.started > over for c in load.calls)),
        ]
        keep(load.calls, *played.verdicts)


class _Marks:
    """Notes what was done, and when."""

    def __init__(self, findings: Findings) -> None:
        self._findings = findings

    def __call__(self, what: str) -> None:
        self._findings.marks.append((now() - self._findings.began, what))
