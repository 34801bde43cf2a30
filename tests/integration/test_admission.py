"""Admission: how many requests come in, who waits, who is turned away; and that every way out gives all of it back."""

import asyncio
import json
from contextlib import AsyncExitStack, suppress
from random import Random, randrange
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import StartRaw
from tests.integration.gateways import Gateway, StartGateway, StartMock
from tests.integration.stopwatch import Stopwatch
from tests.integration.wire import dial, post

PROMISE = 0.05
"""Seconds within which a full queue says so."""
HANG = {"kind": "hang_before_headers"}
LONG = 60


def idle(gateway: Gateway) -> bool:
    """Whether nothing is under way, queued or held, by any count there is."""
    parts = gateway.parts
    attempts = sum(replica.in_flight for replica in parts.pool.replicas)
    admission = parts.admission
    return not (len(parts.in_flight) or admission.in_flight or admission.queued or parts.byte_budget.held or attempts)


async def occupy(gateway: Gateway, mock: MockModel, slots: int, **changes: Any) -> list[asyncio.Task[Answer]]:  # noqa: ANN401
    """Requests that hang at the backend; `mock.reset()` ends them."""
    mock.set_faults([HANG])
    before = mock.journal.total
    tasks = [asyncio.create_task(gateway.chat(**changes)) for _ in range(slots)]
    await mock.called(before + slots)
    return tasks


def overloaded(answer: Answer) -> bool:
    """Turned away: nothing was sent, and it says when to come again."""
    return (
        (answer.status, answer.error["code"], answer.error["param"]) == (503, "gateway_overloaded", None)
        and answer.attempts == 0
        and int(answer.headers["retry-after"]) >= 1
        and "x-should-retry" not in answer.headers
    )


async def test_no_more_requests_in_flight_than_allowed(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=6, gateway_queue_timeout=LONG)
    mock.set_faults([{"kind": "latency", "with": {"delay": 0.03}}])
    most = 0

    async def look() -> None:
        nonlocal most
        while True:
            most = max(most, mock.in_flight)
            await asyncio.sleep(0.002)

    looking = asyncio.create_task(look())
    answers = await asyncio.gather(*(gateway.chat(stream=bool(number % 2)) for number in range(20)))
    looking.cancel()
    assert {answer.status for answer in answers} == {200}
    assert mock.journal.total == 20
    assert most == 3
    await until(lambda: idle(gateway))


async def test_queue_is_first_in_first_out(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=LONG)
    first = await occupy(gateway, mock, 1)
    waiting = []
    for number in range(8):
        waiting.append(asyncio.create_task(gateway.chat(headers={"x-request-id": f"number-{number}"})))
        await until(lambda: gateway.parts.admission.queued == len(waiting))
    await mock.reset()
    answers = await asyncio.gather(*first, *waiting)
    assert [answer.status for answer in answers[1:]] == [200] * 8
    queued = [call.request_id for call in mock.journal.calls if (call.request_id or "").startswith("number-")]
    assert queued == [f"number-{number}" for number in range(8)]


async def test_wait_in_the_queue_is_told(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=LONG)
    first = await occupy(gateway, mock, 1)
    waiting = asyncio.create_task(gateway.chat())
    await until(lambda: gateway.parts.admission.queued == 1)
    health = await gateway.health()
    assert (health["in_flight"], health["queued"]) == (1, 1)
    metrics = await gateway.metrics()
    assert "gateway_in_flight_requests 1.0" in metrics
    assert "gateway_queued_requests 1.0" in metrics
    await asyncio.sleep(0.1)
    await mock.reset()
    answer = (await asyncio.gather(waiting, *first))[0]
    name, _, milliseconds = answer.timing[0]
    assert name == "queue"
    assert milliseconds >= 100


@pytest.mark.parametrize("places", [0, 2])
async def test_full_queue_says_so_at_once(mock: MockModel, start_gateway: StartGateway, places: int) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=places, gateway_queue_timeout=LONG)
    first = await occupy(gateway, mock, 1)
    waiting = [asyncio.create_task(gateway.chat()) for _ in range(places)]
    await until(lambda: gateway.parts.admission.queued == places)
    for stream in (False, True):
        async with Stopwatch() as watch:
            answer = await gateway.chat(stream=stream)
        assert overloaded(answer)
        assert watch.within(PROMISE), watch
    assert mock.journal.total == 1
    assert 'gateway_shed_requests_total{reason="queue_full"} 2.0' in await gateway.metrics()
    await mock.reset()
    await asyncio.gather(*first, *waiting)
    assert (await gateway.chat()).status == 200
    await until(lambda: idle(gateway))


async def test_full_queue_does_not_wait_for_a_body(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=0)
    first = await occupy(gateway, mock, 1)
    async with dial(gateway.url) as wire, Stopwatch() as watch:
        await wire.send(post(headers={"content-length": "1000000"}))
        answer = await wire.answer()
    assert overloaded(answer)
    assert watch.within(PROMISE), watch
    await mock.reset()
    await asyncio.gather(*first)


async def test_queue_timeout_is_told_and_counted(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=0.2)
    first = await occupy(gateway, mock, 1)
    async with Stopwatch() as watch:
        answers = await asyncio.gather(*(gateway.chat() for _ in range(5)))
    assert all(overloaded(answer) for answer in answers)
    assert watch.took >= 0.2
    assert watch.within(1.2), watch
    assert mock.journal.total == 1, "nobody who waited in vain is sent on"
    health = await gateway.health()
    assert (health["in_flight"], health["queued"]) == (1, 0), "who gave up has left the queue"
    assert 'gateway_shed_requests_total{reason="queue_timeout"} 5.0' in await gateway.metrics()
    await mock.reset()
    await asyncio.gather(*first)
    await until(lambda: idle(gateway))


async def test_stream_keeps_its_slot_to_its_end(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=0)
    mock.set_faults([{"kind": "stall", "with": {"after_events": 4}, "times": 1}])
    async with gateway.client.post("/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        await response.content.readuntil(b"\n\n")
        assert overloaded(await gateway.chat())
    await until(lambda: idle(gateway))
    assert (await gateway.chat()).status == 200
    assert mock.journal.total == 2


# Bytes


def padded(size: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "x" * size}]}


async def test_bodies_of_all_requests_together_are_bounded(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=200_000)
    first = await occupy(gateway, mock, 1, **padded(60_000))
    assert 60_000 < gateway.parts.byte_budget.held < 61_000
    assert overloaded(await gateway.chat(**padded(60_000)))
    assert mock.journal.total == 1
    assert 'gateway_shed_requests_total{reason="memory"} 1.0' in await gateway.metrics()
    small = asyncio.create_task(gateway.chat())
    await mock.called(2)
    await mock.reset()
    await asyncio.gather(*first, small)
    await until(lambda: idle(gateway))
    assert (await gateway.chat(**padded(60_000))).status == 200


async def test_a_body_with_another_model_counts_twice(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=300_000)
    gateway.parts.pool.routes[0].targets[0].model = "another"
    assert overloaded(await gateway.chat(**padded(100_000)))
    assert mock.journal.total == 0
    first = await occupy(gateway, mock, 1, **padded(70_000))
    assert 140_000 < gateway.parts.byte_budget.held < 141_000
    await mock.reset()
    await asyncio.gather(*first)
    await until(lambda: idle(gateway))


async def test_bodies_count_while_they_arrive(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=200_000)
    async with dial(gateway.url) as wire:
        await wire.send(post(b"x" * 60_000, {"content-length": "70000"}))
        await until(lambda: gateway.parts.byte_budget.held == 60_000)
        assert overloaded(await gateway.chat(**padded(60_000)))
    await until(lambda: idle(gateway))
    assert mock.journal.total == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_are_bounded_too(start_raw: StartRaw, start_gateway: StartGateway, *, stream: bool) -> None:
    async def play(call: Any) -> None:  # noqa: ANN401
        if b"stream" in call.body:
            content = b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": "x" * 50_000}}]}).encode()
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99999999\r\n\r\n"
            await call.send(head + (content + b"\n\n") * 5)
            await call.left()
        else:
            await call.answer(b'{"id": "' + b"x" * 200_000 + b'"}')

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_buffered_bytes=200_000, gateway_stream_commit="complete")
    changes = {"stream": True} if stream else {}
    answer = await gateway.chat(**changes)
    assert (answer.status, answer.error["code"]) == (503, "gateway_overloaded")
    assert answer.attempts == 1
    assert answer.headers["x-should-retry"] == "false"
    assert "retry-after" not in answer.headers
    assert len(backend.calls) == 1
    await until(lambda: idle(gateway))
    replica = gateway.parts.pool.replicas[0]
    assert replica.breaker.consecutive_failures == 0, "our own want of memory is no failure of the backend"


async def test_answer_above_its_own_limit_is_not_tried_again(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    backend = await start_raw(lambda call: call.answer(b'{"id": "' + b"x" * 2000 + b'"}'))
    gateway = await start_gateway(backend.url, gateway_max_answer_bytes=1000)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")
    assert len(backend.calls) == 1
    await until(lambda: idle(gateway))


async def test_retries_hold_one_answer_at_a_time(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    """Three broken answers of 60 kB fit below 100 kB, one after the other."""

    async def play(call: Any) -> None:  # noqa: ANN401
        if call.number == 3:
            await call.answer()
            return
        await call.send(b"HTTP/1.1 500 Oh\r\ncontent-type: application/json\r\ncontent-length: 70000\r\n\r\n")
        await call.send(b"x" * 60_000)
        call.close()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_buffered_bytes=200_000, gateway_backoff_initial=0.01)
    answer = await gateway.chat()
    assert answer.status == 200
    assert len(backend.calls) == 3


# Every way out

WAYS: list[dict[str, Any] | None] = [
    None,
    {"kind": "status", "with": {"status": 500}},
    {"kind": "status", "with": {"status": 400}},
    {"kind": "status", "with": {"status": 429, "headers": {"retry-after": "0.05"}}},
    {"kind": "latency", "with": {"delay": 0.05}},
    {"kind": "hang_before_headers"},
    {"kind": "hang_after_headers"},
    {"kind": "stall", "with": {"after_events": 4}},
    {"kind": "cut", "with": {"after_events": 1}},
    {"kind": "cut", "with": {"after_events": 5, "how": "reset"}},
    {"kind": "malformed_event", "with": {"after_events": 3}},
    {"kind": "short_body"},
    {"kind": "not_json"},
    {"kind": "no_finish"},
    {"kind": "reset"},
    {"kind": "drip", "with": {"bytes": 64, "interval": 0.002}},
]


async def _one(gateway: Gateway, random: Random, names: list[str]) -> int | None:
    """One request of a random kind; its status, or None when its caller left."""
    headers = {}
    if random.random() < 0.3:
        headers["x-request-timeout"] = str(random.choice([0.001, 0.05, 0.3]))
    if random.random() < 0.3:
        headers["x-gateway-commit"] = "complete"
    changes: dict[str, Any] = {"model": random.choice(names), "stream": random.random() < 0.6}
    if random.random() < 0.1:
        changes |= padded(80_000)
    if random.random() < 0.05:
        changes["messages"] = "wrong"
    if random.random() < 0.05:
        headers["x-gateway-commit"] = "wrong"
    patience = random.choice([0.0, 0.02, 0.1]) if random.random() < 0.3 else LONG
    await asyncio.sleep(random.random() * 0.5)
    with suppress(TimeoutError):
        async with asyncio.timeout(patience):
            return (await gateway.chat(headers=headers, **changes)).status
    return None


@pytest.mark.parametrize("seed", [1, 2, 3, randrange(1 << 32)], ids=["1", "2", "3", "another"])
@pytest.mark.parametrize("heartbeat", [0, 0.02])
async def test_slots_and_bytes_are_given_back_on_every_way_out(
    start_mock: StartMock, start_gateway: StartGateway, seed: int, heartbeat: float
) -> None:
    print(f"seed {seed}")  # noqa: T201
    random = Random(seed)
    mocks = [await start_mock(mock_token_interval=0.001) for _ in range(2)]
    names = [f"model-{number}" for number in range(len(WAYS))]
    script = [{**way, "match": {"model": name}} for name, way in zip(names, WAYS, strict=True) if way is not None]
    for mock in mocks:
        mock.set_faults(script)
    gateway = await start_gateway(
        *mocks,
        gateway_heartbeat=heartbeat,
        gateway_max_in_flight=8,
        gateway_max_queue=16,
        gateway_queue_timeout=0.2,
        gateway_max_buffered_bytes=200_000,
        gateway_first_token_timeout=0.2,
        gateway_answer_timeout=0.2,
        gateway_idle_timeout=0.1,
        gateway_backoff_initial=0.01,
        gateway_breaker_failures=20,
        gateway_breaker_open_seconds=0.1,
    )
    statuses = await asyncio.gather(*(_one(gateway, random, names) for _ in range(150)))
    assert {200, None} < set(statuses), "a mix"
    assert len(set(statuses)) > 4
    await until(lambda: idle(gateway))
    for mock in mocks:
        await mock.settled()
    health = await gateway.health()
    assert (health["in_flight"], health["queued"]) == (0, 0)
    assert {backend["in_flight"] for backend in health["downstream"]["backends"]} == {0}
    metrics = await gateway.metrics()
    assert "gateway_in_flight_requests 0.0" in metrics
    assert "gateway_queued_requests 0.0" in metrics


# One caller and the others


async def test_bodies_of_one_caller_that_never_end_leave_half_of_the_bytes_to_others(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=200_000, gateway_api_keys="greedy,modest")
    async with AsyncExitStack() as stack:
        for _ in range(8):
            wire = await stack.enter_async_context(dial(gateway.url))
            unfinished = {"content-length": "70000", "authorization": "Bearer greedy"}
            await wire.send(post(b"x" * 30_000, unfinished))
        await until(lambda: gateway.parts.byte_budget.held == 90_000)
        for more in ({}, {"x-api-key": "junk"}, {"api-key": "modest, junk"}):
            shown = {"authorization": "Bearer greedy", **more}
            assert overloaded(await gateway.chat(headers=shown, **padded(30_000)))
        for _ in range(3):
            answer = await gateway.chat(headers={"authorization": "Bearer modest"}, **padded(80_000))
            assert answer.status == 200
    await until(lambda: idle(gateway))


async def test_requests_of_one_caller_leave_half_of_the_slots_to_others(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(
        mock, gateway_max_in_flight=4, gateway_queue_timeout=LONG, gateway_api_keys="greedy,modest"
    )
    mock.set_faults([{"kind": "hang_before_headers", "match": {"model": "slow"}}])
    greedy = [
        asyncio.create_task(gateway.chat(model="slow", headers={"authorization": "Bearer greedy"})) for _ in range(4)
    ]
    await until(lambda: gateway.parts.admission.queued == 2)
    for stream in (False, True):
        answer = await gateway.chat(headers={"authorization": "Bearer modest"}, stream=stream)
        assert answer.status == 200
        assert answer.timing[0] == ("queue", "", 0.0)
    assert mock.in_flight == 2
    for task in greedy:
        task.cancel()
    await asyncio.gather(*greedy, return_exceptions=True)
    await until(lambda: idle(gateway))
