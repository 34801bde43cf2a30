"""A short outage costs nobody an answer: requests wait in place of failing, and are released in order."""

import asyncio
import tracemalloc
from collections.abc import Callable

import pytest

from gateway.errors import (
    BackendError,
    BackendUnavailable,
    ConnectionFailed,
    ConnectTimeout,
    CutOff,
    ErrorAnswer,
    GatewayDraining,
    Unreachable,
)
from tests.unit.gateway.fakes import Clock, error_answer
from tests.unit.gateway.scene import Scene, Server, prompt
from tests.unit.gateway.virtual import run

OUTAGES: dict[str, Callable[[], BackendError]] = {
    "503": lambda: error_answer(503, b"{}", {}),
    "502": lambda: error_answer(502, b"{}", {}),
    "504": lambda: error_answer(504, b"{}", {}),
    "500": lambda: error_answer(500, b"{}", {}),
    "refused": lambda: Unreachable("no"),
    "connect timeout": lambda: ConnectTimeout("no"),
    "reset": lambda: ConnectionFailed("no"),
    "429": lambda: error_answer(429, b"{}", {}),
}


def out(kind: str, *, until: float, since: float = 0.0, answer: float = 0.05) -> Server:
    """A server that is out for some seconds."""

    def serve(at: float, _body: bytes) -> tuple[float, BackendError | None]:
        return (0.001, OUTAGES[kind]()) if since <= at < until else (answer, None)

    return serve


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("answer", [0.05, 3.0])
@pytest.mark.parametrize("kind", OUTAGES)
def test_an_outage_of_a_second_costs_no_caller_an_error(kind: str, answer: float, seed: int) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out(kind, since=1, until=2, answer=answer)}, seed=seed)
        await scene.traffic(10, 5)
        assert not scene.failed
        assert len([at for at, _, _ in scene.calls if 1 <= at < 2]) <= 10 + 5, "the budget, and breakers' failures"
        last = max(each.began + each.seconds for each in scene.ended if each.began < 2)
        assert last < 4 + 2 * answer, "after a trial, in a row"

    run(story)


@pytest.mark.parametrize("kind", ["503", "refused", "500"])
def test_a_restart_of_three_seconds_costs_no_caller_an_error_and_releases_all_within_a_second(kind: str) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out(kind, since=1, until=4)})
        await scene.traffic(10, 7)
        assert not scene.failed
        first = min(at for at, _, _ in scene.calls if at >= 4)
        assert first < 5.3
        waited = [each for each in scene.ended if each.record.is_bridged]
        assert len(waited) > 20
        assert max(each.began + each.seconds for each in waited) < first + 0.05 + 1

    run(story)


@pytest.mark.parametrize("failures", [5, 1000])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 10, 30])
def test_the_retries_of_those_whom_an_outage_finds_under_way_leave_enough_of_the_budget_for_its_trials(
    number: int, failures: int
) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=3)}, gateway_breaker_failures=failures)
        await asyncio.gather(*(scene.send(prompt(each)) for each in range(number)))
        assert not scene.failed
        assert len([at for at, _, _ in scene.calls if at < 3]) <= number + 10
        assert max(each.seconds for each in scene.ended) < 5
        scene.check_at_rest()

    run(story)


def test_those_who_wait_are_released_in_order() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=3)})
        await scene.traffic(10, 3)
        asked = [body for at, _, body in scene.calls if at >= 3]
        numbers = [int(body.split(b'"content":"')[1].split(b'"')[0]) for body in asked]
        assert len(numbers) == 30
        assert numbers[1:] == sorted(numbers[1:]), "the first one is the trial"

    run(story)


def test_an_outage_that_lasts_gives_errors_at_once_after_its_first_five_seconds() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=1e9)})
        await scene.traffic(10, 9)
        assert len(scene.failed) == 90
        for each in scene.failed:
            assert each.seconds < (0.5 if each.began >= 5.01 else 5.01 - each.began + 0.05)
            assert getattr(each.error, "status", 0) == 503
        assert [each for each in scene.failed if isinstance(each.error, ErrorAnswer)]
        late = [each for each in scene.failed if each.began > 5.5]
        assert all(isinstance(each.error, BackendUnavailable | ErrorAnswer) for each in late)
        assert len([at for at, _, _ in scene.calls if at < 5]) <= 16

    run(story)


@pytest.mark.parametrize("answer", [4.0, 20.0])
def test_who_waits_is_not_sent_away_while_a_trial_is_under_way(answer: float) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", since=1, until=3, answer=answer)})
        await scene.traffic(10, 5.5)
        assert not scene.failed

    run(story)


@pytest.mark.parametrize("kind", ["503", "refused"])
def test_two_restarts_in_a_row_cost_no_caller_an_error(kind: str) -> None:
    def twice(at: float, body: bytes) -> tuple[float, BackendError | None]:
        return out(kind, since=1, until=4)(at if at < 5 else at - 4, body)

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": twice})
        await scene.traffic(15, 12)
        assert not scene.failed

    run(story)


def test_an_answer_that_is_cut_when_the_outage_begins_waits_for_its_end() -> None:
    def killed(at: float, body: bytes) -> tuple[float, BackendError | None]:
        if 1 <= at < 3:
            return 0.001, Unreachable("no")
        return (1 - at + 0.001, CutOff("cut")) if at < 1 < at + 0.3 else (0.3, None)

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": killed}, gateway_breaker_failures=2)
        await scene.traffic(10, 4)
        assert not scene.failed

    run(story)


def test_a_bad_body_of_one_caller_is_no_outage() -> None:
    bad = prompt(666)

    def serve(_at: float, body: bytes) -> tuple[float, BackendError | None]:
        return (0.01, error_answer(500, b"{}", {})) if body == bad else (0.05, None)

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": serve})
        good = asyncio.create_task(scene.traffic(10, 5))
        for _ in range(4):
            refused = await scene.send(bad, caller="one")
            assert isinstance(refused.error, ErrorAnswer)
            assert refused.seconds < 1
        await good
        assert len(scene.failed) == 4
        assert scene.replicas["a-1"].breaker.consecutive_failures <= 1
        assert len([body for _, _, body in scene.calls if body == bad]) == 3 + 3, "a repeat is asked once"

    run(story)


@pytest.mark.parametrize("kind", ["503", "502", "504", "500", "reset"])
def test_a_prompt_that_makes_only_itself_fail_costs_nobody_else_anything(kind: str) -> None:
    bad = prompt(-1)

    def serve(_at: float, body: bytes) -> tuple[float, BackendError | None]:
        return (0.001, OUTAGES[kind]()) if body == bad else (0.05, None)

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": serve})
        good = asyncio.create_task(scene.traffic(10, 8))
        await asyncio.sleep(2)
        refused = await scene.send(bad, caller="one")
        await good
        assert refused.error is not None
        assert len(scene.failed) == 1
        assert max(each.seconds for each in scene.ended if each.error is None) < 1
        assert len([body for _, _, body in scene.calls if body == bad]) <= 7

    run(story)


@pytest.mark.parametrize("kind", ["503", "refused"])
@pytest.mark.parametrize("seconds", [4.0, 4.5])
def test_an_outage_that_ends_before_the_wait_does_costs_no_caller_an_error(kind: str, seconds: float) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out(kind, since=1, until=1 + seconds)})
        await scene.traffic(10, 8)
        assert not scene.failed

    run(story)


def test_without_a_retry_budget_a_short_outage_is_bridged_too() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", since=1, until=2)}, gateway_retry_budget=0)
        await scene.traffic(10, 5)
        assert not scene.failed

    run(story)


def test_two_bad_prompts_before_the_others_come_cost_nobody_else_anything() -> None:
    bad = {prompt(-1), prompt(-2)}

    def serve(_at: float, body: bytes) -> tuple[float, BackendError | None]:
        return (0.01, error_answer(500, b"{}", {})) if body in bad else (0.05, None)

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": serve})
        refused = [asyncio.create_task(scene.send(body, caller="one")) for body in bad]
        await asyncio.sleep(0.65)
        for number in range(4):
            good = await scene.send(prompt(number))
            assert good.error is None
            assert good.seconds < 0.1
        ended = await asyncio.gather(*refused)
        assert all(isinstance(each.error, ErrorAnswer) and each.seconds < 1.5 for each in ended)

    run(story)


def test_two_bad_prompts_between_good_ones_open_no_breaker_and_spoil_no_trial() -> None:
    bad = {prompt(-1), prompt(-2)}

    def serve(at: float, body: bytes) -> tuple[float, BackendError | None]:
        if body in bad or at < 1:
            return 0.001, error_answer(500 if body in bad else 503, b"{}", {})
        return 0.01, None

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": serve}, gateway_outage_wait=0, gateway_breaker_failures=3)
        for body in bad:
            await scene.send(body)
        await scene.send(prompt(1))
        assert scene.replicas["a-1"].breaker.state == "open"
        await asyncio.sleep(5.5)
        first, _ = bad
        assert isinstance((await scene.send(first, caller="another")).error, ErrorAnswer)
        assert (await scene.send(prompt(2))).error is None, "the next request tries"

    run(story)


def test_another_target_that_can_answer_is_asked_and_nobody_waits() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("refused", until=1e9), "b-1": out("503", until=0)})
        await scene.traffic(10, 5)
        assert not scene.failed
        assert max(each.seconds for each in scene.ended) < 1

    run(story)


def test_callers_who_leave_while_they_wait_leave_no_trace() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=3)})
        tasks = [asyncio.create_task(scene.send(prompt(number))) for number in range(20)]
        await asyncio.sleep(1.5)
        assert len(scene.admission.waiting) == 20
        for task in tasks[:19]:
            task.cancel()
        await asyncio.sleep(0.01)
        assert len(scene.admission.waiting) == 1
        assert (await tasks[19]).error is None
        scene.check_at_rest()

    run(story)


def test_a_stop_of_the_gateway_ends_all_waiting() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=30), "b-1": out("429", until=30)})
        tasks = [asyncio.create_task(scene.send(prompt(number))) for number in range(8)]
        await asyncio.sleep(0.9)
        scene.admission.drain()
        await asyncio.sleep(0.001)
        assert all(task.done() for task in tasks)
        assert all(isinstance(task.result().error, GatewayDraining) for task in tasks)
        scene.check_at_rest()

    run(story)


def test_those_who_wait_take_at_most_half_of_the_places() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=1e9)}, gateway_max_in_flight=20)
        tasks = [asyncio.create_task(scene.send(prompt(number))) for number in range(20)]
        await asyncio.sleep(2)
        assert len(scene.admission.waiting) == 10
        assert sum(task.done() for task in tasks) >= 9
        await asyncio.gather(*tasks)

    run(story)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["503", "refused", "500"])
def test_a_restart_of_one_replica_costs_no_request_an_error_that_it_alone_can_answer(kind: str, seed: int) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out(kind, since=1, until=4), "a-2": out(kind, until=0)}, seed=seed)
        others = asyncio.create_task(scene.traffic(20, 6))
        pinned = []
        for number in range(30):
            pinned.append(asyncio.create_task(scene.send(prompt(1000 + number), target=scene.only(1))))
            await asyncio.sleep(0.2)
        answered = await asyncio.gather(*pinned)
        await others
        assert not scene.failed
        assert {attempt.backend for each in answered for attempt in each.record.attempts} == {"a-1"}
        assert any(each.record.is_bridged for each in answered)
        assert not any(each.record.is_bridged for each in scene.ended if each not in answered)
        assert max(each.began + each.seconds for each in answered if each.began < 4) < 6

    run(story)


def test_an_outage_of_one_replica_that_lasts_ends_the_wait_for_it_and_holds_up_nobody_else() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("refused", since=1, until=60), "a-2": out("refused", until=0)})
        await asyncio.sleep(1)
        waited, *_ = await asyncio.gather(scene.send(prompt(1), target=scene.only(1)), scene.traffic(5, 8))
        assert isinstance(waited.error, Unreachable)
        assert waited.seconds == pytest.approx(5, abs=0.1)
        again = await scene.send(prompt(2), target=scene.only(1))
        assert (again.record.waits, again.seconds < 1) == ([], True), "an error at once"
        assert scene.failed == [waited, again]
        asked = [at for at in scene.calls_of("a-1") if at < 6.5]
        assert len(asked) < 20, "one trial at a time"

    run(story)


def test_who_waits_for_a_place_at_one_replica_holds_up_nobody_for_whom_another_is_free() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=0, answer=0.3), "a-2": out("503", until=0)})
        scene.limit(1)
        first = asyncio.create_task(scene.send(prompt(0), target=scene.only(1)))
        await asyncio.sleep(0.01)
        pinned = [asyncio.create_task(scene.send(prompt(number), target=scene.only(1))) for number in range(1, 4)]
        await asyncio.sleep(0.01)
        others = [await scene.send(prompt(10 + number)) for number in range(2)]
        assert [each.record.attempts[0].backend for each in others] == ["a-2", "a-2"]
        assert not any(task.done() for task in (first, *pinned))
        crowd = [asyncio.create_task(scene.send(prompt(20 + number))) for number in range(10)]
        await asyncio.gather(first, *pinned, *crowd)
        assert not scene.failed, "whoever comes too late for a place waits on"
        scene.check_at_rest()

    run(story)


def test_without_a_wait_failures_come_at_once() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=1)}, gateway_outage_wait=0)
        await scene.traffic(10, 1)
        assert len(scene.failed) >= 5
        assert max(each.seconds for each in scene.ended) < 0.6

    run(story)


def test_a_deadline_is_kept_while_waiting() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": out("503", until=1e9)})
        ended = await scene.send(prompt(1), deadline=3.0)
        assert ended.error is not None
        assert ended.seconds <= 3.0

    run(story)


def test_one_failure_among_successes_makes_nobody_wait() -> None:
    def flaky(_at: float, body: bytes) -> tuple[float, BackendError | None]:
        return (0.001, error_answer(503, b"{}", {})) if b'7"' in body and flaws.pop() else (0.1, None)

    flaws = [True, False] * 200

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": flaky})
        await scene.traffic(50, 4)
        assert not scene.failed
        assert not [each for each in scene.ended if each.record.waits]

    run(story)


async def held_by_a_thousand(scene: Scene) -> int:
    """Bytes that a thousand more requests take."""
    tracemalloc.start()
    try:
        before = tracemalloc.take_snapshot()
        tasks = [asyncio.create_task(scene.send(prompt(n), caller=f"caller {n}")) for n in range(1, 1001)]
        await asyncio.sleep(0.01)
        assert len(scene.admission.waiting) + scene.admission.queued >= 1000
        grown = sum(each.size_diff for each in tracemalloc.take_snapshot().compare_to(before, "filename"))
    finally:
        tracemalloc.stop()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks)
    return grown


def test_a_thousand_who_wait_cost_little_more_memory_than_a_thousand_in_the_queue() -> None:
    """0.5 KB each on Python 3.11, of 16 KB with the connection: what explains the wait, and one frame."""

    async def waiting(clock: Clock) -> int:
        scene = Scene(clock, {"a-1": out("503", until=1e9)}, gateway_max_in_flight=3000)
        first = asyncio.create_task(scene.send(prompt(0)))
        await asyncio.sleep(1)
        held = await held_by_a_thousand(scene)
        first.cancel()
        await asyncio.gather(first)
        scene.check_at_rest()
        return held

    async def queued(clock: Clock) -> int:
        scene = Scene(clock, {"a-1": lambda _at, _body: (100, None)}, gateway_max_in_flight=1)
        scene.admission._max_queue, scene.admission._queue_timeout = 2000, 50
        first = asyncio.create_task(scene.send(prompt(0)))
        await asyncio.sleep(1)
        held = await held_by_a_thousand(scene)
        first.cancel()
        await asyncio.gather(first)
        return held

    assert run(waiting) - run(queued) < 1000 * 800
