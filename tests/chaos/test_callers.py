"""Callers who leave: in storms, before an answer, and at the worst moment of a breaker."""

import asyncio
import time
from typing import Any

from chaos.arena import Arena
from chaos.promises import Verdict, all_good, at_most
from testkit.load import Call, now, sent_between
from tests.chaos.verdict import UNHURRIED, StartArena, nothing_is_lost, recovers, undisturbed

ENDLESS = {"MOCK_TOKENS": "500", "MOCK_TOKEN_INTERVAL": "0.02"}
"""A stream takes 10 s: who leaves, leaves in the middle."""


def left_behind(arena: Arena, calls: list[Call]) -> tuple[int, float]:
    """How many calls ended at the backend as `caller_left`, and the longest time from the caller's end to that.

    Without that in which the machine let one of us not run.
    """
    to_monotonic = time.monotonic() - time.time()
    ids: dict[int, str] = {}
    ended: dict[str, float] = {}
    lines: list[dict[str, Any]] = arena.mock.journal_lines()
    for line in lines:
        if line["event"] == "arrived":
            ids[line["call"]] = line["request_id"]
        elif line["event"] == "ended" and line["ended"] == "caller_left":
            ended[ids[line["call"]]] = line["time"] + to_monotonic
    stalls = arena.stalls.so_far()
    waits = [
        ended[call.id] - call.ended - stalls.within(call.ended, ended[call.id]) for call in calls if call.id in ended
    ]
    return len(ended), max(waits, default=0.0)


async def closed_and_unblamed(arena: Arena) -> Verdict:
    """Callers who leave are no failure of the backend."""
    backend = (await arena.gateway.health())["downstream"]["backends"][0]
    state = backend["breaker"], backend["consecutive_failures"]
    return Verdict("the breaker is closed and counts no failure", f"{state}", state == ("closed", 0))


async def test_a_thousand_callers_leave_in_the_middle_of_their_streams(start_arena: StartArena) -> None:
    """1,000 streams, 50 at a time, 120 a second; every caller leaves after five events.

    All 1,000 calls end at the backend, each <= 1 s after its caller left; the gateway counts 1,000 disconnects; the
    breaker counts none; nothing is held.
    """
    arena = await start_arena(mock=ENDLESS, gateway={**UNHURRIED, "GATEWAY_FIRST_TOKEN_TIMEOUT": "15"})
    async with arena.load(120, total=1000, burst=50, kinds=("stream",), leave_after=5, deadline=20) as load:
        await load.all_sent(90)
    await arena.idle()
    number, longest = left_behind(arena, load.calls)
    disconnects = (await arena.gateway.metrics()).value("gateway_client_disconnects_total")
    left = [call for call in load.calls if call.outcome == "left"]
    blamed = await closed_and_unblamed(arena)
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict("all callers leave", f"{len(left)} of {len(load.calls)}", len(left) == 1000),
        Verdict("calls that ended at the backend", f"{number}", number == 1000),
        at_most("the backend works on after a caller left for", longest, 1.0, " s"),
        Verdict("disconnects counted", f"{disconnects:g}", disconnects == 1000),
        blamed,
    )


async def test_callers_who_leave_before_an_answer_give_their_places_back(start_arena: StartArena) -> None:
    """The backend hangs; 90 callers leave after 0.3 s (the timers are 0.8 s); then it is well.

    All calls end at the backend <= 1 s after; the breaker counts no failure; afterwards 0 failures at once.
    """
    arena = await start_arena()
    await arena.mock.faults({"kind": "hang_before_headers"})
    async with arena.load(30, total=90, leave_before=0.3) as load:
        await load.all_sent(60)
    await arena.idle()
    calls = list(load.calls)
    number, longest = left_behind(arena, calls)
    blamed = await closed_and_unblamed(arena)
    await arena.mock.faults()
    async with arena.load(30, total=30, prefix="after") as load:
        await load.all_sent(60)
    await nothing_is_lost(
        arena,
        calls + load.calls,
        Verdict("calls that ended at the backend", f"{number}", number == 90),
        at_most("the backend works on after a caller left for", longest, 1.0, " s"),
        blamed,
        all_good(undisturbed(arena, load.calls), "callers after"),
    )


async def test_a_caller_who_leaves_during_the_half_open_attempt_does_not_block_the_breaker(
    start_arena: StartArena,
) -> None:
    """The backend dies, comes back hanging, and every caller (each takes the one half-open place) leaves after 0.3 s.

    Nobody waits for the end of the outage. The place is given back each time (>= 2 half-open attempts in 2 s); first
    success <= 1 s after the hanging ends.
    """
    arena = await start_arena(gateway={"GATEWAY_OUTAGE_WAIT": "0"})
    async with arena.load(30, total=30) as load:
        await load.all_sent(60)
    calls = list(load.calls)
    await arena.mock.kill()
    async with arena.load(30, total=30, prefix="down") as load:
        await load.all_sent(60)
    calls += load.calls
    await arena.mock.start()
    await arena.mock.faults({"kind": "hang_before_headers"})
    async with arena.load(30, prefix="hanging", leave_before=0.3) as load:
        await asyncio.sleep(2)
    calls += load.calls
    await arena.idle()
    trials = sum(entry["fault"] is not None for entry in arena.mock.arrivals())
    await arena.mock.faults()
    async with arena.load(30, prefix="well") as load:
        recovery = await recovers(arena, load, now())
        recovered = now()
        await asyncio.sleep(1)
    calls += load.calls
    await nothing_is_lost(
        arena,
        calls,
        Verdict("half-open attempts whose callers left", f"{trials}", 2 <= trials <= 10),
        recovery,
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_callers_who_leave_while_they_wait_for_the_end_of_an_outage_leave_no_trace(
    start_arena: StartArena,
) -> None:
    """The backend dies, comes back hanging; every caller waits for it, some make a trial, all leave after 0.3 s.

    The place of a trial whose caller left is given back: first success <= 1.2 s after the hanging ends (there is a
    trial a second); 0 failures afterwards; nothing is held.
    """
    arena = await start_arena()
    async with arena.load(30, total=30) as load:
        await load.all_sent(60)
    calls = list(load.calls)
    await arena.mock.kill()
    async with arena.load(30, total=30, prefix="down", leave_before=0.3) as load:
        await load.all_sent(60)
    calls += load.calls
    await arena.idle()
    await arena.mock.start()
    await arena.mock.faults({"kind": "hang_before_headers"})
    async with arena.load(30, prefix="hanging", leave_before=0.3) as load:
        await asyncio.sleep(2)
    calls += load.calls
    await arena.idle()
    trials = sum(entry["fault"] is not None for entry in arena.mock.arrivals())
    await arena.mock.faults()
    async with arena.load(30, prefix="well") as load:
        recovery = await recovers(arena, load, now(), within=1.2)
        recovered = now()
        await asyncio.sleep(1)
    calls += load.calls
    await nothing_is_lost(
        arena,
        calls,
        Verdict("trials whose callers left", f"{trials}", trials >= 1),
        recovery,
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )
