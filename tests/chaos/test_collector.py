"""The collector of spans is gone or hangs: requests do not notice, and no span vanishes uncounted."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

from chaos.arena import Arena
from chaos.promises import Verdict, all_good, at_least, at_most
from testkit.load import Call, now, sent_between
from testkit.quantiles import quantile
from tests.chaos.verdict import StartArena, nothing_is_lost, soon, undisturbed

RATE = 30.0


class Before(NamedTuple):
    """What was when the collector went away."""

    at: float
    memory: int
    complaints: int


async def until_telemetry(arena: Arena, status: str) -> float:
    """Wait until /health says so of telemetry; seconds."""
    start = now()
    async with asyncio.timeout(30):
        while (await arena.gateway.health())["telemetry"]["status"] != status:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return now() - start


async def until_spans(arena: Arena, more_than: int) -> float:
    """Wait until more spans have come; seconds."""
    start = now()
    async with asyncio.timeout(30):
        while arena.collector.spans() <= more_than:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return now() - start


def before(arena: Arena) -> Before:
    """Now."""
    return Before(now(), arena.gateway.memory(), arena.gateway.complaints())


async def unnoticed(arena: Arena, calls: Sequence[Call], was: Before, back: float) -> list[Verdict]:
    """What holds while a collector is away and after; waits until each span has come or was counted as lost."""
    took = back - was.at
    complaints = arena.gateway.complaints() - was.complaints
    growth = (arena.gateway.memory() - was.memory) / 1e6
    made = len(calls) + sum(len(call.tries) for call in calls)
    async with asyncio.timeout(20):
        while True:
            lost = (await arena.gateway.metrics()).value("gateway_telemetry_dropped_spans_total")
            came = arena.collector.spans()
            if came + lost >= made:
                break
            await asyncio.sleep(0.1)
    told = (await arena.gateway.health())["telemetry"]["spans_dropped"]
    return [
        all_good(undisturbed(arena, calls)),
        median_shift(arena, {call.id for call in sent_between(calls, was.at, back)}),
        at_most("memory grows", growth, 20, " MB"),
        at_most(f"log lines about anything but requests in {took:.1f} s and after", complaints, took + 2),
        at_least(f"spans that came ({came}) or were counted as lost ({lost:g})", came + lost, made),
        Verdict("/health counts the same", f"{told} spans dropped", told == lost),
    ]


def median_shift(arena: Arena, ids: set[str]) -> Verdict:
    """Measured in the gateway: requests while the collector was away, against the others."""
    lines = [line for line in arena.gateway.requests() if line["outcome"] == "ok"]
    away = [line["seconds"] for line in lines if line["request_id"] in ids]
    there = [line["seconds"] for line in lines if line["request_id"] not in ids]
    shift, tail = (quantile(away, share) - quantile(there, share) for share in (0.5, 0.99))
    return Verdict(
        "the median request takes longer by <= 0.02 s",
        f"{shift:.4f} s ({len(away)} against {len(there)}; p99 by {tail:.4f} s)",
        bool(away) and bool(there) and shift <= 0.02,
    )


async def test_a_dead_collector_costs_nothing_but_spans(start_arena: StartArena) -> None:
    """SIGKILL under 30 calls/s until an export has failed for good (it is tried for 10 s at most) and 2 s longer.

    0 failures; the median request takes <= 20 ms longer (its p99 is told, not judged: on two cores it is the
    machine's); memory grows <= 20 MB; <= 1 log line a second (+ 2) beside those of requests; /health says `degraded`;
    spans are lost, and counted: spans that came + spans counted as lost >= spans that were made, /health and /metrics
    count the same; spans come again <= 5 s after, and telemetry is `ok`.
    """
    arena = await start_arena(collected=True)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        was = before(arena)
        await arena.collector.kill()
        await until_telemetry(arena, "degraded")
        await asyncio.sleep(2)
        came = arena.collector.spans()
        await arena.collector.start()
        back = now()
        flow = await until_spans(arena, came)
        await until_telemetry(arena, "ok")
        well = now() - back
        await asyncio.sleep(1)
    verdicts = await unnoticed(arena, load.calls, was, back)
    dropped = (await arena.gateway.metrics()).value("gateway_telemetry_dropped_spans_total")
    await nothing_is_lost(
        arena,
        load.calls,
        *verdicts,
        at_least("spans counted as lost", dropped, 1),
        soon(arena.stalls, "spans come again", back, back + flow, 5),
        soon(arena.stalls, "telemetry is ok again", back, back + well, 5),
    )


async def test_a_hanging_collector_costs_nothing_but_spans(start_arena: StartArena) -> None:
    """SIGSTOP for 4 s under 30 calls/s, then SIGCONT.

    0 failures; the median request takes <= 20 ms longer; memory grows <= 20 MB; <= 1 log line a second (+ 2) beside
    those of requests; no span comes meanwhile; spans that came + spans counted as lost >= spans that were made, /health
    and /metrics count the same; spans come again <= 15 s after (an export may hang for 10 s), and telemetry is `ok`.
    """
    arena = await start_arena(collected=True)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        was = before(arena)
        arena.collector.freeze()
        came = arena.collector.spans()
        await asyncio.sleep(4)
        meanwhile = arena.collector.spans() - came
        arena.collector.thaw()
        back = now()
        flow = await until_spans(arena, came)
        await until_telemetry(arena, "ok")
        well = now() - back
        await asyncio.sleep(1)
    await nothing_is_lost(
        arena,
        load.calls,
        *await unnoticed(arena, load.calls, was, back),
        at_most("spans that came meanwhile", meanwhile, 0),
        soon(arena.stalls, "spans come again", back, back + flow, 15),
        soon(arena.stalls, "telemetry is ok again", back, back + well, 15),
    )


async def test_a_hanging_collector_does_not_hold_up_the_stop(start_arena: StartArena) -> None:
    """SIGSTOP of the collector, 60 calls, SIGTERM of the gateway: it stops within 4 s, with exit code 0.

    0 failures; not one span came, so that there were some to wait for.
    """
    arena = await start_arena(collected=True)
    arena.collector.freeze()
    async with arena.load(RATE, total=60) as load:
        await load.all_sent(60)
    told = now()
    code = await arena.gateway.stop()
    stopped = now()
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        Verdict("exit code", f"{code}", code == 0),
        at_most("spans that came", arena.collector.spans(), 0),
        soon(arena.stalls, "it stops", told, stopped, 4),
    )
