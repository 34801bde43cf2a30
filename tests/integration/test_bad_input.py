"""Bad input: OpenAI's envelope with ids, nothing reflected, nothing forwarded, nothing held afterwards."""

import asyncio
import json
import re
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.http import Answer
from testkit.polling import until
from tests.integration.gateways import Gateway, StartGateway
from tests.integration.wire import BODY, chunked, dial, post, send

MARK = "m4rk3d"
"""A word of the caller's that no answer to bad input and no log line may hold."""
MARKED: dict[str, Any] = {"model": "demo-model", "messages": [{"role": "user", "content": MARK}]}
LIMIT = 20_000
"""Bytes a body may have in these tests."""
KINDS = {401: "authentication_error"}


def check_error(answer: Answer, status: int, code: str, param: str | None = None) -> None:
    """The envelope, with everything that explains it, and with nothing of the inside or of the caller."""
    assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, param)
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert set(json.loads(answer.body)) == {"error"}
    kind = "server_error" if status >= 500 else KINDS.get(status, "invalid_request_error")
    assert answer.error["type"] == kind
    assert answer.error["message"]
    assert answer.headers["content-type"] == "application/json"
    assert re.fullmatch(r"[!-~]{1,128}", answer.headers["x-request-id"])
    assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["x-trace-id"])
    assert answer.headers["x-gateway-attempts"] == "0"
    assert "x-gateway-backend" not in answer.headers
    assert answer.headers["server-timing"].startswith("queue;dur=")
    shown = answer.body.decode() + str(answer.headers)
    for word in (MARK, "Traceback", "aiohttp", ".py", "msgspec"):
        assert word not in shown


async def check_unharmed(gateway: Gateway, mock: MockModel, caplog: pytest.LogCaptureFixture | None = None) -> None:
    """Nothing was forwarded, nothing is held, nothing was told, and a good prompt is answered as ever."""
    assert mock.journal.total == 0
    await until(lambda: not len(gateway.parts.in_flight))
    assert gateway.parts.admission.in_flight == 0
    assert gateway.parts.byte_budget.held == 0
    if caplog is not None:
        assert MARK not in caplog.text
        assert "Traceback" not in caplog.text
    answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == 1
    assert gateway.parts.admission.in_flight == 0
    assert gateway.parts.byte_budget.held == 0


def changed(**changes: Any) -> bytes:  # noqa: ANN401
    return json.dumps(MARKED | changes).encode()


DEEP = b'{"model": "demo-model", "messages": ' + b"[" * 9_000 + b"]" * 9_000 + b"}"
DEEP_UNKNOWN = b'{"messages": [{"role": "user"}], "x": ' + b'{"a":' * 3_000 + b"1" + b"}" * 3_000 + b"}"


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        pytest.param(b"", "invalid_json", None, id="empty"),
        pytest.param(b" \r\n\t", "invalid_json", None, id="blank"),
        pytest.param(f"{MARK} is no JSON".encode(), "invalid_json", None, id="words"),
        pytest.param(json.dumps(MARKED).encode()[:-1], "invalid_json", None, id="cut"),
        pytest.param(json.dumps(MARKED).encode() + b" x", "invalid_json", None, id="more behind it"),
        pytest.param(json.dumps(MARKED).encode() * 2, "invalid_json", None, id="two of them"),
        pytest.param(b'{"messages": NaN}', "invalid_json", None, id="NaN"),
        pytest.param(json.dumps(MARKED).encode("utf-16"), "invalid_json", None, id="UTF-16"),
        pytest.param(b"\xef\xbb\xbf" * 2 + json.dumps(MARKED).encode(), "invalid_json", None, id="two order marks"),
        pytest.param(changed(x=1).replace(b'"x"', b'"model"'), "invalid_request", "model", id="two models"),
        pytest.param(changed(Model=MARK), "invalid_request", "model", id="model in another case"),
        pytest.param(changed(STREAM=True), "invalid_request", "stream", id="stream in another case"),
        pytest.param(
            changed(x="@").replace(b"@", b"\xff"), "invalid_json", None, id="invalid UTF-8 in an unknown field"
        ),
        pytest.param(changed(model="@").replace(b"@", b"\xc3\x28"), "invalid_json", None, id="invalid UTF-8"),
        pytest.param(b'{"model": "\\ud800", "messages": []}', "invalid_request", "messages", id="half a surrogate"),
        pytest.param(DEEP, "invalid_json", None, id="nested too deep"),
        pytest.param(DEEP_UNKNOWN, "invalid_json", None, id="nested too deep in an unknown field"),
        pytest.param(b"[" * LIMIT, "invalid_json", None, id="only brackets"),
        pytest.param(b"[]", "invalid_request", None, id="a list"),
        pytest.param(b"null", "invalid_request", None, id="null"),
        pytest.param(f'"{MARK}"'.encode(), "invalid_request", None, id="a text"),
        pytest.param(b"17", "invalid_request", None, id="a number"),
        pytest.param(b"{}", "invalid_request", "messages", id="messages missing"),
        pytest.param(changed(messages=None), "invalid_request", "messages", id="messages null"),
        pytest.param(changed(messages=[]), "invalid_request", "messages", id="no message"),
        pytest.param(changed(messages=MARK), "invalid_request", "messages", id="messages a text"),
        pytest.param(changed(messages=[MARK]), "invalid_request", "messages[0]", id="a message a text"),
        pytest.param(changed(messages=[{"content": MARK}]), "invalid_request", "messages[0].role", id="no role"),
        pytest.param(changed(messages=[{"role": 1}]), "invalid_request", "messages[0].role", id="role a number"),
        pytest.param(changed(model=5), "invalid_request", "model", id="model a number"),
        pytest.param(changed(model=""), "invalid_request", "model", id="model empty"),
        pytest.param(changed(model="m" * 513), "invalid_request", "model", id="model too long"),
        pytest.param(changed(stream=MARK), "invalid_request", "stream", id="stream a text"),
        pytest.param(changed(n=0), "invalid_request", "n", id="n zero"),
        pytest.param(changed(n=1.5), "invalid_request", "n", id="n a fraction"),
        pytest.param(changed(temperature=MARK), "invalid_request", "temperature", id="temperature a text"),
        pytest.param(changed(max_tokens=[1]), "invalid_request", "max_tokens", id="max_tokens a list"),
        pytest.param(changed(stream_options=1), "invalid_request", "stream_options", id="stream_options a number"),
        pytest.param(
            changed(stream_options={"include_usage": 1}),
            "invalid_request",
            "stream_options.include_usage",
            id="include_usage a number",
        ),
    ],
)
async def test_a_wrong_body_is_told_and_the_connection_goes_on(
    mock: MockModel,
    start_gateway: StartGateway,
    caplog: pytest.LogCaptureFixture,
    *,
    body: bytes,
    code: str,
    param: str | None,
) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT)
    async with dial(gateway.url) as wire:
        await wire.send(post(body))
        check_error(await wire.answer(), 400, code, param)
        await wire.send(b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n")
        assert (await wire.answer()).status == 200
    await check_unharmed(gateway, mock, caplog)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", b"{}", "prompt"),
        ("/v1/completions", b'{"prompt": 5}', "prompt"),
        ("/v1/embeddings", b"{}", "input"),
        ("/v1/embeddings", b'{"input": {}}', "input"),
        ("/v1/responses", b'{"input": 5}', "input"),
        ("/v1/responses", b'{"input": "x", "stream": "yes"}', "stream"),
    ],
)
async def test_a_wrong_field_of_every_other_call_is_named(
    mock: MockModel, start_gateway: StartGateway, path: str, body: bytes, param: str
) -> None:
    gateway = await start_gateway(mock)
    check_error(await send(gateway, post(body, path=path)), 400, "invalid_request", param)
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize(
    ("headers", "status", "code", "param"),
    [
        ({"content-type": "text/plain"}, 415, "unsupported_media_type", "content-type"),
        ({"content-type": ""}, 415, "unsupported_media_type", "content-type"),
        ({"content-type": "application/jsonp"}, 415, "unsupported_media_type", "content-type"),
        ({"content-type": f"multipart/form-data; boundary={MARK}"}, 415, "unsupported_media_type", "content-type"),
        *(
            ({"content-type": f"application/json{odd}"}, 415, "unsupported_media_type", "content-type")
            for odd in (
                *("; charset=utf-7", ";CHARSET=UTF-16", '; charset="utf-7"', "; charset='utf-8'", "; charset=utf-8x"),
                *("; charset=iso-8859-1", "; charset=", "; charset", "; charset = utf-7", '; charset="ut\\f-7"'),
                *(
                    "; charset=utf-8; charset=utf-7",
                    "; a=b; charset=utf-7",
                    '; a="b"; charset=utf-7',
                    "; charset*=utf-7",
                ),
                *(
                    ";; charset=utf-7",
                    "; a=b charset=utf-7",
                    "; charset=utf-8 charset=utf-7",
                    '; a="b\\"; charset=utf-7',
                ),
                *("; charset=\udcff", "; charset=utf-8, text/plain", ";, multipart/form-data; boundary=a"),
                "; \xa0charset=utf-7",
            )
        ),
        ({"content-encoding": "br"}, 415, "unsupported_media_type", "content-encoding"),
        ({"content-encoding": "gzip"}, 400, "invalid_request", "content-encoding"),
        ({"x-request-timeout": "0"}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": "-1"}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": "nan"}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": "inf"}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": "1e999"}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": ""}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": MARK}, 400, "invalid_request", "x-request-timeout"),
        *(
            ({"x-request-timeout": odd}, 400, "invalid_request", "x-request-timeout")
            for odd in (
                *(
                    "1e400",
                    "-inf",
                    "infinity",
                    "1e-400",
                    "1_000",
                    "\u0663",
                    "\uff11",
                    "0x10",
                    " ",
                    "1, 2",
                    "1,5",
                    "1;q=1",
                ),
                *("9" * 5000, "5s", "1 2", "True", "-0", "\udcff"),
            )
        ),
        ({"x-request-timeout": "5\r\nx-request-timeout: 6"}, 400, "invalid_request", "x-request-timeout"),
        ({"x-request-timeout": "5\r\nX-Request-Timeout: 5"}, 400, "invalid_request", "x-request-timeout"),
        (
            {"x-gateway-commit": "complete\r\nx-gateway-commit: first_token"},
            400,
            "invalid_request",
            "x-gateway-commit",
        ),
        ({"x-gateway-commit": MARK}, 400, "invalid_request", "x-gateway-commit"),
        ({"x-gateway-commit": ""}, 400, "invalid_request", "x-gateway-commit"),
    ],
)
async def test_a_wrong_header_is_named(
    mock: MockModel, start_gateway: StartGateway, *, headers: dict[str, str], status: int, code: str, param: str
) -> None:
    gateway = await start_gateway(mock)
    check_error(await send(gateway, post(headers=headers)), status, code, param)
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize(
    "parameters",
    [
        *("; charset=utf-8", ";charset=UTF-8", '; Charset="utf-8"', "; charset=utf8;", " ; charset=US-ASCII ;", ";"),
        *("; odata.metadata=minimal", '; profile="https://a.example/b;c"; charset=utf-8', "; charset=utf-8; a=b/c"),
    ],
)
async def test_json_in_utf_8_is_taken_however_that_is_written(
    mock: MockModel, start_gateway: StartGateway, parameters: str
) -> None:
    gateway = await start_gateway(mock)
    assert (await send(gateway, post(headers={"content-type": f"application/json{parameters}"}))).status == 200


async def test_a_body_without_a_content_type_is_refused(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    data = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-length: %d\r\n\r\n%s" % (len(BODY), BODY)
    check_error(await send(gateway, data), 415, "unsupported_media_type", "content-type")
    await check_unharmed(gateway, mock)


async def test_a_post_without_any_body_is_empty(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    data = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n\r\n"
    check_error(await send(gateway, data), 400, "invalid_json")
    await check_unharmed(gateway, mock)


async def test_a_body_declared_too_large_is_refused_before_it_is_sent(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT)
    async with dial(gateway.url) as wire:
        await wire.send(post(b"", {"content-length": str(LIMIT + 1)}))
        check_error(await wire.answer(), 413, "request_too_large")
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize("chunk", [100, 5_000, LIMIT * 3])
async def test_a_body_too_large_in_chunks_is_refused_where_it_passes_the_limit(
    mock: MockModel, start_gateway: StartGateway, chunk: int
) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT)
    async with dial(gateway.url) as wire:
        await wire.send(chunked(*[b" " * chunk] * (2 * LIMIT // chunk + 1), end=b""))
        check_error(await wire.answer(), 413, "request_too_large")
    await check_unharmed(gateway, mock)


async def test_a_connection_whose_body_was_not_taken_is_closed(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT, gateway_body_timeout=0.2)

    async def one(data: bytes, status: int) -> None:
        async with dial(gateway.url) as wire:
            await wire.send(data)
            assert (await wire.answer()).status == status
            assert await wire.rest() == b""

    await asyncio.gather(
        one(post(b"", {"content-length": str(LIMIT + 1)}), 413),
        one(chunked(b" " * LIMIT, b" ", end=b""), 413),
        one(post(b"", {"content-length": "9"}), 408),
        one(chunked(b" ", end=b""), 408),
        one(post(b"", {"content-length": "9"}, path="/v1/nothing"), 404),
    )
    await check_unharmed(gateway, mock)


async def test_a_body_of_exactly_the_limit_is_taken(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT)
    body = BODY + b" " * (LIMIT - len(BODY))
    assert (await send(gateway, post(body))).status == 200
    assert (await send(gateway, chunked(body[:9], body[9:]))).status == 200
    check_error(await send(gateway, post(body + b" ")), 413, "request_too_large")
    check_error(await send(gateway, chunked(body, b" ")), 413, "request_too_large")
    assert mock.journal.total == 2
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(post(BODY[:10], {"content-length": str(len(BODY))}), id="with a length"),
        pytest.param(chunked(BODY[:10], end=b""), id="in chunks"),
        pytest.param(chunked(end=b"f"), id="in a chunk's head"),
        pytest.param(chunked(BODY, end=b"0\r\n"), id="in the trailer"),
        pytest.param(post(b"", {"content-length": "5", "expect": "100-continue"}), id="after 100 Continue"),
    ],
)
async def test_a_body_that_never_ends_times_out(mock: MockModel, start_gateway: StartGateway, begun: bytes) -> None:
    gateway = await start_gateway(mock, gateway_body_timeout=0.2)
    async with dial(gateway.url) as wire:
        await wire.send(begun)
        if b"100-continue" in begun:
            assert await wire.head() == (100, {})
        check_error(await wire.answer(), 408, "request_timeout")
    await check_unharmed(gateway, mock)


async def test_a_body_that_drips_for_ever_meets_the_deadline(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_request_deadline=0.5)

    async def drip() -> None:
        while True:
            await wire.send(b" ")
            await asyncio.sleep(0.02)

    async with dial(gateway.url) as wire:
        await wire.send(post(b"", {"content-length": str(len(BODY))}))
        dripping = asyncio.create_task(drip())
        try:
            check_error(await wire.answer(), 504, "deadline_exceeded")
        finally:
            dripping.cancel()
            await asyncio.gather(dripping, return_exceptions=True)
    await check_unharmed(gateway, mock)


async def test_the_deadline_holds_for_the_body_too(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for _ in range(5):
        async with dial(gateway.url) as wire:
            await wire.send(post(b"", {"content-length": "9", "x-request-timeout": "0.1"}))
            check_error(await wire.answer(), 504, "deadline_exceeded")
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ("GET /nothing", 404, "not_found"),
        ("GET /v1", 404, "not_found"),
        ("GET /v1/", 404, "not_found"),
        ("POST /v1/chat/completions/", 404, "not_found"),
        ("POST //v1/chat/completions", 404, "not_found"),
        ("POST /V1/chat/completions", 404, "not_found"),
        ("POST /v1/../v1/nothing", 404, "not_found"),
        ("POST /v1/audio/noise", 404, "not_found"),
        (f"GET /{MARK}", 404, "not_found"),
        (f"GET /%0d%0a{MARK}:%201", 404, "not_found"),
        ("GET /v1/chat/completions", 405, "method_not_allowed"),
        ("PUT /v1/chat/completions", 405, "method_not_allowed"),
        ("OPTIONS /v1/chat/completions", 405, "method_not_allowed"),
        ("OPTIONS /v1/models", 405, "method_not_allowed"),
        ("OPTIONS /", 405, "method_not_allowed"),
        ("POST /v1/models", 405, "method_not_allowed"),
        ("DELETE /v1/models/demo-model", 405, "method_not_allowed"),
        ("DELETE /", 405, "method_not_allowed"),
    ],
)
async def test_a_wrong_path_or_method_is_told(
    mock: MockModel, start_gateway: StartGateway, line: str, status: int, code: str
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(f"{line} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
        answer = await wire.answer()
        check_error(answer, status, code)
        assert ("allow" in answer.headers) == (status == 405)
        await wire.send(b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n")
        assert (await wire.answer()).status == 200
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/health", "/metrics"])
@pytest.mark.parametrize("method", ["OPTIONS", "POST", "DELETE"])
async def test_a_wrong_method_of_an_untraced_call_is_told_in_the_envelope(
    start_gateway: StartGateway, mock: MockModel, path: str, method: str
) -> None:
    gateway = await start_gateway(mock)
    answer = await send(gateway, f"{method} {path} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
    assert (answer.status, answer.error["code"]) == (405, "method_not_allowed")
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert set(answer.headers["allow"].replace(" ", "").split(",")) == {"GET", "HEAD"}


LARGE = MARK * 2_000


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(f"GET /v1/{LARGE} HTTP/1.1\r\nhost: gateway\r\n\r\n", id="request line"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost: gateway\r\nx-a: {LARGE}\r\n\r\n", id="a header's value"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost: gateway\r\nx-{LARGE}: 1\r\n\r\n", id="a header's name"),
        pytest.param(
            "GET /v1/models HTTP/1.1\r\nhost: gateway\r\n" + f"x-a: {MARK}\r\n" * 1_000 + "\r\n", id="their number"
        ),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost: gateway\r\nx-a: {LARGE}", id="without an end"),
        pytest.param(chunked(BODY, end=b"0\r\n").decode() + f"x-trailer: {LARGE}\r\n\r\n", id="a trailer"),
    ],
)
async def test_headers_too_large_are_431(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, data: str
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(data.encode())
        check_error(await wire.answer(), 431, "headers_too_large")
        assert await wire.rest() == b""
    await check_unharmed(gateway, mock, caplog)


HEAD = f"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\nx-a: {MARK}\r\n"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(f"{MARK}\r\n\r\n".encode(), id="a word"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + MARK.encode(), id="TLS"),
        pytest.param(f"POST {MARK} /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n".encode(), id="four words"),
        pytest.param(f"P@ST /{MARK} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode(), id="no method"),
        pytest.param(f"GET http://[{MARK} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode(), id="no url"),
        pytest.param(f"GET http://{MARK}:99999/v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n".encode(), id="no port"),
        pytest.param(f"GET /\xff{MARK} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode("latin-1"), id="no ASCII"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost {MARK}\r\n\r\n".encode(), id="a header without a colon"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost: a\r\nx a: {MARK}\r\n\r\n".encode(), id="a space in a name"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-a: \0{MARK}\r\n\r\n".encode(), id="a NUL"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nhost: a\r\nx-a: 1\r\n {MARK}\r\n\r\n".encode(), id="a folded header"),
        pytest.param(f"GET /v1/models HTTP/1.1\r\nx-a: {MARK}\r\n\r\n".encode(), id="no host"),
        pytest.param(f"{HEAD}content-length: {MARK}\r\n\r\n{{}}".encode(), id="a length that is no number"),
        pytest.param(f"{HEAD}content-length: -2\r\n\r\n{{}}".encode(), id="a negative length"),
        pytest.param(f"{HEAD}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}".encode(), id="two lengths"),
        pytest.param(
            f"{HEAD}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".encode(), id="length and chunks"
        ),
        pytest.param(f"{HEAD}transfer-encoding: {MARK}\r\n\r\n0\r\n\r\n".encode(), id="an unknown coding"),
        pytest.param(f"{HEAD}transfer-encoding: chunked\r\n\r\n{MARK}\r\n\r\n".encode(), id="a chunk without a size"),
        pytest.param(f"{HEAD}transfer-encoding: chunked\r\n\r\n-2\r\n{{}}\r\n".encode(), id="a negative chunk"),
        pytest.param(f"{HEAD}transfer-encoding: chunked\r\n\r\n2\r\n{{}}{MARK}\r\n".encode(), id="a chunk too long"),
        pytest.param(
            f"{HEAD}transfer-encoding: chunked\r\n\r\n{'f' * 17}\r\n{MARK}\r\n".encode(), id="a size beyond 64 bits"
        ),
    ],
)
async def test_malformed_http_is_400_and_ends_the_connection(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, data: bytes
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(data)
        check_error(await wire.answer(), 400, "invalid_request")
        assert await wire.rest() == b""
    await check_unharmed(gateway, mock, caplog)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nothing"])
async def test_a_chunk_that_turns_malformed_while_the_body_is_read_is_one_answer(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(chunked(BODY[:10], end=b"").replace(b"/v1/chat/completions", path.encode()))
        if path == "/v1/chat/completions":
            await until(lambda: gateway.parts.byte_budget.held > 0)
            await wire.send(f"{MARK}\r\n".encode())
            check_error(await wire.answer(), 400, "invalid_request")
        else:
            check_error(await wire.answer(), 404, "not_found")
            await wire.send(f"{MARK}\r\n".encode())
        assert await wire.rest() == b""
    await check_unharmed(gateway, mock, caplog)


async def test_garbage_behind_a_good_request_costs_only_itself(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "latency", "with": {"delay": 0.2}}])
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(post())
        await mock.called(1)
        await wire.send(f"{MARK}\r\n\r\n".encode())
        assert (await wire.answer()).status == 200
        check_error(await wire.answer(), 400, "invalid_request")
        assert await wire.rest() == b""
    assert mock.journal.total == 1
    assert mock.journal.calls[0].ended == "complete"
    assert gateway.parts.admission.in_flight == 0
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.parametrize(
    ("request_line", "status", "code"),
    [
        ("GET /v1/models", 200, None),
        ("POST /v1/nothing", 404, "not_found"),
        ("DELETE /v1/models", 405, "method_not_allowed"),
        ("GET /livez", 200, None),
    ],
)
@pytest.mark.parametrize("expected", ["100-continue", MARK])
async def test_expect_is_no_reason_to_answer_otherwise_or_to_ask_for_a_body(
    mock: MockModel, start_gateway: StartGateway, *, request_line: str, status: int, code: str | None, expected: str
) -> None:
    gateway = await start_gateway(mock)
    answer = await send(gateway, f"{request_line} HTTP/1.1\r\nhost: gateway\r\nexpect: {expected}\r\n\r\n".encode())
    if code is not None:
        check_error(answer, status, code)
    assert answer.status == status
    await check_unharmed(gateway, mock)


HOSTILE_IDS = ["", " ", "two words", "i" * 129, "i" * 8_000, "caf\u00e9", "\udcff\udcfe", "a\tb"]


@pytest.mark.parametrize("asked", HOSTILE_IDS)
async def test_a_hostile_request_id_is_replaced_everywhere(
    mock: MockModel, start_gateway: StartGateway, asked: str
) -> None:
    gateway = await start_gateway(mock)
    for body, status in ((BODY, 200), (b"", 400)):
        answer = await send(gateway, post(body, {"x-request-id": asked}))
        assert answer.status == status
        given = answer.headers["x-request-id"]
        assert given != asked.strip()
        assert re.fullmatch(r"[!-~]{1,128}", given)
    assert mock.journal.total == 1
    assert mock.journal.calls[0].request_id not in (asked, asked.strip())


@pytest.mark.parametrize("asked", ["i" * 128, "<script>alert(1)</script>", "'\";--\\", "../../etc"])
async def test_a_visible_request_id_is_kept_as_it_is(mock: MockModel, start_gateway: StartGateway, asked: str) -> None:
    gateway = await start_gateway(mock)
    answer = await send(gateway, post(headers={"x-request-id": asked}))
    assert answer.headers["x-request-id"] == asked
    assert mock.journal.calls[0].request_id == asked


TRACE = "0af7651916cd43dd8448eb211c80319c"
HOSTILE_PARENTS = [
    "",
    MARK,
    f"00-{TRACE}-b7ad6b7169203331",
    f"00-{TRACE}-b7ad6b7169203331-01-more",
    f"ff-{TRACE}-b7ad6b7169203331-01",
    f"00-{'0' * 32}-b7ad6b7169203331-01",
    f"00-{TRACE}-{'0' * 16}-01",
    f"00-{TRACE.upper()}-b7ad6b7169203331-01",
    f"00-{TRACE[:-1]}g-b7ad6b7169203331-01",
    f"00-{TRACE[:-2]}+1-b7ad6b7169203331-01",
    f"00-{TRACE[:-3]}1_1-b7ad6b7169203331-01",
    f"00-{TRACE}-b7ad6b7169203331-0x",
    "-".join(["00"] * 2_000),
    "00-\udcff-\udcff-01",
]


@pytest.mark.parametrize("asked", HOSTILE_PARENTS)
async def test_a_hostile_traceparent_begins_a_new_trace(
    mock: MockModel, start_gateway: StartGateway, asked: str
) -> None:
    gateway = await start_gateway(mock)
    answer = await send(gateway, post(headers={"traceparent": asked}))
    assert answer.status == 200
    trace_id = answer.headers["x-trace-id"]
    assert re.fullmatch(r"[0-9a-f]{32}", trace_id)
    assert trace_id != TRACE
    assert re.fullmatch(rf"00-{trace_id}-[0-9a-f]{{16}}-01", mock.journal.calls[0].traceparent or "")
    check_error(await send(gateway, post(b"", {"traceparent": asked})), 400, "invalid_json")
    assert mock.journal.total == 1


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(post(BODY[:10], {"content-length": str(len(BODY))}), id="with a length"),
        pytest.param(chunked(BODY[:10], end=b""), id="in chunks"),
        pytest.param(b"POST /v1/chat/completions HTTP/1.1\r\nhost: gate", id="in its headers"),
    ],
)
@pytest.mark.parametrize("how", ["reset", "half closed"])
async def test_a_caller_who_leaves_in_the_middle_of_its_body_costs_nothing(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, begun: bytes, how: str
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(begun)
        if b"content-type" in begun:
            await until(lambda: gateway.parts.byte_budget.held > 0)
        if how == "reset":
            wire.leave()
        else:
            wire.half_close()
            assert await wire.rest() == b""
    await check_unharmed(gateway, mock, caplog)


async def test_a_flood_of_bad_input_leaves_nothing_behind(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT, gateway_body_timeout=0.3)
    pieces = [
        post(b""),
        post(b"[]"),
        post(f"{MARK}".encode()),
        post(b"", {"content-length": str(LIMIT * 2)}),
        post(b"", {"content-length": "50"}),
        chunked(b" " * LIMIT, b" "),
        chunked(end=f"{MARK}\r\n".encode()),
        post(headers={"content-type": "text/plain"}),
        post(path=f"/v1/{MARK}"),
        f"{MARK}\r\n\r\n".encode(),
        f"GET /{LARGE} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode(),
    ]

    async def one(data: bytes) -> int:
        answer = await send(gateway, data)
        check_error(answer, answer.status, str(answer.error["code"]), answer.error["param"])
        return answer.status

    statuses = await asyncio.gather(*(one(data) for data in pieces * 10))
    assert statuses == [400, 400, 400, 413, 408, 413, 400, 415, 404, 400, 431] * 10
    await check_unharmed(gateway, mock, caplog)


async def test_a_defect_of_ours_is_500_without_its_traceback(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(mock)

    def fail(*_: object) -> None:
        raise ValueError(MARK)

    monkeypatch.setattr(gateway.parts.pool, "route", fail)
    answer = await send(gateway, post())
    check_error(answer, 500, "internal_error")
    assert f"internal error, trace {answer.headers['x-trace-id']}" in caplog.text
    monkeypatch.setattr(gateway.parts.telemetry.metrics, "exposition", fail)
    answer = await send(gateway, b"GET /metrics HTTP/1.1\r\nhost: gateway\r\n\r\n")
    check_error(answer, 500, "internal_error")
    assert f"internal error, trace {answer.headers['x-trace-id']}" in caplog.text
    monkeypatch.undo()
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize("ended", [False, True])
async def test_headers_that_are_too_large_together_are_refused_before_their_end(
    mock: MockModel, start_gateway: StartGateway, *, ended: bool
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys="key")
    async with dial(gateway.url) as wire:
        await wire.send(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n")
        for number in range(10):
            await wire.send(b"x-%d: %b\r\n" % (number, b"x" * 8_000))
        if ended:
            await wire.send(b"\r\n")
        answer = await wire.answer()
        assert (answer.status, answer.error["code"]) == (431, "headers_too_large")
        await wire.rest()
    assert (await gateway.chat(headers={"authorization": "Bearer key"})).status == 200
