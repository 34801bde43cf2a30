"""Gateway keys, and the headers that explain every answer, a refusal included."""

import re
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import Answer
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import EXPLAINING, KEY, StartGateway, StartMock
from tests.integration.recorder import Recorder
from tests.integration.wire import BODY, chunked, dial, post, send


async def test_every_answer_of_v1_explains_itself(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock()
    gateway = await start_gateway(mock, gateway_api_keys=[KEY], gateway_max_attempts=1)
    key = {"authorization": f"Bearer {KEY}"}

    async def call(method: str, path: str, **options: Any) -> Answer:  # noqa: ANN401
        async with gateway.client.request(method, path, **options) as response:
            return await Answer.of(response)

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
        ("/v1/messages", CHAT),
        ("/v1/messages", CHAT | {"stream": True}),
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
    assert mock.journal.total == 14


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
    shown = (authorization or "").startswith("Bearer ") and authorization != "Bearer "
    again = ', error="invalid_token"' if shown else ""
    assert answer.headers["www-authenticate"] == f'Bearer realm="llm-gateway"{again}'
    assert mock.journal.total == 0


@pytest.mark.parametrize("authorization", [f"Bearer {KEY}", f"bearer {KEY}", "Bearer gw-key-2", f"Bearer  {KEY} "])
async def test_each_of_the_keys_opens(mock: MockModel, start_gateway: StartGateway, authorization: str) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=f"{KEY}, gw-key-2\n")
    assert (await send(gateway, post(headers={"authorization": authorization}))).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"x-api-key": KEY},
        {"api-key": KEY},
        {"X-Api-Key": f" {KEY} "},
        {"authorization": "Bearer wrong", "x-api-key": KEY},
        {"authorization": "Basic wrong", "api-key": "gw-key-2"},
        {"authorization": f"Bearer {KEY}", "x-api-key": "wrong", "api-key": ""},
    ],
)
@pytest.mark.parametrize("path", [CHAT_PATH, "/chat/completions"])
async def test_a_key_may_come_in_any_of_three_headers_and_goes_no_further(
    recorder: Recorder, start_gateway: StartGateway, headers: dict[str, str], path: str
) -> None:
    gateway = await start_gateway(recorder.url, gateway_api_keys=[KEY, "gw-key-2"], gateway_backend_api_key="backends")
    assert (await send(gateway, post(headers=headers, path=path))).status == 200
    (seen,) = recorder.seen
    assert seen.header("authorization") == "Bearer backends"
    assert {name for name, _ in seen.headers} & {"x-api-key", "api-key"} == set()
    assert not [value for _, value in seen.headers if "gw-key" in value or "wrong" in value]


@pytest.mark.parametrize(
    "headers", [{"x-api-key": "wrong"}, {"api-key": ""}, {"x-api-key": f"Bearer {KEY}"}, {"key": KEY}]
)
async def test_a_wrong_key_is_refused_in_every_header(
    mock: MockModel, start_gateway: StartGateway, headers: dict[str, str]
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    answer = await send(gateway, post(headers=headers))
    assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
    assert answer.headers["www-authenticate"].startswith('Bearer realm="llm-gateway"')
    for name in ("`Authorization: Bearer KEY`", "`x-api-key: KEY`", "`api-key: KEY`"):
        assert name in str(answer.error["message"])
    assert mock.journal.total == 0


@pytest.mark.parametrize(
    "line",
    [
        *(f"POST {path}" for path in ("/chat/completions", "/completions", "/embeddings", "/responses", "/messages")),
        *("GET /models", "GET /models/demo-model", "GET /chat/completions", "DELETE /models", "HEAD /models"),
    ],
)
async def test_without_v1_a_key_is_needed_as_well(mock: MockModel, start_gateway: StartGateway, line: str) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    async with gateway.client.request(*line.split()) as response:
        assert response.status == 401
    assert mock.journal.total == 0


@pytest.mark.parametrize("path", [CHAT_PATH, "/chat/completions", "/v1/none", "/v1/models", "/models"])
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
    assert gateway.parts.byte_budget.held == 0


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


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden", "400 Bad Request"])
async def test_what_a_backend_asks_a_key_for_is_not_asked_of_the_caller(
    start_raw: StartRaw, start_gateway: StartGateway, status: str
) -> None:
    """The content is refused, which is passed on; the key is refused, which is not."""
    for words in (b"the key is wrong", b"refused by the content policy"):
        body = b'{"error": {"message": "%s", "code": "%s"}}' % (
            words,
            b"content_filter" if b"policy" in words else b"key",
        )

        async def play(call: RawCall, body: bytes = body) -> None:
            await call.answer(body, status=status, headers='www-authenticate: Bearer realm="backend"\r\n')

        backend = await start_raw(play)
        gateway = await start_gateway(backend.url, gateway_api_keys=[KEY])
        answer = await gateway.chat(headers={"authorization": f"Bearer {KEY}"})
        assert answer.status in {400, 401, 403, 502}
        assert "www-authenticate" not in {name.lower() for name in answer.headers}
