"""Very large JSON passes byte for byte, and what reads all of it in one go is no thread of the gateway's."""

import os
import signal
import sys
from collections.abc import Callable
from functools import wraps
from io import BytesIO
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.dialects import json_text
from gateway.executor import VERY_LARGE
from testkit.completions import CHAT_PATH, COMPLETIONS_PATH, EMBEDDINGS_PATH, MESSAGES_PATH, RESPONSES_PATH
from testkit.polling import until
from testkit.process_table import children_of, lives
from testkit.servers import Gateway as GatewayProcess
from tests.integration.backends_raw import END, STREAM_HEAD, RawCall, StartRaw
from tests.integration.gateways import StartGateway
from tests.integration.recorder import Recorder
from tests.integration.wire import post, send

LISTS = b",".join([b"[]"] * (VERY_LARGE // 3 + 1))
TEXT = b"a" * (VERY_LARGE + 1)
BODIES = [
    (CHAT_PATH, b'{"model":"m","messages":[{"role":"user","content":[%b]}]}' % LISTS),
    (CHAT_PATH, b'{"model":"m","messages":[{"role":"user","content":"%b"}]}' % TEXT),
    (COMPLETIONS_PATH, b'{"model":"m","prompt":[%b]}' % LISTS),
    (EMBEDDINGS_PATH, b'{"model":"m","input":[%b]}' % LISTS),
    (RESPONSES_PATH, b'{"model":"m","input":[%b]}' % LISTS),
    (MESSAGES_PATH, b'{"model":"m","messages":[{"role":"user","content":[%b]}]}' % LISTS),
    ("/v1/moderations", b'{"model":"m","input":[%b]}' % LISTS),
]
READERS = ("decode", "decode_with", "check", "leniently")


@pytest.fixture
def read_here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the texts that a thread of the gateway has read."""
    sizes: list[int] = []

    def noting(read: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(read)
        def wrapper(*args: Any) -> Any:  # noqa: ANN401
            sizes.extend(len(text) for text in args if isinstance(text, bytes))
            return read(*args)

        return wrapper

    for name in READERS:
        reader = getattr(json_text, name)
        wrapper = noting(reader)
        for module in list(sys.modules.values()):
            if module.__name__.startswith("gateway.") and getattr(module, name, None) is reader:
                monkeypatch.setattr(module, name, wrapper)
    return sizes


@pytest.mark.parametrize(
    ("path", "body"), BODIES, ids=["lists", "text", "prompts", "inputs", "items", "messages", "passed"]
)
@pytest.mark.parametrize("capture", [False, True])
async def test_a_very_large_body_passes_and_is_not_read_here(  # noqa: PLR0917
    recorder: Recorder,
    start_gateway: StartGateway,
    read_here: list[int],
    path: str,
    body: bytes,
    capture: bool,  # noqa: FBT001
) -> None:
    gateway = await start_gateway(recorder.url, gateway_capture_content=capture)
    await send(gateway, post(body, path=path))
    answer = await send(gateway, post(body[:-1], path=path))

    assert answer.error["code"] == "invalid_json"
    assert [seen.body for seen in recorder.seen] == [body]
    assert max(read_here, default=0) <= VERY_LARGE
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.parametrize("path", [CHAT_PATH, RESPONSES_PATH, MESSAGES_PATH])
@pytest.mark.parametrize("inside", [b'"x":[%b]' % LISTS, b'"x":"%b"' % TEXT, b'"error":[%b]' % LISTS])
@pytest.mark.parametrize("capture", [False, True])
async def test_a_very_large_answer_passes_and_is_not_read_here(  # noqa: PLR0917
    start_raw: StartRaw,
    start_gateway: StartGateway,
    read_here: list[int],
    path: str,
    inside: bytes,
    capture: bool,  # noqa: FBT001
) -> None:
    body = b'{"id":"1","model":"m",%b}' % inside
    backend = await start_raw(lambda call: call.answer(body))
    gateway = await start_gateway(backend.url, gateway_max_attempts=1, gateway_capture_content=capture)
    answer = await send(gateway, post(b'{"model":"m","messages":[{"role":"user"}],"input":"x"}', path=path))

    assert (answer.status, answer.body == body) == ((502, False) if b'"error"' in inside else (200, True))
    assert max(read_here) <= VERY_LARGE
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.parametrize("delta", [b'"content":"%b"' % TEXT, b'"content":[%b]' % LISTS])
@pytest.mark.parametrize("as_stream", [True, False])
async def test_a_very_large_event_passes_and_is_not_read_here(
    start_raw: StartRaw, start_gateway: StartGateway, read_here: list[int], delta: bytes, *, as_stream: bool
) -> None:
    document = b'{"model":"m","choices":[{"index":0,"delta":{%b},"finish_reason":"stop"}]}' % delta
    events = b"data: " + document + b"\n\ndata: [DONE]\n\n"

    async def play(call: RawCall) -> None:
        if not as_stream:
            await call.answer(document)
            return
        await call.send(STREAM_HEAD)
        await call.events(events)
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_attempts=1)
    answer = await gateway.chat(stream=True)

    assert (answer.status, answer.body == events) == ((200, True) if as_stream else (502, False))
    assert max(read_here, default=0) <= VERY_LARGE
    assert gateway.parts.byte_budget.held == 0


async def test_a_very_large_event_that_is_no_json_is_a_failure(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(b'data: {"choices":[' + LISTS + b"\n\ndata: [DONE]\n\n")
        await call.send(END)

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_attempts=1)

    assert (await gateway.chat(stream=True)).error["code"] == "backend_invalid_response"


async def test_when_the_reading_process_is_killed_one_request_is_asked_to_come_again(
    recorder: Recorder, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(recorder.url)
    path, body = BODIES[0]
    assert (await send(gateway, post(body, path=path))).status == 200
    worker = gateway.parts.executor._side_process
    started = worker._started
    assert worker.pid is not None

    def killed() -> Any:  # noqa: ANN401
        process = started()
        os.kill(process.pid, signal.SIGKILL)
        return process

    with monkeypatch.context() as patch:
        patch.setattr(worker, "_started", killed)
        answer = await send(gateway, post(body, path=path))

    assert (answer.status, answer.error["code"]) == (503, "gateway_overloaded")
    assert answer.headers["retry-after"] == "1"
    assert (await send(gateway, post(body, path=path))).status == 200
    assert gateway.parts.byte_budget.held == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
async def test_the_reading_process_ends_with_the_gateway(recorder: Recorder, tmp_path: Path, end: int) -> None:
    async with GatewayProcess("gateway", tmp_path, {"GATEWAY_BACKEND_URLS": recorder.url}) as gateway:
        url, body = gateway.url + BODIES[0][0], BytesIO(BODIES[0][1])
        headers = {"content-type": "application/json"}
        async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as answer:
            assert answer.status == 200
        [reader] = children_of(gateway.pid)
        gateway.signal(end)
        assert await gateway.wait() == (0 if end == signal.SIGTERM else -end)
        await until(lambda: not lives(reader), "the reading process ends")
        assert "Traceback" not in gateway.last_lines()
