"""The rules of the breaker, one story each, and all of them at once against a model."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.policy.breaker import Breaker, State, Ticket
from tests.unit.gateway.fakes import Clock

FAILURES = 3
OPEN = 10.0
OPEN_MAX = 30.0
MIDDLE = 0.5
"""Draws the middle of the spread: the open time itself."""


def make(clock: Clock, draw: float = MIDDLE, changes: list[tuple[State, State]] | None = None) -> Breaker:
    told = changes if changes is not None else []
    return Breaker(
        failures=FAILURES,
        open_seconds=OPEN,
        open_max=OPEN_MAX,
        clock=clock,
        draw=lambda: draw,
        changed=lambda old, new: told.append((old, new)),
    )


def admitted(breaker: Breaker) -> Ticket:
    ticket = breaker.admit()
    assert ticket is not None
    return ticket


def fail(breaker: Breaker, times: int = 1, *, unreachable: bool = False) -> None:
    for _ in range(times):
        breaker.record_failure(admitted(breaker), unreachable=unreachable)


def half_open(clock: Clock) -> Breaker:
    breaker = make(clock)
    fail(breaker, FAILURES)
    clock.forward(OPEN)
    return breaker


def test_it_opens_at_the_nth_consecutive_failure_and_not_before() -> None:
    breaker = make(Clock())
    fail(breaker, FAILURES - 1)

    assert breaker.state.value == "closed"
    assert breaker.consecutive_failures == FAILURES - 1
    fail(breaker)
    assert breaker.state.value == "open"


def test_a_whole_answer_ends_the_row_of_failures() -> None:
    breaker = make(Clock())
    for _ in range(5):
        fail(breaker, FAILURES - 1)
        breaker.record_success(admitted(breaker))

    assert breaker.state.value == "closed"
    assert breaker.consecutive_failures == 0


def test_the_first_words_of_an_answer_do_not_end_the_row() -> None:
    breaker = make(Clock())
    for _ in range(FAILURES):
        ticket = admitted(breaker)
        breaker.record_first_content(ticket)
        breaker.record_failure(ticket)

    assert breaker.state.value == "open"


def test_an_attempt_that_is_neither_success_nor_failure_changes_nothing() -> None:
    breaker = make(Clock())
    fail(breaker, FAILURES - 1)
    breaker.cancel(admitted(breaker))

    assert breaker.consecutive_failures == FAILURES - 1
    fail(breaker)
    assert breaker.state.value == "open"


def test_open_it_admits_nobody_and_tells_when_to_come_again() -> None:
    clock = Clock()
    breaker = make(clock)
    assert breaker.retry_in is None
    fail(breaker, FAILURES)
    clock.forward(4)

    assert breaker.admit() is None
    assert not breaker.admits
    assert breaker.retry_in == OPEN - 4


def test_the_open_time_is_spread_by_a_fifth_to_either_side() -> None:
    for draw, expected in ((0.0, OPEN * 0.8), (0.5, OPEN), (1 - 1e-9, OPEN * 1.2)):
        breaker = make(Clock(), draw)
        fail(breaker, FAILURES)
        waits = breaker.retry_in
        assert waits is not None
        assert abs(waits - expected) < 1e-6


def test_half_open_it_admits_exactly_one() -> None:
    breaker = half_open(Clock())

    assert breaker.state.value == "half_open"
    assert breaker.retry_in == 0
    admitted(breaker)
    assert breaker.admit() is None


def test_a_cancelled_half_open_attempt_gives_its_place_back() -> None:
    breaker = half_open(Clock())
    breaker.cancel(admitted(breaker))

    assert breaker.state.value == "half_open"
    admitted(breaker)


def test_the_first_content_of_a_half_open_attempt_closes_it() -> None:
    breaker = half_open(Clock())
    breaker.record_first_content(admitted(breaker))

    assert breaker.state.value == "closed"
    assert breaker.consecutive_failures == 0
    admitted(breaker)
    admitted(breaker)


def test_an_attempt_that_closed_it_and_is_cut_then_counts_in_the_new_row() -> None:
    breaker = half_open(Clock())
    ticket = admitted(breaker)
    breaker.record_first_content(ticket)
    breaker.record_failure(ticket)

    assert breaker.state.value == "closed"
    assert breaker.consecutive_failures == 1


def test_the_open_time_doubles_with_each_failed_half_open_attempt_up_to_the_maximum() -> None:
    clock = Clock()
    breaker = half_open(clock)
    waits = []
    for _ in range(4):
        fail(breaker)
        assert breaker.state.value == "open"
        waits.append(breaker.retry_in)
        clock.forward(OPEN_MAX)

    assert waits == [20.0, 30.0, 30.0, 30.0]


def test_the_maximum_holds_for_the_spread_too_and_after_a_thousand_failed_attempts() -> None:
    clock = Clock()
    breaker = make(clock, draw=0.999)
    fail(breaker, FAILURES)
    for _ in range(1000):
        clock.forward(OPEN_MAX)
        fail(breaker)
        assert breaker.retry_in is not None
        assert breaker.retry_in <= OPEN_MAX


def test_once_closed_the_open_time_begins_anew() -> None:
    clock = Clock()
    breaker = half_open(clock)
    fail(breaker)
    clock.forward(OPEN_MAX)
    breaker.record_success(admitted(breaker))
    fail(breaker, FAILURES)

    assert breaker.retry_in == OPEN


def test_an_attempt_from_before_it_opened_neither_closes_nor_reopens_it() -> None:
    clock = Clock()
    breaker = make(clock)
    late = [admitted(breaker) for _ in range(3)]
    fail(breaker, FAILURES)
    until = breaker.retry_in
    breaker.record_success(late[0])
    breaker.record_failure(late[1])
    breaker.cancel(late[2])

    assert breaker.state.value == "open"
    assert breaker.retry_in == until
    assert breaker.consecutive_failures == FAILURES


def test_an_attempt_from_before_it_opened_does_not_touch_the_half_open_place() -> None:
    clock = Clock()
    breaker = make(clock)
    late = [admitted(breaker) for _ in range(3)]
    fail(breaker, FAILURES)
    clock.forward(OPEN)
    trial = admitted(breaker)
    breaker.cancel(late[0])
    breaker.record_failure(late[1])
    breaker.record_first_content(late[2])
    breaker.record_success(late[2])

    assert breaker.state.value == "half_open"
    assert breaker.admit() is None
    breaker.record_success(trial)
    assert breaker.state.value == "closed"


def test_a_half_open_attempt_that_has_ended_cannot_free_the_place_of_the_next() -> None:
    clock = Clock()
    breaker = half_open(clock)
    failed = admitted(breaker)
    breaker.record_failure(failed)
    clock.forward(OPEN_MAX)
    admitted(breaker)
    breaker.cancel(failed)

    assert breaker.admit() is None


def test_a_failure_from_before_it_opened_does_not_count_in_the_next_row() -> None:
    clock = Clock()
    breaker = make(clock)
    late = admitted(breaker)
    fail(breaker, FAILURES)
    clock.forward(OPEN)
    breaker.record_success(admitted(breaker))
    fail(breaker, FAILURES - 1)
    breaker.record_failure(late)

    assert breaker.state.value == "closed"


def test_a_good_probe_alone_does_not_end_the_open_time() -> None:
    breaker = make(Clock())
    fail(breaker, FAILURES)
    breaker.record_probe(good=True)

    assert breaker.state.value == "open"


def test_a_good_probe_ends_it_when_the_last_failure_was_unreachable() -> None:
    breaker = make(Clock())
    fail(breaker, FAILURES, unreachable=True)
    breaker.record_probe(good=True)

    assert breaker.state.value == "half_open"


def test_only_the_last_failure_says_whether_it_was_unreachable() -> None:
    breaker = make(Clock())
    fail(breaker, FAILURES - 1, unreachable=True)
    fail(breaker)
    breaker.record_probe(good=True)

    assert breaker.state.value == "open"


def test_a_good_probe_ends_it_when_a_probe_has_failed_since_it_opened() -> None:
    breaker = make(Clock())
    breaker.record_probe(good=False)
    fail(breaker, FAILURES)
    breaker.record_probe(good=True)
    assert breaker.state.value == "open"
    breaker.record_probe(good=False)
    assert breaker.state.value == "open"
    breaker.record_probe(good=True)

    assert breaker.admits


def test_a_failed_probe_is_forgotten_when_it_opens_again() -> None:
    breaker = make(Clock())
    fail(breaker, FAILURES)
    breaker.record_probe(good=False)
    breaker.record_probe(good=True)
    fail(breaker)
    breaker.record_probe(good=True)

    assert breaker.state.value == "open"


def test_probes_never_close_it_and_never_open_it() -> None:
    breaker = make(Clock())
    for _ in range(10):
        breaker.record_probe(good=False)
    assert breaker.state.value == "closed"
    fail(breaker, FAILURES, unreachable=True)
    for _ in range(3):
        breaker.record_probe(good=True)

    assert breaker.state.value == "half_open"
    breaker.record_probe(good=False)
    assert breaker.state.value == "half_open"


def test_reading_a_breaker_never_changes_it() -> None:
    clock = Clock()
    changes: list[tuple[State, State]] = []
    breaker = make(clock, changes=changes)
    fail(breaker, FAILURES)
    clock.forward(OPEN)

    assert (breaker.state, breaker.admits, breaker.retry_in) == (State.HALF_OPEN, True, 0.0)
    assert changes == [(State.CLOSED, State.OPEN)]


def test_every_change_is_told_once_and_in_order() -> None:
    clock = Clock()
    changes: list[tuple[State, State]] = []
    breaker = make(clock, changes=changes)
    fail(breaker, FAILURES)
    clock.forward(OPEN)
    assert [breaker.state for _ in range(3)] == [State.HALF_OPEN] * 3
    breaker.record_success(admitted(breaker))

    assert changes == [
        (State.CLOSED, State.OPEN),
        (State.OPEN, State.HALF_OPEN),
        (State.HALF_OPEN, State.CLOSED),
    ]


def test_after_a_hint_the_next_failure_opens_it_unless_a_success_comes_first() -> None:
    clock = Clock()
    breaker = make(clock)
    breaker.hint()
    assert breaker.admits
    fail(breaker)
    assert breaker.state is State.OPEN
    left = breaker.retry_in
    breaker.hint()
    assert breaker.retry_in == left
    other = make(clock)
    other.hint()
    other.record_success(admitted(other))
    fail(other, FAILURES - 1)
    assert other.state is State.CLOSED


class BreakerRules(RuleBasedStateMachine):
    """Any order of attempts, ends, probes and time, against the plainest model of the rules.

    The model keeps, for each ticket, the era in which it was given out; a report from another era is void.
    """

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.changes: list[tuple[State, State]] = []
        self.breaker: Breaker
        self.draw = MIDDLE
        self.out: list[tuple[Ticket, int]] = []
        self.state = State.CLOSED
        self.era = 0
        self.row = 0
        self.reopened = 0
        self.until = 0.0
        self.trial: Ticket | None = None
        self.probe_may_end = False

    @initialize(draw=st.floats(0, 1, exclude_max=True))
    def begin(self, draw: float) -> None:
        self.draw = draw
        self.breaker = make(self.clock, draw, self.changes)

    @property
    def shown(self) -> State:
        return State.HALF_OPEN if self.state is State.OPEN and self.clock() >= self.until else self.state

    def turn(self, state: State) -> None:
        self.state, self.trial = state, None
        self.era += 1
        if state is State.CLOSED:
            self.row = self.reopened = 0

    def open(self, *, unreachable: bool) -> None:
        planned: float = min(OPEN_MAX, OPEN * 2**self.reopened)
        self.until = self.clock() + min(OPEN_MAX, planned * (0.8 + 0.4 * self.draw))
        self.probe_may_end = unreachable
        self.turn(State.OPEN)

    @rule()
    def admit(self) -> None:
        allowed = self.state is State.CLOSED or (self.shown is State.HALF_OPEN and self.trial is None)
        assert self.breaker.admits == allowed
        ticket = self.breaker.admit()
        assert (ticket is not None) == allowed
        if ticket is not None:
            if self.state is State.OPEN:
                self.turn(State.HALF_OPEN)
            self.out.append((ticket, self.era))
            if self.state is State.HALF_OPEN:
                self.trial = ticket

    def took(self, data: st.DataObject) -> tuple[Ticket, bool]:
        """A ticket that is out, and whether its report still counts."""
        index = data.draw(st.integers(0, len(self.out) - 1))
        ticket, era = self.out.pop(index)
        return ticket, era == self.era

    @precondition(lambda self: self.out)
    @rule(data=st.data(), unreachable=st.booleans())
    def fail(self, data: st.DataObject, unreachable: bool) -> None:  # noqa: FBT001
        ticket, counts = self.took(data)
        self.breaker.record_failure(ticket, unreachable=unreachable)
        if not counts:
            return
        self.row += 1
        if ticket is self.trial:
            self.reopened += 1
            self.open(unreachable=unreachable)
        elif self.row >= FAILURES:
            self.reopened = 0
            self.open(unreachable=unreachable)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        ticket, counts = self.took(data)
        self.breaker.record_success(ticket)
        if counts:
            if ticket is self.trial:
                self.turn(State.CLOSED)
            self.row = 0

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def first_content(self, data: st.DataObject) -> None:
        ticket, counts = self.took(data)
        self.breaker.record_first_content(ticket)
        if counts and ticket is self.trial:
            self.turn(State.CLOSED)
        self.out.append((ticket, self.era if counts else -1))

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        ticket, counts = self.took(data)
        self.breaker.cancel(ticket)
        if counts and ticket is self.trial:
            self.trial = None

    @rule(good=st.booleans())
    def probe(self, good: bool) -> None:  # noqa: FBT001
        self.breaker.record_probe(good=good)
        if self.shown is State.OPEN:
            if not good:
                self.probe_may_end = True
            elif self.probe_may_end:
                self.turn(State.HALF_OPEN)

    @rule(seconds=st.sampled_from([0.0, 0.1, 7.9, OPEN, OPEN_MAX]))
    def pass_time(self, seconds: float) -> None:
        self.clock.forward(seconds)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "breaker"):
            return
        assert self.breaker.state is self.shown
        assert self.breaker.consecutive_failures == self.row
        expected = {State.CLOSED: None, State.HALF_OPEN: 0.0, State.OPEN: self.until - self.clock()}[self.shown]
        assert self.breaker.retry_in == expected
        assert len(self.changes) == self.era
        assert all(old is not new for old, new in self.changes)
        assert all(before[1] is after[0] for before, after in zip(self.changes, self.changes[1:], strict=False))


test_any_order_of_attempts_probes_and_time_obeys_the_rules = BreakerRules.TestCase


def test_the_trial_of_an_outage_is_admitted_while_it_is_open_one_at_a_time_and_lengthens_nothing() -> None:
    clock = Clock()
    breaker = Breaker(failures=1, open_seconds=5, open_max=30, clock=clock, draw=lambda: 0.5)
    fail(breaker)
    assert breaker.admit() is None
    retry_in = breaker.retry_in
    for _ in range(3):
        ticket = breaker.admit_trial()
        assert ticket is not None
        assert breaker.admit_trial() is None
        breaker.record_failure(ticket)
        assert breaker.state is State.OPEN
    assert breaker.retry_in == retry_in
    clock.forward(5)
    ticket = breaker.admit_trial()
    assert ticket is not None
    breaker.record_failure(ticket)
    assert breaker.retry_in == 5, "half open, it opens for as long as before"


def test_a_good_probe_does_not_make_the_trial_of_an_outage_count_for_nothing() -> None:
    clock = Clock()
    breaker = Breaker(failures=1, open_seconds=5, open_max=30, clock=clock, draw=lambda: 0.5)
    breaker.record_failure(admitted(breaker), unreachable=True)
    ticket = breaker.admit_trial()
    assert ticket is not None
    breaker.record_probe(good=True)
    breaker.record_success(ticket)

    assert breaker.state is State.CLOSED


def test_a_good_trial_of_an_outage_closes_it() -> None:
    clock = Clock()
    breaker = Breaker(failures=1, open_seconds=5, open_max=30, clock=clock, draw=lambda: 0.5)
    fail(breaker)
    ticket = breaker.admit_trial()
    assert ticket is not None
    breaker.record_success(ticket)

    assert breaker.state is State.CLOSED
