"""What is measured, one function each. A measure runs its systems in turn, round after round, in alternating order."""

import statistics
import sys
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import msgspec

from bench.caller import Spec, Tally
from bench.load import Load, Sample, aimed
from bench.systems import BARE, ENVOY, GATEWAY, LITELLM, NGINX, OURS, PORTKEY, SAMPLED, UNTRACED, Bench, System
from testkit.quantiles import median_and_p99

EVERYONE = [BARE, GATEWAY, SAMPLED, NGINX, ENVOY, LITELLM, PORTKEY]
SIZES = (1_000, 30_000, 300_000, 1_000_000)
FAST_EVENTS = 50
FEW_STREAMS = 100


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long and how often.

    Attributes:
        rounds: of throughput; other measures have at most three.
        seconds: of each load.
        pairs: calls to each system in a paired round.
        slow: seconds that slow streams last.
        many: the larger number of slow streams and of idle connections; 0: none.
        requests: after which memory is compared with the one after a tenth of them.
    """

    rounds: int
    seconds: int
    pairs: int
    slow: float
    many: int
    requests: int


FULL = Plan(rounds=5, seconds=3, pairs=300, slow=6.0, many=1000, requests=1_000_000)
QUICK = Plan(rounds=1, seconds=1, pairs=50, slow=1.0, many=0, requests=20_000)


class Turn(NamedTuple):
    """A system's turn in a round."""

    system: System
    number: int


class Session:
    """What a measure works with, and where its samples go.

    Attributes:
        bench: makes systems and backends.
        load: makes load.
        plan: how long and how often.
        samples: so far.
        problems: so far, a line each.
    """

    def __init__(self, bench: Bench, load: Load, plan: Plan) -> None:
        self.bench = bench
        self.load = load
        self.plan = plan
        self.samples: list[Sample] = []
        self.problems: list[str] = []

    def turns(self, systems: list[System]) -> Iterator[Turn]:
        """Yield each system once per round, in alternating order."""
        for number in range(min(self.plan.rounds, 3)):
            for system in systems[::-1] if number % 2 else systems:
                yield Turn(system, number)

    def add(self, measure: str, setting: str, system: str, number: int, **values: float) -> None:
        """Keep a sample, and show it."""
        self.samples.append(Sample(measure=measure, setting=setting, system=system, round=number, values=values))
        shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        print(f"{measure} | {setting} | {system} | round {number + 1} | {shown}", file=sys.stderr, flush=True)

    async def run(self, system: System, spec: Spec) -> tuple[Tally, dict[str, float]]:
        """Put load on a system, and remember what failed."""
        tally, cost = await self.load.on(system, spec)
        if tally.failed or not tally.calls:
            self.complain(system, tally)
        return tally, cost

    async def warm(self, systems: list[System], *, stream: bool = False) -> list[System]:
        """Make first calls, which may take long, and a first load on each; return the systems that answer."""
        good = []
        first = Spec(mode="once", connections=4, stream=stream, events=FAST_EVENTS)
        for system in systems:
            tally, _ = await self.load.on(system, first)
            if tally.calls:
                await self.load.on(
                    system, msgspec.structs.replace(first, mode="load", seconds=self.plan.seconds, connections=32)
                )
                good.append(system)
            else:
                self.complain(system, tally)
        return good

    def complain(self, system: System, tally: Tally) -> None:
        """Remember that calls failed."""
        why = " ".join(tally.problem.split())[:200] or "see its log"
        self.problems.append(f"{system.name}: {tally.failed} calls failed, {tally.calls} did not ({why})")


async def throughput(session: Session) -> None:
    """Measure unstreamed calls with 1, 32 and 256 connections: requests/s, times, CPU per request, memory, spans."""
    plan = session.plan
    names = [*EVERYONE, UNTRACED]
    async with session.bench.static_backend() as ports, session.bench.systems(names, ports) as systems:
        good = await session.warm(systems)
        for number in range(plan.rounds):
            for connections in (1, 32, 256):
                for system in good[::-1] if number % 2 else good:
                    before = system.spans()
                    spec = Spec(mode="load", seconds=plan.seconds, connections=connections)
                    tally, cost = await session.run(system, spec)
                    calls = max(tally.calls, 1)
                    spans = {"spans": (system.spans() - before) / calls} if system.name in OURS else {}
                    session.add(
                        "throughput",
                        count_of(connections, "connection"),
                        system.name,
                        number,
                        rps=tally.calls / tally.seconds,
                        p50=tally.p50,
                        p99=tally.p99,
                        cpu_us=cost["cpu"] / calls * 1e6,
                        rss_mb=cost["rss"],
                        **spans,
                    )


async def overhead(session: Session) -> None:
    """Measure the added time of an unstreamed call: the paired difference to a direct one."""
    async with session.bench.static_backend() as ports, session.bench.systems(EVERYONE, ports) as systems:
        good = await session.warm(systems)
        await _pairs(session, "overhead", ports[0], good, Spec(mode="paired", calls=session.plan.pairs))


async def first_token(session: Session) -> None:
    """Measure the added time to the first token of a stream: the paired difference to a direct one."""
    async with session.bench.backend() as ports, session.bench.systems(EVERYONE, ports) as systems:
        good = await session.warm(systems, stream=True)
        spec = Spec(mode="paired", calls=session.plan.pairs, stream=True, events=3, pause=5)
        await _pairs(session, "first token", ports[0], good, spec)


async def _pairs(session: Session, measure: str, backend: int, systems: list[System], spec: Spec) -> None:
    for number in range(min(session.plan.rounds, 3)):
        all_of_them = aimed(spec, *systems)
        direct_first = msgspec.structs.replace(
            all_of_them, ports=[backend, *all_of_them.ports], headers=[{}, *all_of_them.headers]
        )
        tally = await session.load.call(direct_first)
        direct = tally.pairs[0]
        for system, times in zip(systems, tally.pairs[1:], strict=True):
            p50, p99 = median_and_p99([mine - base for mine, base in zip(times, direct, strict=True)])
            session.add(measure, "1 connection", system.name, number, added_p50=p50, added_p99=p99)
        session.add(measure, "1 connection", "(direct)", number, p50=statistics.median(direct))


async def streams(session: Session) -> None:
    """Measure streams of 50 events without pauses: streams/s, CPU per stream."""
    async with session.bench.backend() as ports, session.bench.systems(EVERYONE, ports) as systems:
        for system, number in session.turns(await session.warm(systems, stream=True)):
            for connections in (1, 32):
                spec = Spec(
                    mode="load",
                    seconds=session.plan.seconds,
                    connections=connections,
                    stream=True,
                    events=FAST_EVENTS,
                )
                tally, cost = await session.run(system, spec)
                calls = max(tally.calls, 1)
                session.add(
                    "streams",
                    count_of(connections, "connection"),
                    system.name,
                    number,
                    streams_s=tally.calls / tally.seconds,
                    cpu_us=cost["cpu"] / calls * 1e6,
                )


async def slow_streams(session: Session) -> None:
    """Measure many slow streams at once: CPU per event, how late events are, memory."""
    plan = session.plan
    async with session.bench.backend() as ports, session.bench.systems(EVERYONE, ports) as systems:
        good = await session.warm(systems, stream=True)
        for count, pause, names in (
            (FEW_STREAMS, 20, EVERYONE),
            (plan.many, 50, [BARE, GATEWAY, SAMPLED, NGINX, ENVOY]),
        ):
            if not count:
                continue
            for system, number in session.turns([one for one in good if one.name in names]):
                spec = Spec(
                    mode="once",
                    connections=count,
                    ramp=1.0,
                    stream=True,
                    events=int(plan.slow * 1000 / pause),
                    pause=pause,
                )
                tally, cost = await session.run(system, spec)
                session.add(
                    "slow streams",
                    count_of(count, "stream"),
                    system.name,
                    number,
                    cpu_us=cost["cpu"] / max(tally.events, 1) * 1e6,
                    lag_p50=tally.lag_p50,
                    lag_p99=tally.lag_p99,
                    reads=tally.reads / max(tally.events, 1),
                    rss_mb=cost["rss"],
                )


async def idle_connections(session: Session) -> None:
    """Measure CPU per request while other callers' connections, and as many to the backend, are open and idle."""
    async with session.bench.backend() as ports, session.bench.systems([BARE, GATEWAY], ports) as systems:
        for system, number in session.turns(await session.warm(systems)):
            await _cost(session, "idle connections", "1", Turn(system, number), Spec(mode="load"))
            if not session.plan.many:
                continue
            held = Spec(mode="hold", connections=session.plan.many, ramp=1.0, pause=2000, events=100)
            async with session.load.held(aimed(held, system)):
                await _cost(
                    session, "idle connections", str(session.plan.many), Turn(system, number), Spec(mode="load")
                )


async def backends(session: Session) -> None:
    """Measure CPU per request with 1 and with 50 backends."""
    bench = session.bench
    async with (
        bench.static_backend(50) as ports,
        bench.systems([GATEWAY], ports[:1]) as one,
        bench.systems([GATEWAY], ports) as many,
    ):
        settings = {system.port: setting for systems, setting in ((one, "1"), (many, "50")) for system in systems}
        good = await session.warm([*one, *many])
        # Probes cost the same each second, whatever the load: they are told apart from the cost of a request.
        at_rest = {system.port: await session.load.at_rest(system) for system in good}
        for turn in session.turns(good):
            port = turn.system.port
            await _cost(session, "backends", settings[port], turn, Spec(mode="load"), at_rest=at_rest[port])


async def sizes(session: Session) -> None:
    """Measure CPU per request with prompts, and with answers, of 1 KB to 1 MB."""
    async with session.bench.backend() as ports, session.bench.systems([BARE, GATEWAY], ports) as systems:
        for system, number in session.turns(await session.warm(systems)):
            for size in SIZES:
                await _cost(session, "prompt bytes", f"{size:,}", Turn(system, number), Spec(mode="load", prompt=size))
            for size in SIZES:
                await _cost(session, "answer bytes", f"{size:,}", Turn(system, number), Spec(mode="load", events=size))


async def _cost(
    session: Session, measure: str, setting: str, turn: Turn, spec: Spec, *, at_rest: float | None = None
) -> None:
    spec = msgspec.structs.replace(spec, seconds=session.plan.seconds, connections=32)
    tally, cost = await session.run(turn.system, spec)
    cpu = cost["cpu"] - (at_rest or 0.0) * cost["seconds"]
    values = {"rps": tally.calls / tally.seconds, "cpu_us": cpu / max(tally.calls, 1) * 1e6}
    if at_rest is not None:
        values["rest"] = at_rest * 100
    session.add(measure, setting, turn.system.name, turn.number, **values)


async def memory(session: Session) -> None:
    """Measure memory after a tenth of the requests, and after all of them."""
    wanted = session.plan.requests
    async with session.bench.static_backend() as ports, session.bench.systems([GATEWAY], ports) as systems:
        for system in await session.warm(systems):
            done = 0
            for goal in (wanted // 10, wanted):
                while done < goal:
                    tally, cost = await session.run(
                        system, Spec(mode="load", seconds=session.plan.seconds * 5, connections=32)
                    )
                    done += tally.calls
                    if not tally.calls:
                        return
                session.add("memory", f"{goal:,} requests", system.name, 0, rss_mb=cost["rss"], requests=done)


def count_of(number: int, what: str) -> str:
    """Return a number and its noun: `1 stream`, `2 streams`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


MEASURES: dict[str, Callable[[Session], Awaitable[None]]] = {
    "throughput": throughput,
    "overhead": overhead,
    "first-token": first_token,
    "streams": streams,
    "slow-streams": slow_streams,
    "idle": idle_connections,
    "backends": backends,
    "sizes": sizes,
    "memory": memory,
}
QUICK_MEASURES = ["throughput", "overhead", "first-token", "streams", "slow-streams"]
QUICK_SYSTEMS = [BARE, GATEWAY, SAMPLED, NGINX]
