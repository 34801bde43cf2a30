"""Every request is one whole trace, as a collector gets it: caller > SERVER > one CLIENT per attempt > mock model."""

import asyncio
import json
from typing import Any

import aiohttp
import pytest

from testkit.polling import until
from tests.integration.traced import CALLER, CALLER_SPAN, CALLER_TRACE, LONG, SECRET, StartStack

# The whole tree, and what is on it


async def test_an_answered_prompt_is_one_tree_below_its_caller(start_stack: StartStack) -> None:
    stack = await start_stack()
    answer, trace = await stack.chat(
        temperature=0.5, top_p=0.25, max_tokens=5, n=2, headers={**CALLER, "x-request-id": "mine"}
    )

    assert answer.headers["x-trace-id"] == CALLER_TRACE
    assert trace.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT 200 backend-1 ok -> answered, unset",
        "    mock-model complete",
    ]
    (attempt,) = trace.attempts
    server = trace.server
    assert server.parent_id == CALLER_SPAN
    assert {span.trace_id for span in trace.spans} == {CALLER_TRACE}
    assert {span.name for span in trace.spans} == {"POST /v1/chat/completions"}
    assert stack.mock.journal.calls[0].traceparent == f"00-{CALLER_TRACE}-{attempt.span_id}-01"
    body = json.loads(answer.body)
    first_chunk = server.attributes.pop("gen_ai.response.time_to_first_chunk", None)
    assert first_chunk is None, "not a stream"
    assert server.attributes == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "url.scheme": "http",
        "http.response.status_code": 200,
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "demo-model",
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.25,
        "gen_ai.response.id": body["id"],
        "gen_ai.response.model": "demo-model",
        "gen_ai.response.finish_reasons": ["length", "length"],
        "gen_ai.usage.input_tokens": body["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": body["usage"]["completion_tokens"],
        "gateway.request_id": "mine",
        "gateway.config_generation": 1,
        "gateway.outcome": "ok",
        "gateway.route": "*",
        "gateway.attempts": 1,
    }
    assert server.events == []
    left = attempt.attributes.pop("gateway.deadline.left_seconds")
    assert 0 < left <= 600
    assert attempt.attributes == {
        "http.request.method": "POST",
        "url.full": f"{stack.mock.url}/v1/chat/completions",
        "gen_ai.request.model": "demo-model",
        "server.address": "127.0.0.1",
        "server.port": stack.mock.port,
        "http.response.status_code": 200,
        "gateway.backend": "backend-1",
        "gateway.attempt": 1,
        "gateway.attempt.outcome": "ok",
        "gateway.decision": "answered",
        "gateway.breaker.state": "closed",
        "gateway.retry_budget.left": 10,
        "gateway.backend_request_id": "mine",
    }
    assert server.start <= attempt.start <= attempt.end <= server.end


@pytest.mark.parametrize(
    ("path", "changes", "operation", "reasons"),
    [
        ("/v1/chat/completions", {}, "chat", ["stop"]),
        ("/v1/completions", {"prompt": "Hello"}, "text_completion", ["stop"]),
        ("/v1/responses", {"input": "Hello"}, "chat", ["completed"]),
        ("/v1/messages", {}, "chat", ["end_turn"]),
        ("/v1/embeddings", {"input": "Hello"}, "embeddings", None),
    ],
)
async def test_each_call_has_its_operation_usage_and_finish_reasons(
    start_stack: StartStack, path: str, changes: dict[str, Any], operation: str, reasons: list[str] | None
) -> None:
    stack = await start_stack()
    answer, trace = await stack.chat(path=path, **changes)

    assert answer.status == 200
    found = trace.server.attributes
    assert trace.server.name == f"POST {path}"
    assert trace.attempts[0].name == f"POST {path}"
    assert found["gen_ai.operation.name"] == operation
    assert found["gen_ai.provider.name"] == ("anthropic" if path == "/v1/messages" else "openai")
    assert found["gen_ai.usage.input_tokens"] > 0
    assert found.get("gen_ai.response.finish_reasons") == reasons
    assert "gen_ai.request.stream" not in found


@pytest.mark.parametrize(
    ("path", "changes", "reasons"),
    [
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, ["stop"]),
        ("/v1/completions", {"prompt": "Hello", "stream_options": {"include_usage": True}}, ["stop"]),
        ("/v1/responses", {"input": "Hello"}, ["completed"]),
        ("/v1/messages", {}, ["end_turn"]),
    ],
)
async def test_a_stream_tells_usage_finish_reasons_and_its_first_token(
    start_stack: StartStack, path: str, changes: dict[str, Any], reasons: list[str]
) -> None:
    stack = await start_stack()
    answer, trace = await stack.chat(path=path, stream=True, headers=CALLER, **changes)

    assert answer.status == 200
    assert trace.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT 200 backend-1 ok -> answered, unset",
        "    mock-model complete",
    ]
    found = trace.server.attributes
    assert found["gen_ai.request.stream"] is True
    assert found["gen_ai.usage.input_tokens"] > 0
    assert found["gen_ai.usage.output_tokens"] == 16
    assert found["gen_ai.response.finish_reasons"] == reasons
    assert found["gen_ai.response.id"]
    assert found["gen_ai.response.model"] == "demo-model"
    assert found["gen_ai.response.time_to_first_chunk"] > 0
    assert [name for name, _, _ in trace.server.events] == ["gateway.first_token"]


async def test_the_spans_cover_a_stream_to_its_end(start_stack: StartStack) -> None:
    stack = await start_stack(mock_settings={"mock_token_interval": 0.02})
    _, trace = await stack.chat(stream=True)

    server, (attempt,) = trace.server, trace.attempts
    (mock,) = (span for span in trace.spans if span.service == "mock-model")
    ((_, _, first_token),) = server.events
    assert server.start <= attempt.start <= first_token <= attempt.end <= server.end
    assert (attempt.end - first_token) / 1e9 > 0.2, "15 more tokens, 20 ms apart"
    assert mock.start < first_token < mock.end


# Requests without an attempt


def breaker_event(old: str, new: str) -> dict[str, str]:
    return {"gateway.backend": "backend-1", "gateway.breaker.from": old, "gateway.breaker.to": new}


async def test_an_open_breaker_makes_no_attempt_and_its_changes_are_events(start_stack: StartStack) -> None:
    stack = await start_stack(
        gateway_breaker_failures=1, gateway_breaker_open_seconds=LONG, gateway_breaker_open_max=LONG
    )
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    _, opening = await stack.chat()
    answer, refused = await stack.chat(headers=CALLER)

    assert opening.attempts[-1].attributes["gateway.decision"] == "gave up: breaker"
    assert opening.server.events_named("gateway.breaker") == [breaker_event("closed", "open")]
    assert answer.error["code"] == "backend_unavailable"
    assert refused.tree == ["SERVER 503 backend_unavailable, error"]
    assert refused.server.attributes["gateway.attempts"] == 0
    assert refused.server.attributes["error.type"] == "503"
    assert stack.mock.journal.total == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_attempt_that_closes_a_breaker_says_so(start_stack: StartStack, *, stream: bool) -> None:
    stack = await start_stack(gateway_breaker_failures=1, gateway_breaker_open_seconds=0.05, gateway_max_attempts=1)
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    await stack.chat()
    (replica,) = stack.gateway.parts.pool.replicas
    await until(lambda: replica.breaker.state == "half_open")
    answer, trace = await stack.chat(stream=stream)

    assert answer.status == 200
    assert trace.attempts[0].attributes["gateway.breaker.state"] == "half_open"
    assert trace.server.events_named("gateway.breaker") == [breaker_event("half_open", "closed")]


async def test_an_overloaded_gateway_says_how_long_the_request_queued(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_max_in_flight=1, gateway_max_queue=1, gateway_queue_timeout=0.3)
    stack.mock.set_faults([{"kind": "hang_before_headers"}])
    async with aiohttp.ClientSession() as session:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        posting = asyncio.create_task(session.post(f"{stack.gateway.url}/v1/chat/completions", json=body))
        await stack.mock.called(1)
        answer, trace = await stack.chat(headers=CALLER)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)

    assert answer.error["code"] == "gateway_overloaded"
    assert trace.tree == ["SERVER 503 gateway_overloaded, error"]
    assert trace.server.attributes["gateway.queue_seconds"] >= 0.29
    assert trace.server.attributes["gateway.attempts"] == 0


async def test_bad_input_is_a_server_span_without_fault(start_stack: StartStack) -> None:
    stack = await start_stack()
    answer, trace = await stack.chat(messages=SECRET, headers=CALLER)

    assert answer.status == 400
    assert trace.tree == ["SERVER 400 invalid_request, unset"]
    assert "error.type" not in trace.server.attributes
    assert stack.mock.journal.total == 0


async def test_a_large_answer_keeps_its_status(start_stack: StartStack) -> None:
    stack = await start_stack(mock_settings={"mock_tokens": 20_000})
    answer, trace = await stack.chat()

    assert len(answer.body) > 65_536
    assert trace.tree[0] == "SERVER 200 ok, unset"
