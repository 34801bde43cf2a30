"""What several processes hold of one key's limits: leased, spent, lost and given back, without a store."""

import asyncio
from random import Random, randrange

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.config import LimitsConfig
from gateway.policy import allotment, ledger
from gateway.policy.allotment import INTERVAL, Allotment
from gateway.policy.ledger import LIVES, Ledger, Report
from gateway.policy.limits import Limits, Reservation
from gateway.policy.window import DAY, MINUTE
from tests.unit.gateway.fakes import Clock

EPOCH = 1_800_000_000.0


class World:
    """A ledger and the processes that share it, each with a clock of its own.

    Attributes:
        taken: what each request was charged, by the instant at which it was taken.
    """

    def __init__(
        self, *, count: int = 4, fallback: float = 0.25, offsets: tuple[float, ...] = (), **config: int
    ) -> None:
        self.clock = Clock()
        self.clock.forward(EPOCH)
        self.ledger = Ledger(self.clock)
        self.fallback = fallback
        self.config = LimitsConfig(**config)
        self.epochs = 0
        self.processes: list[Process] = []
        self.taken: list[list[float]] = []
        for number in range(count):
            self.begin(offsets[number] if offsets else 0.0)

    def begin(self, offset: float = 0.0) -> "Process":
        process = Process(self, f"p{len(self.processes)}", offset)
        self.processes.append(process)
        return process

    def new_epoch(self) -> str:
        self.epochs += 1
        return f"epoch-{self.epochs}"

    def empty(self) -> None:
        """The store restarts with nothing in it."""
        self.ledger = Ledger(self.clock)

    def used(self, seconds: float) -> float:
        """The most that was used in any stretch of time of this length."""
        return max(
            (sum(amount for at, amount in self.taken if end - seconds < at <= end) for end, _ in self.taken), default=0
        )


class Process:
    """One of them."""

    def __init__(self, world: World, name: str, offset: float) -> None:
        self.world = world
        self.name = name
        self.limits = Limits(world.config, lambda: world.clock() + offset)
        self.asked = 0
        self.allotment = Allotment(self.limits, name, world.fallback, self._ask)
        self.allotment.come_back()
        self.open: list[tuple[Reservation, list[float]]] = []

    def _ask(self, _: Allotment) -> "asyncio.Future[None]":
        self.asked += 1
        future: asyncio.Future[None] = asyncio.Future(loop=LOOP)
        return future

    def take(self, tokens: int = 0) -> bool:
        reservation = Reservation(self.limits, tokens)
        if reservation.take() is not None:
            return False
        limits = [window.limit for window in self.limits.tokens.windows]
        charge = [self.world.clock(), float(min([tokens, *limits]) if limits else 1)]
        self.world.taken.append(charge)
        self.open.append((reservation, charge))
        return True

    def ask_and_take(self, tokens: int = 0) -> bool:
        """As a request does: it asks only for what it does not have, and is refused if there is no more."""
        reservation = Reservation(self.limits, tokens)
        if reservation.take() is None:
            limits = [window.limit for window in self.limits.tokens.windows]
            charge = [self.world.clock(), float(min([tokens, *limits]) if limits else 1)]
            self.world.taken.append(charge)
            self.open.append((reservation, charge))
            return True
        if reservation.ask() is None:
            return False
        self.exchange()
        return self.take(tokens)

    def settle(self, number: int, part: float) -> None:
        reservation, charge = self.open.pop(number % len(self.open))
        charge[1] = float(int(charge[1] * part)) if self.limits.tokens.windows else charge[1]
        reservation.settle(int(charge[1]))

    def exchange(self) -> None:
        """Report, and once more where the answer asks for it."""
        for _ in range(3):
            self.allotment.answered(self.world.ledger.exchange(self.allotment.report(self.world.new_epoch())))
            if not self.allotment.at_once:
                break


LOOP = asyncio.new_event_loop()
LOOP.close()


class Sharing(RuleBasedStateMachine):
    """Reports get lost, answers get lost, reports come late: what all have used is never more than the limit."""

    @initialize(
        limit=st.integers(1, 200),
        seconds=st.sampled_from([MINUTE, DAY]),
        of=st.sampled_from(["requests", "tokens"]),
        offsets=st.tuples(*[st.floats(-5000, 5000)] * 4),
        in_flight=st.integers(1, 20),
    )
    def start(self, limit: int, seconds: int, of: str, offsets: tuple[float, ...], in_flight: int) -> None:
        name = f"{of}_per_{'minute' if seconds == MINUTE else 'day'}"
        self.world = World(offsets=offsets, max_in_flight=in_flight, **{name: limit})
        self.limit, self.seconds, self.in_flight = limit, seconds, in_flight
        self.patch = pytest.MonkeyPatch()
        for module in (allotment, ledger):  # a day passes in a few steps
            self.patch.setattr(module, "LIVES", seconds / 2.0)
        self.patch.setattr(ledger, "FORGOTTEN", float(seconds))
        self.late: list[Report] = []
        self.reported = [EPOCH] * len(self.world.processes)

    @rule(who=st.integers(0, 3), tokens=st.integers(0, 300), times=st.integers(1, 20))
    def requests(self, who: int, tokens: int, times: int) -> None:
        for _ in range(times):
            self.world.processes[who].take(tokens)

    @rule(who=st.integers(0, 3), number=st.integers(0, 1000), part=st.floats(0, 1))
    def ends(self, who: int, number: int, part: float) -> None:
        if self.world.processes[who].open:
            self.world.processes[who].settle(number, part)

    @rule(who=st.integers(0, 3))
    def reports(self, who: int) -> None:
        self.world.processes[who].exchange()
        self.reported[who] = self.world.clock()

    @rule(who=st.integers(0, 3), fate=st.sampled_from(["the report is lost", "the answer is lost", "it comes late"]))
    def reports_in_vain(self, who: int, fate: str) -> None:
        report = self.world.processes[who].allotment.report(self.world.new_epoch())
        if fate == "the answer is lost":
            self.world.ledger.exchange(report)
        elif fate == "it comes late":
            self.late.append(report)

    @rule(number=st.integers(0, 1000))
    def late_report_comes(self, number: int) -> None:
        if self.late:
            self.world.ledger.exchange(self.late.pop(number % len(self.late)))

    @rule(part=st.floats(0, 1))
    def time_passes(self, part: float) -> None:
        self.world.clock.forward(part * self.seconds / 5)
        for who, at in enumerate(self.reported):  # leases are kept: as long as the process lives, it reports
            if self.world.clock() > at + self.seconds / 5:
                self.world.processes[who].exchange()
                self.reported[who] = self.world.clock()

    def teardown(self) -> None:
        self.patch.undo()

    @invariant()
    def the_limit_holds(self) -> None:
        assert self.world.used(self.seconds) <= self.limit

    @invariant()
    def no_more_are_in_flight_than_may_be(self) -> None:
        assert sum(each.limits.in_flight for each in self.world.processes) <= self.in_flight

    @invariant()
    def nothing_is_below_zero(self) -> None:
        for each in self.world.processes:
            assert each.limits.in_flight >= 0
            assert all(used >= 0 for _, _, used in each.limits.state())


TestSharing = Sharing.TestCase
TestSharing.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


def shares(world: World, seed: int, weights: tuple[int, ...], times: float, minutes: int = 3) -> list[float]:
    """What all have used in each minute, with so many times the limit asked for, each instance by its weight."""
    random, start = Random(seed), world.clock()
    limit = world.processes[0].limits.requests.windows[0].limit
    next_report = start
    while world.clock() < start + minutes * 60:
        world.clock.forward(random.expovariate(limit * times / 60))
        while next_report <= world.clock():
            for each in world.processes:
                if each.allotment.due(each.limits.look()):
                    each.exchange()
            next_report += INTERVAL
        random.choices(world.processes, weights)[0].ask_and_take()
    return [
        sum(amount for at, amount in world.taken if start + minute * 60 <= at < start + (minute + 1) * 60)
        for minute in range(minutes)
    ]


@pytest.mark.parametrize("weights", [(85, 5, 5, 5), (97, 1, 1, 1), (25, 25, 25, 25)])
@pytest.mark.parametrize("times", [1.5, 5])
@pytest.mark.parametrize("seed", [1, randrange(1 << 32)], ids=["1", "another"])
def test_a_key_gets_nearly_all_of_its_limit_and_never_more(seed: int, times: float, weights: tuple[int, ...]) -> None:
    world, alone = World(requests_per_minute=80), World(requests_per_minute=80, count=1)
    pairs = list(zip(shares(world, seed, weights, times), shares(alone, seed, (1,), times), strict=True))
    assert world.used(60) <= 80, f"seed {seed}"
    assert max(whole for _, whole in pairs) == 80
    assert all(shared >= 0.9 * whole for shared, whole in pairs), f"seed {seed}: {pairs}"


@pytest.mark.parametrize("seed", [1, randrange(1 << 32)], ids=["1", "another"])
def test_the_shares_of_all_are_no_more_than_the_limit(seed: int) -> None:
    world, random = World(requests_per_minute=400, max_in_flight=40), Random(seed)
    for _ in range(200):
        world.clock.forward(random.random() / 5)
        chosen = random.choices(world.processes, (10, 5, 3, 1))[0]
        chosen.ask_and_take()
    for each in [*world.processes, *world.processes]:
        each.exchange()
    for number, limit in enumerate((400, 40)):
        told = [each.allotment._parts[number].share or 0 for each in world.processes]
        assert 0.9 * limit <= sum(told) <= limit, f"seed {seed}: {told}"
    for each in world.processes:
        each.allotment.go_on()
    most = [each.limits.requests.windows[0].most for each in world.processes]
    in_flight = [each.limits.most_in_flight or 0 for each in world.processes]
    assert min(most + in_flight) >= 1
    assert sum(most) <= 400 + most.count(1), "at least one each"
    assert sum(in_flight) <= 40 + in_flight.count(1)


def test_what_a_process_that_is_gone_had_in_flight_and_had_leased_comes_back_after_30_s() -> None:
    world = World(count=2, max_in_flight=4, requests_per_day=100)
    gone, other = world.processes
    assert [gone.ask_and_take() for _ in range(4)] == [True] * 4
    gone.exchange()
    assert not other.ask_and_take()
    world.clock.forward(LIVES - 1)
    assert not other.ask_and_take()
    world.clock.forward(2)
    assert [other.ask_and_take() for _ in range(5)] == [True] * 4 + [False]
    for _ in range(2):
        other.exchange()
    assert other.limits.requests.windows[0].elsewhere == 4, "what it had used is still used"


def test_a_lease_that_was_not_kept_is_not_spent_again() -> None:
    world = World(count=2, requests_per_day=100)
    frozen, other = world.processes
    assert frozen.ask_and_take()
    frozen.exchange()
    assert frozen.limits.requests.windows[0].most > 1
    world.clock.forward(LIVES + 1)
    frozen.exchange()
    assert world.processes[1] is other
    frozen.allotment.go_on()
    world.clock.forward(LIVES + 1)
    frozen.allotment.go_on()
    assert frozen.limits.requests.windows[0].most == 25, "the fallback share: another may have had its own since"


def test_before_the_ledger_has_answered_a_part_of_each_limit_may_be_used_at_least_one() -> None:
    world = World(count=1, fallback=0.1, requests_per_minute=50, max_in_flight=3, tokens_per_minute=9)
    limits = world.processes[0].limits
    world.processes[0].allotment.go_on()
    assert (limits.requests.windows[0].most, limits.tokens.windows[0].most, limits.most_in_flight) == (5, 1, 1)


def test_a_ledger_that_was_emptied_grants_nothing_until_all_can_have_reported() -> None:
    world = World(requests_per_day=100)
    for each in world.processes:
        for _ in range(15):
            assert each.ask_and_take()
    for each in [*world.processes, *world.processes]:
        each.exchange()
    world.empty()
    first = world.processes[0]
    first.exchange()
    while any(each.take() for each in world.processes):
        pass
    assert world.used(DAY) <= 100, "each had its share"
    world.clock.forward(1)
    for each in world.processes:
        each.exchange()
    world.clock.forward(ledger.SETTLES)
    for _ in range(5):
        world.clock.forward(1)
        for each in world.processes:
            each.exchange()
            while each.ask_and_take():
                pass
    assert 95 <= world.used(DAY) <= 100


def test_usage_without_the_ledger_is_reported_before_anything_is_leased_again() -> None:
    world = World(count=2, requests_per_day=40)
    for each in world.processes:
        assert each.ask_and_take()
        each.exchange()
    for each in world.processes:
        each.exchange()
        each.allotment.report("")  # never comes
        each.allotment.go_on()
        while each.take():
            pass
    used = world.used(DAY)
    for each in world.processes:
        each.allotment.catch_up()
        each.exchange()
    for each in world.processes:
        each.allotment.come_back()
        each.exchange()
        while each.ask_and_take():
            pass
    assert 30 <= used <= world.used(DAY) == 40


def test_more_than_a_process_holds_is_granted_at_once_if_the_whole_has_it() -> None:
    world = World(tokens_per_minute=1000)
    for each in world.processes:
        assert each.ask_and_take(1)
        each.exchange()
    largest = 1000 - 4
    assert not world.processes[0].ask_and_take(largest), "others hold some of it"
    for each in world.processes[1:]:
        world.clock.forward(INTERVAL)
        each.exchange()
        world.clock.forward(INTERVAL)
        each.exchange()
    world.clock.forward(1)
    world.processes[0].take(largest)
    assert world.processes[0].ask_and_take(largest)


def test_limits_may_change_while_they_are_shared() -> None:
    world = World(count=2, requests_per_minute=100)
    for each in world.processes:
        assert each.ask_and_take()
        report = each.allotment.report("")
        each.limits.requests.windows[0].have(40)
        each.limits.max_in_flight = 5
        each.allotment.follow()
        each.allotment.answered(world.ledger.exchange(report))
        world.clock.forward(INTERVAL)
        each.exchange()
    assert [world.processes[0].ask_and_take() for _ in range(6)].count(True) in {2, 3}
    assert 4 <= sum(each.limits.in_flight for each in world.processes) <= 5
    for each in world.processes:
        while each.open:
            each.settle(0, 1)
        each.exchange()
        assert each.limits.requests.windows[0].elsewhere + each.limits.requests.windows[0].used <= 5
    for _ in range(5):
        world.clock.forward(1)
        for each in world.processes:
            each.exchange()
            while each.ask_and_take():
                each.settle(0, 1)
    assert world.used(60) == 40


@pytest.mark.parametrize("answer", ["in time", "late"])
def test_a_limit_of_requests_in_flight_that_has_gone_holds_nobody_up(answer: str) -> None:
    world = World(count=1, requests_per_minute=100, max_in_flight=2)
    (process,) = world.processes
    assert process.ask_and_take()
    report = process.allotment.report("")
    if answer == "in time":
        process.allotment.answered(world.ledger.exchange(report))
    process.limits.change(LimitsConfig(requests_per_minute=100))
    process.allotment.follow()
    if answer == "late":
        process.allotment.answered(world.ledger.exchange(report))
    assert process.limits.most_in_flight is None
    assert [process.ask_and_take() for _ in range(20)] == [True] * 20


@pytest.mark.parametrize("limit", [40, 1000])
def test_without_the_ledger_the_shares_of_a_limit_that_changes_are_together_the_new_one(limit: int) -> None:
    world = World(requests_per_day=100, max_in_flight=20)
    for each in [*world.processes, *world.processes]:
        each.ask_and_take()
        each.exchange()
    for each in world.processes:
        each.allotment.go_on()
        each.limits.change(LimitsConfig(requests_per_day=limit, max_in_flight=limit // 5))
        each.allotment.follow()
    assert 0.8 * limit <= sum(each.limits.requests.windows[0].most for each in world.processes) <= limit
    assert sum(each.limits.most_in_flight or 0 for each in world.processes) <= limit // 5


@pytest.mark.parametrize("reserved", [0, 10])
def test_who_has_used_more_than_was_left_may_use_the_whole_limit_again_when_that_is_forgotten(reserved: int) -> None:
    world = World(count=2, tokens_per_minute=1000)
    process, other = world.processes
    process.exchange()
    other.exchange()
    reservation = Reservation(process.limits, reserved)
    if reservation.take() is not None:
        process.exchange()
        assert reservation.take() is None
    reservation.settle(30_000)
    for _ in range(MINUTE * 2):
        world.clock.forward(1)
        for each in world.processes:
            each.exchange()
    assert process.ask_and_take(reserved)
    process.exchange()
    assert process.ask_and_take(1000 - reserved)


def test_what_others_have_used_is_forgotten_by_who_has_heard_nothing_since() -> None:
    world = World(count=2, requests_per_minute=100)
    process, other = world.processes
    assert all(each.ask_and_take() for each in (process, other, other, other))
    for each in (other, process, process):
        world.clock.forward(INTERVAL)
        each.exchange()
    window = process.limits.requests.windows[0]
    assert (window.used, window.elsewhere, window.left) == (1, 3, 96)
    world.clock.forward(MINUTE + 2)
    process.limits.look()
    assert (window.used, window.elsewhere, window.left) == (0, 0, 100)


def test_what_is_refused_without_the_ledger_is_not_remembered() -> None:
    world = World(count=1, requests_per_day=4)
    (process,) = world.processes
    process.allotment.go_on()
    assert [process.take() for _ in range(50)].count(True) == 1
    assert not process.allotment._lacking


def test_who_was_told_that_there_is_no_more_asks_no_more_for_a_while() -> None:
    world = World(count=1, requests_per_day=5)
    (process,) = world.processes
    assert [process.ask_and_take() for _ in range(7)] == [True] * 5 + [False] * 2
    asked = process.asked
    assert [process.ask_and_take() for _ in range(100)] == [False] * 100
    assert process.asked == asked
    refusal = Reservation(process.limits, 0).refusal()
    assert refusal is not None
    assert 80_000 < refusal.wait <= DAY * 62 / 60


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("ended", [0, 1, 4])
def test_who_has_more_in_flight_than_its_share_is_granted_no_more_than_there_is(count: int, ended: int) -> None:
    world = World(count=count, max_in_flight=40)
    busy = world.processes[0]
    for _ in range(40):
        assert busy.ask_and_take()
    busy.exchange()
    world.clock.forward(LIVES + 1)
    for each in world.processes:
        each.allotment.go_on()  # what it had was not kept: a part of the limit holds
        each.allotment.catch_up()
        each.exchange()
    for _ in range(ended):
        busy.settle(0, 1.0)
    for each in world.processes:
        each.allotment.come_back()
        each.exchange()
    for _ in range(ended + 1):
        for each in world.processes:
            each.ask_and_take()
            assert sum(each.limits.in_flight for each in world.processes) <= 40
