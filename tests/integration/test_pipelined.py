"""Requests that a caller sends before the answer to the one before: answered in turn, and not held meanwhile."""

import asyncio
import json
import socket
import struct
from contextlib import suppress
from typing import Any

import pytest

from gateway.server.aiohttp_protocol import Protocol
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.polling import until
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import KEY, Gateway, GatewayServer, StartGateway
from tests.integration.stopwatch import Stopwatch
from tests.integration.wire import Wire, chunked, dial, post

AT_ONCE = 1.0
"""Seconds; promised are 0.1."""
ONE_READ = 262_144
"""Bytes; asyncio's, the larger one."""
HANG = {"kind": "hang_before_headers"}

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])  # each reads, and pauses, in its own way


def prompt(word: str, size: int = 0, **changes: Any) -> bytes:  # noqa: ANN401
    """A prompt that says a word, at least so many bytes of it."""
    content = word + " " * size
    return post(json.dumps(CHAT | {"messages": [{"role": "user", "content": content}]} | changes).encode())


def said(call: RawCall) -> str:
    """The word that a prompt says."""
    content: str = json.loads(call.body)["messages"][0]["content"]
    return content.strip()


def connection(gateway: Gateway) -> Protocol:
    """The only caller's connection, at the gateway's end."""
    server = gateway.client.server
    assert isinstance(server, GatewayServer)
    (protocol,) = server.handler.connections
    assert isinstance(protocol, Protocol)
    return protocol


async def flood(caller: Wire, request: bytes) -> None:
    """Send a request over and over, until nothing more is taken for a while."""
    while True:
        async with asyncio.timeout(0.5):
            await caller.send(request)


def hang_up(caller: Wire, *, how: str) -> None:
    """FIN, or RST."""
    if how == "close":
        caller.half_close()
        return
    own: socket.socket = caller._writer.get_extra_info("socket")
    own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    caller.leave()


@pytest.mark.parametrize("size", [0, 100_000], ids=["small", "large"])
async def test_pipelined_prompts_are_answered_in_turn_one_at_a_time(
    start_raw: StartRaw, start_gateway: StartGateway, size: int
) -> None:
    at_once, most = 0, 0

    async def play(call: RawCall) -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0.01)
        at_once -= 1
        await call.answer(json.dumps({"said": said(call)}).encode())

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    words = [f"word-{number}" for number in range(20)]
    async with dial(gateway.url) as caller:
        sending = asyncio.create_task(caller.send(b"".join(prompt(word, size) for word in words)))
        answers = [json.loads((await caller.answer()).body)["said"] for _ in words]
        await sending
    assert answers == words
    assert [said(call) for call in backend.calls] == words
    assert most == 1


@pytest.mark.parametrize("step", [1, 7, 64, 300, 100_000])
async def test_pipelined_requests_of_all_kinds_are_answered_however_they_are_cut(
    mock: MockModel, start_gateway: StartGateway, step: int
) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30, gateway_api_keys=[KEY])
    body = json.dumps(CHAT).encode()
    key = {"authorization": f"Bearer {KEY}"}
    requests = [
        (b"GET /livez HTTP/1.1\r\nhost: gateway\r\n\r\n", 200),
        (post(body, key), 200),
        (post(body), 401),  # whose body nobody reads
        (chunked(body[:20], body[20:], headers=key), 200),
        (chunked(body[:20], body[20:]), 401),
        (b"GET /nothing HTTP/1.1\r\nhost: gateway\r\n\r\n", 404),
        (post(json.dumps(CHAT | {"stream": True}).encode(), key), 200),
        (post(body, {"content-encoding": "rot13"} | key), 415),
        (b"GET /health HTTP/1.1\r\nhost: gateway\r\n\r\n", 200),
        (post(body, key), 200),
    ]
    data = b"".join(request for request, _ in requests)
    async with dial(gateway.url) as caller:

        async def send() -> None:
            for start in range(0, len(data), step):
                await caller.send(data[start : start + step])
                await asyncio.sleep(0)

        sending = asyncio.create_task(send())
        assert [(await caller.answer()).status for _ in requests] == [status for _, status in requests]
        await sending
        await caller.send(requests[0][0])
        assert (await caller.answer()).status == 200
    assert mock.journal.total == 4


async def test_malformed_http_behind_a_request_is_answered_after_it(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30)
    async with dial(gateway.url) as caller:
        await caller.send(prompt("hello") + b"nonsense\r\n\r\n" + prompt("unheard"))
        assert [(await caller.answer()).status for _ in range(2)] == [200, 400]
        assert await caller.rest() == b""
    assert mock.journal.total == 1


async def test_what_comes_behind_a_slow_request_is_not_read(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30)
    mock.set_faults([HANG])
    async with dial(gateway.url) as caller:
        await caller.send(prompt("slow"))
        await mock.called(1)
        with suppress(TimeoutError):
            await flood(caller, prompt("more", 400_000))
        protocol = connection(gateway)
        assert protocol.transport is not None
        assert not protocol.transport.is_reading()
        assert not protocol._messages
        assert 0 < len(protocol._further) <= ONE_READ
        await asyncio.sleep(0.2)
        assert len(protocol._further) <= ONE_READ
    assert mock.journal.total == 1


async def test_what_comes_behind_answers_that_nobody_reads_is_not_read(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    async with dial(gateway.url, receive_buffer=4096) as caller:
        await until(lambda: gateway.limit_send_buffers(4096) == 1)
        with suppress(TimeoutError):
            await flood(caller, b"GET /metrics HTTP/1.1\r\nhost: gateway\r\n\r\n" * 100)
        protocol = connection(gateway)
        assert protocol.transport is not None
        assert not protocol.transport.is_reading()
        assert len(protocol._messages) <= 1
        assert len(protocol._further) <= ONE_READ
        assert protocol.transport.get_write_buffer_size() < 4 * ONE_READ
        hang_up(caller, how="reset")
        await until(lambda: protocol.transport is None)


@pytest.mark.parametrize(
    ("behind", "how"),
    [
        *((behind, how) for behind in (b"", b"G", prompt("one more")) for how in ("close", "reset")),
        (prompt("more", 100_000) * 60, "reset"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
@pytest.mark.parametrize("stream", [False, True], ids=["unstreamed", "streamed"])
async def test_a_caller_who_hangs_up_behind_pipelined_requests_is_noticed_at_once(
    mock: MockModel, start_gateway: StartGateway, how: str, behind: bytes, *, stream: bool
) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30)
    mock.set_faults([HANG])
    async with dial(gateway.url) as caller:
        await caller.send(prompt("slow", stream=stream))
        await mock.called(1)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.3):
                await caller.send(behind)
        await asyncio.sleep(0.1)  # what came has been read, or waits unread
        async with Stopwatch() as watch:
            hang_up(caller, how=how)
            await until(lambda: not len(gateway.parts.in_flight))
            await mock.settled()
        assert watch.within(AT_ONCE), watch
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    assert "gateway_client_disconnects_total 1.0" in await gateway.metrics()


async def test_a_fin_behind_bytes_that_wait_unread_is_noticed_at_once(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30)
    mock.set_faults([HANG])
    async with dial(gateway.url) as caller:
        await caller.send(prompt("slow"))
        await mock.called(1)
        await caller.send(b"GET /livez")
        await until(lambda: len(connection(gateway)._further) > 0)
        await caller.send(b" HTTP/1.1\r\n")  # stays in the gateway's socket
        await asyncio.sleep(0.1)
        async with Stopwatch() as watch:
            caller.half_close()
            await until(lambda: not len(gateway.parts.in_flight))
        assert watch.within(AT_ONCE), watch


async def test_a_connection_is_read_again_after_what_waited_has_been_answered(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30)
    mock.set_faults([{"kind": "latency", "with": {"delay": 0.2}, "times": 1}])
    async with dial(gateway.url) as caller:
        await caller.send(prompt("slow"))
        await mock.called(1)
        await caller.send(prompt("next"))
        assert [(await caller.answer()).status for _ in range(2)] == [200, 200]
        protocol = connection(gateway)
        assert protocol.transport is not None
        assert protocol.transport.is_reading()
        await caller.send(prompt("third"))
        assert (await caller.answer()).status == 200
        mock.set_faults([HANG])
        await caller.send(prompt("fourth"))
        await mock.called(4)
        caller.half_close()
        await until(lambda: not len(gateway.parts.in_flight))
    assert mock.journal.calls[-1].ended == "caller_left"
