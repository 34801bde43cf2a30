import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import LimitsConfig
from gateway.errors import DeadlineExceeded, GatewayDraining, GatewayError, GatewayOverloaded, RateLimitExceeded
from gateway.policy.admission import Admission
from gateway.policy.allotment import Allotment
from gateway.policy.byte_budget import ByteBudget
from gateway.policy.ledger import Ledger
from gateway.policy.limits import Limits, Reservation
from tests.unit.gateway.fakes import Clock
from tests.unit.gateway.virtual import run, settle

NOW = 1e-6
"""Virtual seconds: at once."""

LONG = 600.0
QUEUE_TIMEOUT = 2.0


def admission(*, slots: int = 1, queue: int = 4) -> Admission:
    return Admission(max_in_flight=slots, max_queue=queue, queue_timeout=QUEUE_TIMEOUT)


def enter(gate: Admission, left: float = LONG) -> "asyncio.Task[None]":
    return asyncio.create_task(gate.enter(left))


async def error_of(task: "asyncio.Task[None]") -> BaseException | None:
    await asyncio.wait([task])
    return asyncio.CancelledError() if task.cancelled() else task.exception()


def assert_empty(gate: Admission) -> None:
    assert (gate.in_flight, gate.queued) == (0, 0)


def test_a_free_slot_is_had_without_waiting_even_with_no_time_left() -> None:
    async def story(clock: Clock) -> None:
        gate, began = admission(slots=2), clock()
        await gate.enter(0)
        await gate.enter(0)
        assert clock() - began < NOW
        assert gate.in_flight == 2
        assert not gate.enter_at_once()
        gate.leave()
        gate.leave()
        assert_empty(gate)

    run(story)


def test_the_queue_is_first_in_first_out() -> None:
    async def story(_clock: Clock) -> list[int]:
        gate, order = admission(queue=5), []

        async def come(number: int) -> None:
            await gate.enter(LONG)
            order.append(number)
            gate.leave()

        await gate.enter(LONG)
        tasks = [asyncio.create_task(come(number)) for number in range(5)]
        await settle()
        assert gate.queued == 5
        gate.leave()
        await asyncio.gather(*tasks)
        assert_empty(gate)
        return order

    assert run(story) == [0, 1, 2, 3, 4]


def test_nobody_overtakes_the_queue_when_a_slot_becomes_free() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(queue=1)
        await gate.enter(LONG)
        waiting = enter(gate)
        await settle()
        gate.leave()
        assert not gate.enter_at_once()  # the slot belongs to the one who waited, before it has run
        overtaking = enter(gate)
        await settle()
        assert waiting.done()
        assert not overtaking.done()
        gate.leave()
        await overtaking
        gate.leave()
        assert_empty(gate)

    run(story)


def test_a_full_queue_refuses_at_once() -> None:
    async def story(clock: Clock) -> None:
        gate = admission(queue=1)
        await gate.enter(LONG)
        waiting = enter(gate)
        await settle()
        began = clock()
        with pytest.raises(GatewayOverloaded) as refused:
            gate.check()
        with pytest.raises(GatewayOverloaded):
            await gate.enter(LONG)
        assert clock() - began < NOW
        assert refused.value.reason == "queue_full"
        assert gate.queued == 1
        gate.leave()
        await waiting
        gate.leave()
        assert_empty(gate)

    run(story)


def test_without_a_queue_a_taken_slot_refuses_at_once() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(queue=0)
        await gate.enter(LONG)
        with pytest.raises(GatewayOverloaded):
            await gate.enter(LONG)
        gate.leave()
        await gate.enter(LONG)
        gate.leave()
        assert_empty(gate)

    run(story)


def test_who_queues_longer_than_the_queue_timeout_is_overloaded() -> None:
    async def story(clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        began = clock()
        with pytest.raises(GatewayOverloaded) as late:
            await gate.enter(QUEUE_TIMEOUT + 0.01)
        assert QUEUE_TIMEOUT <= clock() - began < QUEUE_TIMEOUT + 0.01
        assert late.value.reason == "queue_timeout"
        assert gate.queued == 0
        gate.leave()
        assert_empty(gate)

    run(story)


def test_whose_deadline_ends_in_the_queue_is_told_so() -> None:
    async def story(clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        for left in (QUEUE_TIMEOUT, 0.3, 0.0):
            began = clock()
            with pytest.raises(DeadlineExceeded):
                await gate.enter(left)
            assert left <= clock() - began < left + 0.01
        assert gate.queued == 0
        gate.leave()
        assert_empty(gate)

    run(story)


def test_who_leaves_the_queue_is_skipped() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        first, second = enter(gate), enter(gate)
        await settle()
        first.cancel()
        gate.leave()  # before the cancelled one has run
        assert isinstance(await error_of(first), asyncio.CancelledError)
        await second
        assert (gate.in_flight, gate.queued) == (1, 0)
        gate.leave()
        assert_empty(gate)

    run(story)


def test_a_slot_handed_to_one_who_leaves_in_that_moment_goes_on_to_the_next() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        first, second = enter(gate), enter(gate)
        await settle()
        gate.leave()  # hands it to the first
        first.cancel()
        assert isinstance(await error_of(first), asyncio.CancelledError)
        await second
        assert (gate.in_flight, gate.queued) == (1, 0)
        gate.leave()
        assert_empty(gate)

    run(story)


def test_a_slot_handed_over_when_nobody_else_waits_becomes_free_again() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        only = enter(gate)
        await settle()
        gate.leave()
        only.cancel()
        await error_of(only)
        assert_empty(gate)

    run(story)


def test_draining_refuses_who_comes_and_who_waits_and_lets_who_is_in_finish() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        waiting = [enter(gate) for _ in range(3)]
        await settle()
        gate.drain()
        assert gate.in_flight == 1
        for task in waiting:
            assert isinstance(await error_of(task), GatewayDraining)
        with pytest.raises(GatewayDraining) as refused:
            gate.check()
        assert refused.value.retry_after == 1
        with pytest.raises(GatewayDraining):
            await gate.enter(LONG)
        gate.leave()
        with pytest.raises(GatewayDraining):
            await gate.enter(LONG)
        assert_empty(gate)

    run(story)


def test_who_is_cancelled_and_drained_in_the_same_moment_leaves_nothing_behind() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission()
        await gate.enter(LONG)
        before, after = enter(gate), enter(gate)
        await settle()
        before.cancel()
        gate.drain()
        after.cancel()
        await error_of(before)
        await error_of(after)
        gate.leave()
        assert_empty(gate)

    run(story)


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.sampled_from([0.0, 0.5, LONG])),
        st.tuples(st.just("leave"), st.integers(0, 9)),
        st.tuples(st.just("cancel"), st.integers(0, 9)),
        st.tuples(st.just("run"), st.just(0)),
        st.tuples(st.just("sleep"), st.sampled_from([0.4, 0.6, QUEUE_TIMEOUT])),
        st.tuples(st.just("drain"), st.just(0)),
    ),
    max_size=40,
)


@given(ACTIONS, st.integers(1, 3), st.integers(0, 4))
def test_after_any_mix_of_outcomes_nothing_is_held(actions: list[tuple[str, float]], slots: int, queue: int) -> None:
    """Leaves, cancellations, timeouts and the drain fall on any moment, handed-over slots included."""

    async def story(_clock: Clock) -> None:
        gate = admission(slots=slots, queue=queue)
        inside = 0
        gone: list[asyncio.Event] = []
        tasks: list[asyncio.Task[None]] = []

        async def request(left: float, leaves: asyncio.Event) -> None:
            nonlocal inside
            await gate.enter(left)
            inside += 1
            assert inside <= slots
            try:
                await leaves.wait()
            finally:
                inside -= 1
                gate.leave()

        for kind, value in actions:
            if kind == "enter":
                gone.append(asyncio.Event())
                tasks.append(asyncio.create_task(request(value, gone[-1])))
            elif kind == "leave" and gone:
                gone[int(value) % len(gone)].set()
            elif kind == "cancel" and tasks:
                tasks[int(value) % len(tasks)].cancel()
            elif kind == "run":
                await asyncio.sleep(0)
            elif kind == "sleep":
                await asyncio.sleep(value)
            elif kind == "drain":
                gate.drain()
            assert 0 <= inside <= gate.in_flight <= slots
            assert gate.queued <= queue
        for leaves in gone:
            leaves.set()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(end is None or isinstance(end, GatewayError | asyncio.CancelledError) for end in ends)
        assert inside == 0
        assert_empty(gate)

    run(story)


@given(st.integers(1, 3), st.lists(st.booleans(), min_size=1, max_size=12))
def test_everybody_who_stays_in_the_queue_gets_in_whoever_else_leaves_it(slots: int, stays: list[bool]) -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(slots=slots, queue=len(stays))
        for _ in range(slots):
            await gate.enter(LONG)
        tasks = [enter(gate) for _ in stays]
        await settle()
        for _ in range(slots):
            gate.leave()
        for task, stay in zip(tasks, stays, strict=True):
            if not stay:
                task.cancel()
        served = 0
        while not all(task.done() for task in tasks):
            await settle()
            served += 1
            if gate.in_flight:
                gate.leave()
        ends = [await error_of(task) for task in tasks]
        assert [end is None for end in ends] == stays
        for _ in range(gate.in_flight):
            gate.leave()
        assert_empty(gate)

    run(story)


def test_memory_refuses_what_is_above_its_limit_and_holds_nothing_of_it() -> None:
    budget = ByteBudget(100)
    with budget.share() as one, budget.share() as other:
        one.hold(60)
        other.hold(40)
        with pytest.raises(GatewayOverloaded) as full:
            other.hold(1)
        assert full.value.reason == "memory"
        assert (one.held, other.held, budget.held) == (60, 40, 100)
        one.give_back(10)
        other.hold(10)
        assert budget.held == 100
    assert budget.held == 0


SHARES = st.lists(
    st.tuples(st.integers(0, 4), st.sampled_from(["hold", "some", "all", "end"]), st.integers(0, 60)), max_size=40
)


@given(SHARES)
def test_after_any_mix_of_shares_no_byte_is_held(steps: list[tuple[int, str, int]]) -> None:
    budget = ByteBudget(100)
    shares = [budget.share().__enter__() for _ in range(5)]
    for index, kind, size in steps:
        share = shares[index]
        before = share.held
        if kind == "hold":
            fits = budget.held + size <= 100
            try:
                share.hold(size)
            except GatewayOverloaded:
                assert not fits
                assert share.held == before
            else:
                assert fits
        elif kind == "some":
            share.give_back(min(size, share.held))
        elif kind == "all":
            share.give_back(share.held)
            assert share.held == 0
        else:
            share.__exit__(None, None, None)
            assert share.held == 0
        assert budget.held == sum(each.held for each in shares) <= 100
    for share in shares:
        share.__exit__(None, None, None)
    assert budget.held == 0


def test_one_caller_has_half_of_the_slots_and_the_rest_is_for_others() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(slots=4, queue=2)
        assert [gate.enter_at_once("greedy") for _ in range(3)] == [True, True, False]
        third, fourth = (asyncio.create_task(gate.enter(LONG, "greedy")) for _ in range(2))
        await settle()
        with pytest.raises(GatewayOverloaded) as refused:
            gate.check("greedy")
        assert refused.value.reason == "queue_full"

        gate.check("modest")
        assert gate.enter_at_once("modest")  # past those who wait for a slot that only they may have
        assert gate.queued == 2
        gate.leave("modest")
        assert gate.queued == 2

        gate.leave("greedy")
        await third
        gate.leave("greedy")
        await fourth
        for _ in range(2):
            gate.leave("greedy")
        assert_empty(gate)
        assert not gate._slots_of

    run(story)


def test_a_slot_goes_to_the_first_in_the_queue_who_may_have_it() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(slots=2, queue=8)
        assert gate.enter_at_once("greedy")
        assert gate.enter_at_once("other")
        again = asyncio.create_task(gate.enter(LONG, "greedy"))
        await settle()
        modest = asyncio.create_task(gate.enter(LONG, "modest"))
        await settle()

        gate.leave("other")
        await modest
        assert not again.done()
        gate.leave("greedy")
        await again
        gate.leave("greedy")
        gate.leave("modest")
        assert_empty(gate)

    run(story)


@given(st.lists(st.tuples(st.sampled_from(["a", "b", "c", ""]), st.booleans()), max_size=60), st.integers(1, 6))
def test_whoever_comes_and_leaves_nobody_has_more_than_half_and_all_is_given_back(
    steps: list[tuple[str, bool]], slots: int
) -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(slots=slots, queue=6)
        inside: list[str] = []
        waiting: list[tuple[str, asyncio.Task[None]]] = []

        async def look() -> None:
            await settle()
            for caller, task in [each for each in waiting if each[1].done()]:
                waiting.remove((caller, task))
                if not task.cancelled() and task.exception() is None:
                    inside.append(caller)
            assert gate.in_flight == len(inside) <= slots
            assert all(inside.count(caller) <= max(1, slots // 2) for caller in "abc")
            free = slots - len(inside)
            assert not free or not any(inside.count(who) < max(1, slots // 2) or not who for who, _ in waiting)

        for caller, comes in steps:
            if comes:
                waiting.append((caller, asyncio.create_task(gate.enter(LONG, caller))))
            elif inside:
                gate.leave(inside.pop(0))
            await look()
        for _, task in waiting:
            task.cancel()
        await look()
        for caller in inside:
            gate.leave(caller)
        assert_empty(gate)
        assert not gate._slots_of

    run(story)


def test_one_caller_holds_half_of_the_bytes() -> None:
    budget = ByteBudget(100)
    with budget.share("greedy") as one, budget.share("greedy") as two, budget.share("modest") as third:
        one.hold(30)
        two.hold(20)
        with pytest.raises(GatewayOverloaded) as refused:
            two.hold(1)
        assert refused.value.reason == "memory"
        third.hold(50)
        with pytest.raises(GatewayOverloaded):
            third.hold(1)
        one.give_back(30)
        two.hold(30)
        one.count(80)
        assert budget.held == 180
    assert budget.held == 0
    assert not budget.of_one


# One caller after the other


def test_callers_have_their_turn_one_after_the_other_whoever_came_first() -> None:
    async def story(_clock: Clock) -> list[str]:
        gate, order = admission(slots=2, queue=20), []

        async def come(caller: str) -> None:
            await gate.enter(LONG, caller)
            order.append(caller)
            await settle()
            gate.leave(caller)

        await gate.enter(LONG, "x")
        await gate.enter(LONG, "y")
        tasks = [asyncio.create_task(come(caller)) for caller in ["a"] * 6 + ["b"] * 2 + ["c"] * 3]
        await settle()
        gate.leave("x")
        await asyncio.gather(*tasks)
        gate.leave("y")
        assert_empty(gate)
        return order

    assert "".join(run(story)) == "abcabcacaaa"


def test_in_a_full_queue_the_last_of_the_longest_line_makes_room_for_who_has_fewer() -> None:
    async def story(_clock: Clock) -> None:
        gate = admission(slots=1, queue=4)
        await gate.enter(LONG, "x")
        greedy = [asyncio.create_task(gate.enter(LONG, "greedy")) for _ in range(4)]
        await settle()
        gate.check("modest")
        with pytest.raises(GatewayOverloaded):
            gate.check("greedy")
        modest = [asyncio.create_task(gate.enter(LONG, "modest")) for _ in range(3)]
        await settle()
        ends = [await error_of(task) for task in (greedy[3], greedy[2], modest[2])]
        assert all(isinstance(end, GatewayOverloaded) and end.reason == "queue_full" for end in ends)
        assert gate.queued == 4
        gate.leave("x")
        for task, caller in (
            (greedy[0], "greedy"),
            (modest[0], "modest"),
            (greedy[1], "greedy"),
            (modest[1], "modest"),
        ):
            await task
            gate.leave(caller)
        assert_empty(gate)

    run(story)


# What a key may use


def limits_of(clock: Clock, **config: int) -> Limits:
    return Limits(LimitsConfig(**config), clock)


def test_who_would_wait_longer_than_the_queue_allows_is_refused_at_once_and_told_how_long() -> None:
    async def story(clock: Clock) -> None:
        gate, of = admission(slots=8), limits_of(clock, requests_per_minute=2)
        for _ in range(2):
            assert gate.enter_at_once("key", Reservation(of, 0))
        began = clock()
        with pytest.raises(RateLimitExceeded) as refused:
            await gate.enter(LONG, "key", Reservation(of, 0))
        assert clock() - began < NOW
        assert refused.value.limit == "requests_per_minute"
        assert refused.value.retry_after is not None
        assert 60 <= refused.value.retry_after <= 61
        await asyncio.sleep(refused.value.retry_after)
        assert gate.enter_at_once("key", Reservation(of, 0))
        for _ in range(3):
            gate.leave("key")
        assert_empty(gate)

    run(story)


def test_a_short_wait_for_a_limit_is_waited_out_in_the_queue_in_order() -> None:
    async def story(clock: Clock) -> None:
        gate, of = admission(slots=8), limits_of(clock, tokens_per_minute=10)
        assert gate.enter_at_once("key", Reservation(of, 10))
        await asyncio.sleep(59.5)
        began = clock()
        large = asyncio.create_task(gate.enter(LONG, "key", Reservation(of, 10)))
        await settle()
        with pytest.raises(RateLimitExceeded):  # behind the large one it would not fit for another minute
            await gate.enter(LONG, "key", Reservation(of, 1))
        assert gate.enter_at_once("other", Reservation(limits_of(clock, tokens_per_minute=10), 10))
        await large
        assert 0.4 < clock() - began < 1.6
        assert of.in_flight == 2
        for caller in ("key", "key", "other"):
            gate.leave(caller)
        assert_empty(gate)

    run(story)


def test_what_another_request_gives_back_goes_to_who_waits() -> None:
    async def story(clock: Clock) -> None:
        gate, of = admission(slots=8), limits_of(clock, max_in_flight=2)
        first, second = Reservation(of, 0), Reservation(of, 0)
        assert gate.enter_at_once("key", first)
        assert gate.enter_at_once("key", second)
        third, fourth = (asyncio.create_task(gate.enter(LONG, "key", Reservation(of, 0))) for _ in range(2))
        await settle()
        first.settle(0)
        gate.leave("key")
        await third
        assert not fourth.done()
        error = await error_of(fourth)
        assert isinstance(error, RateLimitExceeded)
        assert (error.limit, error.retry_after) == ("max_in_flight", 0)
        assert of.in_flight == 2
        for _ in range(2):
            gate.leave("key")
        assert_empty(gate)

    run(story)


def test_who_is_out_of_slots_as_well_is_told_of_the_slots() -> None:
    async def story(clock: Clock) -> None:
        gate, of = admission(slots=1), limits_of(clock, max_in_flight=1)
        assert gate.enter_at_once("key", Reservation(of, 0))
        with pytest.raises(GatewayOverloaded) as late:
            await gate.enter(LONG, "key", Reservation(of, 0))
        assert late.value.reason == "queue_timeout"
        gate.leave("key")
        assert_empty(gate)

    run(story)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", ""]),
            st.sampled_from(["come", "come", "leave", "cancel", "sleep"]),
            st.integers(0, 12),
        ),
        max_size=50,
    ),
    st.integers(1, 5),
    st.integers(0, 5),
)
def test_whatever_happens_as_much_is_taken_as_is_under_way(
    steps: list[tuple[str, str, int]], slots: int, queue: int
) -> None:
    async def story(clock: Clock) -> None:
        gate = admission(slots=slots, queue=queue)
        keys = {
            "a": limits_of(clock, requests_per_minute=4, tokens_per_minute=20),
            "b": limits_of(clock, tokens_per_minute=12, max_in_flight=2),
        }
        inside: list[tuple[str, Reservation | None]] = []
        tasks: list[asyncio.Task[None]] = []

        async def come(caller: str, tokens: int) -> None:
            reservation = Reservation(keys[caller], tokens) if caller else None
            await gate.enter(LONG, caller, reservation)
            inside.append((caller, reservation))

        for caller, kind, number in steps:
            if kind == "come":
                tasks.append(asyncio.create_task(come(caller, number)))
            elif kind == "leave" and inside:
                who, reservation = inside.pop(number % len(inside))
                if reservation is not None:
                    reservation.settle(reservation.tokens // 2)
                gate.leave(who)
            elif kind == "cancel" and tasks:
                tasks[number % len(tasks)].cancel()
            elif kind == "sleep":
                await asyncio.sleep(number)
            await settle()
            assert gate.in_flight == len(inside) <= slots
            assert gate.queued <= queue
            for key, of in keys.items():
                assert of.in_flight == sum(who == key for who, _ in inside)
                assert all(used <= most for _, most, used in of.state())
        for task in tasks:
            task.cancel()
        await settle()
        for who, reservation in inside:
            if reservation is not None:
                reservation.settle(0)
            gate.leave(who)
        assert_empty(gate)
        assert not gate._slots_of
        assert not gate._lines
        assert {of.in_flight for of in keys.values()} == {0}

    run(story)


class Sharing:
    """Limits that another process shares: its ledger answers when told to."""

    def __init__(self, clock: Clock, **config: int) -> None:
        self.ledger = Ledger(clock)
        self.limits, self.others = Limits(LimitsConfig(**config), clock), Limits(LimitsConfig(**config), clock)
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.asked = 0
        self.ours = Allotment(self.limits, "ours", 0.25, self._ask)
        self.theirs = Allotment(self.others, "theirs", 0.25, self._ask)
        for each in (self.ours, self.theirs):
            each.come_back()

    def _ask(self, _: Allotment) -> "asyncio.Future[None]":
        self.asked += 1
        return self.answer

    def exchange(self, allotment: Allotment) -> None:
        for _ in range(2):
            self.report(allotment)

    def report(self, allotment: Allotment) -> None:
        allotment.answered(self.ledger.exchange(allotment.report("epoch")))

    def answers(self) -> None:
        self.exchange(self.ours)
        self.answer.set_result(None)
        self.answer = asyncio.get_running_loop().create_future()


def test_who_lacks_a_lease_waits_for_the_answer_and_those_who_ask_meanwhile_are_answered_together() -> None:
    async def story(clock: Clock) -> None:
        gate, sharing, began = admission(slots=100), Sharing(clock, requests_per_minute=3), clock()
        tasks = [asyncio.create_task(gate.enter(LONG, "a", Reservation(sharing.limits, 0))) for _ in range(4)]
        await settle()
        assert gate.in_flight == 0
        sharing.answers()
        await settle()
        assert gate.in_flight == 3
        refused = await error_of(tasks[3])
        assert isinstance(refused, RateLimitExceeded), "at once: the answer says that there is no more"
        assert 50 < refused.wait < 63
        assert clock() - began < 1

    run(story)


def test_nobody_waits_longer_for_an_answer_than_in_the_queue() -> None:
    async def story(clock: Clock) -> None:
        gate, sharing, began = admission(slots=100), Sharing(clock, requests_per_minute=3), clock()
        with pytest.raises(RateLimitExceeded):
            await gate.enter(LONG, "a", Reservation(sharing.limits, 0))
        assert clock() - began < 2 * QUEUE_TIMEOUT + 0.1
        began = clock()
        with pytest.raises((RateLimitExceeded, DeadlineExceeded)):
            await gate.enter(0.5, "a", Reservation(sharing.limits, 0))
        assert clock() - began < 1.1
        assert_empty(gate)

    run(story)


async def waiting_for_what_others_use(gate: Admission, sharing: Sharing) -> "asyncio.Task[None]":
    """A request that waits for the last of 40, which others hold, and then use."""
    theirs = [Reservation(sharing.others, 0) for _ in range(40)]
    for each in theirs:
        each.take()
    sharing.exchange(sharing.theirs)
    for each in theirs[:39]:
        assert each.take() is None
    sharing.exchange(sharing.ours)
    task = asyncio.create_task(gate.enter(LONG, "a", Reservation(sharing.limits, 0)))
    await settle()
    sharing.answers()
    await settle()
    assert gate.queued == 1, "one is held by others"
    assert theirs[39].take() is None
    sharing.exchange(sharing.theirs)
    sharing.exchange(sharing.ours)
    return task


def test_who_waits_for_what_others_hold_is_refused_once_they_have_used_it() -> None:
    async def story(clock: Clock) -> None:
        gate, sharing, began = admission(slots=100), Sharing(clock, requests_per_minute=40), clock()
        task = await waiting_for_what_others_use(gate, sharing)
        assert isinstance(await error_of(task), RateLimitExceeded)
        assert clock() - began < QUEUE_TIMEOUT / 2
        assert_empty(gate)

    run(story)


def test_who_waits_for_what_others_hold_gives_up_with_the_answer_that_says_that_it_is_used() -> None:
    async def story(clock: Clock) -> None:
        gate, sharing = admission(slots=100), Sharing(clock, requests_per_minute=40)
        task = await waiting_for_what_others_use(gate, sharing)
        before = clock()
        gate.look_again()
        await settle()
        assert task.done()
        assert clock() - before < 0.01, "not at the next look"
        assert isinstance(task.exception(), RateLimitExceeded)

    run(story)


def test_who_waits_for_what_others_hold_goes_on_with_the_answer_that_brings_it() -> None:
    async def story(clock: Clock) -> None:
        gate, sharing = admission(slots=100), Sharing(clock, max_in_flight=1)
        theirs = Reservation(sharing.others, 0)
        theirs.take()
        sharing.exchange(sharing.theirs)
        assert theirs.take() is None
        sharing.exchange(sharing.theirs)
        ours = Reservation(sharing.limits, 0)
        task = asyncio.create_task(gate.enter(LONG, "a", ours))
        await settle()
        sharing.answers()
        await settle()
        assert gate.queued == 1
        theirs.settle(0)
        sharing.report(sharing.ours)
        sharing.exchange(sharing.theirs)  # they hear that somebody needs what they keep
        sharing.ours.lacks(ours)
        sharing.report(sharing.ours)  # the next one would give it back
        before = clock()
        gate.look_again()
        await settle()
        assert task.done()
        assert clock() - before < 0.01, "not at the next look"
        assert gate.in_flight == 1

    run(story)
