"""The HTTP face: every call of the contract, and what goes through the gateway changed, unchanged, or not at all."""

import asyncio
import base64
import json
import re
from collections.abc import AsyncIterator, Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.http import Answer
from testkit.polling import until
from tests.integration.gateways import Gateway, StartGateway, StartMock
from tests.integration.recorder import ANSWER, Recorder, recording
from tests.integration.wire import BODY, chunked, dial, post

KEY = "gw-key-1"
REFUSED = "http://127.0.0.1:1"
EXPLAINING = {"x-request-id", "x-trace-id", "x-gateway-attempts", "server-timing"}
STREAM = b'data: {"id": "1", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
CHAT_PATH = "/v1/chat/completions"


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with recording() as one:
        yield one


async def get(gateway: Gateway, path: str, **headers: str) -> Answer:
    async with gateway.client.get(path, headers=headers) as response:
        return Answer(response.status, dict(response.headers), await response.read())


async def send(gateway: Gateway, data: bytes) -> Answer:
    async with dial(gateway.url) as wire:
        await wire.send(data)
        return await wire.answer()


def config(path: Path, text: str) -> Path:
    file = path / "gateway.yaml"
    file.write_text(text)
    return file


# The calls that are answered from memory


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
    gateway = await start_gateway(mock, REFUSED, gateway_max_attempts=1)
    await until(lambda: gateway.parts.health.ready)
    assert (await gateway.chat()).status in {200, 502}
    answer = await get(gateway, "/health")
    document = json.loads(answer.body)
    assert answer.status == 200
    assert set(document) == {
        "status", "version", "app_mode", "uptime_seconds", "draining", "in_flight", "queued", "downstream", "telemetry",
    }  # fmt: skip
    assert (document["status"], document["version"], document["app_mode"]) == ("degraded", __version__, "dev")
    assert (document["draining"], document["in_flight"], document["queued"]) == (False, 0, 0)
    assert document["uptime_seconds"] > 0
    assert document["telemetry"] == {"status": "ok", "spans_dropped": 0}
    assert document["downstream"]["status"] == "degraded"
    good, bad = document["downstream"]["backends"]
    for backend in (good, bad):
        assert set(backend) == {
            "name", "url", "status", "breaker", "retry_in_seconds", "in_flight", "consecutive_failures",
            "last_success_seconds_ago", "last_error", "probe",
        }  # fmt: skip
        assert set(backend["probe"]) == {"ok", "latency_ms", "seconds_ago"}
        assert backend["probe"]["latency_ms"] > 0
        assert backend["probe"]["seconds_ago"] >= 0
        assert (backend["breaker"], backend["retry_in_seconds"], backend["in_flight"]) == ("closed", None, 0)
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


async def test_health_is_503_when_every_backend_is_down(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(REFUSED, REFUSED)
    await until(lambda: gateway.parts.health.ready)
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


async def test_not_ready_before_the_first_probe_has_ended(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.attempt.PROBE_TIMEOUT", 50.0)
    mock.set_faults([{"kind": "hang_before_headers", "match": {"path": "/health"}}])
    gateway = await start_gateway(mock)
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
    document = json.loads((await get(gateway, "/v1/models")).body)
    assert document["object"] == "list"
    assert [model["id"] for model in document["data"]] == ["org/second", "first", "fallback"]
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


# Headers


SENT = [
    ("Content-Type", "application/json; charset=utf-8"),
    ("Accept", "application/json, text/event-stream"),
    ("User-Agent", "caller/1.0"),
    ("OpenAI-Organization", "org-1"),
    ("OpenAI-Project", "proj-1"),
    ("X-Stainless-Lang", "python"),
    ("x-stainless-retry-count", "0"),
    ("Idempotency-Key", "once-and-only"),
    ("Tracestate", "vendor=1"),
]
HELD_BACK = [
    ("Authorization", "Bearer caller-key"),
    ("Cookie", "session=1"),
    ("Proxy-Authorization", "Basic eA=="),
    ("X-Api-Key", "caller"),
    ("Api-Key", "caller"),
    ("X-Forwarded-For", "10.0.0.1"),
    ("X-Forwarded-Host", "evil"),
    ("Forwarded", "for=10.0.0.1"),
    ("Origin", "https://evil"),
    ("Referer", "https://evil/x"),
    ("Accept-Encoding", "gzip, br"),
    ("X-Gateway-Commit", "first_token"),
    ("Baggage", "user=1"),
    ("OpenAIx", "1"),
    ("TE", "trailers"),
    ("Expect", "100-continue"),
]


async def test_only_the_listed_headers_reach_the_backend(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_backend_api_key="backend-key", gateway_request_deadline=77)
    lines = "".join(f"{name}: {value}\r\n" for name, value in [*SENT, *HELD_BACK])
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: caller.example\r\n{lines}Content-Length: {len(BODY)}\r\n\r\n"
    answer = await send(gateway, head.encode() + BODY)
    assert answer.status == 200
    (seen,) = recorder.seen
    assert seen.path == CHAT_PATH
    for name, value in SENT:
        assert seen.header(name.lower()) == value
    ours = {
        "host",
        "content-length",
        "accept-encoding",
        "authorization",
        "x-request-id",
        "x-request-timeout",
        "traceparent",
    }
    assert {name for name, _ in seen.headers} == ours | {name.lower() for name, _ in SENT}
    assert len(seen.headers) == len(ours) + len(SENT)
    assert seen.header("host") == recorder.url.removeprefix("http://")
    assert seen.header("content-length") == str(len(BODY))
    assert seen.header("accept-encoding") == "identity"
    assert seen.header("authorization") == "Bearer backend-key"
    assert seen.header("x-request-id") == answer.headers["x-request-id"]
    assert 76 < float(seen.header("x-request-timeout") or "") <= 77
    pattern = rf"00-{answer.headers['x-trace-id']}-[0-9a-f]{{16}}-01"
    assert re.fullmatch(pattern, seen.header("traceparent") or "")


async def test_without_a_key_of_its_own_a_backend_gets_none(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_api_keys=[KEY])
    answer = await gateway.chat(headers={"authorization": f"Bearer {KEY}"})
    assert answer.status == 200
    assert recorder.seen[0].header("authorization") is None
    assert KEY not in str(recorder.seen[0].headers)


async def test_bytes_of_a_header_that_are_no_utf8_arrive_as_they_are(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    assert (await send(gateway, post(headers={"user-agent": "caf\u00e9 \udcff"}))).status == 200
    assert recorder.seen[0].header("user-agent") == "caf\u00e9 \udcff"


async def test_only_the_listed_headers_of_an_answer_pass(recorder: Recorder, start_gateway: StartGateway) -> None:
    passed = [
        ("content-type", "application/json; charset=utf-8"),
        ("openai-version", "2020-10-01"),
        ("openai-processing-ms", "12"),
        ("x-ratelimit-remaining-requests", "7"),
        ("retry-after", "3"),
        ("retry-after-ms", "3000"),
    ]
    held_back = [
        ("set-cookie", "a=b"),
        ("server", "backend/1"),
        ("x-request-id", "of-the-backend"),
        ("x-trace-id", "of-the-backend"),
        ("x-gateway-backend", "liar"),
        ("x-should-retry", "true"),
        ("server-timing", "backend;dur=1"),
        ("via", "1.1 backend"),
        ("access-control-allow-origin", "*"),
        ("strict-transport-security", "max-age=1"),
        ("cache-control", "public"),
    ]
    recorder.headers = [*passed, *held_back]
    gateway = await start_gateway(recorder.url)
    for status in (200, 400):
        recorder.status = status
        answer = await gateway.chat()
        assert answer.status == status
        for name, value in passed:
            assert answer.headers[name] == value
        own = EXPLAINING | {"x-gateway-backend", "content-length", "date", "server"}
        assert set(answer.headers) == own | {name for name, _ in passed}
        for name, value in held_back:
            assert answer.headers.get(name) != value
        assert answer.headers["x-gateway-backend"] == "backend-1"

    recorder.status = 200
    recorder.headers = [*passed[1:], *held_back, ("content-type", "text/event-stream")]
    recorder.pieces = [STREAM, b"data: [DONE]\n\n"]
    answer = await gateway.chat(stream=True)
    for name, value in passed[1:]:
        assert answer.headers[name] == value
    for name, value in held_back:
        assert answer.headers.get(name) != value


@pytest.mark.parametrize(
    ("asked", "low", "high"), [(None, 599, 600), ("1000", 599, 600), ("5", 4, 5), ("0.75", 0.1, 0.75)]
)
async def test_the_backend_is_told_what_is_left_of_the_deadline(
    recorder: Recorder, start_gateway: StartGateway, asked: str | None, low: float, high: float
) -> None:
    gateway = await start_gateway(recorder.url)
    assert (await gateway.chat(headers={"x-request-timeout": asked} if asked else {})).status == 200
    assert low < float(recorder.seen[0].header("x-request-timeout") or "") <= high


async def test_a_trace_is_joined_with_its_state_and_flag(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url)
    trace, span = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    for flag in ("01", "00"):
        headers = {"traceparent": f"00-{trace}-{span}-{flag}", "tracestate": "a=1,b=2"}
        answer = await gateway.chat(headers=headers)
        assert answer.headers["x-trace-id"] == trace
        told = (recorder.seen[-1].header("traceparent") or "").split("-")
        assert (told[0], told[1], told[3]) == ("00", trace, flag)
        assert told[2] not in {span, "0" * 16}
        assert recorder.seen[-1].header("tracestate") == "a=1,b=2"


# What explains an answer, and keys


async def test_every_answer_of_v1_explains_itself(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock()
    gateway = await start_gateway(mock, gateway_api_keys=[KEY], gateway_max_attempts=1)
    key = {"authorization": f"Bearer {KEY}"}

    async def call(method: str, path: str, **options: Any) -> Answer:  # noqa: ANN401
        async with gateway.client.request(method, path, **options) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    async def check(answer: Answer, status: int, attempts: int, backend: str | None) -> None:
        assert answer.status == status
        assert set(answer.headers) >= EXPLAINING
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-trace-id"])
        assert answer.headers["x-gateway-attempts"] == str(attempts)
        assert answer.headers.get("x-gateway-backend") == backend
        timing = answer.headers["server-timing"]
        assert timing.startswith("queue;dur=")
        assert timing.count("attempt-") == attempts

    await check(await call("GET", "/v1/models", headers=key), 200, 0, None)
    await check(await call("GET", "/v1/models/demo-model", headers=key), 200, 0, None)
    await check(await call("GET", "/v1/models/none", headers=key), 404, 0, None)
    await check(await call("GET", "/v1/none", headers=key), 404, 0, None)
    await check(await call("PUT", CHAT_PATH, headers=key), 405, 0, None)
    await check(await call("POST", CHAT_PATH, json=CHAT), 401, 0, None)
    await check(await call("POST", CHAT_PATH, json={}, headers=key), 400, 0, None)
    await check(await call("POST", CHAT_PATH, data=b"x", headers=key), 415, 0, None)
    for path, body in (
        (CHAT_PATH, CHAT),
        (CHAT_PATH, CHAT | {"stream": True}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/completions", {"prompt": "x", "stream": True}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x"}),
        ("/v1/responses", {"input": "x", "stream": True}),
    ):
        await check(await call("POST", path, json=body, headers=key), 200, 1, "backend-1")
    mock.set_faults([{"kind": "status", "with": {"status": 418}}])
    await check(await call("POST", CHAT_PATH, json=CHAT, headers=key), 418, 1, "backend-1")
    mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    await check(await call("POST", CHAT_PATH, json=CHAT | {"stream": True}, headers=key), 500, 1, "backend-1")
    mock.set_faults([{"kind": "html"}])
    await check(await call("POST", CHAT_PATH, json=CHAT, headers=key), 502, 1, "backend-1")
    mock.set_faults([{"kind": "reset"}])
    # Over a kept-alive connection, so that it is sent again once.
    await check(await call("POST", CHAT_PATH, json=CHAT, headers=key), 502, 2, None)
    assert mock.journal.total == 12


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        f"Basic {KEY}",
        KEY,
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        "Bearer \udcff",
    ],
)
@pytest.mark.parametrize("line", [f"POST {CHAT_PATH}", "GET /v1/models", "POST /v1/none", "DELETE /v1/models"])
async def test_without_a_valid_key_all_of_v1_is_401(
    mock: MockModel, start_gateway: StartGateway, authorization: str | None, line: str
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY, "gw-key-2"])
    extra = f"authorization: {authorization}\r\n" if authorization is not None else ""
    answer = await send(gateway, f"{line} HTTP/1.1\r\nhost: gateway\r\n{extra}\r\n".encode("utf-8", "surrogateescape"))
    assert (answer.status, answer.error["code"], answer.error["type"]) == (
        401,
        "invalid_api_key",
        "authentication_error",
    )
    assert KEY not in answer.body.decode()
    assert mock.journal.total == 0


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", "Bearer gw-key-2", f"Bearer  {KEY} "])
async def test_each_of_the_keys_opens(mock: MockModel, start_gateway: StartGateway, authorization: str) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=f"{KEY}, gw-key-2\n")
    assert (await send(gateway, post(headers={"authorization": authorization}))).status == 200


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/none", "/v1/models"])
@pytest.mark.parametrize("expect", [False, True])
async def test_the_key_is_asked_for_before_the_body(
    mock: MockModel, start_gateway: StartGateway, path: str, *, expect: bool
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    async with dial(gateway.url) as wire:
        headers = {"content-length": "100000", "authorization": "Bearer wrong"}
        await wire.send(post(b"", headers | ({"expect": "100-continue"} if expect else {}), path=path))
        answer = await wire.answer()
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert gateway.parts.memory.held == 0


@pytest.mark.parametrize("where", ["with a length", "in chunks"])
async def test_with_a_valid_key_expect_is_answered_and_the_body_taken(
    mock: MockModel, start_gateway: StartGateway, where: str
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    headers = {"expect": "100-continue", "authorization": f"Bearer {KEY}"}
    data = post(BODY, headers) if where == "with a length" else chunked(BODY, headers=headers)
    head, body = data.split(b"\r\n\r\n", 1)
    async with dial(gateway.url) as wire:
        for _ in range(2):
            await wire.send(head + b"\r\n\r\n")
            assert await wire.head() == (100, {})
            await wire.send(body)
            assert (await wire.answer()).status == 200
    assert mock.journal.total == 2


async def test_user_info_of_a_url_is_the_backends_key_and_never_shown(
    recorder: Recorder, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    url = recorder.url.replace("http://", "http://me:p%40ss%3Aw%C3%B6rd@") + "/v1"
    gateway = await start_gateway(url, REFUSED.replace("//", "//me:p%40ss@"))
    await until(lambda: gateway.parts.health.ready)
    answers = [await gateway.chat() for _ in range(4)]
    answers += [await get(gateway, path) for path in ("/", "/health", "/metrics", "/v1/models")]
    expected = "Basic " + base64.b64encode("me:p@ss:w\u00f6rd".encode()).decode()
    assert {seen.header("authorization") for seen in recorder.seen} == {expected}
    (shown, _) = (await gateway.health())["downstream"]["backends"]
    assert shown["url"] == recorder.url + "/v1"
    await gateway.client.close()
    told = [caplog.text, gateway.log.getvalue(), str([dict(span.attributes or {}) for span in gateway.spans()])]
    told += [answer.body.decode() + str(answer.headers) for answer in answers]
    for text in told:
        assert "p%40ss" not in text
        assert "p@ss" not in text
        assert "me:" not in text


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
async def test_a_backends_url_may_end_with_v1_or_not(
    recorder: Recorder, start_gateway: StartGateway, suffix: str
) -> None:
    gateway = await start_gateway(recorder.url + suffix)
    assert (await gateway.chat()).status == 200
    assert recorder.seen[0].path == CHAT_PATH


async def test_a_backends_url_may_have_a_path_of_its_own(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(f"{recorder.url}/tenant/a%20b/v1")
    assert (await gateway.chat()).status == 200
    assert recorder.seen[0].path == f"/tenant/a%20b{CHAT_PATH}"


# Bodies

ODD = (
    b' {\r\n\t"x_unknown" : {"model":"inner","deep":[1.0,1e5,1E+05,-0,-0.0,12345678901234567890123,0.1000,1e-400]} ,'
    b'"messages":[{"role":"user","content":"\\u00e9\\/ \xc3\xa9 \\ud83d\\ude00","model":"no"}],'
    b'"temperature":1.10, "seed":9007199254740993,"stop":"\\"model\\":","user":"}{",'
)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ODD + b'"model":"demo-model"} \n', id="odd numbers, escapes, spaces, unknown fields"),
        pytest.param(BODY, id="plain"),
        pytest.param(
            ODD + b'"n":null,"stream":null,"n":1,"stream":false,"model":"demo-model"}', id="nulls and doubles"
        ),
    ],
)
async def test_a_body_goes_out_byte_for_byte(recorder: Recorder, start_gateway: StartGateway, body: bytes) -> None:
    gateway = await start_gateway(recorder.url)
    assert (await send(gateway, post(body))).status == 200
    assert (await send(gateway, chunked(body[:7], body[7:8], body[8:]))).status == 200
    assert [seen.body for seen in recorder.seen] == [body, body]
    assert [seen.header("content-length") for seen in recorder.seen] == [str(len(body))] * 2
    assert recorder.seen[1].header("transfer-encoding") is None


async def test_a_large_body_goes_out_byte_for_byte(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url)
    body = ODD + b'"model":"m","pad":"' + b"\xc3\xa9x" * 1_500_000 + b'"}'
    assert (await send(gateway, post(body))).status == 200
    assert recorder.seen[0].body == body
    assert gateway.parts.memory.held == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (ODD + b'"model" :\t"caller"}', ODD + b'"model" :\t"small-model"}'),
        (ODD + b'"model":"a\\"b,}","n":1}', ODD + b'"model":"small-model","n":1}'),
        (ODD + b'"m\\u006fdel":"caller"}', ODD + b'"m\\u006fdel":"small-model"}'),
        (ODD + b'"model":null}', ODD + b'"model":"small-model"}'),
        (ODD + b'"model":"a","n":1,"model":"b"}', ODD + b'"model":"small-model","n":1,"model":"small-model"}'),
        (ODD + b'"n":1}', ODD.replace(b"{", b'{"model":"small-model",', 1) + b'"n":1}'),
    ],
)
async def test_only_the_model_is_set_when_the_target_names_another(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, body: bytes, expected: bytes
) -> None:
    file = config(
        tmp_path,
        f"""
backends:
  one: {{url: "{recorder.url}"}}
routes:
  - {{model: "*", targets: [{{backend: one, model: small-model}}]}}
""",
    )
    gateway = await start_gateway(gateway_config=file)
    assert (await send(gateway, post(body))).status == 200
    assert recorder.seen[0].body == expected
    assert recorder.seen[0].header("content-length") == str(len(expected))
    assert json.loads(expected)["model"] == "small-model"


@pytest.mark.parametrize("model", ["default", 'quo"te', "caf\u00e9"])
async def test_a_caller_who_names_no_model_gets_the_default_one(
    recorder: Recorder, start_gateway: StartGateway, model: str
) -> None:
    gateway = await start_gateway(recorder.url, model_name=model)
    for body in (b'{"prompt":"x"}', b'{"prompt":"x","model":null}', b'{"prompt":"x","model":"own"}'):
        assert (await send(gateway, post(body, path="/v1/completions"))).status == 200
    assert [json.loads(seen.body)["model"] for seen in recorder.seen] == [model, model, "own"]
    assert recorder.seen[0].body.endswith(b'"prompt":"x"}')
    assert recorder.seen[2].body == b'{"prompt":"x","model":"own"}'


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions", "/v1/embeddings", "/v1/responses"])
async def test_an_answer_comes_back_byte_for_byte(recorder: Recorder, start_gateway: StartGateway, path: str) -> None:
    gateway = await start_gateway(recorder.url)
    odd = b'\r\n {"a" : 1.0, "b":[1e5,-0.0, 12345678901234567890], "c":"\\u00e9\xc3\xa9","error": null, "choices":[]}\n'
    for pieces in ([odd], [odd[:9], odd[9:10], odd[10:]], [odd[:-1] + b" " * 300_000]):
        recorder.pieces = pieces
        answer = await gateway.chat(path=path, prompt="x", input="x")
        assert answer.status == 200
        assert answer.body == b"".join(pieces)
        assert answer.headers["content-length"] == str(len(answer.body))
    assert gateway.parts.memory.held == 0


@pytest.mark.parametrize("status", [400, 404, 409, 422, 429, 500, 501, 503])
async def test_an_error_answer_comes_back_byte_for_byte(
    recorder: Recorder, start_gateway: StartGateway, status: int
) -> None:
    gateway = await start_gateway(recorder.url, gateway_max_attempts=1)
    recorder.status = status
    recorder.pieces = [b' {"error" : {"message": "caf\xc3\xa9 \\u00e9", "code": 1.0, "more": [1e5]}} \n']
    for stream in (False, True):
        answer = await gateway.chat(stream=stream)
        assert answer.status == status
        assert answer.body == recorder.pieces[0]
        assert answer.headers["content-type"] == "application/json"


async def test_a_stream_goes_on_byte_for_byte_and_event_by_event(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.headers = [("content-type", "text/event-stream; charset=utf-8")]
    events = [
        b'event: x\r\nid: 7\r\ndata:{"choices":[{"index":0,"delta":{"content":"caf\xc3\xa9","odd":1.0}}]}\r\n\r\n',
        b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"two lines"}}]}\n\n',
        b'retry: 5\ndata:  {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"n":1e5}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
        b"data: [DONE]\n\n",
    ]
    whole = b"".join(events)
    recorder.pieces = [whole[n : n + 11] for n in range(0, len(whole), 11)]
    answer = await gateway.chat(stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.body == whole


async def test_events_go_on_as_they_arrive(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "stall", "with": {"after_events": 3}}])
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        assert (await wire.head())[0] == 200
        got = b""
        while got.count(b"data: ") < 3:
            got += await wire.some(1)
        assert gateway.parts.admission.in_flight == 1
        assert [call.ended for call in mock.journal.calls] == [None]
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await until(lambda: gateway.parts.admission.in_flight == 0)
    assert gateway.parts.memory.held == 0


async def test_a_caller_who_does_not_read_stops_the_backend_and_not_the_memory(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url, gateway_idle_timeout=0.3)
    size = 64 << 20
    text = b"x" * 16_000
    event = b'data: {"choices":[{"index":0,"delta":{"content":"' + text + b'"}}]}\n\n'
    count = size // len(event)
    recorder.headers = [("content-type", "text/event-stream")]
    recorder.pieces = [event] * count + [STREAM, b"data: [DONE]\n\n"]
    async with dial(gateway.url, receive_buffer=8_192) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        assert (await wire.head())[0] == 200
        written = -1
        while written != recorder.written:
            written = recorder.written
            await asyncio.sleep(0.5)
        assert written < size // 4
        buffered = max(connection.transport.get_write_buffer_size() for connection in connections(gateway))
        assert buffered < 1 << 20
        assert gateway.parts.memory.held < 1 << 20
        body = await wire.rest_of_chunks()
    assert body.count(b"\n\n") == count + 2
    assert body.endswith(b"data: [DONE]\n\n")
    assert len(recorder.seen) == 1


def connections(gateway: Gateway) -> list[Any]:
    """The open connections of callers, as aiohttp's server keeps them."""
    runner = gateway.client.server.runner
    assert runner is not None
    server = runner.server
    assert server is not None
    return server.connections


async def test_a_whole_answer_counts_as_held_until_it_is_taken(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.pieces = [ANSWER + b" " * (16 << 20)]
    async with dial(gateway.url, receive_buffer=8_192) as wire:
        await wire.send(post())
        assert (await wire.head())[0] == 200
        assert gateway.parts.memory.held > 16 << 20
        assert await wire.some(len(ANSWER)) == ANSWER
        await wire.some(16 << 20)
        await until(lambda: gateway.parts.memory.held == 0)


async def test_a_whole_answer_cut_off_on_its_way_is_not_followed_by_another(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.pieces = [ANSWER + b" " * (16 << 20)]
    async with dial(gateway.url, receive_buffer=8_192) as wire:
        await wire.send(post())
        assert (await wire.head())[0] == 200
        gateway.parts.admission.drain()
        gateway.parts.running.cut_off()
        rest = await wire.rest()
    assert len(rest) <= len(recorder.pieces[0])
    assert b"HTTP/1.1" not in rest
    await until(lambda: not len(gateway.parts.running))
    assert gateway.parts.memory.held == 0


# Odd, but legal


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda data: data.replace(b"HTTP/1.1", b"HTTP/1.0"), id="HTTP/1.0"),
        pytest.param(lambda data: data.replace(b"/v1", b"http://elsewhere:1/v1", 1), id="absolute form"),
        pytest.param(lambda data: data.replace(b"/v1/chat", b"/%761/chat", 1), id="escaped"),
        pytest.param(lambda data: data.replace(b"completions ", b"completions?api-version=1 "), id="with a query"),
        pytest.param(lambda data: b"\r\n" + data, id="after an empty line"),
        pytest.param(
            lambda data: data.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n", 1),
            id="asking for a websocket",
        ),
        pytest.param(
            lambda data: data.replace(
                b"\r\n\r\n",
                b"\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAA\r\n\r\n",
                1,
            ),
            id="asking for HTTP/2",
        ),
    ],
)
async def test_an_odd_but_legal_request_is_answered(
    recorder: Recorder, start_gateway: StartGateway, change: Callable[[bytes], bytes]
) -> None:
    gateway = await start_gateway(recorder.url)
    answer = await send(gateway, change(post()))
    assert (answer.status, answer.body) == (200, ANSWER)
    assert [(seen.path, seen.body) for seen in recorder.seen] == [(CHAT_PATH, BODY)]


@pytest.mark.parametrize("path", [b"/v1/chat%2Fcompletions", b"/v1/chat%2fcompletions", b"/v1//chat/completions"])
async def test_a_path_that_only_looks_like_one_of_ours_is_unknown(
    recorder: Recorder, start_gateway: StartGateway, path: bytes
) -> None:
    gateway = await start_gateway(recorder.url)
    answer = await send(gateway, post().replace(b"/v1/chat/completions", path, 1))
    assert answer.status == 404
    assert recorder.seen == []


async def test_the_media_type_of_an_answer_survives_an_odd_parameter(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.headers = [("content-type", 'application/json; note="\xe9"')]
    answer = await send(gateway, post())
    assert (answer.status, answer.body) == (200, ANSWER)
    assert {name.lower(): value for name, value in answer.headers.items()}["content-type"] == "application/json"


async def test_requests_sent_in_a_row_without_waiting_are_answered_in_order(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        streamed = json.dumps(CHAT | {"stream": True}).encode()
        await wire.send(post() + post(b"") + post(streamed) + post())
        answers = [await wire.answer() for _ in range(4)]
    assert [answer.status for answer in answers] == [200, 400, 200, 200]
    assert answers[2].body.endswith(b"data: [DONE]\n\n")
    assert answers[0].body == answers[3].body
    assert [call.ended for call in mock.journal.calls] == ["complete"] * 3


@pytest.mark.parametrize(
    ("version", "asked", "told"),
    [
        ("1.1", None, None),
        ("1.1", "keep-alive", None),
        ("1.1", "close", "close"),
        ("1.0", None, None),
        ("1.0", "keep-alive", "keep-alive"),
    ],
)
async def test_a_whole_answer_has_the_head_that_its_http_version_asks_for(
    recorder: Recorder, start_gateway: StartGateway, version: str, asked: str | None, told: str | None
) -> None:
    gateway = await start_gateway(recorder.url)
    connection = f"\r\nconnection: {asked}" if asked else ""
    request = post().replace(b"HTTP/1.1", f"HTTP/{version}{connection}".encode(), 1)
    async with dial(gateway.url) as wire:
        await wire.send(request)
        answer = await wire.answer()
        stays = told != "close" and (version, asked) != ("1.0", None)
        if stays:
            await wire.send(request)
            assert (await wire.answer()).body == ANSWER
        else:
            assert await wire.rest() == b""
    headers = {name.lower(): value for name, value in answer.headers.items()}

    assert (answer.status, answer.body) == (200, ANSWER)
    assert headers.get("connection") == told
    assert headers["content-length"] == str(len(ANSWER))
    assert headers["content-type"] == "application/json"
    assert parsedate_to_datetime(headers["date"])
    assert {"x-request-id", "x-trace-id", "x-gateway-attempts", "x-gateway-backend", "server-timing", "server"} <= set(
        headers
    )


async def test_a_caller_of_http_1_0_gets_a_stream_that_ends_with_its_connection(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.headers = [("content-type", "text/event-stream")]
    recorder.pieces = [STREAM, b"data: [DONE]\n\n"]
    async with dial(gateway.url) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()).replace(b"HTTP/1.1", b"HTTP/1.0"))
        status, headers = await wire.head()
        assert status == 200
        assert "transfer-encoding" not in {name.lower() for name in headers}
        assert await wire.rest() == b"".join(recorder.pieces)
