"""Callers who leave: the backend call ends with them, nothing stays behind, and it is nobody's failure."""

import asyncio
import json
from contextlib import AsyncExitStack
from typing import Any

import pytest

from gateway.policy.breaker import State
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.exposition import Exposition
from testkit.polling import PATIENCE, until
from tests.integration.backends_raw import STREAM_HEAD, RawCall, StartRaw, chunk, full_backlog
from tests.integration.gateways import Gateway, StartGateway, StartMock
from tests.integration.stopwatch import Stopwatch
from tests.integration.test_sdk import MESSAGES
from tests.integration.wire import Wire, dial, post

AT_ONCE = 1.0
"""Seconds; promised are 0.1."""
HANG = {"kind": "hang_before_headers"}
REQUESTS = "gateway_requests_total"


def prompt(**changes: Any) -> bytes:  # noqa: ANN401
    """A chat prompt, as a caller sends it."""
    headers = changes.pop("headers", None)
    return post(json.dumps(CHAT | changes).encode(), headers)


def empty(gateway: Gateway) -> bool:
    """Whether nothing is under way and nothing is held."""
    parts = gateway.parts
    taken = parts.admission.in_flight + parts.admission.queued + parts.byte_budget.held + len(parts.in_flight)
    return taken + sum(replica.in_flight for replica in parts.pool.replicas) == 0


async def left(gateway: Gateway, *callers: Wire) -> None:
    """The callers leave; the gateway has let go of everything at once."""
    async with Stopwatch() as watch:
        for caller in callers:
            caller.leave()
        await until(lambda: empty(gateway))
    assert watch.within(AT_ONCE), watch


async def assert_nobodys_failure(gateway: Gateway, *, callers: int = 1, status: int = 499) -> None:
    """As callers who left it is counted, and the backend is as good as before."""
    metrics = Exposition.parse(await gateway.metrics())
    labels = ("outcome", "client_closed_request"), ("route", CHAT_PATH), ("status", str(status))
    assert {key: value for key, value in metrics.samples.items() if key[0] == REQUESTS} == {(REQUESTS, labels): callers}
    assert metrics.only("gateway_client_disconnects_total") == callers
    assert metrics.only("gateway_in_flight_requests") == metrics.only("gateway_queued_requests") == 0
    document = await gateway.health()
    assert (document["status"], document["in_flight"], document["queued"]) == ("ok", 0, 0)
    backend = document["downstream"]["backends"][0]
    assert (backend["status"], backend["breaker"], backend["in_flight"]) == ("ok", "closed", 0)
    assert backend["consecutive_failures"] == 0
    assert backend["last_error"] is None


# While the backend is at work


@pytest.mark.parametrize(
    ("fault", "body"),
    [
        (HANG, {}),
        ({"kind": "hang_after_headers"}, {}),
        ({"kind": "stall"}, {}),
        ({"kind": "drip", "with": {"interval": 0.05}}, {}),
        ({"kind": "latency", "with": {"delay": 30}}, {}),
        (HANG, {"stream": True}),
        ({"kind": "hang_after_headers"}, {"stream": True}),
        ({"kind": "stall", "with": {"after_events": 1}}, {"stream": True}),
        ({"kind": "slow_first_token", "with": {"delay": 30}}, {"stream": True}),
        (
            {"kind": "stall", "with": {"after_events": 4}},
            {"stream": True, "headers": {"x-gateway-commit": "complete"}},
        ),
    ],
    ids=lambda value: value.get("kind") or ("held" if "headers" in value else "streamed" if value else "unstreamed"),
)
async def test_a_caller_who_leaves_before_the_answer_ends_the_backend_call(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], body: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, gateway_breaker_failures=1)
    mock.set_faults([fault])
    async with dial(gateway.url) as caller:
        await caller.send(prompt(**body))
        await mock.called(1)
        async with Stopwatch() as watch:
            await left(gateway, caller)
            await mock.settled()
        assert watch.within(AT_ONCE), watch
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await assert_nobodys_failure(gateway)
    assert 'gateway_attempts_total{backend="backend-1",outcome="cancelled"} 1.0' in await gateway.metrics()


@pytest.mark.parametrize("interval", [0.02, 30], ids=["while words come", "while the backend is silent"])
async def test_a_caller_who_leaves_a_stream_under_way_ends_the_backend_call(
    start_mock: StartMock, start_gateway: StartGateway, interval: float
) -> None:
    mock = await start_mock(mock_token_interval=interval, mock_tokens=4000)
    gateway = await start_gateway(mock, gateway_breaker_failures=1)
    async with dial(gateway.url) as caller:
        await caller.send(prompt(stream=True))
        assert (await caller.head())[0] == 200
        await caller.some(20)
        async with Stopwatch() as watch:
            await left(gateway, caller)
            await mock.settled()
        assert watch.within(AT_ONCE), watch
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await assert_nobodys_failure(gateway, status=200)


async def test_a_caller_who_does_not_read_and_leaves_ends_the_backend_call(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    over = asyncio.Event()

    async def play(call: RawCall) -> None:
        try:
            await call.send(STREAM_HEAD)
            while True:
                await call.events(chunk("word " * 2000))
        except ConnectionError:
            over.set()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_idle_timeout=60, gateway_breaker_failures=1)
    async with dial(gateway.url, receive_buffer=4096) as caller:
        await until(lambda: gateway.limit_send_buffers(4096) == 1)
        await caller.send(prompt(stream=True))
        await caller.head()
        await asyncio.sleep(0.3)  # until all buffers are full
        assert not empty(gateway)
        await left(gateway, caller)
        async with asyncio.timeout(PATIENCE):
            await over.wait()
    await assert_nobodys_failure(gateway, status=200)


async def test_the_sdk_that_breaks_off_its_stream_ends_the_backend_call(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mock = await start_mock(mock_token_interval=0.02, mock_tokens=4000)
    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk:
        async with await sdk.chat.completions.create(model="demo-model", messages=MESSAGES, stream=True) as events:
            async for _ in events:
                break
        async with Stopwatch() as watch:
            await until(lambda: empty(gateway))
            await mock.settled()
        assert watch.within(AT_ONCE), watch
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await assert_nobodys_failure(gateway, status=200)


async def test_the_sdk_whose_task_is_cancelled_ends_the_backend_call(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([HANG])
    async with gateway.sdk as sdk:
        asking = asyncio.create_task(sdk.chat.completions.create(model="demo-model", messages=MESSAGES))
        await mock.called(1)
        async with Stopwatch() as watch:
            asking.cancel()
            await until(lambda: empty(gateway))
            await mock.settled()
        assert watch.within(AT_ONCE), watch
        assert (await asyncio.gather(asking, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await assert_nobodys_failure(gateway)


async def test_a_caller_who_gets_heartbeats_and_leaves_ends_the_backend_call(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_heartbeat=0.02)
    mock.set_faults([HANG])
    async with dial(gateway.url) as caller:
        await caller.send(prompt(stream=True))
        assert (await caller.head())[0] == 200
        await caller.some(20)
        await left(gateway, caller)
        await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await assert_nobodys_failure(gateway, status=200)


# While the gateway itself is at work


async def test_a_caller_who_leaves_while_we_connect(start_gateway: StartGateway) -> None:
    async with full_backlog() as url:
        gateway = await start_gateway(url, gateway_connect_timeout=30, gateway_probe_interval=60)
        async with dial(gateway.url) as caller:
            await caller.send(prompt())
            await until(lambda: gateway.parts.pool.replicas[0].in_flight == 1)
            await left(gateway, caller)
        replica = gateway.parts.pool.replicas[0]
        assert (replica.breaker.consecutive_failures, replica.last_error) == (0, None)
        assert "gateway_client_disconnects_total 1.0" in await gateway.metrics()


async def test_a_caller_who_leaves_the_queue(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=60)
    admission = gateway.parts.admission
    mock.set_faults([HANG])
    async with dial(gateway.url) as first, dial(gateway.url) as second, dial(gateway.url) as third:
        await first.send(prompt())
        await mock.called(1)
        for number, caller in enumerate([second, third], 1):
            await caller.send(prompt())
            await until(lambda expected=number: admission.queued == expected)  # type: ignore[misc]
        async with Stopwatch() as watch:
            second.leave()
            await until(lambda: admission.queued == 1)
        assert watch.within(AT_ONCE), watch
        assert admission.in_flight == 1
        mock.set_faults([])
        first.leave()
        assert (await third.answer()).status == 200, "the slot did not pass the caller who left"
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left", "complete"]
    await until(lambda: empty(gateway))
    assert "gateway_client_disconnects_total 2.0" in await gateway.metrics()


async def test_a_caller_who_leaves_during_a_backoff(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    replica = gateway.parts.pool.replicas[0]
    mock.set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after": "9"}}}])
    async with dial(gateway.url) as caller:
        await caller.send(prompt())
        await until(lambda: replica.last_error is not None)
        assert gateway.parts.admission.in_flight == 1
        assert replica.in_flight == 0
        await left(gateway, caller)
    assert mock.journal.total == 1, "the retry was sent for nobody"
    metrics = await gateway.metrics()
    assert 'gateway_requests_total{outcome="client_closed_request",route="/v1/chat/completions",status="499"} 1.0' in (
        metrics
    )
    assert "gateway_client_disconnects_total 1.0" in metrics
    assert 'gateway_retries_allowed_total{backend="backend-1"} 0.0' in metrics
    assert (replica.breaker.state, replica.breaker.consecutive_failures) == (State.CLOSED, 0)


async def test_a_caller_who_leaves_in_the_middle_of_his_prompt(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as caller:
        await caller.send(prompt()[:-10])
        await until(lambda: gateway.parts.byte_budget.held > 0)
        await left(gateway, caller)
    assert mock.journal.total == 0
    await assert_nobodys_failure(gateway)


async def test_a_caller_who_leaves_without_a_prompt_is_nobody(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as caller:
        await caller.send(prompt())
        assert (await caller.answer()).status == 200
        caller.leave()
    assert "gateway_client_disconnects_total 0.0" in await gateway.metrics()
    assert mock.journal.calls[0].ended == "complete"


# Many, and the half-open breaker


async def test_callers_who_leave_together_open_no_breaker_and_leave_no_slot_taken(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=20, gateway_queue_timeout=60, gateway_breaker_failures=1)
    mock.set_faults([{**HANG, "match": {"stream": False}}, {"kind": "hang_after_headers"}])
    async with AsyncExitStack() as stack:
        callers = [await stack.enter_async_context(dial(gateway.url)) for _ in range(20)]
        for number, caller in enumerate(callers):
            await caller.send(prompt(stream=number % 2 == 1))
        await mock.called(10)
        await until(lambda: gateway.parts.admission.queued == 10)
        for caller in callers:
            caller.leave()
        await until(lambda: empty(gateway))
        await mock.settled()
    # A slot may pass to a queued caller whose leaving has not been noticed yet.
    assert {call.ended for call in mock.journal.calls} == {"caller_left"}
    await assert_nobodys_failure(gateway, callers=20)
    mock.set_faults([])
    assert {answer.status for answer in await asyncio.gather(*(gateway.chat() for _ in range(10)))} == {200}


@pytest.mark.parametrize("stream", [False, True], ids=["unstreamed", "streamed"])
async def test_a_half_open_place_is_given_back(mock: MockModel, start_gateway: StartGateway, *, stream: bool) -> None:
    gateway = await start_gateway(
        mock, gateway_breaker_failures=1, gateway_breaker_open_seconds=0.05, gateway_max_attempts=1
    )
    breaker = gateway.parts.pool.replicas[0].breaker
    mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    await gateway.chat()
    await until(lambda: breaker.state is State.HALF_OPEN)
    mock.set_faults([HANG])
    async with dial(gateway.url) as caller:
        await caller.send(prompt(stream=stream))
        await mock.called(2)
        refused = await gateway.chat()
        assert refused.error["code"] == "backend_unavailable", "half open admits one"
        assert mock.journal.total == 2
        await left(gateway, caller)
    assert (breaker.state, breaker.admits) == (State.HALF_OPEN, True)
    mock.set_faults([])
    assert (await gateway.chat()).status == 200
    assert breaker.state == State.CLOSED
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["fault", "caller_left", "complete"]
