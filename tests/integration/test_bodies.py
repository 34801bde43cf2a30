"""Bodies go through byte for byte, in both directions, and what waits of them counts as held."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from gateway.dialects.openai.chat import OpenAIChat
from gateway.executor import LARGE
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.polling import PATIENCE, until
from tests.integration.backends_raw import StartRaw
from tests.integration.gateways import Gateway, StartGateway, config, get
from tests.integration.recorder import ANSWER, STREAM, Recorder
from tests.integration.wire import BODY, chunked, dial, post, send

ODD = (
    b' {\r\n\t"x_unknown" : {"model":"inner","deep":[1.0,1e5,1E+05,-0,-0.0,12345678901234567890123,0.1000,1e-400]} ,'
    b'"messages":[{"role":"user","content":"\\u00e9\\/ \xc3\xa9 \\ud83d\\ude00","model":"no"}],'
    b'"temperature":1.10, "seed":9007199254740993,"stop":"\\"model\\":","user":"}{",'
)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(ODD + b'"model":"demo-model"} \n', id="odd numbers, escapes, spaces, unknown fields"),
        pytest.param(BODY, id="plain"),
        pytest.param(
            ODD + b'"n":null,"stream":null,"x":1,"x":2,"X":3,"model":"demo-model"}', id="nulls and unknown doubles"
        ),
        pytest.param(b"\xef\xbb\xbf" + BODY, id="byte order mark"),
        pytest.param(ODD + b'"n":1.0,"model":"demo-model"}', id="n as a float"),
    ],
)
async def test_a_body_goes_out_byte_for_byte(recorder: Recorder, start_gateway: StartGateway, body: bytes) -> None:
    gateway = await start_gateway(recorder.url)
    assert (await send(gateway, post(body))).status == 200
    assert (await send(gateway, chunked(body[:7], body[7:8], body[8:]))).status == 200
    assert [seen.body for seen in recorder.seen] == [body, body]
    assert [seen.header("content-length") for seen in recorder.seen] == [str(len(body))] * 2
    assert recorder.seen[1].header("transfer-encoding") is None


async def test_a_large_body_goes_out_byte_for_byte(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url)
    body = ODD + b'"model":"m","pad":"' + b"\xc3\xa9x" * 1_500_000 + b'"}'
    assert (await send(gateway, post(body))).status == 200
    assert recorder.seen[0].body == body
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (ODD + b'"model" :\t"caller"}', ODD + b'"model" :\t"small-model"}'),
        (ODD + b'"model":"a\\"b,}","n":1}', ODD + b'"model":"small-model","n":1}'),
        (ODD + b'"m\\u006fdel":"caller"}', ODD + b'"m\\u006fdel":"small-model"}'),
        (ODD + b'"model":null}', ODD + b'"model":"small-model"}'),
        (b"\xef\xbb\xbf" + ODD + b'"model":"a"}', b"\xef\xbb\xbf" + ODD + b'"model":"small-model"}'),
        (ODD + b'"n":1}', ODD.replace(b"{", b'{"model":"small-model",', 1) + b'"n":1}'),
    ],
)
async def test_only_the_model_is_set_when_the_target_names_another(
    recorder: Recorder, start_gateway: StartGateway, tmp_path: Path, body: bytes, expected: bytes
) -> None:
    file = config(
        tmp_path,
        f"""
backends:
  one: {{url: "{recorder.url}"}}
routes:
  - {{model: "*", targets: [{{backend: one, model: small-model}}]}}
""",
    )
    gateway = await start_gateway(gateway_config=file)
    assert (await send(gateway, post(body))).status == 200
    assert recorder.seen[0].body == expected
    assert recorder.seen[0].header("content-length") == str(len(expected))
    assert json.loads(expected.decode("utf-8-sig"))["model"] == "small-model"


@pytest.mark.parametrize("model", ["default", 'quo"te', "caf\u00e9"])
async def test_a_caller_who_names_no_model_gets_the_default_one(
    recorder: Recorder, start_gateway: StartGateway, model: str
) -> None:
    gateway = await start_gateway(recorder.url, model_name=model)
    for body in (b'{"prompt":"x"}', b'{"prompt":"x","model":null}', b'{"prompt":"x","model":"own"}'):
        assert (await send(gateway, post(body, path="/v1/completions"))).status == 200
    assert [json.loads(seen.body)["model"] for seen in recorder.seen] == [model, model, "own"]
    assert recorder.seen[0].body.endswith(b'"prompt":"x"}')
    assert recorder.seen[2].body == b'{"prompt":"x","model":"own"}'


@pytest.mark.parametrize("path", [CHAT_PATH, "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages"])
async def test_an_answer_comes_back_byte_for_byte(recorder: Recorder, start_gateway: StartGateway, path: str) -> None:
    gateway = await start_gateway(recorder.url)
    odd = b'\r\n {"a" : 1.0, "b":[1e5,-0.0, 12345678901234567890], "c":"\\u00e9\xc3\xa9","error": null, "choices":[]}\n'
    for pieces in ([odd], [odd[:9], odd[9:10], odd[10:]], [odd[:-1] + b" " * 300_000]):
        recorder.pieces = pieces
        answer = await gateway.chat(path=path, prompt="x", input="x")
        assert answer.status == 200
        assert answer.body == b"".join(pieces)
        assert answer.headers["content-length"] == str(len(answer.body))
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.parametrize("status", [400, 404, 409, 422, 429, 500, 501, 503])
async def test_an_error_answer_comes_back_byte_for_byte(
    recorder: Recorder, start_gateway: StartGateway, status: int
) -> None:
    gateway = await start_gateway(recorder.url, gateway_max_attempts=1)
    recorder.status = status
    recorder.pieces = [b' {"error" : {"message": "caf\xc3\xa9 \\u00e9", "code": 1.0, "more": [1e5]}} \n']
    for stream in (False, True):
        answer = await gateway.chat(stream=stream)
        assert answer.status == status
        assert answer.body == recorder.pieces[0]
        assert answer.headers["content-type"] == "application/json"


async def test_a_stream_goes_on_byte_for_byte_and_event_by_event(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.headers = [("content-type", "text/event-stream; charset=utf-8")]
    events = [
        b'event: x\r\nid: 7\r\ndata:{"choices":[{"index":0,"delta":{"content":"caf\xc3\xa9","odd":1.0}}]}\r\n\r\n',
        b'data: {"choices":[{"index":0,\ndata: "delta":{"content":"two lines"}}]}\n\n',
        b'retry: 5\ndata:  {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"n":1e5}\n\n',
        b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n',
        b"data: [DONE]\n\n",
    ]
    whole = b"".join(events)
    recorder.pieces = [whole[n : n + 11] for n in range(0, len(whole), 11)]
    answer = await gateway.chat(stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.body == whole


async def test_events_go_on_as_they_arrive(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "stall", "with": {"after_events": 3}}])
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        assert (await wire.head())[0] == 200
        got = b""
        while got.count(b"data: ") < 3:
            got += await wire.some(1)
        assert gateway.parts.admission.in_flight == 1
        assert [call.ended for call in mock.journal.calls] == [None]
    await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await until(lambda: gateway.parts.admission.in_flight == 0)
    assert gateway.parts.byte_budget.held == 0


async def test_a_caller_who_does_not_read_stops_the_backend_and_not_the_memory(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url, gateway_idle_timeout=0.3)
    size = 64 << 20
    text = b"x" * 16_000
    event = b'data: {"choices":[{"index":0,"delta":{"content":"' + text + b'"}}]}\n\n'
    count = size // len(event)
    recorder.headers = [("content-type", "text/event-stream")]
    recorder.pieces = [event] * count + [STREAM, b"data: [DONE]\n\n"]
    async with dial(gateway.url, receive_buffer=8_192) as wire:
        await wire.send(post(json.dumps(CHAT | {"stream": True}).encode()))
        assert (await wire.head())[0] == 200
        written = -1
        while written != recorder.written:
            written = recorder.written
            await asyncio.sleep(0.5)
        assert written < size // 4
        buffered = max(connection.transport.get_write_buffer_size() for connection in connections(gateway))
        assert buffered < 1 << 20
        assert gateway.parts.byte_budget.held < 1 << 20
        body = await wire.rest_of_chunks()
    assert body.count(b"\n\n") == count + 2
    assert body.endswith(b"data: [DONE]\n\n")
    assert len(recorder.seen) == 1


def connections(gateway: Gateway) -> list[Any]:
    """The open connections of callers, as aiohttp's server keeps them."""
    runner = gateway.client.server.runner
    assert runner is not None
    server = runner.server
    assert server is not None
    return server.connections


async def test_a_whole_answer_counts_as_held_until_it_is_taken(recorder: Recorder, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.pieces = [ANSWER + b" " * (16 << 20)]
    async with dial(gateway.url, receive_buffer=8_192) as wire:
        await wire.send(post())
        assert (await wire.head())[0] == 200
        assert gateway.parts.byte_budget.held > 16 << 20
        assert await wire.some(len(ANSWER)) == ANSWER
        await wire.some(16 << 20)
        await until(lambda: gateway.parts.byte_budget.held == 0)


async def test_a_whole_answer_cut_off_on_its_way_is_not_followed_by_another(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(recorder.url)
    recorder.pieces = [ANSWER + b" " * (16 << 20)]
    async with dial(gateway.url, receive_buffer=8_192) as wire:
        await wire.send(post())
        assert (await wire.head())[0] == 200
        gateway.parts.admission.drain()
        gateway.parts.in_flight.cut_off()
        rest = await wire.rest()
    assert len(rest) <= len(recorder.pieces[0])
    assert b"HTTP/1.1" not in rest
    await until(lambda: not len(gateway.parts.in_flight))
    assert gateway.parts.byte_budget.held == 0


# Large ones


async def test_while_a_large_body_or_answer_is_looked_into_others_are_answered(
    start_raw: StartRaw, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, inside = threading.Event(), threading.Semaphore(0)

    def held(work: Any) -> Any:  # noqa: ANN401
        def wait(self: OpenAIChat, about: str, body: bytes) -> Any:  # noqa: ANN401
            if len(body) > LARGE:
                inside.release()
                assert go_on.wait(PATIENCE)
            return work(self, about, body)

        return wait

    monkeypatch.setattr(OpenAIChat, "read_request", held(OpenAIChat.read_request))
    monkeypatch.setattr(OpenAIChat, "read_answer", held(OpenAIChat.read_answer))
    backend = await start_raw(
        lambda call: call.answer(
            b'{"id": "x", "x": "%b"}' % (b"x" * (2 * LARGE if b"large answer" in call.body else 1))
        )
    )
    gateway = await start_gateway(backend.url)
    large = [
        asyncio.create_task(gateway.chat(messages=[{"role": "user", "content": "x" * 2 * LARGE}])),
        asyncio.create_task(gateway.chat(messages=[{"role": "user", "content": "large answer"}])),
    ]
    await asyncio.to_thread(inside.acquire)
    for _ in range(3):
        assert (await get(gateway, "/livez")).status == 200
        assert (await gateway.chat()).status == 200
    assert not any(task.done() for task in large)
    go_on.set()
    assert [(await task).status for task in large] == [200, 200]
