"""A failure must not draw traffic: two or three replicas, one of which fails fast, 20 requests a second for 10 s."""

import asyncio

import pytest

from gateway.errors import BackendError, ConnectionFailed, InvalidResponse, RateLimited, Unreachable
from tests.unit.gateway.fakes import Clock, error_answer
from tests.unit.gateway.scene import Scene, Server, prompt
from tests.unit.gateway.virtual import run

NO_MODEL = b'{"error": {"message": "The model `m` does not exist.", "code": "model_not_found"}}'
BY_NATURE = {
    "429 with Retry-After": lambda: error_answer(429, b"{}", {"retry-after": "30"}),
    "429": lambda: error_answer(429, b"{}", {}),
    "401": lambda: error_answer(401, b"{}", {}),
    "403": lambda: error_answer(403, b"{}", {}),
    "404 for the model": lambda: error_answer(404, NO_MODEL, {}),
    "404 of the path": lambda: error_answer(404, b"", {}),
    "503 with Retry-After": lambda: error_answer(503, b"{}", {"retry-after": "30"}),
}
ANYHOW = BY_NATURE | {
    "500": lambda: error_answer(500, b"{}", {}),
    "503": lambda: error_answer(503, b"{}", {}),
    "refused": lambda: Unreachable("no"),
    "reset": lambda: ConnectionFailed("no"),
    "garbage": lambda: InvalidResponse("no"),
    "408": lambda: error_answer(408, b"{}", {}),
}


def well(_at: float, _body: bytes) -> tuple[float, BackendError | None]:
    return 0.4, None


def failing(kind: str) -> Server:
    return lambda _at, _body: (0.001, ANYHOW[kind]())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ANYHOW)
def test_beside_a_well_replica_a_failing_one_costs_at_most_2_of_200_callers(kind: str, seed: int) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": failing(kind), "a-2": well}, seed=seed)
        await scene.traffic(20, 10)
        assert len(scene.failed) <= 2
        assert not [each for each in scene.failed if getattr(each.error, "status", 0) == 503]
        assert max(each.seconds for each in scene.ended if each.error is None) < 1
        if kind in BY_NATURE:
            assert len(scene.calls_of("a-1")) <= 10

    run(story)


@pytest.mark.parametrize("kind", ["500", "503", "garbage", "408"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_a_replica_that_fails_two_of_three_calls_at_once_draws_no_traffic_either(kind: str, replicas: int) -> None:
    calls = 0

    def flaky(_at: float, _body: bytes) -> tuple[float, BackendError | None]:
        nonlocal calls
        calls += 1
        return (0.4, None) if calls % 3 == 0 else (0.001, ANYHOW[kind]())

    async def story(clock: Clock) -> None:
        wells = {f"a-{number + 2}": well for number in range(replicas)}
        scene = Scene(clock, {"a-1": flaky, **wells})
        await scene.traffic(20, 10)
        assert len(scene.failed) <= 4

    run(story)


@pytest.mark.parametrize("kind", ["401", "404 for the model", "404 of the path"])
def test_a_replica_that_refuses_every_model_draws_no_traffic_with_new_ones(kind: str) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": failing(kind), "a-2": well})
        tasks = []
        for number in range(200):
            tasks.append(asyncio.create_task(scene.send(prompt(number, f"model-{number}"))))
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
        assert len(scene.failed) <= 2

    run(story)


@pytest.mark.parametrize("kind", ["500", "garbage"])
def test_the_same_body_from_everybody_draws_no_traffic_to_the_replica_that_fails_it(kind: str) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": failing(kind), "a-2": well})
        await scene.traffic(20, 10, same_body=True)
        assert len(scene.failed) <= 2
        assert len(scene.calls_of("a-1")) <= 20

    run(story)


@pytest.mark.parametrize("kind", ["429 with Retry-After", "429"])
def test_one_limited_of_three_costs_nobody_an_answer(kind: str) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": failing(kind), "a-2": well, "a-3": well})
        await scene.traffic(24, 10)
        assert len(scene.failed) <= 3

    run(story)


def test_with_all_replicas_limited_each_caller_gets_429_with_the_true_retry_after() -> None:
    async def story(clock: Clock) -> None:
        limited = failing("429 with Retry-After")
        scene = Scene(clock, {"a-1": limited, "a-2": limited})
        await scene.traffic(20, 5)
        assert len(scene.failed) == 100
        assert len(scene.calls) == 2, "no more than once per cooldown"
        for each in scene.failed:
            assert isinstance(each.error, BackendError) == bool(each.record.attempts)
            assert getattr(each.error, "status", 0) == 429
            if not each.record.attempts:
                left = 30 - each.began
                assert getattr(each.error, "code", "") == "backend_rate_limited"
                assert getattr(each.error, "retry_after", 0) == pytest.approx(left, abs=0.1)

    run(story)


def test_with_all_replicas_limited_for_a_short_time_each_caller_waits() -> None:
    def limited(at: float, _body: bytes) -> tuple[float, BackendError | None]:
        return (0.001, error_answer(429, b"{}", {"retry-after": str(4 - int(at))})) if at < 4 else (0.1, None)

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": limited, "a-2": limited})
        await scene.traffic(20, 6)
        assert not scene.failed
        assert len([at for at, _, _ in scene.calls if at < 4]) <= 4
        assert max(each.began + each.seconds for each in scene.ended if each.began < 4) < 5

    run(story)


def test_a_limited_model_takes_no_other_down_but_a_second_one_takes_the_replica() -> None:
    limited = {b'"x"', b'"y"'}

    def by_model(_at: float, body: bytes) -> tuple[float, BackendError | None]:
        if any(name in body for name in limited):
            return 0.001, error_answer(429, b"{}", {"retry-after": "30"})
        return 0.01, None

    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": by_model})
        assert isinstance((await scene.send(prompt(1, "x"))).error, RateLimited)
        assert (await scene.send(prompt(2, "z"))).error is None
        assert isinstance((await scene.send(prompt(3, "y"))).error, RateLimited)
        refused = await scene.send(prompt(4, "z"))
        assert getattr(refused.error, "code", "") == "backend_rate_limited"
        assert len(scene.calls) == 3

    run(story)


def test_the_request_of_a_failed_trial_goes_to_another_replica_off_the_budget() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(
            clock, {"a-1": failing("garbage"), "a-2": well}, gateway_retry_floor=10, gateway_breaker_failures=1
        )
        await scene.traffic(2, 60)
        assert len(scene.failed) <= 2
        assert scene.calls_of("a-1")[-1] > 20, "it was tried again"

    run(story)


def test_a_full_backend_has_a_queue_of_its_own() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": lambda _at, _body: (0.5, None)}, gateway_queue_timeout=2)
        scene.limit(2)
        tasks = [asyncio.create_task(scene.send(prompt(number))) for number in range(12)]
        ended = await asyncio.gather(*tasks)
        answered = [number for number, each in enumerate(ended) if each.error is None]
        assert answered == list(range(8)), "two at a time, in order, within two seconds"
        assert {getattr(each.error, "reason", None) for each in ended[8:]} == {"backend_full"}
        assert [wait.kind for wait in ended[5].record.waits] == ["full"]
        scene.check_at_rest()

    run(story)


def test_a_full_backend_sends_its_requests_to_the_next_target() -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": lambda _at, _body: (0.5, None), "b-1": well})
        scene.limit(1)
        ended = await asyncio.gather(*(scene.send(prompt(number)) for number in range(2)))
        assert [name for _, name, _ in scene.calls] == ["a-1", "b-1"]
        assert [each.error for each in ended] == [None, None]

    run(story)
