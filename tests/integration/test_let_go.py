"""What has ended holds nothing: neither a request nor a connection waits for Python's garbage collector.

It looks only now and then (`gateway.server.listener.GC_THRESHOLD`), and what waits for it may hold bodies of megabytes.
"""

import asyncio
import gc
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp.client_proto import ResponseHandler

from gateway.backend.aiohttp_connection import Protocol as BackendProtocol
from gateway.dialects.dialect import Prompt
from gateway.forwarding.call import Call
from gateway.forwarding.stream_relay import StreamRelay
from gateway.policy.byte_budget import Share
from gateway.policy.lease import Lease
from gateway.record import Record
from gateway.server.aiohttp_protocol import Protocol
from gateway.server.stream_writer import StreamWriter
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.polling import until
from tests.integration.backends_raw import STREAM_HEAD, RawCall, StartRaw, chunk
from tests.integration.gateways import Gateway, GatewayServer, StartGateway, StartMock
from tests.integration.wire import chunked, dial, post

PER_REQUEST = (Call, Lease, Prompt, Record, Share, StreamRelay, StreamWriter)
TIMES = 3
LAST = {"connection": "close"}
"""Of an idle connection aiohttp keeps the last request."""
SETTINGS: dict[str, Any] = {
    "gateway_backoff_initial": 0.01,
    "gateway_backoff_max": 0.01,
    "gateway_connect_timeout": 30,
    "gateway_breaker_failures": 1000,
    "gateway_kept_requests": 0,
}


def alive(*kinds: type) -> list[object]:
    return [one for one in gc.get_objects() if isinstance(one, kinds)]


@asynccontextmanager
async def without_collector(**kept: int) -> AsyncIterator[None]:
    """Nobody collects garbage; at the end nothing of a request may be left but what is kept, by the names of types."""
    gc.collect()
    gc.disable()
    old = {id(one): one for one in alive(*PER_REQUEST)}  # other tests' parameters may hold some

    def left() -> dict[str, int]:
        return dict(Counter(type(one).__name__ for one in alive(*PER_REQUEST) if id(one) not in old))

    try:
        yield
        await until(lambda: left() == kept, lambda: str(left()))
    finally:
        gc.enable()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_is_kept_leaves_its_record_alone(
    mock: MockModel, start_gateway: StartGateway, *, stream: bool
) -> None:
    gateway = await start_gateway(mock, **SETTINGS | {"gateway_kept_requests": 4})
    async with without_collector(Record=4):
        for number in range(9):
            mock.set_faults([{"kind": "status", "with": {"status": 502}, "times": 1 + number % 4}])
            await gateway.chat(stream=stream, user=str(number), headers=LAST)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("faults", "settings", "body"),
    [
        ([], {}, {}),
        ([], {}, {"model": 5}),
        ([{"kind": "status", "with": {"status": 500}, "times": 1}], {}, {}),
        ([{"kind": "status", "with": {"status": 500}}], {}, {}),
        ([{"kind": "status", "with": {"status": 400}}], {}, {}),
        ([{"kind": "overload", "with": {"capacity": 1}}], {}, {}),
        ([{"kind": "reset", "times": 1}], {}, {}),
        ([{"kind": "reset"}], {}, {}),
        ([{"kind": "cut"}], {}, {}),
        ([{"kind": "malformed_event"}], {}, {}),
        ([{"kind": "not_json"}], {}, {}),
        ([{"kind": "html"}], {}, {}),
        ([{"kind": "short_body"}], {}, {}),
        ([{"kind": "no_done"}], {}, {}),
        (
            [{"kind": "hang_before_headers"}],
            {"gateway_first_token_timeout": 0.1, "gateway_answer_timeout": 0.1},
            {},
        ),
        ([{"kind": "stall"}], {"gateway_idle_timeout": 0.1}, {}),
        ([{"kind": "hang_before_headers"}], {"gateway_request_deadline": 0.2}, {}),
        ([{"kind": "stall"}], {"gateway_request_deadline": 0.2}, {}),
    ],
)
async def test_of_a_request_that_has_ended_nothing_is_left(  # noqa: PLR0917
    mock: MockModel,
    start_gateway: StartGateway,
    faults: list[dict[str, Any]],
    settings: dict[str, Any],
    body: dict[str, Any],
    stream: bool,  # noqa: FBT001
) -> None:
    gateway = await start_gateway(mock, **SETTINGS, **settings)
    async with without_collector():
        for _ in range(TIMES):
            mock.set_faults(faults)
            await gateway.chat(**body, stream=stream, headers=LAST)


async def test_of_a_request_that_fell_back_nothing_is_left(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    bad, good = await start_mock(), await start_mock()
    bad.set_faults([{"kind": "status", "with": {"status": 500}}])
    config = tmp_path / "gateway.yaml"
    target = [{"backend": "bad"}, {"backend": "good"}]
    document = {"backends": {"bad": {"url": bad.url}, "good": {"url": good.url}}}
    config.write_text(json.dumps(document | {"routes": [{"model": "*", "targets": target}]}))
    gateway = await start_gateway(gateway_config=config, **SETTINGS)
    async with without_collector():
        for _ in range(TIMES):
            answer = await gateway.chat(headers=LAST)
            assert answer.headers["x-gateway-backend"] == "good"


@pytest.mark.parametrize("kind", ["hang_before_headers", "hang_after_headers", "stall", "drip", "status"])
@pytest.mark.parametrize("stream", [False, True])
async def test_of_a_caller_who_left_nothing_is_left(
    mock: MockModel,
    start_gateway: StartGateway,
    kind: str,
    stream: bool,  # noqa: FBT001
) -> None:
    gateway = await start_gateway(mock, **SETTINGS | {"gateway_backoff_initial": 20, "gateway_backoff_max": 20})
    async with without_collector():
        for number in range(TIMES):
            mock.set_faults([{"kind": kind} | ({"with": {"status": 500}} if kind == "status" else {})])
            async with dial(gateway.url) as caller:
                await caller.send(post(json.dumps(CHAT | {"stream": stream}).encode()))
                await mock.called(number + 1)
                if kind == "status":
                    await mock.settled()
                caller.leave()
                await until(lambda: len(gateway.parts.in_flight) == 0)
        await until(lambda: connections(gateway) == 0)


async def test_of_a_caller_who_left_in_the_middle_of_his_body_nothing_is_left(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **SETTINGS)
    async with without_collector():
        for _ in range(TIMES):
            async with dial(gateway.url) as caller:
                await caller.send(post(b"x" * 100_000)[:-1000])
                await until(lambda: len(gateway.parts.in_flight) == 1)
                caller.leave()
                await until(lambda: len(gateway.parts.in_flight) == 0)


async def test_of_a_connection_that_was_closed_nothing_is_left(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **SETTINGS)
    async with without_collector():
        before = len(alive(Protocol))
        for _ in range(TIMES):
            async with dial(gateway.url) as caller:
                await caller.send(post(headers={"connection": "close"}))
                assert (await caller.answer()).status == 200
            async with dial(gateway.url) as caller:
                await caller.send(post())
                assert (await caller.answer()).status == 200
            async with dial(gateway.url) as caller:
                await caller.send(b"no http\r\n\r\n")
                assert (await caller.answer()).status == 400
            async with dial(gateway.url) as caller:
                await caller.send(post() * 3)
                assert (await caller.answer()).status == 200
            async with dial(gateway.url) as caller:
                await caller.send(chunked(b"{", end=b""))
                await until(lambda: len(gateway.parts.in_flight) == 1)
                await caller.send(b"no chunk\r\n")
                assert (await caller.answer()).status == 400
        await until(lambda: len(alive(Protocol)) <= before)


async def test_of_a_connection_that_waited_too_long_nothing_is_left(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **SETTINGS)
    assert isinstance(gateway.client.server, GatewayServer)
    handler = gateway.client.server.handler
    async with dial(gateway.url) as caller:
        await caller.send(post())
        assert (await caller.answer()).status == 200
        (protocol,) = handler.connections
        protocol.force_close()  # as aiohttp does then
        assert await caller.rest() == b""
    await until(lambda: connections(gateway) == 0)


async def test_of_a_caller_who_does_not_read_until_the_deadline_nothing_is_left(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def flood(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        while True:
            await call.events(chunk("word " * 1_000))

    gateway = await start_gateway((await start_raw(flood)).url, **SETTINGS)
    prompt = post(json.dumps(CHAT | {"stream": True}).encode(), LAST | {"x-request-timeout": "3"})

    async def one() -> None:
        async with dial(gateway.url, receive_buffer=4_096) as caller:
            await caller.send(prompt)
            assert (await caller.head())[0] == 200
            gateway.limit_send_buffers(4_096)
            await until(lambda: len(gateway.parts.in_flight) == 0)

    async with without_collector():
        await asyncio.gather(*(one() for _ in range(TIMES)))


@pytest.mark.parametrize("end", ["cut", "reset", "bad event"])
async def test_of_a_whole_stream_with_a_bad_end_nothing_is_left(
    start_raw: StartRaw, start_gateway: StartGateway, end: str
) -> None:
    chunks = [
        b'data: {"choices": [{"index": 0, "delta": {"content": "word"}}]}\n\n',
        b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n',
    ]

    async def serve(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for one in chunks:
            await call.events(one)
        await asyncio.sleep(0.02)
        if end == "bad event":
            await call.events(b"data: {\n\n")
        elif end == "reset":
            call.reset()
        call.close()

    gateway = await start_gateway((await start_raw(serve)).url, **SETTINGS)
    async with without_collector():
        before = len(alive(BackendProtocol))
        for _ in range(TIMES):
            answer = await gateway.chat(stream=True, headers=LAST)
            assert answer.body == b"".join(chunks) + b"data: [DONE]\n\n"
        await until(lambda: len(alive(BackendProtocol)) <= before)


async def test_of_an_answer_that_nobody_read_nothing_is_left(
    start_raw: StartRaw, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def serve(call: RawCall) -> None:
        await call.answer()

    backend = await start_raw(serve)
    gateway = await start_gateway(backend.url, **SETTINGS)
    assert isinstance(gateway.client.server, GatewayServer)
    handler = gateway.client.server.handler

    def leave_when_it_comes(protocol: BackendProtocol, data: bytes) -> None:
        ResponseHandler.data_received(protocol, data)
        for caller in list(handler.connections) if gateway.parts.in_flight else []:
            transport = caller.transport
            caller.connection_lost(None)
            if transport is not None:
                transport.abort()

    monkeypatch.setattr(BackendProtocol, "data_received", leave_when_it_comes, raising=False)
    async with without_collector():
        before = len(alive(BackendProtocol))
        while len(backend.calls) < TIMES:
            async with dial(gateway.url) as caller:
                await caller.send(post())
                assert await caller.rest() == b""
        await until(lambda: len(alive(BackendProtocol)) <= before)


async def test_of_an_answer_that_nobody_asked_for_nothing_is_left(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def serve(call: RawCall) -> None:
        await call.answer()
        await call.answer()

    gateway = await start_gateway((await start_raw(serve)).url, **SETTINGS)
    async with without_collector():
        before = len(alive(BackendProtocol))
        for _ in range(TIMES):
            assert (await gateway.chat(headers=LAST)).status == 200
        await until(lambda: len(alive(BackendProtocol)) <= before + 1)  # the last one waits in the pool


def connections(gateway: Gateway) -> int:
    """The callers' connections that are open."""
    return len(gateway.parts.in_flight._connections)
