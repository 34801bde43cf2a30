"""Our own troubles are nobody else's failure: no descriptors, no ports, answers above our limits, a pause of ours."""

import asyncio
import errno
import gzip
import json
import os
import resource
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic
from typing import Any

import aiohttp
import pytest

from gateway.backend import aiohttp_connection
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.exposition import Exposition
from testkit.http import Answer
from testkit.polling import until
from testkit.sse import Events
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw, chunk
from tests.integration.gateways import Gateway, StartGateway, StartMock, listed, prefer
from tests.integration.processes import Program, running
from tests.integration.wire import BODY, Wire, chunks_in, dial, post

LOCAL = {"HOST": "127.0.0.1", "PORT": "0"}
STREAM = json.dumps({**CHAT, "stream": True}).encode()
UNBLAMED = {"status": "ok", "breaker": "closed", "consecutive_failures": 0, "last_error": None}
STRICT: dict[str, Any] = {
    "gateway_max_attempts": 2,
    "gateway_breaker_failures": 1,
    "gateway_outage_wait": 5,
    "gateway_backoff_initial": 0.01,
}
"""One failure opens the breaker and begins an outage that is bridged."""


def unblamed(health: dict[str, Any]) -> None:
    """Assert that `/health` knows of no failure of any backend."""
    for backend in health["downstream"]["backends"]:
        assert {name: backend[name] for name in UNBLAMED} == UNBLAMED, backend
    assert health["status"] == "ok"


def unbridged(gateway: Gateway) -> None:
    """Assert that no outage has begun."""
    assert {outage.number for replica in gateway.parts.pool.replicas for outage in replica.outages} == {0}


# No connection: descriptors, ports, buffers


class Sockets:
    """The sockets of new connections: `error` is what making one fails with; None: it works."""

    def __init__(self) -> None:
        self.error: int | None = None
        self.wanted = 0

    def make(self, **options: Any) -> socket.socket:  # noqa: ANN401
        self.wanted += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        return socket.socket(**options)


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Sockets:
    made = Sockets()
    monkeypatch.setattr(aiohttp_connection, "_Socket", made.make)
    return made


SHORTAGES = {
    errno.EMFILE: "descriptors",
    errno.ENFILE: "descriptors",
    errno.EADDRNOTAVAIL: "ports",
    errno.ENOBUFS: "buffers",
    errno.ENOMEM: "buffers",
}


def no_connection(answer: Answer) -> None:
    """Assert that it says that no attempt could be made, in our words."""
    assert (answer.status, answer.own_error["code"]) == (503, "gateway_overloaded")
    assert answer.own_error["message"].startswith("The gateway")
    assert not any(os.strerror(number) in answer.own_error["message"] for number in SHORTAGES)
    assert (answer.headers["x-gateway-attempts"], answer.headers["retry-after"]) == ("0", "1")
    assert not {"x-should-retry", "x-gateway-backend"} & answer.headers.keys()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("number", SHORTAGES, ids=errno.errorcode.get)
async def test_without_a_socket_no_attempt_is_made_and_no_backend_is_blamed(
    mock: MockModel, start_mock: StartMock, start_gateway: StartGateway, sockets: Sockets, number: int, *, stream: bool
) -> None:
    other = await start_mock()
    gateway = await start_gateway(mock, other, **STRICT, gateway_probe_interval=0.1)
    await until(lambda: all(replica.probe is not None for replica in gateway.parts.pool.replicas), "first probes")
    sockets.error = number
    before = sockets.wanted
    answers = [await gateway.chat(stream=stream) for _ in range(3)]
    for answer in answers:
        no_connection(answer)
    wanted = sockets.wanted
    await until(lambda: sockets.wanted >= wanted + 3, "further probes")
    unblamed(await gateway.health())
    unbridged(gateway)
    assert all(replica.probe is not None and replica.probe.ok for replica in gateway.parts.pool.replicas)
    found = Exposition.parse(await gateway.metrics())
    assert found.by("gateway_shed_requests_total", "reason") == {SHORTAGES[number]: 3}
    assert found.by("gateway_attempts_total", "outcome") == {}
    assert wanted - before >= 3
    assert mock.journal.total + other.journal.total == 0
    sockets.error = None
    assert (await gateway.chat(stream=stream)).status == 200
    assert sum(replica.in_flight for replica in gateway.parts.pool.replicas) == 0


async def test_a_shortage_is_not_tried_again_at_other_replicas(
    start_mock: StartMock, start_gateway: StartGateway, sockets: Sockets
) -> None:
    gateway = await start_gateway(*[await start_mock() for _ in range(4)], gateway_probe_path="")
    await listed(gateway)
    sockets.wanted, sockets.error = 0, errno.EMFILE
    no_connection(await gateway.chat())
    assert sockets.wanted == 1


async def test_after_an_attempt_a_shortage_ends_the_request(
    start_mock: StartMock, start_gateway: StartGateway, sockets: Sockets
) -> None:
    """The attempt that was made counts, the one that could not be made does not."""
    silent, other = await start_mock(), await start_mock()
    silent.set_faults([{"kind": "hang_before_headers"}])
    gateway = await start_gateway(silent, other, gateway_answer_timeout=0.3, gateway_probe_path="")
    prefer(gateway, "backend-1")
    asking = asyncio.create_task(gateway.chat())
    await silent.called(1)
    sockets.error = errno.EADDRNOTAVAIL
    answer = await asking
    assert (answer.status, answer.own_error["code"]) == (503, "gateway_overloaded")
    assert (answer.outcomes, answer.headers["x-should-retry"]) == (["backend-1 answer_timeout"], "false")
    backends = (await gateway.health())["downstream"]["backends"]
    assert [backend["consecutive_failures"] for backend in backends] == [1, 0]
    assert other.journal.total == 0


async def test_after_a_heartbeat_a_shortage_is_an_error_event(
    start_mock: StartMock, start_gateway: StartGateway, sockets: Sockets
) -> None:
    silent, other = await start_mock(), await start_mock()
    silent.set_faults([{"kind": "hang_before_headers"}])
    gateway = await start_gateway(
        silent, other, gateway_first_token_timeout=0.5, gateway_heartbeat=0.05, gateway_probe_path=""
    )
    prefer(gateway, "backend-1")
    async with dial(gateway.url) as wire:
        await wire.send(post(STREAM))
        await silent.called(1)
        sockets.error = errno.EMFILE
        status, _ = await wire.head()
        body, proper = chunks_in(await wire.rest())
    assert (status, proper) == (200, False)
    assert Events(body).comments
    assert Events(body).only_error()["code"] == "gateway_overloaded"
    assert (await gateway.health())["downstream"]["backends"][1]["consecutive_failures"] == 0


async def test_who_waits_for_the_end_of_an_outage_finds_no_other_one_in_a_shortage(
    mock: MockModel, start_gateway: StartGateway, sockets: Sockets
) -> None:
    gateway = await start_gateway(mock, **STRICT, gateway_probe_path="")
    mock.set_faults([{"kind": "status", "with": {"status": 503}, "times": 1}])
    (replica,) = gateway.parts.pool.replicas
    asking = asyncio.create_task(gateway.chat())
    await until(lambda: replica.outages[0].is_bridged)
    sockets.error = errno.EMFILE
    answer = await asking
    assert (answer.status, answer.own_error["code"]) == (503, "gateway_overloaded")
    assert replica.breaker.consecutive_failures == 1
    sockets.error = None
    assert (await gateway.chat()).status == 200
    assert replica.breaker.state.value == "closed"


async def test_with_several_addresses_one_shortage_is_enough(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name stands for two addresses: at one of them nothing listens, for the other there is no descriptor."""
    port = int(mock.url.rpartition(":")[2])
    gateway = await start_gateway(f"http://model.test:{port}", **STRICT, gateway_probe_path="")

    async def resolve(_self: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, Any]]:
        each = {"hostname": host, "port": port, "proto": 0, "flags": 0}
        return [
            {**each, "host": "::1", "family": socket.AF_INET6},
            {**each, "host": "127.0.0.1", "family": socket.AF_INET},
        ]

    monkeypatch.setattr(aiohttp_connection.Names, "resolve", resolve)

    def make(**options: Any) -> socket.socket:  # noqa: ANN401
        if options["family"] == socket.AF_INET:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return socket.socket(**options)

    monkeypatch.setattr(aiohttp_connection, "_Socket", make)
    no_connection(await gateway.chat())
    unblamed(await gateway.health())


IP_LOCAL_PORT_RANGE = 51
"""Linux 6.3: the local ports that a socket may take."""


class OnePort(aiohttp_connection._Socket):
    """A socket that may take one local port only."""

    port = 0

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **options)
        self.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, struct.pack("I", self.port << 16 | self.port))


async def test_used_up_local_ports_are_told(
    slow_mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the system itself: while a stream holds the one port there is, there is none for a second call."""
    gateway = await start_gateway(slow_mock, **STRICT, gateway_probe_path="")
    await listed(gateway)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(OnePort, "port", free.getsockname()[1])
    try:
        OnePort().close()
    except OSError:
        pytest.skip("this kernel cannot limit the local ports of a socket")
    monkeypatch.setattr(aiohttp_connection, "_Socket", OnePort)
    streaming = asyncio.create_task(gateway.chat(stream=True))
    await slow_mock.called(1)
    no_connection(await gateway.chat())
    found = Exposition.parse(await gateway.metrics())
    assert found.by("gateway_shed_requests_total", "reason") == {"ports": 1}
    assert (await streaming).status == 200
    unblamed(await gateway.health())


async def lowest_unused(pid: int) -> int:
    """The number that the next descriptor of a process gets while it probes nobody."""
    lowest = []
    for _ in range(30):
        used = {int(each.name) for each in os.scandir(f"/proc/{pid}/fd")}
        lowest.append(next(number for number in range(len(used) + 1) if number not in used))
        await asyncio.sleep(0.02)
    return min(lowest)


async def get(wire: Wire, path: str) -> Answer:
    await wire.send(f"GET {path} HTTP/1.1\r\nhost: gateway\r\n\r\n".encode())
    return await wire.answer()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_gateway_without_descriptors_blames_nobody(mock: MockModel, host: str) -> None:
    """With a name, the resolver finds no descriptor either."""
    url = mock.url.replace("127.0.0.1", host)
    environment = {
        **LOCAL,
        "GATEWAY_BACKEND_URLS": url,
        "GATEWAY_BREAKER_FAILURES": "1",
        "GATEWAY_PROBE_INTERVAL": "0.1",
        "GATEWAY_CONNECT_TIMEOUT": "20",
    }
    async with running(**environment) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire:
            assert (await get(wire, "/livez")).status == 200
            soft, hard = resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (await lowest_unused(gateway.pid), hard))
            for body in (BODY, STREAM):
                await wire.send(post(body))
                no_connection(await wire.answer())
            await until(lambda: "no probe of backend-1" in gateway.errors.read_text(), "a probe that could not be made")
            await asyncio.sleep(0.5)
            assert gateway.errors.read_text().count("no probe of backend-1") == 1, "it is told once"
            unblamed((await get(wire, "/health")).json)
            found = Exposition.parse((await get(wire, "/metrics")).body.decode())
            assert found.by("gateway_shed_requests_total", "reason") == {"descriptors": 2}
            assert mock.journal.total == 0
            resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (soft, hard))
            ended = monotonic()
            await until(lambda: is_probed_well(wire, ended), "a good probe: one before may have found no name")
            await wire.send(post())
            assert (await wire.answer()).status == 200
            unblamed((await get(wire, "/health")).json)


async def is_probed_well(wire: Wire, since: float) -> bool:
    """Whether a probe of the only backend has ended well since an instant."""
    seconds = monotonic() - since
    (backend,) = (await get(wire, "/health")).json["downstream"]["backends"]
    return bool(backend["probe"]["ok"] and backend["probe"]["seconds_ago"] < seconds)


# Answers above our limits

LIMIT = 20_000
WORD = chunk("word")
LONG_EVENT = chunk("x" * LIMIT)
LAST = chunk(finish="stop") + b"data: [DONE]\n\n"


async def large(call: RawCall) -> None:
    await call.answer(b'{"choices": [], "pad": "%s"}' % (b"x" * LIMIT))


async def large_in_pieces(call: RawCall) -> None:
    await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n")
    await call.events(b'{"choices": [], "pad": "')
    for _ in range(LIMIT // 1000 + 1):
        await call.events(b"x" * 1000)
    await call.left()


async def large_when_decoded(call: RawCall) -> None:
    body = gzip.compress(b'{"choices": [], "pad": "%s"}' % (b"x" * LIMIT))
    await call.answer(body, headers="content-encoding: gzip\r\n")


async def large_error(call: RawCall) -> None:
    await call.answer(b'{"error": {"message": "%s"}}' % (b"x" * LIMIT), status="500 Oh")


async def long_event(call: RawCall) -> None:
    await call.send(STREAM_HEAD)
    await call.events(LONG_EVENT, LAST)
    await call.send(END)


async def long_event_after_a_word(call: RawCall) -> None:
    await call.send(STREAM_HEAD)
    await call.events(WORD)
    await asyncio.sleep(0.1)
    await call.events(LONG_EVENT, LAST)
    await call.send(END)


async def many_words(call: RawCall) -> None:
    await call.send(STREAM_HEAD)
    for _ in range(2 * LIMIT // len(WORD) + 10):
        await call.events(WORD)
    await call.left()


async def no_end_of_comments(call: RawCall) -> None:
    await call.send(STREAM_HEAD)
    for _ in range(2 * LIMIT // 1000):
        await call.events(b":" + b" " * 996 + b"\n\n")
    await call.left()


async def large_in_place_of_a_stream(call: RawCall) -> None:
    await large(call)


TOO_LARGE = {
    "whole": (large, False, "first_token", 1),
    "in pieces": (large_in_pieces, False, "first_token", 1),
    "decoded": (large_when_decoded, False, "first_token", 1),
    "error": (large_error, False, "first_token", 1),
    "event": (long_event, True, "first_token", 2),
    "comments": (no_end_of_comments, True, "first_token", 1),
    "complete": (many_words, True, "complete", 1),
    "event, complete": (long_event_after_a_word, True, "complete", 2),
    "no stream": (large_in_place_of_a_stream, True, "first_token", 1),
}
"""What is sent, whether a stream is asked for, when it is passed on, and how often it is asked for: an answer that is
too large would be as large again, an event or headers may have had no end."""


@pytest.mark.parametrize(("play", "stream", "commit", "calls"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
async def test_an_answer_above_our_limit_is_no_failure_of_its_backend(
    start_raw: StartRaw,
    start_gateway: StartGateway,
    play: Callable[[RawCall], Awaitable[None]],
    commit: str,
    calls: int,
    *,
    stream: bool,
) -> None:
    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, **STRICT, gateway_max_answer_bytes=LIMIT)
    answer = await gateway.chat(stream=stream, headers={"x-gateway-commit": commit})
    assert (answer.status, answer.own_error["code"]) == (502, "backend_invalid_response")
    assert (len(backend.calls), answer.headers["x-should-retry"]) == (calls, "false")
    unblamed(await gateway.health())
    unbridged(gateway)


async def test_an_event_above_our_limit_after_commit_is_no_failure_of_its_backend(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(long_event_after_a_word)
    gateway = await start_gateway(backend.url, **STRICT, gateway_max_answer_bytes=LIMIT)
    answer = await gateway.chat(stream=True)
    assert (answer.status, answer.cut) == (200, True)
    assert Events(answer.body).only_error()["code"] == "backend_invalid_response"
    unblamed(await gateway.health())


async def test_an_answer_that_our_byte_budget_refuses_is_no_failure_of_its_backend(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    backend = await start_raw(large)
    gateway = await start_gateway(backend.url, **STRICT, gateway_max_buffered_bytes=LIMIT)
    answer = await gateway.chat()
    assert (answer.status, answer.own_error["code"]) == (503, "gateway_overloaded")
    unblamed(await gateway.health())
    unbridged(gateway)


async def test_a_trial_with_an_answer_above_our_limit_leaves_the_breaker_as_it_was(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        if call.number == 1:
            await call.answer(b"{}", status="502 Oh")
        elif call.number == 2:
            await large(call)
        else:
            await call.answer()

    backend = await start_raw(play)
    gateway = await start_gateway(
        backend.url,
        gateway_breaker_failures=1,
        gateway_breaker_open_seconds=0.1,
        gateway_max_attempts=1,
        gateway_max_answer_bytes=LIMIT,
    )
    breaker = gateway.parts.pool.replicas[0].breaker
    await gateway.chat()
    await until(lambda: breaker.state.value == "half_open")
    assert (await gateway.chat()).status == 502
    assert (breaker.state.value, breaker.admits) == ("half_open", True), "neither closed nor opened anew"
    assert (await gateway.chat()).status == 200
    assert breaker.state.value == "closed"


HEADERS = {
    "one": f"x-pad: {'x' * 70_000}\r\n",
    "many": "".join(f"x-{number}: {'x' * 7_000}\r\n" for number in range(11)),
    "lines": "".join(f"x-{number}: 1\r\n" for number in range(1_100)),
}


@pytest.mark.parametrize("headers", HEADERS.values(), ids=HEADERS.keys())
async def test_headers_above_our_limit_are_asked_of_another_replica_and_blamed_on_none(
    start_raw: StartRaw, mock: MockModel, start_gateway: StartGateway, headers: str
) -> None:
    backend = await start_raw(lambda call: call.answer(headers=headers))
    gateway = await start_gateway(backend.url, **STRICT)
    answer = await gateway.chat()
    assert (answer.status, answer.own_error["code"]) == (502, "backend_invalid_response")
    assert answer.own_error["message"] == "The headers of the backend's answer are larger than 64 KiB."
    assert len(backend.calls) == 2
    unblamed(await gateway.health())
    unbridged(gateway)

    both = await start_gateway(backend.url, mock, **STRICT)
    prefer(both, "backend-1")
    answers = [await both.chat() for _ in range(5)]
    assert [answer.status for answer in answers] == [200] * 5
    assert [answer.attempts for answer in answers] == [2, 1, 1, 1, 1], "it is asked after all others for a while"
    unblamed(await both.health())


# A gateway that was itself kept from running

TIMER = 2.0
"""Seconds of each timer; a backend that is well keeps within a tenth of them."""
PAUSE = 2 * TIMER
WORDS = 50
EVERY = 0.1
IMPATIENT = {
    **LOCAL,
    **{
        f"GATEWAY_{timer}_TIMEOUT": f"{TIMER}"
        for timer in ("CONNECT", "FIRST_TOKEN", "ANSWER", "IDLE", "BODY", "QUEUE", "PROBE")
    },
    "GATEWAY_PROBE_INTERVAL": "0.1",
    "GATEWAY_BREAKER_FAILURES": "1",
    "GATEWAY_OUTAGE_WAIT": "0",
    "GATEWAY_MAX_ATTEMPTS": "1",
}


async def in_time(call: RawCall) -> None:
    """Begin after a moment; words at short intervals if it is a stream."""
    await asyncio.sleep(TIMER / 10)
    if b'"stream": true' not in call.body:
        await call.answer()
        return
    await call.send(STREAM_HEAD)
    for _ in range(WORDS):
        await call.events(WORD)
        await asyncio.sleep(EVERY)
    await call.events(LAST)
    await call.send(END)


async def pause(*programs: Program) -> None:
    """Stop processes, and let them go on one after the other."""
    for program in programs:
        program.freeze()
    await asyncio.sleep(PAUSE)
    for program in programs:
        program.thaw()
        await asyncio.sleep(0.2)


async def ask(url: str, **changes: Any) -> Answer:  # noqa: ANN401
    """One chat prompt over a connection of its own."""
    headers = changes.pop("headers", {})
    posting = aiohttp.request("POST", url + CHAT_PATH, json=CHAT | changes, headers=headers)
    async with posting as response:
        return await Answer.of(response)


async def all_well(wire: Wire) -> None:
    """Assert that no attempt has failed, and nobody is blamed."""
    unblamed((await get(wire, "/health")).json)
    found = Exposition.parse((await get(wire, "/metrics")).body.decode())
    assert found.by("gateway_attempts_total", "outcome").keys() <= {"ok"}
    assert found.by("gateway_breaker_transitions_total", "to") == {}


def whole_stream(answer: Answer) -> bool:
    """Whether it is a complete stream of all words."""
    events = Events(answer.body)
    return (answer.status, events.text, events.done, events.errors) == (200, "word" * WORDS, 1, [])


async def test_a_pause_of_the_gateway_fails_nobody_whose_bytes_have_come(start_raw: StartRaw) -> None:
    """In each phase at once: before the headers, between two events, in the caller's body."""
    backend = await start_raw(in_time)
    async with running(**IMPATIENT, GATEWAY_BACKEND_URLS=backend.url) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire, dial(gateway.url) as slow:
            assert (await get(wire, "/livez")).status == 200
            streams = [asyncio.create_task(ask(gateway.url, stream=True)) for _ in range(10)]
            await backend.called(10)
            await asyncio.sleep(TIMER / 5)
            streams += [asyncio.create_task(ask(gateway.url, stream=True)) for _ in range(10)]
            wholes = [asyncio.create_task(ask(gateway.url)) for _ in range(10)]
            await slow.send(post()[:-10])
            await backend.called(30)
            gateway.freeze()
            await asyncio.sleep(TIMER / 2)
            await slow.send(post()[-10:])
            await asyncio.sleep(PAUSE - TIMER / 2)
            gateway.thaw()
            assert [answer.status for answer in await asyncio.gather(*wholes)] == [200] * 10
            assert [whole_stream(answer) for answer in await asyncio.gather(*streams)] == [True] * 20
            assert (await slow.answer()).status == 200
            await all_well(wire)
            found = Exposition.parse((await get(wire, "/metrics")).body.decode())
            assert (found.only("gateway_event_loop_lag_seconds") or 0) > PAUSE / 2


async def test_a_pause_of_gateway_and_backend_counts_against_nobody() -> None:
    """Nothing has come meanwhile: the gateway does not count the time in which it did not run."""
    model_settings = {"PORT": "0", "CONTROL_PORT": "0", "MOCK_TOKENS": f"{WORDS}", "MOCK_TOKEN_INTERVAL": f"{EVERY}"}
    async with running("mock_model", **model_settings) as model:
        await model.up()
        async with running(**IMPATIENT, GATEWAY_BACKEND_URLS=model.url) as gateway:
            await gateway.up()
            async with dial(gateway.url) as wire:
                assert (await get(wire, "/livez")).status == 200
                streams = [asyncio.create_task(ask(gateway.url, stream=True)) for _ in range(10)]
                await asyncio.sleep(TIMER / 2)
                await pause(gateway, model)
                for answer in await asyncio.gather(*streams):
                    events = Events(answer.body)
                    assert (answer.status, events.done, events.errors) == (200, 1, [])
                await all_well(wire)


async def test_a_pause_of_the_gateway_fails_no_probe(mock: MockModel) -> None:
    mock.set_faults([{"kind": "latency", "with": {"delay": TIMER / 5}, "match": {"path": "/health"}}])
    async with running(**IMPATIENT, GATEWAY_BACKEND_URLS=mock.url) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire:
            await until(lambda: probed(wire), "first probe")
            await asyncio.sleep(TIMER / 4)
            await pause(gateway)
            for _ in range(20):
                unblamed((await get(wire, "/health")).json)
                await asyncio.sleep(0.02)


async def probed(wire: Wire) -> bool:
    """Whether the first probe has ended."""
    return (await get(wire, "/readyz")).status == 200


@pytest.mark.parametrize("queue", ["of the gateway", "of a backend"])
async def test_a_pause_of_the_gateway_sends_nobody_out_of_a_queue(
    start_raw: StartRaw, tmp_path: Path, queue: str
) -> None:
    all_inside = asyncio.Event()

    async def play(call: RawCall) -> None:
        await all_inside.wait()
        await in_time(call)

    backend = await start_raw(play)
    settings = {"GATEWAY_BACKEND_URLS": backend.url, "GATEWAY_MAX_IN_FLIGHT": "4"}
    if queue == "of a backend":
        file = tmp_path / "gateway.yaml"
        file.write_text(
            f"backends: {{full: {{url: '{backend.url}', max_in_flight: 2}}}}\n"
            "routes: [{model: '*', targets: [{backend: full}]}]\n"
        )
        settings = {"GATEWAY_CONFIG": str(file)}
    async with running(**IMPATIENT, **settings) as gateway:
        await gateway.up()
        async with dial(gateway.url) as wire:
            asking = [asyncio.create_task(ask(gateway.url)) for _ in range(6)]
            await until(lambda: inside(wire, 6), "two are under way and four wait")
            await backend.called(2)
            all_inside.set()
            await pause(gateway)
            assert [answer.status for answer in await asyncio.gather(*asking)] == [200] * 6
            await all_well(wire)


async def inside(wire: Wire, number: int) -> bool:
    """Whether so many requests are under way or wait."""
    health = (await get(wire, "/health")).json
    return bool(health["in_flight"] + health["queued"] == number)


async def test_a_pause_beyond_the_deadline_ends_what_has_not_come(start_raw: StartRaw) -> None:
    """What is complete in the sockets is taken all the same."""

    async def play(call: RawCall) -> None:
        if call.number == 1:
            await in_time(call)
        await call.left()

    backend = await start_raw(play)
    async with running(**IMPATIENT, GATEWAY_BACKEND_URLS=backend.url) as gateway:
        await gateway.up()
        deadline = {"x-request-timeout": f"{TIMER * 0.9}"}
        answered = asyncio.create_task(ask(gateway.url, headers=deadline))
        await backend.called(1)
        late = asyncio.create_task(ask(gateway.url, headers=deadline))
        await backend.called(2)
        await pause(gateway)
        assert (await answered).status == 200
        assert ((await late).status, (await late).own_error["code"]) == (504, "deadline_exceeded")
