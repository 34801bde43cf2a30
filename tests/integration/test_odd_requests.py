"""Odd, but legal requests."""

import json
from collections.abc import Callable
from email.utils import parsedate_to_datetime

import pytest
from opentelemetry.trace import SpanKind

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.polling import until
from tests.integration.gateways import EXPLAINING, StartGateway, get
from tests.integration.recorder import ANSWER, STREAM, Recorder
from tests.integration.wire import BODY, dial, post, send


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


UPGRADES = [
    pytest.param({"connection": "upgrade", "upgrade": "websocket"}, id="websocket"),
    pytest.param({"connection": "Upgrade, HTTP2-Settings", "upgrade": "h2c", "http2-settings": "AAA"}, id="h2c"),
    pytest.param({"connection": "upgrade, keep-alive", "upgrade": "\udcff"}, id="what nobody knows"),
]


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize("streamed", [False, True])
async def test_after_a_request_that_asks_for_an_upgrade_the_connection_is_closed(
    mock: MockModel,
    start_gateway: StartGateway,
    upgrade: dict[str, str],
    *,
    streamed: bool,
) -> None:
    gateway = await start_gateway(mock)
    asking = post(json.dumps(CHAT | {"stream": streamed}).encode(), upgrade)
    async with dial(gateway.url) as wire:
        await wire.send(post() + asking + post(b"behind"))
        assert (await wire.answer()).status == 200
        answer = await wire.answer()
        assert await wire.rest() == b""
    assert answer.status == 200
    assert {name.lower(): value for name, value in answer.headers.items()}["connection"] == "close"
    assert mock.journal.total == 2


@pytest.mark.parametrize("upgrade", UPGRADES)
@pytest.mark.parametrize(("path", "status"), [("/v1/models", 200), ("/livez", 200), ("/nothing", 404)])
async def test_after_an_upgrade_without_a_body_the_connection_is_closed_as_well(
    mock: MockModel, start_gateway: StartGateway, upgrade: dict[str, str], path: str, status: int
) -> None:
    gateway = await start_gateway(mock)
    asking = post(b"", upgrade, path=path).replace(b"POST", b"GET", 1)
    async with dial(gateway.url) as wire:
        await wire.send(asking + post())
        answer = await wire.answer()
        assert await wire.rest() == b""
    assert answer.status == status
    assert {name.lower(): value for name, value in answer.headers.items()}["connection"] == "close"
    assert mock.journal.total == 0


async def test_an_upgrade_whose_body_comes_late_is_answered_before_the_connection_is_closed(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    asking = post(headers={"connection": "upgrade", "upgrade": "h2c"})
    async with dial(gateway.url) as wire:
        await wire.send(asking[:-10])
        await until(lambda: gateway.parts.byte_budget.held > 0)
        await wire.send(asking[-10:] + post())
        assert (await wire.answer()).status == 200
        assert await wire.rest() == b""
    assert mock.journal.total == 1


async def test_connect_is_no_method_of_ours_and_closes_the_connection(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(b"CONNECT elsewhere:443 HTTP/1.1\r\nhost: elsewhere:443\r\n\r\n" + post())
        answer = await wire.answer()
        assert await wire.rest() == b""
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert mock.journal.total == 0


async def test_what_options_asks_of_the_whole_server_is_answered_in_our_envelope(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    answer = await send(gateway, b"OPTIONS * HTTP/1.1\r\nhost: gateway\r\n\r\n")
    assert (answer.status, answer.error["code"]) == (404, "not_found")


@pytest.mark.parametrize("target", [b"http://gateway", b"http://gateway?x=1", b"http://gateway/"])
async def test_an_absolute_form_without_a_path_stands_for_the_root(
    mock: MockModel, start_gateway: StartGateway, target: bytes
) -> None:
    gateway = await start_gateway(mock)
    answer = await send(gateway, b"GET %s HTTP/1.1\r\nhost: gateway\r\n\r\n" % target)
    assert (answer.status, answer.json["service"]) == (200, "llm-gateway")


@pytest.mark.parametrize(
    "request_bytes",
    [
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", id="the preface of HTTP/2"),
        *(
            pytest.param(post().replace(b"HTTP/1.1", b"HTTP/" + version, 1), id=version.decode())
            for version in (b"0.9", b"2.0", b"1.2", b"9.9")
        ),
        pytest.param(b"GET /livez\r\n\r\n", id="without a version"),
        pytest.param(b"GET /livez HTTP/2.0\r\nhost: g\r\nconnection: keep-alive\r\n\r\n", id="kept alive"),
    ],
)
@pytest.mark.parametrize("behind", [False, True])
async def test_another_version_of_http_is_505(
    mock: MockModel, start_gateway: StartGateway, request_bytes: bytes, *, behind: bool
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        if behind:
            await wire.send(post())
            assert (await wire.answer()).status == 200
        await wire.send(request_bytes)
        answer = await wire.answer()
        assert await wire.rest() == b""
    assert (answer.status, answer.error["code"]) == (505, "invalid_request")
    assert answer.error["type"] == "server_error"
    assert {name.lower() for name in answer.headers} >= EXPLAINING
    assert mock.journal.total == int(behind)
    metrics = await gateway.metrics()
    assert 'gateway_requests_total{outcome="invalid_request",route="other",status="505"} 1.0' in metrics


@pytest.mark.parametrize("path", ["/chat/completions", "/completions", "/embeddings", "/responses", "/messages"])
@pytest.mark.parametrize("base", ["", "/v1"])
async def test_a_prompt_may_be_posted_without_v1(
    recorder: Recorder, start_gateway: StartGateway, path: str, base: str
) -> None:
    gateway = await start_gateway(recorder.url + base)
    body = b'{"messages":[{"role":"user"}],"prompt":"x","input":"x","model":"m"}'
    with_v1, without = [await send(gateway, post(body, path=form)) for form in ("/v1" + path, path)]
    assert with_v1.status == without.status == 200
    assert [seen.path for seen in recorder.seen] == ["/v1" + path] * 2
    assert [seen.body for seen in recorder.seen] == [body, body]
    wrong = await send(gateway, post(b"[]", path=path))
    assert (wrong.status, wrong.error["code"]) == (400, "invalid_request")
    metrics = await gateway.metrics()
    assert f'route="/v1{path}"' in metrics
    assert f'route="{path}"' not in metrics
    await until(lambda: len(gateway.spans()) >= 5)
    assert {span.name for span in gateway.spans() if span.kind is SpanKind.SERVER} == {f"POST /v1{path}"}


async def test_models_are_listed_without_v1(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for path in ("/models", "/models/demo-model"):
        answer = await get(gateway, path)
        assert (answer.status, answer.body) == (200, (await get(gateway, "/v1" + path)).body)
    assert 'route="/models' not in await gateway.metrics()


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("/v1/chat/completions/", "/v1/chat/completions"),
        ("//v1/chat/completions", "/v1/chat/completions"),
        ("/v1//chat/completions", "/v1/chat/completions"),
        ("/v1/v1/chat/completions", "/v1/chat/completions"),
        ("/v1/v1//V1/Chat/Completions//", "/v1/chat/completions"),
        ("/V1/chat/completions", "/v1/chat/completions"),
        ("/chat/completions/", "/v1/chat/completions"),
        ("//chat/completions", "/v1/chat/completions"),
        ("/v1/Embeddings", "/v1/embeddings"),
        ("/v1/responses/", "/v1/responses"),
        ("/v1/models/", "/v1/models"),
        ("/models/", "/v1/models"),
        ("//v1/models/my-model", "/v1/models/{id}"),
        ("/Health", "/health"),
        ("/metrics/", "/metrics"),
        ("/chat", None),
        ("/v1/audio", None),
        ("/v2/chat/completions", None),
        ("/v1", None),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_near_miss_names_the_right_path(
    recorder: Recorder, start_gateway: StartGateway, path: str, right: str | None, method: str
) -> None:
    gateway = await start_gateway(recorder.url)
    answer = await send(gateway, post(path=path).replace(b"POST", method.encode(), 1))
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    message = str(answer.error["message"])
    assert message.endswith(f"the right one is {right}." if right else "GET / says where to look.")
    assert recorder.seen == []
    metrics = await gateway.metrics()
    assert 'gateway_requests_total{outcome="not_found",route="other",status="404"} 1.0' in metrics


@pytest.mark.parametrize(
    ("path", "near"),
    [
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/chat/completion", "/v1/chat/completions"),
        ("/v1/Chat/Completion/", "/v1/chat/completions"),
        ("/openai/v1/chat/completions", "/v1/chat/completions"),
        ("/v2/chat/completions", "/v1/chat/completions"),
        ("/v1/message", "/v1/messages"),
        ("/v1/model", "/v1/models"),
        ("/healthz", "/health"),
        ("/metric", "/metrics"),
        ("/request", None),
        ("/confi", None),
        ("/v1/foo", None),
        ("/v1/chat/completions" + "s" * 100, None),
    ],
)
async def test_a_path_that_is_like_a_known_one_is_answered_by_a_question(
    recorder: Recorder, start_gateway: StartGateway, path: str, near: str | None
) -> None:
    gateway = await start_gateway(recorder.url)
    answer = await send(gateway, post(path=path))
    assert (answer.status, answer.error["code"]) == (404, "not_found")
    middle = f"Is {near} meant?" if near else "Prompts go to /v1/chat/completions;"
    assert answer.error["message"] == f"There is nothing at this path. {middle} GET / says where to look."
    assert recorder.seen == []


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
