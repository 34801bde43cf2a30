"""More calls than the backend can take, rate limits, slow answers, and callers who retry on top."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from chaos.arena import Arena
from chaos.processes import Gateway
from chaos.promises import Verdict, all_good, at_least, at_most, attempts_at_most, fails_as, quantile_at_most
from testkit.load import Call, good, now, sent_between
from tests.chaos.verdict import (
    StartArena,
    nothing_is_lost,
    recovers,
    seconds_in_gateway,
    seconds_of_callers,
    undisturbed,
)

SLOW = {"MOCK_TTFT": "0.1", "MOCK_TOKEN_INTERVAL": "0.02"}
"""An answer takes 0.24 s, and with all places taken twice that."""
FLOOR = 10
"""Retries in 10 s that the budget allows however little is asked."""
PEAK, DOUBLE = 15.0, 32.0
"""Calls per second: just under what eight places can answer (8 / 0.48 s), and twice that."""


def goodput(arena: Arena, calls: list[Call], start: float, end: float) -> float:
    """Good answers per second, of those in which the machine ran."""
    stalls = arena.stalls.so_far()
    ran = end - start - stalls.within(start, end)
    ended = [call.ended for call in good(calls) if start <= call.ended < end]
    return len([at for at in ended if not stalls.holds(at)]) / ran


def asked_before_it_said_so(asked: Sequence[Call]) -> Verdict:
    """Whoever was sent to a backend that said to leave it alone was under way when the first of them heard so."""
    first = min((call.ended for call in asked), default=0.0)
    late = [call.id for call in asked if call.started > first]
    return Verdict("the backend is asked by those alone that were under way", f"{len(asked)}, late {late}", not late)


async def highest(gateway: Gateway, name: str, seconds: float) -> float:
    """The highest value of a gauge meanwhile."""
    values = []
    end = now() + seconds
    while now() < end:
        values.append((await gateway.metrics()).value(name))
        await asyncio.sleep(0.1)
    return max(values)


async def test_at_twice_the_load_the_goodput_stays(start_arena: StartArena) -> None:
    """A model with 8 places, a gateway with 8 slots a caller and a queue of 8; 15 calls/s for 6 s, then 32 for 20 s.

    20 s are enough for a collapse to show: the queue is full after half a second, nobody stays for longer than 1 s, so
    that it would have fed on itself twenty times over. Measured from 2 s on.

    Goodput at twice the load >= 90 % of the peak; the rest is refused with 503 `gateway_overloaded` and Retry-After,
    in <= 50 ms (p99 in the gateway); the queue never holds more than 8; every answer within deadline + 100 ms.
    """
    arena = await start_arena(
        mock={**SLOW, "MOCK_MAX_CONCURRENCY": "8"},
        gateway={
            "GATEWAY_MAX_IN_FLIGHT": "16",  # all calls come from one address, which has half
            "GATEWAY_MAX_QUEUE": "8",
            "GATEWAY_FIRST_TOKEN_TIMEOUT": "3",
            "GATEWAY_ANSWER_TIMEOUT": "3",
        },
    )
    async with arena.load(PEAK) as load:
        start = now()
        await asyncio.sleep(6)
        peak = goodput(arena, load.calls, start + 1, start + 6)
    calls = list(load.calls)
    async with arena.load(DOUBLE, prefix="double") as load:
        start = now()
        queued = await highest(arena.gateway, "gateway_queued_requests", 20)
        double = goodput(arena, load.calls, start + 2, now())
    calls += load.calls
    refused = [call for call in calls if call.outcome != "ok"]
    lines = [line for line in arena.gateway.requests() if line["outcome"] == "gateway_overloaded"]
    told = [call for call in refused if call.outcome == "gateway_overloaded" and call.retry_after]
    await nothing_is_lost(
        arena,
        calls,
        at_least(f"goodput at twice the load, of {peak:.1f}/s at the peak", double / peak, 0.9),
        Verdict(
            "the rest is refused, with Retry-After", f"{len(told)} of {len(refused)}", 0 < len(told) == len(refused)
        ),
        quantile_at_most("p99 of the refusals", seconds_in_gateway(arena, lines), 0.99, 0.05, " s"),
        at_most("requests in the queue", queued, 8),
    )


async def test_a_backend_that_sheds_is_used_and_left_alone(start_arena: StartArena) -> None:
    """The backend itself has 4 places and turns the rest away with 429 and Retry-After 0.2 s; 15 calls/s, then 32.

    Each 429 is a cooldown of 0.2 s, after which one request tries first; the others follow after 0.1 s without a 429:
    goodput at twice the load >= 60 % of the peak. The rest gets that 429, or 429 `backend_rate_limited` with a
    Retry-After; the retry budget holds, a fifth of the requests of any 10 s or 10 retries: of all of them 1.2 attempts
    per request, and 10 more for the seconds that are left when the test does not take whole tens of them; the breaker
    stays closed (429 is no failure of the backend).
    """
    arena = await start_arena(mock=SLOW)
    overload = {"capacity": 4, "retry_after": 0.2, "status": 429}
    await arena.mock.faults({"kind": "overload", "with": overload})
    async with arena.load(PEAK) as load:
        start = now()
        await asyncio.sleep(6)
        peak = goodput(arena, load.calls, start + 1, start + 6)
    calls = list(load.calls)
    async with arena.load(DOUBLE, prefix="double") as load:
        start = now()
        await asyncio.sleep(12)
        double = goodput(arena, load.calls, start + 2, now())
    calls += load.calls
    opened = (await arena.gateway.metrics()).value("gateway_breaker_transitions_total", to="open")
    limited = [call for call in calls if call.status == 429]
    told = [call for call in limited if call.retry_after]
    await nothing_is_lost(
        arena,
        calls,
        at_least(f"goodput at twice the load, of {peak:.1f}/s at the peak", double / peak, 0.6),
        fails_as(undisturbed(arena, calls), {(429, "backend_error"), (429, "backend_rate_limited")}),
        Verdict("each with Retry-After", f"{len(told)} of {len(limited)}", len(told) == len(limited)),
        attempts_at_most("attempts per request", calls, 1.2 + FLOOR / len(calls)),
        at_most("times the breaker opened", opened, 0),
    )


async def test_a_storm_of_rate_limits_is_passed_on_and_not_fed(start_arena: StartArena) -> None:
    """429 to everything, Retry-After 4 s, for 3 s under 30 calls/s, then well.

    Before the 4 s are over the backend is asked by none but those under way when it said so; who cannot wait that long
    gets 429 with what is left of them and no `x-should-retry`; all others wait, and get their answers: first success
    <= 1 s after the 4 s; 0 failures of those who have the time.
    """
    arena = await start_arena()
    async with arena.load(30) as load:
        await asyncio.sleep(1)
        limit = {"status": 429, "headers": {"retry-after": "4"}}
        limited_at = now()
        await arena.mock.faults({"kind": "status", "with": limit})
        await asyncio.sleep(3)
        await arena.mock.faults()
        recovery = await recovers(arena, load, limited_at + 4)
        await asyncio.sleep(1)
    asked = [line["request_id"] for line in arena.mock.arrivals() if line["fault"]]
    limited = [call for call in load.calls if call.outcome != "ok"]
    told = [call for call in limited if call.status == 429 and 1 <= int(call.retry_after or 0) <= 4]
    final = [call for call in limited if call.should_retry is not None]
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        Verdict("calls that were limited by the backend itself", f"{len(asked)}", 0 < len(asked) == len(set(asked))),
        asked_before_it_said_so([call for call in load.calls if call.id in asked]),
        Verdict("429 with what is left", f"{len(told)} of {len(limited)}", 0 < len(told) == len(limited)),
        Verdict("none says not to retry", f"{len(final)}", not final),
        all_good(undisturbed(arena, sent_between(load.calls, limited_at + 2, now())), "callers who have the time"),
    )


async def test_a_limit_for_an_hour_is_told_and_the_backend_left_alone(start_arena: StartArena) -> None:
    """429 to everything, Retry-After an hour, for 4 s under 30 calls/s.

    The backend is asked by none but those under way when it said so; they get that Retry-After as it came, all others
    429 `backend_rate_limited` with what is left of the 300 s that it is left alone at most; nobody waits.
    """
    arena = await start_arena()
    limit = {"status": 429, "headers": {"retry-after": "3600"}}
    await arena.mock.faults({"kind": "status", "with": limit})
    async with arena.load(30, total=120) as load:
        await load.all_sent(60)
    calls = load.calls
    first = [c for c in calls if (c.status, c.outcome, c.retry_after) == (429, "backend_error", "3600")]
    others = [c for c in calls if (c.status, c.outcome) == (429, "backend_rate_limited") and not c.tries]
    left = [int(call.retry_after or 0) for call in others]
    final = [call for call in calls if call.should_retry is not None]
    came = len(arena.mock.arrivals())
    await nothing_is_lost(
        arena,
        calls,
        Verdict("429 as it came", f"{len(first)} of {came}", 0 < len(first) == came),
        asked_before_it_said_so(first),
        Verdict("429 without an attempt", f"{len(others)}", len(others) == len(calls) - len(first)),
        Verdict("what is left", f"{min(left)} to {max(left)} s", 290 <= min(left) <= max(left) <= 300),
        Verdict("none says not to retry", f"{len(final)}", not final),
        quantile_at_most("p99 of all", seconds_of_callers(arena, calls), 0.99, 0.5, " s"),
    )


async def test_a_short_retry_after_is_waited_for(start_arena: StartArena) -> None:
    """20 % of the calls get 429 with `retry-after-ms: 300`, 90 calls, one replica.

    0 failures; no retry arrives earlier than 0.3 s after the attempt before it (less 5 ms: an event loop's timers are
    whole milliseconds, and the journal's clock is another one).
    """
    arena = await start_arena(gateway={"GATEWAY_RETRY_FLOOR": "1000", "GATEWAY_MAX_ATTEMPTS": "6"})
    limit = {"status": 429, "headers": {"retry-after-ms": "300"}}
    await arena.mock.faults({"kind": "status", "with": limit, "rate": 0.2})
    async with arena.load(30, total=90, deadline=8) as load:
        await load.all_sent(60)
    arrivals: dict[str, list[float]] = {}
    for entry in arena.mock.arrivals():
        arrivals.setdefault(entry["request_id"], []).append(entry["time"])
    gaps = [later - first for times in arrivals.values() for first, later in pairwise(times)]
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        at_least(f"the shortest of {len(gaps)} waits", min(gaps), 0.295, " s"),
    )


async def test_a_slow_drip_ends_at_the_deadline(start_arena: StartArena) -> None:
    """Every answer comes 20 bytes at a time, each 50 ms; the idle timeout is 1.5 s, the deadline 3 s; 10 calls/s, 6 s.

    Nobody waits longer than deadline + 100 ms; no failure is the idle timer's, since bytes flow; memory grows <= 20 MB.
    """
    arena = await start_arena(
        mock={"MOCK_TOKENS": "200"},
        gateway={
            "GATEWAY_IDLE_TIMEOUT": "1.5",
            "GATEWAY_FIRST_TOKEN_TIMEOUT": "10",
            "GATEWAY_ANSWER_TIMEOUT": "10",
            "GATEWAY_BREAKER_FAILURES": "1000",
        },
    )
    memory = arena.gateway.memory()
    await arena.mock.faults({"kind": "drip", "with": {"bytes": 20, "interval": 0.05}})
    async with arena.load(10, total=60) as load:
        await load.all_sent(60)
    ends = {(call.kind, call.status, call.outcome, call.error_events) for call in load.calls}
    growth = (arena.gateway.memory() - memory) / 1e6
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict(
            "all end by the deadline, streams with one error event",
            f"{sorted(ends, key=str)}",
            ends == {("answer", 504, "deadline_exceeded", 0), ("stream", 200, "deadline_exceeded", 1)},
        ),
        at_most("memory grows", growth, 20, " MB"),
    )


async def test_callers_who_retry_as_the_sdks_do_do_not_multiply_the_attempts(start_arena: StartArena) -> None:
    """503 to everything for 6 s under 20 calls/s; each caller sends its call again up to twice, as the SDKs do.

    Attempts per call that somebody meant to make <= 1.2; calls are repeated, but none that had an attempt.
    """
    arena = await start_arena()
    await arena.mock.faults({"kind": "status", "with": {"status": 503}})
    async with arena.load(20, total=120, sdk_retries=2) as load:
        await load.all_sent(60)
    meant = [call for call in load.calls if "-again-" not in call.id]
    repeated = {call.id.partition("-again-")[0] for call in load.calls if "-again-" in call.id}
    tried = [call.id for call in meant if call.tries and call.id in repeated]
    attempts = sum(len(call.tries) for call in load.calls)
    await nothing_is_lost(
        arena,
        load.calls,
        at_most(f"attempts per call of {len(meant)}", attempts / len(meant), 1.2),
        Verdict(
            "no call is repeated although an attempt was made",
            f"{len(repeated)} calls repeated, {len(tried)} of them with an attempt",
            bool(repeated) and not tried,
        ),
    )
