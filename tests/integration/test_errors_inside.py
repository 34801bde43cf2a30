"""What a server says about a request reaches its caller, and nobody else pays for it."""

import asyncio
import gzip
import json
import shutil
import subprocess
import sys
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.policy.breaker import State
from testkit.completions import CHAT, CHAT_PATH, MESSAGES_PATH, RESPONSES_PATH, prompt
from testkit.sse import DONE, Events
from tests.integration.backends_raw import END, OPEN_STREAM_HEAD, STREAM_HEAD, RawCall, StartRaw, event
from tests.integration.gateways import Gateway, StartGateway
from tests.integration.streaming import (
    END_OF_TURN,
    FINISH,
    QUICK,
    ROLE,
    SAID,
    START,
    WHOLE,
    WHOLE_MESSAGE,
    WORD,
    respond,
    send,
    settled,
    streaming,
)
from tests.integration.wire import dial

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Play = Callable[[RawCall], Awaitable[None]]
WORDS = "The prompt says something that this server does not do."
INSIDE: list[tuple[object, int]] = [
    ({"error": {"message": WORDS, "code": 400}}, 400),
    ({"error": {"message": WORDS, "code": "429"}}, 429),
    ({"error": {"message": WORDS, "status": 503}}, 503),
    ({"error": {"message": WORDS, "type": "invalid_request_error"}}, 400),
    ({"error": {"message": WORDS, "type": "BadRequestError", "code": 400}}, 400),
    ({"error": WORDS, "error_type": "overloaded"}, 503),
    ({"error": WORDS, "error_type": "validation"}, 400),
    ({"error": {"message": "Rate limit reached for requests: " + WORDS}}, 429),
    ({"error": {"message": "the request exceeds the available context size. " + WORDS}}, 400),
    ({"error": {"message": WORDS, "code": "server_error"}}, 502),
    ({"error": WORDS}, 502),
    ({"error": {"message": WORDS, "code": 600}}, 502),
    ({"error": {"message": WORDS, "code": 399, "type": "invalid_request_error"}}, 400),
    ({"error": {"message": WORDS, "code": 407}}, 502),
    ({"error": {"message": WORDS, "code": "407", "type": "overloaded_error"}}, 503),
    ({"error": {"message": WORDS, "code": 101}}, 502),
    ({"error": {"message": WORDS, "code": True}}, 502),
    ({"object": "error", "message": WORDS, "type": "BadRequestError", "code": 400}, 400),
]


APIS = {"chat": CHAT_PATH, "responses": RESPONSES_PATH, "messages": MESSAGES_PATH}


def streamed(*events: bytes) -> Play:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*events)
        await call.send(END)

    return play


def whole(body: bytes, headers: str = "", status: str = "200 OK") -> Play:
    async def play(call: RawCall) -> None:
        await call.answer(body, headers=headers, status=status)

    return play


async def rest_after_commit(start_raw: StartRaw, start_gateway: StartGateway, events: bytes) -> tuple[bytes, bool]:
    """What a caller gets of events that follow the first words, and whether the body was cut."""
    seen = asyncio.Event()

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD)
        await seen.wait()
        await call.events(events)
        await call.send(END)

    backend = await start_raw(play)
    async with streaming(await start_gateway(backend.url)) as caller:
        assert [await caller.next(), await caller.next()] == [ROLE, WORD]
        seen.set()
        rest = await caller.rest()
        return rest, caller.cut


async def ask(gateway: Gateway, *, stream: bool, api: str) -> Any:  # noqa: ANN401
    return await send(gateway, APIS[api], stream=stream)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("document", "status"), INSIDE)
async def test_an_error_inside_a_200_is_an_error_answer_with_the_servers_words(
    start_raw: StartRaw,
    start_gateway: StartGateway,
    document: object,
    status: int,
    *,
    stream: bool,
    api: str,
) -> None:
    backend = await start_raw(streamed(event(document), DONE) if stream else whole(json.dumps(document).encode()))
    gateway = await start_gateway(backend.url, gateway_max_attempts=2, gateway_retry_after_max=0, **QUICK)

    answer = await ask(gateway, stream=stream, api=api)

    assert answer.status == status
    assert WORDS in answer.error["message"]
    assert answer.json.keys() == ({"type", "error"} if api == "messages" else {"error"})
    assert len(backend.calls) == (2 if status in {502, 503} else 1)
    breaker = gateway.parts.pool.replicas[0].breaker
    assert breaker.consecutive_failures == (status in {502, 503})
    await settled(gateway)


@pytest.mark.parametrize("document", [{"error": {"message": WORDS, "code": 400}}])
async def test_json_with_an_error_in_place_of_a_stream_is_that_error(
    start_raw: StartRaw, start_gateway: StartGateway, document: object
) -> None:
    backend = await start_raw(whole(json.dumps(document).encode()))
    gateway = await start_gateway(backend.url)

    answer = await gateway.chat(stream=True)

    assert (answer.status, answer.error["message"], len(backend.calls)) == (400, WORDS, 1)


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("content_type", ["application/json", "text/plain", None])
@pytest.mark.parametrize("mark", [b"", BOM])
async def test_json_in_place_of_a_stream_is_known_whatever_its_type(
    start_raw: StartRaw, start_gateway: StartGateway, content_type: str | None, mark: bytes
) -> None:
    bodies = [json.dumps({"error": {"message": WORDS, "type": "invalid_request_error"}}).encode(), b'{"choices": []}']
    answers = []
    for body in bodies:
        head = f"content-type: {content_type}\r\n" if content_type else ""
        whole_answer = f"HTTP/1.1 200 OK\r\n{head}content-length: {len(mark + body)}\r\n\r\n".encode() + mark + body

        async def play(call: RawCall, answer: bytes = whole_answer) -> None:
            await call.send(answer)

        backend = await start_raw(play)
        answers.append((await (await start_gateway(backend.url)).chat(stream=True), len(backend.calls)))
    (inside, calls), (wrong, wrong_calls) = answers
    assert (inside.status, inside.error["message"], calls) == (400, WORDS, 1)
    assert (wrong.status, wrong.error["code"], wrong_calls) == (502, "backend_invalid_response", 1)


@pytest.mark.parametrize("api", APIS)
async def test_a_byte_order_mark_before_a_whole_answer_or_an_error_is_no_failure(
    start_raw: StartRaw, start_gateway: StartGateway, api: str
) -> None:
    good = BOM + b'{"id": "x", "choices": [], "output": []}'
    backend = await start_raw(whole(good))
    answer = await ask(await start_gateway(backend.url), stream=False, api=api)
    assert (answer.status, answer.body, len(backend.calls)) == (200, good, 1)

    bad = BOM + json.dumps({"error": {"message": WORDS, "seconds": float("nan")}}).encode()
    backend = await start_raw(whole(bad, status="400 Bad Request"))
    answer = await ask(await start_gateway(backend.url), stream=False, api=api)
    assert (answer.status, answer.body, len(backend.calls)) == (400, bad, 1)


@pytest.mark.parametrize("api", APIS)
async def test_a_list_with_one_error_as_the_first_event_is_that_error(
    start_raw: StartRaw, start_gateway: StartGateway, api: str
) -> None:
    backend = await start_raw(streamed(event([{"error": {"code": 400, "message": WORDS}}])))
    answer = await ask(await start_gateway(backend.url), stream=True, api=api)
    assert (answer.status, answer.error["message"], len(backend.calls)) == (400, WORDS, 1)


async def test_a_text_in_an_error_field_is_an_error(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(streamed(b"error: the model is overloaded, sorry\n\n"))
    answer = await (await start_gateway(backend.url, gateway_max_attempts=1)).chat(stream=True)
    assert (answer.status, answer.error["message"]) == (503, "the model is overloaded, sorry")


async def test_a_model_that_is_not_there_is_told_inside_a_200_too(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(whole(b'{"error": "model \'x\' not found, try pulling it first"}'))
    answer = await (await start_gateway(backend.url)).chat()
    assert (answer.status, len(backend.calls)) == (404, 1)


async def test_done_before_the_end_of_a_response_is_no_end(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    word = b'data: {"type": "response.output_text.delta", "sequence_number": 1, "delta": "a"}\n\n'
    backend = await start_raw(streamed(word, DONE))
    answer = await respond(await start_gateway(backend.url, gateway_max_attempts=1))
    assert b"[DONE]" not in answer.body
    assert answer.status == 502 or answer.cut


@pytest.mark.parametrize("before", [START + SAID, START + SAID + END_OF_TURN])
async def test_done_before_the_end_of_a_message_is_no_end(
    start_raw: StartRaw, start_gateway: StartGateway, before: bytes
) -> None:
    backend = await start_raw(streamed(before, DONE))
    answer = await send(await start_gateway(backend.url, gateway_max_attempts=1), MESSAGES_PATH, stream=True)
    assert b"[DONE]" not in answer.body
    assert answer.status == 502 or answer.cut


async def test_done_after_the_end_of_a_message_goes_no_further(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(streamed(WHOLE_MESSAGE, DONE))
    answer = await send(await start_gateway(backend.url), MESSAGES_PATH, stream=True)
    assert (answer.status, answer.body, answer.cut) == (200, WHOLE_MESSAGE, False)


async def test_an_error_field_is_an_error_before_the_commit_and_after_it(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    field = b"error: " + json.dumps({"code": 400, "message": WORDS}).encode() + b"\n\n"
    backend = await start_raw(streamed(ROLE, field, DONE))
    gateway = await start_gateway(backend.url)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["message"], len(backend.calls)) == (400, WORDS, 1)

    rest, cut = await rest_after_commit(start_raw, start_gateway, field)
    assert Events(rest).only_error()["message"] == WORDS
    assert cut


async def test_two_prompts_with_errors_inside_open_no_breaker(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(streamed(event({"error": {"message": WORDS, "code": 400}}), DONE))
    gateway = await start_gateway(backend.url, gateway_breaker_failures=2, **QUICK)

    for number in range(6):
        assert (await gateway.chat(stream=True, user=str(number))).status == 400
    assert gateway.parts.pool.replicas[0].breaker.state is State.CLOSED
    assert len(backend.calls) == 6


async def test_an_error_in_mid_stream_is_passed_on_unchanged_without_a_proper_end(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    own = event({"choices": [{"index": 0, "delta": {}, "finish_reason": "error"}], "error": {"code": 502}})

    assert await rest_after_commit(start_raw, start_gateway, own + DONE) == (own, True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl, which slim containers have not")
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
async def test_after_commit_a_failure_ends_the_body_improperly_so_that_curl_fails(
    start_raw: StartRaw, start_gateway: StartGateway, path: str
) -> None:
    body = prompt(path)
    delta = b'data: {"type": "response.output_text.delta", "sequence_number": 0}\n\n'
    word = {"/v1/responses": delta, "/v1/messages": SAID}.get(path, WORD)

    async def cut(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(word)
        call.reset()

    backend = await start_raw(cut)
    gateway = await start_gateway(backend.url)
    curl = ["curl", "-sN", gateway.url + path, "-H", "content-type: application/json", "-d"]
    for version, codes in (("--http1.1", {18}), ("--http1.0", {18, 56})):
        done = await asyncio.to_thread(
            subprocess.run,
            [*curl, json.dumps(body | {"stream": True}), version],
            capture_output=True,
            check=False,
        )
        assert done.returncode in codes, done
        assert done.stdout.startswith(word)
        assert b"error" in done.stdout


async def test_an_http_1_0_caller_sees_a_reset_after_the_error(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(streamed(ROLE, WORD))
    gateway = await start_gateway(backend.url)
    body = json.dumps(CHAT | {"stream": True}).encode()
    async with dial(gateway.url) as wire:
        head = b"POST /v1/chat/completions HTTP/1.0\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        await wire.send(head % len(body) + body)
        status, _ = await wire.head()
        assert status == 200
        rest, was_reset = await wire.rest_and_reset()
    assert rest.startswith(ROLE + WORD)
    assert b'"error"' in rest
    assert was_reset


def deflated(data: bytes) -> bytes:
    return zlib.compress(data)


CODINGS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("deflate", deflated),
    ("zstd", zstd.compress),
]


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=[name for name, _ in CODINGS])
async def test_a_compressed_answer_is_decoded_error_answers_too(
    start_raw: StartRaw, start_gateway: StartGateway, coding: str, encode: Callable[[bytes], bytes]
) -> None:
    good = json.dumps({"id": "c", "choices": [], "words": "x" * 100_000}).encode()
    backend = await start_raw(whole(encode(good), f"content-encoding: {coding}\r\n"))
    answer = await (await start_gateway(backend.url)).chat()
    assert (answer.status, answer.body) == (200, good)
    assert "content-encoding" not in answer.headers

    bad = json.dumps({"error": {"message": WORDS}}).encode()
    backend = await start_raw(whole(encode(bad), f"content-encoding: {coding}\r\n", "400 Bad Request"))
    answer = await (await start_gateway(backend.url)).chat()
    assert (answer.status, answer.body, len(backend.calls)) == (400, bad, 1)


@pytest.mark.parametrize(("coding", "encode"), CODINGS, ids=[name for name, _ in CODINGS])
async def test_a_compressed_stream_is_decoded_piece_by_piece(
    start_raw: StartRaw, start_gateway: StartGateway, coding: str, encode: Callable[[bytes], bytes]
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD.replace(b"\r\n\r\n", f"\r\ncontent-encoding: {coding}\r\n\r\n".encode()))
        await call.events(encode(WHOLE))
        await call.send(END)

    backend = await start_raw(play)
    answer = await (await start_gateway(backend.url)).chat(stream=True)
    assert (answer.status, answer.body, answer.cut) == (200, WHOLE, False)


async def test_a_flushed_event_of_a_compressed_stream_goes_on_at_once(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    seen = asyncio.Event()

    async def play(call: RawCall) -> None:
        encoder = zlib.compressobj(wbits=31)
        await call.send(STREAM_HEAD.replace(b"\r\n\r\n", b"\r\ncontent-encoding: gzip\r\n\r\n"))
        await call.events(encoder.compress(ROLE + WORD) + encoder.flush(zlib.Z_SYNC_FLUSH))
        await seen.wait()
        await call.events(encoder.compress(FINISH + DONE) + encoder.flush())
        await call.send(END)

    backend = await start_raw(play)
    async with streaming(await start_gateway(backend.url)) as caller:
        assert [await caller.next(), await caller.next()] == [ROLE, WORD]
        seen.set()
        assert await caller.rest() == FINISH + DONE


@pytest.mark.parametrize("coding", ["br", "gzip, gzip"])
async def test_an_answer_in_another_coding_is_unreadable(
    start_raw: StartRaw, start_gateway: StartGateway, coding: str
) -> None:
    backend = await start_raw(whole(b"xyz", f"content-encoding: {coding}\r\n"))
    answer = await (await start_gateway(backend.url, gateway_max_attempts=1)).chat()
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")

    backend = await start_raw(whole(b"xyz", f"content-encoding: {coding}\r\n", "400 Bad Request"))
    answer = await (await start_gateway(backend.url)).chat()
    assert (answer.status, answer.error["code"]) == (400, "backend_invalid_response")


async def test_a_bomb_is_given_up_at_the_size_of_an_answer(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    bomb = gzip.compress(b'{"a": "' + b"x" * 50_000_000 + b'"}')
    backend = await start_raw(whole(bomb, "content-encoding: gzip\r\n"))
    gateway = await start_gateway(backend.url, gateway_max_answer_bytes=1 << 20)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"], len(backend.calls)) == (502, "backend_invalid_response", 1)
    await settled(gateway)


async def test_an_event_stream_without_a_content_type_is_taken(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(OPEN_STREAM_HEAD.replace(b"content-type: text/event-stream\r\n", b"") + WHOLE)
        call.close()

    backend = await start_raw(play)
    answer = await (await start_gateway(backend.url)).chat(stream=True)
    assert (answer.status, answer.body) == (200, WHOLE)
    assert answer.headers["content-type"].startswith("text/event-stream")


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_of_the_wrong_form_is_not_asked_of_the_same_replica_again(
    start_raw: StartRaw,
    start_gateway: StartGateway,
    stream: bool,  # noqa: FBT001
) -> None:
    backend = await start_raw(whole(b'{"choices": []}') if stream else streamed(WHOLE))
    answer = await (await start_gateway(backend.url)).chat(stream=stream)
    assert (answer.status, answer.error["code"], len(backend.calls)) == (502, "backend_invalid_response", 1)


@pytest.mark.parametrize("name", ["x-request-id", "request-id"])
@pytest.mark.parametrize("status", ["200 OK", "400 Bad Request"])
async def test_the_backends_request_id_is_told_in_header_span_and_log(
    start_raw: StartRaw, start_gateway: StartGateway, name: str, status: str
) -> None:
    backend = await start_raw(whole(b'{"choices": []}', f"{name}: req_theirs\r\n", status))
    gateway = await start_gateway(backend.url)
    answer = await gateway.chat(headers={"x-request-id": "ours"})
    assert answer.headers["x-backend-request-id"] == "req_theirs"
    assert answer.headers["x-request-id"] == "ours"


async def test_streams_are_not_held_back_by_proxies(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(streamed(WHOLE))
    answer = await (await start_gateway(backend.url)).chat(stream=True)
    assert answer.headers["x-accel-buffering"] == "no"


async def test_a_repeat_of_a_failed_body_is_asked_once(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(whole(b'{"error": {"message": "no"}}', status="500 Internal Server Error"))
    gateway = await start_gateway(backend.url, **QUICK)
    for total in (3, 4, 5):
        answer = await gateway.chat()
        assert (answer.status, len(backend.calls)) == (500, total)
    assert gateway.parts.pool.replicas[0].breaker.consecutive_failures == 1
    assert (await gateway.chat(user="another body")).status == 500
    assert len(backend.calls) == 8


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("at_once", [False, True])
async def test_a_backend_that_only_announces_an_answer_is_given_up(
    start_raw: StartRaw, start_gateway: StartGateway, *, at_once: bool, stream: bool
) -> None:
    interim = b"HTTP/1.1 103 Early Hints\r\nx: 1\r\n\r\n"

    async def announce(call: RawCall) -> None:
        for _ in range(2_000 if at_once else 0):
            await call.send(interim * 100)
        while not at_once:
            await call.send(interim)
            await asyncio.sleep(0.001)

    gateway = await start_gateway((await start_raw(announce)).url, gateway_max_attempts=1)
    answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert ("64 KiB" if at_once else "interim") in answer.error["message"]
    replica = gateway.parts.pool.replicas[0]
    assert replica.in_flight == 0


async def test_of_a_backend_whose_headers_do_not_end_no_more_is_held_than_headers_may_have(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    sent = 0

    async def never_end(call: RawCall) -> None:
        nonlocal sent
        await call.send(b"HTTP/1.1 200 OK\r\n")
        while True:
            await call.send(b"x: " + b"y" * 60_000 + b"\r\n")
            sent += 60_000

    gateway = await start_gateway((await start_raw(never_end)).url, gateway_max_attempts=1)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert "64 KiB" in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
async def test_of_an_error_answer_that_is_too_large_only_the_status_is_told(
    start_raw: StartRaw, start_gateway: StartGateway, *, stream: bool
) -> None:
    async def fail(call: RawCall) -> None:
        size = 300_000 if b"large" in call.body else 200_000
        await call.answer(b'{"error": {"message": "%b"}}' % (b"x" * size), status="400 Bad")

    gateway = await start_gateway((await start_raw(fail)).url)
    passed = await gateway.chat(stream=stream)
    assert (passed.status, len(passed.error["message"])) == (400, 200_000)
    wrapped = await gateway.chat(stream=stream, user="large")
    assert (wrapped.status, wrapped.error["code"]) == (400, "backend_invalid_response")
