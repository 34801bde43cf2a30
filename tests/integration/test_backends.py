"""Backends as they are: urls, keys, headers, timers, probes, limits and weights, as `GATEWAY_CONFIG` gives them."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from mock_model.serve import MockModel
from testkit.polling import until
from tests.integration.backends_raw import STREAM_HEAD, RawCall, StartRaw, chunk, full_backlog
from tests.integration.gateways import REFUSED, Gateway, StartGateway, StartMock, config, get
from tests.integration.recorder import Recorder
from tests.integration.tls import tls_before

CHAT = "/chat/completions"
LONG = 3600.0


def one(folder: Path, url: str, **more: Any) -> Path:  # noqa: ANN401
    """A configuration with one backend, `a`, and one route `*`."""
    return routed(folder, {"a": {"url": url, **more}}, [{"backend": "a"}])


def routed(folder: Path, backends: dict[str, dict[str, Any]], targets: list[dict[str, Any]], model: str = "*") -> Path:
    """A configuration with one route."""
    return config(folder, json.dumps({"backends": backends, "routes": [{"model": model, "targets": targets}]}))


# Urls


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", f"/v1{CHAT}"),
        ("/", f"/v1{CHAT}"),
        ("/v1", f"/v1{CHAT}"),
        ("/v1/", f"/v1{CHAT}"),
        ("/v1beta/openai", f"/v1beta/openai{CHAT}"),
        ("/v1beta/openai/", f"/v1beta/openai{CHAT}"),
        ("/api/paas/v4", f"/api/paas/v4{CHAT}"),
        ("/inference", f"/inference{CHAT}"),
        ("/openai/v1", f"/openai/v1{CHAT}"),
    ],
)
@pytest.mark.parametrize("by_file", [True, False], ids=["file", "environment"])
async def test_a_url_is_a_base_as_the_sdks_take_it(  # noqa: PLR0917
    recorder: Recorder,
    start_gateway: StartGateway,
    tmp_path: Path,
    suffix: str,
    path: str,
    by_file: bool,  # noqa: FBT001
) -> None:
    if by_file:
        gateway = await start_gateway(gateway_config=one(tmp_path, recorder.url + suffix))
    else:
        gateway = await start_gateway(recorder.url + suffix)
    await until(lambda: gateway.parts.health.ready)
    assert (await gateway.chat()).status == 200
    assert [seen.path for seen in recorder.seen] == [path]
    assert {seen.path for seen in recorder.probed} == {"/health"}


async def test_a_query_ends_the_url_of_every_call(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path
) -> None:
    url = f"{recorder.url}/openai/deployments/d"
    file = one(tmp_path, url, query={"api-version": "2024-10-21", "x": "a b&c"})
    gateway = await start_gateway(gateway_config=file)
    assert (await gateway.chat()).status == 200
    async with gateway.client.post("/v1/embeddings", json={"model": "m", "input": "x"}) as response:
        assert response.status == 200
    query = "?api-version=2024-10-21&x=a%20b%26c"
    assert [seen.path for seen in recorder.seen] == [
        f"/openai/deployments/d{path}{query}" for path in (CHAT, "/embeddings")
    ]
    await until(lambda: recorder.probes > 0)
    assert {seen.path for seen in recorder.probed} == {"/health"}
    await gateway.client.close()
    shown = {(span.attributes or {}).get("url.full") for span in gateway.spans()}
    assert f"{url}{CHAT}" in shown


async def test_a_callers_query_goes_on_where_a_dialect_has_one_and_the_backends_wins(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = one(tmp_path, f"{recorder.url}/base", query={"api-version": "ours"})
    gateway = await start_gateway(gateway_config=file)
    for path in ("/v1/responses", "/v1/chat/completions"):
        url = f"{path}?api-version=theirs&include%5B%5D=a%20b&secret=s3cret"
        async with gateway.client.post(
            url, json={"model": "m", "input": "x", "messages": [{"role": "user"}]}
        ) as response:
            assert response.status == 200
    assert [seen.path for seen in recorder.seen] == [
        "/base/responses?include%5B%5D=a%20b&secret=s3cret&api-version=ours",
        "/base/chat/completions?api-version=ours",
    ]
    await gateway.client.close()
    assert "s3cret" not in str([dict(span.attributes or {}) for span in gateway.spans()])


# Keys and headers


async def test_the_key_goes_alone_in_the_header_that_is_named(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "k3y")
    gateway = await start_gateway(
        gateway_config=one(tmp_path, recorder.url, api_key_env="A_KEY", api_key_header="Api-Key")
    )
    assert (await gateway.chat(headers={"authorization": "Bearer mine", "api-key": "mine"})).status == 200
    assert recorder.seen[0].header("api-key") == "k3y"
    assert recorder.seen[0].header("authorization") is None


async def test_headers_of_a_backend_go_with_every_call_and_win_over_the_callers(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLIENT_SECRET", "s3cret")
    headers = {
        "X-Title": "my app",
        "user-agent": "house/1",
        "openai-organization": "org",
        "CF-Access-Client-Secret": {"env": "CLIENT_SECRET"},
    }
    gateway = await start_gateway(gateway_config=one(tmp_path, recorder.url, headers=headers))
    theirs = {"user-agent": "mine", "openai-organization": "mine"}
    assert (await gateway.chat(headers=theirs)).status == 200
    await gateway.chat(stream=True, headers=theirs)  # the recorder does not stream
    assert len(recorder.seen) > 1
    for seen in recorder.seen:
        assert seen.header("x-title") == "my app"
        assert seen.header("user-agent") == "house/1"
        assert seen.header("openai-organization") == "org"
        assert seen.header("cf-access-client-secret") == "s3cret"
        assert seen.header("content-type") == "application/json"


SECRETS = {"authorization", "api-key", "x-api-key", "cookie", "cf-access-client-secret"}


@pytest.mark.parametrize(
    "more",
    [
        {"api_key_env": "A_KEY"},
        {"api_key_env": "A_KEY", "api_key_header": "api-key"},
        {"headers": {"authorization": "Token t", "x-title": "my app"}},
        {"headers": {"x-api-key": "k", "cookie": "a=b", "CF-Access-Client-Secret": {"env": "A_KEY"}}},
    ],
    ids=["key", "key in another header", "authorization", "secrets"],
)
async def test_a_probe_carries_no_key(
    recorder: Recorder,
    start_gateway: StartGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: dict[str, Any],
) -> None:
    monkeypatch.setenv("A_KEY", "k3y")
    gateway = await start_gateway(gateway_config=one(tmp_path, recorder.url, **more))
    await until(lambda: gateway.parts.health.ready)
    assert (await gateway.chat()).status == 200
    assert SECRETS & {name for name, _ in recorder.seen[0].headers}
    for seen in recorder.probed:
        assert not SECRETS & {name for name, _ in seen.headers}
        assert seen.header("x-title") == ("my app" if "x-title" in more.get("headers", {}) else None)


async def test_a_probe_carries_neither_user_info_nor_the_key_of_the_environment(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    url = recorder.url.replace("//", "//me:secret@")
    for gateway in (await start_gateway(url, gateway_backend_api_key="k3y"), await start_gateway(url)):
        assert (await gateway.chat()).status == 200
        assert recorder.seen[-1].header("authorization")
    await until(lambda: recorder.probes >= 2)
    assert [seen.header("authorization") for seen in recorder.probed] == [None] * recorder.probes


# Probes


async def test_each_backend_has_a_probe_of_its_own(
    recorder: Recorder, start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    silent = await start_mock()
    silent.set_faults([{"kind": "hang_before_headers", "match": {"path": "/health"}}])
    backends: dict[str, dict[str, Any]] = {
        "a": {"url": f"{recorder.url}/base", "probe": {"path": "/up?x=1", "interval": 0.05}},
        "b": {"url": REFUSED, "probe": False},
        "c": {"url": silent.url, "probe": {"timeout": 0.1}},
    }
    file = routed(tmp_path, backends, [{"backend": name} for name in backends])
    gateway = await start_gateway(gateway_config=file, gateway_probe_interval=LONG, gateway_probe_timeout=LONG)
    await until(lambda: gateway.parts.health.ready)
    await until(lambda: recorder.probes > 3)
    assert {seen.path for seen in recorder.probed} == {"/up?x=1"}
    states = [(each["probe"]["ok"], each["status"]) for each in (await gateway.health())["downstream"]["backends"]]
    assert states == [(True, "ok"), (None, "ok"), (False, "degraded")]


async def test_the_probes_path_is_a_setting_and_empty_means_no_probes(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url, gateway_probe_path="/livez")
    await until(lambda: gateway.parts.health.ready)
    assert {seen.path for seen in recorder.probed} == {"/livez"}
    before = recorder.probes
    without = await start_gateway(recorder.url, gateway_probe_path="", gateway_probe_interval=0.01)
    assert (await get(without, "/readyz")).status == 200
    assert (await without.chat()).status == 200
    assert recorder.probes == before
    (backend,) = (await without.health())["downstream"]["backends"]
    assert (backend["status"], backend["probe"]["ok"]) == ("ok", None)


async def test_a_backend_whose_probes_are_late_and_whose_prompts_succeed_is_not_down(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 503}, "match": {"path": "/health"}}])
    gateway = await start_gateway(mock, gateway_probe_interval=0.5)  # three more that fail say "down" again
    replica = gateway.parts.pool.replicas[0]
    await until(lambda: replica.status == "down")
    answer = await get(gateway, "/health")
    assert answer.status == 503
    assert 'gateway_backend_status{backend="backend-1"} 2.0' in await gateway.metrics()
    assert (await gateway.chat()).status == 200
    assert replica.status == "degraded"
    answer = await get(gateway, "/health")
    assert answer.status == 200
    assert 'gateway_backend_status{backend="backend-1"} 1.0' in await gateway.metrics()
    mock.set_faults([])
    await until(lambda: replica.status == "ok")
    assert 'gateway_backend_status{backend="backend-1"} 0.0' in await gateway.metrics()


# Timers


async def hang(call: RawCall) -> None:
    """No byte of an answer."""
    await call.left()


async def stall(call: RawCall) -> None:
    """The first half of an answer; of a stream, its first content."""
    if b'"stream": true' in call.body:
        await call.send(STREAM_HEAD)
        await call.events(chunk("word "))
    else:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    await call.left()


TIMERS = dict.fromkeys(
    ("gateway_connect_timeout", "gateway_first_token_timeout", "gateway_answer_timeout", "gateway_idle_timeout"), 300
)


@pytest.mark.parametrize(
    ("timer", "stream"), [("first_token", True), ("answer", False), ("idle", True), ("idle", False)]
)
async def test_each_backend_has_timeouts_of_its_own(
    start_raw: StartRaw, start_gateway: StartGateway, tmp_path: Path, timer: str, *, stream: bool
) -> None:
    backend = await start_raw(stall if timer == "idle" else hang)
    file = one(tmp_path, backend.url, timeouts={timer: 0.2})
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1, **TIMERS)
    answer = await gateway.chat(stream=stream)
    if stream and timer == "idle":
        assert b'"param":"idle"' in answer.body.replace(b" ", b"")
        return
    assert (answer.status, answer.error["code"], answer.error["param"]) == (504, "backend_timeout", timer)
    assert "0.2 s" in answer.error["message"]


@pytest.fixture
async def blackhole() -> AsyncIterator[str]:
    async with full_backlog() as url:
        yield url


async def test_the_connect_timeout_of_a_backend_holds_for_its_connections(
    blackhole: str, mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    backends: dict[str, dict[str, Any]] = {
        "a": {"url": blackhole, "timeouts": {"connect": 0.2}, "probe": False},
        "b": {"url": mock.url},
    }
    file = routed(tmp_path, backends, [{"backend": "a"}, {"backend": "b"}])
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1, **TIMERS)
    answer = await gateway.chat()
    assert (answer.status, answer.headers["x-gateway-backend"]) == (200, "b")
    assert 'desc="a connect_timeout"' in answer.headers["server-timing"]
    (a, _) = (await gateway.health())["downstream"]["backends"]
    assert a["last_error"]["message"] == "a did not accept a connection within 0.2 s."


# Limits


async def test_a_full_replica_is_passed_over_then_the_target_then_the_request_is_refused(
    start_raw: StartRaw, start_gateway: StartGateway, tmp_path: Path
) -> None:
    go_on = asyncio.Event()

    async def wait(call: RawCall) -> None:
        await go_on.wait()
        await call.answer()

    raw = [await start_raw(wait) for _ in range(3)]
    backends: dict[str, dict[str, Any]] = {
        "a": {"urls": [raw[0].url, raw[1].url], "max_in_flight": 2},
        "b": {"url": raw[2].url, "max_in_flight": 1},
    }
    file = routed(tmp_path, backends, [{"backend": "a"}, {"backend": "b"}])
    gateway = await start_gateway(gateway_config=file)
    under_way = [asyncio.create_task(gateway.chat()) for _ in range(5)]
    await asyncio.gather(raw[0].called(2), raw[1].called(2), raw[2].called(1))
    refused = await gateway.chat()
    assert (refused.status, refused.error["code"]) == (503, "gateway_overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert "x-should-retry" not in refused.headers
    assert refused.attempts == 0
    assert 'gateway_shed_requests_total{reason="backend_full"} 1.0' in await gateway.metrics()
    go_on.set()
    answers = await asyncio.gather(*under_way)
    assert [answer.status for answer in answers] == [200] * 5
    assert sorted(answer.headers["x-gateway-backend"] for answer in answers) == ["a-1", "a-1", "a-2", "a-2", "b"]
    assert (await gateway.chat()).status == 200
    assert [len(each.calls) for each in raw][2] == 1
    await gateway.client.close()
    reasons = [
        (event.attributes or {})["gateway.skip_reason"]
        for span in gateway.spans()
        for event in span.events
        if event.name == "gateway.target_skipped"
    ]
    assert reasons == ["full"] * 3


async def test_a_retry_passes_a_full_replica_over(
    start_raw: StartRaw, start_gateway: StartGateway, tmp_path: Path
) -> None:
    """The only other replica is full: the failed one is asked again."""
    failures = [True]

    async def play(call: RawCall) -> None:
        if b"hang" in call.body:
            await call.left()
        elif failures:
            failures.clear()
            await call.answer(b"{}", status="500 Internal Server Error")
        else:
            await call.answer()

    raw = [await start_raw(play) for _ in range(2)]
    file = routed(tmp_path, {"a": {"urls": [each.url for each in raw], "max_in_flight": 1}}, [{"backend": "a"}])
    gateway = await start_gateway(gateway_config=file, gateway_backoff_initial=0.01)
    hanging = asyncio.create_task(gateway.chat(user="hang"))
    await until(lambda: len(raw[0].calls) + len(raw[1].calls) == 1)
    answer = await gateway.chat()
    assert (answer.status, answer.attempts) == (200, 2)
    assert sorted(len(each.calls) for each in raw) == [1, 2]
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


# Weights


def drawn(gateway: Gateway) -> list[dict[str, Any]]:
    """What was drawn for each request."""
    events = [event for span in gateway.spans() for event in span.events if event.name == "gateway.target_drawn"]
    return [dict(event.attributes or {}) for event in events]


async def test_weights_share_out_the_requests_and_the_trace_says_how(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    mocks = {name: await start_mock() for name in ("old", "new", "spare")}
    targets: list[dict[str, Any]] = [
        {"backend": "spare", "weight": 0},
        {"backend": "old", "weight": 9},
        {"backend": "new", "model": "canary", "weight": 1},
    ]
    backends = {name: {"url": mock.url} for name, mock in mocks.items()}
    gateway = await start_gateway(gateway_config=routed(tmp_path, backends, targets))
    gateway.parts.pool.routes[0]._rng.seed(1)
    answers = [await gateway.chat() for _ in range(100)]
    assert {answer.status for answer in answers} == {200}
    assert [answer.timing[1] for answer in answers] == [
        ("drawn", answer.headers["x-gateway-backend"], 0.0) for answer in answers
    ]
    counts = {name: mock.journal.total for name, mock in mocks.items()}
    assert counts["old"] + counts["new"] == 100
    assert 2 <= counts["new"] <= 22
    assert {call.model for call in mocks["new"].journal.calls} == {"canary"}
    await gateway.client.close()
    events = drawn(gateway)
    assert len(events) == 100
    assert (
        events.count({"gateway.backend": "new", "gen_ai.request.model": "canary", "gateway.weight": 1}) == counts["new"]
    )
    assert (
        events.count({"gateway.backend": "old", "gen_ai.request.model": "demo-model", "gateway.weight": 9})
        == counts["old"]
    )
    lines = [json.loads(line) for line in gateway.log.getvalue().splitlines()]
    told = [line["drawn"] for line in lines if line.get("drawn")]
    assert told.count({"backend": "new", "model": "canary", "weight": 1}) == counts["new"]


async def test_the_others_are_the_fallbacks_of_the_drawn_one_in_order(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    mocks = {name: await start_mock() for name in ("spare", "idle", "main")}
    for name in ("main", "spare"):
        mocks[name].set_faults([{"kind": "status", "with": {"status": 500}}])
    targets = [{"backend": name, "weight": int(name == "main")} for name in mocks]
    backends = {name: {"url": mock.url} for name, mock in mocks.items()}
    gateway = await start_gateway(gateway_config=routed(tmp_path, backends, targets), gateway_max_attempts=1)
    answer = await gateway.chat()
    assert (answer.status, answer.headers["x-gateway-backend"]) == (200, "idle")
    assert [part.split('"')[1] for part in answer.headers["server-timing"].split(", ")[1:]] == [
        "main",
        "main status_500",
        "spare status_500",
        "idle ok",
    ]


async def test_without_weights_nothing_is_drawn(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    assert (await gateway.chat()).status == 200
    await gateway.client.close()
    assert drawn(gateway) == []
    assert "drawn" not in gateway.log.getvalue()


async def test_a_prefix_takes_the_models_that_begin_with_it_and_is_not_listed(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    gateway = await start_gateway(
        gateway_config=routed(tmp_path, {"a": {"url": mock.url}}, [{"backend": "a"}], "qwen-*")
    )
    assert (await gateway.chat(model="qwen-3/8b")).status == 200
    refused = await gateway.chat(model="qwen")
    assert (refused.status, refused.error["code"]) == (404, "model_not_found")
    assert [call.model for call in mock.journal.calls] == ["qwen-3/8b"]
    assert json.loads((await get(gateway, "/v1/models")).body)["data"] == []


# TLS


async def test_a_backend_gets_the_client_certificate_that_is_configured_for_it(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own = authority.issue_cert("gateway")
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    own.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(server)
    authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    async with tls_before(mock.url, server) as url:
        tls = {"ca": "ca.pem", "cert": "cert.pem", "key": "key.pem"}
        backends: dict[str, dict[str, Any]] = {
            "with": {"url": url, "tls": tls, "timeouts": {"connect": 30}, "probe": {"timeout": 30}},
            "without": {"url": url, "tls": {"ca": "ca.pem"}, "timeouts": {"connect": 30}, "probe": False},
        }
        routes = [{"model": name, "targets": [{"backend": name}]} for name in backends]
        file = config(tmp_path, json.dumps({"backends": backends, "routes": routes}))
        gateway = await start_gateway(gateway_config=file, gateway_max_attempts=1)
        await until(lambda: gateway.parts.health.ready)
        assert [(await gateway.chat(model="with", stream=stream)).status for stream in (False, True)] == [200, 200]
        assert (await gateway.chat(model="without")).status == 502
        (first, _) = (await gateway.health())["downstream"]["backends"]
        assert first["probe"]["ok"] is True
    assert [call.model for call in mock.journal.calls] == ["with", "with"]


# Headers of an answer


@pytest.mark.parametrize(
    ("headers", "good"),
    [
        (f"x-large: {'a' * 60_000}\r\n", True),
        ("".join(f"x-{n}: {'a' * 80}\r\n" for n in range(600)), True),
        (f"x-large: {'a' * 70_000}\r\n", False),
        ("".join(f"x-{n}: {'a' * 8_000}\r\n" for n in range(9)), False),
    ],
    ids=["one of 60 KB", "600 of 80 B", "one of 70 KB", "nine of 8 KB"],
)
async def test_headers_of_an_answer_may_be_64_kib(
    start_raw: StartRaw, start_gateway: StartGateway, headers: str, *, good: bool
) -> None:
    backend = await start_raw(lambda call: call.answer(headers=headers))
    gateway = await start_gateway(backend.url, gateway_max_attempts=1)
    answers = [await gateway.chat() for _ in range(2)]
    if good:
        assert [answer.status for answer in answers] == [200, 200]
        assert [call.turn for call in backend.calls] == [1, 2]  # over one connection
        return
    for answer in answers:
        assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
