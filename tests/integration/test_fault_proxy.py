"""The proxy before a model server: it changes nothing, until a fault is put or the network fails."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.fault_proxy import KINDS, FaultProxy, Network
from testkit.http import Answer, answers, ask
from testkit.ports import LOOPBACK, free_port
from testkit.sse import Events
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import StartGateway, StartMock, patient
from tests.integration.wire import chunked, dial, post

STREAM = json.dumps(CHAT | {"stream": True}).encode()
StartProxy = Callable[[str], Awaitable[FaultProxy]]


@pytest.fixture
async def start_proxy() -> AsyncIterator[StartProxy]:
    """Start a proxy before a server's url."""
    async with AsyncExitStack() as stack:

        async def start(url: str) -> FaultProxy:
            port = int(url.rpartition(":")[2])
            return await stack.enter_async_context(FaultProxy((LOOPBACK, port), control_port=free_port()))

        yield start


@pytest.fixture
async def proxy(mock: MockModel, start_proxy: StartProxy) -> FaultProxy:
    """Before the mock model."""
    return await start_proxy(mock.url)


async def chat(server: MockModel | FaultProxy, **fields: object) -> Answer:
    return await ask(server.url + CHAT_PATH, method="POST", body=CHAT | fields)


async def control(proxy: FaultProxy, method: str, *faults: dict[str, Any], **headers: str) -> Answer:
    url = f"http://{LOOPBACK}:{proxy.control_port}/faults"
    return await ask(url, method=method, body=list(faults) if method == "PUT" else None, headers=headers)


def fault(kind: str, times: int = 1, **parameters: object) -> dict[str, Any]:
    return {"kind": kind, "with": parameters, "times": times}


async def broken(proxy: FaultProxy) -> bool:
    """Whether a call is broken before any answer; on a connection of its own, so that nobody repeats it."""
    async with dial(proxy.url) as wire:
        await wire.send(post())
        return await wire.rest_and_reset() == (b"", True)


@pytest.mark.parametrize("stream", [False, True])
async def test_without_faults_the_answer_is_the_servers(
    mock: MockModel, start_proxy: StartProxy, *, stream: bool
) -> None:
    proxy = await start_proxy(mock.url)
    direct = await chat(mock, stream=stream)
    mock.faults.clear()  # counts calls from 0 again, and so gives the same answer

    passed = await chat(proxy, stream=stream)

    assert (passed.status, passed.body, passed.cut) == (200, direct.body, False)
    different = {"date", "openai-processing-ms"}
    assert {name: passed.headers[name] for name in direct.headers if name not in different} == {
        name: value for name, value in direct.headers.items() if name not in different
    }


async def test_a_connection_is_kept_for_further_calls(proxy: FaultProxy, mock: MockModel) -> None:
    async with dial(proxy.url) as wire:
        for _ in range(3):
            await wire.send(post(STREAM))
            assert Events((await wire.answer()).body).done == 1
            await wire.send(post())
            assert (await wire.answer()).status == 200

    assert mock.journal.total == 6


@pytest.mark.parametrize(
    "faulty",
    [
        fault("cut", after_events=3, how="end"),
        fault("cut", after_events=3, how="reset"),
        fault("cut", after_events=0, how="end"),
        fault("cut", how="reset"),
        fault("reset"),
        fault("refuse", seconds=0),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_fault_looks_as_it_does_at_the_mock_model(
    start_mock: StartMock, start_proxy: StartProxy, faulty: dict[str, Any], *, stream: bool
) -> None:
    mock, behind = await start_mock(), await start_mock()
    proxy = await start_proxy(behind.url)
    mock.set_faults([faulty])
    assert (await control(proxy, "PUT", faulty)).status == 200

    assert await seen(proxy, stream=stream) == await seen(mock, stream=stream)


async def seen(server: MockModel | FaultProxy, *, stream: bool) -> tuple[str, bytes]:
    """How a call ends, and what comes of the answer's body."""
    body = b""
    try:
        async with (
            aiohttp.ClientSession() as session,
            session.post(server.url + CHAT_PATH, json=CHAT | {"stream": stream}) as response,
        ):
            async for piece in response.content.iter_any():
                body += piece
    except aiohttp.ClientPayloadError:
        return "cut", body
    except aiohttp.ClientConnectionError:
        return "broken", body
    return "end", body


@pytest.mark.parametrize(("stream", "how"), [(False, "end"), (False, "reset"), (True, "end"), (True, "reset")])
async def test_a_cut_can_come_after_so_many_bytes(
    mock: MockModel, proxy: FaultProxy, *, stream: bool, how: str
) -> None:
    whole = (await chat(mock, stream=stream)).body
    mock.faults.clear()
    await control(proxy, "PUT", fault("cut", after_bytes=100, how=how))

    answer = await chat(proxy, stream=stream)

    assert (answer.body, answer.cut) == (whole[:100], how == "reset")


async def test_an_answer_that_is_too_short_for_its_fault_is_whole(proxy: FaultProxy) -> None:
    await control(proxy, "PUT", fault("cut", after_events=1000), fault("cut", after_bytes=1 << 20))

    streamed, whole = await chat(proxy, stream=True), await chat(proxy)

    assert Events(streamed.body).done == 1
    assert (whole.json["object"], whole.cut) == ("chat.completion", False)
    assert [line["used"] for line in (await control(proxy, "GET")).json] == [1, 1]


@pytest.mark.parametrize(("stream", "after"), [(False, 2), (True, 2), (True, 0)])
async def test_a_stall_is_silence_after_the_beginning(
    mock: MockModel, proxy: FaultProxy, *, stream: bool, after: int
) -> None:
    whole = (await chat(mock, stream=stream)).body
    mock.faults.clear()
    expected = b"".join(Events(whole).all[:after]) if stream else whole[: len(whole) // 2]
    await control(proxy, "PUT", fault("stall", after_events=after))

    async with (
        aiohttp.ClientSession() as session,
        session.post(proxy.url + CHAT_PATH, json=CHAT | {"stream": stream}) as response,
    ):
        assert await response.content.readexactly(len(expected)) == expected
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(response.content.readany(), 0.2)


async def test_a_caller_who_leaves_a_stalled_stream_leaves_the_server_too(proxy: FaultProxy, mock: MockModel) -> None:
    mock.set_faults([{"kind": "hang_after_headers"}])
    await control(proxy, "PUT", fault("stall", after_events=0))
    async with dial(proxy.url) as wire:
        await wire.send(post(STREAM))
        assert (await wire.head())[0] == 200

    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]


async def test_a_call_that_is_late_is_answered(proxy: FaultProxy, mock: MockModel) -> None:
    await control(proxy, "PUT", fault("latency", delay=0.2))
    answer = await chat(proxy)

    assert (answer.status, mock.journal.total) == (200, 1)
    assert answer.seconds >= 0.2


async def test_a_fault_is_for_the_calls_that_match_and_as_often_as_it_says(proxy: FaultProxy, mock: MockModel) -> None:
    await control(proxy, "PUT", {"kind": "reset", "times": 2, "match": {"stream": True, "model": "small"}})

    assert (await chat(proxy)).status == (await chat(proxy, stream=True)).status == 200
    for _ in range(2):
        with pytest.raises(aiohttp.ClientConnectionError):
            await chat(proxy, stream=True, model="small")
    assert (await chat(proxy, stream=True, model="small")).status == 200
    assert mock.journal.total == 3, "a call that is broken before its answer does not reach the server"


async def test_a_probe_is_spared_unless_the_fault_names_its_path(proxy: FaultProxy) -> None:
    await control(proxy, "PUT", {"kind": "reset"})
    assert await answers(f"{proxy.url}/health")
    await control(proxy, "PUT", {"kind": "reset", "match": {"path": "/health"}})
    assert not await answers(f"{proxy.url}/health")
    assert (await chat(proxy)).status == 200


async def test_the_script_is_shown_and_removed(proxy: FaultProxy) -> None:
    put = await control(proxy, "PUT", fault("reset", times=2))
    assert put.json == [{"kind": "reset", "times": 2, "used": 0}]
    assert await broken(proxy)
    assert (await control(proxy, "GET")).json == [{"kind": "reset", "times": 2, "used": 1}]
    assert (await control(proxy, "DELETE")).status == 204
    assert (await control(proxy, "GET")).json == []
    assert (await chat(proxy)).status == 200


@pytest.mark.parametrize(
    ("faulty", "param", "words"),
    [
        ({"kind": "crash"}, "[0].kind", f"kind must be one of {', '.join(KINDS)}"),
        (fault("cut", after_events=1, after_bytes=1), "[0].with.after_bytes", "not both"),
        (fault("cut", where="inside_event"), "[0].with.where", "unknown field"),
        (fault("stall", after_events=-1), "[0].with.after_events", "expected `int` >= 0"),
    ],
)
async def test_a_fault_that_there_is_not_is_told(
    proxy: FaultProxy, faulty: dict[str, Any], param: str, words: str
) -> None:
    answer = await control(proxy, "PUT", faulty)

    assert (answer.status, answer.error["code"], answer.error["param"]) == (400, "invalid_faults", param)
    assert words in answer.error["message"]


@pytest.mark.parametrize("headers", [{"host": "rebound.example"}, {"origin": "http://page.example"}], ids=str)
async def test_no_web_page_can_put_faults(proxy: FaultProxy, headers: dict[str, str]) -> None:
    assert (await control(proxy, "PUT", fault("reset"), **headers)).status == 403
    assert (await control(proxy, "GET")).json == []


async def test_while_it_refuses_idle_connections_close_and_calls_under_way_go_on(
    start_mock: StartMock, start_proxy: StartProxy
) -> None:
    mock = await start_mock(mock_ttft=0.5)
    proxy = await start_proxy(mock.url)
    async with dial(proxy.url) as idle, dial(proxy.url) as busy:
        await idle.send(post())
        await idle.answer()
        await busy.send(post(STREAM))
        await mock.called(2)
        await control(proxy, "PUT", fault("refuse", seconds=60))
        assert await broken(proxy)
        with pytest.raises(aiohttp.ClientConnectorError):
            await chat(proxy)
        assert await idle.rest() == b""
        assert Events((await busy.answer()).body).done == 1
    await proxy.be(Network.GOOD)
    assert (await chat(proxy)).status == 200


async def test_what_is_not_http_goes_on_as_it_is(start_proxy: StartProxy) -> None:
    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    data = b"\x16\x03\x01 not HTTP\r\n\r\n"
    server = await asyncio.start_server(echo, LOOPBACK, 0)
    async with server:
        proxy = await start_proxy(f"http://{LOOPBACK}:{server.sockets[0].getsockname()[1]}")
        async with dial(proxy.url) as wire:
            await wire.send(data)
            assert await wire.some(len(data)) == data


async def test_a_request_in_chunks_arrives_whole(proxy: FaultProxy, mock: MockModel) -> None:
    await control(proxy, "PUT", {"kind": "reset", "match": {"stream": False}})
    async with dial(proxy.url) as wire:
        await wire.send(chunked(STREAM[:5], STREAM[5:]))
        assert Events((await wire.answer()).body).done == 1

    assert mock.journal.total == 1


async def test_a_server_that_breaks_off_is_not_mended(start_raw: StartRaw, start_proxy: StartProxy) -> None:
    async def play(call: RawCall) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await call.events(b"data: {}\n\n")
        call.close()

    backend = await start_raw(play)
    proxy = await start_proxy(backend.url)
    answer = await chat(proxy, stream=True)

    assert (answer.body, answer.cut) == (b"data: {}\n\n", True)


async def test_the_gateway_tries_again_waits_and_tells(
    mock: MockModel, proxy: FaultProxy, start_gateway: StartGateway
) -> None:
    gateway = await patient(start_gateway)(proxy.url, gateway_outage_wait=30, gateway_backoff_initial=0.01)

    await control(proxy, "PUT", fault("reset"))
    again = await gateway.chat()
    assert (again.status, again.attempts) == (200, 2)

    await control(proxy, "PUT", fault("refuse", seconds=3))
    waited = await gateway.chat(stream=True)
    assert (waited.status, Events(waited.body).done) == (200, 1)
    assert waited.waits("bridging")

    await control(proxy, "PUT", fault("cut", after_events=3, how="reset"))
    cut = await gateway.chat(stream=True)
    assert Events(cut.body).only_error()["code"] == "backend_invalid_response"
    assert mock.journal.total == 3
