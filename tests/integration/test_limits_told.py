"""Every answer to a key with limits tells of them, whatever the answer is, and has each header once."""

from collections import Counter
from itertools import product

import pytest

from gateway.server.handlers import SMALL_ANSWER
from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH
from tests.integration.gateways import EXPLAINING, Gateway
from tests.integration.recorder import ANSWER, STREAM, Recorder
from tests.integration.test_key_limits import Start, key, start  # noqa: F401 - a fixture
from tests.integration.wire import dial

TOLD = {f"x-ratelimit-{word}-{kind}" for word in ("limit", "remaining", "reset") for kind in ("requests", "tokens")}
CHAT = b'{"model": "demo-model", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}'
STREAMED = CHAT[:-1] + b', "stream": true}'
LIMITS = "limits: {requests_per_minute: 1000, tokens_per_day: 1000000}, models: [demo-model]"
ODD = [
    ("x-request-id", "caf\u00e9"),
    ("request-id", "a b"),
    ("x-ratelimit-limit-requests", "9"),
    ("server-timing", "x"),
    ("x-gateway-backend", "liar"),
    ("retry-after", "20"),
    ("x-should-retry", "true"),
    ("allow", "PUT"),
]
"""Headers of a backend that ours must not come beside."""


def request(method: str, path: str, body: bytes | None = None, *, version: str = "1.1", **headers: str) -> bytes:
    """A request of the key as bytes; the connection is closed after its answer."""
    named = {"host": "gateway", "connection": "close", **key()}
    if body is not None:
        named |= {"content-length": str(len(body)), "content-type": "application/json"}
    named |= {name.replace("_", "-"): value for name, value in headers.items()}
    lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
    return f"{method} {path} HTTP/{version}\r\n{lines}\r\n".encode("utf-8", "surrogateescape") + (body or b"")


REQUESTS = {
    "whole": (request("POST", CHAT_PATH, CHAT), 200),
    "streamed": (request("POST", CHAT_PATH, STREAMED), 200),
    "whole over HTTP/1.0": (request("POST", CHAT_PATH, CHAT, version="1.0"), 200),
    "streamed over HTTP/1.0": (request("POST", CHAT_PATH, STREAMED, version="1.0"), 200),
    "passed through": (request("POST", "/v1/rerank", b'{"model": "demo-model"}'), 200),
    "a stored response that is nowhere": (request("GET", "/v1/responses/resp_1"), 404),
    "an odd id": (request("POST", CHAT_PATH, CHAT, x_request_id="caf\u00e9 \udcff"), 200),
    "models": (request("GET", "/v1/models"), 200),
    "models, without a body": (request("HEAD", "/v1/models"), 200),
    "a model": (request("GET", "/v1/models/demo-model"), 200),
    "no model of its own": (request("GET", "/v1/models/other"), 404),
    "no JSON": (request("POST", CHAT_PATH, b"{"), 400),
    "an odd timeout": (request("POST", CHAT_PATH, CHAT, x_request_timeout="soon"), 400),
    "a model that it may not use": (request("POST", CHAT_PATH, CHAT.replace(b"demo-model", b"other")), 403),
    "nothing there": (request("GET", "/v1/nothing"), 404),
    "another method": (request("PUT", CHAT_PATH, CHAT), 405),
    "too large": (request("POST", CHAT_PATH, b"", content_length="99999999999"), 413),
    "of another type": (request("POST", CHAT_PATH, CHAT, content_type="text/plain"), 415),
}


async def check(gateway: Gateway, sent: bytes, *also: str) -> tuple[int, bytes]:
    """Send a request; every header of its answer comes once, ours and `also` among them. Its status, and its body."""
    async with dial(gateway.url) as wire:
        await wire.send(sent)
        head, _, body = (await wire.rest()).partition(b"\r\n\r\n")
    status, *lines = head.decode("ascii").split("\r\n")
    names = Counter(line.partition(": ")[0].lower() for line in lines)
    assert names.keys() >= {*TOLD, *EXPLAINING, *also}, head
    assert set(names.values()) == {1}, head
    return int(status.split()[1]), body


async def test_whatever_is_asked(recorder: Recorder, start: Start) -> None:  # noqa: F811
    gateway: Gateway = await start(recorder.url, a=LIMITS)
    usual = recorder.headers + ODD[:5]
    for what, (sent, status) in REQUESTS.items():
        streams = b'"stream"' in sent
        recorder.pieces = [STREAM, b"data: [DONE]\n\n"] if streams else [ANSWER]
        recorder.headers = [("content-type", "text/event-stream"), *ODD] if streams else usual
        assert (await check(gateway, sent, *(["allow"] if status == 405 else [])))[0] == status, what


@pytest.mark.parametrize("status", [204, 299, 304, 400, 404, 429, 500, 503])
async def test_whatever_the_backend_answers(recorder: Recorder, start: Start, status: int) -> None:  # noqa: F811
    recorder.status = status
    recorder.headers += ODD
    if status in {204, 304}:
        recorder.pieces = [b""]
    for path, body in product((CHAT_PATH, "/v1/rerank"), (CHAT, STREAMED)):
        gateway: Gateway = await start(recorder.url, a=LIMITS, gateway_max_attempts=1, gateway_outage_wait=0)
        assert (await check(gateway, request("POST", path, body)))[0] in {status, 502}


async def test_a_large_answer(recorder: Recorder, start: Start) -> None:  # noqa: F811
    recorder.pieces = [ANSWER[:-1] + b', "more": "%b"}' % (b"x" * SMALL_ANSWER)]
    gateway: Gateway = await start(recorder.url, a=LIMITS)
    assert await check(gateway, request("POST", CHAT_PATH, CHAT), "x-gateway-backend") == (200, recorder.pieces[0])


async def test_a_heartbeat_before_the_answer(mock: MockModel, start: Start) -> None:  # noqa: F811
    mock.set_faults([{"kind": "hang_before_headers"}])
    gateway: Gateway = await start(mock, a=LIMITS, gateway_heartbeat=0.05)
    async with dial(gateway.url) as wire:
        await wire.send(request("POST", CHAT_PATH, STREAMED))
        status, headers = await wire.head()
    assert (status, headers["x-ratelimit-remaining-requests"]) == (200, "999")
    assert headers.keys() >= TOLD | EXPLAINING


async def test_what_the_limit_or_the_end_refuses(recorder: Recorder, start: Start) -> None:  # noqa: F811
    gateway: Gateway = await start(recorder.url, a="limits: {requests_per_minute: 1, tokens_per_day: 1000000}")
    assert (await check(gateway, request("POST", CHAT_PATH, CHAT)))[0] == 200
    for body in (CHAT, STREAMED):
        assert (await check(gateway, request("POST", CHAT_PATH, body), "retry-after"))[0] == 429
    gateway.parts.admission.drain()
    assert (await check(gateway, request("POST", CHAT_PATH, CHAT), "retry-after"))[0] == 503
