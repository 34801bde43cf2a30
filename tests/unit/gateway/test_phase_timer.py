import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from time import monotonic
from typing import Self

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from gateway.errors import CallerLeft, DeadlineExceeded, GatewayError, Silent, Stalled
from gateway.phase_timer import LAST_LOOK, PhaseTimer, ended_within
from gateway.stalls import INTERVAL, stalls_of_loop
from tests.unit.gateway.fakes import Clock
from tests.unit.gateway.virtual import TICK, run, settle

END = 100.0
SOON = 0.01
"""Virtual seconds a timer may be late."""


def stalled() -> Stalled:
    return Stalled("idle")


def silent() -> Silent:
    return Silent("late", timer="answer")


def ends_with(
    block: Callable[[PhaseTimer], Awaitable[None]], prepare: Callable[[PhaseTimer], None] = lambda _timer: None
) -> tuple[GatewayError | None, float]:
    """How a timed block ends, and after how long."""

    async def story(clock: Clock) -> tuple[GatewayError | None, float]:
        timer, began = PhaseTimer(clock, clock() + END), clock()
        prepare(timer)
        task = asyncio.current_task()
        assert task is not None
        try:
            with timer:
                await block(timer)
        except GatewayError as error:
            assert task.cancelling() == 0
            return error, clock() - began
        assert task.cancelling() == 0
        took = clock() - began
        await asyncio.sleep(3 * END)  # nothing goes off afterwards
        return None, took

    return run(story)


def test_a_phase_that_takes_too_long_ends_with_its_own_error() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(3, stalled)
        await asyncio.sleep(50)

    error, took = ends_with(block)
    assert isinstance(error, Stalled)
    assert 3 <= took < 3 + SOON


def test_a_phase_may_begin_before_the_block() -> None:
    async def block(_timer: PhaseTimer) -> None:
        await asyncio.sleep(50)

    error, took = ends_with(block, lambda timer: timer.limit(2, silent))
    assert isinstance(error, Silent)
    assert 2 <= took < 2 + SOON


def test_the_hard_end_wins_over_a_longer_phase() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(END + 1, stalled)
        await asyncio.sleep(1000)

    error, took = ends_with(block)
    assert isinstance(error, DeadlineExceeded)
    assert END <= took < END + SOON


def test_without_a_phase_the_hard_end_holds() -> None:
    async def block(_timer: PhaseTimer) -> None:
        await asyncio.sleep(1000)

    error, took = ends_with(block)
    assert isinstance(error, DeadlineExceeded)
    assert END <= took < END + SOON


def test_each_phase_begins_anew() -> None:
    async def block(timer: PhaseTimer) -> None:
        for _ in range(20):
            timer.limit(3, stalled)
            await asyncio.sleep(2)
        timer.limit(3, silent)
        await asyncio.sleep(50)

    error, took = ends_with(block)
    assert isinstance(error, Silent)
    assert 43 <= took < 43 + SOON


def test_a_shorter_phase_after_a_longer_one_is_on_time() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(50, silent)
        await asyncio.sleep(1)
        timer.limit(2, stalled)
        await asyncio.sleep(50)

    error, took = ends_with(block)
    assert isinstance(error, Stalled)
    assert 3 <= took < 3 + SOON


def test_while_it_is_paused_only_the_hard_end_holds() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(3, stalled)
        timer.pause()
        await asyncio.sleep(1000)

    error, took = ends_with(block)
    assert isinstance(error, DeadlineExceeded)
    assert END <= took < END + SOON


def test_the_hard_end_may_move_back() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(3, stalled)
        timer.end_at(asyncio.get_running_loop().time() + 2 * END)
        await asyncio.sleep(1000)

    error, took = ends_with(block)
    assert isinstance(error, DeadlineExceeded)
    assert 2 * END <= took < 2 * END + SOON


def test_an_end_that_is_over_ends_the_block_at_its_first_wait() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.end_at(0)
        timer.limit(5, stalled)
        await asyncio.sleep(50)

    error, took = ends_with(block)
    assert isinstance(error, DeadlineExceeded)
    assert took < SOON


def test_a_block_in_time_ends_as_it_ends_and_nothing_goes_off_later() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(3, stalled)
        await asyncio.sleep(2)

    error, took = ends_with(block)
    assert error is None
    assert 2 <= took < 2 + SOON


def test_an_error_of_the_block_goes_on() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(3, stalled)
        raise CallerLeft("gone")

    assert isinstance(ends_with(block)[0], CallerLeft)


def test_an_error_while_the_cancelled_block_is_left_goes_on() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(3, stalled)
        try:
            await asyncio.sleep(50)
        finally:
            raise CallerLeft("gone")

    assert isinstance(ends_with(block)[0], CallerLeft)


def cancelled_at(moment: float, *, phase: float, before: bool) -> str:
    """What a timed block ends with when its task is cancelled at `moment`; `before` the timer, in the same tick."""

    async def story(_clock: Clock) -> str:
        loop = asyncio.get_running_loop()

        async def timed() -> str:
            if before:
                loop.call_later(moment, task.cancel)
            with PhaseTimer(loop.time, loop.time() + END) as timer:
                timer.limit(phase, stalled)
                if not before:
                    loop.call_later(moment, task.cancel)
                await asyncio.sleep(50)
            return "ended"

        task = asyncio.create_task(timed())
        await settle()
        await asyncio.wait([task])
        if task.cancelled():
            return "cancelled"
        return type(task.exception()).__name__

    return run(story)


@pytest.mark.parametrize("before", [True, False])
def test_the_callers_cancellation_is_never_swallowed(before: bool) -> None:  # noqa: FBT001
    assert cancelled_at(1, phase=3, before=before) == "cancelled"
    assert cancelled_at(3, phase=1, before=before) == "Stalled"


@pytest.mark.parametrize("before", [True, False])
def test_a_cancellation_in_the_moment_the_timer_goes_off_wins(before: bool) -> None:  # noqa: FBT001
    assert cancelled_at(3, phase=3, before=before) == "cancelled"


def test_a_cancellation_that_was_there_before_is_not_taken_for_the_timers() -> None:
    """As in a clean-up that is itself timed: the earlier cancellation stays counted."""

    async def story(clock: Clock) -> tuple[str, int]:
        async def timed() -> tuple[str, int]:
            task = asyncio.current_task()
            assert task is not None
            try:
                await asyncio.sleep(50)
            except asyncio.CancelledError:
                try:
                    with PhaseTimer(clock, clock() + 1):
                        await asyncio.sleep(50)
                except DeadlineExceeded:
                    return "deadline", task.cancelling()
            return "nothing", 0

        task = asyncio.create_task(timed())
        await settle()
        task.cancel()
        return await task

    assert run(story) == ("deadline", 1)


def test_a_timeout_inside_keeps_its_own_error() -> None:
    async def block(timer: PhaseTimer) -> None:
        timer.limit(5, stalled)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.sleep(50)
        async with asyncio.timeout(20):
            await asyncio.sleep(50)

    error, took = ends_with(block)
    assert isinstance(error, Stalled)
    assert 5 <= took < 5 + SOON


# What waits in a socket is in time


class Mail:
    """A socket pair: what is written at one end waits in the system until the loop reads it."""

    def __init__(self) -> None:
        self._writer, self._reader = socket.socketpair()
        self._reader.setblocking(False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()
        self._reader.close()

    def send(self) -> None:
        self._writer.send(b"x")

    async def read(self) -> None:
        await asyncio.get_running_loop().sock_recv(self._reader, 1)


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def real(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    """A runner of each kind of loop, in real time."""
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner


def stand_still(seconds: float) -> None:
    """Keep the loop from running, as a stopped process does."""
    time.sleep(seconds)


def test_what_came_while_the_loop_stood_still_is_in_time(real: asyncio.Runner) -> None:
    async def story() -> int:
        read = 0
        with Mail() as mail, PhaseTimer(monotonic, monotonic() + END) as timer:
            for _ in range(5):
                timer.limit(0.1, stalled)
                asyncio.get_running_loop().call_soon(stand_still, 0.2)
                asyncio.get_running_loop().call_soon(mail.send)
                await mail.read()
                read += 1
        return read

    assert real.run(story()) == 5


def test_even_at_the_hard_end_what_has_come_is_taken(real: asyncio.Runner) -> None:
    async def story() -> None:
        with Mail() as mail, PhaseTimer(monotonic, monotonic() + 0.1):
            asyncio.get_running_loop().call_soon(stand_still, 0.2)
            asyncio.get_running_loop().call_soon(mail.send)
            await mail.read()

    real.run(story())


def test_who_waits_for_what_has_just_been_read_runs_before_the_timer_decides() -> None:
    """What is read in the very turn of the loop in which the last look ends."""

    async def block(timer: PhaseTimer) -> None:
        loop = asyncio.get_running_loop()
        read: asyncio.Future[None] = loop.create_future()
        timer.limit(3, stalled)
        loop.call_later(3 + LAST_LOOK + TICK / 2, read.set_result, None)
        await read
        timer.pause()

    error, took = ends_with(block)
    assert error is None
    assert took > 3 + LAST_LOOK


def test_time_in_which_the_loop_stood_still_does_not_count(real: asyncio.Runner) -> None:
    """Nothing has come yet, since the other side stood still as well."""

    async def story() -> tuple[GatewayError | None, float]:
        stalls_of_loop()
        began = monotonic()
        try:
            with PhaseTimer(monotonic, monotonic() + END) as timer:
                timer.limit(0.4, stalled)
                asyncio.get_running_loop().call_later(0.1, stand_still, 0.8)
                await asyncio.sleep(50)
        except GatewayError as error:
            return error, monotonic() - began
        return None, 0

    error, took = real.run(story())
    assert isinstance(error, Stalled)
    assert took >= 1.2 - INTERVAL


@pytest.mark.parametrize(("takes", "ends"), [(0.01, True), (60, False)])
def test_a_last_work_has_its_time_though_the_loop_stands_still_and_no_more(
    real: asyncio.Runner,
    takes: float,
    ends: bool,  # noqa: FBT001
) -> None:
    async def work() -> None:
        stand_still(0.5)
        await asyncio.sleep(takes)

    async def story() -> bool:
        stalls_of_loop()
        await asyncio.sleep(INTERVAL)
        task = asyncio.create_task(work())
        await ended_within(0.2, task)
        return task.done()

    assert real.run(story()) == ends


def test_the_hard_end_is_a_promise_whatever_the_loop_does(real: asyncio.Runner) -> None:
    async def story() -> float:
        stalls_of_loop()
        began = monotonic()
        try:
            with PhaseTimer(monotonic, began + 0.6) as timer:
                timer.limit(0.5, stalled)
                asyncio.get_running_loop().call_later(0.1, stand_still, 0.4)
                await asyncio.sleep(50)
        except DeadlineExceeded:
            return monotonic() - began
        return 0

    assert real.run(story()) >= 0.6


def test_a_phase_may_have_begun_before(real: asyncio.Runner) -> None:
    """A stall in all of its time counts, also before its limit was set."""

    async def story() -> tuple[GatewayError | None, float]:
        stalls_of_loop()
        began = monotonic()
        try:
            with PhaseTimer(monotonic, monotonic() + END) as timer:
                await asyncio.sleep(0.1)
                stand_still(0.8)
                timer.limit(0.4, stalled, began=began)
                await asyncio.sleep(50)
        except GatewayError as error:
            return error, monotonic() - began
        return None, 0

    error, took = real.run(story())
    assert isinstance(error, Stalled)
    assert took >= 1.2 - INTERVAL


def test_it_needs_a_task() -> None:
    async def story(clock: Clock) -> None:
        timer = PhaseTimer(clock, clock() + END)
        caught: list[BaseException] = []

        def outside() -> None:
            try:
                timer.__enter__()
            except RuntimeError as error:
                caught.append(error)

        asyncio.get_running_loop().call_soon(outside)
        await settle()
        assert len(caught) == 1

    run(story)


STEP = st.tuples(st.sampled_from(["limit", "pause", "end"]), st.floats(0.1, 20), st.floats(0, 15))


@given(st.lists(STEP, min_size=1, max_size=10))
def test_any_order_of_phases_ends_on_time_and_with_the_right_error(steps: list[tuple[str, float, float]]) -> None:
    async def block(timer: PhaseTimer) -> None:
        now = asyncio.get_running_loop().time
        for kind, seconds, sleep in steps:
            if kind == "limit":
                timer.limit(seconds, stalled)
            elif kind == "pause":
                timer.pause()
            else:
                timer.end_at(now() + END)
            await asyncio.sleep(sleep)

    error, took = ends_with(block)
    passed, end = 0.0, END
    for kind, seconds, sleep in steps:
        if kind == "end":
            end = passed + END
        due = min(end, passed + seconds) if kind == "limit" else end
        if abs(passed + sleep - due) < SOON:
            return  # too close to call
        if passed + sleep > due:
            assert isinstance(error, Stalled if due < end else DeadlineExceeded)
            assert due <= took + 1e-6
            assert took < due + SOON
            return
        passed += sleep
    assert error is None
