"""The calls that are answered from memory: `/`, health, readiness, metrics, models."""

import json
from pathlib import Path

import pytest

from gateway import __version__
from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH
from testkit.polling import until
from tests.integration.gateways import KEY, REFUSED, StartGateway, config, get, listed
from tests.integration.recorder import Recorder
from tests.integration.wire import send


async def test_the_root_says_what_this_is_and_where_to_look(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, model_name="my-model", app_mode="prod")
    answer = await get(gateway, "/")
    document = json.loads(answer.body)
    assert answer.status == 200
    assert set(document) == {"message", "service", "version", "app_mode", "model", "links"}
    assert (document["version"], document["app_mode"], document["model"]) == (__version__, "prod", "my-model")
    for link in document["links"].values():
        assert (await get(gateway, link)).status == 200


async def test_the_health_document_is_whole(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, REFUSED, gateway_max_attempts=1, gateway_probe_interval=0.05)
    assert (await gateway.chat()).status in {200, 502}
    await until(lambda: gateway.parts.health.ready and gateway.parts.pool.replicas[1].status == "down")
    answer = await get(gateway, "/health")
    document = json.loads(answer.body)
    assert answer.status == 200
    assert set(document) == {
        "status", "version", "app_mode", "uptime_seconds", "draining", "in_flight", "queued", "downstream", "telemetry",
        "limits", "config",
    }  # fmt: skip
    assert (document["status"], document["version"], document["app_mode"]) == ("degraded", __version__, "dev")
    assert (document["draining"], document["in_flight"], document["queued"]) == (False, 0, 0)
    assert document["uptime_seconds"] > 0
    assert document["telemetry"] == {"status": "ok", "spans_dropped": 0}
    assert document["limits"] == {"status": "off"}
    assert document["downstream"]["status"] == "degraded"
    good, bad = document["downstream"]["backends"]
    for backend in (good, bad):
        assert set(backend) == {
            "name", "url", "status", "breaker", "retry_in_seconds", "cooling_seconds", "in_flight",
            "consecutive_failures", "last_success_seconds_ago", "last_error", "probe",
        }  # fmt: skip
        assert set(backend["probe"]) == {"ok", "latency_ms", "seconds_ago"}
        assert backend["probe"]["latency_ms"] > 0
        assert backend["probe"]["seconds_ago"] >= 0
        assert (backend["breaker"], backend["retry_in_seconds"], backend["in_flight"]) == ("closed", None, 0)
        assert backend["cooling_seconds"] is None
    assert (good["name"], good["url"], good["status"]) == ("backend-1", mock.url, "ok")
    assert (bad["name"], bad["url"], bad["status"]) == ("backend-2", REFUSED, "down")
    assert (good["probe"]["ok"], bad["probe"]["ok"]) == (True, False)


async def test_health_tells_the_last_error_with_its_trace(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    await until(lambda: gateway.parts.health.ready)
    failed = await gateway.chat()
    (backend,) = (await gateway.health())["downstream"]["backends"]
    assert backend["status"] == "degraded"
    assert backend["consecutive_failures"] == 1
    assert backend["last_success_seconds_ago"] is None
    assert set(backend["last_error"]) == {"code", "message", "seconds_ago", "trace_id"}
    assert backend["last_error"]["trace_id"] == failed.headers["x-trace-id"]
    assert backend["last_error"]["message"]

    mock.set_faults([])
    assert (await gateway.chat()).status == 200
    document = await gateway.health()
    (backend,) = document["downstream"]["backends"]
    assert (document["status"], backend["status"]) == ("ok", "ok")
    assert backend["consecutive_failures"] == 0
    assert backend["last_success_seconds_ago"] >= 0


async def test_a_backend_that_cools_is_degraded_and_health_says_for_how_long(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    await until(lambda: gateway.parts.health.ready)
    limited = {"status": 429, "headers": {"retry-after": "30"}}
    mock.set_faults([{"kind": "status", "with": limited, "match": {"model": "limited"}}])
    assert (await gateway.chat(model="limited")).status == 429
    assert (await gateway.chat(model="other")).status == 200
    document = await gateway.health()
    (backend,) = document["downstream"]["backends"]
    assert (document["status"], document["downstream"]["status"], backend["status"]) == ("degraded",) * 3
    assert 25 < backend["cooling_seconds"] <= 30
    assert (backend["breaker"], backend["retry_in_seconds"], backend["consecutive_failures"]) == ("closed", None, 0)
    assert (await get(gateway, "/health")).status == 200
    assert mock.journal.total == 2


async def test_a_backend_that_no_longer_cools_is_ok_after_its_next_answer(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    await until(lambda: gateway.parts.health.ready)
    mock.set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after-ms": "2000"}}, "times": 1}])
    assert (await gateway.chat()).status == 429
    (backend,) = (await gateway.health())["downstream"]["backends"]
    assert 0 < backend["cooling_seconds"] <= 2
    assert (await gateway.chat()).status == 200
    document = await gateway.health()
    (backend,) = document["downstream"]["backends"]
    assert (document["status"], backend["status"], backend["cooling_seconds"]) == ("ok", "ok", None)
    assert mock.journal.total == 2


async def test_health_is_503_when_every_backend_is_down(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(REFUSED, REFUSED, gateway_probe_interval=0.05)
    await until(lambda: all(replica.status == "down" for replica in gateway.parts.pool.replicas))
    answer = await get(gateway, "/health")
    document = json.loads(answer.body)
    assert (answer.status, document["status"], document["downstream"]["status"]) == (503, "down", "down")
    assert (await get(gateway, "/livez")).status == 200
    assert (await get(gateway, "/readyz")).status == 200


async def test_health_without_a_valid_key_hides_urls_and_messages(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    gateway = await start_gateway(mock, gateway_api_keys=[KEY], gateway_max_attempts=1)
    await gateway.chat(headers={"authorization": f"Bearer {KEY}"})
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {KEY}"}):
        answer = await get(gateway, "/health", **headers)
        (backend,) = json.loads(answer.body)["downstream"]["backends"]
        assert "url" not in backend
        assert set(backend["last_error"]) == {"code", "seconds_ago", "trace_id"}
        assert mock.url not in answer.body.decode()
    answer = await get(gateway, "/health", authorization=f"Bearer {KEY}")
    (backend,) = json.loads(answer.body)["downstream"]["backends"]
    assert backend["url"] == mock.url
    assert backend["last_error"]["message"]


async def test_only_v1_asks_for_a_key(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    await until(lambda: gateway.parts.health.ready)
    for path in ("/", "/health", "/livez", "/readyz", "/metrics"):
        assert (await get(gateway, path)).status == 200
    assert (await get(gateway, "/v1/models")).status == 401


async def test_health_never_calls_a_backend(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_probe_interval=600)
    await until(lambda: gateway.parts.health.ready)
    for path in ("/health", "/readyz", "/livez", "/v1/models"):
        for _ in range(5):
            assert (await get(gateway, path)).status == 200
    assert (recorder.probes, recorder.seen) == (1, [])


async def test_not_ready_before_the_first_probe_has_ended(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "hang_before_headers", "match": {"path": "/health"}}])
    gateway = await start_gateway(mock, gateway_probe_timeout=50)
    answer = await get(gateway, "/readyz")
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert (await get(gateway, "/livez")).status == 200
    (backend,) = (await gateway.health())["downstream"]["backends"]
    assert backend["probe"] == {"ok": None, "latency_ms": None, "seconds_ago": None}
    await mock.reset()
    await until(lambda: gateway.parts.health.ready)
    assert (await get(gateway, "/readyz")).status == 200


async def test_a_gateway_that_drains_is_not_ready_and_takes_nothing_of_v1(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    await until(lambda: gateway.parts.health.ready)
    gateway.parts.admission.drain()
    for method, path in (("GET", "/readyz"), ("GET", "/v1/models"), ("POST", CHAT_PATH), ("POST", "/v1/nothing")):
        answer = await send(gateway, f"{method} {path} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
        assert (answer.status, answer.error["code"]) == (503, "gateway_draining")
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
        assert "x-should-retry" not in answer.headers
    assert (await gateway.health())["draining"] is True
    assert (await get(gateway, "/livez")).status == 200
    assert mock.journal.total == 0


async def test_metrics_are_prometheus_text_or_openmetrics(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    traced = (await gateway.chat()).headers["x-trace-id"]
    plain = await get(gateway, "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    line = f'gateway_requests_total{{outcome="ok",route="{CHAT_PATH}",status="200"}} 1.0'
    assert line in plain.body.decode()
    assert traced not in plain.body.decode()
    wanted = "application/openmetrics-text;version=1.0.0"
    openmetrics = await get(gateway, "/metrics", accept=wanted)
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.body.endswith(b"# EOF\n")
    assert f'trace_id="{traced}"' in openmetrics.body.decode()


async def test_models_come_from_the_routes_in_order(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(
        tmp_path,
        f"""
backends:
  one: {{url: "{mock.url}"}}
routes:
  - {{model: org/second, targets: [{{backend: one}}]}}
  - {{model: first, targets: [{{backend: one}}]}}
  - {{model: "*", targets: [{{backend: one}}]}}
""",
    )
    gateway = await start_gateway(gateway_config=file, model_name="fallback")
    await listed(gateway)
    document = json.loads((await get(gateway, "/v1/models")).body)
    assert document["object"] == "list"
    assert [model["id"] for model in document["data"]] == ["org/second", "first", "fallback", "demo-model"]
    for model in document["data"]:
        assert model["object"] == "model"
        assert {"created", "owned_by"} < set(model)
        assert json.loads((await get(gateway, f"/v1/models/{model['id']}")).body) == model
    escaped = await send(gateway, b"GET /v1/models/org%2Fsecond HTTP/1.1\r\nhost: gateway\r\n\r\n")
    assert json.loads(escaped.body)["id"] == "org/second"
    unknown = await get(gateway, "/v1/models/none-of-them")
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
    assert mock.journal.total == 0


async def test_a_model_without_a_route_is_not_forwarded(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(
        tmp_path,
        f"""
backends:
  one: {{url: "{mock.url}"}}
routes:
  - {{model: demo-model, targets: [{{backend: one}}]}}
""",
    )
    gateway = await start_gateway(gateway_config=file)
    answer = await gateway.chat(model="another")
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert [m["id"] for m in json.loads((await get(gateway, "/v1/models")).body)["data"]] == ["demo-model"]
    assert mock.journal.total == 0
    assert (await gateway.chat()).status == 200


@pytest.mark.parametrize("path", ["/", "/health", "/livez", "/metrics", "/v1/models", "/v1/models/demo-model"])
async def test_head_is_answered_without_a_body(mock: MockModel, start_gateway: StartGateway, path: str) -> None:
    gateway = await start_gateway(mock)
    async with gateway.client.head(path) as response:
        assert response.status == 200
        assert await response.read() == b""
