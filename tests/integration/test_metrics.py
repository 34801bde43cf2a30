"""`/metrics` tells what happened: the numbers agree with the callers' answers and with the mock model's journal."""

import asyncio
import json
import re
from collections import Counter
from time import monotonic
from typing import Any

import aiohttp
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from gateway.telemetry.metrics import MAX_AGE
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.exposition import Exposition
from testkit.http import Answer
from testkit.polling import PATIENCE, until
from tests.integration.gateways import Gateway, StartGateway, patient

LONG = 3600.0
CHAT_PATH = "/v1/chat/completions"
OPENMETRICS = "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;q=0.5,*/*;q=0.1"
PROMISED = {
    "gateway_requests_total": {"route", "status", "outcome"},
    "gateway_request_duration_seconds_count": {"route"},
    "gateway_time_to_first_token_seconds_count": {"route"},
    "gateway_attempts_total": {"backend", "outcome"},
    "gateway_retries_refused_total": {"backend"},
    "gateway_breaker_state": {"backend"},
    "gateway_backend_cooling": {"backend"},
    "gateway_bridged_requests_total": {"outcome"},
    "gateway_in_flight_requests": set[str](),
    "gateway_queued_requests": set[str](),
    "gateway_shed_requests_total": {"reason"},
    "gateway_client_disconnects_total": set[str](),
    "gateway_tokens_total": {"direction"},
    "gateway_telemetry_dropped_spans_total": set[str](),
}


@pytest.fixture
def start_gateway(start_gateway: StartGateway) -> StartGateway:
    return patient(start_gateway)


async def openmetrics(gateway: Gateway) -> list[Any]:
    """The samples of the newer format, with their exemplars."""
    async with gateway.client.get("/metrics", headers={"accept": OPENMETRICS}) as response:
        assert response.content_type == "application/openmetrics-text"
        families = parse_openmetrics(await response.text())  # type: ignore[no-untyped-call]
    return [sample for family in families for sample in family.samples]


async def numbers(gateway: Gateway) -> Exposition:
    return Exposition.parse(await gateway.metrics())


async def abandoned(gateway: Gateway, mock: MockModel) -> None:
    """A caller leaves while the mock model hangs; returns when the gateway has noticed."""
    calls = mock.journal.total
    async with aiohttp.ClientSession() as session:
        posting = asyncio.create_task(session.post(f"{gateway.url}{CHAT_PATH}", json=CHAT))
        await mock.called(calls + 1)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    await until(lambda: not len(gateway.parts.in_flight))


async def test_a_mix_of_requests_is_counted_exactly(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_breaker_failures=100, gateway_backoff_initial=0.01)
    headers = {"connection": "close"}
    answers: list[Answer] = []

    async def ask(times: int = 1, fault: dict[str, Any] | None = None, **changes: Any) -> None:  # noqa: ANN401
        mock.set_faults([fault] if fault else [])
        for _ in range(times):  # each another body: the repeat of a failed one is asked only once
            answers.append(await gateway.chat(headers=headers, user=str(len(answers)), **changes))

    await ask(3)
    await ask(2, stream=True, stream_options={"include_usage": True})
    await ask(path="/v1/embeddings", input="Hello")
    await ask(fault={"kind": "status", "with": {"status": 500}, "times": 1})
    await ask(fault={"kind": "status", "with": {"status": 500}})
    await ask(fault={"kind": "status", "with": {"status": 422}})
    await ask(fault={"kind": "not_json", "times": 1})
    await ask(fault={"kind": "cut", "with": {"after_events": 4}}, stream=True)
    await ask(messages="no list")
    await ask(path="/v1/chat/completions/unknown")
    mock.set_faults([{"kind": "hang_before_headers"}])
    await abandoned(gateway, mock)
    for path, method, status in (
        ("/v1/models", "GET", 200),
        ("/v1/models/none", "GET", 404),
        ("/", "GET", 200),
        ("/v1/models", "DELETE", 405),
    ):
        async with aiohttp.request(method, gateway.url + path) as response:
            assert response.status == status
    found = await numbers(gateway)

    requests = {
        (CHAT_PATH, "200", "ok"): 7.0,
        ("/v1/embeddings", "200", "ok"): 1.0,
        (CHAT_PATH, "500", "backend_error"): 1.0,
        (CHAT_PATH, "422", "backend_error"): 1.0,
        (CHAT_PATH, "200", "backend_invalid_response"): 1.0,
        (CHAT_PATH, "400", "invalid_request"): 1.0,
        (CHAT_PATH, "499", "client_closed_request"): 1.0,
        ("other", "404", "not_found"): 1.0,
        ("/v1/models", "200", "ok"): 1.0,
        ("/v1/models/{id}", "404", "model_not_found"): 1.0,
        ("/", "200", "ok"): 1.0,
        ("/v1/models", "405", "method_not_allowed"): 1.0,
    }
    assert found.by_labels("gateway_requests_total", "route", "status", "outcome") == requests
    routes: Counter[str] = Counter()
    for (route, _, _), count in requests.items():
        routes[route] += int(count)
    assert found.by("gateway_request_duration_seconds_count", "route") == routes
    assert found.by("gateway_time_to_first_token_seconds_count", "route") == {CHAT_PATH: 3}

    attempts = found.by_labels("gateway_attempts_total", "backend", "outcome")
    assert attempts == {
        ("backend-1", "ok"): 8,
        ("backend-1", "status_500"): 4,
        ("backend-1", "status_422"): 1,
        ("backend-1", "invalid_response"): 2,
        ("backend-1", "cancelled"): 1,
    }
    await mock.settled()
    assert sum(attempts.values()) == mock.journal.total
    assert sum(int(answer.headers["x-gateway-attempts"]) for answer in answers) + 1 == mock.journal.total
    assert found.only("gateway_retries_allowed_total", backend="backend-1") == 4
    assert found.only("gateway_retries_refused_total", backend="backend-1") == 0
    assert found.only("gateway_client_disconnects_total") == 1
    assert found.only("gateway_in_flight_requests") == 0
    assert found.only("gateway_queued_requests") == 0
    assert found.only("gateway_backend_in_flight", backend="backend-1") == 0
    assert found.only("gateway_buffered_bytes") == 0
    assert found.only("gateway_telemetry_dropped_spans_total") == 0

    usages = [usage(answer) for answer in answers]
    assert found.by("gateway_tokens_total", "direction") == {
        "input": sum(tokens.get("prompt_tokens", 0) for tokens in usages),
        "output": sum(tokens.get("completion_tokens", 0) for tokens in usages),
    }


def usage(answer: Answer) -> dict[str, int]:
    """What an answer says about its tokens, streamed or not."""
    body = answer.body
    if body.startswith(b"data:"):
        events = [json.loads(event[6:]) for event in body.split(b"\n\n") if event and b"[DONE]" not in event]
        return next((event["usage"] for event in events if event.get("usage")), {})
    found: dict[str, int] = json.loads(body).get("usage") or {}
    return found


async def test_every_promised_number_is_there_from_the_start(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, "http://127.0.0.1:1")
    found = await numbers(gateway)

    for name in PROMISED:
        family = name.removesuffix("_count")
        assert f"# TYPE {family} " in await gateway.metrics(), name
    for replica in ("backend-1", "backend-2"):
        assert found.only("gateway_breaker_state", backend=replica) == 0
        assert found.only("gateway_backend_cooling", backend=replica) == 0
        assert found.only("gateway_retries_allowed_total", backend=replica) == 0
        assert found.only("gateway_retries_refused_total", backend=replica) == 0
        for state in ("closed", "half_open", "open"):
            assert found.only("gateway_breaker_transitions_total", backend=replica, to=state) == 0
    for reason in ("queue_full", "queue_timeout", "memory", "backend_full", "descriptors", "ports", "buffers"):
        assert found.only("gateway_shed_requests_total", reason=reason) == 0
    for direction in ("input", "output"):
        assert found.only("gateway_tokens_total", direction=direction) == 0
    for name in (
        "gateway_in_flight_requests",
        "gateway_queued_requests",
        "gateway_buffered_bytes",
        "gateway_client_disconnects_total",
        "gateway_telemetry_dropped_spans_total",
        "gateway_queue_wait_seconds_count",
    ):
        assert found.only(name) == 0, name
    lag = found.only("gateway_event_loop_lag_seconds")
    assert lag is not None
    assert 0 <= lag < PATIENCE


async def test_labels_are_those_of_the_contract(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    await gateway.chat(stream=True)
    found = await numbers(gateway)

    for name, labels in PROMISED.items():
        seen = [set(dict(labels)) for found_name, labels in found.samples if found_name == name]
        assert seen, name
        assert all(names == labels for names in seen), name
    assert all(name.startswith("gateway_") for name, _ in found.samples)


async def test_requests_under_way_and_queued_are_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=1, gateway_queue_timeout=LONG)
    mock.set_faults([{"kind": "hang_before_headers"}])
    async with aiohttp.ClientSession() as session:
        posting = [asyncio.create_task(session.post(f"{gateway.url}{CHAT_PATH}", json=CHAT)) for _ in range(2)]
        await mock.called(1)
        await until(lambda: gateway.parts.admission.queued == 1)
        busy = await numbers(gateway)
        refused = await gateway.chat()
        for task in posting:
            task.cancel()
        await asyncio.gather(*posting, return_exceptions=True)
    await until(lambda: not len(gateway.parts.in_flight))
    idle = await numbers(gateway)

    assert busy.only("gateway_in_flight_requests") == 1
    assert busy.only("gateway_queued_requests") == 1
    assert busy.only("gateway_backend_in_flight", backend="backend-1") == 1
    assert (busy.only("gateway_buffered_bytes") or 0) > 0
    assert refused.error["code"] == "gateway_overloaded"
    assert idle.by("gateway_shed_requests_total", "reason") == {"queue_full": 1}
    assert idle.only("gateway_in_flight_requests") == 0
    assert idle.only("gateway_queued_requests") == 0
    assert idle.only("gateway_queue_wait_seconds_count") == 1
    assert idle.only("gateway_client_disconnects_total") == 2
    assert mock.journal.total == 1


async def test_each_reason_for_refusing_load_is_counted(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock, gateway_max_in_flight=1, gateway_max_queue=1, gateway_queue_timeout=0.2, gateway_max_buffered_bytes=2000
    )
    large = await gateway.chat(user="x" * 2000)
    mock.set_faults([{"kind": "hang_before_headers"}])
    async with aiohttp.ClientSession() as session:
        posting = asyncio.create_task(session.post(f"{gateway.url}{CHAT_PATH}", json=CHAT))
        await mock.called(1)
        late = await gateway.chat()
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    found = await numbers(gateway)

    assert [large.error["code"], late.error["code"]] == ["gateway_overloaded"] * 2
    assert found.by("gateway_shed_requests_total", "reason") == {"memory": 1, "queue_timeout": 1}
    assert (found.only("gateway_queue_wait_seconds_sum") or 0) >= 0.19


async def test_breakers_and_refused_retries_are_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock,
        gateway_breaker_failures=2,
        gateway_breaker_open_seconds=0.2,
        gateway_retry_floor=0,
        gateway_retry_budget=0,
    )
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 2}])
    (replica,) = gateway.parts.pool.replicas
    states = [(await numbers(gateway)).only("gateway_breaker_state", backend="backend-1")]
    for number in range(2):
        await gateway.chat(user=str(number))
    opened = await numbers(gateway)
    refused = opened.only("gateway_retries_refused_total", backend="backend-1")
    await until(lambda: replica.breaker.state == "half_open")
    states.append((await numbers(gateway)).only("gateway_breaker_state", backend="backend-1"))
    await gateway.chat()
    found = await numbers(gateway)
    states.append(found.only("gateway_breaker_state", backend="backend-1"))

    assert states == [0, 1, 0]
    assert opened.by("gateway_breaker_transitions_total", "to")["open"] == 1
    assert found.by("gateway_breaker_transitions_total", "to") == {"open": 1, "half_open": 1, "closed": 1}
    assert refused == 2
    assert found.only("gateway_retries_allowed_total", backend="backend-1") == 0
    assert found.by("gateway_attempts_total", "outcome") == {"status_500": 2, "ok": 1}
    assert mock.journal.total == 3


async def test_an_open_breaker_is_2(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        "http://127.0.0.1:1",
        gateway_breaker_failures=1,
        gateway_breaker_open_seconds=LONG,
        gateway_breaker_open_max=LONG,
    )
    await gateway.chat()
    found = await numbers(gateway)

    assert found.only("gateway_breaker_state", backend="backend-1") == 2
    assert found.only("gateway_backend_probe_ok", backend="backend-1") == 0
    assert found.by("gateway_attempts_total", "outcome") == {"connection_error": 1}


async def test_a_backend_that_cools_is_1(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    limited = {"status": 429, "headers": {"retry-after": "9"}}
    mock.set_faults([{"kind": "status", "with": limited, "times": 1}])
    asking = asyncio.create_task(gateway.chat())
    (replica,) = gateway.parts.pool.replicas
    await until(lambda: replica.cooldown.left is not None)
    cooling = await numbers(gateway)
    replica.cooldown.succeed("demo-model", monotonic())  # as when somebody else is answered
    answer = await asking
    found = await numbers(gateway)

    assert cooling.only("gateway_backend_cooling", backend="backend-1") == 1
    assert found.only("gateway_backend_cooling", backend="backend-1") == 0
    assert (answer.status, answer.attempts, mock.journal.total) == (200, 2, 2)
    assert found.by("gateway_attempts_total", "outcome") == {"status_429": 1, "ok": 1}
    assert found.only("gateway_retries_allowed_total", backend="backend-1") == 1
    assert found.only("gateway_breaker_state", backend="backend-1") == 0
    assert set(found.by("gateway_bridged_requests_total", "outcome").values()) <= {0}, "a cooldown is no outage"


async def test_refusals_while_all_cool_are_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after": "60"}}}])
    for _ in range(3):
        assert (await gateway.chat()).status == 429
    found = await numbers(gateway)

    assert found.by_labels("gateway_requests_total", "status", "outcome") == {
        ("429", "backend_error"): 1,
        ("429", "backend_rate_limited"): 2,
    }
    assert found.by("gateway_attempts_total", "outcome") == {"status_429": 1}
    assert mock.journal.total == 1


async def test_openmetrics_has_exemplars_that_lead_to_traces(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    plain = await gateway.chat()
    stream = await gateway.chat(stream=True)
    samples = await openmetrics(gateway)

    def exemplars(name: str) -> set[str]:
        return {sample.exemplar.labels["trace_id"] for sample in samples if sample.name == name and sample.exemplar}

    traces = {plain.headers["x-trace-id"], stream.headers["x-trace-id"]}
    assert exemplars("gateway_request_duration_seconds_bucket") <= traces
    assert stream.headers["x-trace-id"] in exemplars("gateway_request_duration_seconds_bucket")
    assert exemplars("gateway_time_to_first_token_seconds_bucket") == {stream.headers["x-trace-id"]}
    await until(lambda: len(gateway.spans()) >= 4)
    exported = {f"{span.context.trace_id:032x}" for span in gateway.spans() if span.context}
    assert traces == exported
    assert "trace_id" not in await gateway.metrics(), "the older format has no exemplars"


async def test_what_is_not_exported_is_no_exemplar(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    gateway = await start_gateway(mock, gateway_backoff_initial=0.01)
    await gateway.chat()
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    retried = await gateway.chat()
    found = {sample.exemplar.labels["trace_id"] for sample in await openmetrics(gateway) if sample.exemplar}

    assert found == {retried.headers["x-trace-id"]}


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        ("", "text/plain"),
        ("*/*", "text/plain"),
        ("text/plain; version=9; escaping=\u00ff", "text/plain"),
        ("application/openmetrics-text", "application/openmetrics-text"),
        ("application/openmetrics-text; version=banana", "application/openmetrics-text"),
        ("application/openmetrics-text; version=99999999999.0.0", "application/openmetrics-text"),
        ("application/openmetrics-text; version==;;;=,,", "application/openmetrics-text"),
    ],
)
async def test_no_accept_header_breaks_metrics_or_comes_back(
    start_gateway: StartGateway, accept: str, content_type: str
) -> None:
    gateway = await start_gateway("http://127.0.0.1:1")
    async with gateway.client.get("/metrics", headers={"accept": accept}) as response:
        assert response.status == 200
        assert response.content_type == content_type
        assert "99999" not in response.headers["content-type"]
        assert "gateway_build_info" in await response.text()


async def test_no_label_value_comes_from_a_caller(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_backoff_initial=0.01)
    evil = "attacker"
    names = ("x-request-id", "traceparent", "tracestate", "user-agent", "idempotency-key", "openai-organization")
    headers = dict.fromkeys(names, evil)
    await gateway.chat(model=evil, headers=headers)
    await gateway.chat(model=evil, stream=True, headers=headers, user=evil)
    await gateway.chat(path=f"/v1/{evil}", headers=headers)
    await gateway.chat(messages=evil, headers={"x-gateway-commit": evil})
    await gateway.chat(headers={"x-request-timeout": evil})
    body = {"error": {"message": evil, "type": evil, "code": evil}, "id": evil, "model": evil}
    for status in (200, 400, 418, 599):
        mock.set_faults([{"kind": "status", "with": {"status": status, "body": body}}])
        await gateway.chat(model=evil)
    for method, path in (
        (evil.upper(), "/"),
        ("PROPFIND", "/v1/models"),
        ("GET", f"/v1/models/{evil}"),
        ("GET", f"//{evil}"),
    ):
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
        writer.write(f"{method} {path} HTTP/1.1\r\nHost: {evil}\r\nConnection: close\r\n\r\n".encode())
        assert b" 4" in await reader.readline()
        writer.close()
    found = await numbers(gateway)

    said = {value for _, labels in found.samples for _, value in labels}
    assert not [value for value in said if evil in value.lower() or "propfind" in value.lower()]
    assert {dict(labels)["route"] for name, labels in found.samples if name == "gateway_requests_total"} <= {
        CHAT_PATH,
        "other",
        "/",
        "/v1/models",
        "/v1/models/{id}",
    }


async def test_probes_and_scrapes_are_not_counted_as_requests(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        async with gateway.client.get(path) as response:
            assert response.status == 200
    found = await numbers(gateway)

    assert found.by("gateway_requests_total", "route") == {}


async def test_many_scrapers_cost_as_much_as_one(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    metrics = gateway.parts.telemetry.metrics
    rendered = 0

    class Watched:
        def collect(self) -> list[Any]:
            nonlocal rendered
            rendered += 1
            return []

    metrics._registry.register(Watched())
    now, rendered = 100.0, 0
    metrics._clock = lambda: now
    metrics.max_age = MAX_AGE
    accepts = ["", "*/*", OPENMETRICS, "text/plain;version=0.0.4", OPENMETRICS + ";x=1", "application/json"]

    async def scraped() -> set[str]:
        """What all scrapers see of the requests."""
        seen = set()
        for accept in accepts * 3:
            async with gateway.client.get("/metrics", headers={"accept": accept}) as response:
                newer = response.content_type == "application/openmetrics-text"
                assert newer is ("openmetrics" in accept)
                seen.add("".join(re.findall(r"^gateway_requests_total.* (\S+)$", await response.text(), re.MULTILINE)))
        return seen

    assert await scraped() == {""}
    assert rendered == 2
    await gateway.chat()
    now += MAX_AGE - 0.001
    assert await scraped() == {""}
    assert rendered == 2
    now += 0.001
    assert await scraped() == {"1.0"}
    assert rendered == 4
    assert len(metrics._documents) == 2
