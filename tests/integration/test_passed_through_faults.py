"""Calls that are passed through, when backends or callers fail: before the first byte, and after it."""

import asyncio
import json
import zlib
from pathlib import Path
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.exposition import Exposition
from testkit.http import Answer, ask
from testkit.polling import until
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import Gateway, StartGateway, StartMock, prefer
from tests.integration.streaming import fault, once, settled
from tests.integration.test_passed_through import FORM, SOUND, SPEECH, TRANSCRIPTIONS, call, form, other_model
from tests.integration.wire import dial, post

BODY = json.dumps({"model": "tts", "input": "hello", "voice": "alloy", "response_format": "pcm"}).encode()
QUICK: dict[str, Any] = {"gateway_backoff_initial": 0.001, "gateway_connect_timeout": 30}
HEADS = {
    "length": b"HTTP/1.1 200 OK\r\ncontent-type: audio/pcm\r\ncontent-length: 20\r\n\r\n",
    "chunked": b"HTTP/1.1 200 OK\r\ncontent-type: audio/pcm\r\ntransfer-encoding: chunked\r\n\r\n",
    "open": b"HTTP/1.1 200 OK\r\ncontent-type: audio/pcm\r\n\r\n",
}
FIRST = {"length": b"0123456789", "chunked": b"a\r\n0123456789\r\n", "open": b"0123456789"}
WHOLE = {
    "length": HEADS["length"] + b"0123456789" * 2,
    "chunked": HEADS["chunked"] + FIRST["chunked"] * 2 + b"0\r\n\r\n",
    "open": HEADS["open"] + b"0123456789" * 2,
}


CLOSED, OPEN = 0, 2
"""Of `gateway_breaker_state`."""


async def speech(gateway: Gateway, headers: dict[str, str] | None = None) -> Answer:
    return await call(gateway, SPEECH, BODY, headers)


@pytest.mark.parametrize(
    ("framing", "how"),
    [
        *((framing, how) for framing in ("length", "chunked") for how in ("reset", "end", "stall", "early")),
        *(("open", how) for how in ("reset", "stall")),
    ],
)
async def test_a_failure_before_the_first_byte_is_retried(
    start_raw: StartRaw, start_gateway: StartGateway, framing: str, how: str
) -> None:
    async def play(call: RawCall) -> None:
        if call.number == 1:
            if how != "early":
                await call.send(HEADS[framing])
            if how == "stall":
                await call.left()
            elif how == "end":
                call.close()
            else:
                await asyncio.sleep(0.05)
                call.reset()
        else:
            await call.send(WHOLE[framing])
            call.close()

    one, two = await start_raw(play), await start_raw(play)
    two.calls = one.calls  # they count together
    gateway = await start_gateway(one.url, two.url, gateway_idle_timeout=0.5, **QUICK)
    answer = await speech(gateway)

    assert (answer.status, answer.body, answer.cut) == (200, b"0123456789" * 2, False)
    assert answer.attempts == 2
    word = {"stall": "idle_timeout", "early": "connection_error"}.get(how, "invalid_response")
    assert answer.outcomes[0].endswith(word)
    assert [each.body for each in one.calls] == [BODY, BODY]
    await settled(gateway)


@pytest.mark.parametrize(
    ("framing", "how"),
    [
        *((framing, how) for framing in ("length", "chunked") for how in ("reset", "end", "stall", "deadline")),
        *(("open", how) for how in ("reset", "stall", "deadline")),
    ],
)
@pytest.mark.parametrize("version", ["1.1", "1.0"])
async def test_a_failure_after_the_first_byte_only_ends_the_body_improperly(
    start_raw: StartRaw, start_gateway: StartGateway, framing: str, how: str, version: str
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(HEADS[framing] + FIRST[framing])
        await asyncio.sleep(0.05)
        if how == "reset":
            call.reset()
        elif how == "end":
            call.close()
        else:
            await call.left()

    backend = await start_raw(play)
    idle = 0.5 if how == "stall" else 30
    gateway = await start_gateway(backend.url, gateway_idle_timeout=idle, gateway_breaker_failures=1, **QUICK)
    headers = {"x-request-timeout": "0.8"} if how == "deadline" else {}
    async with dial(gateway.url) as wire:
        await wire.send(post(BODY, headers, path=SPEECH).replace(b"HTTP/1.1", f"HTTP/{version}".encode(), 1))
        status, _ = await wire.head()
        body, reset = await wire.rest_and_reset()

    unsized = framing in {"chunked", "open"}
    assert status == 200
    assert body == (FIRST["chunked"] if unsized and version == "1.1" else b"0123456789")
    assert reset == (unsized and version == "1.0")
    await settled(gateway)
    assert len(backend.calls) == 1
    outcome = {"deadline": "deadline_exceeded", "stall": "backend_timeout"}.get(how, "backend_invalid_response")
    metrics = Exposition.parse(await gateway.metrics())
    assert metrics.only("gateway_requests_total", route=SPEECH, status="200", outcome=outcome) == 1
    assert metrics.only("gateway_breaker_state", backend="backend-1") == (CLOSED if how == "deadline" else OPEN)
    await until(lambda: len(gateway.spans()) == 2)
    server = next(span for span in gateway.spans() if span.kind.name == "SERVER")
    assert dict(server.attributes or {})["error.type"] == outcome
    assert not server.status.is_ok


async def test_an_http_client_sees_the_cut(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock(mock_token_interval=0.03)
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([once(fault("cut", after_events=3, how="reset"))])
    async with gateway.sdk as sdk:
        with pytest.raises(Exception, match="peer closed connection without"):
            async with sdk.audio.speech.with_streaming_response.create(
                model="tts", voice="alloy", input="hello", response_format="pcm"
            ) as answer:
                _ = [piece async for piece in answer.iter_bytes()]
    await mock.settled()
    assert [each.fault for each in mock.journal.calls] == ["cut"]


@pytest.mark.parametrize(
    "failing",
    [
        fault("status", status=500),
        fault("status", status=503),
        fault("reset"),
        fault("hang_before_headers"),
        fault("hang_after_headers"),
    ],
    ids=lambda failing: failing["kind"],
)
@pytest.mark.parametrize("path", [SPEECH, TRANSCRIPTIONS])
async def test_faults_of_a_backend_are_survived(
    start_mock: StartMock, start_gateway: StartGateway, failing: dict[str, Any], path: str
) -> None:
    one, two = await start_mock(), await start_mock()
    gateway = await start_gateway(
        one, two, gateway_answer_timeout=0.5, gateway_idle_timeout=0.5, gateway_backoff_initial=0.001
    )
    body, headers = (BODY, None) if path == SPEECH else (form(b"whisper"), FORM)
    sent = {"content-type": "application/json", **(headers or {})}
    expected = await ask(two.url + path, method="POST", body=body, headers=sent)
    prefer(gateway, "backend-1")
    one.set_faults([failing])
    answer = await call(gateway, path, body, headers)

    assert (answer.status, answer.body) == (200, expected.body)
    assert (answer.attempts, answer.headers["x-gateway-backend"]) == (2, "backend-2")


async def test_a_silence_is_told_by_its_timer(mock: MockModel, start_gateway: StartGateway) -> None:
    short: dict[str, Any] = {"gateway_answer_timeout": 0.3, "gateway_idle_timeout": 0.3}
    gateway = await start_gateway(mock, gateway_first_token_timeout=30, **short)
    mock.set_faults([once(fault("hang_before_headers"))])
    assert (await speech(gateway)).own_error["param"] == "answer"
    mock.set_faults([once(fault("hang_after_headers"))])
    assert (await speech(gateway)).own_error["param"] == "idle"


async def test_a_429_cools_the_replica_for_that_model(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_retry_after_max=0)
    limited = {"kind": "status", "with": {"status": 429, "headers": {"retry-after": "60"}}, "times": 1}
    mock.set_faults([limited])
    first = await call(gateway, TRANSCRIPTIONS, form(b"a"), FORM)
    second = await call(gateway, TRANSCRIPTIONS, form(b"a"), FORM)
    other = await call(gateway, TRANSCRIPTIONS, form(b"b"), FORM)

    assert (first.status, first.headers["retry-after"], first.attempts) == (429, "60", 1)
    assert (second.status, second.own_error["code"], second.attempts) == (429, "backend_rate_limited", 0)
    assert other.status == 200


async def test_a_short_outage_is_bridged(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_outage_wait=10, gateway_backoff_initial=0.001)
    assert (await speech(gateway)).status == 200
    mock.set_faults([{"kind": "status", "with": {"status": 503}, "times": 5}])
    answer = await call(gateway, TRANSCRIPTIONS, form(b"m"), FORM)

    assert answer.status == 200
    assert answer.attempts == 6


async def test_a_fallback_gets_its_own_model_in_json_and_in_a_form(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    one, two = await start_mock(), await start_mock()
    one.set_faults([fault("status", status=500)])
    gateway = await start_gateway(gateway_config=other_model(tmp_path, one.url, two.url), gateway_max_attempts=1)
    async with gateway.sdk as sdk:
        await sdk.audio.transcriptions.create(model="whisper", file=("a.wav", SOUND))
        await sdk.moderations.create(model="judge", input="a")
        await sdk.moderations.create(input="a")

    assert [each.model for each in one.journal.calls] == ["whisper", "judge", "demo-model"]
    assert [each.model for each in two.journal.calls] == ["small-1"] * 3


async def test_the_same_form_with_another_boundary_is_a_repeat(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([fault("status", status=500)])
    gateway = await start_gateway(mock, gateway_backoff_initial=0.001)
    first = await call(gateway, TRANSCRIPTIONS, form(b"m"), FORM)
    other = {"content-type": "multipart/form-data; boundary=another"}
    content = form(b"m").replace(b"-- odd boundary: 1/2", b"another")
    again = await call(gateway, TRANSCRIPTIONS, content, other)
    changed = await call(gateway, TRANSCRIPTIONS, content.replace(b"\xff", b"\xfe"), other)

    assert [first.attempts, again.attempts, changed.attempts] == [3, 1, 3]


async def test_a_caller_who_leaves_ends_the_call_to_the_backend(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    left: list[int] = []

    async def play(call: RawCall) -> None:
        if call.number == 2:
            await call.send(HEADS["length"] + FIRST["length"])
        await call.left()
        left.append(call.number)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    for number in (1, 2):
        async with dial(gateway.url) as wire:
            await wire.send(post(BODY, path=SPEECH))
            await backend.called(number)
            if number == 2:
                assert (await wire.head())[0] == 200
                assert await wire.some(10) == FIRST["length"]
            wire.leave()
            await until(lambda: len(left) == len(backend.calls))
    await settled(gateway)
    assert Exposition.parse(await gateway.metrics()).only("gateway_client_disconnects_total") == 2
    assert gateway.parts.pool.replicas[0].last_error is None


async def test_an_answer_under_way_at_a_stop_is_finished_or_cut(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    go_on = asyncio.Event()

    async def play(call: RawCall) -> None:
        await call.send(HEADS["length"] + FIRST["length"])
        if call.number == 1:
            await go_on.wait()
            await call.send(FIRST["length"])
        await call.left()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    async with dial(gateway.url) as one, dial(gateway.url) as two:
        for number, wire in enumerate((one, two), 1):
            await wire.send(post(BODY, path=SPEECH))
            await backend.called(number)
            assert (await wire.head())[0] == 200
            await wire.some(10)
        gateway.parts.admission.drain()
        go_on.set()
        assert await one.some(10) == FIRST["length"]
        await until(lambda: len(gateway.parts.in_flight) == 1)
        gateway.parts.in_flight.cut_off()
        assert await two.rest_and_reset() == (b"", False)
    await settled(gateway)
    metrics = Exposition.parse(await gateway.metrics())
    assert metrics.only("gateway_requests_total", route=SPEECH, status="200", outcome="ok") == 1
    assert metrics.only("gateway_requests_total", route=SPEECH, status="200", outcome="gateway_draining") == 1


async def test_a_compressed_answer_that_is_too_large_is_cut(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    packer = zlib.compressobj(wbits=31)
    packed = packer.compress(bytes(3_000_000)) + packer.flush()

    async def play(call: RawCall) -> None:
        await call.answer(packed, headers="content-encoding: gzip\r\n")

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_answer_bytes=2_000_000, **QUICK)
    answer = await speech(gateway)

    assert (answer.status, answer.cut) == (200, True)
    assert 0 < len(answer.body) <= 2_000_000
    await settled(gateway)
    assert gateway.parts.pool.replicas[0].breaker.state == "closed"


async def test_a_half_open_breaker_closes_with_the_first_byte(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def play(call: RawCall) -> None:
        if call.number == 1:
            call.reset()
            return
        await call.send(HEADS["length"] + FIRST["length"])
        await call.left()

    backend = await start_raw(play)
    gateway = await start_gateway(
        backend.url, gateway_breaker_failures=1, gateway_breaker_open_seconds=0.1, gateway_max_attempts=1, **QUICK
    )
    assert (await speech(gateway)).status == 502
    breaker = gateway.parts.pool.replicas[0].breaker
    await until(lambda: breaker.state == "half_open")
    async with dial(gateway.url) as wire:
        await wire.send(post(BODY, path=SPEECH))
        assert (await wire.head())[0] == 200
        await until(lambda: breaker.state == "closed")
