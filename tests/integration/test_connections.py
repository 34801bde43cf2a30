"""How connections are kept: those of callers, of which there are only so many, and those to a backend."""

import asyncio
import json
import os
import re
import resource
import signal
import socket
from contextlib import AsyncExitStack, ExitStack, closing
from pathlib import Path
from time import monotonic

import pytest
import uvloop
from aiohttp import web

from gateway.server import aiohttp_protocol
from gateway.server.aiohttp_protocol import Runner
from gateway.server.connections import Connections
from gateway.server.listener import Listener, listening_sockets
from gateway.telemetry.metrics import CLOSE_REASONS
from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.polling import until
from tests.integration import processes
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import Gateway, StartGateway
from tests.integration.wire import Wire, dial, post

ALIVE = b"GET /livez HTTP/1.1\r\nhost: gateway\r\n\r\n"
LOCAL = {"HOST": "127.0.0.1", "PORT": "0", "GATEWAY_PROBE_INTERVAL": "600"}
SHORT = 0.3
STREAMED = json.dumps(CHAT | {"stream": True}).encode()


async def test_of_the_kept_connections_to_a_backend_the_one_used_last_is_taken(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    both = asyncio.Event()

    async def play(call: RawCall) -> None:
        if call.number == 2:
            both.set()
        await both.wait()
        await call.answer()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    await asyncio.gather(gateway.chat(), gateway.chat())
    for _ in range(3):
        assert (await gateway.chat()).status == 200

    assert [call.turn for call in backend.calls] == [1, 1, 2, 3, 4]


async def test_of_the_kept_connections_a_dead_one_is_passed_over_for_the_next_newest(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    answered = [asyncio.Event() for _ in range(4)]
    answered[0].set()

    async def play(call: RawCall) -> None:
        if call.number <= 3:
            await backend.called(3)
            await answered[call.number - 1].wait()
        await call.answer()
        if call.number == 4:
            call.close()

    async def ask(number: int) -> None:
        assert (await gateway.chat()).status == 200
        answered[number].set()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    first = asyncio.create_task(ask(1))
    await backend.called(1)
    second = asyncio.create_task(ask(2))
    await backend.called(2)
    await asyncio.gather(first, second, ask(3))
    assert (await gateway.chat()).status == 200
    (kept,) = gateway.parts.client._kept._conns.values()
    await until(lambda: not kept[-1][0].is_connected())
    assert (await gateway.chat()).status == 200

    connections = [call._writer for call in backend.calls]
    assert connections[3] is connections[2]
    assert connections[4] is connections[1]


# A caller's connection: how long it lives


def closed(gateway: Gateway) -> dict[str, int]:
    """How many connections the gateway has closed, by the reason."""
    text = gateway.parts.telemetry.metrics.exposition("")[0].decode()
    found = re.findall(r'gateway_connections_closed_total\{reason="(\w+)"\} (\d+)', text)
    assert len(found) == len(CLOSE_REASONS)
    return {reason: int(count) for reason, count in found if int(count)}


async def livez(wire: Wire) -> None:
    await wire.send(ALIVE)
    assert (await wire.answer()).status == 200


class Held:
    """A backend that answers when `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, call: RawCall) -> None:
        await self.go.wait()
        await call.answer()


async def test_an_idle_connection_is_closed_and_one_that_waits_for_its_answer_is_not(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(held := Held())
    gateway = await start_gateway(backend.url, gateway_keepalive_timeout=SHORT)
    async with dial(gateway.url) as idle, dial(gateway.url) as waiting:
        await livez(idle)
        await livez(waiting)
        await waiting.send(post())
        assert await idle.rest() == b""
        await asyncio.sleep(SHORT)
        held.go.set()
        assert (await waiting.answer()).status == 200
        assert await waiting.rest() == b"", "it has become idle as well"
    assert closed(gateway) == {"keepalive_timeout": 2}


async def test_a_connection_whose_answer_is_yet_to_be_taken_is_not_idle(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.answer(json.dumps({"choices": [], "x": "y" * 60_000}).encode())

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_keepalive_timeout=SHORT)
    async with dial(gateway.url, receive_buffer=4_096) as wire:
        await livez(wire)
        assert gateway.limit_send_buffers(4_096) == 1
        await wire.send(post())
        await backend.called(1)
        await until(lambda: not len(gateway.parts.in_flight))
        await asyncio.sleep(3 * SHORT)
        assert closed(gateway) == {}
        assert len((await wire.answer()).body) > 60_000
        assert await wire.rest() == b""
    assert closed(gateway) == {"keepalive_timeout": 1}


@pytest.mark.parametrize("requests", [0, 1, 2])
async def test_the_headers_of_each_request_have_a_limit_of_time_however_they_drip(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch, requests: int
) -> None:
    gateway = await start_gateway(mock, gateway_keepalive_timeout=600)
    monkeypatch.setattr(aiohttp_protocol, "HEADERS_TIMEOUT", SHORT)
    async with dial(gateway.url) as wire:
        for _ in range(requests):
            await livez(wire)
        dripping = asyncio.create_task(drip(wire, b"GET /livez HTTP/1.1\r\n" + b"x: y\r\n" * 100_000))
        assert await wire.rest() == b""
        dripping.cancel()
        await asyncio.gather(dripping, return_exceptions=True)
    assert closed(gateway) == {"headers_timeout": 1}


async def drip(wire: Wire, data: bytes) -> None:
    for place in range(0, len(data), 7):
        await wire.send(data[place : place + 7])
        await asyncio.sleep(SHORT / 10)


async def test_a_connection_that_says_nothing_is_closed(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aiohttp_protocol, "HEADERS_TIMEOUT", SHORT)
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        assert await wire.rest() == b""
    assert closed(gateway) == {"headers_timeout": 1}
    await until(lambda: not len(gateway.parts.connections))


async def test_the_limit_of_headers_is_for_nothing_else(
    start_raw: StartRaw, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = await start_raw(held := Held())
    gateway = await start_gateway(backend.url)
    monkeypatch.setattr(aiohttp_protocol, "HEADERS_TIMEOUT", SHORT)
    async with dial(gateway.url) as wire:
        for message in (post(), post()):
            held.go.clear()
            await wire.send(message[:20])
            await wire.send(message[20:-10])
            await until(lambda: len(gateway.parts.in_flight) == 1)
            await asyncio.sleep(2 * SHORT)
            await wire.send(message[-10:])
            await asyncio.sleep(2 * SHORT)
            held.go.set()
            assert (await wire.answer()).status == 200
            await asyncio.sleep(2 * SHORT)
        await livez(wire)
    assert closed(gateway) == {}


async def test_headers_that_arrive_are_not_cut_off_as_idle(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_keepalive_timeout=SHORT)
    async with dial(gateway.url) as wire:
        await livez(wire)
        await wire.send(ALIVE[:20])
        await asyncio.sleep(3 * SHORT)
        await wire.send(ALIVE[20:])
        assert (await wire.answer()).status == 200
        assert await wire.rest() == b"", "the limit of idle time is there again"
    assert closed(gateway) == {"keepalive_timeout": 1}


# A caller's connection: how many there may be


async def test_beyond_the_limit_the_idlest_connection_is_closed_for_a_new_one(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(held := Held())
    gateway = await start_gateway(backend.url, gateway_max_connections=3)
    async with dial(gateway.url) as busy, dial(gateway.url) as first, dial(gateway.url) as second:
        await busy.send(post())
        await backend.called(1)
        for wire in (first, second, first):
            await livez(wire)
        async with dial(gateway.url) as third:
            await livez(third)
            assert await second.rest() == b""
            async with dial(gateway.url) as fourth:
                await livez(fourth)
                assert await first.rest() == b""
                await livez(third)
                held.go.set()
                assert (await busy.answer()).status == 200
                assert closed(gateway) == {"made_room": 2}
                assert len(gateway.parts.connections) == 3
    await until(lambda: not len(gateway.parts.connections))


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models"])
async def test_where_no_connection_is_idle_prompts_are_refused_and_the_service_calls_answered(
    start_raw: StartRaw, start_gateway: StartGateway, path: str
) -> None:
    backend = await start_raw(held := Held())
    gateway = await start_gateway(backend.url, gateway_max_connections=1)
    async with dial(gateway.url) as busy:
        await busy.send(post())
        await backend.called(1)
        for service in ("/livez", "/readyz", "/metrics", "/health"):
            async with dial(gateway.url) as wire:
                await wire.send(f"GET {service} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
                answer = await wire.answer()
                assert (answer.status, answer.headers["connection"]) == (200, "close")
                assert await wire.rest() == b""
        async with dial(gateway.url) as wire:
            await wire.send(post(path=path, headers={"x-request-id": "mine"}))
            answer = await wire.answer()
            assert (answer.status, answer.error["code"]) == (503, "gateway_overloaded")
            assert (answer.headers["x-request-id"], answer.headers["connection"]) == ("mine", "close")
            assert int(answer.headers["retry-after"]) >= 1
            assert await wire.rest() == b""
        held.go.set()
        assert (await busy.answer()).status == 200
        async with dial(gateway.url) as wire:
            await wire.send(post())
            assert (await wire.answer()).status == 200
    assert len(backend.calls) == 2
    assert 'gateway_shed_requests_total{reason="connections"} 1.0' in await gateway.metrics()


# New ones


def test_all_that_wait_are_accepted_in_a_few_turns_of_the_event_loop() -> None:
    callers = 100

    async def turns() -> int:
        connections = Connections(1000, lambda _: None)
        runner = Runner(
            web.Application(),
            answer_unhandled=lambda *_: web.Response(),
            connections=connections,
            keepalive_timeout=75,
            write_timeout=60,
        )
        await runner.setup()
        listener = Listener(runner, connections)
        listener.start(listening_sockets("127.0.0.1", 0))
        port = int(listener.url.rpartition(":")[2])
        with ExitStack() as stack:
            for _ in range(callers):
                caller = stack.enter_context(socket.socket())
                caller.connect(("127.0.0.1", port))
            number = 0
            while len(connections) < callers:
                await asyncio.sleep(0)
                number += 1
        await listener.close()
        await runner.cleanup()
        return number

    assert uvloop.run(turns()) < callers / 10


@pytest.mark.parametrize(
    ("addresses", "listens", "error"),
    [
        (["127.0.0.1", "127.0.0.2"], ["127.0.0.1", "127.0.0.2"], None),
        (["192.0.2.1", "127.0.0.1", "127.0.0.1"], ["127.0.0.1"], None),
        (["192.0.2.1"], [], "assign"),
        (["127.0.0.1", "taken"], [], "in use"),
    ],
)
def test_the_addresses_of_a_host_are_listened_on_as_far_as_the_machine_has_them(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], listens: list[str], error: str | None
) -> None:
    def getaddrinfo(*_: object, **__: object) -> list[tuple[object, ...]]:
        ends = [taken.getsockname() if each == "taken" else (each, 0) for each in addresses]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", end) for end in ends]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with closing(socket.create_server(("127.0.0.1", 0))) as taken, ExitStack() as stack:
        if error is not None:
            with pytest.raises(OSError, match=error):
                listening_sockets("a-name", 0)
            return
        sockets = [stack.enter_context(each) for each in listening_sockets("a-name", 0)]
        assert [each.getsockname()[0] for each in sockets] == listens


async def test_with_few_descriptors_every_new_caller_is_served_and_idle_ones_give_way(mock: MockModel) -> None:
    environment = {**LOCAL, "OPEN_FILES": "256", "GATEWAY_BACKEND_URLS": mock.url}
    async with processes.running(**environment) as program, AsyncExitStack() as stack:
        await program.up()
        kept = []
        for _ in range(300):
            wire = await stack.enter_async_context(dial(program.url))
            await livez(wire)
            kept.append(wire)
        await wire.send(post())
        assert (await wire.answer()).status == 200
        await wire.send(b"GET /metrics HTTP/1.1\r\nhost: gateway\r\n\r\n")
        text = (await wire.answer()).body.decode()
        assert "gateway_open_connections 96.0" in text
        assert 'gateway_connections_closed_total{reason="made_room"} 204.0' in text
        assert await kept[203].rest() == b""
        await livez(kept[204])
        program.signal(signal.SIGTERM)
        code, _, errors = await program.end()
        assert (code, "could not be accepted" in errors) == (0, False)


async def test_a_limit_beyond_that_of_open_files_is_lowered_and_told() -> None:
    async with processes.running(**LOCAL, OPEN_FILES="256", GATEWAY_MAX_CONNECTIONS="1000") as program:
        await program.up()
        await until(
            lambda: "GATEWAY_MAX_CONNECTIONS is 1000; the limit of open files allows 192" in program.errors.read_text()
        )


async def test_callers_who_say_nothing_do_not_keep_the_service_calls_from_being_answered(mock: MockModel) -> None:
    environment = {**LOCAL, "OPEN_FILES": "256", "GATEWAY_BACKEND_URLS": mock.url}
    async with processes.running(**environment) as program, AsyncExitStack() as stack:
        await program.up()
        for _ in range(3):
            for _ in range(200):
                await stack.enter_async_context(dial(program.url))
            async with dial(program.url) as wire:
                await livez(wire)


async def test_without_a_descriptor_callers_wait_and_the_gateway_rests(start_raw: StartRaw) -> None:
    backend = await start_raw(held := Held())
    environment = {**LOCAL, "OPEN_FILES": "256", "GATEWAY_BACKEND_URLS": backend.url}
    async with processes.running(**environment) as program:
        await program.up()
        async with dial(program.url) as busy, dial(program.url) as waiting:
            await busy.send(post())
            await waiting.send(post())
            await backend.called(2)
            await until(lambda: backend.probes and backend.lists, "nothing more is opened, or closed, by itself")
            free = min(set(range(256)) - descriptors(program.pid))
            resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (free, 256))
            async with dial(program.url) as new:
                await new.send(ALIVE)
                await until(lambda: "could not be accepted: Too many open files" in program.errors.read_text())
                before, began = cpu_seconds(program.pid), monotonic()
                await asyncio.sleep(1)
                assert cpu_seconds(program.pid) - before < 0.5 * (monotonic() - began)
                resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (256, 256))
                assert (await new.answer()).status == 200
            held.go.set()
            assert (await busy.answer()).status == 200
        assert program.errors.read_text().count("could not be accepted") == 1


async def test_without_a_descriptor_an_idle_connection_gives_way(mock: MockModel) -> None:
    environment = {**LOCAL, "OPEN_FILES": "256", "GATEWAY_BACKEND_URLS": mock.url}
    async with processes.running(**environment) as program, AsyncExitStack() as stack:
        await program.up()
        highest = max(descriptors(program.pid))
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (highest + 3, 256))
        for _ in range(20):
            wire = await stack.enter_async_context(dial(program.url))
            await livez(wire)
        await until(lambda: "could not be accepted" in program.errors.read_text())


def cpu_seconds(pid: int) -> float:
    """What a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def descriptors(pid: int) -> set[int]:
    """Those that a process has open."""
    return {int(file.name) for file in Path(f"/proc/{pid}/fd").iterdir()}
