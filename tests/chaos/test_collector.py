"""The collector of spans is gone or hangs: requests do not notice, and no span vanishes uncounted."""

import asyncio

from chaos.arena import Arena
from chaos.load import now
from chaos.promises import Verdict, all_good, at_least, at_most, quantile
from tests.chaos.verdict import StartArena, nothing_is_lost

RATE = 30.0


def median_shift(arena: Arena, ids: set[str]) -> Verdict:
    """Measured in the gateway: requests while the collector was away, against the others."""
    lines = [line for line in arena.gateway.requests() if line["outcome"] == "ok"]
    away = quantile([line["seconds"] for line in lines if line["request_id"] in ids], 0.5)
    there = quantile([line["seconds"] for line in lines if line["request_id"] not in ids], 0.5)
    return at_most("the median request takes longer by", away - there, 0.02, " s")


async def until_telemetry(arena: Arena, status: str) -> float:
    """Wait until /health says so of telemetry; seconds."""
    start = now()
    async with asyncio.timeout(30):
        while (await arena.gateway.health())["telemetry"]["status"] != status:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return now() - start


async def test_a_dead_collector_costs_nothing_but_spans(start_arena: StartArena) -> None:
    """SIGKILL for 3 s under 30 calls/s, then started again.

    0 failures; the median request takes <= 20 ms longer; /health says `degraded`, and `ok` within 5 s after; spans that
    came + spans that were counted as lost >= spans that were made.
    """
    arena = await start_arena(collected=True)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        killed = now()
        await arena.collector.kill()
        await until_telemetry(arena, "degraded")
        await asyncio.sleep(2)
        await arena.collector.start()
        back = now()
        took = await until_telemetry(arena, "ok")
        await asyncio.sleep(1)
    await _no_span_vanishes(arena, load.calls, killed, back, at_most("telemetry is ok again after", took, 5, " s"))


async def test_a_hanging_collector_costs_nothing_but_spans(start_arena: StartArena) -> None:
    """SIGSTOP for 4 s under 30 calls/s, then SIGCONT.

    0 failures; the median request takes <= 20 ms longer; spans that came + spans that were counted as lost >= spans
    that were made; telemetry is `ok` within 15 s after (an export may hang for 10 s).
    """
    arena = await start_arena(collected=True)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        frozen = now()
        arena.collector.freeze()
        await asyncio.sleep(4)
        arena.collector.thaw()
        back = now()
        took = await until_telemetry(arena, "ok")
        await asyncio.sleep(1)
    await _no_span_vanishes(arena, load.calls, frozen, back, at_most("telemetry is ok again after", took, 15, " s"))


async def test_a_hanging_collector_does_not_hold_up_the_stop(start_arena: StartArena) -> None:
    """SIGSTOP of the collector, 60 calls, SIGTERM of the gateway: it stops within 4 s, with exit code 0."""
    arena = await start_arena(collected=True)
    arena.collector.freeze()
    async with arena.load(RATE, total=60) as load:
        await load.all_sent(60)
    told = now()
    code = await arena.gateway.stop()
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        Verdict("exit code", f"{code}", code == 0),
        at_most("time to stop", now() - told, 4.0, " s"),
    )


async def _no_span_vanishes(arena: Arena, calls: list, start: float, end: float, verdict: Verdict) -> None:  # type: ignore[type-arg]
    made = len(calls) + sum(len(call.tries) for call in calls)
    came_before, lost = arena.collector.spans(), 0.0
    async with asyncio.timeout(20):
        while True:
            lost = (await arena.gateway.metrics()).value("gateway_telemetry_dropped_spans_total")
            came_before = arena.collector.spans()
            if came_before + lost >= made:
                break
            await asyncio.sleep(0.1)
    shift = median_shift(arena, {call.id for call in calls if start <= call.started < end})
    await nothing_is_lost(
        arena,
        calls,
        all_good(calls),
        at_least(f"spans that came ({came_before}) or were counted as lost ({lost:g})", came_before + lost, made),
        shift,
        verdict,
    )
