"""Every way in which an answer can be spoiled, before commit (nobody sees it) and after (one error event)."""

from typing import Any

import pytest

from chaos.promises import Verdict, all_good, at_most
from testkit.completions import CHAT_PATH, MESSAGES_PATH
from testkit.load import Call
from tests.chaos.verdict import UNHURRIED, StartArena, nothing_is_lost

PATIENT = {"GATEWAY_RETRY_FLOOR": "1000", "GATEWAY_BREAKER_FAILURES": "1000"}
"""Retries alone are looked at: neither budget nor breaker ends them."""
SILENT = frozenset({"hang_before_headers", "hang_after_headers", "slow_first_token", "stall"})
"""Faults that a timer ends."""
RATE = 30.0
TOTAL = 45
PART = 0.3
KINDS = ("answer", "stream", "stream", "answer")
"""Two replicas take calls in turn while none is slow: by this order each gets answers and streams."""
SPOILED = 8
OPENING = {CHAT_PATH: 1, MESSAGES_PATH: 3}
"""Events without content."""
AFTER = 4
"""Events before a fault that comes after commit: the opening of a chat, and three tokens."""


def fault(kind: str, **details: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"kind": kind, "with": details}


def settings(script: dict[str, Any]) -> dict[str, str]:
    """Those of the gateway: its timers are short where the fault is one that they end."""
    return PATIENT if script["kind"] in SILENT else PATIENT | UNHURRIED


BEFORE = {
    "reset": fault("reset"),
    "hang-before-headers": fault("hang_before_headers"),
    "hang-after-headers": fault("hang_after_headers"),
    "slow-first-token": fault("slow_first_token", delay=5),
    "stall": fault("stall", after_events=1),
    "cut-by-end": fault("cut", after_events=1, how="end"),
    "cut-by-reset": fault("cut", after_events=1, how="reset"),
    "cut-inside-event": fault("cut", after_events=1, how="reset", where="inside_event"),
    "cut-inside-character": fault("cut", after_events=1, how="end", where="inside_character"),
    "malformed-event": fault("malformed_event", after_events=1),
    "short-body": fault("short_body", bytes=20),
    "html": fault("html"),
    "not-json": fault("not_json"),
    "wrong-content-type": fault("content_type", value="application/octet-stream"),
    "error-500": fault("status", status=500),
    "error-502-html": fault("status", status=502, body="<html>Bad Gateway</html>"),
    "error-503": fault("status", status=503),
    "rate-limited": fault("status", status=429, headers={"retry-after-ms": "100"}),
}


OF_THE_GRAMMAR = ("stall", "cut-by-end", "cut-by-reset", "cut-inside-event", "cut-inside-character", "malformed-event")
"""Faults in a stream: each API has a grammar of its own, in which they must be known."""


@pytest.mark.parametrize(
    ("name", "path"), [*((name, CHAT_PATH) for name in BEFORE), *((name, MESSAGES_PATH) for name in OF_THE_GRAMMAR)]
)
async def test_a_fault_before_commit_is_seen_by_nobody(start_arena: StartArena, name: str, path: str) -> None:
    """The first 8 calls that one replica gets (and the fault suits) are spoiled, of 45, half of them streams.

    The other replica is well. 0 failures; each spoiled call was sent again once, to that one (a call that was reset on
    a kept connection goes to the same replica on a new one first, since the old one may just have died: at most 3
    attempts).
    """
    arena = await start_arena(mocks=2, gateway=settings(BEFORE[name]))
    await arena.mock.faults({**BEFORE[name], "times": SPOILED})
    async with arena.load(RATE, total=TOTAL, kinds=KINDS, path=path) as load:
        await load.all_sent(60)
    spoiled = [entry["request_id"] for entry in arena.mock.arrivals() if entry["fault"]]
    tries = {call.id: len(call.tries) for call in load.calls}
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        Verdict(
            "each spoiled call was sent once more",
            f"{len(spoiled)} spoiled, attempts {[tries[one] for one in spoiled]}",
            bool(spoiled) and all(tries[one] == 2 or (name == "reset" and tries[one] == 3) for one in spoiled),
        ),
    )


CUT = (200, "backend_invalid_response", None)
AFTER_COMMIT = {
    "cut-by-end": (fault("cut", after_events=AFTER, how="end"), CUT),
    "cut-by-reset": (fault("cut", after_events=AFTER, how="reset"), CUT),
    "cut-inside-event": (fault("cut", after_events=AFTER, how="end", where="inside_event"), CUT),
    "cut-inside-character": (fault("cut", after_events=AFTER, how="reset", where="inside_character"), CUT),
    "malformed-event": (fault("malformed_event", after_events=AFTER), CUT),
    "no-finish": (fault("no_finish"), CUT),
    "short-body": (fault("short_body"), CUT),
    "stall": (fault("stall", after_events=AFTER), (200, "backend_timeout", "idle")),
}


def in_the_stream_of(path: str, script: dict[str, Any]) -> dict[str, Any]:
    """The same fault after as many tokens, however many events an API opens with."""
    details = script["with"]
    if "after_events" in details:
        details = details | {"after_events": details["after_events"] + OPENING[path] - OPENING[CHAT_PATH]}
    return script | {"with": details}


@pytest.mark.parametrize("path", [CHAT_PATH, MESSAGES_PATH])
@pytest.mark.parametrize("name", AFTER_COMMIT)
async def test_a_fault_after_commit_is_one_error_event(start_arena: StartArena, name: str, path: str) -> None:
    """30 % of the streams are spoiled after three tokens, 45 calls; two replicas could take a retry, and must not.

    Exactly the spoiled streams fail: with the beginning of their own text, one error event and no `[DONE]`; each took
    one attempt; 0 failures else.
    """
    script, expected = AFTER_COMMIT[name]
    arena = await start_arena(mocks=2, gateway=settings(script))
    for mock in arena.mocks:
        await mock.faults({**in_the_stream_of(path, script), "rate": PART, "match": {"stream": True}})
    async with arena.load(RATE, total=TOTAL, path=path) as load:
        await load.all_sent(60)
    spoiled = {entry["request_id"] for mock in arena.mocks for entry in mock.arrivals() if entry["fault"]}
    failed = [call for call in load.calls if call.outcome != "ok"]
    kinds = {_seen(call) for call in failed}
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict(
            "exactly the spoiled streams fail",
            f"{len(spoiled)} spoiled, {len(failed)} failed",
            bool(spoiled) and spoiled == {call.id for call in failed},
        ),
        Verdict(f"each as {expected}, with one error event", f"{kinds}", kinds == {(*expected, 1, True)}),
        at_most("attempts of a spoiled stream", max((len(call.tries) for call in failed), default=0), 1),
    )


OTHER_APIS = {"completions": ("/v1/completions", 3), "responses": ("/v1/responses", 7)}
"""Path, and the events up to the third token: completions open with none, responses with four."""


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("api", OTHER_APIS)
async def test_a_cut_after_commit_is_one_error_event_in_the_other_apis(
    start_arena: StartArena, api: str, how: str
) -> None:
    """30 % of the streams are cut after three tokens, 45 calls, half of them streams.

    Exactly the cut streams fail: with the beginning of their own text and one error event in the form of their API (in
    responses `event: error` of the type `error`), never with a silent end; each took one attempt; 0 failures else.
    """
    path, events = OTHER_APIS[api]
    arena = await start_arena(gateway=PATIENT | UNHURRIED)
    await arena.mock.faults({**fault("cut", after_events=events, how=how), "rate": PART, "match": {"stream": True}})
    async with arena.load(RATE, total=TOTAL, path=path) as load:
        await load.all_sent(60)
    cut = {entry["request_id"] for entry in arena.mock.arrivals() if entry["fault"]}
    failed = [call for call in load.calls if call.outcome != "ok"]
    kinds = {_seen(call) for call in failed}
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict("exactly the cut streams fail", f"{len(cut)} cut", bool(cut) and cut == {call.id for call in failed}),
        Verdict(f"each as {CUT}, with one error event", f"{kinds}", kinds == {(*CUT, 1, True)}),
        at_most("attempts", sum(len(call.tries) for call in load.calls), TOTAL),
    )


def _seen(call: Call) -> tuple[int | None, str, str | None, int, bool]:
    return call.status, call.outcome, call.param, call.error_events, call.events > 0


@pytest.mark.parametrize("name", AFTER_COMMIT)
async def test_a_stream_that_is_held_back_is_retried_whole(start_arena: StartArena, name: str) -> None:
    """The same faults in the first 8 streams one replica gets; callers ask for `x-gateway-commit: complete`.

    The other replica is well. 0 failures; each spoiled stream was sent again once.
    """
    script, _ = AFTER_COMMIT[name]
    arena = await start_arena(mocks=2, gateway=settings(script))
    await arena.mock.faults({**script, "times": SPOILED, "match": {"stream": True}})
    async with arena.load(RATE, total=TOTAL, kinds=KINDS, headers={"x-gateway-commit": "complete"}) as load:
        await load.all_sent(60)
    spoiled = [entry["request_id"] for entry in arena.mock.arrivals() if entry["fault"]]
    tries = {call.id: len(call.tries) for call in load.calls}
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        Verdict(
            "each spoiled stream was sent once more",
            f"{len(spoiled)} spoiled, attempts {[tries[one] for one in spoiled]}",
            bool(spoiled) and all(tries[one] == 2 for one in spoiled),
        ),
    )


@pytest.mark.parametrize("script", [fault("no_done"), fault("drip", bytes=200, interval=0.01)], ids=["no-done", "drip"])
async def test_what_is_odd_but_whole_is_no_failure(start_arena: StartArena, script: dict[str, Any]) -> None:
    """Streams without `[DONE]`, or that come in small pieces: 0 failures, 1 attempt per request; `[DONE]` is there."""
    arena = await start_arena(gateway=PATIENT | UNHURRIED)
    await arena.mock.faults({**script, "rate": PART})
    async with arena.load(RATE, total=TOTAL) as load:
        await load.all_sent(60)
    odd = sum(entry["fault"] is not None for entry in arena.mock.arrivals())
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        Verdict("odd answers", f"{odd}", odd > 0),
        at_most("attempts", sum(len(call.tries) for call in load.calls), TOTAL),
    )
