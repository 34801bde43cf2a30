"""Which headers go to the backend and come back, and by which url the backend is called."""

import base64
import re
from time import monotonic

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH
from testkit.polling import until
from tests.integration.gateways import EXPLAINING, KEY, REFUSED, StartGateway, get
from tests.integration.recorder import STREAM, Recorder
from tests.integration.wire import BODY, post, send

ROUNDED = 0.01
"""Seconds that a time in a header may be shorter than it is."""

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
    ("Anthropic-Api-Key", "caller"),
    ("OpenAI-Api_Key", "caller"),
    ("anthropic-auth-token", "caller"),
    ("OpenAI-Client-Secret", "caller"),
    ("anthropic-authorization", "Bearer caller"),
    ("X-Stainless-Key", "caller"),
    ("TE", "trailers"),
    ("Expect", "100-continue"),
]


async def test_only_the_listed_headers_reach_the_backend(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_backend_api_key="backend-key", gateway_request_deadline=77)
    lines = "".join(f"{name}: {value}\r\n" for name, value in [*SENT, *HELD_BACK])
    head = f"POST {CHAT_PATH} HTTP/1.1\r\nHost: caller.example\r\n{lines}Content-Length: {len(BODY)}\r\n\r\n"
    began = monotonic()
    answer = await send(gateway, head.encode() + BODY)
    took = monotonic() - began
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
    assert 77 - took - ROUNDED <= float(seen.header("x-request-timeout") or "") <= 77
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
        ("openai-api-key", "of-the-backend"),
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
        own = EXPLAINING | {"x-gateway-backend", "x-backend-request-id", "content-length", "date", "server"}
        assert set(answer.headers) == own | {name for name, _ in passed}
        for name, value in held_back:
            assert answer.headers.get(name) != value
        assert answer.headers["x-gateway-backend"] == "backend-1"
        assert answer.headers["x-backend-request-id"] == "of-the-backend"

    recorder.status = 200
    recorder.headers = [*passed[1:], *held_back, ("content-type", "text/event-stream")]
    recorder.pieces = [STREAM, b"data: [DONE]\n\n"]
    answer = await gateway.chat(stream=True)
    assert answer.headers["x-backend-request-id"] == "of-the-backend"
    for name, value in passed[1:]:
        assert answer.headers[name] == value
    for name, value in held_back:
        assert answer.headers.get(name) != value


@pytest.mark.parametrize(("asked", "seconds"), [(None, 600), ("1000", 600), ("5", 5), ("2.75", 2.75)])
async def test_the_backend_is_told_what_is_left_of_the_deadline(
    recorder: Recorder, start_gateway: StartGateway, asked: str | None, seconds: float
) -> None:
    gateway = await start_gateway(recorder.url)
    began = monotonic()
    assert (await gateway.chat(headers={"x-request-timeout": asked} if asked else {})).status == 200
    took = monotonic() - began
    assert seconds - took - ROUNDED <= float(recorder.seen[0].header("x-request-timeout") or "") <= seconds


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", ["1e300", "1" + "0" * 300, " 5000 ", "+5000", "5e3"])
async def test_a_timeout_however_large_lengthens_nothing_and_breaks_nothing(
    mock: MockModel, start_gateway: StartGateway, asked: str, *, stream: bool
) -> None:
    for deadline in (600, 1e300):
        gateway = await start_gateway(mock, gateway_request_deadline=deadline)
        headers = {"x-request-timeout": asked, "x-stainless-read-timeout": asked}
        assert (await gateway.chat(headers=headers, stream=stream)).status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", ["1e-300", "0." + "0" * 300 + "1", "5e-324"])
async def test_a_timeout_however_small_is_over_at_once(
    mock: MockModel, start_gateway: StartGateway, asked: str, *, stream: bool
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "hang_before_headers"}])
    answer = await gateway.chat(headers={"x-request-timeout": asked}, stream=stream)
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("odd", ["nan", "inf", "1e400", "-1", "0", "", "1, 2", "0x10", "9" * 5000, "1_0", "\u0663"])
async def test_an_odd_read_timeout_of_the_sdk_means_nothing(
    mock: MockModel, start_gateway: StartGateway, odd: str
) -> None:
    gateway = await start_gateway(mock)
    assert (await send(gateway, post(headers={"x-stainless-read-timeout": odd}))).status == 200


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
