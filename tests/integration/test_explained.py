"""Every answer explains itself, and `/health` tells how each backend is."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import RawCall, raw_backends
from tests.integration.gateways import Gateway, StartGateway, StartMock, soon
from tests.integration.wire import dial, post

QUICK = {"gateway_backoff_initial": 0.01, "gateway_backoff_max": 0.01}
HANG = {"kind": "hang_before_headers"}
PART = re.compile(r'(?P<name>[a-z]+(?:-\d+)?)(?:;desc="(?P<desc>[^"\\]*)")?;dur=(?P<dur>\d+\.\d)')
FAILED = {"kind": "status", "with": {"status": 500}}


class Timing:
    """A `server-timing` header, taken apart.

    Attributes:
        parts: name and description of each part, in order.
        seconds: by name.
    """

    def __init__(self, answer: Answer) -> None:
        found = [PART.fullmatch(part) for part in answer.headers["server-timing"].split(", ")]
        assert None not in found, answer.headers["server-timing"]
        matches = [match for match in found if match is not None]
        self.parts = [(match["name"], match["desc"]) for match in matches]
        self.seconds = {match["name"]: float(match["dur"]) / 1000 for match in matches}
        assert len(self.seconds) == len(self.parts), "a name stands for one part"


def assert_explained(answer: Answer, parts: list[tuple[str, str | None]], *, backend: str | None) -> Timing:
    """The headers tell exactly these parts, how many of them are attempts, and who answered."""
    timing = Timing(answer)
    assert timing.parts == [("queue", None), *parts]
    assert answer.headers["x-gateway-attempts"] == str(sum(name.startswith("attempt-") for name, _ in parts))
    assert answer.headers.get("x-gateway-backend") == backend
    assert re.fullmatch("[0-9a-f]{32}", answer.headers["x-trace-id"])
    assert answer.headers["x-request-id"]
    return timing


def status(number: int, *, times: int, **headers: str) -> dict[str, Any]:
    """A fault."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"kind": "status", "with": {"status": number, "headers": named}, "times": times}


def fallback(folder: Path, primary: str, secondary: str) -> Path:
    """The configuration of two targets."""
    file = folder / "gateway.yaml"
    backends = {"primary": {"url": primary}, "secondary": {"url": secondary}}
    routes = [{"model": "*", "targets": [{"backend": "primary"}, {"backend": "secondary"}]}]
    file.write_text(json.dumps({"backends": backends, "routes": routes}))
    return file


# Attempts, sleeps, queue


async def test_a_plain_success(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "latency", "with": {"delay": 0.1}}])
    answer = await gateway.chat()
    assert answer.status == 200
    timing = assert_explained(answer, [("attempt-1", "backend-1 ok")], backend="backend-1")
    assert timing.seconds["queue"] == 0
    assert 0.1 <= timing.seconds["attempt-1"] < 10


@pytest.mark.parametrize("stream", [False, True], ids=["unstreamed", "streamed"])
async def test_a_success_after_failures(mock: MockModel, start_gateway: StartGateway, *, stream: bool) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([status(429, times=1, retry_after_ms="200"), status(503, times=1, retry_after_ms="100")])
    answer = await gateway.chat(stream=stream)
    assert answer.status == 200
    timing = assert_explained(
        answer,
        [
            ("attempt-1", "backend-1 status_429"),
            ("cooldown-1", "backend"),
            ("attempt-2", "backend-1 status_503"),
            ("cooldown-2", "backend"),
            ("attempt-3", f"backend-1 {'streaming' if stream else 'ok'}"),
        ],
        backend="backend-1",
    )
    assert 0.15 <= timing.seconds["cooldown-1"] < 10
    assert 0.05 <= timing.seconds["cooldown-2"] < 10
    first, second, third = [call.time for call in mock.journal.calls]
    assert second - first >= 0.2
    assert third - second >= 0.1
    assert mock.journal.total == 3


async def test_a_stream_whose_headers_came_names_the_backend(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_first_token_timeout=1)
    mock.set_faults([{"kind": "hang_after_headers"}])
    answer = await gateway.chat(stream=True)
    assert answer.status == 504
    assert_explained(answer, [("attempt-1", "backend-1 first_token_timeout")], backend="backend-1")


async def test_a_stream_that_was_held_has_an_outcome(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([{"kind": "cut", "with": {"after_events": 4}, "times": 1}])
    answer = await gateway.chat(stream=True, headers={"x-gateway-commit": "complete"})
    assert answer.status == 200
    timing = Timing(answer)
    assert timing.parts[1] == ("attempt-1", "backend-1 invalid_response")
    assert timing.parts[-1][0] == "attempt-2"
    assert answer.headers["x-gateway-attempts"] == "2"
    assert mock.journal.total == 2


@pytest.mark.parametrize(
    ("fault", "outcome", "backend"),
    [
        (FAILED, "status_500", "backend-1"),
        ({"kind": "not_json"}, "invalid_response", "backend-1"),
        ({"kind": "short_body"}, "invalid_response", "backend-1"),
        ({"kind": "reset"}, "connection_error", None),
    ],
    ids=["500", "not JSON", "cut", "reset"],
)
async def test_a_failure_after_all_attempts(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], outcome: str, backend: str | None
) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([fault])
    answer = await gateway.chat()
    assert answer.status >= 500
    told = f"backend-1 {outcome}"
    assert_explained(
        answer,
        [("attempt-1", told), ("backoff-1", None), ("attempt-2", told), ("backoff-2", None), ("attempt-3", told)],
        backend=backend,
    )
    assert mock.journal.total == 3


@pytest.mark.parametrize(
    ("fault", "code", "outcome", "backend"),
    [
        (HANG, 504, "answer_timeout", None),
        ({"kind": "stall"}, 504, "idle_timeout", "backend-1"),
        ({"kind": "status", "with": {"status": 401}}, 502, "auth_error", "backend-1"),
        ({"kind": "status", "with": {"status": 422}}, 422, "status_422", "backend-1"),
    ],
    ids=["silent", "stalled", "401", "422"],
)
async def test_a_failure_that_is_not_tried_again(
    mock: MockModel,
    start_gateway: StartGateway,
    fault: dict[str, Any],
    code: int,
    *,
    outcome: str,
    backend: str | None,
) -> None:
    gateway = await start_gateway(mock, **soon(fault["kind"], stream=False))
    mock.set_faults([fault])
    answer = await gateway.chat()
    assert answer.status == code
    timing = assert_explained(answer, [("attempt-1", f"backend-1 {outcome}")], backend=backend)
    if backend is None:
        assert timing.seconds["attempt-1"] >= 0.3
    assert mock.journal.total == 1


async def test_the_deadline(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([HANG])
    answer = await gateway.chat(headers={"x-request-timeout": "3"})
    assert answer.error["code"] == "deadline_exceeded"
    assert_explained(answer, [("attempt-1", "backend-1 deadline_exceeded")], backend=None)


async def test_a_dead_connection_and_its_repetition_are_two_attempts(start_gateway: StartGateway) -> None:
    async def play(call: RawCall) -> None:
        if call.turn == 2:
            call.close()
        else:
            await call.answer()

    async with raw_backends() as start_raw:
        backend = await start_raw(play)
        gateway = await start_gateway(backend.url)
        assert_explained(await gateway.chat(), [("attempt-1", "backend-1 ok")], backend="backend-1")
        answer = await gateway.chat()
        assert answer.status == 200
        parts: list[tuple[str, str | None]] = [
            ("attempt-1", "backend-1 stale_connection"),
            ("attempt-2", "backend-1 ok"),
        ]
        assert_explained(answer, parts, backend="backend-1")
        assert [call.turn for call in backend.calls] == [1, 2, 1]


async def test_a_fallback_names_who_answered(
    tmp_path: Path, start_mock: StartMock, start_gateway: StartGateway
) -> None:
    first, second = await start_mock(), await start_mock()
    file = fallback(tmp_path, first.url, second.url)
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1)
    first.set_faults([FAILED])
    answer = await gateway.chat()
    assert answer.status == 200
    parts: list[tuple[str, str | None]] = [("attempt-1", "primary status_500"), ("attempt-2", "secondary ok")]
    assert_explained(answer, parts, backend="secondary")
    assert (first.journal.total, second.journal.total) == (1, 1)


async def test_nobody_is_named_when_the_last_one_did_not_answer(
    tmp_path: Path, start_mock: StartMock, start_gateway: StartGateway
) -> None:
    first, second = await start_mock(), await start_mock()
    file = fallback(tmp_path, first.url, second.url)
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1)
    first.set_faults([FAILED])
    second.die()
    answer = await gateway.chat()
    assert answer.error["code"] == "backend_connection_error"
    parts: list[tuple[str, str | None]] = [
        ("attempt-1", "primary status_500"),
        ("attempt-2", "secondary connection_error"),
    ]
    assert_explained(answer, parts, backend=None)


@asynccontextmanager
async def occupied(gateway: Gateway, mock: MockModel) -> AsyncIterator[None]:
    """The only slot is taken by a caller whose backend hangs, until the block ends."""
    mock.set_faults([HANG | {"times": 1}])
    async with dial(gateway.url) as caller:
        await caller.send(post())
        await mock.called(1)
        yield


async def test_the_queue_is_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=30)
    async with occupied(gateway, mock):
        asking = asyncio.create_task(gateway.chat())
        await until(lambda: gateway.parts.admission.queued == 1)
        await asyncio.sleep(0.2)
    answer = await asking
    assert answer.status == 200
    timing = assert_explained(answer, [("attempt-1", "backend-1 ok")], backend="backend-1")
    assert 0.18 <= timing.seconds["queue"] < 10


async def test_who_never_left_the_queue_is_told_how_long_it_was(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=0.2)
    async with occupied(gateway, mock):
        answer = await gateway.chat()
    assert answer.error["code"] == "gateway_overloaded"
    assert assert_explained(answer, [], backend=None).seconds["queue"] >= 0.2
    assert mock.journal.total == 1


async def test_an_open_breaker_is_no_attempt(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock,
        gateway_breaker_failures=1,
        gateway_breaker_open_seconds=20,
        gateway_breaker_open_max=20,
        gateway_max_attempts=1,
    )
    mock.set_faults([FAILED])
    await gateway.chat()
    answer = await gateway.chat()
    assert answer.error["code"] == "backend_unavailable"
    assert_explained(answer, [], backend=None)
    assert mock.journal.total == 1


async def test_a_wrong_request_is_explained_too(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    answer = await gateway.chat(path="/v1/nowhere")
    assert answer.status == 404
    assert_explained(answer, [], backend=None)


# /health


class Health:
    """The document of `/health`, and its status."""

    def __init__(self, status: int, document: dict[str, Any]) -> None:
        self.status = status
        self.document = document
        self.downstream: str = document["downstream"]["status"]
        self.backends: list[dict[str, Any]] = document["downstream"]["backends"]

    @property
    def states(self) -> tuple[int, str, list[str]]:
        """Of the answer, of the whole, of each backend."""
        return self.status, self.document["status"], [backend["status"] for backend in self.backends]


async def health_of(gateway: Gateway, key: str | None = None) -> Health:
    """Ask, with a gateway key or without; not before every backend has been probed."""
    await until(lambda: gateway.parts.health.ready)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with gateway.client.get("/health", headers=headers) as answer:
        health = Health(answer.status, await answer.json())
    assert health.downstream == health.document["status"], "nothing but backends is wrong here"
    return health


async def test_health_before_any_request(mock: MockModel, start_gateway: StartGateway) -> None:
    health = await health_of(await start_gateway(mock))
    assert health.states == (200, "ok", ["ok"])
    (backend,) = health.backends
    assert (backend["breaker"], backend["retry_in_seconds"], backend["consecutive_failures"]) == ("closed", None, 0)
    assert (backend["last_success_seconds_ago"], backend["last_error"]) == (None, None)
    assert mock.journal.total == 0, "a probe is no prompt"


async def test_health_counts_who_is_served_and_who_waits(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=30)
    async with occupied(gateway, mock):
        asking = asyncio.create_task(gateway.chat())
        await until(lambda: gateway.parts.admission.queued == 1)
        health = await health_of(gateway)
        assert (health.document["in_flight"], health.document["queued"]) == (1, 1)
        assert health.backends[0]["in_flight"] == 1
        assert health.states == (200, "ok", ["ok"])
    assert (await asking).status == 200
    await until(lambda: not gateway.parts.in_flight)
    health = await health_of(gateway)
    assert (health.document["in_flight"], health.document["queued"]) == (0, 0)
    assert health.backends[0]["in_flight"] == 0


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        (HANG, "backend_timeout", "did not answer within"),
        ({"kind": "not_json"}, "backend_invalid_response", "not JSON"),
        ({"kind": "status", "with": {"status": 401}}, "backend_auth_error", "refused the gateway's key (401)"),
        ({"kind": "reset"}, "backend_connection_error", "closed the connection"),
        (
            {"kind": "status", "with": {"status": 500, "body": "text"}},
            "backend_invalid_response",
            "without a JSON body",
        ),
    ],
    ids=["silent", "not JSON", "401", "reset", "500 as text"],
)
async def test_health_tells_the_last_error(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], code: str, message: str
) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1, **soon(fault["kind"], stream=False))
    mock.set_faults([fault])
    failed = await gateway.chat()
    health = await health_of(gateway)
    assert health.states == (200, "degraded", ["degraded"])
    error = health.backends[0]["last_error"]
    assert (error["code"], error["trace_id"]) == (code, failed.headers["x-trace-id"])
    assert failed.error["code"] == code
    assert message in error["message"]
    assert 0 <= error["seconds_ago"] < 10
    assert health.backends[0]["breaker"] == "closed"
    assert health.backends[0]["last_success_seconds_ago"] is None


async def test_health_says_what_the_backend_answered(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    mock.set_faults([FAILED])
    failed = await gateway.chat()
    assert failed.error["code"] == "mock_500", "not the backend's own body"
    error = (await health_of(gateway)).backends[0]["last_error"]
    assert error["trace_id"] == failed.headers["x-trace-id"]
    assert error["message"] == "The backend answered 500."


async def test_health_forgets_no_error_and_counts_the_row(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    mock.set_faults([FAILED | {"times": 3}])
    for number in (1, 2, 3):
        failed = await gateway.chat(user=str(number))
        (backend,) = (await health_of(gateway)).backends
        assert backend["consecutive_failures"] == number
        assert backend["last_error"]["trace_id"] == failed.headers["x-trace-id"], "the latest one"
    assert (await gateway.chat()).status == 200
    health = await health_of(gateway)
    assert health.states == (200, "ok", ["ok"])
    (backend,) = health.backends
    assert backend["consecutive_failures"] == 0
    assert 0 <= backend["last_success_seconds_ago"] < 10
    assert backend["last_error"]["trace_id"] == failed.headers["x-trace-id"]


async def test_a_request_that_was_wrong_is_no_error_of_the_backend(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "status", "with": {"status": 400}}])
    assert (await gateway.chat()).status == 400
    health = await health_of(gateway)
    assert health.states == (200, "ok", ["ok"])
    assert health.backends[0]["last_error"] is None


async def test_health_follows_the_breaker_there_and_back(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock,
        gateway_breaker_failures=2,
        gateway_breaker_open_seconds=25,
        gateway_breaker_open_max=25,
        gateway_max_attempts=1,
    )
    await health_of(gateway)
    mock.die()
    failed = [await gateway.chat() for _ in range(2)]
    health = await health_of(gateway)
    assert health.states == (503, "down", ["down"])
    (backend,) = health.backends
    assert (backend["breaker"], backend["consecutive_failures"]) == ("open", 2)
    assert 0 < backend["retry_in_seconds"] <= 30
    assert backend["last_error"]["code"] == "backend_connection_error"
    assert backend["last_error"]["trace_id"] == failed[-1].headers["x-trace-id"]

    await mock.revive()
    breaker = gateway.parts.pool.replicas[0].breaker
    await until(lambda: breaker.state == "half_open")
    await until(lambda: gateway.parts.pool.replicas[0].status == "degraded")
    health = await health_of(gateway)
    assert health.states == (200, "degraded", ["degraded"])
    assert (health.backends[0]["breaker"], health.backends[0]["retry_in_seconds"]) == ("half_open", 0)
    assert health.backends[0]["probe"]["ok"] is True

    assert (await gateway.chat()).status == 200
    health = await health_of(gateway)
    assert health.states == (200, "ok", ["ok"])
    assert (health.backends[0]["breaker"], health.backends[0]["retry_in_seconds"]) == ("closed", None)
    assert health.backends[0]["consecutive_failures"] == 0


async def test_the_whole_is_down_only_when_every_backend_is(start_mock: StartMock, start_gateway: StartGateway) -> None:
    first, second = await start_mock(), await start_mock()
    gateway = await start_gateway(first, second, gateway_probe_interval=0.05)
    assert (await health_of(gateway)).states == (200, "ok", ["ok", "ok"])
    replicas = gateway.parts.pool.replicas
    first.die()
    await until(lambda: replicas[0].status == "down")
    assert (await health_of(gateway)).states == (200, "degraded", ["down", "ok"])
    second.die()
    await until(lambda: replicas[1].status == "down")
    health = await health_of(gateway)
    assert health.states == (503, "down", ["down", "down"])
    assert [(backend["breaker"], backend["probe"]["ok"]) for backend in health.backends] == [("closed", False)] * 2
    await first.revive()
    await until(lambda: replicas[0].status == "ok")
    assert (await health_of(gateway)).states == (200, "degraded", ["ok", "down"])


@pytest.mark.parametrize(
    ("key", "in_full"), [("right-key", True), ("wrong-key", False), (None, False)], ids=["right", "wrong", "none"]
)
async def test_without_a_key_health_leaves_out_url_and_message(
    mock: MockModel, start_gateway: StartGateway, key: str | None, *, in_full: bool
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=["right-key"], gateway_max_attempts=1)
    mock.set_faults([FAILED])
    failed = await gateway.chat(headers={"authorization": "Bearer right-key"})
    assert failed.status == 500
    health = await health_of(gateway, key)
    assert health.states == (200, "degraded", ["degraded"])
    (backend,) = health.backends
    assert ("url" in backend, "message" in backend["last_error"]) == (in_full, in_full)
    assert backend["last_error"]["trace_id"] == failed.headers["x-trace-id"]
    assert {"code", "seconds_ago", "trace_id"} <= set(backend["last_error"])
    assert (str(mock.port) in json.dumps(health.document)) == in_full


async def test_user_info_is_never_shown(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock.url.replace("//", "//somebody:secret@"), gateway_max_attempts=1)
    mock.set_faults([FAILED])
    await gateway.chat()
    health = await health_of(gateway)
    assert health.backends[0]["url"] == mock.url
    assert "somebody" not in json.dumps(health.document)
    assert "secret" not in json.dumps(health.document)


async def test_health_says_that_the_gateway_drains(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    assert (await health_of(gateway)).document["draining"] is False
    gateway.parts.admission.drain()
    health = await health_of(gateway)
    assert health.document["draining"] is True
    assert health.states == (200, "ok", ["ok"])
