"""Plays experiments: loads a stage, waits for the steady state, does what the definition says, and judges."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from chaos.load import Load, Plan
from chaos.measures import Findings, Sample, measured
from chaos.promises import Verdict
from testkit.exposition import Exposition
from testkit.load import Call, now, summary
from testkit.processes import ProcessError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chaos.experiment import Experiment, Promise, Step
    from chaos.stages import Stage

    Tell = Callable[[str], None]

LOOK = 0.25
"""Seconds between two looks at the gateway."""
STEADY = 1.0
"""Seconds of good calls that make the steady state."""
PATIENCE = 10.0
"""Seconds beyond deadline and open breakers in which the steady state must be there, or back."""
ROUTE = "/v1/chat/completions"
REVIVING = frozenset({"start", "thaw"})
"""Actions after which a backend answers its own health probe again: from then on its recovery counts."""


class NotSteady(Exception):
    """The gateway is not as it should be before anything is done to it."""


TROUBLE = (ProcessError, NotSteady, TimeoutError, aiohttp.ClientError, OSError, RuntimeError, ValueError)
"""What keeps one experiment from being played to its end, and the others not."""


@dataclass
class Played:
    """An experiment and how it went.

    Attributes:
        command: repeats it.
        gateway: version and mode of the gateway.
        settings: environment that was chosen for it.
        problem: why it could not be played to its end, or None.
    """

    experiment: "Experiment"
    seed: int
    command: str
    findings: Findings = field(default_factory=lambda: Findings(began=now()))
    verdicts: list[Verdict] = field(default_factory=list)
    gateway: str = "unknown"
    settings: dict[str, str] = field(default_factory=dict)
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return self.problem is None and bool(self.verdicts) and all(verdict.kept for verdict in self.verdicts)


async def play(played: Played, stage: "Stage", session: aiohttp.ClientSession, tell: "Tell") -> None:
    """Play an experiment and write down how it went; the stage is left as it was, on every way out."""
    played.settings = stage.settings
    try:
        await stage.begin()
        played.gateway = await _introduce(stage.url, played.experiment.system.mocks, session)
        await _play(played, stage, session, tell)
    except asyncio.CancelledError:
        _add_problem(played, "stopped before its end")
        raise
    except TROUBLE as error:
        _add_problem(played, _say(error))
    finally:
        try:
            await stage.end()
        except TROUBLE as error:
            _add_problem(played, f"not left as it was found: {_say(error)}")


async def _play(played: Played, stage: "Stage", session: aiohttp.ClientSession, tell: "Tell") -> None:
    experiment, findings = played.experiment, played.findings
    steady = experiment.steady_state
    plan = Plan(urls=[stage.url], seed=played.seed, key=stage.key, **steady.plan, **stage.plan)
    async with Load(plan, on_call=findings.calls.append) as load:
        steadily = await _steady(load, stage.url, session)
        if steadily is None:
            raise NotSteady(f"no steady state before anything was done: {_seen(load.calls)}")
        tell(f"    steady state: {steadily}")
        findings.began = now()
        watching = asyncio.create_task(_watch(stage.url, findings, session, tell, steady.seconds))
        try:
            try:
                await _take(experiment.method, stage, findings, tell)
                await asyncio.sleep(max(0.0, findings.began + steady.seconds - now()))
            finally:
                await _roll_back(played, stage, tell)
            if steady.returns:
                before = len(load.calls)
                steadily = await _steady(load, stage.url, session)
                seen = steadily or f"no: {_seen(load.calls[before:])}"
                played.verdicts.append(
                    Verdict("the steady state is back after the rollback", seen, steadily is not None)
                )
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
    findings.arrivals = stage.arrivals()
    findings.stalled = lambda start, end: stage.stalled(findings.began + start, findings.began + end)
    played.verdicts = [
        *(_judge(promise, findings, steady.seconds) for promise in experiment.promises),
        *played.verdicts,
    ]


async def _introduce(url: str, mocks: int, session: aiohttp.ClientSession) -> str:
    """Return version and mode of the gateway.

    Raises:
        NotSteady: It is something else, or has too few backends.
    """
    timeout = aiohttp.ClientTimeout(total=5)
    try:
        async with session.get(f"{url}/health", timeout=timeout) as response:
            document = await response.json(content_type=None)
        names = [backend["name"] for backend in document["downstream"]["backends"]]
        who = f"{document['version']} ({document['app_mode']})"
        await _look(url, now(), session)
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, aiohttp.ClientError):
            raise
        raise NotSteady(f"{url} is not this gateway: /health or /metrics is another's ({_say(error)})") from None
    if len(names) < mocks:
        raise NotSteady(f"{url} has the backends {', '.join(names)}; the experiment needs {mocks} of them")
    return who


async def _steady(load: Load, url: str, session: aiohttp.ClientSession) -> str | None:
    """Wait for a second of nothing but good calls, as long as open breakers and a deadline take; None: there was none.

    An idle gateway whose breaker is half open lets one call through and refuses those beside it: so the first calls
    need not be good, but a second of them must be.
    """
    began, needed, open_for = now(), max(1, round(load.plan.rate * STEADY)), 0.0
    with contextlib.suppress(*TROUBLE, KeyError, TypeError):
        open_for = (await _look(url, began, session)).retry_in

    def there(calls: "Sequence[Call]") -> bool:
        last = [call for call in calls if call.started >= began][-needed:]
        return len(last) == needed and all(map(_good, last))

    try:
        await load.until(there, open_for + STEADY + load.plan.deadline + PATIENCE)
    except TimeoutError:
        return None
    return f"{needed} good calls in a row by {now() - began:.1f} s"


def _seen(calls: "Sequence[Call]") -> str:
    """Describe what became of calls."""
    flaw = next((f"; {call.flaw}" for call in calls if call.flaw), "")
    return f"{summary(calls) or 'no call has ended'}{flaw}"


def _good(call: Call) -> bool:
    """Tell whether a call is as good as it can be: callers leave only where the definition says so."""
    return call.outcome in {"ok", "left"} and call.flaw is None


async def _take(steps: "Sequence[Step]", stage: "Stage", findings: Findings, tell: "Tell") -> None:
    for step in sorted(steps, key=lambda step: step.at):
        await asyncio.sleep(max(0.0, findings.began + step.at - now()))
        _mark(str(step), findings, tell)
        await stage.do(step)
        if step.do in REVIVING:
            await stage.revived(step.mock)
            findings.revivals.append(now() - findings.began)
            _mark(f"mock-{step.mock} answers", findings, tell)


async def _roll_back(played: Played, stage: "Stage", tell: "Tell") -> None:
    """Try every step, whatever became of those before it."""
    for step in played.experiment.rollback:
        _mark(f"rollback: {step}", played.findings, tell)
        try:
            await stage.do(step)
        except TROUBLE as error:
            _add_problem(played, f"rollback, {step}: {_say(error)}")


def _mark(text: str, findings: Findings, tell: "Tell") -> None:
    at = now() - findings.began
    findings.marks.append((at, text))
    tell(f"    {at:5.1f} s  >>> {text}")


async def _watch(url: str, findings: Findings, session: aiohttp.ClientSession, tell: "Tell", seconds: float) -> None:
    told, tripped = 0, set[str]()
    while True:
        with contextlib.suppress(*TROUBLE, KeyError, TypeError):  # it may be stopped or just starting
            findings.samples.append(await _look(url, findings.began, session))
            for name in findings.samples[-1].tripped.keys() - tripped:
                tripped.add(name)
                _mark(f"{name} has lost its traffic", findings, tell)
        second = int(now() - findings.began)
        if second > told:
            told = second
            tell(_progress(findings, second, seconds))
        await asyncio.sleep(LOOK)


def _progress(findings: Findings, second: int, seconds: float) -> str:
    calls = [call for call in findings.calls if second - 1 <= call.ended - findings.began < second]
    good = sum(map(_good, calls))
    breakers = findings.samples[-1].breakers if findings.samples else {}
    states = ", ".join(f"{name} {state}" for name, state in breakers.items()) or "unknown"
    return f"    {second:3d}/{seconds:.0f} s  {good:3d} good, {len(calls) - good:3d} failed; breakers: {states}"


async def _look(url: str, began: float, session: aiohttp.ClientSession) -> Sample:
    timeout = aiohttp.ClientTimeout(total=2)
    async with session.get(f"{url}/health", timeout=timeout) as response:
        document: dict[str, Any] = await response.json()
    async with session.get(f"{url}/metrics", timeout=timeout) as response:
        metrics = Exposition.parse(await response.text())
    backends = document["downstream"]["backends"]
    tripped = {guard["backend"] for guard in document["downstream"].get("guards", []) if guard["tripped"]}
    return Sample(
        at=now() - began,
        breakers={backend["name"]: backend["breaker"] for backend in backends},
        attempts=int(metrics.value("gateway_attempts_total")),
        requests=int(metrics.value("gateway_requests_total", route=ROUTE)),
        retry_in=max([0.0, *(backend["retry_in_seconds"] or 0.0 for backend in backends)]),
        tripped={backend["name"]: backend["url"] for backend in backends if backend["name"] in tripped},
        tripped_metric=int(metrics.value("gateway_guard_tripped")),
    )


def _judge(promise: "Promise", findings: Findings, seconds: float) -> Verdict:
    until = seconds if promise.until is None else promise.until
    value, text = measured(promise.measure, findings, promise.since, until)
    return Verdict(f"{promise.text} ({promise.measure} {promise.bound})", text, promise.kept(value))


def _add_problem(played: Played, text: str) -> None:
    played.problem = f"{played.problem}; {text}" if played.problem else text


def _say(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"nothing answers at {error.host}:{error.port}; are --target and --mock-control right, and does it run?"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
