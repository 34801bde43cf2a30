"""The table of what follows a failure, row by row: where the next attempt goes, when, and at whose cost."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import (
    AnswerTooLarge,
    AuthRefused,
    BackendError,
    BackendUnavailable,
    ConnectionFailed,
    ConnectTimeout,
    InvalidResponse,
    RateLimited,
    Silent,
    StaleConnection,
    Stalled,
    Unreachable,
    WrongForm,
)
from gateway.policy.replica import Replica
from tests.unit.gateway.fakes import error_answer, trip
from tests.unit.gateway.scripted import Outcome, forward

INITIAL, MOST = 0.1, 2.0
OK: list[Outcome] = [None]
NOW = 0.001
"""Virtual seconds: at once."""


def answered(status: int, body: bytes = b"{}", headers: Mapping[str, str] | None = None) -> BackendError:
    return error_answer(status, body, headers or {})


def busy(seconds: float, status: int = 503) -> BackendError:
    return answered(status, headers={"retry-after": str(seconds)})


NO_MODEL = b'{"error": {"message": "no", "code": "model_not_found"}}'


def silent(timer: str = "answer") -> Silent:
    return Silent("late", timer=timer)


def spent(*names: str) -> Callable[[dict[str, Replica]], None]:
    """Prepare: the retry budget of these replicas is spent."""

    def prepare(replicas: dict[str, Replica]) -> None:
        for name in names:
            while replicas[name].budget.take():
                pass

    return prepare


CONNECTION = [ConnectionFailed("reset"), Unreachable("refused"), ConnectTimeout("late")]
BACKED_OFF = [
    *(answered(status) for status in (408, 500, 502, 504, 503, 529)),
    answered(503, headers={"retry-after": "soon"}),
    InvalidResponse("cut"),
]
LEFT_ALONE = [answered(429), answered(429, headers={"retry-after": "-1"}), busy(1)]
REPEATS_BY_NATURE = [silent(), silent("first_token"), Stalled("idle"), WrongForm("a stream")]
REFUSED_BY_NATURE = [answered(401), answered(403), answered(404, NO_MODEL)]


def name_of(failure: object) -> str:
    return getattr(failure, "outcome", str(failure))


@pytest.mark.parametrize("failure", CONNECTION, ids=name_of)
def test_a_connection_failure_goes_to_another_replica_at_once_and_free(failure: BackendError) -> None:
    for first, other in (("a-1", "a-2"), ("a-2", "a-1")):
        told = forward({first: [failure], other: OK}, first=first)
        assert told.error is None
        assert told.calls == [first, other]
        assert told.at[1] < NOW
        assert told.replicas[other].budget.left() == 10
        assert told.replicas[first].budget.left() == 10


@pytest.mark.parametrize("failure", CONNECTION, ids=name_of)
def test_the_healthy_replica_takes_over_even_with_its_budget_spent(failure: BackendError) -> None:
    told = forward({"a-1": [failure], "a-2": [failure]}, prepare=spent("a-1", "a-2"))

    assert sorted(told.calls) == ["a-1", "a-2"]
    assert told.record.stop_reason == "budget"


@pytest.mark.parametrize("failure", CONNECTION, ids=name_of)
def test_a_connection_failure_of_the_only_replica_is_repeated_after_a_sleep_from_its_budget(
    failure: BackendError,
) -> None:
    told = forward({"a-1": [failure, failure, None]}, gateway_backoff_initial=5, gateway_backoff_max=5)

    assert told.error is None
    assert told.calls == ["a-1"] * 3
    assert told.replicas["a-1"].budget.left() == 8
    assert [attempt.backoff > 0 for attempt in told.record.attempts] == [False, True, True]


def test_when_every_replica_refused_the_next_attempt_sleeps_and_leaves_out_the_last() -> None:
    told = forward({"a-1": [Unreachable("no")], "a-2": [Unreachable("no")]})

    assert len(told.calls) == 3
    assert told.calls[0] == told.calls[2] != told.calls[1]
    assert told.at[1] < NOW
    assert [attempt.backoff > 0 for attempt in told.record.attempts] == [False, False, True]
    assert told.record.stop_reason == "attempts"


def test_a_dead_kept_alive_connection_is_repeated_once_at_once_on_a_fresh_one_at_no_cost() -> None:
    told = forward({"a-1": [StaleConnection("dead"), None]}, gateway_max_attempts=1)

    assert told.error is None
    assert told.calls == ["a-1", "a-1"]
    assert told.fresh == [False, True]
    assert told.at[1] < NOW
    assert told.decisions == ["resend", "answered"]
    assert told.replicas["a-1"].budget.left() == 10
    assert told.replicas["a-1"].breaker.consecutive_failures == 0


def test_a_dead_kept_alive_connection_is_repeated_with_budget_0_too() -> None:
    told = forward({"a-1": [StaleConnection("dead"), None]}, gateway_retry_budget=0)

    assert told.error is None
    assert told.fresh == [False, True]


def test_a_failure_on_the_fresh_connection_is_that_of_the_attempt() -> None:
    told = forward({"a-1": [StaleConnection("dead"), ConnectionFailed("reset"), None]}, gateway_max_attempts=2)

    assert told.error is None
    assert told.fresh == [False, True, False]
    assert told.decisions == ["resend", "retry", "answered"]
    assert told.replicas["a-1"].budget.left() == 9


@pytest.mark.parametrize("status", [429, 503, 529])
def test_with_retry_after_another_replica_is_asked_at_once_from_its_budget(status: int) -> None:
    told = forward({"a-1": [busy(5, status), None], "a-2": [busy(5, status), None]}, gateway_max_attempts=2)

    assert len(told.calls) == 2
    assert told.calls[0] != told.calls[1]
    assert told.at[1] < NOW
    assert told.replicas[told.calls[1]].budget.left() == 9


@pytest.mark.parametrize("status", [429, 503, 529])
@pytest.mark.parametrize("wait", [0.0, 0.25, 3.0, 10.0])
def test_without_another_replica_retry_after_is_waited_for_and_never_less(status: int, wait: float) -> None:
    told = forward({"a-1": [busy(wait, status), None]})

    assert told.error is None
    assert told.calls == ["a-1", "a-1"]
    assert wait <= told.at[1] < wait + NOW


def test_retry_after_in_milliseconds_is_waited_for() -> None:
    told = forward({"a-1": [answered(429, headers={"retry-after-ms": "1500"}), None]})

    assert 1.5 <= told.at[1] < 1.5 + NOW


def test_a_retry_after_above_the_maximum_is_not_waited_for() -> None:
    told = forward({"a-1": [busy(10.5)]})

    assert isinstance(told.error, RateLimited)
    assert told.calls == ["a-1"]
    assert told.record.stop_reason == "cooldown"
    assert told.record.attempt.decision == "gave up: cooldown"


def test_a_retry_after_above_the_maximum_goes_to_the_next_target_at_once() -> None:
    told = forward({"a-1": [busy(10.5)], "b-1": OK})

    assert told.error is None
    assert told.calls == ["a-1", "b-1"]
    assert told.at[1] < NOW
    assert told.decisions == ["fallback", "answered"]


def test_a_retry_after_that_does_not_fit_the_deadline_is_not_waited_for() -> None:
    told = forward({"a-1": [busy(5)]}, deadline=5.9)

    assert isinstance(told.error, RateLimited)
    assert told.calls == ["a-1"]
    assert told.record.stop_reason == "cooldown"


def test_a_retry_after_that_does_not_fit_the_deadline_goes_to_the_next_target_at_once() -> None:
    told = forward({"a-1": [busy(5)], "b-1": OK}, deadline=5.9)

    assert told.calls == ["a-1", "b-1"]
    assert told.at[1] < NOW


def test_a_replica_that_asked_for_a_pause_gets_it_whatever_another_one_asked_for() -> None:
    script: dict[str, list[Outcome]] = {"a-1": [busy(5), busy(1), None], "a-2": [busy(5), busy(1), None]}
    script["a-2"] = [busy(1), None]
    for seed in range(10):
        told = forward(script, first="a-1", seed=seed, gateway_max_attempts=4)
        assert told.error is None
        assert told.calls == ["a-1", "a-2", "a-2"]
        assert 1 <= told.at[2] < 1 + NOW

        told = forward(script, first="a-2", seed=seed, gateway_max_attempts=4)
        assert told.error is None
        assert told.calls == ["a-2", "a-1", "a-2"]
        assert 1 <= told.at[2] < 1 + NOW


def test_a_pause_asked_for_holds_while_another_replica_backs_off() -> None:
    for seed in range(10):
        told = forward({"a-1": [busy(9), None], "a-2": [answered(500), answered(500), None]}, first="a-1", seed=seed)
        assert told.calls == ["a-1", "a-2", "a-2"]


@pytest.mark.parametrize("failure", BACKED_OFF, ids=name_of)
def test_the_rest_is_repeated_after_a_sleep_from_the_budget(failure: BackendError) -> None:
    sleeps = []
    for seed in range(20):
        told = forward(
            {"a-1": [failure, failure, None]}, seed=seed, gateway_backoff_initial=INITIAL, gateway_backoff_max=MOST
        )
        assert told.error is None
        assert told.calls == ["a-1"] * 3
        assert told.replicas["a-1"].budget.left() == 8
        assert told.at[1] <= INITIAL + NOW
        assert told.at[2] - told.at[1] <= 2 * INITIAL + NOW
        sleeps.append(told.at[1])

    assert len(set(sleeps)) > 10  # full jitter


@pytest.mark.parametrize("failure", BACKED_OFF, ids=name_of)
def test_after_the_sleep_another_replica_is_preferred(failure: BackendError) -> None:
    for seed in range(5):
        told = forward({"a-1": [failure], "a-2": [failure], "a-3": [failure]}, seed=seed)
        assert sorted(told.calls) == ["a-1", "a-2", "a-3"]
        assert all(attempt.backoff > 0 for attempt in told.record.attempts[1:])


def test_the_sleep_never_exceeds_its_maximum() -> None:
    told = forward(
        {"a-1": [answered(500)]},
        gateway_max_attempts=10,
        gateway_backoff_initial=1,
        gateway_backoff_max=1.5,
        gateway_breaker_failures=100,
    )

    assert len(told.calls) == 10
    assert all(attempt.backoff <= 1.5 + NOW for attempt in told.record.attempts)


@pytest.mark.parametrize("timer", ["answer", "first_token"])
def test_a_silent_replica_is_never_asked_again(timer: str) -> None:
    told = forward({"a-1": [silent(timer)]}, gateway_max_attempts=9)

    assert told.error is not None
    assert told.error.param == timer
    assert told.calls == ["a-1"]
    assert told.record.stop_reason == "no other replica"


def test_after_a_silent_one_every_other_replica_is_asked_at_once_each_once() -> None:
    told = forward({"a-1": [silent()], "a-2": [silent()], "a-3": [silent()]}, gateway_max_attempts=9)

    assert sorted(told.calls) == ["a-1", "a-2", "a-3"]
    assert told.at[-1] < NOW
    assert [replica.budget.left() for replica in told.replicas.values()].count(9) == 2


def test_after_a_silent_one_the_next_target_is_asked_at_once() -> None:
    told = forward({"a-1": [silent()], "b-1": OK})

    assert told.calls == ["a-1", "b-1"]
    assert told.at[1] < NOW


def test_a_replica_that_only_failed_before_is_another_one_for_a_silent_one() -> None:
    script: dict[str, list[Outcome]] = {"a-1": [answered(500), None], "a-2": [silent()]}
    told = forward(script, first="a-1")
    assert told.error is None
    assert told.calls == ["a-1", "a-2", "a-1"]
    assert told.at[2] - told.at[1] < NOW

    told = forward(script, first="a-2")
    assert told.error is None
    assert told.calls == ["a-2", "a-1", "a-1"]


def test_a_silent_one_does_not_come_back_after_a_sleep() -> None:
    for first in ("a-1", "a-2"):
        told = forward(
            {"a-1": [silent()], "a-2": [answered(500)]},
            first=first,
            gateway_max_attempts=6,
            gateway_breaker_failures=9,
        )
        assert told.calls.count("a-1") == 1


def test_the_attempt_after_a_silent_one_comes_from_the_budget() -> None:
    told = forward({"a-1": [silent()], "a-2": [silent()]}, prepare=spent("a-1", "a-2"))

    assert len(told.calls) == 1
    assert told.record.stop_reason == "budget"


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_goes_to_every_other_replica_and_then_to_the_next_target_at_once(status: int) -> None:
    told = forward({"a-1": [answered(status)], "a-2": [answered(status)], "b-1": OK})

    assert told.error is None
    assert sorted(told.calls[:2]) == ["a-1", "a-2"]
    assert told.calls[2:] == ["b-1"]
    assert told.at[2] < NOW


def test_a_refused_key_without_a_next_target_is_final() -> None:
    told = forward({"a-1": [answered(401)], "a-2": [answered(403)]}, gateway_max_attempts=5)

    assert isinstance(told.error, AuthRefused)
    assert len(told.calls) == 2
    assert told.record.stop_reason == "no other replica"


@pytest.mark.parametrize("failure", REFUSED_BY_NATURE, ids=name_of)
def test_what_repeats_by_nature_is_asked_of_another_replica_at_once_and_never_of_the_same(
    failure: BackendError,
) -> None:
    told = forward({"a-1": [failure], "a-2": OK}, first="a-1")
    assert told.error is None
    assert told.calls == ["a-1", "a-2"]
    assert told.at[1] < NOW

    alone = forward({"a-1": [failure]}, gateway_max_attempts=5)
    assert alone.calls == ["a-1"]


@pytest.mark.parametrize("failure", REPEATS_BY_NATURE, ids=name_of)
def test_what_took_its_time_or_has_the_wrong_form_is_not_asked_of_the_same_replica_again(failure: BackendError) -> None:
    told = forward({"a-1": [failure], "a-2": OK}, first="a-1")
    assert told.calls == ["a-1", "a-2"]
    assert told.at[1] < NOW

    alone = forward({"a-1": [failure]}, gateway_max_attempts=5)
    assert alone.calls == ["a-1"]


@pytest.mark.parametrize("failure", LEFT_ALONE, ids=name_of)
def test_who_asked_to_be_left_alone_is_waited_for_where_nobody_else_can_answer(failure: BackendError) -> None:
    told = forward({"a-1": [failure, None]})

    assert told.error is None
    assert 1 <= told.at[1] < 1 + NOW
    assert told.decisions == ["waited: cooldown", "answered"]
    assert told.replicas["a-1"].budget.left() == 9


def test_cooldowns_without_a_retry_after_grow_and_end_with_the_answer_of_the_backend() -> None:
    told = forward({"a-1": [answered(429)]}, gateway_max_attempts=9)

    assert isinstance(told.error, RateLimited)
    assert [round(at, 2) for at in told.at] == [0, 1, 3, 7]  # the next one, of 8 s, is more than 10 s in all


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 501, 505])
def test_any_other_error_of_the_request_is_one_attempt_and_passed_on(status: int) -> None:
    told = forward(
        {"a-1": [answered(status, b'{"error": {"message": "no", "code": "c"}}')], "a-2": OK, "b-1": OK},
        prepare=lambda replicas: trip(replicas["a-2"]),
    )

    assert told.calls == ["a-1"]
    assert told.error is not None
    assert told.replicas["a-1"].breaker.consecutive_failures == 0


@pytest.mark.parametrize(
    "failure",
    [
        answered(429, b'{"error": {"code": "insufficient_quota"}}'),
        answered(400, b'{"error": {"code": "context_length_exceeded"}}'),
        answered(402),
        AnswerTooLarge("large"),
    ],
    ids=name_of,
)
def test_what_another_target_may_do_is_one_attempt_there(failure: BackendError) -> None:
    told = forward({"a-1": [failure], "a-2": [failure], "b-1": OK})
    assert told.error is None
    assert len(told.calls) == 2
    assert told.calls[1] == "b-1"

    alone = forward({"a-1": [failure], "a-2": [failure]})
    assert alone.error is failure
    assert len(alone.calls) == 1


def test_attempts_are_counted_per_target() -> None:
    told = forward({"a-1": [answered(500)], "b-1": [answered(502)]}, gateway_max_attempts=2)

    assert told.calls == ["a-1", "a-1", "b-1", "b-1"]
    assert told.decisions == ["retry", "fallback", "retry", "gave up: attempts"]
    assert isinstance(told.error, BackendError)
    assert told.error.outcome == "status_502"  # the last attempt's


@pytest.mark.parametrize("failure", [*CONNECTION, *BACKED_OFF, silent(), busy(0)], ids=name_of)
def test_with_budget_0_nothing_is_retried_and_fallback_still_works(failure: BackendError) -> None:
    alone = forward({"a-1": [failure], "a-2": [failure]}, gateway_retry_budget=0)
    assert len(alone.calls) == 1
    assert alone.record.stop_reason == "budget"

    told = forward({"a-1": [failure], "a-2": [failure], "b-1": OK}, gateway_retry_budget=0)
    assert told.error is None
    assert len(told.calls) == 2
    assert told.calls[1] == "b-1"


def test_a_fallback_costs_nothing() -> None:
    told = forward({"a-1": [answered(500)], "b-1": OK}, gateway_max_attempts=1)

    assert told.replicas["b-1"].budget.left() == 10
    assert told.error is None


def test_a_spent_budget_goes_to_the_next_target_without_a_sleep() -> None:
    told = forward({"a-1": [answered(500)], "b-1": OK}, prepare=spent("a-1"))

    assert told.calls == ["a-1", "b-1"]
    assert told.at[1] < NOW
    assert told.decisions == ["fallback", "answered"]


def test_a_replica_whose_budget_is_spent_does_not_keep_the_retry_from_one_that_has_some() -> None:
    script: dict[str, list[Outcome]] = {"a-1": [answered(500), None], "a-2": [answered(500), None]}
    for first, calls in (("a-1", ["a-1", "a-1"]), ("a-2", ["a-2", "a-1", "a-1"])):
        told = forward(script, first=first, prepare=spent("a-2"))
        assert told.error is None
        assert told.calls == calls


def test_with_three_replicas_the_one_with_a_budget_is_found() -> None:
    for seed in range(20):
        told = forward(
            {name: [busy(50), None] for name in ("a-1", "a-2", "a-3")},
            seed=seed,
            prepare=spent("a-1", "a-2"),
            gateway_max_attempts=2,
        )
        assert told.calls[-1] == "a-3"


def test_a_further_attempt_with_less_left_than_the_connect_timeout_is_not_started() -> None:
    for failure in (Unreachable("no"), silent()):
        told = forward({"a-1": [failure], "a-2": [failure], "b-1": OK}, deadline=0.9, gateway_connect_timeout=1)
        assert len(told.calls) == 1
        assert told.error is failure
        assert told.record.stop_reason == "deadline"


def test_the_first_attempt_is_always_started() -> None:
    told = forward({"a-1": OK}, deadline=0.001, gateway_connect_timeout=1)

    assert told.error is None


def test_a_sleep_that_leaves_less_than_the_connect_timeout_is_not_slept() -> None:
    told = forward({"a-1": [busy(2)]}, deadline=2.9)

    assert told.record.stop_reason == "cooldown"
    fits = forward({"a-1": [busy(2), None]}, deadline=3.1)
    assert fits.error is None


def test_the_read_timeout_of_the_sdk_bounds_the_retries_as_well() -> None:
    told = forward({"a-1": [busy(2)]}, deadline=600, read_timeout=3)

    assert told.calls == ["a-1"]
    assert told.record.stop_reason == "cooldown"


def test_an_open_breaker_ends_the_retries() -> None:
    told = forward({"a-1": [answered(500)]}, gateway_breaker_failures=1, gateway_max_attempts=5)

    assert told.calls == ["a-1"]
    assert told.record.stop_reason == "breaker"


def test_a_request_counts_once_for_a_breaker() -> None:
    told = forward({"a-1": [answered(503)]}, gateway_breaker_failures=2, gateway_max_attempts=5)

    assert told.calls == ["a-1"] * 5
    assert told.replicas["a-1"].breaker.consecutive_failures == 1


def test_an_open_breaker_sends_the_request_to_the_next_target() -> None:
    told = forward({"a-1": OK, "b-1": OK}, prepare=lambda replicas: trip(replicas["a-1"]))

    assert told.calls == ["b-1"]


def test_when_every_breaker_is_open_nobody_is_touched() -> None:
    def both(replicas: dict[str, Replica]) -> None:
        trip(replicas["a-1"])
        trip(replicas["b-1"])

    told = forward({"a-1": OK, "b-1": OK}, prepare=both, gateway_breaker_open_seconds=7)

    assert told.calls == []
    assert isinstance(told.error, BackendUnavailable)
    assert told.error.retry_after == pytest.approx(7)


FAILURES: "st.SearchStrategy[Outcome]" = st.sampled_from(
    [
        None,
        Unreachable("no"),
        ConnectionFailed("reset"),
        ConnectTimeout("late"),
        StaleConnection("dead"),
        answered(500),
        answered(429),
        busy(0.0),
        busy(0.4),
        busy(3.0, 429),
        busy(50.0),
        answered(401),
        answered(404),
        answered(402),
        InvalidResponse("cut"),
        Stalled("idle"),
        silent(),
    ]
)


@given(
    st.dictionaries(
        st.sampled_from(["a-1", "a-2", "a-3", "b-1", "b-2"]),
        st.lists(FAILURES, min_size=1, max_size=5),
        min_size=5,
        max_size=5,
    ),
    st.fixed_dictionaries(
        {
            "gateway_max_attempts": st.integers(1, 5),
            "gateway_retry_budget": st.sampled_from([0.0, 0.2]),
            "gateway_retry_floor": st.sampled_from([0, 1, 10]),
            "gateway_breaker_failures": st.integers(1, 6),
        }
    ),
    st.sampled_from([2.0, 8.0, 600.0]),
)
def test_whatever_fails_the_promises_hold(
    script: dict[str, list[Outcome]], settings: dict[str, Any], deadline: float
) -> None:
    told = forward(dict(sorted(script.items())), deadline=deadline, **settings)

    sent = [attempt for attempt in told.record.attempts if not attempt.resend]
    targets = [attempt.backend[0] for attempt in sent]
    if not told.record.waits:
        assert targets == sorted(targets)  # never back to an earlier target
        for name in ("a", "b"):
            assert targets.count(name) <= (settings["gateway_max_attempts"] if settings["gateway_retry_budget"] else 1)
    waited = len([attempt for attempt in told.record.attempts if str(attempt.decision).startswith("waited")])
    assert waited <= settings["gateway_max_attempts"] - 1
    assert told.at == sorted(told.at)
    assert told.at[-1] <= deadline
    for number, attempt in enumerate(told.record.attempts):
        for later in told.record.attempts[number + 1 :]:
            if later.backend != attempt.backend or later.resend:
                continue
            assert attempt.outcome not in {"answer_timeout", "idle_timeout", "auth_error"}
            if attempt.outcome in {"status_429", "status_503"} and attempt.retry_after is not None:
                assert later.started >= attempt.started + attempt.retry_after
        if number and not attempt.resend:
            assert attempt.deadline_left >= 1
    last = told.record.attempt
    assert (told.error is None) == (last.outcome == "ok")
    assert last.decision == "answered" if told.error is None else str(last.decision).startswith("gave up: ")
