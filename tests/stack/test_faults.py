"""Each fault of the mock model, scripted through its published control port, and what a caller gets for it."""

import concurrent.futures
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest

from testkit.completions import prompt
from testkit.polling import wait_for
from tests.stack.engine import PATIENCE, Stack


def fault(kind: str, **details: object) -> dict[str, Any]:
    return {"kind": kind, "with": details}


@dataclass(frozen=True)
class Case:
    """A fault that every attempt meets before a byte was sent on, and the error that is left.

    Attributes:
        attempts: how often the mock model was called.
        again: one more call is fine: when a kept-alive connection is reset, the request is sent again at once.
    """

    name: str
    fault: dict[str, Any]
    status: int
    code: str
    attempts: int
    param: str | None = None
    stream: bool = False
    again: bool = False
    headers: dict[str, str] = field(default_factory=dict)


HOUR = 3600
LONG = "11"
"""Seconds; more than anybody waits for the end of a cooldown."""
INVALID = "backend_invalid_response"
BEFORE_COMMIT = [
    Case("status 500", fault("status", status=500), 500, "mock_500", 3),
    Case("status 400", fault("status", status=400), 400, "mock_400", 1),
    Case("status 401", fault("status", status=401), 502, "backend_auth_error", 1),
    Case("status 503, no JSON", fault("status", status=503, body="oops"), 503, INVALID, 3),
    Case(
        "status 429, long wait",
        fault("status", status=429, headers={"retry-after": LONG}),
        429,
        "mock_429",
        1,
        headers={"retry-after": LONG},
    ),
    Case("hang before headers", fault("hang_before_headers"), 504, "backend_timeout", 1, "answer"),
    Case(
        "hang before headers, stream",
        fault("hang_before_headers"),
        504,
        "backend_timeout",
        1,
        "first_token",
        stream=True,
    ),
    Case("hang after headers", fault("hang_after_headers"), 504, "backend_timeout", 1, "idle"),
    Case(
        "hang after headers, stream", fault("hang_after_headers"), 504, "backend_timeout", 1, "first_token", stream=True
    ),
    Case(
        "slow first token", fault("slow_first_token", delay=HOUR), 504, "backend_timeout", 1, "first_token", stream=True
    ),
    Case("latency", fault("latency", delay=HOUR), 504, "backend_timeout", 1, "answer"),
    Case("stall", fault("stall"), 504, "backend_timeout", 1, "idle"),
    Case("cut by its end", fault("cut"), 502, INVALID, 3),
    Case("cut by a reset", fault("cut", how="reset"), 502, INVALID, 3),
    Case("cut after the role, stream", fault("cut", after_events=1), 502, INVALID, 3, stream=True),
    Case("reset after the role, stream", fault("cut", after_events=1, how="reset"), 502, INVALID, 3, stream=True),
    Case("malformed event first, stream", fault("malformed_event", after_events=1), 502, INVALID, 3, stream=True),
    Case("wrong content type", fault("content_type", value="text/html"), 502, INVALID, 3),
    Case("wrong content type, stream", fault("content_type", value="application/json"), 502, INVALID, 3, stream=True),
    Case("html", fault("html"), 502, INVALID, 3),
    Case("html, stream", fault("html"), 502, INVALID, 3, stream=True),
    Case("short body", fault("short_body"), 502, INVALID, 3),
    Case("not JSON", fault("not_json"), 502, INVALID, 3),
    Case("reset", fault("reset"), 502, "backend_connection_error", 3, again=True),
    Case("reset, stream", fault("reset"), 502, "backend_connection_error", 3, stream=True, again=True),
    Case("refuse", fault("refuse", seconds=5), 502, "backend_connection_error", 1),
]


def attempts_at_the_model(stack: Stack) -> int:
    """Calls that the mock model saw."""
    total: int = stack.control("GET", "/journal").json["total"]
    return total


@pytest.mark.parametrize("case", BEFORE_COMMIT, ids=lambda case: case.name)
def test_a_fault_before_the_first_byte_is_a_whole_error(stack: Stack, case: Case) -> None:
    stack.script(case.fault)
    answer = stack.ask(prompt(stream=case.stream, user=case.name))  # not a repeat of another one
    assert (answer.status, answer.own_error["code"]) == (case.status, case.code), answer
    if case.status != 400:
        assert answer.own_error["param"] == case.param
    assert case.attempts <= attempts_at_the_model(stack) <= case.attempts + case.again
    assert answer.headers.items() >= case.headers.items()
    assert "x-trace-id" in answer.headers


@pytest.mark.parametrize("case", [case for case in BEFORE_COMMIT if case.attempts == 3], ids=lambda case: case.name)
def test_a_fault_that_one_attempt_meets_is_not_seen(stack: Stack, case: Case) -> None:
    stack.script({**case.fault, "times": 1})
    answer = stack.ask(prompt(stream=case.stream))
    assert (answer.status, answer.headers["x-gateway-attempts"]) == (200, "2"), answer
    assert answer.text


AFTER_COMMIT = {
    "stall": (fault("stall", after_events=4), "backend_timeout", "idle"),
    "no finish": (fault("no_finish"), INVALID, None),
    "malformed event": (fault("malformed_event", after_events=4), INVALID, None),
    **{
        f"cut by {how} {where}": (fault("cut", after_events=4, how=how, where=where), INVALID, None)
        for how in ("end", "reset")
        for where in ("between", "inside_event", "inside_character")
    },
    "short body": (fault("short_body"), INVALID, None),
}


@pytest.mark.parametrize("name", AFTER_COMMIT)
def test_a_fault_after_the_first_byte_is_one_error_event(stack: Stack, name: str) -> None:
    script, code, param = AFTER_COMMIT[name]
    good = [event for event in stack.ask(prompt(stream=True)).events if event != "[DONE]"]
    stack.control("DELETE", "/journal")
    stack.script(script)
    answer = stack.ask(prompt(stream=True))
    assert answer.status == 200
    *events, last = answer.events
    assert last.keys() == {"error"}
    assert (last["error"]["code"], last["error"]["param"]) == (code, param)
    assert all("error" not in event for event in events)
    assert 2 <= len(events) <= len(good)
    assert answer.cut, "no proper end of the body"
    assert attempts_at_the_model(stack) == 1, "nothing is retried after the first byte"


@pytest.mark.parametrize(
    "script",
    [fault("latency", delay=0.4), fault("slow_first_token", delay=0.4), fault("drip", bytes=40, interval=0.01)],
    ids=lambda script: script["kind"],
)
@pytest.mark.parametrize("stream", [False, True], ids=["unstreamed", "stream"])
def test_a_slow_answer_is_no_failure(stack: Stack, script: dict[str, Any], *, stream: bool) -> None:
    stack.script(script)
    answer = stack.ask(prompt(stream=stream))
    assert (answer.status, answer.headers["x-gateway-attempts"]) == (200, "1"), answer
    assert answer.text


def test_a_stream_without_done_gets_one(stack: Stack) -> None:
    stack.script(fault("no_done"))
    answer = stack.ask(prompt(stream=True))
    assert answer.status == 200
    assert answer.events[-1] == "[DONE]"
    assert attempts_at_the_model(stack) == 1


def test_an_overloaded_model_answers_some_and_turns_away_the_others(stack: Stack) -> None:
    """Sixteen callers at once, one place, an answer takes 0.1 s; nobody waits as long as the model asks for."""
    stack.script(fault("overload", capacity=1, status=429, retry_after=int(LONG)))
    with concurrent.futures.ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(lambda _: stack.ask(), range(16)))
    assert {answer.status for answer in answers} == {200, 429}
    turned_away = [answer for answer in answers if answer.status == 429]
    by_the_model = [answer for answer in turned_away if answer.own_error["code"] == "rate_limit_exceeded"]
    assert {answer.headers["retry-after"] for answer in by_the_model} == {LONG}
    others = [answer for answer in turned_away if answer not in by_the_model]
    assert {answer.own_error["code"] for answer in others} <= {"backend_rate_limited"}
    journal = stack.control("GET", "/journal").json["calls"]
    ends = Counter((entry["fault"], entry["ended"]) for entry in journal)
    assert ends == {("overload", "fault"): len(by_the_model), ("overload", "complete"): 16 - len(turned_away)}


def test_a_model_that_crashes_under_a_prompt_is_back_soon(stack: Stack) -> None:
    restarts = stack.inspect("mock-model")["RestartCount"]
    stack.script({**fault("crash"), "times": 1})
    answer = stack.ask()
    if answer.status != 200:  # the further attempts came while the container was away: refused, or into the void
        error = answer.status, answer.own_error["code"], answer.own_error["param"]
        assert error in {(502, "backend_connection_error", None), (504, "backend_timeout", "connect")}
    wait_for(lambda: stack.ask().status == 200, "a prompt is answered again", PATIENCE)
    assert stack.inspect("mock-model")["RestartCount"] == restarts + 1
