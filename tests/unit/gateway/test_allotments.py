"""What several processes hold of one key's limits: leased, spent, lost and given back, without a store."""

import asyncio

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from gateway.config import LimitsConfig
from gateway.policy import allotment, ledger
from gateway.policy.allotment import Allotment
from gateway.policy.ledger import Ledger, Report
from gateway.policy.limits import DAY, MINUTE, Limits, Reservation
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
        reservation = self.limits.reserve(tokens)
        if reservation.take() is not None:
            return False
        limits = [window.limit for window in self.limits.tokens]
        charge = [self.world.clock(), float(min([tokens, *limits]) if limits else 1)]
        self.world.taken.append(charge)
        self.open.append((reservation, charge))
        return True

    def ask_and_take(self, tokens: int = 0) -> bool:
        """As a request does: it asks only for what it does not have, and is refused if there is no more."""
        reservation = self.limits.reserve(tokens)
        if reservation.take() is None:
            limits = [window.limit for window in self.limits.tokens]
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
        charge[1] = float(int(charge[1] * part)) if self.limits.tokens else charge[1]
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
TestSharing.settings = settings(max_examples=600, stateful_step_count=40, deadline=None, phases=[Phase.generate])
