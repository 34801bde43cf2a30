"""A backend that is killed, frozen, restarted, refused, or goes and comes."""

import asyncio
from collections.abc import Sequence

from chaos.arena import Arena
from chaos.processes import Gateway
from chaos.promises import (
    Verdict,
    all_good,
    at_least,
    at_most,
    attempts_at_most,
    fails_as,
    quantile_at_most,
    share_good,
)
from testkit.http import ask
from testkit.load import Call, good, now, sent_between, summary
from tests.chaos.verdict import (
    UNHURRIED,
    StartArena,
    nothing_is_lost,
    recovers,
    seconds_in_gateway,
    seconds_of_callers,
    soon,
    undisturbed,
)

RATE = 40.0
LONG = {"MOCK_TOKENS": "20", "MOCK_TOKEN_INTERVAL": "0.02"}
"""An answer takes 0.42 s: always some under way."""
MIXED = ("answer", "stream", "stream", "answer")
"""Two replicas take calls in turn while none is slow: by this order each gets answers and streams."""
UNREACHABLE = {(502, "backend_connection_error"), (503, "backend_unavailable")}
CUT = {(502, "backend_invalid_response"), (200, "backend_invalid_response")}
"""Answers and streams under way when their backend dies."""
FLAPS, UP, DOWN = 6, 2.0, 2.0
LASTING = {**UNHURRIED, "GATEWAY_OUTAGE_WAIT": "1"}
"""Outages of 3 s last longer than requests wait for their end; tests/chaos/test_short_outages.py has the others."""
TRIAL = 1.2
"""Seconds after which a backend that is back has answered the next trial of an outage; there is one a second."""
PATIENT = 10.0
"""A deadline that is longer than requests wait for the end of an outage, 5 s."""
LAST_CALLS = 0.2
"""Seconds before a kill in which calls may still be under way at the kill; an answer takes 0.055 s."""


def ended_by_one_event(calls: Sequence[Call], moment: float) -> Verdict:
    """What became of the streams that had begun at a moment and did not end well."""
    begun = [call for call in calls if call.first is not None and call.first < moment < call.ended]
    events = [call.error_events for call in begun if call.outcome != "ok"]
    return Verdict(
        "each stream under way ends with one error event",
        f"{len(begun)} under way, error events {events}",
        bool(events) and all(number == 1 for number in events),
    )


async def seconds_until_down(gateway: Gateway) -> float:
    """How long until /health says so."""
    start = now()
    async with asyncio.timeout(10):
        while (await gateway.health())["status"] != "down":  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return now() - start


async def open_for_more_than(seconds: float, gateway: Gateway) -> float:
    """Wait until the breaker is open for more than so many seconds; for how many it is."""
    async with asyncio.timeout(20):
        while True:
            (backend,) = (await gateway.health())["downstream"]["backends"]
            if (left := float(backend["retry_in_seconds"] or 0)) > seconds:
                return left
            await asyncio.sleep(0.02)


def refusals_are_fast(arena: Arena) -> Verdict:
    """Of requests that did not wait for the end of the outage.

    Measured in the gateway: on the way to the caller lies the machine.
    """
    refused = [line for line in arena.gateway.requests() if line["outcome"] == "backend_unavailable"]
    seconds = seconds_in_gateway(arena, [line for line in refused if "waits" not in line])
    return quantile_at_most("p99 of the refusals by an open breaker", seconds, 0.99, 0.05, " s")


def failures_are_fast(arena: Arena, calls: Sequence[Call]) -> Verdict:
    """Of those who come when the first seconds of an outage, in which requests wait, are over."""
    seconds = seconds_of_callers(arena, [call for call in calls if call.outcome != "ok"])
    return quantile_at_most("p99 of the failures after the first 5 s", seconds, 0.99, 0.5, " s")


def only_begun_streams_fail(calls: Sequence[Call]) -> Verdict:
    """Nothing can be done for them; each has one error event."""
    failed = [call for call in calls if call.outcome != "ok"]
    begun = [call for call in failed if call.status == 200 and call.error_events == 1]
    return Verdict(
        "only streams that have begun fail, with one error event each",
        f"{len(begun)} of {len(failed)} failures; {summary(calls)}",
        len(begun) == len(failed),
    )


async def test_a_killed_backend_costs_nobody_more_than_an_error(start_arena: StartArena) -> None:
    """SIGKILL for 3 s under 40 calls/s; requests wait for 1 s of it.

    Every answer within deadline + 100 ms and well-formed; failures are 502 or, with the breaker open, 503; each stream
    under way ends with one error event; /health says `down` within 1 probe interval (0.5 s) + 1 s; attempts per request
    while down <= 1.2; refusals take <= 50 ms; first success <= 1 s after the backend answers its probe again; before
    and afterwards 0 failures; the counts agree; nothing is held.
    """
    arena = await start_arena(mock=LONG, gateway=LASTING)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        killed = now()
        await arena.mock.kill()
        gone = now()
        noticed = await seconds_until_down(arena.gateway)
        await asyncio.sleep(3 - noticed)
        await arena.mock.start()
        recovery = await recovers(arena, load, now())
        recovered = now()
        await asyncio.sleep(1.5)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        soon(arena.stalls, "/health says down", gone, gone + noticed, 1.5),
        all_good(undisturbed(arena, sent_between(load.calls, 0, killed - 1)), "callers before"),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
        fails_as(undisturbed(arena, load.calls), UNREACHABLE | CUT),
        attempts_at_most("attempts per request while down", sent_between(load.calls, killed, killed + 3), 1.2),
        ended_by_one_event(load.calls, killed),
        refusals_are_fast(arena),
    )


async def test_a_backend_that_crashes_is_found_again(start_arena: StartArena) -> None:
    """The process ends from inside, in the middle of a call (the fault `crash`), and is started again after 1.5 s.

    Attempts per request while it is gone <= 1.2; nobody fails but streams that have begun, with one error event; first
    success <= 1.2 s after it answers its probe: a trial a second; every answer in time and well-formed.
    """
    arena = await start_arena(gateway=UNHURRIED)
    async with arena.load(RATE, deadline=PATIENT) as load:
        await asyncio.sleep(1)
        await arena.mock.faults({"kind": "crash"})
        await arena.mock.wait()
        gone = now()
        await asyncio.sleep(1.5)
        await arena.mock.start()
        back = now()
        recovery = await recovers(arena, load, back, within=TRIAL)
        await asyncio.sleep(1)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        only_begun_streams_fail(load.calls),
        attempts_at_most("attempts per request while gone", sent_between(load.calls, gone, back), 1.2),
    )


async def test_three_restarts_in_a_row_are_each_recovered_from(start_arena: StartArena) -> None:
    """SIGTERM, start, three times under 40 calls/s.

    First success <= 1.2 s after each time the backend answers its probe: a trial a second; attempts per request while
    it is gone <= 1.2; 0 failures, since requests wait; every answer in time and well-formed.
    """
    arena = await start_arena(gateway=UNHURRIED)
    recoveries, absences = [], []
    async with arena.load(RATE, deadline=PATIENT) as load:
        for _ in range(3):
            await asyncio.sleep(1)
            await arena.mock.stop()
            gone = now()
            await asyncio.sleep(0.5)
            await arena.mock.start()
            back = now()
            absences.append((gone, back))
            recoveries.append(await recovers(arena, load, back, within=TRIAL))
        await asyncio.sleep(0.5)
    while_gone = [call for gone, back in absences for call in sent_between(load.calls, gone, back)]
    await nothing_is_lost(
        arena,
        load.calls,
        *recoveries,
        all_good(load.calls),
        attempts_at_most("attempts per request while gone", while_gone, 1.2),
    )


async def test_a_frozen_backend_holds_nobody_beyond_the_deadline(start_arena: StartArena) -> None:
    """SIGSTOP for 4 s, then SIGCONT, under 40 calls/s; timeouts 0.8 s, deadline 3 s.

    Every answer within deadline + 100 ms, and none is another caller's; failures are 504 or, with the breaker open,
    503; first success <= 1 s after SIGCONT; 0 failures afterwards.
    """
    arena = await start_arena(mock=LONG)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        frozen = now()
        arena.mock.freeze()
        await asyncio.sleep(4)
        arena.mock.thaw()
        recovery = await recovers(arena, load, now())
        recovered = now()
        await asyncio.sleep(1.5)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        fails_as(
            undisturbed(arena, load.calls),
            {(504, "backend_timeout"), (200, "backend_timeout"), (503, "backend_unavailable")},
        ),
        ended_by_one_event(load.calls, frozen),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_a_backend_that_refuses_is_found_again(start_arena: StartArena) -> None:
    """Nobody listens on the backend's port for 3 s (the fault `refuse`); its process lives and finishes what it has.

    Requests wait for 1 s of it. Attempts per request while refused <= 1.2; failures are 502 or, with the breaker open,
    503; first success <= 1 s after the port is open again; 0 failures afterwards.
    """
    arena = await start_arena(gateway=LASTING)
    async with arena.load(RATE) as load:
        await asyncio.sleep(1)
        refused = now()
        await arena.mock.faults({"kind": "refuse", "with": {"seconds": 3}, "times": 1})
        await asyncio.sleep(2)
        open_again = await arena.answers(arena.mock)
        recovery = await recovers(arena, load, open_again)
        recovered = now()
        await asyncio.sleep(1)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        fails_as(undisturbed(arena, load.calls), UNREACHABLE),
        attempts_at_most("attempts per request while refused", sent_between(load.calls, refused, open_again), 1.2),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_of_two_replicas_one_is_killed_and_nobody_sees_it(start_arena: StartArena) -> None:
    """Two replicas, one SIGKILLed for 3 s and started again, under 40 calls/s.

    0 failures, but for streams already committed, of which there are some (an answer takes 0.42 s): one error event
    each.
    """
    arena = await start_arena(mocks=2, mock=LONG, gateway=UNHURRIED)
    async with arena.load(RATE, kinds=MIXED) as load:
        await asyncio.sleep(2)
        killed = now()
        await arena.mock.kill()
        await asyncio.sleep(3)
        await arena.mock.start()
        await asyncio.sleep(2)
    failed = [call for call in load.calls if call.outcome != "ok"]
    # Where it was sent tells that the killed one had it, wherever its first words were on their way at the kill.
    committed = [call for call in failed if call.first is not None and call.started < killed]
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict(
            "only streams already committed fail, with one error event each",
            f"{len(failed)} failures, {len(committed)} of them committed streams,"
            f" error events {[call.error_events for call in committed]}",
            0 < len(failed) == len(committed) and all(call.error_events == 1 for call in committed),
        ),
    )


async def test_a_flapping_backend_gives_its_up_time(start_arena: StartArena) -> None:
    """Killed and started again six times, 2 s down and 2 s up, under 40 calls/s.

    Each first success <= 1 s after the backend's first good probe. From there to the kill goodput >= 90 % (calls of the
    last 0.2 s not counted: they may be under way at the kill). Of everything sent in the whole up-time, from the first
    good probe to the kill, >= 45 % is answered: what remains of 2 s when a recovery takes the 1 s it may, and the kill
    the last 0.1 s; some 90 % is usual. The breaker opens once per flap and once for each open time (>= 0.8 s) that
    passes in it; every answer in time and well-formed.
    """
    arena = await start_arena(gateway=UNHURRIED)
    ups: list[tuple[float, float, float]] = []
    recoveries = []
    openings = 0.0
    async with arena.load(RATE) as load:
        await asyncio.sleep(1)
        for _ in range(FLAPS):
            down = now()
            await arena.mock.kill()
            await asyncio.sleep(DOWN)
            await arena.mock.start()
            up = now()
            openings += 1 + (up - down) / 0.8
            recoveries.append(await recovers(arena, load, up))
            recovered = min(call.ended for call in good(load.calls, since=up))
            await asyncio.sleep(up + UP - now())
            ups.append((up, recovered, now()))
    opened = (await arena.gateway.metrics()).value("gateway_breaker_transitions_total", to="open")
    while_up = [call for up, _, down in ups for call in sent_between(load.calls, up, down)]
    while_well = [
        call for _, well, down in ups for call in undisturbed(arena, sent_between(load.calls, well, down - LAST_CALLS))
    ]
    await nothing_is_lost(
        arena,
        load.calls,
        *recoveries,
        at_least(f"goodput of {len(while_well)} calls from first success to kill", share_good(while_well), 0.9),
        at_least(f"goodput of {len(while_up)} calls in the whole up-time", share_good(while_up), 0.45),
        at_most("times the breaker opened", opened, openings),
    )


async def test_a_backend_that_answers_errors_is_asked_little_and_found_again(start_arena: StartArena) -> None:
    """503 to everything for 12 s under 40 calls/s, then well.

    Attempts per request <= 1.2; failures are that 503 or, with the breaker open, the gateway's; refusals take <= 50 ms,
    and nobody who comes after the first 5 s waits; first success within the open time then running + 1 s (its probe was
    good all the time, so that nothing but the open time can end it); 0 failures afterwards.
    """
    arena = await start_arena(gateway=UNHURRIED)
    async with arena.load(RATE) as load:
        await asyncio.sleep(1)
        broken = now()
        await arena.mock.faults({"kind": "status", "with": {"status": 503}})
        await asyncio.sleep(12)
        open_for = await open_for_more_than(1, arena.gateway)  # no trial meets the end of the fault and opens it anew
        await arena.mock.faults()
        healed = now()
        recovery = await recovers(arena, load, healed, within=open_for + 1)
        recovered = now()
        await asyncio.sleep(1)
    sent = sent_between(load.calls, broken, healed)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        fails_as(undisturbed(arena, load.calls), {(503, "backend_error"), (503, "backend_unavailable")}),
        attempts_at_most("attempts per request", sent, 1.2),
        refusals_are_fast(arena),
        failures_are_fast(arena, sent_between(load.calls, broken + 5.5, healed)),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_everything_down_for_a_minute_and_back(start_arena: StartArena) -> None:
    """Both replicas killed for 60 s under 20 calls/s.

    Attempts per request <= 1.2; the breakers open; refusals take <= 50 ms, and nobody who comes after the first 5 s
    waits; /readyz stays 200; memory grows <= 20 MB;
    first success <= 1 s after the first backend answers its probe again; 0 failures afterwards.
    """
    arena = await start_arena(mocks=2, gateway=UNHURRIED)
    async with arena.load(RATE / 2) as load:
        await asyncio.sleep(1)
        memory = arena.gateway.memory()
        killed = now()
        await asyncio.gather(*(mock.kill() for mock in arena.mocks))
        ready = []
        while now() < killed + 60:
            await asyncio.sleep(1)
            ready.append((await ask(arena.gateway.ready_url)).status == 200)
        states = [backend["breaker"] for backend in (await arena.gateway.health())["downstream"]["backends"]]
        sent = sent_between(load.calls, killed, now())
        growth = (arena.gateway.memory() - memory) / 1e6
        await arena.mock.start()
        recovery = await recovers(arena, load, now())
        await arena.mocks[1].start()
        recovered = now()
        await asyncio.sleep(1.5)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        fails_as(undisturbed(arena, load.calls), UNREACHABLE | CUT),
        attempts_at_most("attempts per request", sent, 1.2),
        Verdict("no breaker is closed after 60 s", f"{states}", "closed" not in states),
        Verdict("/readyz answers 200 all the time", f"{ready.count(True)} of {len(ready)} looks", all(ready)),
        at_most("memory grows", growth, 20, " MB"),
        refusals_are_fast(arena),
        failures_are_fast(arena, sent_between(load.calls, killed + 5.5, killed + 60)),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )
