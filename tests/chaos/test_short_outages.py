"""What no caller may notice: an outage of a second, a restart, a replica that fails fast beside one that is well."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import openai
import pytest

from chaos.arena import Arena
from chaos.processes import Mock
from chaos.promises import Verdict, all_good, at_least, at_most
from testkit.completions import CHAT
from testkit.load import Call, Load, good, now, sent_between, summary
from tests.chaos.verdict import UNHURRIED, StartArena, keep, nothing_is_lost, soon

RATE = 10.0
PATIENT = 10.0
"""A deadline that is longer than requests wait for the end of an outage, 5 s."""
ANSWER = 0.1
"""Seconds in which a backend that is well has answered; the mock model takes 0.055."""
FLOOR, FIRSTS = 10, 5
"""Retries that the budget allows however little is asked; requests that may fail at first, before the breaker opens."""
DOWN = 3.0
"""Seconds from a kill until the backend is back, its start included: well within the 5 s that requests wait."""


def released(arena: Arena, calls: Sequence[Call], since: float) -> list[Verdict]:
    """What became of those who waited for the first good answer after `since`."""
    first = min(call.ended for call in good(calls, since=since))
    waited = [call for call in calls if call.started < first <= call.ended]
    last = max(call.ended for call in waited)
    return [
        at_least("callers who waited", len(waited), 5),
        soon(arena.stalls, "after the first good answer all who waited have theirs", first, last, 1 + ANSWER),
    ]


def in_order(arena: Arena, calls: Sequence[Call], down: float, back: float) -> Verdict:
    """Those who came while the backend was down arrive there in their order, as its journal has it.

    The first to arrive made the trial; the others are released 2, 4, 8 ... at a time. Those of two steps in a row may
    be on their way together.
    """
    ids = [call.id for call in sorted(sent_between(calls, down, back), key=lambda call: call.started)]
    places = {line["request_id"]: place for place, line in enumerate(arena.mock.arrivals())}
    trial = min(ids, key=places.__getitem__)
    released = [(one, (number // 2 + 1).bit_length()) for number, one in enumerate(one for one in ids if one != trial)]
    early = [
        f"{later} before {one}"
        for (one, step), (later, later_step) in combinations(released, 2)
        if later_step > step + 1 and places[later] < places[one]
    ]
    return Verdict(f"{len(ids)} callers arrive in their order", f"{len(early)} too early: {early[:3]}", not early)


def answered_once(arena: Arena, calls: Sequence[Call]) -> Verdict:
    """The journal has one whole answer for each call."""
    ids, whole = {}, []
    for line in arena.mock.journal_lines():
        if line["event"] == "arrived":
            ids[line["call"]] = line["request_id"]
        elif line["event"] == "ended" and line["ended"] == "complete" and line["call"] in ids:
            whole.append(ids[line["call"]])
    ok = sorted(call.id for call in calls if call.outcome == "ok")
    return Verdict("the journal has one whole answer for each call", f"{len(whole)} of {len(ok)}", sorted(whole) == ok)


def failed_attempts(calls: Sequence[Call]) -> int:
    return sum(one.outcome != "ok" for call in calls for one in call.tries)


async def between_two_calls(load: Load) -> None:
    """Wait until a call has ended: the next one is yet to come."""
    number = len(load.calls)
    await load.until(lambda calls: len(calls) > number, 20)


async def frozen_idle(mock: Mock, load: Load) -> None:
    """Freeze a mock model that has no call under way: a stream that has begun cannot be saved from a kill."""
    while True:
        await between_two_calls(load)
        mock.freeze()
        events = Counter(line["event"] for line in mock.journal_lines())
        if events["arrived"] == events["ended"]:
            return
        mock.thaw()


@pytest.mark.parametrize("before", [1.0, 11.0], ids=["soon", "later"])
async def test_a_kill_and_a_restart_cost_no_caller_an_error(start_arena: StartArena, before: float) -> None:
    """SIGKILL under 10 calls/s, half of them streams, and back 3 s later; 1 s and 11 s after the first call.

    0 failures; all who waited have their answers <= 1.1 s after the first good one, and arrive in their order; each
    call is answered once, by the journal; attempts that fail <= the budget's and those of the first requests.
    """
    arena = await start_arena(gateway=UNHURRIED)
    async with arena.load(RATE, deadline=PATIENT) as load:
        await asyncio.sleep(before)
        await frozen_idle(arena.mock, load)
        killed = now()
        await arena.mock.kill()
        await asyncio.sleep(max(0.0, DOWN - arena.mock.start_seconds))
        restarted = now()
        await arena.mock.start()
        back = now()
        await asyncio.sleep(2)
    budget = max(FLOOR, 0.2 * RATE * 10)
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        *released(arena, load.calls, restarted),
        in_order(arena, load.calls, killed, back),
        answered_once(arena, load.calls),
        at_most("attempts that failed", failed_attempts(load.calls), budget + FIRSTS),
    )


OUTAGES: dict[str, dict[str, Any]] = {"503": {"status": 503}, "429": {"status": 429}}


@pytest.mark.parametrize("name", OUTAGES)
async def test_a_second_of_errors_costs_no_caller_an_error(start_arena: StartArena, name: str) -> None:
    """503, or 429 without `Retry-After`, to everything for 1 s under 10 calls/s, half of them streams.

    0 failures; each call is answered once, by the journal, which has at most the budget's attempts in that second and
    those of the first requests (429: of the requests that came before its cooldown was known).
    """
    arena = await start_arena(gateway=UNHURRIED)
    async with arena.load(RATE, deadline=PATIENT) as load:
        await asyncio.sleep(1)
        await between_two_calls(load)
        await arena.mock.faults({"kind": "status", "with": OUTAGES[name]})
        await asyncio.sleep(1)
        await arena.mock.faults()
        healed = now()
        await asyncio.sleep(3)
    failed = [line for line in arena.mock.arrivals() if line["fault"]]
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        *released(arena, load.calls, healed),
        answered_once(arena, load.calls),
        at_most("calls that the backend answered with an error", len(failed), FLOOR + FIRSTS),
    )


@pytest.mark.parametrize("stream", [False, True], ids=["answer", "stream"])
@pytest.mark.parametrize("name", OUTAGES)
async def test_the_sdk_with_its_defaults_survives_a_second(start_arena: StartArena, name: str, stream: bool) -> None:  # noqa: FBT001
    """503 or 429 to everything for 1 s; eight calls of the openai SDK as it comes (two retries), 0.1 s apart.

    8 of 8 get their whole answer.
    """
    arena = await start_arena(gateway={**UNHURRIED, "GATEWAY_REQUEST_DEADLINE": "30"})
    client = openai.AsyncOpenAI(base_url=f"{arena.gateway.url}/v1", api_key="none")
    assert client.max_retries == openai.DEFAULT_MAX_RETRIES == 2

    async def ask(number: int) -> str:
        await asyncio.sleep(0.1 * number)
        body: Any = CHAT | {"messages": [{"role": "user", "content": f"Prompt {number}"}]}
        try:
            if not stream:
                return str((await client.chat.completions.create(**body)).choices[0].finish_reason)
            chunks = [chunk async for chunk in await client.chat.completions.create(**body, stream=True)]
            return str(chunks[-1].choices[0].finish_reason)
        except openai.OpenAIError as error:
            return f"{type(error).__name__}: {error}"

    async with client:
        assert await ask(0) == "stop"
        await arena.mock.faults({"kind": "status", "with": OUTAGES[name]})
        asking = asyncio.gather(*map(ask, range(8)))
        await asyncio.sleep(1)
        await arena.mock.faults()
        ends = await asking
    failed = sum(bool(line["fault"]) for line in arena.mock.arrivals())
    keep(
        [],
        Verdict("all eight get their whole answer", f"{ends}", ends == ["stop"] * 8),
        Verdict("calls that met the outage at the backend", f"{failed}", 0 < failed <= FLOOR + FIRSTS),
    )


UNKNOWN = {"error": {"message": "The model `demo-model` does not exist", "type": "x", "code": "model_not_found"}}
FAST: dict[str, dict[str, Any]] = {
    "429-for-30-s": {"status": 429, "headers": {"retry-after": "30"}},
    "429": {"status": 429},
    "401": {"status": 401},
    "404": {"status": 404, "body": UNKNOWN},
}


@pytest.mark.parametrize("name", FAST)
async def test_a_replica_that_fails_fast_draws_no_traffic(start_arena: StartArena, name: str) -> None:
    """Of two replicas one answers every prompt with an error in a millisecond, the other takes 0.4 s; 20/s for 10 s.

    Of 200 callers at most 2 fail, none with 503; the one that fails is asked at most ten times.
    """
    arena = await start_arena(mocks=2, mock={"MOCK_TTFT": "0.36"}, gateway=UNHURRIED)
    await arena.mock.faults({"kind": "status", "with": FAST[name]})
    async with arena.load(20, total=200, deadline=PATIENT) as load:
        await load.all_sent(60)
    failed = [call for call in load.calls if call.outcome != "ok"]
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict("callers", f"{summary(load.calls)}", len(load.calls) == 200),
        at_most("callers who fail", len(failed), 2),
        at_most("callers who fail with 503", sum(call.status == 503 for call in failed), 0),
        Verdict("calls at the one that fails", f"{len(arena.mock.arrivals())}", 0 < len(arena.mock.arrivals()) <= 10),
    )
