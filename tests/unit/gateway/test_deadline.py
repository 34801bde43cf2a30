import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.headers import seconds
from gateway.policy.deadline import READ_TIMEOUT_MARGIN_MAX, Deadline
from tests.unit.gateway.fakes import Clock


def test_the_deadline_counts_from_the_headers_of_the_request() -> None:
    clock = Clock(50.0)
    deadline = Deadline(clock, 40.0, 30.0)

    assert deadline.end == 70
    assert deadline.left() == 20
    clock.forward(25)
    assert deadline.left() == 0


def test_without_a_read_timeout_the_commit_is_due_at_the_deadline() -> None:
    deadline = Deadline(Clock(0.0), 0.0, 30.0)

    assert deadline.left_to_commit() == deadline.left() == 30


def test_a_read_timeout_caps_the_time_to_commit_and_not_the_total() -> None:
    deadline = Deadline(Clock(0.0), 0.0, 600.0, read_timeout=10.0)

    assert deadline.left() == 600
    assert 10 - READ_TIMEOUT_MARGIN_MAX <= deadline.left_to_commit() < 10


@given(st.floats(0, 1e6), st.floats(0.001, 1e4), st.one_of(st.none(), st.floats(0.001, 1e4)), st.floats(0, 2e4))
def test_the_commit_is_never_due_after_the_end_and_nothing_is_ever_negative(
    start: float, total: float, read_timeout: float | None, passed: float
) -> None:
    clock = Clock(start)
    deadline = Deadline(clock, start, total, read_timeout)
    clock.forward(passed)

    assert deadline.commit_by <= deadline.end
    assert 0 <= deadline.left_to_commit() <= deadline.left()
    if read_timeout is not None:
        assert start < deadline.commit_by <= start + read_timeout


@pytest.mark.parametrize(("text", "value"), [("1", 1.0), ("0.25", 0.25), (" 2 ", 2.0), ("1e1", 10.0), ("+3", 3.0)])
def test_seconds_are_positive_finite_numbers(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        " ",
        "0",
        "-0",
        "-1",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "1s",
        "0x10",
        "1,5",
        "1_0",
        "\u0661",
        "1 2",
        "none",
    ],
)
def test_anything_else_is_no_seconds(text: str | None) -> None:
    assert seconds(text) is None


@given(st.text(max_size=12))
def test_no_text_makes_seconds_fail(text: str) -> None:
    value = seconds(text)
    assert value is None or 0 < value < math.inf
