"""The mock model as the official SDK sees it."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI
from pydantic import BaseModel

from mock_model.serve import MockModel
from mock_model.settings import Settings
from tests.integration.stopwatch import Stopwatch

HELLO: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def settings(**changes: Any) -> Settings:  # noqa: ANN401
    return Settings(**{"port": 0, "control_port": 0, "mock_ttft": 0, "mock_token_interval": 0, **changes})


@pytest.fixture
async def mock() -> AsyncIterator[MockModel]:
    async with MockModel(settings()) as running:
        yield running


@pytest.fixture
async def client(mock: MockModel) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="any", max_retries=0) as sdk:
        yield sdk


@pytest.fixture
async def http(mock: MockModel) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mock.url) as session:
        yield session


async def test_chat(client: AsyncOpenAI, mock: MockModel) -> None:
    answer = await client.chat.completions.create(model="any-name", messages=HELLO, n=2)

    assert answer.model == "any-name"
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    assert len((answer.choices[0].message.content or "").split()) == mock.settings.mock_tokens
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * mock.settings.mock_tokens


async def test_streamed_chat_says_the_same_as_unstreamed(client: AsyncOpenAI) -> None:
    chunks = [
        chunk
        async for chunk in await client.chat.completions.create(
            model="m", messages=HELLO, stream=True, n=2, stream_options={"include_usage": True}
        )
    ]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    assert [choice.delta.role for choice in (*chunks[0].choices, *chunks[1].choices)] == ["assistant", "assistant"]
    assert [chunk.choices[0].finish_reason for chunk in chunks[-3:-1]] == ["stop", "stop"]
    assert chunks[-1].usage is not None
    assert all(len(text.split()) == 16 for text in texts.values())


async def test_tools_are_called(client: AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="m", messages=HELLO, tools=[WEATHER])
    calls: Any = answer.choices[0].message.tool_calls
    async with client.chat.completions.stream(model="m", messages=HELLO, tools=[WEATHER]) as stream:
        final = await stream.get_final_completion()
    streamed: Any = final.choices[0].message.tool_calls

    assert answer.choices[0].finish_reason == "tool_calls"
    assert calls[0].function.name == "weather"
    assert calls[0].function.arguments == '{"city":"text"}'
    assert streamed[0].function.arguments == '{"city":"text"}'


async def test_structured_output_fits_its_model(client: AsyncOpenAI) -> None:
    class Inner(BaseModel):
        numbers: list[int]

    class City(BaseModel):
        name: str
        inner: Inner

    answer = await client.chat.completions.parse(model="m", messages=HELLO, response_format=City)

    assert answer.choices[0].message.parsed == City(name="text", inner=Inner(numbers=[1]))


async def test_completions(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=3)
    chunks = [chunk async for chunk in await client.completions.create(model="m", prompt="a", stream=True)]

    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert len("".join(chunk.choices[0].text for chunk in chunks).split()) == 16
    assert chunks[-1].choices[0].finish_reason == "stop"


async def test_embeddings_are_the_same_as_base64_and_as_numbers(client: AsyncOpenAI) -> None:
    packed = await client.embeddings.create(model="m", input=["a", "b"], dimensions=8)
    plain = await client.embeddings.create(model="m", input=["a", "b"], dimensions=8, encoding_format="float")

    for one, other in zip(packed.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, rel=1e-6)


async def test_responses(client: AsyncOpenAI) -> None:
    answer = await client.responses.create(model="m", input="hello")
    async with client.responses.stream(model="m", input="hello", max_output_tokens=3) as stream:
        kinds = [event.type async for event in stream]

    assert answer.status == "completed"
    assert len(answer.output_text.split()) == 16
    assert kinds[0] == "response.created"
    assert kinds.count("response.output_text.delta") == 3
    assert kinds[-1] == "response.incomplete"


async def test_models(client: AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["demo-model"]
    assert (await client.models.retrieve("org/any name")).id == "org/any name"


async def test_several_models_are_listed_once_each() -> None:
    async with (
        MockModel(settings(mock_models=["other", "demo-model"])) as mock,
        AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="any", max_retries=0) as client,
    ):
        assert [model.id async for model in client.models.list()] == ["demo-model", "other"]
        assert (await client.completions.create(model="unlisted", prompt="a")).model == "unlisted"


async def test_a_wrong_request_is_a_bad_request(client: AsyncOpenAI, mock: MockModel) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(model="m", messages=[])

    assert caught.value.param == "messages"
    assert caught.value.type == "invalid_request_error"
    assert [(call.fault, call.ended) for call in mock.journal.calls] == [(None, "complete")]


async def test_wrong_paths_and_methods_have_openai_errors(http: aiohttp.ClientSession) -> None:
    for method, path, status, code in (
        ("POST", "/v1/nothing", 404, "not_found"),
        ("GET", "/elsewhere", 404, "not_found"),
        ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/models", 405, "method_not_allowed"),
    ):
        async with http.request(method, path) as answer:
            error = (await answer.json())["error"]
            assert answer.status == status
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == code


async def test_calls_below_v1_without_a_route_are_journaled_and_meet_no_fault(
    mock: MockModel, http: aiohttp.ClientSession
) -> None:
    mock.set_faults([{"kind": "reset"}])
    statuses = []
    for method, path in (
        ("POST", "/v1/nothing"),
        ("GET", "/v1/chat/completions"),
        ("OPTIONS", "/v1/models"),
        ("HEAD", "/v1/models"),
        ("GET", "/v1/" + "x" * 1000),
        ("GET", "/elsewhere"),
        ("POST", "/health"),
    ):
        async with http.request(method, path, headers={"x-request-id": "mine"}) as answer:
            statuses.append(answer.status)

    assert statuses == [404, 405, 405, 405, 404, 404, 405]
    assert [call.path for call in mock.journal.calls] == [
        "/v1/nothing",
        "/v1/chat/completions",
        "/v1/models",
        "/v1/models",
        ("/v1/" + "x" * 1000)[:256],
    ]
    assert {(call.fault, call.ended, call.request_id) for call in mock.journal.calls} == {(None, "complete", "mine")}
    assert mock.faults.document()[0]["used"] == 0
    async with http.get(f"{mock.control_url}/metrics") as metrics:
        assert 'mock_model_calls_total{ended="complete",route="/v1/*"} 5.0' in await metrics.text()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/nothing"])
@pytest.mark.parametrize("sent", [b"", b'{"model": '])
async def test_a_caller_that_leaves_before_its_body_came_is_journaled(tmp_path: Path, path: str, sent: bytes) -> None:
    async with MockModel(settings(mock_journal_file=tmp_path / "journal")) as mock:
        _, writer = await asyncio.open_connection("127.0.0.1", mock.port)
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\nx-request-id: mine\r\n\r\n"
        writer.write(head.encode() + sent)
        async with asyncio.timeout(5):
            while not mock.in_flight:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        writer.close()
        await writer.wait_closed()
        await mock.settled()
        calls = list(mock.journal.calls)
    lines = [json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()]

    assert [(call.path, call.request_id, call.fingerprint) for call in calls] == [(path, "mine", "")]
    assert [(call.fault, call.ended) for call in calls] == [(None, "caller_left")]
    assert [line["event"] for line in lines] == ["started", "arrived", "ended"]
    assert lines[2]["ended"] == "caller_left"


async def test_a_body_that_cannot_be_unpacked_is_a_bad_request(mock: MockModel, http: aiohttp.ClientSession) -> None:
    headers = {"content-encoding": "gzip"}
    async with http.post("/v1/chat/completions", data=b"no gzip", headers=headers) as answer:
        assert answer.status == 400
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}

    assert [(call.fault, call.ended) for call in mock.journal.calls] == [(None, "complete")]


@pytest.mark.parametrize("body", [b"", b"no json", b"[]", b'{"messages": "\xff"}', b'{"a":' * 50_000])
async def test_bodies_that_are_no_requests_have_openai_errors(http: aiohttp.ClientSession, body: bytes) -> None:
    async with http.post("/v1/chat/completions", data=body) as answer:
        assert answer.status == 400
        assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}


async def test_the_answer_names_the_request(http: aiohttp.ClientSession) -> None:
    body = {"messages": HELLO}
    async with http.post("/v1/chat/completions", json=body, headers={"x-request-id": "mine"}) as answer:
        assert answer.headers["x-request-id"] == "mine"
        assert answer.headers["openai-version"] == "2020-10-01"
        assert (await answer.json())["model"] == "demo-model"
    async with http.post("/v1/chat/completions", json=body) as answer:
        assert answer.headers["x-request-id"].startswith("req_")


async def test_a_hostile_request_id_is_journaled_and_echoed_in_writable_form(mock: MockModel) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", mock.port)
    writer.write(b"GET /v1/models/m HTTP/1.1\r\nHost: x\r\nx-request-id: a\xffb\r\nConnection: close\r\n\r\n")
    raw = await reader.read()
    writer.close()
    await writer.wait_closed()

    assert raw.startswith(b"HTTP/1.1 200 ")
    assert mock.journal.calls[0].request_id == "a?b"
    mock.journal.document()


async def test_the_journal_records_what_a_call_was(mock: MockModel, http: aiohttp.ClientSession) -> None:
    traceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"x-request-id": "mine", "traceparent": traceparent}
    body = {"model": "m", "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body, headers=headers) as answer:
        await answer.read()
    async with http.get("/health") as answer:
        assert await answer.json() == {"status": "ok"}

    call = mock.journal.calls[0]
    assert mock.journal.total == 1
    assert (call.path, call.model, call.request_id) == ("/v1/chat/completions", "m", "mine")
    assert call.traceparent == traceparent
    assert (call.fault, call.ended, call.events_sent) == (None, "complete", 16 + 3)


async def test_a_caller_that_leaves_is_journaled_with_what_it_got(mock: MockModel, http: aiohttp.ClientSession) -> None:
    mock.set_faults([{"kind": "stall", "with": {"after_events": 4}}])
    body = {"model": "m", "messages": HELLO, "stream": True}
    async with http.post("/v1/chat/completions", json=body) as answer:
        for _ in range(4):
            await answer.content.readuntil(b"\n\n")
    await mock.settled()

    call = mock.journal.calls[0]
    assert (call.fault, call.ended, call.events_sent) == ("stall", "caller_left", 4)


def nameless(answer: bytes) -> bytes:
    """An answer without its response's id, which depends on the port."""
    return re.sub(rb'"resp_[0-9a-f]+"', b'"any"', answer)


async def test_the_same_seed_and_requests_are_the_same_bytes() -> None:
    requests: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": HELLO}),
        ("/v1/chat/completions", {"messages": HELLO, "stream": True, "n": 2}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
        ("/v1/responses", {"input": "x", "stream": True}),
    ]

    async def answers(seed: int) -> list[bytes]:
        got = []
        async with MockModel(settings(mock_seed=seed)) as mock, aiohttp.ClientSession(mock.url) as http:
            for path, body in requests * 2:
                async with http.post(path, json=body) as answer:
                    got.append(nameless(await answer.read()))
        return got

    first, again, other = await answers(1), await answers(1), await answers(2)

    assert first == again
    assert first[:5] == first[5:]
    assert all(one != two for one, two in zip(first, other, strict=True))


async def test_no_more_than_the_capacity_is_answered_at_a_time(http: aiohttp.ClientSession) -> None:
    async with (
        MockModel(settings(mock_max_concurrency=2)) as mock,
        AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="any", max_retries=0) as client,
    ):
        mock.set_faults([{"kind": "stall", "times": 2}])
        tasks = [
            asyncio.create_task(client.chat.completions.create(model=str(number), messages=HELLO))
            for number in range(3)
        ]
        await mock.called(3)
        done, _ = await asyncio.wait(tasks, timeout=0.1)
        async with http.get(f"{mock.control_url}/metrics") as answer:
            metrics = await answer.text()
        async with http.get(f"{mock.url}/health") as health:
            assert health.status == 200
        tasks[0].cancel()
        tasks[1].cancel()
        await asyncio.wait(tasks, timeout=10)

        assert not done
        assert "mock_model_running_calls 2.0" in metrics
        assert "mock_model_waiting_calls 1.0" in metrics
        assert sum(not task.cancelled() for task in tasks) == 1
        await mock.settled()


async def test_what_needs_no_decoding_needs_no_place(http: aiohttp.ClientSession) -> None:
    async with MockModel(settings(mock_max_concurrency=1)) as mock:
        mock.set_faults([{"kind": "stall", "times": 1}])
        holder = asyncio.create_task(http.post(f"{mock.url}/v1/chat/completions", json={"messages": HELLO}))
        await mock.called(1)
        statuses = []
        async with asyncio.timeout(5):
            for method, path in (
                ("GET", "/v1/models"),
                ("GET", "/v1/models/any"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/health"),
            ):
                async with http.request(method, mock.url + path) as answer:
                    statuses.append(answer.status)
        holder.cancel()
        await asyncio.gather(holder, return_exceptions=True)

    assert statuses == [200, 200, 400, 200]


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_gets_slower_when_it_gets_company(
    http: aiohttp.ClientSession,
    stream: bool,  # noqa: FBT001
) -> None:
    async with MockModel(settings(mock_ttft=0.3, mock_max_concurrency=2)) as mock:
        loop = asyncio.get_running_loop()

        async def took(user: str) -> float:
            start = loop.time()
            body = {"messages": HELLO, "stream": stream, "user": user}
            async with http.post(f"{mock.url}/v1/chat/completions", json=body) as answer:
                await answer.read()
            return loop.time() - start

        async with Stopwatch() as watch:
            alone = await took("a")
        first = asyncio.create_task(took("b"))
        await mock.called(2)
        second = asyncio.create_task(took("c"))
        both = await asyncio.gather(first, second)
        _, begun, joined = (call.time for call in mock.journal.calls)

    assert alone >= 0.3
    assert watch.within(0.45), watch
    assert both[0] >= 0.5 - (joined - begun), "alone until the other came, then at half the speed"


async def test_pace_is_kept_in_streams_and_whole_answers(http: aiohttp.ClientSession) -> None:
    async with MockModel(settings(mock_ttft=0.1, mock_token_interval=0.02, mock_tokens=6)) as mock:
        loop = asyncio.get_running_loop()
        for stream in (True, False):
            start = loop.time()
            async with http.post(
                f"{mock.url}/v1/chat/completions", json={"messages": HELLO, "stream": stream}
            ) as answer:
                await answer.read()
            assert loop.time() - start >= 0.19
