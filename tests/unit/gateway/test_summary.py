"""The sentence about a request, for what sockets do not do on command."""

import pytest

from gateway.errors import GatewayError
from gateway.explanation import explanation
from gateway.policy.caller import Caller
from gateway.policy.pool import Candidate
from gateway.record import AttemptRecord, Record, Wait
from gateway.summary import NO_MORE, PASSED_OVER, SHED, WAITING, duration, sentence


def record(status: int, outcome: str, *attempts: AttemptRecord, seconds: float = 0.5) -> Record:
    made = Record("POST", "/v1/chat/completions", 1, 2, "mine", 100.0, 0)
    made.status, made.outcome, made.attempts = status, outcome, list(attempts)
    made.caller = Caller("key team-a", "team-a")
    made.ended = made.started + seconds
    return made


def attempt(number: int, outcome: str, message: str | None = None, *, name: str = "primary-1") -> AttemptRecord:
    made = AttemptRecord(number, name, 3, 100.0)
    made.outcome, made.message, made.ended = outcome, message, 100.1
    if outcome.startswith("status_"):
        made.status = int(outcome.removeprefix("status_"))
    return made


def answered(number: int, status: int, name: str = "primary-1") -> AttemptRecord:
    return attempt(number, f"status_{status}", f"The backend answered {status}.", name=name)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0003, "0.3 ms"),
        (0.0123, "12 ms"),
        (0.0994, "99 ms"),
        (0.0996, "0.1 s"),
        (1.0, "1 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (119.4, "119 s"),
        (119.6, "2 min"),
        (754.0, "12 min 34 s"),
    ],
)
def test_seconds_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ("The backend answered 502.", "primary-1 answered 502"),
        ("The backend's answer is not JSON.", "primary-1's answer was not JSON"),
        ("primary-1 did not accept a connection within 1 s.", "primary-1 did not accept a connection within 1 s"),
        ("A kept-alive connection to primary-1 had died.", "a kept-alive connection to primary-1 had died"),
        ("The backend's answer has a content-encoding.", "primary-1's answer had a content-encoding"),
        ("The backend sent an event whose data is not JSON.", "primary-1 sent an event whose data was not JSON"),
        ("The host name of primary-1 could not be resolved.", "the host name of primary-1 could not be resolved"),
        ("The TLS handshake with primary-1 failed: X.", "the TLS handshake with primary-1 failed: X"),
        (
            "The headers of the backend's answer are larger than 64 KiB.",
            "the headers of primary-1's answer were larger than 64 KiB",
        ),
        (None, "primary-1 failed (connection_error)"),
    ],
)
def test_the_message_of_a_failure_becomes_a_clause(message: str | None, told: str) -> None:
    made = record(502, "backend_connection_error", attempt(1, "connection_error", message))
    assert sentence(made, 0.0) == f"Failed with 502 (backend_connection_error) at the first attempt, in 0.5 s: {told}."


def test_the_same_replica_is_named_once_and_many_failures_are_counted() -> None:
    one = [answered(1, 502), answered(2, 502), attempt(3, "invalid_response", "The backend's answer is not JSON.")]
    made = record(502, "backend_invalid_response", *one)
    assert sentence(made, 0.0) == (
        "Failed with 502 (backend_invalid_response) after 3 attempts in 0.5 s: "
        "primary-1 answered 502 twice, then its answer was not JSON."
    )
    many = [answered(number, 500 + number % 2) for number in range(1, 12)]
    text = sentence(record(200, "ok", *many, attempt(12, "ok", name="spare")), 0.0)
    assert text.startswith("Answered by spare at the 12th attempt, in 0.5 s, after primary-1 answered 501, then ")
    assert text.endswith(", then 7 more attempts failed.")
    assert [sentence(record(200, "ok", *many, *many[:number]), 0.0).split()[5] for number in (0, 10, 11)] == [
        "11th",
        "21st",
        "22nd",
    ]


@pytest.mark.parametrize("reason", sorted(NO_MORE))
def test_each_reason_to_give_up_is_told(reason: str) -> None:
    made = record(502, "backend_error", answered(1, 502))
    made.stop_reason = reason
    end = f"primary-1 answered 502, and {NO_MORE[reason]}."
    assert sentence(made, 0.0) == f"Failed with 502 at the first attempt, in 0.5 s: {end}"


@pytest.mark.parametrize("reason", sorted(SHED))
def test_each_shortage_of_our_own_is_told(reason: str) -> None:
    made = record(503, "gateway_overloaded")
    made.shed = reason
    head = "Refused with 503 (gateway_overloaded) after 0.5 s, without an attempt"
    assert sentence(made, 0.0) == f"{head}: {SHED[reason]}."
    made.attempts = [answered(1, 502)]
    assert sentence(made, 0.0) == (
        "Failed with 503 (gateway_overloaded) at the first attempt, in 0.5 s: "
        f"primary-1 answered 502, and then {SHED[reason]}."
    )


@pytest.mark.parametrize("why", sorted(PASSED_OVER))
def test_each_reason_to_pass_somebody_over_is_told_once(why: str) -> None:
    made = record(200, "ok", attempt(1, "ok", name="spare"))
    for _ in range(3):
        made.skip_target("primary", why, 100.0)
    text = sentence(made, 0.0)
    assert text.endswith(f"; primary was passed over because {PASSED_OVER[why][0]}.")
    made.skip_target("secondary", why, 100.0)
    text = sentence(made, 0.0)
    assert text.endswith(f"; primary and secondary were passed over because {PASSED_OVER[why][1]}.")


@pytest.mark.parametrize("kind", sorted(WAITING))
def test_each_wait_is_told_during_and_after_it(kind: str) -> None:
    made = record(502, "backend_error", answered(1, 503))
    made.waits = [Wait(kind, "primary", 100.2, 100.4), Wait(kind, "primary", 100.5, 101.5)]
    assert f"(1.2 s waiting {WAITING[kind].format('primary')})" in sentence(made, 0.0)
    made.ended = made.waits[-1].ended = None
    assert sentence(made, 102.0) == (
        f"Under way for 2 s: it waits {WAITING[kind].format('primary')}; so far primary-1 answered 503."
    )
    made.ended, made.outcome = 102.0, "client_closed_request"
    assert f", while the request waited {WAITING[kind].format('primary')}, after primary-1 answered 503." in sentence(
        made, 0.0
    )


@pytest.mark.parametrize(("outcome", "what"), [("deadline_exceeded", "the deadline passed"),
                                                ("gateway_draining", "the gateway was stopped")])  # fmt: skip
def test_what_a_request_was_doing_when_it_was_ended_is_told(outcome: str, what: str) -> None:
    made = record(503, outcome, answered(1, 502), attempt(2, "cancelled", name="spare"))
    assert sentence(made, 0.0).endswith(f": primary-1 answered 502, and then {what} while spare was being asked.")
    made.first_token = made.attempt.started + 0.01
    assert sentence(made, 0.0).endswith(f" and then {what} while spare was sending its answer.")
    made.attempts.pop()
    made.waits = [Wait("bridging", "primary", 100.2, 100.4)]
    assert sentence(made, 0.0).endswith(f" {what} while the request waited for the end of primary's outage.")
    made.attempts, made.waits, made.queued_at = [], [], 100.0
    assert sentence(made, 0.0).endswith(f", without an attempt: {what} while the request was queued.")


def test_what_was_left_of_a_limit_is_told_also_where_other_instances_could_not_be_asked() -> None:
    made = record(429, "rate_limit_exceeded")
    made.limit = "requests_per_minute"
    left = "this key's requests_per_minute (60) this one may use 15 meanwhile: 0 are left, and this request needs 1."
    made.error_message = f"Other instances cannot be asked now. Of {left}"
    assert sentence(made, 0.0) == (
        "Refused with 429 (rate_limit_exceeded) after 0.5 s: other instances could not be asked, and of team-a's "
        "requests_per_minute (60) this one may use 15 meanwhile: 0 were left, and this request needed 1."
    )


def test_a_guard_is_told_by_whom_it_kept_from_the_draw_and_by_whom_it_took_the_traffic() -> None:
    made = record(200, "ok", attempt(1, "ok", name="old"))
    made.draw_target("old", "demo-model", 9, 100.0, tripped=["new (canary)"])
    made.candidates = (Candidate("old", None, 9, ("old",)), Candidate("new", "canary", 1, ("new",)))
    why = "because the route's guard had taken its traffic"
    assert sentence(made, 0.0).endswith(f"by its weight of 9; new (canary) was passed over {why}.")
    assert explanation(made, 0.0)["targets"][1]["why_not"] == "guard"
    made.attempts = [answered(1, 502, "old"), attempt(2, "ok", name="new")]
    assert sentence(made, 0.0).endswith(f"; new (canary) was passed over at first {why}.")
    made.events.clear()
    made.note_guard("new", 100.0)
    assert sentence(made, 0.0).endswith("; the route's guard took the traffic of new with this request.")


def test_an_answer_that_is_not_the_latest_ones_is_told() -> None:
    made = record(503, "backend_error", answered(1, 503), answered(2, 404, "primary-2"))
    made.failed_by = made.attempts[0]
    assert sentence(made, 0.0) == (
        "Failed with 503 after 2 attempts in 0.5 s, with the answer of primary-1: "
        "primary-1 answered 503, then primary-2 answered 404."
    )


def test_a_defect_of_our_own_is_told_without_its_words() -> None:
    made = record(500, "internal_error", attempt(1, "internal_error", "secret"))
    made.error_message = "secret"
    assert "the gateway failed by a defect of its own" in sentence(made, 0.0)


def test_every_error_that_a_caller_can_get_has_a_sentence() -> None:
    kinds = [GatewayError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for code in {kind.code for kind in kinds}:
        for attempts in ([], [answered(1, 502)], [answered(1, 502), attempt(2, "cancelled")]):
            for status in (200, 503):
                made = record(status, code, *attempts)
                made.error_message, made.limit = "It happened.", "requests_per_minute"
                text = sentence(made, 0.0)
                assert text[0].isupper()
                assert text.endswith(".")
                assert not any(odd in text for odd in ("None", "  ", "..", ": .", ": and", ", and .")), text
