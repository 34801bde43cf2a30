"""A route's guard: a bad target with a weight loses its traffic, which is told; nobody else does, no caller sees it."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from gateway.policy.guard import Counts
from gateway.workers.answers import Answers
from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH, EMBEDDINGS_PATH, MESSAGES_PATH, RESPONSES_PATH, prompt
from testkit.exposition import Exposition
from testkit.http import Answer
from testkit.polling import until
from tests.integration.gateways import Gateway, StartGateway, StartMock, config, get, patient

MANY = 80
"""Requests of a test, half of them for each target: more than twice what a guard asks for."""
BAD: list[dict[str, Any]] = [{"kind": "status", "with": {"status": 500}}]


@pytest.fixture
def start_gateway(start_gateway: StartGateway) -> StartGateway:
    return patient(start_gateway)


class Rollout:
    """A gateway with the backends `old` and `new`, each of weight 1, and a guard; calls have texts of their own."""

    def __init__(self, gateway: Gateway, old: MockModel, new: MockModel) -> None:
        self.gateway = gateway
        self.old = old
        self.new = new
        self._sent = 0
        gateway.parts.pool.routes[0]._rng.seed(1)

    async def send(self, number: int = MANY, *, path: str = CHAT_PATH, stream: bool = False) -> list[Answer]:
        """Send so many calls, one after the other."""
        return [await self._send(path, stream=stream) for _ in range(number)]

    async def _send(self, path: str, *, stream: bool) -> Answer:
        self._sent += 1
        body = prompt(path, f"text {self._sent}") | ({"stream": True} if stream else {})
        async with self.gateway.client.post(path, json=body) as response:
            return await Answer.of(response)

    async def guards(self) -> list[dict[str, Any]]:
        """Of `/health`."""
        guards: list[dict[str, Any]] = (await self.gateway.health())["downstream"]["guards"]
        return guards

    async def tripped(self) -> list[str]:
        """The backends that lost their traffic: `/health` and `/metrics` agree."""
        self.gateway.parts.telemetry.metrics.max_age = 0
        metrics = Exposition.parse(await self.gateway.metrics())
        names = [guard["backend"] for guard in await self.guards() if guard["tripped"]]
        assert {name: metrics.value("gateway_guard_tripped", route="demo-model", backend=name) for name in
                ("old", "new")} == {name: float(name in names) for name in ("old", "new")}  # fmt: skip
        return names

    def counts(self, backend: str) -> Counts:
        """What was counted of a target."""
        return next(watch.counts for watch in self.gateway.parts.pool.routes[0].watches if watch.backend == backend)


@pytest.fixture
async def rollout(start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path) -> Rollout:
    return await start_rollout(start_mock, start_gateway, tmp_path)


async def start_rollout(
    start_mock: StartMock,
    start_gateway: StartGateway,
    folder: Path,
    *,
    silent_after: float = 3600,
    **settings: Any,  # noqa: ANN401
) -> Rollout:
    """Breakers stay closed unless `settings` say otherwise: they are not what is asked here."""
    old, new = await start_mock(), await start_mock()
    backends: dict[str, dict[str, Any]] = {
        "old": {"url": old.url, "probe": False},
        "new": {"url": new.url, "probe": False},
    }
    backends["new"]["timeouts"] = {"first_token": silent_after}
    route = {
        "model": "demo-model",
        "targets": [{"backend": "old", "weight": 1}, {"backend": "new", "model": "canary", "weight": 1}],
        "guard": {"min_requests": 20, "window": 3600},
    }
    file = config(folder, json.dumps({"backends": backends, "routes": [route]}))
    defaults = {"gateway_breaker_failures": 1000, "gateway_max_attempts": 1}
    return Rollout(await start_gateway(gateway_config=file, **(defaults | settings)), old, new)


def statuses(answers: list[Answer]) -> set[int]:
    return {answer.status for answer in answers}


FAULTS: dict[str, dict[str, Any]] = {
    "500": {"kind": "status", "with": {"status": 500}},
    "503": {"kind": "status", "with": {"status": 503}},
    "reset": {"kind": "reset"},
    "no JSON": {"kind": "not_json"},
}


@pytest.mark.parametrize("path", [CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH, EMBEDDINGS_PATH])
@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_target_loses_its_traffic_and_no_caller_sees_it(rollout: Rollout, fault: str, path: str) -> None:
    assert await rollout.tripped() == []
    rollout.new.set_faults([FAULTS[fault]])

    assert statuses(await rollout.send(path=path)) == {200}
    assert await rollout.tripped() == ["new"]
    asked = rollout.new.journal.total
    assert asked == 20

    assert statuses(await rollout.send(path=path)) == {200}
    assert rollout.new.journal.total == asked
    assert rollout.old.journal.total == 2 * MANY


@pytest.mark.parametrize(
    "fault",
    [{"kind": "hang_after_headers"}, {"kind": "error_event", "with": {"after_events": 0}}],
    ids=lambda fault: fault["kind"],
)
async def test_a_target_whose_streams_fail_before_their_first_token_loses_its_traffic(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path, fault: dict[str, Any]
) -> None:
    rollout = await start_rollout(start_mock, start_gateway, tmp_path, silent_after=0.05)
    rollout.new.set_faults([fault])

    answers = await rollout.send(stream=True)
    assert [answer.status for answer in answers if b"[DONE]" not in answer.body] == []
    assert await rollout.tripped() == ["new"]


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_a_target_whose_streams_break_off_loses_its_traffic(rollout: Rollout, how: str) -> None:
    rollout.new.set_faults([{"kind": "cut", "with": {"after_events": 4, "how": how}}])
    answers = []
    while await rollout.tripped() == []:
        answers += await rollout.send(1, stream=True)
        assert len(answers) < MANY
    assert sum(b"[DONE]" not in answer.body for answer in answers) == rollout.new.journal.total == 20

    answers = await rollout.send(stream=True)
    assert {b"[DONE]" in answer.body for answer in answers} == {True}


async def test_some_failures_in_a_hundred_are_enough_and_fewer_are_not(rollout: Rollout) -> None:
    rollout.new.set_faults([BAD[0] | {"times": 2}])
    await rollout.send(2 * MANY)
    assert await rollout.tripped() == []  # 2 of about 80
    assert rollout.counts("new").first_failed == 2

    rollout.new.set_faults([BAD[0] | {"times": 5}])
    await rollout.send()
    assert await rollout.tripped() == ["new"]


async def test_the_trip_is_told_in_log_health_trace_and_metrics(
    rollout: Rollout, caplog: pytest.LogCaptureFixture
) -> None:
    before = (await rollout.gateway.health())["downstream"]
    assert [(guard["backend"], guard["tripped"]) for guard in before["guards"]] == [("old", False), ("new", False)]
    rollout.new.set_faults(BAD)
    with caplog.at_level(logging.WARNING, logger="gateway"):
        await rollout.send()

    (line,) = [record.getMessage() for record in caplog.records if "GUARD" in record.getMessage()]
    assert line.startswith(
        "GUARD TRIPPED: route demo-model: new (canary) has lost its traffic to the other targets: 100.0 % of its first"
        " attempts failed (20 requests in 3600 s; allowed: 5 %)."
    )
    rollout.new.set_faults([])
    await until(lambda: rollout.gateway.parts.pool.replicas[0].status == "ok")
    document = await rollout.gateway.health()
    assert (document["status"], document["downstream"]["status"]) == ("degraded", "degraded")
    old, new = document["downstream"]["guards"]
    assert old["error_rate"] == 0
    assert new.pop("tripped_seconds_ago") >= 0
    assert new == {
        "route": "demo-model",
        "backend": "new",
        "model": "canary",
        "tripped": True,
        "requests": 20,
        "error_rate": 1.0,
    }
    assert (await get(rollout.gateway, "/health")).status == 200
    await rollout.send(1)
    await rollout.gateway.client.close()
    events = [event for span in rollout.gateway.spans() for event in span.events]
    (trip,) = [dict(event.attributes or {}) for event in events if event.name == "gateway.guard_tripped"]
    assert trip == {"gateway.backend": "new"}
    drawn: list[dict[str, Any]] = [
        dict(event.attributes or {}) for event in events if event.name == "gateway.target_drawn"
    ]
    assert "gateway.tripped" not in drawn[0]
    assert drawn[-1] == {
        "gateway.backend": "old",
        "gen_ai.request.model": "demo-model",
        "gateway.weight": 1,
        "gateway.tripped": ["new (canary)"],
    }
    *_, last = [json.loads(line) for line in rollout.gateway.log.getvalue().splitlines() if '"drawn"' in line]
    assert last["drawn"] == {"backend": "old", "model": "demo-model", "weight": 1, "tripped": ["new (canary)"]}


async def test_metrics_tell_targets_apart_also_of_one_backend(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    targets = [{"backend": "a", "weight": 1}, {"backend": "a", "model": "canary", "weight": 1}]
    route = {"model": "demo-*", "targets": targets, "guard": {"window": 3600}}
    file = config(tmp_path, json.dumps({"backends": {"a": {"url": mock.url}}, "routes": [route]}))
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1, gateway_breaker_failures=1000)
    gateway.parts.telemetry.metrics.max_age = 0
    labels = {"route": "demo-*", "backend": "a"}
    metrics = Exposition.parse(await gateway.metrics())
    for model in ("demo-*", "canary"):
        assert metrics.value("gateway_target_attempts_total", **labels, model=model, outcome="ok") == 0
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "match": {"model": "canary"}}])
    for number in range(MANY):
        answer = await gateway.chat(
            model="demo-s3cret", messages=[{"role": "user", "content": f"{number}"}], stream=True
        )
        assert answer.status == 200

    text = await gateway.metrics()
    metrics = Exposition.parse(text)
    assert "s3cret" not in text
    models = [call.model for call in mock.journal.calls]
    assert (models.count("canary"), models.count("demo-s3cret")) == (20, MANY)
    assert metrics.value("gateway_target_attempts_total", **labels, model="canary", outcome="status_500") == 20
    assert metrics.value("gateway_target_attempts_total", **labels, model="demo-*", outcome="ok") == MANY
    for name in ("gateway_target_duration_seconds_count", "gateway_target_first_token_seconds_count"):
        assert metrics.value(name, **labels, model="demo-*") == MANY
        assert f'{name}{{backend="a",model="canary"' not in text
    assert metrics.value("gateway_guard_tripped", **labels) == 1


async def test_a_target_that_fails_every_time_loses_its_traffic_while_its_breaker_is_open(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    rollout = await start_rollout(
        start_mock, start_gateway, tmp_path, gateway_breaker_failures=5, gateway_breaker_open_seconds=3600,
        gateway_breaker_open_max=3600,
    )  # fmt: skip
    rollout.new.set_faults(BAD)

    assert statuses(await rollout.send()) == {200}
    assert rollout.new.journal.total == 5
    assert await rollout.tripped() == ["new"]
    assert (await rollout.guards())[1]["requests"] == 20


@pytest.mark.parametrize("status", [400, 413, 422, 429])
async def test_what_no_breaker_counts_trips_no_guard(rollout: Rollout, status: int) -> None:
    headers = {"retry-after-ms": "1"} if status == 429 else {}
    rollout.new.set_faults([{"kind": "status", "with": {"status": status, "headers": headers}}])
    await rollout.send()

    assert await rollout.tripped() == []
    assert rollout.counts("new").first >= 20
    assert rollout.counts("new").first_failed == 0


async def test_one_prompt_that_is_answered_500_trips_no_guard(rollout: Rollout) -> None:
    rollout.new.set_faults(BAD)
    for _ in range(MANY):
        assert (await rollout.gateway.chat()).status == 200

    assert await rollout.tripped() == []
    assert rollout.counts("new").first_failed == 1
    assert rollout.new.journal.total > 20


async def test_a_fault_that_all_targets_share_trips_no_guard(rollout: Rollout) -> None:
    for mock in (rollout.old, rollout.new):
        mock.set_faults([BAD[0] | {"rate": 0.3}])
    await rollout.send(3 * MANY)

    counts = [rollout.counts(name) for name in ("old", "new")]
    assert min(count.first for count in counts) >= 60
    assert min(count.error_rate for count in counts) > 0.05
    assert await rollout.tripped() == []


async def test_a_target_without_traffic_still_answers_what_the_others_cannot(rollout: Rollout) -> None:
    rollout.new.set_faults(BAD)
    await rollout.send()
    assert await rollout.tripped() == ["new"]
    rollout.new.set_faults([])
    rollout.old.set_faults(BAD)
    answers = await rollout.send()

    assert statuses(answers) == {200}
    assert {answer.headers["x-gateway-backend"] for answer in answers} == {"new"}
    assert await rollout.tripped() == ["new"]


async def test_a_target_has_its_traffic_again_with_the_next_generation_and_not_before(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    rollout = await start_rollout(start_mock, start_gateway, tmp_path)
    parts, file = rollout.gateway.parts, tmp_path / "gateway.yaml"
    rollout.new.set_faults(BAD)
    await rollout.send()
    assert await rollout.tripped() == ["new"]
    rollout.new.set_faults([])
    await parts.reload._load(asked=True)
    assert parts.generations.current.number == 1  # the same again is no new one
    assert await rollout.tripped() == ["new"]

    file.write_text(file.read_text().replace('"canary", "weight": 1', '"canary-2", "weight": 2'))
    parts.reload.ask()
    await until(lambda: parts.generations.current.number == 2)
    assert await rollout.tripped() == []
    asked = rollout.new.journal.total
    parts.pool.routes[0]._rng.seed(1)
    await rollout.send()

    assert rollout.new.journal.total > asked + 20
    assert {call.model for call in list(rollout.new.journal.calls)[asked:]} == {"canary-2"}
    assert (await rollout.guards())[1]["requests"] == rollout.new.journal.total - asked
    text = await rollout.gateway.metrics()
    assert 'model="canary"' not in text
    assert Exposition.parse(text).value("gateway_target_attempts_total", model="canary-2", outcome="ok") > 20


async def test_a_route_without_a_guard_leaves_everybody_their_traffic(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    old, new = await start_mock(), await start_mock()
    targets = [{"backend": "old", "weight": 1}, {"backend": "new", "weight": 1}]
    document = {
        "backends": {"old": {"url": old.url}, "new": {"url": new.url}},
        "routes": [{"model": "demo-model", "targets": targets}],
    }
    gateway = await start_gateway(
        gateway_config=config(tmp_path, json.dumps(document)), gateway_breaker_failures=1000, gateway_max_attempts=1
    )
    rollout = Rollout(gateway, old, new)
    new.set_faults(BAD)
    await rollout.send()
    asked = new.journal.total
    await rollout.send()

    assert new.journal.total > asked > 20
    assert await rollout.guards() == []
    assert "gateway_guard_tripped{" not in await gateway.metrics()


async def test_what_a_worker_is_told_of_a_trip_holds_with_the_same_configuration_alone(rollout: Rollout) -> None:
    answers = Answers(rollout.gateway.parts)
    trip = ["demo-model", ["new (canary)", 0.5, 40, 7.0]]
    await answers.to("hint", ["guard", "another", *trip])
    assert await rollout.tripped() == []

    await answers.to("hint", ["guard", rollout.gateway.parts.generations.current.fingerprint, *trip])
    assert await rollout.tripped() == ["new"]
    (guard,) = [each for each in await rollout.guards() if each["tripped"]]
    assert (guard["requests"], guard["error_rate"], guard["tripped_seconds_ago"] >= 7) == (40, 0.5, True)
