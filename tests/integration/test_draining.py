"""A stop: the listener stays open, what is under way ends well or with a typed error, and the process ends in time."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from time import monotonic
from typing import Any

import aiohttp
import pytest

from gateway.server.aiohttp_protocol import LAST_ANSWERS
from gateway.server.listener import drain
from gateway.telemetry.export_thread import LAST_EXPORT
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import Answer, ask, rest_of
from testkit.polling import PATIENCE, until
from testkit.sse import DONE, Events
from tests.integration import processes
from tests.integration.backends_raw import ANSWER, END, STREAM_HEAD, RawBackend, RawCall, StartRaw, chunk, event
from tests.integration.gateways import Gateway, StartGateway
from tests.integration.processes import Program
from tests.integration.wire import Wire, dial, post

LONG = 600.0
SHORT = 0.3
INTERPRETER = 8.0
"""Seconds a busy machine may add to the end of a process."""
ROLE, WORD, FINISH = chunk(), chunk("word "), chunk(finish="stop")
CREATED = event({"type": "response.created", "sequence_number": 0, "response": {}}, name="response.created")
DELTA = event({"type": "response.output_text.delta", "sequence_number": 1, "delta": "word"}, name="x")
ALIVE = b"GET /livez HTTP/1.1\r\nhost: gateway\r\n\r\n"
READY = b"GET /readyz HTTP/1.1\r\nhost: gateway\r\n\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: gateway\r\n\r\n"
STREAM = CHAT | {"stream": True}
RESPONSE = {"model": "demo-model", "input": "Say something.", "stream": True}


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A collector that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as silent:
        yield f"http://127.0.0.1:{silent.getsockname()[1]}"


class Gated:
    """A backend's play: it begins to answer and waits for `go` before the rest.

    Attributes:
        left: how many calls the gateway has closed before they were whole.
    """

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.left = 0

    async def __call__(self, call: RawCall) -> None:
        asked = json.loads(call.body)
        if "input" in asked:
            await call.send(STREAM_HEAD)
            await call.events(CREATED, DELTA)
        elif asked.get("stream"):
            await call.send(STREAM_HEAD)
            await call.events(ROLE, WORD)
        gone = asyncio.create_task(call.left())
        going = asyncio.create_task(self.go.wait())
        await asyncio.wait({gone, going}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        going.cancel()
        await asyncio.gather(gone, going, return_exceptions=True)
        if not self.go.is_set():
            self.left += 1
        elif asked.get("stream"):
            await call.events(FINISH, DONE)
            await call.send(END)
        else:
            await call.answer()


class Process:
    """A gateway as a process.

    Attributes:
        log: What it wrote to stderr, once it has ended.
    """

    def __init__(self, program: Program) -> None:
        self.url = program.url
        self.log = ""
        self._program = program

    def signal(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._program.signal(number)

    async def exit_code(self, seconds: float = PATIENCE) -> int:
        """Wait until it has ended by itself."""
        async with asyncio.timeout(seconds):
            code, _, self.log = await self._program.end()
        return code

    async def post(self, body: dict[str, Any], path: str = CHAT_PATH) -> Answer:
        return await ask(self.url + path, method="POST", body=body, seconds=PATIENCE)

    async def get(self, path: str) -> Answer:
        return await ask(self.url + path, seconds=PATIENCE)

    async def health(self) -> dict[str, Any]:
        document: dict[str, Any] = (await self.get("/health")).json
        return document

    async def not_ready(self) -> Answer:
        """The answer of `/readyz` once the signal has been seen."""
        async with asyncio.timeout(PATIENCE):
            while (answer := await self.get("/readyz")).status == 200:  # noqa: ASYNC110 - the answer is wanted
                await asyncio.sleep(0.01)
        return answer

    async def queued(self, requests: int) -> None:
        async def enough() -> bool:
            return bool((await self.health())["queued"] >= requests)

        await until(enough, f"{requests} requests are queued")


@asynccontextmanager
async def running(backend: RawBackend, **settings: object) -> AsyncIterator[Process]:
    """A process that serves; each request of the test opens a connection of its own."""
    own = {
        "HOST": "127.0.0.1",
        "PORT": "0",
        "GATEWAY_BACKEND_URLS": backend.url,
        "GATEWAY_SHUTDOWN_GRACE": LONG,
        **settings,
    }
    async with processes.running(**{name: str(value) for name, value in own.items()}) as program:
        await program.up()
        yield Process(program)


def assert_draining(answer: Answer) -> None:
    """A refusal of a gateway that stops: come again, elsewhere."""
    assert (answer.status, answer.error["code"]) == (503, "gateway_draining")
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert answer.error["type"] == "server_error"
    assert int(answer.headers["retry-after"]) >= 1
    assert "x-should-retry" not in answer.headers


async def is_closed(wire: Wire) -> bool:
    """Wait until the gateway has closed the connection; whether nothing came before that."""
    return await wire.rest() == b""


async def refused(wire: Wire, message: bytes) -> None:
    """A request that a stopping gateway refuses, closing a connection that its caller would have kept."""
    await wire.send(message)
    answer = await wire.answer()
    assert_draining(answer)
    assert answer.headers["connection"] == "close"
    assert await is_closed(wire)


# While it drains


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_process_that_is_told_to_stop_finishes_what_is_under_way_and_refuses_the_rest(
    start_raw: StartRaw, number: signal.Signals
) -> None:
    backend = await start_raw(gated := Gated())
    async with running(backend) as process, dial(process.url) as kept, asyncio.TaskGroup() as group:
        await kept.send(ALIVE)
        assert (await kept.answer()).status == 200
        plain = group.create_task(process.post(CHAT))
        stream = group.create_task(process.post(STREAM))
        await backend.called(2)

        process.signal(number)
        assert_draining(await process.not_ready())
        for message in (READY, MODELS, post(), post(json.dumps(STREAM).encode())):
            async with dial(process.url) as fresh:
                await refused(fresh, message)
        await refused(kept, post())
        assert (await process.get("/livez")).status == 200
        assert (await process.health())["draining"] is True
        assert len(backend.calls) == 2, "the backend hears nothing of those who come now"
        assert not plain.done()
        assert not stream.done()

        gated.go.set()
        assert await process.exit_code() == 0
        answer = await plain
        assert (answer.status, answer.body) == (200, ANSWER)
        answer = await stream
        assert (answer.status, answer.body) == (200, ROLE + WORD + FINISH + DONE)
        with pytest.raises(aiohttp.ClientConnectorError):
            await process.get("/livez")
    assert gated.left == 0


async def test_with_a_delay_nobody_is_refused_before_whoever_sends_requests_has_gone_elsewhere(
    start_raw: StartRaw,
) -> None:
    backend = await start_raw(gated := Gated())
    gated.go.set()
    async with (
        running(backend, GATEWAY_SHUTDOWN_DELAY=LONG) as process,
        dial(process.url) as kept,
        dial(process.url) as streaming,
    ):
        for wire in (kept, streaming):
            await wire.send(ALIVE)
            assert (await wire.answer()).status == 200
        process.signal()
        assert_draining(await process.not_ready())
        assert (await process.health())["draining"] is True

        stream = json.dumps(STREAM).encode()
        for wire, message, body in (
            (kept, post(), ANSWER),
            (streaming, post(stream), ROLE + WORD + FINISH + DONE),
        ):
            await wire.send(message)
            answer = await wire.answer()
            low = {name.lower(): value for name, value in answer.headers.items()}
            assert (answer.status, answer.body, low["connection"]) == (200, body, "close")
            assert await is_closed(wire)
        assert (await process.post(CHAT)).status == 200, "on a new connection, too"

        gated.go.clear()
        last = asyncio.create_task(process.post(STREAM))
        await backend.called(4)
        process.signal()  # a second signal ends the delay and the grace
        assert b"gateway_draining" in (await last).body
        assert await process.exit_code() == 0


async def test_with_a_delay_a_large_answer_says_as_well_that_its_connection_closes(start_raw: StartRaw) -> None:
    large = json.dumps({"choices": [], "x": "y" * 2_000_000}).encode()

    async def play(call: RawCall) -> None:
        await call.answer(large)

    backend = await start_raw(play)
    async with running(backend, GATEWAY_SHUTDOWN_DELAY=LONG) as process, dial(process.url) as kept:
        await kept.send(ALIVE)
        assert (await kept.answer()).status == 200
        process.signal()
        assert_draining(await process.not_ready())
        await kept.send(post())
        answer = await kept.answer()
        low = {name.lower(): value for name, value in answer.headers.items()}
        assert (answer.status, answer.body, low["connection"]) == (200, large, "close")
        process.signal()
        assert await process.exit_code() == 0


async def test_a_stream_that_ends_while_the_gateway_drains_closes_its_connection(start_raw: StartRaw) -> None:
    first, second = plays = [Gated(), Gated()]
    waiting = iter(plays)

    async def play(call: RawCall) -> None:
        await next(waiting)(call)

    backend = await start_raw(play)
    async with running(backend) as process, dial(process.url) as wire, dial(process.url) as other:
        for number, caller in enumerate((wire, other), 1):
            await caller.send(post(json.dumps(STREAM).encode()))
            await backend.called(number)
        process.signal()
        assert_draining(await process.not_ready())
        first.go.set()
        assert (await wire.answer()).body == ROLE + WORD + FINISH + DONE
        assert await is_closed(wire), "its caller's next request goes to another gateway"
        assert not second.go.is_set()
        second.go.set()
        assert (await other.answer()).body == ROLE + WORD + FINISH + DONE
        assert await process.exit_code() == 0


async def test_those_who_queue_are_refused_and_those_in_flight_are_not(start_raw: StartRaw) -> None:
    backend = await start_raw(gated := Gated())
    settings = {"GATEWAY_MAX_IN_FLIGHT": 1, "GATEWAY_QUEUE_TIMEOUT": LONG}
    async with running(backend, **settings) as process, asyncio.TaskGroup() as group:
        first = group.create_task(process.post(CHAT))
        await backend.called(1)
        async with dial(process.url) as one, dial(process.url) as two:
            queued = [
                asyncio.create_task(refused(one, post())),
                asyncio.create_task(refused(two, post(json.dumps(STREAM).encode()))),
            ]
            await process.queued(2)
            process.signal()
            await asyncio.gather(*queued)
        assert not first.done()
        gated.go.set()
        assert (await first).body == ANSWER
        assert await process.exit_code() == 0
    assert len(backend.calls) == 1


async def test_a_process_with_nothing_under_way_ends_at_once(start_raw: StartRaw) -> None:
    backend = await start_raw(Gated())
    async with running(backend) as process, dial(process.url) as idle:
        await idle.send(ALIVE)
        assert (await idle.answer()).status == 200
        process.signal()
        assert await process.exit_code() == 0, "an idle connection holds up nothing"
        assert await is_closed(idle)


async def test_a_caller_who_takes_nothing_of_his_answers_does_not_hold_up_a_stop(start_raw: StartRaw) -> None:
    async def play(call: RawCall) -> None:
        await call.answer(json.dumps({"choices": [], "x": "y" * 60_000}).encode())

    async def none_comes() -> bool:
        before = len(backend.calls)
        await asyncio.sleep(SHORT)
        return before > 0 and len(backend.calls) == before and (await process.health())["in_flight"] == 0

    backend = await start_raw(play)
    async with running(backend) as process, dial(process.url, receive_buffer=4_096) as deaf:
        await deaf.send(post() * 100)
        await until(none_comes)
        process.signal()
        assert await process.exit_code() == 0
    assert "cut off" not in process.log


async def test_a_request_whose_body_is_still_on_its_way_is_refused(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    message = post()
    async with dial(gateway.url) as wire:
        await wire.send(message[:-10])
        await until(lambda: len(gateway.parts.in_flight) == 1)
        draining = asyncio.create_task(drain(gateway.parts.admission, gateway.parts.in_flight, LONG, asyncio.Event()))
        await until(lambda: gateway.parts.admission.draining)
        await wire.send(message[-10:])
        assert_draining(await wire.answer())
        await draining
    assert mock.journal.total == 0


@pytest.mark.parametrize("stream", [False, True], ids=["unstreamed", "streamed"])
async def test_a_stop_waits_until_a_slow_caller_has_taken_the_end_of_his_answer(
    start_raw: StartRaw, start_gateway: StartGateway, *, stream: bool
) -> None:
    async def talk(call: RawCall) -> None:
        if stream:
            await call.send(STREAM_HEAD)
            await call.events(ROLE, WORD)
        await ready.wait()
        if not stream:
            await call.answer(b'{"choices": [], "text": "%s"}' % large)
            return
        await call.events(large, FINISH, DONE)
        await call.send(END)

    ready = asyncio.Event()
    large = chunk("x" * 50_000) if stream else b"x" * 50_000
    backend = await start_raw(talk)
    gateway = await start_gateway(backend.url)
    async with dial(gateway.url, receive_buffer=4_096) as wire:
        await wire.send(post(json.dumps(STREAM | {"stream": stream}).encode()))
        await backend.called(1)
        assert gateway.limit_send_buffers(4_096) == 1
        ready.set()
        (protocol,) = gateway.parts.connections._regular
        assert protocol.connection is not None
        await until(protocol.connection.get_write_buffer_size)
        draining = asyncio.create_task(drain(gateway.parts.admission, gateway.parts.in_flight, LONG, asyncio.Event()))
        await asyncio.sleep(SHORT)
        assert len(gateway.parts.in_flight) == int(stream)
        assert not draining.done(), "most of the answer is still here"
        taken = b""
        while not taken.endswith(END if stream else b'"}'):
            taken += await wire.some(1)
        await draining
    assert large in taken
    assert (DONE in taken) is stream


# At the end of the grace


async def test_what_is_left_at_the_end_of_the_grace_ends_with_a_typed_error(start_raw: StartRaw) -> None:
    grace = 1.0
    backend = await start_raw(gated := Gated())
    async with running(backend, GATEWAY_SHUTDOWN_GRACE=grace) as process, asyncio.TaskGroup() as group:
        plain = group.create_task(process.post(CHAT))
        stream = group.create_task(process.post(STREAM))
        response = group.create_task(process.post(RESPONSE, "/v1/responses"))
        await backend.called(3)

        began = monotonic()
        process.signal()
        assert await process.exit_code(grace + LAST_ANSWERS + INTERPRETER) == 0
        assert monotonic() - began >= grace

        assert_draining(await plain)
        events = Events((await stream).body)
        assert events.only_error()["code"] == "gateway_draining"
        assert events.data[:-1] == [ROLE, WORD]
        events = Events((await response).body)
        assert events.only_error()["code"] == "gateway_draining"
        assert events.data[:-1] == [CREATED, DELTA]
        last = events.documents[-1]
        assert (last["type"], last["code"], last["sequence_number"]) == ("error", "gateway_draining", 2)
    await until(lambda: gated.left == 3)
    assert len(backend.calls) == 3, "and nothing is tried again"


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_the_grace(start_raw: StartRaw, second: signal.Signals) -> None:
    backend = await start_raw(Gated())
    async with running(backend) as process, asyncio.TaskGroup() as group:
        plain = group.create_task(process.post(CHAT))
        stream = group.create_task(process.post(STREAM))
        await backend.called(2)
        process.signal()
        await process.not_ready()
        assert not plain.done()
        assert not stream.done()

        process.signal(second)
        assert await process.exit_code(LAST_ANSWERS + INTERPRETER) == 0
        assert_draining(await plain)
        assert Events((await stream).body).only_error()["code"] == "gateway_draining"


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_silent_collector_does_not_hold_up_the_end(start_raw: StartRaw, black_hole: str, protocol: str) -> None:
    backend = await start_raw(Gated())
    settings = {
        "GATEWAY_SHUTDOWN_GRACE": SHORT,
        "OTEL_EXPORTER_OTLP_ENDPOINT": black_hole,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
    }
    async with running(backend, **settings) as process, asyncio.TaskGroup() as group:
        plain = group.create_task(process.post(CHAT))
        await backend.called(1)
        process.signal()
        assert_draining(await plain)
        began = monotonic()
        assert await process.exit_code() == 0
        assert monotonic() - began < LAST_ANSWERS + LAST_EXPORT + INTERPRETER
    assert "the last spans could not be exported" in process.log, "it did wait for the collector"


async def cut_off(gateway: Gateway) -> None:
    """Drain with hardly any grace; whatever is under way gets its error, and nothing is left behind."""
    parts = gateway.parts
    await drain(parts.admission, parts.in_flight, 0.05, asyncio.Event())
    assert not len(parts.in_flight), "it did not end"
    assert (parts.admission.in_flight, parts.admission.queued, parts.byte_budget.held) == (0, 0, 0)


STREAMS = ["hang_before_headers", "hang_after_headers", "stall"]


@pytest.mark.parametrize("kind", STREAMS)
async def test_a_stream_cut_off_before_its_first_words_is_a_plain_error(
    mock: MockModel, start_gateway: StartGateway, kind: str
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": kind}])
    asked = asyncio.create_task(gateway.chat(stream=True))
    await mock.called(1)
    await cut_off(gateway)
    assert_draining(await asked)
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


@pytest.mark.parametrize("kind", STREAMS)
async def test_a_stream_held_until_it_is_whole_is_cut_off_as_a_plain_error(
    mock: MockModel, start_gateway: StartGateway, kind: str
) -> None:
    gateway = await start_gateway(mock, gateway_stream_commit="complete")
    mock.set_faults([{"kind": kind, **({"with": {"after_events": 4}} if kind == "stall" else {})}])
    asked = asyncio.create_task(gateway.chat(stream=True))
    await mock.called(1)
    await cut_off(gateway)
    assert_draining(await asked)
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_a_stream_with_heartbeats_is_cut_off_with_an_error_event(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_heartbeat=0.05)
    mock.set_faults([{"kind": "hang_before_headers"}])
    async with gateway.client.post("/v1/chat/completions", json=STREAM) as response:
        assert (await response.content.readuntil(b"\n\n")).startswith(b":")
        await cut_off(gateway)
        rest, cut = await rest_of(response)
        assert Events(rest).only_error()["code"] == "gateway_draining"
        assert cut
    assert mock.journal.total == 1


async def test_a_request_that_sleeps_before_a_retry_is_cut_off(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_retry_after_max=60)
    mock.set_faults([{"kind": "status", "with": {"status": 503, "headers": {"retry-after": "30"}}}])
    asked = asyncio.create_task(gateway.chat())
    await mock.called(1)
    await mock.settled()
    await cut_off(gateway)
    assert_draining(await asked)
    assert mock.journal.total == 1


async def test_a_request_whose_body_never_ends_is_cut_off(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(post()[:-10])
        await until(lambda: len(gateway.parts.in_flight) == 1)
        await cut_off(gateway)
        assert_draining(await wire.answer())
    assert mock.journal.total == 0


async def test_a_caller_who_does_not_read_is_cut_off_too(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    async def flood(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        while True:
            await call.events(chunk("word " * 1_000))

    gateway = await start_gateway((await start_raw(flood)).url)
    async with dial(gateway.url, receive_buffer=4_096) as wire:
        await wire.send(post(json.dumps(STREAM).encode()))
        assert (await wire.head())[0] == 200
        assert gateway.limit_send_buffers(4_096) == 1
        await cut_off(gateway)
        assert b"HTTP/1.1" not in await wire.rest(), "a second head in the middle of a stream"
    assert 'gateway_requests_total{outcome="gateway_draining"' in await gateway.metrics()


async def test_a_request_cut_off_is_no_failure_of_its_backend(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "hang_before_headers"}])
    asked = asyncio.create_task(gateway.chat())
    await mock.called(1)
    await cut_off(gateway)
    assert_draining(await asked)
    (backend,) = (await gateway.health())["downstream"]["backends"]
    assert (backend["breaker"], backend["consecutive_failures"], backend["in_flight"]) == ("closed", 0, 0)
