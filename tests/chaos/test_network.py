"""The network between gateway and backend: black holes, resets, names that do not resolve."""

import asyncio

from chaos.promises import Verdict, all_good, at_most, attempts_at_most, fails_as
from testkit.fault_proxy import Network
from testkit.load import now, sent_between
from testkit.ports import LOOPBACK
from tests.chaos.verdict import UNHURRIED, StartArena, nothing_is_lost, probed_well, recovers, soon, undisturbed

RATE = 30.0
LONG = {"MOCK_TOKENS": "20", "MOCK_TOKEN_INTERVAL": "0.02"}
LASTING = {**UNHURRIED, "GATEWAY_OUTAGE_WAIT": "1"}
"""Outages of 3 s last longer than requests wait for their end."""
UNREACHABLE = {(502, "backend_connection_error"), (503, "backend_unavailable")}


async def test_a_backend_that_accepts_no_connection_runs_into_the_connect_timer(start_arena: StartArena) -> None:
    """Connects are dropped for 3 s (0.3 s connect timeout), on an idle gateway, so that no connection is kept.

    Requests wait for 1 s of it. Failures are 504 `backend_timeout` of the timer `connect`, or 503 with the breaker
    open; not one prompt arrives; a probe is good <= 3 s after the network is (one that it swallowed takes 1 s to fail),
    and first success <= 1 s after that; 0 failures afterwards.
    """
    arena = await start_arena(proxied=True, gateway=LASTING)
    await arena.proxy.be(Network.NO_CONNECT)
    async with arena.load(RATE) as load:
        await asyncio.sleep(3)
        failures = {(call.status, call.outcome, call.param) for call in load.calls}
        arrived = len(arena.mock.arrivals())
        await arena.proxy.be(Network.GOOD)
        back = now()
        probed = await probed_well(arena.gateway, back)
        recovery = await recovers(arena, load, probed)
        recovered = now()
        await asyncio.sleep(1)
    allowed = {(504, "backend_timeout", "connect"), (503, "backend_unavailable", None)}
    await nothing_is_lost(
        arena,
        load.calls,
        soon(arena.stalls, "a probe is good again", back, probed, 3),
        recovery,
        Verdict("the connect timer and then the breaker", f"{sorted(failures, key=str)}", failures == allowed),
        at_most("prompts that arrived", arrived, 0),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_a_black_hole_runs_into_the_timer_of_its_phase(start_arena: StartArena) -> None:
    """Every byte is lost for 4 s under 30 calls/s: on new connections and in the middle of streams.

    Before the headers the timer is `answer` or, for streams, `first_token`; in a stream that has begun it is `idle`,
    told by one error event; every answer within deadline + 100 ms; a probe is good <= 3 s after the network is (one
    that it swallowed takes 1 s to fail), and first success <= 1 s after that; 0 failures afterwards.
    """
    arena = await start_arena(proxied=True, mock=LONG)
    async with arena.load(RATE) as load:
        await asyncio.sleep(2)
        lost = now()
        await arena.proxy.be(Network.SWALLOWS)
        await asyncio.sleep(4)
        await arena.proxy.be(Network.GOOD)
        back = now()
        probed = await probed_well(arena.gateway, back)
        recovery = await recovers(arena, load, probed)
        recovered = now()
        await asyncio.sleep(1)
    timers = {(call.kind, call.status, call.param) for call in load.calls if call.outcome == "backend_timeout"}
    expected = {("answer", 504, "answer"), ("stream", 504, "first_token"), ("stream", 200, "idle")}
    begun = [call for call in load.calls if call.first is not None and call.first < lost < call.ended]
    failed = [call.error_events for call in begun if call.outcome != "ok"]
    await nothing_is_lost(
        arena,
        load.calls,
        soon(arena.stalls, "a probe is good again", back, probed, 3),
        recovery,
        # An unstreamed answer that was being written when the bytes began to be lost stands still: the idle timer.
        Verdict(
            "the timer of each phase",
            f"{sorted(timers, key=str)}",
            expected <= timers <= expected | {("answer", 504, "idle"), ("stream", 504, "idle")},
        ),
        Verdict("a stream that has begun ends with one error event", f"{failed}", bool(failed) and set(failed) == {1}),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_a_name_that_does_not_resolve_and_comes_back_with_another_address(start_arena: StartArena) -> None:
    """The backend dies and its name vanishes for 3 s; then it is back under another address, as a container is.

    Requests wait for 1 s of it. Failures are 502 `backend_connection_error` or, with the breaker open, 503 (or of the
    calls under way at its death); attempts per request <= 1.2; first success <= 1 s after the new address answers and
    resolves; 0 failures afterwards.
    """
    arena = await start_arena(named=True, gateway=LASTING)
    async with arena.load(RATE) as load:
        await asyncio.sleep(1)
        gone = now()
        arena.resolve(None)
        await arena.mock.kill()
        await asyncio.sleep(3)
        back = await arena.add_mock(host="127.0.0.2", port=arena.mock.port)
        arena.resolve(back.host)
        recovery = await recovers(arena, load, now())
        recovered = now()
        await asyncio.sleep(1)
    down = sent_between(load.calls, gone, recovered)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        fails_as(
            undisturbed(arena, load.calls),
            UNREACHABLE | {(502, "backend_invalid_response"), (200, "backend_invalid_response")},
        ),
        attempts_at_most("attempts per request while gone", down, 1.2),
        Verdict("the new address took the calls", f"{len(back.arrivals())} arrivals", bool(back.arrivals())),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_a_name_that_vanishes_for_a_short_while_is_not_missed(start_arena: StartArena) -> None:
    """DNS fails for 4 s under 30 calls/s, the backend lives.

    0 failures, 1 attempt per request: kept connections need no name, new ones take the address of the last 10 s.
    """
    arena = await start_arena(named=True, gateway=UNHURRIED)
    async with arena.load(RATE) as load:
        await asyncio.sleep(1)
        arena.resolve(None)
        await asyncio.sleep(4)
        arena.resolve(LOOPBACK)
        await asyncio.sleep(1)
    await nothing_is_lost(
        arena, load.calls, all_good(load.calls), attempts_at_most("attempts per request", load.calls, 1.0)
    )


async def test_a_name_that_cannot_be_resolved_is_told_and_asked_for_again(start_arena: StartArena) -> None:
    """DNS fails for 3 s from the first prompt on: no connection is kept, no address remembered.

    Requests wait for 1 s of it. Failures are 502 `backend_connection_error` and then, with the breaker open, 503; not
    one prompt arrives; attempts per request <= 1.2; first success <= 1 s after the name resolves again; 0 failures
    afterwards.
    """
    arena = await start_arena(named=True, gateway=LASTING)
    arena.resolve(None)
    async with arena.load(RATE) as load:
        await asyncio.sleep(3)
        arrived = len(arena.mock.arrivals())
        arena.resolve(LOOPBACK)
        back = now()
        recovery = await recovers(arena, load, back)
        recovered = now()
        await asyncio.sleep(1)
    await nothing_is_lost(
        arena,
        load.calls,
        recovery,
        fails_as(undisturbed(arena, load.calls), UNREACHABLE),
        at_most("prompts that arrived meanwhile", arrived, 0),
        attempts_at_most("attempts per request meanwhile", sent_between(load.calls, 0, back), 1.2),
        all_good(undisturbed(arena, sent_between(load.calls, recovered, now())), "callers after"),
    )


async def test_resets_before_the_headers_are_retried(start_arena: StartArena) -> None:
    """Every tenth call is broken by a TCP RST before its headers, 120 calls.

    0 failures for callers: each is sent again; no call is sent twice that was answered (the counts agree).
    """
    arena = await start_arena(gateway={**UNHURRIED, "GATEWAY_RETRY_FLOOR": "1000", "GATEWAY_BREAKER_FAILURES": "1000"})
    await arena.mock.faults({"kind": "reset", "rate": 0.1})
    async with arena.load(RATE, total=120) as load:
        await load.all_sent(30)
    broken = sum(entry["fault"] == "reset" for entry in arena.mock.arrivals())
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict("calls that were broken", f"{broken}", broken > 0),
        all_good(load.calls),
    )
