"""Streams that fail: before commit they are tried again, after it they end with one error event; no end is silent."""

import asyncio
import json
from typing import Any

import pytest

from gateway.forwarding.stream_relay import AFTER_FINISH
from gateway.server import stream_writer
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.polling import PATIENCE
from testkit.sse import DONE, Events
from tests.integration.backends_raw import END, OPEN_STREAM_HEAD, STREAM_HEAD, RawCall, StartRaw, chunk
from tests.integration.gateways import StartGateway, StartMock
from tests.integration.stopwatch import Stopwatch
from tests.integration.streaming import (
    FINISH,
    LATE,
    OWN_ERROR,
    QUICK,
    ROLE,
    SHORT,
    USAGE,
    WHOLE,
    WORD,
    chat_straight,
    fault,
    named,
    once,
    settled,
    streaming,
)
from tests.integration.wire import chunks_in, dial, post

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


async def test_a_backend_s_own_error_event_as_the_last_attempt_s_is_an_error_in_its_words(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def fail(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(ROLE, OWN_ERROR)
        await call.send(END)

    backend = await start_raw(fail)
    gateway = await start_gateway(backend.url, gateway_max_attempts=2, **QUICK)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error) == (502, json.loads(OWN_ERROR[6:])["error"])
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
    start_raw: StartRaw, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, heartbeat: float
) -> None:
    monkeypatch.setattr(stream_writer, "LAST_WORD", PATIENCE)  # the caller reads by then, as fast as the machine can
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
        events, proper = chunks_in(await wire.rest())
    assert not proper
    assert Events(events).only_error()["code"] == "backend_invalid_response"


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


async def test_the_connection_of_a_failed_stream_is_closed_without_the_bodys_proper_end(
    slow_mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([once(fault("cut", after_events=4))])
    async with dial(gateway.url) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        assert (await wire.head())[0] == 200
        rest, was_reset = await wire.rest_and_reset()
    events, proper = chunks_in(rest)
    Events(events).only_error()
    assert not was_reset
    assert not proper


async def test_a_stream_that_answers_both_choices_but_finishes_one_is_whole_with_done_and_else_cut(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    events = [chunk("a"), chunk("b", index=1), chunk(finish="stop")]

    async def half(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(*events, *([DONE] if call.number == 1 else []))
        await call.send(END)

    backend = await start_raw(half)
    gateway = await start_gateway(backend.url)
    assert (await gateway.chat(stream=True, n=2)).body == b"".join(events) + DONE
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


MAX_ANSWER = 3 << 20


@pytest.mark.parametrize("size", [MAX_ANSWER, MAX_ANSWER + 1])
async def test_an_event_as_large_as_an_answer_may_be_goes_on_and_a_larger_one_is_a_failure(
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
    gateway = await start_gateway(backend.url, gateway_max_answer_bytes=MAX_ANSWER)
    async with streaming(gateway) as caller:
        assert [await caller.next(), await caller.next()] == [ROLE, WORD]
        seen.set()
        rest = await caller.rest()
    if size <= MAX_ANSWER:
        assert rest == large + FINISH + DONE
    else:
        assert Events(rest).only_error()["code"] == "backend_invalid_response"
        assert len(Events(rest).all) == 1
    assert len(backend.calls) == 1
    await settled(gateway)


async def test_an_event_that_never_ends_is_given_up_at_the_size_of_an_answer(
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


async def test_a_whole_stream_whose_connection_stays_open_is_ended_after_five_seconds(
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
    assert watch.took >= AFTER_FINISH - 0.01
    assert watch.within(AFTER_FINISH + 1), watch
    assert len(backend.calls) == 1
    assert (await gateway.health())["downstream"]["backends"][0]["consecutive_failures"] == 0


async def test_a_usage_chunk_within_that_time_goes_on(start_raw: StartRaw, start_gateway: StartGateway) -> None:
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
