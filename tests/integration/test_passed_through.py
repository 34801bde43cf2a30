"""Calls that are passed through: what the backend gets and what the caller gets, byte for byte."""

import asyncio
import io
import json
import zlib
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from gateway.dialects.passed_through import COUNT_TOKENS, OPERATIONS
from gateway.server.paths import forms_of
from mock_model.serve import MockModel
from testkit.exposition import Exposition
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import EXPLAINING, KEY, Gateway, StartGateway, StartMock, config
from tests.integration.recorder import Recorder
from tests.integration.streaming import settled
from tests.integration.wire import dial, post

PATHS = [*OPERATIONS, *COUNT_TOKENS]
SPEECH, TRANSCRIPTIONS = "/v1/audio/speech", "/v1/audio/transcriptions"
SOUND = b"RIFF\r\n--\x00\xff\r\n\r\n" * 1000
BOUNDARY = "-- odd boundary: 1/2"
FORM = {"content-type": f'multipart/form-data; boundary="{BOUNDARY}"'}
ANY_FORM = b"\r\n".join(
    [
        b"--%b",
        b'Content-Disposition: form-data; name="file"; filename="\xc3\xa4.wav"',
        b"Content-Type: audio/wav",
        b"",
        b"\x00\xff\r\n\r\n--\r\n%%s",
        b"--%b",
        b"content-disposition: form-data; name=model",
        b"",
        b"%%b",
        b"--%b--",
        b"",
    ]
) % ((BOUNDARY.encode(),) * 3)
BINARY = bytes(range(256)) * 40


def form(model: bytes) -> bytes:
    return ANY_FORM.replace(b"%b", model)


def other_model(folder: Path, *urls: str) -> Path:
    """Routes `*` to several targets; each after the first asks for a model of its own."""
    backends = "\n".join(f'  b{number}: {{url: "{url}", probe: false}}' for number, url in enumerate(urls))
    targets = ", ".join(
        f"{{backend: b{number}{f', model: small-{number}' if number else ''}}}" for number in range(len(urls))
    )
    return config(folder, f"backends:\n{backends}\nroutes:\n  - {{model: '*', targets: [{targets}]}}\n")


async def call(gateway: Gateway, path: str, body: bytes, headers: dict[str, str] | None = None) -> Answer:
    sent = {"content-type": "application/json", **(headers or {})}
    async with gateway.client.post(path, data=io.BytesIO(body), headers=sent) as response:
        return await Answer.of(response)


@pytest.mark.parametrize("path", PATHS)
async def test_a_json_body_goes_out_and_any_answer_comes_back_byte_for_byte(
    recorder: Recorder, start_gateway: StartGateway, path: str
) -> None:
    gateway = await start_gateway(recorder.url)
    body = b' {"x":[1.0,1e5,"\\u00e9"], "model" : "m","stream":"perhaps", "n":-1, "x":2,"input":{}} \n'
    for pieces in ([BINARY], [b"", b"\n", BINARY, b"\x00"], [b'{"error": {"message": "passed"}}'], [b""]):
        recorder.pieces = pieces
        recorder.headers = [("content-type", "audio/odd; x=1"), ("openai-processing-ms", "3"), ("set-cookie", "a=b")]
        for form_of_path in forms_of(path):
            answer = await call(gateway, f"{form_of_path}?a=%201&b", body)

            assert (answer.status, answer.body, answer.cut) == (200, b"".join(pieces), False)
            assert answer.headers["content-type"] == "audio/odd; x=1"
            assert answer.headers["openai-processing-ms"] == "3"
            assert answer.headers.get("content-length") == (str(len(pieces[0])) if len(pieces) == 1 else None)
            assert answer.headers.keys() & {"set-cookie", "cache-control", "x-accel-buffering"} == set()
            assert answer.headers.keys() >= EXPLAINING
            assert (answer.attempts, answer.outcomes) == (1, ["backend-1 streaming"])
            assert recorder.seen[-1].body == body
            assert recorder.seen[-1].path == f"{path}?a=%201&b"
    await settled(gateway)


@pytest.mark.parametrize("path", PATHS)
async def test_a_form_goes_out_byte_for_byte_and_only_its_model_is_set(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, path: str
) -> None:
    recorder.status, recorder.pieces = 500, [b'{"error": {"message": "no"}}']
    gateway = await start_gateway(
        gateway_config=other_model(tmp_path, recorder.url, recorder.url), gateway_max_attempts=1
    )
    answer = await call(gateway, path, form(b"own"), FORM)

    assert (answer.status, answer.body, answer.attempts) == (500, recorder.pieces[0], 2)
    assert [seen.body for seen in recorder.seen] == [form(b"own"), form(b"small-1")]
    assert [seen.header("content-type") for seen in recorder.seen] == [FORM["content-type"]] * 2
    assert [seen.header("content-length") for seen in recorder.seen] == [
        str(len(form(b"own"))),
        str(len(form(b"small-1"))),
    ]
    await settled(gateway)


async def test_the_default_model_is_added_where_none_is_named(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, model_name="de\u00e9fault")
    unnamed = form(b"own").replace(b"name=model", b"name=other")

    assert (await call(gateway, "/tokenize", b'{"content":"x"}')).status == 200
    assert (await call(gateway, TRANSCRIPTIONS, unnamed, FORM)).status == 200
    assert recorder.seen[0].body == '{"model":"de\u00e9fault","content":"x"}'.encode()
    assert recorder.seen[1].body == (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="model"\r\n\r\nde\u00e9fault\r\n'.encode() + unnamed
    )


async def test_a_compressed_form_goes_out_plain(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url)
    answer = await call(gateway, TRANSCRIPTIONS, zlib.compress(form(b"m")), FORM | {"content-encoding": "deflate"})

    assert answer.status == 200
    assert recorder.seen[0].body == form(b"m")
    assert recorder.seen[0].header("content-encoding") is None


@pytest.mark.parametrize(
    ("body", "headers", "status", "param"),
    [
        (b"{", {}, 400, None),
        (b"[]", {}, 400, None),
        (b'{"model":"a","model":"b"}', {}, 400, "model"),
        (b'{"model":"a","Model":"b"}', {}, 400, "model"),
        (b'{"model":1}', {}, 400, "model"),
        (b"a=b", {"content-type": "application/x-www-form-urlencoded"}, 415, "content-type"),
        (b"a=b", {"content-type": "multipart/mixed; boundary=a"}, 415, "content-type"),
        (b"--a--", {"content-type": "multipart/form-data"}, 400, "content-type"),
        (b"--a--", {"content-type": "multipart/form-data; boundary=b"}, 400, None),
        (b"", FORM, 400, None),
        (form(b"a")[:-30], FORM, 400, None),
        (form(b"a").replace(b'name="file"; filename="\xc3\xa4.wav"', b'name="model"'), FORM, 400, "model"),
        (form(b""), FORM, 400, "model"),
        (form(b"a").replace(b'name="file"', b"name=\xc2\xa0model"), FORM, 400, None),
        (form(b"a").replace(b"\x00\xff", b"x--%b" % BOUNDARY.encode()), FORM, 400, None),
        (b'{"model":"a","+AG0-odel":"b"}', {"content-type": "application/json; charset=utf-7"}, 415, "content-type"),
        (form(b"a"), FORM | {"content-encoding": "br"}, 415, "content-encoding"),
    ],
)
async def test_a_wrong_request_is_refused_and_not_forwarded(  # noqa: PLR0917
    recorder: Recorder,
    start_gateway: StartGateway,
    body: bytes,
    headers: dict[str, str],
    status: int,
    param: str | None,
) -> None:
    gateway = await start_gateway(recorder.url)
    answer = await call(gateway, TRANSCRIPTIONS, body, headers)

    assert answer.status == status
    assert answer.own_error["param"] == param
    assert recorder.seen == []
    await settled(gateway)


async def test_forms_are_only_for_calls_that_are_passed_through(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)

    assert (await call(gateway, "/v1/chat/completions", form(b"m"), FORM)).status == 415


@pytest.mark.parametrize("path", PATHS)
async def test_key_method_and_route_are_as_everywhere(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, path: str
) -> None:
    file = config(
        tmp_path, f"backends:\n  a: {{url: '{recorder.url}'}}\nroutes:\n  - {{model: m, targets: [{{backend: a}}]}}\n"
    )
    gateway = await start_gateway(gateway_config=file, gateway_api_keys=[KEY])
    with_key = {"authorization": f"Bearer {KEY}"}

    assert (await call(gateway, path, b"{}")).own_error["code"] == "invalid_api_key"
    assert (await call(gateway, path, form(b"x"), FORM | with_key)).own_error["code"] == "model_not_found"
    async with gateway.client.get(path, headers=with_key) as response:
        assert (response.status, response.headers["allow"]) == (405, "POST")
    assert recorder.seen == []
    assert (await call(gateway, path, form(b"m"), FORM | with_key)).status == 200
    assert recorder.seen[0].header("authorization") is None


@pytest.mark.parametrize("status", [201, 202, 204, 205, 206, 299])
@pytest.mark.parametrize("commit", ["first_token", "complete"])
async def test_every_good_status_passes(
    recorder: Recorder, start_gateway: StartGateway, status: int, commit: str
) -> None:
    recorder.status = status
    recorder.pieces = [b"" if status in {204, 205} else BINARY]
    gateway = await start_gateway(recorder.url)
    for _ in range(2):
        answer = await call(gateway, SPEECH, b"{}", {"x-gateway-commit": commit})
        assert (answer.status, answer.body, answer.cut) == (status, recorder.pieces[0], False)
    assert len(gateway.parts.client._kept._conns) == 1


@pytest.mark.parametrize("pieces", [[BINARY], [BINARY, BINARY]])
@pytest.mark.parametrize("commit", ["first_token", "complete"])
async def test_a_reset_of_content_passes_without_a_body(
    recorder: Recorder, start_gateway: StartGateway, pieces: list[bytes], commit: str
) -> None:
    recorder.status, recorder.pieces = 205, pieces
    gateway = await start_gateway(recorder.url)
    for _ in range(2):
        answer = await call(gateway, SPEECH, b"{}", {"x-gateway-commit": commit})
        assert (answer.status, answer.body, answer.cut, answer.attempts) == (205, b"", False, 1)
        assert answer.headers["content-length"] == "0"
    await settled(gateway)


@pytest.mark.parametrize("status", [301, 304, 400, 404, 418, 422])
async def test_no_other_status_passes_without_being_an_error(
    recorder: Recorder, start_gateway: StartGateway, status: int
) -> None:
    recorder.status = status
    recorder.pieces = [b"" if status == 304 else b"not JSON"]
    gateway = await start_gateway(recorder.url, gateway_max_attempts=1)
    answer = await call(gateway, SPEECH, b"{}")

    assert answer.status == (status if status >= 400 else 502)
    assert answer.own_error["code"] == "backend_invalid_response"


@pytest.mark.parametrize("coding", ["deflate", "br"])
async def test_a_compressed_answer_is_decoded(recorder: Recorder, start_gateway: StartGateway, coding: str) -> None:
    packed = zlib.compress(BINARY)
    recorder.headers = [("content-type", "audio/mpeg"), ("content-encoding", coding)]
    recorder.pieces = [packed]
    gateway = await start_gateway(recorder.url, gateway_max_attempts=1)
    answer = await call(gateway, SPEECH, b"{}")

    assert answer.status == (200 if coding == "deflate" else 502)
    if coding == "deflate":
        assert (answer.body, answer.cut) == (BINARY, False)
        assert answer.headers.keys() & {"content-length", "content-encoding"} == set()


async def test_a_stream_of_events_passes_unbuffered(recorder: Recorder, start_gateway: StartGateway) -> None:
    recorder.headers = [("content-type", "text/event-stream; charset=utf-8")]
    recorder.pieces = [b"data: a\n", b"\ndata: not json", b"\n\n"]
    gateway = await start_gateway(recorder.url, gateway_heartbeat=0.01)
    answer = await call(gateway, TRANSCRIPTIONS, form(b"m"), FORM)

    assert answer.body == b"".join(recorder.pieces)
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"


async def test_a_whole_answer_is_held_where_that_is_asked_for(recorder: Recorder, start_gateway: StartGateway) -> None:
    recorder.pieces = [BINARY, BINARY, BINARY]
    gateway = await start_gateway(recorder.url, gateway_max_answer_bytes=3 * len(BINARY))
    whole = await call(gateway, SPEECH, b"{}", {"x-gateway-commit": "complete"})
    recorder.pieces.append(b"x")
    larger = await call(gateway, SPEECH, b"{}", {"x-gateway-commit": "complete"})
    passed = await call(gateway, SPEECH, b"{}")

    assert (whole.body, whole.headers["content-length"]) == (BINARY * 3, str(3 * len(BINARY)))
    assert (larger.status, larger.own_error["code"]) == (502, "backend_invalid_response")
    assert passed.body == BINARY * 3 + b"x"
    await settled(gateway)


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_http_1_0_gets_the_same_bytes(recorder: Recorder, start_gateway: StartGateway, version: str) -> None:
    gateway = await start_gateway(recorder.url)
    for pieces in ([BINARY], [BINARY, BINARY]):
        recorder.pieces = pieces
        request = post(b"{}", {"connection": "close"}, path=SPEECH).replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1)
        async with dial(gateway.url) as wire:
            await wire.send(request)
            status, headers = await wire.head()
            low = {name.lower(): value for name, value in headers.items()}
            body = await (wire.rest_of_chunks() if low.get("transfer-encoding") else wire.rest())
        assert (status, body) == (200, b"".join(pieces))


async def test_spans_metrics_and_log_know_the_call(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_capture_content=True)
    await call(gateway, f"{TRANSCRIPTIONS}?secret=1", form(b"m"), FORM)
    await until(lambda: len(gateway.spans()) == 2)
    kinds = {span.kind.name: dict(span.attributes or {}) for span in gateway.spans()}
    metrics = Exposition.parse(await gateway.metrics())

    assert kinds["SERVER"]["gen_ai.operation.name"] == "transcription"
    assert kinds["SERVER"]["gen_ai.request.model"] == "m"
    assert kinds["SERVER"].keys() & {"gen_ai.response.time_to_first_chunk", "gen_ai.input.messages"} == set()
    assert kinds["CLIENT"]["gateway.attempt.outcome"] == "ok"
    assert "secret" not in str(kinds) + gateway.log.getvalue()
    assert metrics.only("gateway_requests_total", route=TRANSCRIPTIONS, status="200", outcome="ok") == 1
    assert not metrics.only("gateway_time_to_first_token_seconds_count", route=TRANSCRIPTIONS)


# The real SDK, direct and through


Ask = Callable[[openai.AsyncOpenAI], Awaitable[object]]


async def _speech(sdk: openai.AsyncOpenAI) -> object:
    answer = await sdk.audio.speech.create(model="tts", voice="alloy", input="hello", response_format="wav")
    return answer.content


async def _streamed_speech(sdk: openai.AsyncOpenAI) -> object:
    async with sdk.audio.speech.with_streaming_response.create(
        model="tts", voice="alloy", input="hello", response_format="pcm"
    ) as answer:
        return b"".join([piece async for piece in answer.iter_bytes()])


async def _transcription(sdk: openai.AsyncOpenAI) -> object:
    answer = await sdk.audio.transcriptions.create(model="whisper", file=("\u00e4.wav", SOUND))
    return answer.to_dict()


async def _subtitles(sdk: openai.AsyncOpenAI) -> object:
    return await sdk.audio.transcriptions.create(model="whisper", file=("a.wav", SOUND), response_format="srt")


async def _streamed_transcription(sdk: openai.AsyncOpenAI) -> object:
    stream = await sdk.audio.transcriptions.create(model="whisper", file=("a.wav", SOUND), stream=True)
    return [event.to_dict() async for event in stream]


async def _translation(sdk: openai.AsyncOpenAI) -> object:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        answer: Any = await sdk.audio.translations.create(model="whisper", file=("a.wav", SOUND))
    return answer.to_dict()


async def _images(sdk: openai.AsyncOpenAI) -> object:
    answer = await sdk.images.generate(model="painter", prompt="a cat", n=2)
    return [image.b64_json for image in answer.data or []]


async def _edit(sdk: openai.AsyncOpenAI) -> object:
    files = [("a.png", SOUND, "image/png"), ("b.png", SOUND, "image/png")]
    answer = await sdk.images.edit(model="painter", prompt="a dog", image=files)
    return [(image.b64_json or "")[:40] for image in answer.data or []]  # what follows depends on the boundary too


async def _moderation(sdk: openai.AsyncOpenAI) -> object:
    answer = await sdk.moderations.create(model="judge", input=["a", "b"])
    return [result.to_dict() for result in answer.results]


@pytest.fixture
async def paced(start_mock: StartMock) -> MockModel:
    """Each piece on its own."""
    return await start_mock(mock_token_interval=0.005)


@pytest.mark.parametrize(
    "ask",
    [
        *(_speech, _streamed_speech, _transcription, _subtitles, _streamed_transcription, _translation),
        *(_images, _edit, _moderation),
    ],
)
async def test_the_sdk_gets_the_same_as_without_the_gateway(
    paced: MockModel, start_gateway: StartGateway, ask: Ask
) -> None:
    gateway = await start_gateway(paced)
    async with openai.AsyncOpenAI(base_url=f"{paced.url}/v1", api_key="any", max_retries=0) as direct:
        expected = await ask(direct)
    async with gateway.sdk as through:
        assert await ask(through) == expected
        paced.set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after": "60"}}}])
        with pytest.raises(openai.RateLimitError):
            await ask(through)
    await paced.settled()
    first, second, _ = paced.journal.calls
    assert (first.path, first.model, first.events_sent) == (second.path, second.model, second.events_sent)
    assert first.model in {"tts", "whisper", "painter", "judge"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/rerank", {"model": "m", "query": "q", "documents": ["a", {"text": "b"}]}),
        ("/v1/score", {"model": "m", "text_1": "q", "text_2": ["a", "b"]}),
        ("/tokenize", {"model": "m", "prompt": "caf\u00e9", "return_token_strs": True}),
        ("/detokenize", {"model": "m", "tokens": [1000, 233]}),
        ("/v1/messages/count_tokens", {"model": "m", "messages": [{"role": "user", "content": "a"}]}),
    ],
)
async def test_the_other_calls_get_the_same_as_without_the_gateway(
    mock: MockModel, start_gateway: StartGateway, path: str, body: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock)
    content = json.dumps(body).encode()
    async with aiohttp.ClientSession() as session, session.post(mock.url + path, json=body) as direct:
        expected = await direct.read()
        assert direct.status == 200
    answer = await call(gateway, path, content)

    assert (answer.status, answer.body) == (200, expected)
    await mock.settled()
    assert len({(each.path, each.fingerprint, each.model) for each in mock.journal.calls}) == 1


# Large bodies, slow callers


async def test_a_large_form_is_held_once(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_max_buffered_bytes=44_000_000)
    body = form(b"m").replace(b"%s", bytes(range(256)) * 80_000)
    held: list[int] = []

    async def watch() -> None:
        while True:
            held.append(gateway.parts.byte_budget.held)
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    answer = await call(gateway, TRANSCRIPTIONS, body, FORM)
    watching.cancel()

    assert answer.status == 200
    assert recorder.seen[0].body == body
    assert max(held) == len(body)  # one caller may have half of 44 MB: a second copy would be refused
    await settled(gateway)


async def test_a_form_that_needs_a_second_copy_counts_twice(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url, gateway_max_buffered_bytes=4_400_000)
    body = form(b"m").replace(b"%s", bytes(2_000_000)).replace(b"name=model", b"name=other")
    answer = await call(gateway, TRANSCRIPTIONS, body, FORM)

    assert (answer.status, answer.own_error["code"]) == (503, "gateway_overloaded")
    await settled(gateway)


@pytest.mark.parametrize("framing", ["length", "chunked", "open"])
async def test_a_slow_reader_gets_every_byte_and_slows_the_backend_down(
    start_raw: StartRaw, start_gateway: StartGateway, framing: str
) -> None:
    piece = bytes(range(256)) * 256
    count = 400
    length = f"content-length: {count * len(piece)}\r\n"
    heads = {"length": length, "chunked": "transfer-encoding: chunked\r\n", "open": ""}
    sent = 0

    async def play(call: RawCall) -> None:
        nonlocal sent
        await call.send(f"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\n{heads[framing]}\r\n".encode())
        for _ in range(count):
            await (call.events(piece) if framing == "chunked" else call.send(piece))
            sent += 1
        if framing == "chunked":
            await call.send(b"0\r\n\r\n")
        if framing == "open":
            call.close()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30, gateway_idle_timeout=30)
    async with dial(gateway.url, receive_buffer=4096) as caller:
        await caller.send(post(b"{}", {"connection": "close"}, path=SPEECH))
        status, headers = await caller.head()
        first = await caller.some(100_000)
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        assert before < count
        assert 0 < gateway.parts.byte_budget.held <= 5 * 65_536
        rest = await caller.rest()
    assert status == 200
    body = first + rest
    if framing == "length":
        assert headers["Content-Length"] == str(count * len(piece))
        assert body == piece * count
    else:
        assert body.endswith(b"0\r\n\r\n")
        assert len(body) > count * len(piece)
    await settled(gateway)
