"""Streams: what is held back, what is tried again, what goes on, and an end that always tells how it went."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from gateway.events import MAX_EVENT
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.http import Answer
from testkit.polling import PATIENCE, until
from testkit.sse import DONE, Events
from tests.integration.backends_raw import (
    END,
    OPEN_STREAM_HEAD,
    STREAM_HEAD,
    RawCall,
    StartRaw,
    chunk,
    event,
)
from tests.integration.gateways import Gateway, StartGateway, StartMock
from tests.integration.stopwatch import Stopwatch
from tests.integration.wire import dial, post

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]
RESPONSE = {"model": "demo-model", "input": "Say something."}
QUICK: dict[str, Any] = {"gateway_backoff_initial": 0}
SHORT = 0.3
ROLE, WORD, FINISH = chunk(), chunk("word "), chunk(finish="stop")
USAGE = event({"id": "raw", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}})
OWN_ERROR = event({"error": {"message": "Out of memory.", "type": "server_error", "param": None, "code": "oom"}})
WHOLE = ROLE + WORD + FINISH + DONE


@pytest.fixture
async def slow_mock(start_mock: StartMock) -> MockModel:
    """Each token on its own, so that what follows the first one comes after commit."""
    return await start_mock(mock_token_interval=0.03)


class Caller:
    """One who reads a stream event by event."""

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self.response = response

    async def next(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.response.content.readuntil(b"\n\n")

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            return await self.response.read()


@asynccontextmanager
async def streaming(gateway: Gateway) -> AsyncIterator[Caller]:
    async with gateway.client.post("/v1/chat/completions", json=CHAT | {"stream": True}) as response:
        yield Caller(response)


async def straight(mock: MockModel, path: str, body: dict[str, Any]) -> bytes:
    """What the mock model says without a gateway; leaves no trace in its journal."""
    async with aiohttp.ClientSession() as session, session.post(mock.url + path, json=body) as response:
        answer = await response.read()
    mock.journal.clear()
    return answer


async def chat_straight(mock: MockModel, **changes: Any) -> bytes:  # noqa: ANN401
    return await straight(mock, "/v1/chat/completions", CHAT | {"stream": True} | changes)


async def respond(gateway: Gateway, **changes: Any) -> Answer:  # noqa: ANN401
    """A streamed prompt to `/v1/responses`."""
    body = RESPONSE | {"stream": True} | changes
    async with gateway.client.post("/v1/responses", json=body) as response:
        return Answer(response.status, dict(response.headers), await response.read())


def fault(kind: str, **parameters: Any) -> dict[str, Any]:  # noqa: ANN401
    return {"kind": kind, "with": parameters} if parameters else {"kind": kind}


def once(failing: dict[str, Any]) -> dict[str, Any]:
    return failing | {"times": 1}


def named(failing: dict[str, Any]) -> str:
    return " ".join([failing["kind"], *map(str, failing.get("with", {}).values())])


async def settled(gateway: Gateway) -> None:
    """Wait until nothing is under way; nothing is held then."""
    parts = gateway.parts
    await until(lambda: not len(parts.running))
    assert (parts.admission.in_flight, parts.admission.queued, parts.memory.held) == (0, 0, 0)


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


# Before commit

EARLY = [
    *(
        fault("cut", after_events=1, how=how, where=where)
        for how in ("end", "reset")
        for where in ("between", "inside_event", "inside_character")
    ),
    fault("cut", after_events=0),
    fault("malformed_event", after_events=1),
    fault("malformed_event", after_events=0),
    fault("short_body", bytes=40),
    fault("content_type", value="text/plain"),
    fault("html"),
    fault("not_json"),
]


@pytest.mark.parametrize("failing", EARLY, ids=named)
async def test_a_stream_that_fails_before_its_first_words_is_tried_again(
    mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, **QUICK)
    expected = await chat_straight(mock)
    mock.set_faults([once(failing)])
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.body) == (200, expected), "nothing of the failed attempt, one whole answer"
    assert answer.headers["x-gateway-attempts"] == "2"
    await mock.settled()
    assert [call.ended for call in mock.journal.calls][1:] == ["complete"]
    await settled(gateway)


@pytest.mark.parametrize("failing", EARLY, ids=named)
async def test_a_stream_that_always_fails_before_its_first_words_is_a_plain_error(
    mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=2, **QUICK)
    mock.set_faults([failing])
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-should-retry"] == "false"
    assert mock.journal.total == 2
    await settled(gateway)


@pytest.mark.parametrize(
    "failing", [fault("stall", after_events=1), fault("hang_after_headers"), fault("hang_before_headers")], ids=named
)
async def test_a_stream_silent_before_its_first_words_moves_to_another_replica(
    start_mock: StartMock, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    mocks = [await start_mock(), await start_mock()]
    gateway = await start_gateway(*mocks, gateway_first_token_timeout=SHORT)
    expected = await chat_straight(mocks[0])
    mocks[0].set_faults([failing])
    mocks[1].set_faults([failing])
    answer = await gateway.chat(stream=True)
    assert [mock.journal.total for mock in mocks] == [1, 1], "each is asked, none of them again"
    assert (answer.status, answer.error["param"]) == (504, "first_token")
    for mock in mocks:
        mock.set_faults([])
    assert (await gateway.chat(stream=True)).body == expected


async def test_a_backend_s_own_error_event_before_commit_is_tried_again(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def recover(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, OWN_ERROR) if call.number == 1 else await call.events(WHOLE)
        await call.send(END)

    backend = await start_raw(recover)
    gateway = await start_gateway(backend.url, **QUICK)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.body) == (200, WHOLE)
    assert len(backend.calls) == 2


async def test_a_backend_s_own_error_event_as_the_last_attempt_s_is_an_invalid_response(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def fail(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, OWN_ERROR)
        await call.send(END)

    backend = await start_raw(fail)
    gateway = await start_gateway(backend.url, gateway_max_attempts=2, **QUICK)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert len(backend.calls) == 2


async def test_role_chunks_and_comments_are_held_until_the_first_words(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def late(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(b": hello\n\n", ROLE)
        if call.number == 1:
            call.reset()
            return
        await call.events(WORD, FINISH, DONE)
        await call.send(END)

    backend = await start_raw(late)
    gateway = await start_gateway(backend.url, **QUICK)
    answer = await gateway.chat(stream=True)
    assert answer.status == 200
    assert Events(answer.body).data == [ROLE, WORD, FINISH, DONE], "the role chunk of the failed attempt is not there"
    assert len(backend.calls) == 2


# After commit

LATE = [
    *(
        fault("cut", after_events=4, how=how, where=where)
        for how in ("end", "reset")
        for where in ("between", "inside_event", "inside_character")
    ),
    fault("malformed_event", after_events=4),
    fault("no_finish"),
    fault("short_body"),
]


@pytest.mark.parametrize("failing", LATE, ids=named)
async def test_a_stream_that_fails_after_its_first_words_ends_with_one_error_event(
    slow_mock: MockModel, start_gateway: StartGateway, failing: dict[str, Any]
) -> None:
    gateway = await start_gateway(slow_mock, **QUICK)
    expected = Events(await chat_straight(slow_mock))
    slow_mock.set_faults([once(failing)])
    answer = await gateway.chat(stream=True)
    events = Events(answer.body)
    assert answer.status == 200
    error = events.only_error()
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, "backend_invalid_response")
    assert len(events.data) > 2
    assert events.data[:-1] == expected.data[: len(events.data) - 1], "what came before it is whole and in order"
    await slow_mock.settled()
    assert slow_mock.journal.total == 1, "nothing is tried again after commit"
    await settled(gateway)


@pytest.mark.parametrize("heartbeat", [0, 0.05])
async def test_a_stream_that_breaks_while_the_caller_does_not_read_ends_with_one_error_event(
    start_raw: StartRaw, start_gateway: StartGateway, heartbeat: float
) -> None:
    full, broken = asyncio.Event(), asyncio.Event()
    much = chunk("word " * 20_000)

    async def serve(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(WORD)
        await full.wait()
        await call.events(much)
        call.reset()
        broken.set()

    gateway = await start_gateway((await start_raw(serve)).url, gateway_heartbeat=heartbeat)
    async with dial(gateway.url, receive_buffer=4_096) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        assert (await wire.head())[0] == 200
        gateway.limit_send_buffers(4_096)
        full.set()
        await broken.wait()
        await asyncio.sleep(0.2)  # in which heartbeats would be due
        events = Events(await wire.rest_of_chunks())
    assert events.only_error()["code"] == "backend_invalid_response"


async def test_a_stream_that_stalls_after_its_first_words_ends_with_one_error_event(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_idle_timeout=SHORT, **QUICK)
    mock.set_faults([once(fault("stall", after_events=4))])
    async with Stopwatch() as watch:
        events = Events((await gateway.chat(stream=True)).body)
    error = events.only_error()
    assert (error["code"], error["param"]) == ("backend_timeout", "idle")
    assert len(events.data) == 5
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await settled(gateway)


async def test_the_connection_of_a_failed_stream_takes_the_next_prompt(
    slow_mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([once(fault("cut", after_events=4))])
    async with dial(gateway.url) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        Events((await wire.answer()).body).only_error()
        await wire.send(post())
        assert (await wire.answer()).status == 200
    assert slow_mock.journal.total == 2


async def test_a_stream_that_answers_both_choices_but_finishes_one_is_cut(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    events = [chunk("a"), chunk("b", index=1), chunk(finish="stop")]

    async def half(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*events, *([DONE] if call.number == 1 else []))
        await call.send(END)

    backend = await start_raw(half)
    gateway = await start_gateway(backend.url)
    for _ in range(2):
        answer = Events((await gateway.chat(stream=True, n=2)).body)
        assert answer.only_error()["code"] == "backend_invalid_response"
        assert answer.data[:-1] == events
    assert len(backend.calls) == 2


async def test_a_stream_of_two_choices_is_whole_with_both_finish_reasons(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    events = [chunk("a"), chunk("b", index=1), chunk(finish="stop", index=1), chunk("a"), chunk(finish="stop")]

    async def both(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*events)
        await call.send(END)

    gateway = await start_gateway((await start_raw(both)).url)
    assert Events((await gateway.chat(stream=True, n=2)).body).data == [*events, DONE]


async def test_a_backend_s_own_error_event_after_commit_goes_on_and_ends_the_stream(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def fail(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD)
        await seen.wait()
        await call.events(chunk("more "), OWN_ERROR, FINISH, DONE)
        await call.send(END)

    seen = asyncio.Event()
    backend = await start_raw(fail)
    gateway = await start_gateway(backend.url)
    async with streaming(gateway) as caller:
        assert [await caller.next(), await caller.next()] == [ROLE, WORD]
        seen.set()
        assert await caller.rest() == chunk("more ") + OWN_ERROR
    assert len(backend.calls) == 1


@pytest.mark.parametrize("size", [MAX_EVENT, MAX_EVENT + 1])
async def test_an_event_of_a_mebibyte_goes_on_and_a_longer_one_is_a_failure(
    start_raw: StartRaw, start_gateway: StartGateway, size: int
) -> None:
    large = chunk("x" * (size - len(chunk(""))))
    assert len(large) == size

    async def talk(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD)
        await seen.wait()
        await call.events(large, FINISH, DONE)
        await call.send(END)

    seen = asyncio.Event()
    backend = await start_raw(talk)
    gateway = await start_gateway(backend.url)
    async with streaming(gateway) as caller:
        assert [await caller.next(), await caller.next()] == [ROLE, WORD]
        seen.set()
        rest = await caller.rest()
    if size <= MAX_EVENT:
        assert rest == large + FINISH + DONE
    else:
        assert Events(rest).only_error()["code"] == "backend_invalid_response"
        assert len(Events(rest).all) == 1
    assert len(backend.calls) == 1
    await settled(gateway)


async def test_an_event_that_never_ends_is_given_up_after_a_mebibyte(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def flood(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        while True:
            await call.events(b"data: " + b"x" * 65_536)

    backend = await start_raw(flood)
    gateway = await start_gateway(backend.url, gateway_max_attempts=2, **QUICK)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert len(backend.calls) == 2, "before commit it is tried again"
    await settled(gateway)


async def test_a_deadline_that_ends_in_a_stream_is_an_error_event(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([fault("stall", after_events=4)])
    events = Events((await gateway.chat(stream=True, headers={"x-request-timeout": "0.4"})).body)
    assert events.only_error()["code"] == "deadline_exceeded"
    assert mock.journal.total == 1


# The end


async def test_a_stream_without_done_gets_one(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    expected = await chat_straight(mock)
    mock.set_faults([fault("no_done")])
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.body) == (200, expected)
    assert Events(answer.body).done == 1
    assert mock.journal.total == 1


@pytest.mark.parametrize("head", [STREAM_HEAD, OPEN_STREAM_HEAD], ids=["chunked", "until the connection ends"])
@pytest.mark.parametrize("how", ["reset", "close"])
@pytest.mark.parametrize("commit", ["first_token", "complete"])
async def test_a_whole_stream_whose_connection_breaks_gets_its_done(
    start_raw: StartRaw, start_gateway: StartGateway, head: bytes, how: str, commit: str
) -> None:
    async def end(call: RawCall) -> None:
        await call.send(head)
        for piece in (ROLE, WORD, FINISH):
            await (call.events(piece) if head == STREAM_HEAD else call.send(piece))
            await asyncio.sleep(0.1)  # else the reset may overtake what was sent
        call.reset() if how == "reset" else call.close()

    backend = await start_raw(end)
    gateway = await start_gateway(backend.url, gateway_stream_commit=commit)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.body) == (200, WHOLE)
    assert len(backend.calls) == 1
    await settled(gateway)


async def test_a_whole_stream_whose_connection_stays_open_is_ended_after_a_second(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def stay(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD, FINISH)
        left.set_result(await call.left())

    left: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    backend = await start_raw(stay)
    gateway = await start_gateway(backend.url, gateway_idle_timeout=SHORT)
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=True)
        await left
    assert (answer.status, answer.body) == (200, WHOLE), "silence is no failure by then"
    assert watch.took >= 0.99
    assert watch.within(1.5), watch
    assert len(backend.calls) == 1
    assert (await gateway.health())["downstream"]["backends"][0]["consecutive_failures"] == 0


async def test_a_usage_chunk_within_that_second_goes_on(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def late(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD, FINISH)
        await asyncio.sleep(0.2)
        await call.events(USAGE)
        await call.left()

    gateway = await start_gateway((await start_raw(late)).url, gateway_idle_timeout=0.1)
    answer = await gateway.chat(stream=True)
    assert Events(answer.body).data == [ROLE, WORD, FINISH, USAGE, DONE]


async def test_garbage_after_the_last_finish_reason_does_not_spoil_the_answer(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def spoil(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD, FINISH, b"data: {no json\n\n")
        await call.send(END)

    gateway = await start_gateway((await start_raw(spoil)).url)
    assert (await gateway.chat(stream=True)).body == WHOLE


async def test_half_an_event_at_the_end_of_a_whole_stream_does_not_go_on(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def half(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, WORD, FINISH, USAGE[:20])
        await call.send(END)

    gateway = await start_gateway((await start_raw(half)).url)
    assert (await gateway.chat(stream=True)).body == WHOLE


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


async def test_the_header_wins_over_the_setting(slow_mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(slow_mock, gateway_stream_commit="complete", **QUICK)
    slow_mock.set_faults([once(fault("cut", after_events=4))])
    answer = await gateway.chat(stream=True, headers={"x-gateway-commit": "first_token"})
    Events(answer.body).only_error()
    assert slow_mock.journal.total == 1


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


async def test_heartbeats_are_for_streams_only(start_mock: StartMock, start_gateway: StartGateway) -> None:
    mock = await start_mock()
    mock.set_faults([fault("latency", delay=0.5), fault("status", status=500)])
    gateway = await start_gateway(mock, gateway_heartbeat=0.1)
    answer = await gateway.chat()
    assert answer.status == 200
    assert json.loads(answer.body)["object"] == "chat.completion"
    assert answer.headers["content-type"] == "application/json"


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
