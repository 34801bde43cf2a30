import re

from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import ConnectTimeout, GatewayOverloaded, InvalidRequest
from gateway.record import AttemptRecord, Record
from tests.unit.gateway.fakes import error_answer

METRIC = re.compile(r'^(?P<name>[\w-]+)(?:;desc="(?P<desc>[^"\\]*)")?;dur=(?P<dur>\d+\.\d)$')


def record() -> Record:
    return Record("POST", "/v1/chat/completions", trace_id=1, span_id=2, request_id="r", started=10.0, started_ns=0)


def attempt(
    of: Record, started: float, ended: float | None, outcome: str | None, *, backoff: float = 0.0
) -> AttemptRecord:
    each = AttemptRecord(len(of.attempts) + 1, "a-1", 7, started)
    each.ended, each.outcome, each.backoff = ended, outcome, backoff
    of.attempts.append(each)
    return each


def test_without_an_attempt_there_is_the_queue() -> None:
    of = record()
    of.queued = 0.1234

    assert of.server_timing(11.0) == "queue;dur=123.4"


def test_each_attempt_and_each_sleep_is_told_in_order() -> None:
    of = record()
    attempt(of, 10.0, 10.25, "status_503")
    attempt(of, 11.25, 11.35, "connect_timeout", backoff=1.0)
    attempt(of, 11.35, 11.4, "ok")

    assert of.server_timing(12.0).split(", ") == [
        "queue;dur=0.0",
        'attempt-1;desc="a-1 status_503";dur=250.0',
        "backoff-1;dur=1000.0",
        'attempt-2;desc="a-1 connect_timeout";dur=100.0',
        'attempt-3;desc="a-1 ok";dur=50.0',
    ]


def test_an_attempt_under_way_is_streaming_until_now() -> None:
    of = record()
    of.stream = True
    attempt(of, 10.5, None, None)

    assert of.server_timing(11.0).endswith('attempt-1;desc="a-1 streaming";dur=500.0')


@given(
    st.floats(0, 1e5),
    st.lists(
        st.tuples(
            st.floats(0, 600), st.one_of(st.none(), st.floats(0, 600)), st.sampled_from(["ok", "status_500", None])
        ),
        max_size=6,
    ),
)
def test_it_is_always_a_header_of_metrics(
    queued: float, attempts: list[tuple[float, float | None, str | None]]
) -> None:
    of = record()
    of.queued = queued
    for backoff, took, outcome in attempts:
        attempt(of, 10.0, None if took is None else 10.0 + took, outcome, backoff=backoff)
    found = [METRIC.match(part) for part in of.server_timing(700.0).split(", ")]

    assert all(found)
    names = [match["name"] for match in found if match]
    assert len(set(names)) == len(names)
    assert [name for name in names if name.startswith("attempt")] == [f"attempt-{n + 1}" for n in range(len(attempts))]
    assert sum(name.startswith("backoff") for name in names) == sum(backoff > 0 for backoff, _, _ in attempts)


def test_the_backend_is_the_one_that_answered_last_if_only_with_an_error() -> None:
    of, seen = record(), []
    seen.append(of.backend)
    attempt(of, 10, 11, "status_500").status = 500
    seen.append(of.backend)
    attempt(of, 11, 12, "connection_error")
    seen.append(of.backend)

    assert seen == [None, "a-1", None]


def test_a_failure_is_a_word_of_a_bounded_set() -> None:
    of = record()
    of.end_with(InvalidRequest("n is wrong", param="n"))
    assert (of.status, of.outcome, of.error_message, of.shed) == (400, "invalid_request", "n is wrong", None)

    of = record()
    of.end_with(error_answer(500, b"{}", {}))
    assert of.outcome == "backend_error"

    of = record()
    of.end_with(GatewayOverloaded("full", reason="queue_full"))
    assert (of.outcome, of.shed) == ("gateway_overloaded", "queue_full")


def test_a_status_that_went_out_stays() -> None:
    of = record()
    of.status = 200
    of.end_with(ConnectTimeout("late"))

    assert (of.status, of.outcome) == (200, "backend_timeout")
