import math
from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway.config import LimitsConfig
from gateway.policy.caller import Caller
from gateway.policy.limits import Limits, Reservation
from gateway.policy.window import DAY, MINUTE, SLOTS, Meter, Window
from gateway.record import Record
from gateway.server.responses import explaining
from tests.unit.gateway.fakes import Clock

EPOCH = 1_800_000_000.0


def clock_at(now: float = EPOCH) -> Clock:
    clock = Clock()
    clock.forward(now)
    return clock


def limits(clock: Clock, **config: int) -> Limits:
    return Limits(LimitsConfig(**config), clock)


def took(of: Limits, tokens: int = 0) -> Reservation | None:
    reservation = Reservation(of, tokens)
    return reservation if reservation.take() is None else None


def state(of: Limits) -> dict[str, tuple[int, int]]:
    return {name: (limit, used) for name, limit, used in of.state()}


@given(
    st.integers(1, 20),
    st.sampled_from([MINUTE, DAY]),
    st.lists(st.tuples(st.floats(0, 1.2), st.integers(0, 30)), max_size=80),
    st.floats(0, 2e9),
)
def test_no_stretch_of_time_as_long_as_the_window_holds_more_than_the_limit(
    limit: int, seconds: int, asked: list[tuple[float, int]], start: float
) -> None:
    meter = Meter()
    window, now = Window("w", limit, seconds, meter), start
    used: list[tuple[float, int]] = []
    for pause, amount in asked:
        now += pause * seconds / 3
        window.roll(now)
        if not window.wait(amount, now):
            meter.reading += amount
            used.append((now, amount))
    for end, _ in used:
        assert sum(amount for at, amount in used if end - seconds < at <= end) <= limit


@given(
    st.integers(1, 20),
    st.sampled_from([MINUTE, DAY]),
    st.lists(st.tuples(st.floats(0, 1.2), st.integers(0, 30)), max_size=40),
)
def test_what_has_waited_as_long_as_it_was_told_fits_and_not_a_slot_earlier(
    limit: int, seconds: int, asked: list[tuple[float, int]]
) -> None:
    meter = Meter()
    window, now = Window("w", limit, seconds, meter), EPOCH
    for pause, asked_for in asked:
        now += pause * seconds / 3
        amount = min(asked_for, limit)
        window.roll(now)
        wait = window.wait(amount, now)
        assert 0 <= wait <= (SLOTS + 1) * seconds / SLOTS
        if wait > 2 * seconds / SLOTS:
            earlier = now + wait - seconds / SLOTS
            window.roll(earlier)
            assert window.wait(amount, earlier) > 0
        now = math.nextafter(now + wait, math.inf)
        window.roll(now)
        assert not window.wait(amount, now)
        meter.reading += amount


def test_a_window_holds_no_more_slots_than_it_has_however_long_it_is_used() -> None:
    meter, random = Meter(), Random(1)
    window = Window("w", 1 << 60, MINUTE, meter)
    now = EPOCH
    for _ in range(5_000):
        now += random.random() * 2
        window.roll(now)
        meter.reading += 1
        assert len(window.slots()) <= SLOTS + 1
    assert window.used == sum(window.slots().values())
    window.roll(now + 62)
    assert (window.used, set(window.slots().values())) == (0, {0})


def test_the_whole_limit_may_be_used_at_once_and_again_a_window_and_a_slot_later() -> None:
    clock = clock_at()
    of = limits(clock, requests_per_minute=5)
    assert [took(of) is not None for _ in range(7)] == [True] * 5 + [False] * 2
    assert Reservation(of, 0).take() == 61
    clock.forward(60.9)
    assert took(of) is None
    clock.forward(0.1)
    assert [took(of) is not None for _ in range(6)] == [True] * 5 + [False]


def test_all_limits_that_are_set_hold() -> None:
    clock = clock_at()
    of = limits(clock, requests_per_minute=2, requests_per_day=3, tokens_per_minute=100, tokens_per_day=150)
    assert took(of, 90)
    assert took(of, 20) is None  # tokens of the minute
    assert took(of, 10)
    assert took(of) is None  # requests of the minute
    clock.forward(61)
    assert took(of, 51) is None  # tokens of the day
    assert took(of, 50)
    clock.forward(61)
    assert took(of) is None  # requests of the day
    refusal = Reservation(of, 0).refusal()
    assert refusal is not None
    assert refusal.limit == "requests_per_day"
    assert "requests_per_day" in refusal.message
    assert refusal.wait > 80_000
    clock.forward(refusal.wait)
    assert took(of, 100)


def test_what_does_not_fit_takes_nothing() -> None:
    of = limits(clock_at(), requests_per_minute=5, tokens_per_minute=10, max_in_flight=9)
    assert took(of, 8)
    before = state(of)
    for _ in range(4):
        assert took(of, 8) is None
    assert (
        state(of)
        == before
        == {
            "requests_per_minute": (5, 1),
            "tokens_per_minute": (10, 8),
            "max_in_flight": (9, 1),
        }
    )


def test_the_largest_request_passes_when_the_window_is_empty_and_only_then() -> None:
    clock = clock_at()
    of = limits(clock, tokens_per_minute=100, tokens_per_day=9_000)
    assert took(of, 1)
    assert took(of, 5_000) is None
    clock.forward(61)
    large = took(of, 5_000)
    assert large is not None
    assert state(of)["tokens_per_minute"] == (100, 100)
    assert state(of)["tokens_per_day"] == (9_000, 5_001)
    large.settle(5_100)
    assert state(of)["tokens_per_minute"] == (100, 5_100)
    assert state(of)["tokens_per_day"] == (9_000, 5_101)


def test_settling_gives_back_what_was_not_used_and_charges_what_was_used_beyond() -> None:
    clock = clock_at()
    of = limits(clock, tokens_per_minute=100)
    first = took(of, 80)
    assert first is not None
    assert took(of, 21) is None
    first.settle(30)
    assert state(of)["tokens_per_minute"] == (100, 30)
    second = took(of, 70)
    assert second is not None
    clock.forward(30)
    second.settle(170)
    assert state(of)["tokens_per_minute"] == (100, 200)
    clock.forward(31)  # what was reserved is a minute old; what went beyond is not
    assert state(of)["tokens_per_minute"] == (100, 100)
    assert took(of, 1) is None
    clock.forward(30)
    assert state(of)["tokens_per_minute"] == (100, 0)


def test_settling_after_the_window_changes_only_what_is_used_now() -> None:
    clock = clock_at()
    of = limits(clock, tokens_per_minute=100)
    less, more = took(of, 40), took(of, 40)
    assert less is not None
    assert more is not None
    clock.forward(120)
    less.settle(10)
    assert state(of)["tokens_per_minute"] == (100, 0)
    more.settle(60)
    assert state(of)["tokens_per_minute"] == (100, 20)


def test_what_was_never_forwarded_is_given_back_whole() -> None:
    of = limits(clock_at(), requests_per_minute=1, tokens_per_day=10, max_in_flight=1)
    reservation = took(of, 7)
    assert reservation is not None
    reservation.give_back()
    assert {used for _, used in state(of).values()} == {0}
    with pytest.raises(RuntimeError):
        reservation.settle(1)


def test_requests_in_flight_are_limited_until_they_end() -> None:
    of = limits(clock_at(), max_in_flight=2)
    first, second = took(of), took(of)
    assert first is not None
    assert second is not None
    assert Reservation(of, 0).take() == 0
    refusal = Reservation(of, 0).refusal()
    assert refusal is not None
    assert (refusal.limit, refusal.wait) == ("max_in_flight", 0)
    first.settle(0)
    assert Reservation(of, 0).refusal() is None
    assert took(of)


def test_who_comes_behind_others_is_told_the_wait_behind_them() -> None:
    clock = clock_at()
    of = limits(clock, tokens_per_minute=10)
    for _ in range(5):
        assert took(of, 2)
        clock.forward(10)
    mine, ahead = Reservation(of, 2), [Reservation(of, 2) for _ in range(3)]
    waits = [mine.refusal(ahead[:number]) for number in range(4)]
    assert [refusal.wait for refusal in waits if refusal is not None] == [11, 21, 31, 41]
    refusal = mine.refusal([Reservation(of, 10)] * 3)
    assert refusal is not None
    assert refusal.wait > 120


def test_the_headers_tell_of_the_limit_of_which_the_least_is_left() -> None:
    clock = clock_at()
    of = limits(clock, requests_per_minute=10, requests_per_day=12)
    of.look()
    assert of.requests.tightest is of.requests.windows[0]
    assert of.requests.windows[0].empty_in(int(clock())) == 0
    for _ in range(9):
        assert took(of)
    clock.forward(0.5)
    of.look()
    assert of.requests.tightest is of.requests.windows[0]
    assert of.requests.windows[0].empty_in(int(clock())) == 61
    clock.forward(61)
    of.look()
    assert of.requests.tightest is of.requests.windows[1]
    assert of.requests.windows[1].used == 9
    assert 80_000 < of.requests.windows[1].empty_in(int(clock())) <= DAY + 24 * 60


def test_the_headers_tell_that_nothing_is_used_once_all_is_given_back() -> None:
    of = limits(clock_at(), tokens_per_minute=100)
    record = Record("POST", None, 1, 2, "id", 0.0, 0, caller=Caller("key", limits=of))
    first, second = took(of, 30), took(of, 20)
    assert first is not None
    assert second is not None
    assert b"x-ratelimit-reset-tokens: 1m1s\r\n" in explaining(record, of.clock())
    first.settle(0)
    assert b"x-ratelimit-reset-tokens: 1m1s\r\n" in explaining(record, of.clock())
    second.settle(0)
    assert b"x-ratelimit-reset-tokens: 0s\r\n" in explaining(record, of.clock())


def test_what_was_saved_is_restored_and_what_lies_in_the_future_is_now() -> None:
    clock = clock_at()
    meter = limits(clock, tokens_per_day=100).tokens
    (before,) = meter.windows
    before.roll(clock())
    meter.reading += 10
    clock.forward(7_200)
    before.roll(clock())
    meter.reading += 20
    later = limits(clock, tokens_per_day=100).tokens
    (after,) = later.windows
    after.roll(clock())
    later.reading += 5
    after.restore(before.slots(), clock())
    assert after.used == 35 == sum(after.slots().values())
    assert list(after.slots()) == sorted(after.slots())
    (behind,) = limits(clock, tokens_per_day=100).tokens.windows
    behind.restore(before.slots(), clock() - 500_000)
    assert (behind.used, len(behind.slots())) == (30, 1)
    behind.roll(clock() - 500_000 + DAY + 1441)
    assert behind.used == 0


class OneKey(RuleBasedStateMachine):
    """Requests of one key come, wait, use less or more than they reserved, and are given up, at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = clock_at()
        self.of = limits(self.clock, requests_per_minute=8, tokens_per_minute=50, tokens_per_day=90, max_in_flight=5)
        self.open: list[Reservation] = []
        self.beyond = False

    @rule(tokens=st.integers(0, 70))
    def take(self, tokens: int) -> None:
        reservation = Reservation(self.of, tokens)
        expected = reservation.refusal()
        wait = reservation.take()
        assert (wait is None) == (expected is None)
        if wait is None:
            self.open.append(reservation)

    @rule(index=st.integers(0, 9), share=st.floats(0, 1.0))
    def settle_within(self, index: int, share: float) -> None:
        if self.open:
            reservation = self.open.pop(index % len(self.open))
            reservation.settle(int(min(reservation.tokens, 50) * share))

    @rule(index=st.integers(0, 9), more=st.integers(1, 40))
    def settle_beyond(self, index: int, more: int) -> None:
        if self.open:
            reservation = self.open.pop(index % len(self.open))
            self.beyond = True
            reservation.settle(min(reservation.tokens, 90) + more)

    @rule(index=st.integers(0, 9))
    def give_back(self, index: int) -> None:
        if self.open:
            self.open.pop(index % len(self.open)).give_back()

    @rule(seconds=st.floats(0, 40))
    def pass_time(self, seconds: float) -> None:
        self.clock.forward(seconds)

    @rule()
    def pass_a_day(self) -> None:
        self.clock.forward(DAY + 1_440)
        windows = self.of.windows
        self.of.look()
        assert {window.used for window in windows} == {0}
        self.beyond = False

    def windows(self) -> Iterator[Window]:
        yield from self.of.windows

    @invariant()
    def nothing_is_above_its_limit_unless_more_was_used_than_reserved(self) -> None:
        for window in self.of.requests.windows if self.beyond else self.windows():
            assert window.used <= window.limit

    @invariant()
    def nothing_is_below_zero_and_the_sums_are_right(self) -> None:
        for window in self.windows():
            slots = window.slots()
            assert window.used == sum(slots.values())
            assert all(used >= 0 for used in slots.values())
            assert len(slots) <= SLOTS + 1
            assert list(slots) == sorted(slots)

    @invariant()
    def as_many_are_in_flight_as_are_open(self) -> None:
        assert self.of.in_flight == len(self.open) <= 5


TestOneKey = OneKey.TestCase


def test_limits_change_and_what_was_used_still_counts() -> None:
    clock = clock_at()
    of = limits(clock, requests_per_minute=2, tokens_per_minute=500)
    under_way = took(of, 1_000)
    assert under_way is not None
    assert state(of) == {"requests_per_minute": (2, 1), "tokens_per_minute": (500, 500)}
    of.change(LimitsConfig(requests_per_minute=3, tokens_per_minute=2_000, tokens_per_day=9_000, max_in_flight=1))
    assert state(of) == {
        "requests_per_minute": (3, 1),
        "tokens_per_minute": (2_000, 500),
        "tokens_per_day": (9_000, 0),
        "max_in_flight": (1, 1),
    }
    assert took(of) is None
    under_way.settle(100)
    assert state(of) == {
        "requests_per_minute": (3, 1),
        "tokens_per_minute": (2_000, 100),
        "tokens_per_day": (9_000, 0),
        "max_in_flight": (1, 0),
    }


def test_what_is_given_back_goes_to_the_limits_of_which_it_was_taken() -> None:
    of = limits(clock_at(), requests_per_minute=2)
    under_way = took(of)
    assert under_way is not None
    of.change(LimitsConfig(requests_per_day=5))
    under_way.give_back()
    assert state(of) == {"requests_per_day": (5, 0)}


def test_a_limit_below_what_was_used_lets_nothing_through_until_it_is_forgotten() -> None:
    clock = clock_at()
    of = limits(clock, tokens_per_minute=1_000)
    assert took(of, 900) is not None
    of.change(LimitsConfig(tokens_per_minute=100))
    assert took(of, 1) is None
    clock.forward(MINUTE + 1)
    assert took(of, 1) is not None


def test_a_day_that_is_restored_while_requests_are_under_way_counts_them_where_they_began() -> None:
    clock = clock_at()
    clock.forward(1_440 - clock() % 1_440 - 1)
    of = limits(clock, tokens_per_day=100)
    under_way = took(of, 40)
    assert under_way is not None
    clock.forward(1)  # the next slot of the day begins
    (day,) = of.tokens.windows
    day.restore({}, clock())
    under_way.settle(10)
    assert list(day.slots().values()) == [10, 0]
    clock.forward(DAY + 1_440)
    assert state(of) == {"tokens_per_day": (100, 0)}
    assert day.empty_in(int(clock())) == 0
