"""A stored response whose home is not known is nowhere only when every replica that may know it has said so."""

import asyncio
from collections.abc import Callable

import pytest

from gateway.errors import (
    BackendError,
    BackendFull,
    BackendRateLimited,
    BackendUnavailable,
    NoSuchResponse,
    Refusal,
    Silent,
    Unreachable,
)
from tests.unit.gateway.fakes import Clock, error_answer, trip
from tests.unit.gateway.scene import Ended, Scene, Server, prompt
from tests.unit.gateway.virtual import run

ID = "resp_1"


def says(failure: Callable[[], BackendError] | None = None, *, until: float = 1000.0, answer: float = 0.05) -> Server:
    """A server that fails until some instant, and then answers."""

    def serve(at: float, _body: bytes) -> tuple[float, BackendError | None]:
        return (0.001, failure()) if failure is not None and at < until else (answer, None)

    return serve


def not_here() -> BackendError:
    return NoSuchResponse(404, b"{}", {})


def search(servers: dict[str, Server], before: Callable[[Scene], None] = lambda _scene: None) -> tuple[Ended, Scene]:
    """Send one request that goes on from a response that nobody has made here."""
    found: list[tuple[Ended, Scene]] = []

    async def story(clock: Clock) -> None:
        scene = Scene(clock, servers)
        before(scene)
        found.append((await scene.send(prompt(1), previous=ID), scene))
        scene.check_at_rest()

    run(story)
    return found[0]


def test_where_all_say_that_they_do_not_know_it_that_is_the_answer() -> None:
    ended, scene = search({f"{name}-{number}": says(not_here) for name in "ab" for number in range(1, 6)})
    assert isinstance(ended.error, NoSuchResponse)
    assert sorted(name for _, name, _ in scene.calls) == sorted(replica.name for replica in scene.pool.replicas)
    assert not ended.record.waits


@pytest.mark.parametrize("without", ["a-1", "a-2", "b-1"])
def test_a_server_that_stores_no_responses_knows_none(without: str) -> None:
    servers = {name: says(not_here) for name in ("a-1", "a-2", "b-1")}
    ended, scene = search(servers | {without: says(lambda: error_answer(404, b"", {}))})
    assert isinstance(ended.error, NoSuchResponse)
    assert len(scene.calls) == 3


@pytest.mark.parametrize("home", ["a-1", "a-2", "b-1"])
def test_one_that_is_not_asked_since_its_breaker_is_open_may_know_it(home: str) -> None:
    servers = {name: says(not_here) for name in ("a-1", "a-2", "b-1")}
    ended, scene = search(servers, lambda scene: trip(next(r for r in scene.pool.replicas if r.name == home)))
    assert isinstance(ended.error, BackendUnavailable)
    assert ended.error.retry_after
    assert ended.error.retry_after > 1
    assert sorted(name for _, name, _ in scene.calls) == sorted(servers.keys() - {home})
    assert ended.record.attempt.decision == "gave up: breaker"


@pytest.mark.parametrize("home", ["a-1", "b-1"])
@pytest.mark.parametrize("seconds", [0.5, 60])
def test_one_that_cools_is_waited_for_or_said_to_be_limited(home: str, seconds: float) -> None:
    def cool(scene: Scene) -> None:
        replica = next(each for each in scene.pool.replicas if each.name == home)
        replica.cooldown.begin("m", seconds, replica.clock())

    servers = {"a-1": says(not_here), "a-2": says(not_here), "b-1": says(not_here)} | {home: says()}
    ended, scene = search(servers, cool)
    if seconds < 1:
        assert (ended.error, ended.record.attempt.backend, len(scene.calls)) == (None, home, 3)
        assert scene.pool.replicas[0].budget.left() == scene.pool.replicas[1].budget.left(), "a search costs no budget"
    else:
        assert isinstance(ended.error, BackendRateLimited)
        assert ended.error.retry_after == pytest.approx(60, abs=0.1)


@pytest.mark.parametrize("seconds", [0.3, 50])
def test_one_that_is_full_is_waited_for_as_long_as_others_wait(seconds: float) -> None:
    async def story(clock: Clock) -> None:
        scene = Scene(clock, {"a-1": says(answer=seconds), "a-2": says(not_here)})
        scene.limit(1)
        first = asyncio.create_task(scene.send(prompt(0), target=scene.only(1)))
        await asyncio.sleep(0.1)
        ended = await scene.send(prompt(1), previous=ID)
        if seconds < 1:
            assert (ended.error, ended.record.attempt.backend) == (None, "a-1")
        else:
            assert isinstance(ended.error, BackendFull)
        assert (await first).error is None

    run(story)


@pytest.mark.parametrize("home", ["a-1", "a-2", "b-1"])
def test_the_outage_of_one_that_may_know_it_is_bridged(home: str) -> None:
    servers = {name: says(not_here) for name in ("a-1", "a-2", "b-1")}
    ended, scene = search(servers | {home: says(lambda: Unreachable("no"), until=3)})
    assert (ended.error, ended.record.attempt.backend) == (None, home)
    assert [len(scene.calls_of(name)) for name in servers if name != home] == [1, 1]


@pytest.mark.parametrize("home", ["a-1", "a-2", "b-1"])
@pytest.mark.parametrize(
    "failure",
    [
        lambda: Unreachable("no"),
        lambda: Silent("no", timer="answer"),
        lambda: error_answer(401, b"{}", {}),
        lambda: error_answer(500, b"{}", {}),
        lambda: error_answer(429, b"{}", {"retry-after": "60"}),
    ],
)
def test_the_failure_of_one_that_may_know_it_is_the_answer(home: str, failure: Callable[[], BackendError]) -> None:
    servers = {name: says(not_here) for name in ("a-1", "a-2", "b-1")}
    ended, scene = search(servers | {home: says(failure)})
    assert type(ended.error) is type(failure())
    assert [len(scene.calls_of(name)) for name in servers if name != home] == [1, 1]
    of_failure = ended.record.failed_by or ended.record.attempt
    assert of_failure.backend == home


def test_what_a_replica_said_last_counts() -> None:
    first = iter([error_answer(500, b"{}", {})])

    def serve(_at: float, _body: bytes) -> tuple[float, BackendError | None]:
        return 0.001, next(first, not_here())

    ended, scene = search({"a-1": serve, "a-2": says(not_here)})
    assert isinstance(ended.error, NoSuchResponse)
    assert (len(scene.calls_of("a-1")), len(scene.calls_of("a-2"))) == (2, 1)


def test_a_search_with_nobody_left_to_ask_says_when_to_come_again() -> None:
    servers = {"a-1": says(not_here), "a-2": says(not_here)}

    def trip_all(scene: Scene) -> None:
        for replica in scene.pool.replicas:
            trip(replica)

    ended, scene = search(servers, trip_all)
    assert (isinstance(ended.error, Refusal), scene.calls) == (True, [])
