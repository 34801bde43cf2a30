"""What the testkit reads: metrics, server-sent events, answers, prompts and their texts; and quantiles."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from testkit.completions import COMPLETIONS_PATH, EMBEDDINGS_PATH, RESPONSES_PATH, prompt, text_in, text_of
from testkit.exposition import Exposition
from testkit.http import Answer, answers, ask
from testkit.ports import free_port
from testkit.quantiles import median_and_p99, quantile
from testkit.sse import Event, Events, read_events

METRICS = """
# TYPE calls counter
calls_total{backend="a",outcome="ok"} 3
calls_total{backend="a",outcome="bad"} 1
calls_total{backend="b",outcome="ok"} 4
calls_total{backend="b",outcome="bad"} 0
# TYPE waiting gauge
waiting 2
"""
STREAM = (
    b": a comment\n\n"
    b'data: {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}\n\n'
    b'event: x\ndata: {"choices": [{"index": 0, "delta": {"content": "lo"}}, {"index": 1, "delta": {"content": "no"}}]}'
    b"\n\n"
    b"data: [DONE]\n\n"
)
ERROR = {"message": "m", "type": "server_error", "param": None, "code": "c"}


def test_metrics_are_read_one_by_one_and_summed() -> None:
    found = Exposition.parse(METRICS)
    assert found.only("calls_total", backend="a", outcome="ok") == 3
    assert found.only("calls_total", backend="a") is None
    assert found.value("calls_total", backend="a") == 4
    assert found.value("nothing") == 0
    assert found.only("waiting") == 2
    assert found.by("calls_total", "outcome") == {"ok": 7, "bad": 1}
    assert found.by_labels("calls_total", "backend", "outcome") == {("a", "ok"): 3, ("a", "bad"): 1, ("b", "ok"): 4}


def test_a_metric_that_is_told_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"waiting.* is there twice"):
        Exposition.parse(METRICS + "waiting 3\n")


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_events_are_read_from_pieces_of_any_size(size: int) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(STREAM), size):
            yield STREAM[start : start + size]

    first, second, last = [event async for event in read_events(pieces())]
    assert (first.name, second.name, last) == ("", "x", Event("", "[DONE]"))
    assert text_in(json.loads(first.data)) == "Hel"


def test_the_events_of_a_whole_body() -> None:
    events = Events(STREAM)
    assert (len(events.all), len(events.data), len(events.comments), events.done) == (4, 3, 1, 1)
    assert (events.text, events.errors) == ("Hello", [])
    with pytest.raises(AssertionError, match="half an event"):
        Events(STREAM[:-1])


def test_the_only_error_of_a_stream() -> None:
    failed = STREAM.replace(b"[DONE]", json.dumps({"error": ERROR}).encode())
    assert Events(failed).only_error() == ERROR
    for other in (STREAM, failed + b"data: [DONE]\n\n", failed + failed):
        with pytest.raises(AssertionError):
            Events(other).only_error()


def test_an_answer_explains_itself() -> None:
    timing = 'queue;dur=0.1, attempt-1;desc="a status_500";dur=1.5, backoff-1;dur=20.0, attempt-2;desc="a ok";dur=3.0'
    answer = Answer(200, {"Server-Timing": timing, "X-Gateway-Attempts": "2"}, b"{}")
    assert answer.attempts == 2
    assert answer.timing[0] == ("queue", "", 0.1)
    assert (answer.outcomes, answer.backoffs) == (["a status_500", "a ok"], [20.0])


def test_the_text_and_the_events_of_an_answer() -> None:
    whole = {"choices": [{"message": {"content": "Hello"}}]}
    assert Answer(200, {"content-type": "application/json"}, json.dumps(whole).encode()).text == "Hello"
    streamed = Answer(200, {"content-type": "text/event-stream"}, STREAM)
    assert streamed.text == "Hello"
    assert (len(streamed.events), streamed.events[-1]) == (3, "[DONE]")


@pytest.mark.parametrize(
    ("headers", "document", "own"),
    [
        ({"content-type": "application/json"}, {"error": ERROR}, True),
        ({"content-type": "text/plain"}, {"error": ERROR}, False),
        ({"content-type": "application/json"}, {"error": ERROR, "more": 1}, False),
        ({"content-type": "application/json"}, {"error": ERROR | {"more": 1}}, False),
    ],
)
def test_an_error_of_the_gateways_own_has_its_form(headers: dict[str, str], document: Any, own: bool) -> None:  # noqa: ANN401, FBT001
    answer = Answer(500, headers, json.dumps(document).encode())
    assert answer.error["code"] == "c"
    if own:
        assert answer.own_error == ERROR
        return
    with pytest.raises(AssertionError):
        _ = answer.own_error


async def test_one_call(aiohttp_server: Callable[..., Awaitable[TestServer]]) -> None:
    async def echo(request: web.Request) -> web.Response:
        return web.json_response([request.content_type, request.headers.get("x-a"), await request.text()], status=201)

    app = web.Application()
    app.router.add_route("*", "/echo", echo)
    url = str((await aiohttp_server(app)).make_url("/echo"))
    as_json = await ask(url, method="POST", body={"a": 1}, headers={"x-a": "b"})
    assert (as_json.status, as_json.json) == (201, ["application/json", "b", '{"a": 1}'])
    assert as_json.seconds > 0
    assert (await ask(url, method="PUT", body=b"{")).json[2] == "{"
    assert (await ask(url)).json[2] == ""
    assert not await answers(url), "201 is not 200"
    assert not await answers(f"http://127.0.0.1:{free_port()}/")


def test_a_prompt_of_each_api() -> None:
    assert prompt() == {"model": "demo-model", "messages": [{"role": "user", "content": "Say something."}]}
    assert prompt(COMPLETIONS_PATH, "x", limit=3) == {"model": "demo-model", "prompt": "x", "max_tokens": 3}
    assert prompt(RESPONSES_PATH, "x", limit=3) == {"model": "demo-model", "input": "x", "max_output_tokens": 3}
    assert prompt(EMBEDDINGS_PATH, "x", model="m", stream=True) == {"model": "m", "input": "x", "stream": True}


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"choices": [{"message": {"content": "a"}}]}, "a"),
        ({"choices": [{"text": "a"}]}, "a"),
        ({"object": "response", "output": [{"content": [{"text": "a"}, {"text": "b"}]}]}, "ab"),
        ({"object": "list", "data": [{"embedding": [0.5]}]}, ""),
        ({"object": "list", "data": []}, None),
        ({"choices": []}, None),
    ],
)
def test_the_text_of_a_whole_answer(document: Any, text: str | None) -> None:  # noqa: ANN401
    assert text_of(document) == text


@pytest.mark.parametrize(
    ("event", "text"),
    [
        ({"choices": [{"delta": {"content": "a"}}]}, "a"),
        ({"choices": [{"delta": {"role": "assistant"}}]}, ""),
        ({"choices": [{"text": "a"}]}, "a"),
        ({"type": "response.output_text.delta", "delta": "a"}, "a"),
        ({"type": "response.completed"}, ""),
    ],
)
def test_what_an_event_adds(event: Any, text: str) -> None:  # noqa: ANN401
    assert text_in(event) == text


def test_quantiles() -> None:
    assert quantile([3, 1, 2, 4], 0.5) == 3
    assert quantile([], 0.5) == 0
    assert median_and_p99(range(1000)) == (500, 990)
    assert median_and_p99([]) == (0, 0)
