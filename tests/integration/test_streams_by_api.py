"""Streams of each API, byte for byte, and as the OpenAI SDK reads them."""

import asyncio
from typing import Any

import openai
import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT, MESSAGES_PATH
from testkit.sse import DONE, Events
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw, chunk, event
from tests.integration.gateways import StartGateway
from tests.integration.streaming import (
    BROKEN_MESSAGES,
    END_OF_TURN,
    FINISH,
    LATE,
    MESSAGE,
    MESSAGE_STOP,
    MESSAGES,
    QUICK,
    RESPONSE,
    ROLE,
    SAID,
    SHORT,
    START,
    WHOLE_MESSAGE,
    WORD,
    Caller,
    fault,
    named,
    once,
    respond,
    send,
    settled,
    straight,
    streaming,
)

TOOL = {"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}

# Good streams


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"n": 2, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "Say something."}),
        ("/v1/completions", {"prompt": ["One.", "Two."], "n": 2}),
        ("/v1/responses", RESPONSE),
        ("/v1/messages", MESSAGE),
        ("/v1/messages", MESSAGE | {"thinking": {"type": "enabled", "budget_tokens": 1024}, "tools": [TOOL]}),
    ],
    ids=[
        *("chat", "two choices with usage", "completions", "two prompts, two choices each", "responses"),
        *("messages", "thoughts and a tool"),
    ],
)
@pytest.mark.parametrize("commit", ["first_token", "first_answer", "complete"])
async def test_a_good_stream_goes_on_byte_for_byte(
    mock: MockModel, start_gateway: StartGateway, path: str, body: dict[str, Any], commit: str
) -> None:
    gateway = await start_gateway(mock)
    body = {"model": "demo-model", **body, "stream": True}
    expected = await straight(mock, path, body)
    async with gateway.client.post(path, json=body, headers={"x-gateway-commit": commit}) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert await response.read() == expected
        assert response.headers["x-gateway-attempts"] == "1"
    assert mock.journal.total == 1
    await settled(gateway)


async def test_each_event_reaches_the_caller_before_the_next_is_sent(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    seen = asyncio.Semaphore(0)

    async def step_by_step(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD)
        for piece in (chunk("two "), chunk("three "), FINISH, DONE):
            await seen.acquire()
            await call.events(piece)
        await call.send(END)

    gateway = await start_gateway((await start_raw(step_by_step)).url)
    async with streaming(gateway) as caller:
        assert [await caller.next(), await caller.next()] == [ROLE, WORD]
        for piece in (chunk("two "), chunk("three "), FINISH, DONE):
            seen.release()
            assert await caller.next() == piece
        assert await caller.rest() == b""


# Responses


async def test_responses_held_back_events_are_tried_again(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    expected = await straight(mock, "/v1/responses", RESPONSE | {"stream": True})
    mock.set_faults([once(fault("cut", after_events=2))])
    answer = await respond(gateway)
    assert (answer.status, answer.body) == (200, expected)
    assert mock.journal.total == 2


@pytest.mark.parametrize(
    "failing", [fault("cut", after_events=7), fault("no_finish"), fault("malformed_event", after_events=7)], ids=named
)
async def test_responses_fail_with_a_numbered_error_event(
    slow_mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([failing])
    answer = await respond(gateway)
    events = Events(answer.body)
    error = events.only_error()
    last = events.documents[-1]
    assert events.data[-1].startswith(b"event: error\ndata: ")
    assert set(last) == {"type", "sequence_number", "code", "message", "param", "error"}
    assert last["type"] == "error"
    assert [document["sequence_number"] for document in events.documents] == list(range(len(events.documents)))
    assert (last["code"], last["message"], last["param"]) == (error["code"], error["message"], error["param"])
    assert (error["code"], error["type"]) == ("backend_invalid_response", "server_error")
    assert slow_mock.journal.total == 1


async def test_responses_that_are_cut_off_by_their_length_are_whole(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    expected = await straight(mock, "/v1/responses", RESPONSE | {"stream": True, "max_output_tokens": 2})
    answer = await respond(gateway, max_output_tokens=2)
    assert answer.body == expected
    assert Events(answer.body).documents[-1]["type"] == "response.incomplete"


async def test_responses_pass_on_a_backend_s_own_error_event(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    delta = event({"type": "response.output_text.delta", "sequence_number": 0, "delta": "word"}, name="x")
    error = event(
        {"type": "error", "sequence_number": 1, "code": "oom", "message": "Out of memory.", "param": None}, name="error"
    )

    async def fail(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(delta)
        await seen.wait()
        await call.events(error)
        await call.send(END)

    seen = asyncio.Event()
    backend = await start_raw(fail)
    gateway = await start_gateway(backend.url)
    async with gateway.client.post("/v1/responses", json=RESPONSE | {"stream": True}) as response:
        caller = Caller(response)
        assert await caller.next() == delta
        seen.set()
        assert await caller.rest() == error
    assert len(backend.calls) == 1


# Messages


async def test_messages_held_back_are_tried_again(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    expected = await straight(mock, MESSAGES_PATH, MESSAGE | {"stream": True})
    for failing in (
        fault("cut", after_events=3),
        fault("error_event", after_events=3),
        fault("error_event", after_events=0),
    ):
        mock.journal.clear()
        mock.set_faults([once(failing)])
        answer = await send(gateway, MESSAGES_PATH, stream=True)
        assert (answer.status, answer.body) == (200, expected)
        assert mock.journal.total == 2


@pytest.mark.parametrize("failing", BROKEN_MESSAGES, ids=named)
async def test_messages_fail_with_an_error_event_of_their_own_form(
    slow_mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([failing])
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    events = Events(answer.body)
    last = events.documents[-1]
    assert events.data[-1].startswith(b"event: error\ndata: ")
    assert last.keys() == {"type", "error"}
    assert last["type"] == "error"
    assert (last["error"]["type"], last["error"]["code"]) == ("api_error", "backend_invalid_response")
    assert events.only_error() == last["error"]
    assert b"message_stop" not in answer.body
    assert answer.cut
    assert slow_mock.journal.total == 1
    await settled(gateway)


async def test_messages_that_stall_name_their_timer_in_the_error_event(
    slow_mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(slow_mock, gateway_idle_timeout=SHORT)
    slow_mock.set_faults([fault("stall", after_events=6)])
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    error = Events(answer.body).only_error()
    assert (error["type"], error["code"], error["param"]) == ("timeout_error", "backend_timeout", "idle")


@pytest.mark.parametrize("name", ["error", None])
async def test_messages_pass_on_a_backend_s_own_error_event(
    start_raw: StartRaw, start_gateway: StartGateway, name: str | None
) -> None:
    error = event({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}, name=name)

    async def fail(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(START, SAID)
        await seen.wait()
        await call.events(error, MESSAGE_STOP)
        await call.send(END)

    seen = asyncio.Event()
    backend = await start_raw(fail)
    gateway = await start_gateway(backend.url)
    async with streaming(gateway, MESSAGES_PATH) as caller:
        assert [await caller.next(), await caller.next()] == [START, SAID]
        seen.set()
        assert await caller.rest() == error
        assert caller.cut
    assert len(backend.calls) == 1


async def test_messages_without_names_of_their_events_are_whole(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    bare = b"".join(line + b"\n" for line in WHOLE_MESSAGE.splitlines() if not line.startswith(b"event:"))

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(bare)
        await call.send(END)

    gateway = await start_gateway((await start_raw(play)).url)
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    assert (answer.status, answer.body, answer.cut) == (200, bare, False)


async def test_a_message_of_no_words_is_an_answer_and_one_of_no_events_is_none(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(START, *([] if b"nothing" in call.body else [END_OF_TURN]), MESSAGE_STOP)
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_attempts=1)
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    assert (answer.status, answer.body, answer.cut) == (200, START + END_OF_TURN + MESSAGE_STOP, False)
    answer = await send(gateway, MESSAGES_PATH, stream=True, metadata={"user_id": "nothing"})
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")


# The SDK


@pytest.mark.parametrize("failing", LATE, ids=named)
async def test_the_sdk_raises_for_a_cut_stream(
    slow_mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([failing])
    words = []
    async with gateway.sdk as sdk:
        stream = await sdk.chat.completions.create(model="demo-model", messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012
            async for piece in stream:
                words.append(piece.choices[0].delta.content)  # noqa: PERF401
    assert caught.value.code == "backend_invalid_response"
    assert any(words)
    assert slow_mock.journal.total == 1


async def test_the_sdk_raises_for_a_cut_response(slow_mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([fault("cut", after_events=7)])
    seen = []
    async with gateway.sdk as sdk:
        stream = await sdk.responses.create(model="demo-model", input="Say something.", stream=True)
        with pytest.raises(openai.APIError) as caught:  # noqa: PT012
            async for piece in stream:
                seen.append(piece.type)  # noqa: PERF401
    assert caught.value.code == "backend_invalid_response"
    assert "response.output_text.delta" in seen
    assert slow_mock.journal.total == 1


async def test_the_sdk_gets_a_whole_stream_without_done(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)

    async def words(base_url: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{base_url}/v1", api_key="sk-test", max_retries=0) as sdk:
            stream = await sdk.chat.completions.create(model="demo-model", messages=MESSAGES, stream=True)
            return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    expected = await words(mock.url)
    mock.set_faults([fault("no_done")])
    assert await words(gateway.url) == expected
    assert expected
    assert mock.journal.total == 2
