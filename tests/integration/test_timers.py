"""Every timer, with a backend or a caller that hangs exactly there; and the one deadline, wherever a request stands."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import count
from time import monotonic
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT, MESSAGES_PATH
from testkit.http import Answer
from testkit.polling import until
from testkit.sse import Events
from tests.integration.backends_raw import END, STREAM_HEAD, RawBackend, RawCall, StartRaw, chunk, full_backlog
from tests.integration.gateways import Gateway, StartGateway, StartMock, prefer
from tests.integration.stopwatch import Stopwatch
from tests.integration.streaming import WHOLE_MESSAGE, send
from tests.integration.wire import Wire, dial, post

PROMISE = 0.1
"""Seconds by which a request may outlive its deadline."""
SHORT = 0.25
LONG = 30.0

CHAT_PATH = "/v1/chat/completions"
HANG = {"kind": "hang_before_headers"}
HANG_AFTER_HEADERS = {"kind": "hang_after_headers"}
ROLE_ONLY = {"kind": "stall", "with": {"after_events": 1}}
PING_ONLY = {"kind": "stall", "with": {"after_events": 3}}
STALL = {"kind": "stall", "with": {"after_events": 4}}


@pytest.fixture
async def blackhole() -> AsyncIterator[str]:
    async with full_backlog() as url:
        yield url


async def forever(call: RawCall) -> None:
    """A stream that never ends."""
    await call.send(STREAM_HEAD)
    for number in count():
        await call.events(chunk(f"word {number} "))
        await asyncio.sleep(0.01)


def idle(gateway: Gateway) -> bool:
    """Whether nothing is under way and nothing is held."""
    parts = gateway.parts
    return not (len(parts.in_flight) or parts.admission.in_flight or parts.admission.queued or parts.byte_budget.held)


# Each timer


async def test_connect(blackhole: str, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(blackhole, gateway_connect_timeout=SHORT, gateway_max_attempts=1)
    async with Stopwatch() as watch:
        answer = await gateway.chat()
    assert (answer.status, answer.error["code"], answer.error["param"]) == (504, "backend_timeout", "connect")
    assert answer.headers["x-gateway-attempts"] == "1"
    assert "x-gateway-backend" not in answer.headers
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch


@pytest.mark.parametrize("fault", [HANG, HANG_AFTER_HEADERS, ROLE_ONLY], ids=["silent", "headers only", "role only"])
async def test_first_token(mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any]) -> None:
    gateway = await start_gateway(mock, gateway_first_token_timeout=SHORT)
    mock.set_faults([fault])
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (504, "backend_timeout", "first_token")
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"], "a silent backend is never asked again"


# Signs of life: what comes before the first token, and is none


ENDLESS = 1000
SIGNS = {"comments": b": still thinking\n\n", "roles": chunk()}
PING = b'event: ping\ndata: {"type": "ping"}\n\n'


async def think(call: RawCall, sign: bytes, times: int) -> None:
    """A stream with a sign of life every 0.2 s, and its answer after so many."""
    await call.send(STREAM_HEAD)
    for _ in range(times):
        await call.events(sign)
        await asyncio.sleep(0.2)
    await call.events(chunk("word"), chunk(finish="stop"), b"data: [DONE]\n\n")
    await call.send(END)


async def breaker_and_failures(gateway: Gateway, number: int = 0) -> tuple[str, int]:
    """What `/health` says of a replica's breaker."""
    backend = (await gateway.health())["downstream"]["backends"][number]
    return backend["breaker"], backend["consecutive_failures"]


@pytest.mark.parametrize("sign", SIGNS.values(), ids=SIGNS.keys())
async def test_signs_of_life_are_waited_for_where_nobody_else_can_answer(
    start_raw: StartRaw, start_gateway: StartGateway, sign: bytes
) -> None:
    backend = await start_raw(lambda call: think(call, sign, 5))
    gateway = await start_gateway(backend.url, gateway_first_token_timeout=0.6, gateway_breaker_failures=1)
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=True)
    events = Events(answer.body)
    assert answer.status == 200
    assert (events.text, events.done, events.errors) == ("word", 1, [])
    assert watch.took >= 1, "longer than the timeout"
    assert len(backend.calls) == answer.attempts == 1
    assert await breaker_and_failures(gateway) == ("closed", 0)


async def test_pings_before_a_message_are_signs_of_life(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for _ in range(5):
            await call.events(PING)
            await asyncio.sleep(0.2)
        await call.events(WHOLE_MESSAGE)
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_first_token_timeout=0.6, gateway_breaker_failures=1)
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    assert (answer.status, answer.body) == (200, PING * 5 + WHOLE_MESSAGE)
    assert len(backend.calls) == answer.attempts == 1
    assert await breaker_and_failures(gateway) == ("closed", 0)


@pytest.mark.parametrize("fault", [HANG, HANG_AFTER_HEADERS, PING_ONLY], ids=["silent", "headers only", "ping only"])
async def test_first_token_of_a_message(mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any]) -> None:
    gateway = await start_gateway(mock, gateway_first_token_timeout=SHORT)
    mock.set_faults([fault])
    answer = await send(gateway, MESSAGES_PATH, stream=True)
    assert answer.status == 504
    assert answer.json["type"] == "error"
    assert answer.error.items() >= {
        ("type", "timeout_error"),
        ("code", "backend_timeout"),
        ("param", "first_token"),
    }
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_signs_of_life_end_with_the_first_token_timeout_where_another_replica_can_answer(
    start_raw: StartRaw, mock: MockModel, start_gateway: StartGateway
) -> None:
    backend = await start_raw(lambda call: think(call, SIGNS["comments"], ENDLESS))
    gateway = await start_gateway(backend.url, mock, gateway_first_token_timeout=0.6, gateway_breaker_failures=1)
    prefer(gateway, "backend-1")
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=True)
    assert answer.status == 200
    assert answer.outcomes[0] == "backend-1 first_token_timeout"
    assert answer.headers["x-gateway-backend"] == "backend-2"
    assert not answer.backoffs
    assert watch.took >= 0.6
    assert watch.within(0.6 + 1), watch
    assert (len(backend.calls), mock.journal.total, answer.attempts) == (1, 1, 2)
    assert await breaker_and_failures(gateway) == ("closed", 0), "it lives"


async def test_signs_of_life_are_waited_for_when_the_other_replica_was_silent(
    start_raw: StartRaw, mock: MockModel, start_gateway: StartGateway
) -> None:
    backend = await start_raw(lambda call: think(call, SIGNS["comments"], 5))
    gateway = await start_gateway(mock, backend.url, gateway_first_token_timeout=0.6)
    prefer(gateway, "backend-1")
    mock.set_faults([HANG])
    answer = await gateway.chat(stream=True)
    assert Events(answer.body).text == "word"
    assert answer.outcomes == ["backend-1 first_token_timeout", "backend-2 streaming"]
    assert (len(backend.calls), mock.journal.total) == (1, 1)
    assert await breaker_and_failures(gateway, 0) == ("closed", 1)
    assert await breaker_and_failures(gateway, 1) == ("closed", 0)


async def test_signs_of_life_are_followed_until_the_deadline(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(lambda call: think(call, SIGNS["comments"], ENDLESS))
    gateway = await start_gateway(backend.url, gateway_first_token_timeout=0.6, gateway_breaker_failures=1)
    answer = await _meets_its_deadline(gateway, deadline=1.5, stream=True)
    assert answer.status == 504
    assert _is_deadline(answer.error)
    assert len(backend.calls) == 1
    assert await breaker_and_failures(gateway) == ("closed", 0)


async def test_signs_of_life_that_cease_are_a_silence_that_counts_for_no_breaker(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for _ in range(3):
            await call.events(SIGNS["comments"])
            await asyncio.sleep(0.2)
        await call.left()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_first_token_timeout=0.6, gateway_breaker_failures=1)
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=True)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (504, "backend_timeout", "first_token")
    assert watch.took >= 0.4 + 0.6
    assert watch.within(0.4 + 0.6 + 1), watch
    assert len(backend.calls) == answer.attempts == 1, "not asked again"
    assert await breaker_and_failures(gateway) == ("closed", 0)


async def test_comments_are_no_first_token(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    reset = asyncio.Event()

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        if call.number == 2:
            await call.events(chunk("word"), chunk(finish="stop"), b"data: [DONE]\n\n")
            await call.send(END)
            return
        for _ in range(10):
            await call.events(SIGNS["comments"])
            await asyncio.sleep(0.01)
        reset.set()
        call.reset()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_backoff_initial=0.01)
    answer = await gateway.chat(stream=True)
    assert reset.is_set()
    assert answer.status == 200
    assert Events(answer.body).text == "word", "nothing had gone out, so that it could be asked again"
    assert len(backend.calls) == answer.attempts == 2


async def test_answer(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_answer_timeout=SHORT, gateway_first_token_timeout=0.01)
    mock.set_faults([HANG])
    async with Stopwatch() as watch:
        answer = await gateway.chat()
    assert (answer.status, answer.error["code"], answer.error["param"]) == (504, "backend_timeout", "answer")
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_the_answer_timeout_ends_with_the_headers(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_answer_timeout=1)
    mock.set_faults([{"kind": "slow_first_token", "with": {"delay": 1.3}}])
    answer = await gateway.chat()
    assert answer.status == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [HANG_AFTER_HEADERS, ROLE_ONLY], ids=["headers only", "a part"])
async def test_idle_before_commit(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], *, stream: bool
) -> None:
    gateway = await start_gateway(mock, gateway_idle_timeout=SHORT)
    mock.set_faults([fault])
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (504, "backend_timeout", "idle")
    assert answer.attempts == 1
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"], "a stalled backend is not asked again"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [HANG, HANG_AFTER_HEADERS, ROLE_ONLY], ids=["silent", "headers only", "a part"])
async def test_silent_or_stalled_before_commit_goes_to_another_replica_at_once(
    start_mock: StartMock, start_gateway: StartGateway, fault: dict[str, Any], *, stream: bool
) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(
        bad,
        good,
        gateway_idle_timeout=SHORT,
        gateway_answer_timeout=SHORT,
        gateway_first_token_timeout=SHORT,
        gateway_backoff_initial=LONG,
        gateway_backoff_max=LONG,
    )
    prefer(gateway, "backend-1")
    bad.set_faults([fault])
    async with Stopwatch() as watch:
        answer = await gateway.chat(stream=stream)
    assert answer.status == 200
    assert answer.headers["x-gateway-backend"] == "backend-2"
    assert watch.within(SHORT + 1), watch
    await bad.settled()
    assert [call.ended for call in bad.journal.calls] == ["caller_left"]
    assert good.journal.total == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_two_silent_replicas_are_asked_once_each(
    start_mock: StartMock, start_gateway: StartGateway, *, stream: bool
) -> None:
    mocks = [await start_mock(), await start_mock()]
    gateway = await start_gateway(
        *mocks, gateway_answer_timeout=SHORT, gateway_first_token_timeout=SHORT, gateway_max_attempts=5
    )
    for one in mocks:
        one.set_faults([HANG])
    answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.error["code"], answer.attempts) == (504, "backend_timeout", 2)
    assert not answer.backoffs
    assert [one.journal.total for one in mocks] == [1, 1]


async def test_idle_after_commit(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_idle_timeout=SHORT)
    mock.set_faults([STALL])
    answer = await gateway.chat(stream=True)
    events = Events(answer.body)
    assert answer.status == 200
    assert len(events.data) == 4 + 1
    error = events.only_error()
    assert (error["code"], error["param"]) == ("backend_timeout", "idle")
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_idle_in_the_body_of_an_error(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def play(call: RawCall) -> None:
        await call.send(b'HTTP/1.1 500 Oh\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{"error"')
        await call.left()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_idle_timeout=SHORT, gateway_max_attempts=1)
    answer = await gateway.chat()
    assert (answer.status, answer.error["param"]) == (504, "idle")
    assert len(backend.calls) == 1


async def test_the_idle_timer_stands_still_while_the_caller_does_not_read(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    words = chunk("x" * 8192) * 16

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for _ in range(128):  # far more than the buffers of all the sockets between
            await call.events(words)
        await call.events(chunk(finish="stop"), b"data: [DONE]\n\n")
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_idle_timeout=0.3, gateway_first_token_timeout=LONG)
    async with dial(gateway.url, receive_buffer=65_536) as wire:
        await wire.send(post(json.dumps({**CHAT, "stream": True}).encode()))
        await wire.head()
        await asyncio.sleep(1)
        assert gateway.parts.admission.in_flight == 1, "the buffers took it all, nobody was blocked"
        answer = await _rest_of_stream(wire)
    assert len(answer.data) == 128 * 16 + 2
    assert answer.done == 1
    assert not answer.errors
    assert len(backend.calls) == 1


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_whole_stream_is_not_lost_when_its_backend_goes_before_a_slow_caller_has_it(
    start_raw: StartRaw, start_gateway: StartGateway, how: str
) -> None:
    """So much that the caller's side is full, and so little that all of it has left the backend."""
    gone = asyncio.Event()

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for _ in range(20):
            await call.events(chunk("x" * 4096))
            await asyncio.sleep(0.002)
        await call.events(chunk(finish="stop"))
        await asyncio.sleep(0.05)
        if how == "reset":
            call.reset()
        else:
            call.close()
        gone.set()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    async with dial(gateway.url, receive_buffer=4096) as wire:
        await until(lambda: gateway.limit_send_buffers(16_384) == 1)
        await wire.send(post(json.dumps({**CHAT, "stream": True}).encode()))
        await gone.wait()
        await asyncio.sleep(0.1)
        assert gateway.parts.admission.in_flight == 1, "the buffers took it all, nobody was blocked"
        await wire.head()
        events = await _rest_of_stream(wire)
    assert not events.errors
    assert events.text == "x" * 4096 * 20
    assert events.done == 1
    assert len(backend.calls) == 1


async def _rest_of_stream(wire: Wire) -> Events:
    async with asyncio.timeout(30):
        return Events(await wire._chunks())


async def test_the_body_of_the_caller(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_body_timeout=SHORT)
    async with dial(gateway.url) as wire, Stopwatch() as watch:
        await wire.send(post()[:-5])
        answer = await wire.answer()
    assert (answer.status, answer.error["code"]) == (408, "request_timeout")
    assert answer.headers["x-gateway-attempts"] == "0"
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch
    assert mock.journal.total == 0
    await until(lambda: idle(gateway))


async def test_a_body_that_comes_slowly_but_steadily_is_not_late(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_body_timeout=1)
    data = post()
    async with dial(gateway.url) as wire, Stopwatch() as watch:
        for start in range(0, len(data), len(data) // 8):
            await wire.send(data[start : start + len(data) // 8])
            await asyncio.sleep(0.2)
        assert (await wire.answer()).status == 200
    assert watch.took > 1
    assert mock.journal.total == 1


async def test_a_body_that_comes_steadily_is_bounded_by_the_deadline(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_request_deadline=1)
    head, body = post().split(b"\r\n\r\n", 1)
    async with dial(gateway.url) as wire, Stopwatch() as watch:
        await wire.send(head + b"\r\n\r\n")

        async def drip() -> None:
            for byte in body:
                await wire.send(bytes([byte]))
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        answer = await wire.answer()
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    assert (answer.status, answer.error["code"]) == (504, "deadline_exceeded")
    assert watch.within(2), watch
    assert mock.journal.total == 0


async def test_the_queue(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=SHORT)
    mock.set_faults([HANG])
    first = asyncio.create_task(gateway.chat())
    await mock.called(1)
    async with Stopwatch() as watch:
        answer = await gateway.chat()
    assert (answer.status, answer.error["code"], answer.error["param"]) == (503, "gateway_overloaded", None)
    assert int(answer.headers["retry-after"]) >= 1
    assert watch.took >= SHORT
    assert watch.within(SHORT + 1), watch
    assert mock.journal.total == 1
    await mock.reset()
    await first


# The deadline, in every place


async def _meets_its_deadline(gateway: Gateway, deadline: float = SHORT, **changes: Any) -> Answer:  # noqa: ANN401
    headers = {"x-request-timeout": str(deadline)}
    async with Stopwatch() as watch:
        answer = await gateway.chat(headers=headers, **changes)
    assert watch.within(deadline + PROMISE), watch
    await until(lambda: idle(gateway))
    return answer


def _is_deadline(error: dict[str, Any]) -> bool:
    return (error["code"], error["param"], error["type"]) == ("deadline_exceeded", None, "server_error")


async def test_deadline_in_the_queue(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=LONG)
    mock.set_faults([HANG])
    first = asyncio.create_task(gateway.chat())
    await mock.called(1)
    async with Stopwatch() as watch:
        answer = await gateway.chat(headers={"x-request-timeout": str(SHORT)})
    assert watch.within(SHORT + PROMISE), watch
    assert answer.status == 504
    assert _is_deadline(answer.error)
    assert answer.headers["x-gateway-attempts"] == "0"
    assert mock.journal.total == 1
    await mock.reset()
    await first
    await until(lambda: idle(gateway))


async def test_deadline_in_the_callers_body(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire, Stopwatch() as watch:
        await wire.send(post(headers={"x-request-timeout": str(SHORT)})[:-5])
        answer = await wire.answer()
    assert watch.within(SHORT + PROMISE), watch
    assert answer.status == 504
    assert _is_deadline(answer.error)
    assert mock.journal.total == 0
    await until(lambda: idle(gateway))


async def test_deadline_while_connecting(blackhole: str, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(blackhole, gateway_connect_timeout=LONG)
    answer = await _meets_its_deadline(gateway)
    assert answer.status == 504
    assert _is_deadline(answer.error)
    assert answer.headers["x-gateway-attempts"] == "1", "the first attempt is always made"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("fault", [HANG, HANG_AFTER_HEADERS, ROLE_ONLY], ids=["silent", "headers only", "a part"])
async def test_deadline_in_an_attempt(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], *, stream: bool
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([fault])
    answer = await _meets_its_deadline(gateway, stream=stream)
    assert answer.status == 504
    assert _is_deadline(answer.error)
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_deadline_in_a_stream_that_is_held_back(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(forever)
    gateway = await start_gateway(backend.url, gateway_stream_commit="complete")
    answer = await _meets_its_deadline(gateway, stream=True)
    assert answer.status == 504
    assert _is_deadline(answer.error)
    assert len(backend.calls) == 1


async def test_deadline_in_mid_stream(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(forever)
    gateway = await start_gateway(backend.url)
    answer = await _meets_its_deadline(gateway, stream=True)
    assert answer.status == 200
    events = Events(answer.body)
    assert len(events.data) > 2
    assert _is_deadline(events.only_error())


async def test_deadline_in_a_stream_that_has_stalled(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([STALL])
    answer = await _meets_its_deadline(gateway, stream=True)
    assert _is_deadline(Events(answer.body).only_error())
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_deadline_with_heartbeats(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_heartbeat=0.02)
    mock.set_faults([HANG])
    answer = await _meets_its_deadline(gateway, stream=True)
    assert answer.status == 200
    assert _is_deadline(Events(answer.body).only_error())


@pytest.mark.parametrize("retry_after", [None, "0.2", "5"])
async def test_no_backoff_and_no_retry_after_outlives_the_deadline(
    mock: MockModel, start_gateway: StartGateway, retry_after: str | None
) -> None:
    gateway = await start_gateway(
        mock,
        gateway_connect_timeout=0.1,
        gateway_max_attempts=50,
        gateway_retry_floor=1000,
        gateway_breaker_failures=1000,
        gateway_backoff_initial=0.05,
        gateway_backoff_max=0.1,
    )
    headers = {} if retry_after is None else {"retry-after": retry_after}
    mock.set_faults([{"kind": "status", "with": {"status": 503, "headers": headers}}])
    answer = await _meets_its_deadline(gateway, deadline=1)
    assert answer.status == 503
    assert answer.error["code"] == "mock_503", "the last attempt's own failure"
    assert mock.journal.total == int(answer.headers["x-gateway-attempts"])
    if retry_after is None:
        assert mock.journal.total > 1
        assert answer.headers["x-should-retry"] == "false"
    else:
        assert answer.headers["retry-after"] == retry_after
        assert "x-should-retry" not in answer.headers
    if retry_after == "5":
        assert mock.journal.total == 1


async def test_no_further_attempt_with_less_left_than_the_connect_timeout(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=5, gateway_backoff_initial=0)
    mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    answer = await gateway.chat(headers={"x-request-timeout": "4.9"})
    assert answer.status == 500
    assert mock.journal.total == 1, "the first is always made, a further one is not"


@pytest.mark.parametrize("hold", [False, True])
async def test_deadline_of_a_stream_whose_caller_does_not_read(
    start_raw: StartRaw, start_gateway: StartGateway, *, hold: bool
) -> None:
    left: list[float] = []
    words = chunk("x" * 8192) * 16

    async def play(call: RawCall) -> None:
        try:
            await call.send(STREAM_HEAD)
            for _ in range(16):
                await call.events(words)
            await call.events(chunk(finish="stop"))
            await call.send(END)
        finally:
            left.append(monotonic())

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    headers = {"x-request-timeout": "1", "x-gateway-commit": "complete" if hold else "first_token"}
    async with dial(gateway.url, receive_buffer=8192) as wire, Stopwatch() as watch:
        await until(lambda: gateway.limit_send_buffers(16_384) == 1)  # so that little has to come within the deadline
        await wire.send(post(json.dumps({**CHAT, "stream": True}).encode(), headers))
        await until(lambda: len(gateway.parts.in_flight) == 1)
        await until(lambda: idle(gateway))
        ended = monotonic()
        assert watch.until(ended) <= 1 + PROMISE, watch
        assert ended - watch.started >= 1, "the caller was not blocked at all"
        await wire.rest()
    await until(lambda: left, "the backend's call has ended")
    assert len(left) == 1
    text = await gateway.metrics()
    line = f'gateway_requests_total{{outcome="deadline_exceeded",route="{CHAT_PATH}",status="200"}} 1.0'
    assert line in text, text
    assert "gateway_client_disconnects_total 0.0" in text


async def test_deadline_at_the_very_end_of_a_stream_whose_caller_does_not_read(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    """The last bytes of a whole answer wait for the caller too; at which size, the buffers between decide."""

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for _ in range(16 + 4 * call.number):
            await call.events(chunk("x" * 4096))
            await asyncio.sleep(0.002)  # so that each is written by itself
        await call.events(chunk(finish="stop"), b"data: [DONE]\n\n")
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    prompt = post(json.dumps({**CHAT, "stream": True}).encode(), {"x-request-timeout": "1"})
    async with AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(dial(gateway.url, receive_buffer=4096)) for _ in range(16)]
        await until(lambda: gateway.limit_send_buffers(16_384) == len(wires))
        async with Stopwatch() as watch:
            for wire in wires:
                await wire.send(prompt)
            await backend.called(len(wires))
            await until(lambda: idle(gateway))
        assert watch.within(1 + PROMISE), watch


async def test_deadline_of_a_large_answer_whose_caller_does_not_read(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    large = b'{"id": "' + b"x" * 3_000_000 + b'"}'
    backend = await start_raw(lambda call: call.answer(large))
    gateway = await start_gateway(backend.url)
    async with dial(gateway.url, receive_buffer=8192) as wire, Stopwatch() as watch:
        await wire.send(post(headers={"x-request-timeout": "1"}))
        await until(lambda: len(gateway.parts.in_flight) == 1)
        await until(lambda: idle(gateway))
        ended = monotonic()
        assert watch.until(ended) <= 1 + PROMISE, watch
        assert ended - watch.started >= 1, "the caller was not blocked at all"
        rest = await wire.rest()
    assert len(rest) < len(large), "a cut answer, not a whole one"
    assert 'outcome="deadline_exceeded"' in await gateway.metrics()
    assert len(backend.calls) == 1


# What shortens the deadline, and what is told of it


async def test_the_sdks_read_timeout_caps_the_time_to_commit(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([HANG])
    async with Stopwatch() as watch:
        answer = await gateway.chat(headers={"x-stainless-read-timeout": "0.5"})
    assert watch.within(0.5 + PROMISE), watch
    assert answer.status == 504
    assert _is_deadline(answer.error)
    assert answer.headers["x-should-retry"] == "false"
    assert mock.journal.total == 1


async def test_the_sdks_read_timeout_never_caps_a_whole_stream(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mock = await start_mock(mock_token_interval=0.2, mock_tokens=6)
    gateway = await start_gateway(mock)
    answer = await gateway.chat(stream=True, headers={"x-stainless-read-timeout": "0.8"})
    events = Events(answer.body)
    assert not events.errors
    assert events.done == 1
    assert mock.journal.calls[0].ended == "complete"


async def test_the_backend_is_told_what_is_left(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def play(call: RawCall) -> None:
        if call.number == 1:
            await asyncio.sleep(0.3)
            await call.answer(b"{}", status="500 Oh")
        else:
            await call.answer()

    backend: RawBackend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_request_deadline=20, gateway_backoff_initial=0.01)
    answer = await gateway.chat(headers={"x-request-timeout": "1000"})
    assert answer.status == 200
    first, second = (float(call.headers["x-request-timeout"]) for call in backend.calls)
    assert 0 < second <= first - 0.3
    assert first <= 20, "a caller can only shorten the deadline"
