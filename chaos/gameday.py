"""Plays experiments: starts or finds a stack, loads it, does what the definition says, and judges."""

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from chaos.arena import Arena
from chaos.counts import parse
from chaos.load import Load, Plan, now
from chaos.measures import MEASURES, Findings, Sample
from chaos.processes import ProcessFailed
from chaos.promises import Verdict
from chaos.proxy import Network

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.experiment import Experiment, Promise, Step
    from chaos.load import Call

LOOK = 0.25
"""Seconds between two looks at the gateway."""
DEADLINE = 3.0


@dataclass
class Played:
    """An experiment and how it went; `problem` when it could not be played to its end."""

    experiment: "Experiment"
    seed: int
    findings: Findings
    verdicts: list[Verdict] = field(default_factory=list)
    problem: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every promise was kept."""
        return self.problem is None and bool(self.verdicts) and all(verdict.kept for verdict in self.verdicts)


class Stage(Protocol):
    """Where experiments are played."""

    @property
    def url(self) -> str:
        """Of the gateway."""

    @property
    def key(self) -> str | None:
        """For the gateway."""

    @property
    def plan(self) -> dict[str, Any]:
        """What the load knows of the mock model."""

    async def do(self, step: "Step") -> None:
        """Do what the step says."""


class LocalStage:
    """Processes of our own, started for one experiment."""

    key = None

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        plan = arena.load(1.0).plan
        self.plan: dict[str, Any] = {"mock_seed": plan.mock_seed, "mock_tokens": plan.mock_tokens}

    @property
    def url(self) -> str:
        """Of the gateway."""
        return self._arena.gateway.url

    async def do(self, step: "Step") -> None:
        """Do what the step says. Raises: ProcessFailed."""
        mock = self._arena.mocks[step.mock - 1]
        if step.do == "faults":
            await mock.faults(*step.faults)
        elif step.do == "heal":
            await mock.faults()
        elif step.do == "crash":
            await mock.crash()
        elif step.do == "kill":
            await mock.kill()
        elif step.do == "start":
            if not mock.running:
                await mock.start()
        elif step.do == "freeze":
            mock.freeze()
        elif step.do == "thaw":
            mock.thaw()
        elif step.do == "network":
            await self._arena.proxies[step.mock - 1].be(Network(step.be))
        else:
            await self._arena.gateway.stop()
            await self._arena.gateway.start()


class RemoteStage:
    """A stack that runs already: its gateway, and the control port of its mock model."""

    def __init__(self, url: str, control: str, session: aiohttp.ClientSession, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.plan: dict[str, Any] = {}
        self._control = control.rstrip("/")
        self._session = session

    async def do(self, step: "Step") -> None:
        """Do what the step says. Raises: ProcessFailed."""
        script = list(step.faults) if step.do == "faults" else []
        async with self._session.put(f"{self._control}/faults", json=script) as response:
            if not response.ok:
                raise ProcessFailed(f"the mock model refuses the script: {await response.text()}")


async def play(
    experiment: "Experiment", stage: Stage, seed: int, session: aiohttp.ClientSession, tell: "Callable[[str], None]"
) -> Played:
    """Load the stage for the experiment's time, take its steps, look at the gateway, then judge."""
    fields: dict[str, Any] = {"deadline": DEADLINE, "key": stage.key} | stage.plan | experiment.load
    if "kinds" in fields:
        fields["kinds"] = tuple(fields["kinds"])
    plan = Plan(urls=[stage.url], rate=experiment.rate, seed=seed, **fields)
    findings = Findings(began=now())
    played = Played(experiment, seed, findings)
    load = Load(plan, on_call=findings.calls.append)
    try:
        async with load:
            await load.until(lambda calls: len(calls) > 0, 30)
            findings.began = min(call.started for call in findings.calls)
            watching = asyncio.create_task(_watch(stage.url, findings, session, tell, experiment.seconds))
            try:
                await _take(experiment.method, stage, findings, tell)
                await asyncio.sleep(max(0.0, findings.began + experiment.seconds - now()))
            finally:
                watching.cancel()
                for step in experiment.rollback:
                    await stage.do(step)
    except (ProcessFailed, TimeoutError, aiohttp.ClientError, OSError) as error:
        played.problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return played
    with contextlib.suppress(aiohttp.ClientError, TimeoutError):
        findings.samples.append(await _look(stage.url, findings, session))
    played.verdicts = [_judge(promise, findings) for promise in experiment.promises]
    return played


async def play_at_home(
    experiment: "Experiment", seed: int, session: aiohttp.ClientSession, tell: "Callable[[str], None]"
) -> Played:
    """Start processes for the experiment, play it, end them."""
    try:
        async with Arena(
            seed, mocks=experiment.mocks, gateway=experiment.gateway, mock=experiment.mock, proxied=experiment.proxied
        ) as arena:
            return await play(experiment, LocalStage(arena), seed, session, tell)
    except (ProcessFailed, TimeoutError) as error:
        return Played(experiment, seed, Findings(began=now()), problem=f"the stack did not start: {error}")


async def _take(steps: "tuple[Step, ...]", stage: Stage, findings: Findings, tell: "Callable[[str], None]") -> None:
    for step in sorted(steps, key=lambda step: step.at):
        await asyncio.sleep(max(0.0, findings.began + step.at - now()))
        findings.marks.append((now() - findings.began, str(step)))
        tell(f"    {now() - findings.began:5.1f} s  >>> {step}")
        await stage.do(step)


async def _watch(
    url: str, findings: Findings, session: aiohttp.ClientSession, tell: "Callable[[str], None]", seconds: float
) -> None:
    told = 0
    while True:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            findings.samples.append(await _look(url, findings, session))
        second = int(now() - findings.began)
        if second > told:
            told = second
            tell(_progress(findings, second, seconds))
        await asyncio.sleep(LOOK)


def _progress(findings: Findings, second: int, seconds: float) -> str:
    calls: list[Call] = [call for call in findings.calls if second - 1 <= call.ended - findings.began < second]
    good = sum(call.outcome == "ok" for call in calls)
    breakers = ", ".join(f"{name} {state}" for name, state in findings.samples[-1].breakers.items()) or "unknown"
    return f"    {second:3d}/{seconds:.0f} s  {good:3d} good, {len(calls) - good:3d} failed; breakers: {breakers}"


async def _look(url: str, findings: Findings, session: aiohttp.ClientSession) -> Sample:
    timeout = aiohttp.ClientTimeout(total=2)
    async with session.get(f"{url}/health", timeout=timeout) as response:
        document = await response.json()
    async with session.get(f"{url}/metrics", timeout=timeout) as response:
        metrics = parse(await response.text())
    return Sample(
        at=now() - findings.began,
        breakers={backend["name"]: backend["breaker"] for backend in document["downstream"]["backends"]},
        attempts=int(metrics.value("gateway_attempts_total")),
        requests=int(metrics.value("gateway_requests_total", route="/v1/chat/completions")),
    )


def _judge(promise: "Promise", findings: Findings) -> Verdict:
    value = MEASURES[promise.measure](findings, promise.since, promise.until)
    measured = "not measured" if value is None else f"{value:.4g}"
    return Verdict(f"{promise.text} ({promise.measure} {promise.bound})", measured, promise.kept(value))
