"""Callers who do not read: what waits for them is little, counted, and given up in time."""

import asyncio
import json
from typing import Any

import pytest

from gateway.backend.aiohttp_connection import Protocol as BackendProtocol
from gateway.server.aiohttp_protocol import Protocol
from testkit.completions import CHAT
from testkit.exposition import Exposition
from testkit.polling import until
from testkit.sse import DONE
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw, chunk
from tests.integration.gateways import KEY, Gateway, GatewayServer, StartGateway
from tests.integration.wire import chunks_in, dial, post

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])  # each writes, and pauses, in its own way

A_STREAM = 2 * 65_536
"""Bytes that a stream holds for a caller who does not read: what was read of the backend at once, in our own memory."""
WORD = chunk("word " * 1000)
STREAMED = json.dumps(CHAT | {"stream": True}).encode()


def connections(gateway: Gateway) -> list[Protocol]:
    """The callers' connections, at the gateway's end."""
    server = gateway.client.server
    assert isinstance(server, GatewayServer)
    return [protocol for protocol in server.handler.connections if isinstance(protocol, Protocol)]


def waiting(gateway: Gateway) -> list[int]:
    """Bytes that wait in our own memory for each caller to take them."""
    return [
        protocol.transport.get_write_buffer_size()
        for protocol in connections(gateway)
        if protocol.transport is not None
    ]


async def still(gateway: Gateway) -> None:
    """Wait until a while has passed in which no stream's buffer has changed, and something waits in each.

    Two whiles: in one of them the machine may have stood still.
    """
    before: list[int] = []
    unchanged = 0
    async with asyncio.timeout(30):
        while unchanged < 2:
            now = waiting(gateway)
            unchanged = unchanged + 1 if now == before and now and all(now) else 0
            before = now
            await asyncio.sleep(0.2)


def empty(gateway: Gateway) -> bool:
    parts = gateway.parts
    return parts.admission.in_flight + parts.byte_budget.held + len(parts.in_flight) == 0


async def test_what_a_stream_holds_for_a_caller_who_does_not_read_is_little_and_counted(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    sent: dict[int, int] = {}

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for _ in range(2000):
            await call.events(WORD)
            sent[call.number] = sent.get(call.number, 0) + 1
        await call.events(chunk(finish="stop"), DONE)
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30, gateway_idle_timeout=30)
    async with dial(gateway.url, receive_buffer=4096) as one, dial(gateway.url, receive_buffer=4096) as other:
        for caller in (one, other):
            await caller.send(post(STREAMED))
            assert (await caller.head())[0] == 200
            await caller.some(1_000_000)  # it is known by now that they are slow
        await still(gateway)
        held = waiting(gateway)
        assert len(held) == 2
        assert max(held) <= A_STREAM
        backends: set[BackendProtocol] = {
            protocol for protocol in gateway.parts.client._kept._acquired if isinstance(protocol, BackendProtocol)
        }
        assert len(backends) == 2
        for protocol in backends:
            assert protocol.transport is not None
            assert not protocol.transport.is_reading()
        metrics = Exposition.parse(await gateway.metrics())
        counted = metrics.only("gateway_buffered_bytes") or 0
        assert sum(held) <= counted <= sum(held) + 2 * A_STREAM
        assert max(sent.values()) < 2000
        for caller in (one, other):
            caller.leave()
        await until(lambda: empty(gateway))


async def test_a_slow_reader_gets_every_byte_in_order_and_the_connection_to_the_backend_is_kept(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    events = [chunk(f"{number} " + "word " * 400) for number in range(1500)]
    whole = b"".join([*events, chunk(finish="stop"), DONE])

    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        for event in events:
            await call.events(event)
        await call.events(chunk(finish="stop"), DONE)
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    for turn in (1, 2):
        async with dial(gateway.url, receive_buffer=4096) as caller:
            await caller.send(post(STREAMED, {"connection": "close"}))
            assert (await caller.head())[0] == 200
            if turn == 1:
                await still(gateway)
            body, ended = chunks_in(await caller.rest())
        assert (body, ended) == (whole, True)
        await until(lambda: empty(gateway))
    assert [call.turn for call in backend.calls] == [1, 2]
    for protocol, _ in next(iter(gateway.parts.client._kept._conns.values())):
        assert protocol.transport is not None
        assert protocol.transport.get_protocol() is protocol


@pytest.mark.parametrize(
    "what", ["streamed", "streamed when complete", "small", "large", "an error", "metrics", "health", "no key"]
)
async def test_an_answer_of_which_no_byte_is_taken_ends(
    start_raw: StartRaw, start_gateway: StartGateway, what: str
) -> None:
    """Small answers fill the kernel's buffers only when there are many of them: they are pipelined."""

    async def play(call: RawCall) -> None:
        if json.loads(call.body).get("stream"):
            await call.send(STREAM_HEAD)
            for _ in range(500):
                await call.events(WORD)
            await call.events(chunk(finish="stop"), DONE)
            await call.send(END)
        elif what == "an error":
            await call.answer(json.dumps({"error": {"message": "x" * 50_000}}).encode(), status="400 Bad Request")
        else:
            await call.answer(b'{"choices": [], "text": "%s"}' % (b"x" * (50_000 if what == "small" else 5_000_000)))

    backend = await start_raw(play)
    settings: dict[str, Any] = {"gateway_connect_timeout": 30, "gateway_write_timeout": 0.5, "gateway_api_keys": [KEY]}
    gateway = await start_gateway(backend.url, **settings)
    key = {"authorization": f"Bearer {KEY}"}
    requests = {
        "streamed": post(STREAMED, key),
        "streamed when complete": post(STREAMED, key | {"x-gateway-commit": "complete"}),
        "metrics": b"GET /metrics HTTP/1.1\r\nhost: gateway\r\n\r\n",
        "health": b"GET /health HTTP/1.1\r\nhost: gateway\r\n\r\n",
        "no key": post(),
    }
    async with dial(gateway.url, receive_buffer=4096) as caller:
        sending = asyncio.create_task(caller.send(requests.get(what, post(headers=key)) * 2000))
        await until(lambda: any(waiting(gateway)))
        await until(lambda: not connections(gateway))
        await asyncio.gather(sending, return_exceptions=True)
    await until(lambda: empty(gateway))
    metrics = Exposition.parse(await gateway.metrics())
    assert metrics.only("gateway_in_flight_requests") == metrics.only("gateway_buffered_bytes") == 0
    if what in {"streamed", "streamed when complete", "large"}:
        assert metrics.only("gateway_client_disconnects_total") == 1


async def test_a_caller_who_takes_a_little_now_and_then_is_not_cut_off(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.answer(b'{"choices": [], "text": "%s"}' % (b"x" * 5_000_000))

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30, gateway_write_timeout=4)
    async with dial(gateway.url, receive_buffer=4096) as caller:
        await caller.send(post())
        assert (await caller.head())[0] == 200
        await until(lambda: any(waiting(gateway)))
        left = 5_000_000 + len('{"choices": [], "text": ""}')
        for _ in range(100):
            await caller.some(4096)
            left -= 4096
            await asyncio.sleep(0.05)
        await caller.some(left)
        assert len(connections(gateway)) == 1
