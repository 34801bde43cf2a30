"""When the first byte of a stream goes out: at its first words, when it is whole, or as a heartbeat before that."""

import asyncio
import json
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH, MESSAGES_PATH, RESPONSES_PATH
from testkit.sse import DONE, Events
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw, event
from tests.integration.gateways import StartGateway, StartMock
from tests.integration.streaming import (
    BROKEN_MESSAGES,
    END_OF_TURN,
    FINISH,
    LATE,
    MESSAGE,
    MESSAGE_STOP,
    QUICK,
    RESPONSE,
    ROLE,
    SAID,
    SHORT,
    SIGNATURE,
    START,
    THOUGHT,
    WHOLE,
    WORD,
    Caller,
    chat_straight,
    fault,
    named,
    once,
    send,
    settled,
    straight,
    streaming,
)

# A stream held until it is whole


@pytest.mark.parametrize("by", ["header", "setting"])
@pytest.mark.parametrize("failing", LATE, ids=named)
async def test_a_stream_held_until_it_is_whole_is_tried_again(
    mock: MockModel, start_gateway: StartGateway, by: str, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, gateway_stream_commit="complete" if by == "setting" else "first_token", **QUICK)
    expected = await chat_straight(mock)
    mock.set_faults([once(failing)])
    answer = await gateway.chat(stream=True, headers={"x-gateway-commit": "complete"} if by == "header" else {})
    assert (answer.status, answer.body) == (200, expected)
    assert answer.headers["x-gateway-attempts"] == "2"
    await mock.settled()
    assert [call.ended for call in mock.journal.calls][1:] == ["complete"]
    await settled(gateway)


@pytest.mark.parametrize("failing", BROKEN_MESSAGES, ids=named)
async def test_a_message_held_until_it_is_whole_is_tried_again(
    mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, gateway_stream_commit="complete", **QUICK)
    expected = await straight(mock, MESSAGES_PATH, MESSAGE | {"stream": True})
    mock.set_faults([once(failing)])
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    assert (answer.status, answer.body) == (200, expected)
    assert answer.headers["x-gateway-attempts"] == "2"
    await settled(gateway)


async def test_the_header_wins_over_the_setting(slow_mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(slow_mock, gateway_stream_commit="complete", **QUICK)
    slow_mock.set_faults([once(fault("cut", after_events=4))])
    answer = await gateway.chat(stream=True, headers={"x-gateway-commit": "first_token"})
    Events(answer.body).only_error()
    assert slow_mock.journal.total == 1


async def test_every_moment_of_commit_may_be_asked_for(mock: MockModel, start_gateway: StartGateway) -> None:
    for moment in ("first_token", "first_answer", "complete"):
        gateway = await start_gateway(mock, gateway_stream_commit=moment)
        assert (await gateway.chat(stream=True)).status == 200
        assert (await gateway.chat(stream=True, headers={"x-gateway-commit": moment})).status == 200
    answer = await gateway.chat(headers={"x-gateway-commit": "first_word"})
    assert (answer.status, answer.error["param"]) == (400, "x-gateway-commit")
    assert "first_token, first_answer or complete" in str(answer.error["message"])
    assert mock.journal.total == 6


async def test_a_stream_held_until_it_is_whole_falls_back_from_a_stall(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mocks = [await start_mock(), await start_mock()]
    gateway = await start_gateway(*mocks, gateway_stream_commit="complete", gateway_idle_timeout=SHORT, **QUICK)
    expected = await chat_straight(mocks[0])
    mocks[0].set_faults([fault("stall", after_events=4)])
    for _ in range(4):
        answer = await gateway.chat(stream=True)
        assert (answer.status, answer.body) == (200, expected)
        assert answer.headers["x-gateway-backend"] == "backend-2"
    assert mocks[1].journal.total == 4


async def test_a_held_stream_that_always_fails_is_a_plain_error(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_stream_commit="complete", gateway_max_attempts=2, **QUICK)
    mock.set_faults([fault("cut", after_events=4)])
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert mock.journal.total == 2
    await settled(gateway)


async def test_a_held_stream_larger_than_an_answer_may_be_is_not_tried_again(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mock = await start_mock(mock_tokens=400)
    gateway = await start_gateway(mock, gateway_stream_commit="complete", gateway_max_answer_bytes=2_000)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    await mock.settled()
    assert mock.journal.total == 1
    await settled(gateway)


# A stream held until its answer begins

OF_RESPONSES = [
    event({"type": f"response.{kind}", "sequence_number": number, "delta": "x", "response": {}})
    for number, kind in enumerate(("reasoning_text.delta", "output_text.delta", "completed"))
]
THINKING: dict[str, tuple[list[bytes], bytes, bytes]] = {
    CHAT_PATH: ([event({"choices": [{"index": 0, "delta": {"reasoning": "hm"}}]})], WORD, FINISH + DONE),
    RESPONSES_PATH: (OF_RESPONSES[:1], OF_RESPONSES[1], OF_RESPONSES[2]),
    MESSAGES_PATH: ([START, THOUGHT, SIGNATURE], SAID, END_OF_TURN + MESSAGE_STOP),
}
"""Of each API: thoughts, the first words of the answer, the end."""


@pytest.mark.parametrize("path", THINKING)
async def test_a_failure_while_it_thinks_is_tried_again_where_the_answer_is_waited_for(
    start_raw: StartRaw, start_gateway: StartGateway, path: str
) -> None:
    thoughts, words, end = THINKING[path]

    async def fail_once(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*thoughts)
        if call.number == 1:
            await seen.wait()
            call.reset()
            return
        await call.events(words, end)
        await call.send(END)

    seen = asyncio.Event()
    backend = await start_raw(fail_once)
    gateway = await start_gateway(backend.url, **QUICK)
    asked = asyncio.create_task(send(gateway, path, stream=True, headers={"x-gateway-commit": "first_answer"}))
    await backend.called(1)
    seen.set()
    answer = await asked
    assert (answer.status, answer.body, answer.cut) == (200, b"".join([*thoughts, words, end]), False)
    assert len(backend.calls) == answer.attempts == 2
    await settled(gateway)


@pytest.mark.parametrize("path", THINKING)
async def test_an_answer_goes_out_with_its_first_words_after_the_thoughts(
    start_raw: StartRaw, start_gateway: StartGateway, path: str
) -> None:
    thoughts, words, end = THINKING[path]

    async def step_by_step(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*thoughts, words)
        await seen.wait()
        await call.events(end)
        await call.send(END)

    seen = asyncio.Event()
    gateway = await start_gateway((await start_raw(step_by_step)).url, gateway_stream_commit="first_answer")
    async with streaming(gateway, path) as caller:
        assert [await caller.next() for _ in thoughts] == thoughts
        assert await caller.next() == words
        seen.set()
        assert await caller.rest() == end


@pytest.mark.parametrize("path", THINKING)
async def test_thoughts_go_out_at_once_by_default(start_raw: StartRaw, start_gateway: StartGateway, path: str) -> None:
    thoughts, words, end = THINKING[path]

    async def step_by_step(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*thoughts)
        await seen.wait()
        await call.events(words, end)
        await call.send(END)

    seen = asyncio.Event()
    gateway = await start_gateway((await start_raw(step_by_step)).url)
    async with streaming(gateway, path) as caller:
        assert [await caller.next() for _ in thoughts] == thoughts
        seen.set()
        assert await caller.rest() == words + end


# Heartbeats


async def test_there_are_no_heartbeats_by_default(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock(mock_ttft=0.5)
    gateway = await start_gateway(mock)
    expected = await chat_straight(mock)
    assert (await gateway.chat(stream=True)).body == expected


async def test_heartbeats_before_and_after_commit(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def slow(call: RawCall) -> None:
        for piece in (ROLE + WORD, FINISH + DONE):
            await seen.acquire()
            if piece.startswith(ROLE):
                await call.send(STREAM_HEAD)
            await call.events(piece)
        await call.send(END)

    seen = asyncio.Semaphore(0)
    gateway = await start_gateway((await start_raw(slow)).url, gateway_heartbeat=0.1)
    async with streaming(gateway) as caller:
        assert caller.response.status == 200
        assert caller.response.content_type == "text/event-stream"
        assert "x-gateway-backend" not in caller.response.headers, "not known when the headers went out"
        assert [(await caller.next())[:1], (await caller.next())[:1]] == [b":", b":"]
        seen.release()
        events = [await caller.next()]
        while events[-1] != WORD:
            events.append(await caller.next())
        assert [piece for piece in events if piece[:1] != b":"] == [ROLE, WORD]
        assert [(await caller.next())[:1], (await caller.next())[:1]] == [b":", b":"]
        seen.release()
        assert Events(await caller.rest()).data == [FINISH, DONE]


async def test_after_a_heartbeat_it_may_still_be_tried_again(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def recover(call: RawCall) -> None:
        if call.number == 1:
            await seen.wait()
            call.reset()
            return
        await call.send(STREAM_HEAD)
        await call.events(WHOLE)
        await call.send(END)

    seen = asyncio.Event()
    backend = await start_raw(recover)
    gateway = await start_gateway(backend.url, gateway_heartbeat=0.1, **QUICK)
    async with streaming(gateway) as caller:
        assert (await caller.next()).startswith(b":")
        seen.set()
        events = Events(await caller.rest())
    assert b"".join(events.data) == WHOLE
    assert len(backend.calls) == 2


async def test_after_a_heartbeat_a_failure_is_an_error_event(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def fail(call: RawCall) -> None:
        await seen.wait()
        call.reset()

    seen = asyncio.Event()
    backend = await start_raw(fail)
    gateway = await start_gateway(backend.url, gateway_heartbeat=0.1, gateway_max_attempts=2, **QUICK)
    async with streaming(gateway) as caller:
        assert (await caller.next()).startswith(b":")
        seen.set()
        events = Events(await caller.rest())
    assert events.only_error()["code"] == "backend_connection_error"
    assert len(events.data) == 1
    assert len(backend.calls) == 2


async def test_after_a_heartbeat_a_backend_s_own_error_answer_is_the_error_event(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    own = {"message": "Bad prompt.", "type": "invalid_request_error", "param": "messages", "code": "bad_prompt"}

    async def refuse(call: RawCall) -> None:
        await seen.wait()
        await call.answer(json.dumps({"error": own}, indent=2).encode(), status="400 Bad Request")

    seen = asyncio.Event()
    backend = await start_raw(refuse)
    gateway = await start_gateway(backend.url, gateway_heartbeat=0.1)
    async with streaming(gateway) as caller:
        assert (await caller.next()).startswith(b":")
        seen.set()
        events = Events(await caller.rest())
    assert events.only_error() == own
    assert len(backend.calls) == 1


async def test_after_a_heartbeat_responses_fail_with_the_first_number(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def fail(call: RawCall) -> None:
        await seen.wait()
        if call.number == 2:
            await call.send(STREAM_HEAD)
            await call.events(event({"type": "response.created", "sequence_number": 0, "response": {}}))
        call.close()

    seen = asyncio.Event()
    backend = await start_raw(fail)
    for attempts in (1, 2):
        gateway = await start_gateway(backend.url, gateway_heartbeat=0.1, gateway_max_attempts=attempts, **QUICK)
        seen.clear()
        backend.calls.clear()
        async with gateway.client.post("/v1/responses", json=RESPONSE | {"stream": True}) as response:
            caller = Caller(response)
            assert (await caller.next()).startswith(b":")
            seen.set()
            events = Events(await caller.rest())
        events.only_error()
        assert events.documents[-1]["type"] == "error"
        assert events.documents[-1]["sequence_number"] == 0, "the caller has seen none"
        assert len(backend.calls) == attempts


@pytest.mark.parametrize("own", [None, {"type": "invalid_request_error", "message": "Bad prompt."}])
async def test_after_a_heartbeat_messages_fail_in_their_own_form(
    start_raw: StartRaw, start_gateway: StartGateway, own: dict[str, str] | None
) -> None:
    async def fail(call: RawCall) -> None:
        await seen.wait()
        if own is None:
            call.reset()
        else:
            await call.answer(json.dumps({"type": "error", "error": own}).encode(), status="400 Bad Request")

    seen = asyncio.Event()
    gateway = await start_gateway((await start_raw(fail)).url, gateway_heartbeat=0.1, gateway_max_attempts=1)
    async with streaming(gateway, MESSAGES_PATH) as caller:
        assert (await caller.next()).startswith(b":")
        seen.set()
        events = Events(await caller.rest())
    assert events.data[-1].startswith(b"event: error\n")
    assert events.documents[-1].keys() == {"type", "error"}
    error = events.only_error()
    if own is None:
        assert (error["type"], error["code"]) == ("api_error", "backend_connection_error")
    else:
        assert error == own


async def test_heartbeats_are_for_streams_only(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock()
    mock.set_faults([fault("latency", delay=0.5), fault("status", status=500)])
    gateway = await start_gateway(mock, gateway_heartbeat=0.1)
    answer = await gateway.chat()
    assert answer.status == 200
    assert json.loads(answer.body)["object"] == "chat.completion"
    assert answer.headers["content-type"] == "application/json"
