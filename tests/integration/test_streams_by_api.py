"""Streams of each API, byte for byte, and as the OpenAI SDK reads them."""

import asyncio
from typing import Any

import openai
import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.sse import DONE, Events
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw, chunk, event
from tests.integration.gateways import StartGateway
from tests.integration.streaming import (
    FINISH,
    LATE,
    MESSAGES,
    QUICK,
    RESPONSE,
    ROLE,
    WORD,
    Caller,
    fault,
    named,
    once,
    respond,
    settled,
    straight,
    streaming,
)

# Good streams


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/chat/completions", CHAT | {"n": 2, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": "Say something."}),
        ("/v1/completions", {"prompt": ["One.", "Two."], "n": 2}),
        ("/v1/responses", RESPONSE),
    ],
    ids=["chat", "two choices with usage", "completions", "two prompts, two choices each", "responses"],
)
@pytest.mark.parametrize("commit", ["first_token", "complete"])
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
