"""What a game day measures over a span."""

import pytest

from chaos.measures import MEASURES, Findings, Sample, measured
from testkit.load import Call, Try


def call(
    *, sent: float, took: float, outcome: str = "ok", status: int | None = 200, flaw: str | None = None, name: str = "c"
) -> Call:
    return Call(
        id=name,
        kind="answer",
        started=sent,
        ended=sent + took,
        deadline=3,
        outcome=outcome,
        status=status,
        flaw=flaw,
    )


def findings() -> Findings:
    calls = [
        call(sent=99.5, took=0.1),
        call(sent=100, took=0.1),
        call(sent=101, took=0.2, outcome="backend_timeout"),
        call(sent=102.5, took=0.25),
        call(sent=104, took=0.01, outcome="reset", status=None, flaw="reset"),
        call(sent=105, took=0.01, outcome="broken", flaw="half an answer"),
    ]
    samples = [
        Sample(0.5, {"backend-1": "closed"}, 0, 0),
        Sample(1.5, {"backend-1": "open"}, 3, 2, retry_in=0.25),
        Sample(2.5, {"backend-1": "closed"}, 4, 4),
    ]
    return Findings(100.0, calls, samples)


@pytest.mark.parametrize(
    ("measure", "since", "until", "value"),
    [
        ("share_good", 0, 4, 2 / 3),
        ("failures", 0, 4, 1),
        ("failures", 2, 4, 0),
        ("ill_formed", 0, 9, 2),
        ("cut_short", 0, 9, 1),
        ("hung", 0, 9, 0),
        ("error_events", 0, 9, 0),
        ("seconds_over_deadline", 0, 9, 0),
        ("p99_seconds", 0, 9, 0.25),
        ("recovery_seconds", 1, 9, 1.75),
        ("recovery_seconds_past_open", 1, 9, 1.0),
        ("recovery_seconds_past_open", 2, 9, 0.75),
        ("attempts_per_request", 0, 2, 1.5),
        ("attempts_per_request", 1, 2, 1.5),
        ("attempts_per_request", 1.6, 9, 0.5),
        ("attempts_per_request", 2.6, 9, None),
    ],
)
def test_measures_look_at_their_span(measure: str, since: float, until: float, value: float | None) -> None:
    assert MEASURES[measure](findings(), since, until) == (None if value is None else pytest.approx(value))


NEW = {"new": "http://b"}


@pytest.mark.parametrize(
    ("tripped", "metric", "arrivals", "since", "until", "guards", "after"),
    [
        ({}, 0, {}, 0, 9, 0, None),
        (NEW, 1, {"http://b": ["1", "2.9", "3.5", "8", "9"], "http://a": ["4"]}, 0, 9, 1, 2),
        (NEW, 1, {"http://b": ["1", "2.9"]}, 0, 9, 1, 0),  # late ones of calls that were sent before it was seen
        (NEW, 1, {"http://b": ["8"]}, 0, 3.2, 1, None),  # nothing was sent afterwards
        (NEW, 0, {"http://b": []}, 0, 9, 0, 0),  # the metric does not say so
        ({}, 1, {"http://b": []}, 0, 9, 0, None),  # `/health` does not
        (NEW, 1, {"http://a": []}, 0, 9, 1, None),  # without its journal
        (NEW, 1, {"http://b": []}, 0, 3, 0, None),  # before
    ],
)
def test_what_a_guard_has_done_is_measured(  # noqa: PLR0917
    tripped: dict[str, str],
    metric: int,
    arrivals: dict[str, list[str]],
    since: float,
    until: float,
    guards: float,
    after: float | None,
) -> None:
    samples = [Sample(1.0, {}, 0, 0), *(Sample(at, {}, 0, 0, 0.0, tripped, metric) for at in (3.0, 4.0))]
    calls = [call(sent=100 + float(number), took=0.1, name=number) for number in ("1", "2.9", "4", "3.5", "8", "9")]
    found = Findings(100.0, calls, samples, arrivals=arrivals)

    assert MEASURES["guards_tripped"](found, since, until) == guards
    assert MEASURES["arrivals_after_trip"](found, since, until) == after


@pytest.mark.parametrize("measure", MEASURES)
def test_nothing_is_measured_where_nothing_was_sent(measure: str) -> None:
    assert measured(measure, findings(), 6, 9) == (None, "not measured")
    assert measured(measure, Findings(0.0), 0, 9) == (None, "not measured")


@pytest.mark.parametrize(
    ("revivals", "since", "recovery", "past_open"),
    [
        ([], 1, 1.75, 1.0),
        ([2.0], 1, 0.75, 0.75),  # a start of a second does not count; the open time ended before it
        ([1.5], 1, 1.25, 1.0),
        ([2.7], 1, 0.05, 0.05),
        ([2.9], 1, 0.0, 0.0),  # another replica answered meanwhile
        ([0.5], 1, 1.75, 1.0),  # before it
        ([9.5], 1, 1.75, 1.0),  # after its end
        ([2.0, 1.5], 1, 1.25, 1.0),
    ],
)
def test_recovery_counts_from_the_moment_a_started_backend_answers_its_own_probe(
    revivals: list[float], since: float, recovery: float, past_open: float
) -> None:
    found = findings()
    found.revivals = revivals

    assert MEASURES["recovery_seconds"](found, since, 9) == pytest.approx(recovery)
    assert MEASURES["recovery_seconds_past_open"](found, since, 9) == pytest.approx(past_open)


def test_who_waited_for_the_end_of_an_outage_is_released_within() -> None:
    """Sent before the first good answer after the outage, and ended with it or later."""
    calls = [
        call(sent=100, took=0.1),
        call(sent=101, took=1.5),
        call(sent=101.2, took=1.8),
        call(sent=101.4, took=0.2, outcome="backend_unavailable"),
        call(sent=103, took=0.1),
    ]
    found = Findings(100.0, calls)

    assert MEASURES["release_seconds"](found, 2, 9) == pytest.approx(0.5)
    assert measured("release_seconds", found, 2, 9)[1] == "0.5 s for 2"
    assert measured("release_seconds", found, 4, 9) == (None, "not measured")
    found.stalled = lambda start, end: 0.2 if (start, end) == pytest.approx((2.5, 3.0)) else 9
    assert MEASURES["release_seconds"](found, 2, 9) == pytest.approx(0.3)
    assert measured("release_seconds", found, 2, 9)[1].endswith(
        " for 2 (not counted: 0.2 s in which the machine stood still)"
    )


def test_a_stream_that_had_begun_is_not_unanswered() -> None:
    begun = call(sent=100, took=0.1, outcome="backend_invalid_response")
    begun.first = 100.05
    refused = call(sent=100, took=0.1, outcome="backend_unavailable", status=503)
    refused.tries = [Try(backend="b", outcome="status_503"), Try(backend="b", outcome="connection_error")]
    answered = call(sent=100, took=0.1)
    answered.tries = [Try(backend="b", outcome="ok")]
    found = Findings(100.0, [begun, refused, answered])

    assert measured("unanswered", found, 0, 9) == (1, "1 of 3")
    assert measured("failed_attempts", found, 0, 9) == (2, "2 of 3, for 3 calls")


def test_counters_that_began_anew_are_not_measured() -> None:
    restarted = Findings(0.0, samples=[Sample(0, {}, 9, 9), Sample(1, {}, 1, 1)])

    assert MEASURES["attempts_per_request"](restarted, 0, 9) is None


def test_what_was_measured_reads_well() -> None:
    assert measured("seconds_over_deadline", findings(), 0, 9) == (0.0, "0 s (the longest took 0.25 s)")
    assert measured("failures", findings(), 0, 4) == (1, "1 of 3")
    assert measured("p99_seconds", findings(), 0, 9)[1] == "0.25 s"
