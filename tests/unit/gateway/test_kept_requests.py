"""The last requests: which of them stay, and what they take."""

import gc
import tracemalloc
from collections.abc import Callable
from random import Random, randrange

import pytest

from gateway.kept_requests import BYTES_EACH, ORDINARY, KeptRequests, size_of
from gateway.policy.caller import NOBODY, Caller
from gateway.policy.pool import Candidate
from gateway.record import AttemptRecord, Record, Wait

KNOWN = Caller("key team-a", "team-a")
WIDE = "\N{GRINNING FACE}"
"""Four bytes in memory."""


def record(number: int = 0, *, outcome: str = "ok", attempts: int = 1, seconds: float = 0.5) -> Record:
    made = Record("POST", "/v1/chat/completions", number + 1, 2, f"request-{number}", 100.0 + number, 0)
    made.caller = KNOWN
    made.outcome, made.status = outcome, 200 if outcome == "ok" else 502
    made.attempts = [AttemptRecord(one + 1, "backend-1", 3, 100.0) for one in range(attempts)]
    made.ended = made.started + seconds
    return made


def numbers(kept: KeptRequests) -> list[int]:
    return [each.record.trace_id - 1 for each in kept.newest()]


def test_the_newest_come_first_and_the_oldest_goes() -> None:
    kept = KeptRequests(10)
    for number in range(25):
        kept.add(record(number))
    assert numbers(kept) == list(range(24, 14, -1))
    third = list(kept.newest())[2]
    assert [each.record.trace_id - 1 for each in kept.newest(before=third.number)][:2] == [21, 20]
    assert len(kept) == 10


def test_none_are_kept_where_none_shall_be() -> None:
    kept = KeptRequests(0)
    kept.add(record())
    assert (len(kept), numbers(kept), kept.find("request-0")) == (0, [], [])


@pytest.mark.parametrize(
    "made",
    [
        record(outcome="backend_timeout"),
        record(outcome="backend_error"),
        record(outcome="gateway_overloaded", attempts=0),
        record(attempts=2),
        record(seconds=11),
    ],
    ids=["failed", "error passed on", "refused by us", "retried", "slow"],
)
def test_what_failed_was_retried_or_slow_stays_longest(made: Record) -> None:
    kept = KeptRequests(10, slow=10)
    kept.add(made)
    for number in range(1000):
        kept.add(record(number))
    assert len(kept) == 10
    assert list(kept.newest())[-1].record is made


@pytest.mark.parametrize("outcome", ["ok", "client_closed_request", "invalid_json", "rate_limit_exceeded"])
def test_what_callers_do_themselves_pushes_no_failure_out(outcome: str) -> None:
    kept = KeptRequests(10)
    kept.add(record(outcome="backend_timeout"))
    for number in range(100):
        kept.add(record(number, outcome=outcome))
    assert kept.find("request-0")[-1].outcome == "backend_timeout"


def test_strangers_push_nothing_out_but_each_other() -> None:
    kept = KeptRequests(100)
    for number in range(60):
        kept.add(record(number, outcome="backend_timeout" if number % 2 else "ok"))
    before = set(numbers(kept))
    for number in range(1000):
        stranger = record(1000 + number, outcome="invalid_api_key" if number % 2 else "not_found", attempts=0)
        stranger.caller = NOBODY
        kept.add(stranger)
    assert before <= set(numbers(kept))
    assert len(kept) == 100


def test_a_flood_of_failures_leaves_the_ordinary_ones_their_share() -> None:
    kept = KeptRequests(100)
    for number in range(200):
        kept.add(record(number))
    for number in range(1000):
        kept.add(record(1000 + number, outcome="backend_timeout"))
    assert len([number for number in numbers(kept) if number < 1000]) == 100 * ORDINARY


def test_whatever_comes_the_bounds_hold_and_each_kind_keeps_its_share() -> None:
    seed = randrange(2**32)
    print(f"seed {seed}")  # noqa: T201
    rng = Random(seed)
    kept = KeptRequests(50, bytes_each=4096)
    for number in range(5000):
        each = record(number, outcome=rng.choice(["ok", "ok", "backend_timeout"]), attempts=rng.randrange(1, 9))
        if rng.random() < 0.3:
            each.caller = NOBODY
        if rng.random() < 0.1:
            each.error_message = WIDE * rng.randrange(4000)
        kept.add(each)
        assert len(kept) <= 50
        assert kept.size == sum(entry.size for entry in kept.newest()) <= 50 * 4096


def test_it_is_found_by_either_id_the_newest_first() -> None:
    kept = KeptRequests(10)
    first, second = record(1), record(1)
    for each in (first, record(2), second):
        kept.add(each)
    assert kept.find("request-1") == kept.find(f"{2:032x}") == [second, first]
    assert kept.find("") == kept.find("request-9") == []


def test_texts_are_not_kept_and_go_with_the_spans_all_the_same() -> None:
    kept = KeptRequests(10)
    made = record()
    made.input_text, made.output_text = "a prompt", "an answer"
    kept.add(made)
    (found,) = kept.find("request-0")
    assert (found.input_text, found.output_text) == (None, None)
    assert (made.input_text, made.output_text) == ("a prompt", "an answer")


def longest(number: int, *, attempts: int = 1, events: int = 0, letter: str = WIDE) -> Record:
    """A request of which every name is as long as it may be, and none is shared."""

    def text(length: int) -> str:
        return letter * (length - 8) + f"{number:08d}"

    made = record(number, outcome="backend_timeout", attempts=attempts)
    made.request_id = "x" * 120 + f"{number:08d}"
    made.trace_id, made.span_id, made.started_ns = 2**127 + number, 2**63 + number, 10**18 + number
    assert made.trace
    made.trace_state = "t" * 504 + f"{number:08d}"
    made.model = text(256)
    made.error_message = text(512)
    made.describe_answer(
        response_id=text(256),
        model=text(256),
        finish_reasons=[text(64) for _ in range(16)],
        input_tokens=10**6 + number,
        output_tokens=10**6 + number,
    )
    made.charged = 10**7 + number
    made.first_token = made.started + 0.1
    for attempt in made.attempts:
        attempt.started, attempt.ended = number + 0.25, number + 0.75
        attempt.deadline_left, attempt.backoff, attempt.span_id = number + 0.3, number + 0.4, 2**62 + number
        attempt.message, attempt.request_id = text(512), "y" * 120 + f"{number:08d}"
        attempt.passed_over = tuple((f"primary-{one}", "breaker") for one in range(9))
    made.waits = [Wait("bridging", "primary", number + 0.1, number + 0.2) for _ in range(events)]
    for one in range(events):
        made.note_breaker(number + one / 7, "primary-1", "closed", "open")
        made.note_cooldown(number + one / 7, "primary-1", number + one / 9)
    return made


def ordinary(number: int) -> Record:
    made = record(number)
    made.request_id = f"{number:036d}"
    assert made.trace
    made.describe_answer(
        response_id=f"chatcmpl-{number:08d}",
        model=f"model-{number}",
        finish_reasons=["stop"],
        input_tokens=number,
        output_tokens=number,
    )
    return made


MANY = [Candidate("primary", None, None, ("primary-1",))] * 2000


def of_a_long_route(number: int) -> Record:
    made = ordinary(number)
    made.candidates = tuple(MANY)
    return made


@pytest.mark.parametrize(
    "make",
    [
        ordinary,
        of_a_long_route,
        lambda number: longest(number, letter="x"),
        longest,
        lambda number: longest(number, attempts=4, events=4),
        lambda number: longest(number, attempts=40, events=40),
    ],
    ids=[
        "ordinary",
        "a long route",
        "longest names",
        "longest names of wide letters",
        "a few attempts",
        "forty attempts",
    ],
)
def test_a_thousand_take_less_than_ten_megabytes(make: Callable[[int], Record]) -> None:
    gc.collect()
    tracemalloc.start()
    try:
        kept = KeptRequests(1000)
        for number in range(1200):
            kept.add(make(number))
            if number > len(kept) + 200:
                break  # it is full
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    print(f"{len(kept)} requests, {taken} bytes, counted {kept.size}")  # noqa: T201
    assert taken < 10_000_000
    one_more = kept.size + size_of(make(0)) > 1000 * BYTES_EACH
    assert len(kept) == 1000 or one_more, "fewer are kept only where the bytes are used up"
    assert taken <= kept.size * 1.05, "what is counted is what is taken, at least"


def test_an_ordinary_request_is_not_counted_for_much_more_than_it_takes() -> None:
    assert size_of(ordinary(0)) < 3600
