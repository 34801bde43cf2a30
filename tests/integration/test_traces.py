"""Every request is one whole trace, as a collector gets it: caller > SERVER > one CLIENT per attempt > mock model."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, ExitStack, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision

from gateway.telemetry.otlp import OtlpHttpExporter
from gateway.telemetry.tracing import Tracer
from mock_model.serve import MockModel
from mock_model.settings import Settings as MockSettings
from testkit.http import Answer
from testkit.polling import until
from testkit.traces import Span, Trace
from tests.integration.collector import Collector
from tests.integration.gateways import Gateway, StartGateway, patient

CALLER_TRACE, CALLER_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01"}
SECRET = "a secret nobody may read"
LONG = 3600.0


class Stack:
    """A gateway and its mock models, all of them exporting to one collector."""

    def __init__(self, gateway: Gateway, collector: Collector, mocks: list[MockModel]) -> None:
        self.gateway = gateway
        self.collector = collector
        self.mocks = mocks

    @property
    def mock(self) -> MockModel:
        """The first mock model."""
        return self.mocks[0]

    async def chat(self, **changes: Any) -> tuple[Answer, Trace]:  # noqa: ANN401
        """Post a chat prompt; its answer and its whole trace."""
        before = self._calls()
        answer = await self.gateway.chat(**changes)
        return answer, await self.trace_of(answer.headers, calls=self._calls() - before)

    async def trace_of(self, headers: Any, *, calls: int) -> Trace:  # noqa: ANN401
        """The trace that an answer names, with the spans of so many calls of mock models."""
        spans = 1 + int(headers["x-gateway-attempts"]) + calls
        return await self.collector.trace(headers["x-trace-id"], spans=spans)

    def _calls(self) -> int:
        return sum(mock.journal.total for mock in self.mocks)


StartStack = Callable[..., Awaitable[Stack]]


@pytest.fixture
async def start_stack(collector: Collector, start_gateway: StartGateway) -> AsyncIterator[StartStack]:
    """Start a traced gateway before a traced mock model, or `backends`, or (a folder for `fallback`) two targets."""
    async with AsyncExitStack() as stack:

        async def start_mock(**settings: Any) -> MockModel:  # noqa: ANN401
            provider = TracerProvider(resource=Resource({"service.name": "mock-model"}), shutdown_on_exit=False)
            exporter = OTLPSpanExporter(endpoint=collector.endpoint)
            provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=20))
            stack.push_async_callback(asyncio.to_thread, provider.shutdown)
            defaults = {"port": 0, "control_port": 0, "mock_ttft": 0, "mock_token_interval": 0}
            mock = MockModel(MockSettings(**(defaults | settings)), tracer_provider=provider)
            return await stack.enter_async_context(mock)

        async def start(
            *backends: str,
            fallback: Path | None = None,
            mock_settings: dict[str, Any] | None = None,
            **settings: Any,  # noqa: ANN401
        ) -> Stack:
            count = 2 if fallback else 0 if backends else 1
            mocks = [await start_mock(**(mock_settings or {})) for _ in range(count)]
            if fallback:
                settings["gateway_config"] = routes(fallback, *(mock.url for mock in mocks))
            else:
                backends = backends or tuple(mock.url for mock in mocks)
            settings.setdefault("gateway_backoff_initial", 0.01)
            exporter = OtlpHttpExporter(endpoint=collector.endpoint)
            gateway = await patient(start_gateway)(*backends, exporter=exporter, **settings)
            return Stack(gateway, collector, mocks)

        yield start


def routes(folder: Path, primary: str, secondary: str) -> Path:
    """A configuration with one route over two targets of one replica each."""
    config = {
        "backends": {"primary": {"url": primary}, "secondary": {"url": secondary}},
        "routes": [{"model": "*", "targets": [{"backend": "primary"}, {"backend": "secondary"}]}],
    }
    file = folder / "routes.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")
    return file


# The whole tree, and what is on it.


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
    }
    assert server.start <= attempt.start <= attempt.end <= server.end


@pytest.mark.parametrize(
    ("path", "changes", "operation", "reasons"),
    [
        ("/v1/chat/completions", {}, "chat", ["stop"]),
        ("/v1/completions", {"prompt": "Hello"}, "text_completion", ["stop"]),
        ("/v1/responses", {"input": "Hello"}, "chat", ["completed"]),
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
    assert found["gen_ai.usage.input_tokens"] > 0
    assert found.get("gen_ai.response.finish_reasons") == reasons
    assert "gen_ai.request.stream" not in found


@pytest.mark.parametrize(
    ("path", "changes", "reasons"),
    [
        ("/v1/chat/completions", {"stream_options": {"include_usage": True}}, ["stop"]),
        ("/v1/completions", {"prompt": "Hello", "stream_options": {"include_usage": True}}, ["stop"]),
        ("/v1/responses", {"input": "Hello"}, ["completed"]),
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


# Failures, and what was decided about them.


async def test_a_retry_is_a_second_attempt_with_its_backoff(start_stack: StartStack) -> None:
    stack = await start_stack()
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 2}])
    answer, trace = await stack.chat(headers=CALLER)

    assert answer.status == 200
    assert trace.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT 500 backend-1 status_500 -> retry, error",
        "    mock-model fault",
        "  CLIENT 500 backend-1 status_500 -> retry, error",
        "    mock-model fault",
        "  CLIENT 200 backend-1 ok -> answered, unset",
        "    mock-model complete",
    ]
    first, second, third = (span.attributes for span in trace.attempts)
    assert "http.request.resend_count" not in first
    assert [second["http.request.resend_count"], third["http.request.resend_count"]] == [1, 2]
    assert first["error.type"] == second["error.type"] == "500"
    assert "error.type" not in third
    assert "gateway.backoff_seconds" not in first
    backoffs = [second["gateway.backoff_seconds"], third["gateway.backoff_seconds"]]
    assert trace.server.events_named("gateway.backoff") == [
        {"gateway.backoff_seconds": backoffs[0], "gateway.attempt": 2},
        {"gateway.backoff_seconds": backoffs[1], "gateway.attempt": 3},
    ]
    assert [first["gateway.retry_budget.left"], third["gateway.retry_budget.left"]] == [10, 8]
    assert first["gateway.deadline.left_seconds"] > third["gateway.deadline.left_seconds"]
    assert "error.type" not in trace.server.attributes
    assert "gateway.retry.stop_reason" not in trace.server.attributes
    assert trace.server.attributes["gateway.attempts"] == 3


async def test_a_retry_after_is_on_the_attempt_that_got_it_and_the_wait_on_the_next(start_stack: StartStack) -> None:
    stack = await start_stack()
    stack.mock.set_faults(
        [{"kind": "status", "with": {"status": 429, "headers": {"retry-after-ms": "70"}}, "times": 1}]
    )
    _, trace = await stack.chat()

    first, second = (span.attributes for span in trace.attempts)
    assert first["gateway.retry_after_seconds"] == pytest.approx(0.07)
    assert first["gateway.decision"] == "retry"
    assert second["gateway.backoff_seconds"] >= 0.07


async def test_the_last_failure_says_why_nothing_followed(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_max_attempts=2)
    stack.mock.set_faults([{"kind": "status", "with": {"status": 503}}])
    answer, trace = await stack.chat(headers=CALLER)

    assert answer.status == 503
    assert trace.tree == [
        "SERVER 503 backend_error, error",
        "  CLIENT 503 backend-1 status_503 -> retry, error",
        "    mock-model fault",
        "  CLIENT 503 backend-1 status_503 -> gave up: attempts, error",
        "    mock-model fault",
    ]
    assert trace.server.attributes["error.type"] == "503"
    assert trace.server.attributes["gateway.retry.stop_reason"] == "attempts"


async def test_a_retry_the_budget_refuses_says_so(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_retry_budget=0, gateway_retry_floor=0)
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    _, trace = await stack.chat()

    assert trace.tree[1] == "  CLIENT 500 backend-1 status_500 -> gave up: budget, error"
    assert trace.attempts[0].attributes["gateway.retry_budget.left"] == 0
    assert trace.server.attributes["gateway.retry.stop_reason"] == "budget"


async def test_a_rejected_prompt_is_the_callers_fault_for_the_server_span(start_stack: StartStack) -> None:
    stack = await start_stack()
    stack.mock.set_faults([{"kind": "status", "with": {"status": 422}}])
    answer, trace = await stack.chat()

    assert answer.status == 422
    assert trace.tree == [
        "SERVER 422 backend_error, unset",
        "  CLIENT 422 backend-1 status_422 -> gave up: not retryable, error",
        "    mock-model fault",
    ]
    assert trace.attempts[0].attributes["error.type"] == "422"
    assert "error.type" not in trace.server.attributes


async def test_a_fallback_leads_to_the_next_target(start_stack: StartStack, tmp_path: Path) -> None:
    stack = await start_stack(fallback=tmp_path)
    stack.mocks[0].set_faults([{"kind": "status", "with": {"status": 401}}])
    answer, trace = await stack.chat(headers=CALLER)

    assert answer.headers["x-gateway-backend"] == "secondary"
    assert trace.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT 401 primary auth_error -> fallback, error",
        "    mock-model fault",
        "  CLIENT 200 secondary ok -> answered, unset",
        "    mock-model complete",
    ]
    assert trace.attempts[0].attributes["error.type"] == "auth_error"
    assert trace.attempts[1].attributes["http.request.resend_count"] == 1
    assert "gateway.retry.stop_reason" not in trace.server.attributes


async def test_a_target_that_is_passed_over_is_told(start_stack: StartStack, tmp_path: Path) -> None:
    stack = await start_stack(
        fallback=tmp_path, gateway_breaker_failures=1, gateway_breaker_open_seconds=LONG, gateway_breaker_open_max=LONG
    )
    first, second = stack.mocks
    first.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    await stack.chat()
    answer, passed = await stack.chat()

    assert answer.status == 200
    skipped = {"gateway.skip_reason": "breaker"}
    assert passed.server.events_named("gateway.target_skipped") == [{"gateway.backend": "primary", **skipped}]

    second.set_faults([{"kind": "status", "with": {"status": 500}, "times": 1}])
    await stack.chat()
    for replica in stack.gateway.parts.pool.replicas[:1]:
        replica.breaker._until = 0.0  # the primary's open time is over, the secondary's is not
    first.set_faults([{"kind": "status", "with": {"status": 429}}])
    _, failed = await stack.chat()

    assert failed.server.events_named("gateway.target_skipped") == [{"gateway.backend": "secondary", **skipped}]
    assert failed.server.attributes["gateway.retry.stop_reason"] == "breaker"
    assert failed.attempts[-1].attributes["gateway.decision"] == "gave up: breaker"


async def test_each_attempt_names_the_model_it_asked_for(start_stack: StartStack, tmp_path: Path) -> None:
    stack = await start_stack(fallback=tmp_path, gateway_max_attempts=1)
    stack.mocks[0].set_faults([{"kind": "status", "with": {"status": 500}}])
    stack.gateway.parts.pool.routes[0].targets[1].model = "small-model"
    _, trace = await stack.chat(model="large-model")

    assert trace.server.attributes["gen_ai.request.model"] == "large-model"
    assert [a.attributes["gen_ai.request.model"] for a in trace.attempts] == ["large-model", "small-model"]


async def test_the_first_token_is_that_of_the_attempt_that_answered(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_backoff_initial=0.0)
    stack.mock.set_faults([{"kind": "cut", "with": {"after_events": 4}, "times": 1}])
    answer, trace = await stack.chat(stream=True, headers={"x-gateway-commit": "complete"})

    assert answer.attempts == 2
    first, second = trace.attempts
    (moment,) = [at for name, _, at in trace.server.events if name == "gateway.first_token"]
    assert second.start <= moment <= second.end
    assert first.end < moment


async def test_a_dead_kept_alive_connection_is_an_attempt_that_is_sent_again(start_stack: StartStack) -> None:
    stack = await start_stack()
    await stack.chat()
    stack.mock.set_faults([{"kind": "reset", "times": 1}])
    answer, trace = await stack.chat(headers=CALLER)

    assert answer.status == 200
    assert trace.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT None backend-1 stale_connection -> resend, error",
        "    mock-model fault",
        "  CLIENT 200 backend-1 ok -> answered, unset",
        "    mock-model complete",
    ]
    assert trace.attempts[0].attributes["error.type"] == "stale_connection"
    assert trace.attempts[1].attributes["http.request.resend_count"] == 1
    assert "gateway.backoff_seconds" not in trace.attempts[1].attributes


async def test_a_refused_connection_is_an_attempt_without_an_other_side(start_stack: StartStack) -> None:
    stack = await start_stack("http://127.0.0.1:1", gateway_max_attempts=2)
    answer, trace = await stack.chat(headers=CALLER)

    assert answer.status == 502
    assert trace.tree == [
        "SERVER 502 backend_connection_error, error",
        "  CLIENT None backend-1 connection_error -> retry, error",
        "  CLIENT None backend-1 connection_error -> gave up: attempts, error",
    ]
    assert trace.attempts[0].attributes["error.type"] == "connection_error"
    assert "http.response.status_code" not in trace.attempts[0].attributes
    assert trace.attempts[0].message
    assert trace.server.attributes["error.type"] == "502"
    assert trace.server.message


@pytest.mark.parametrize(
    ("fault", "stream", "timer", "status"),
    [
        ({"kind": "hang_before_headers"}, False, "answer", None),
        ({"kind": "hang_before_headers"}, True, "first_token", None),
        ({"kind": "slow_first_token", "with": {"delay": LONG}}, True, "first_token", 200),
        ({"kind": "stall"}, False, "idle", 200),
        ({"kind": "hang_after_headers"}, True, "idle", 200),
    ],
)
async def test_a_timer_that_fires_is_named(
    start_stack: StartStack, fault: dict[str, Any], timer: str, status: int | None, *, stream: bool
) -> None:
    timeouts = {f"gateway_{name}_timeout": LONG for name in ("answer", "first_token", "idle")}
    stack = await start_stack(gateway_max_attempts=1, **(timeouts | {f"gateway_{timer}_timeout": 0.6}))
    stack.mock.set_faults([fault])
    answer, trace = await stack.chat(stream=stream)

    assert answer.status == 504
    (attempt,) = trace.attempts
    assert attempt.attributes["gateway.timer"] == timer
    assert attempt.attributes["error.type"] == attempt.attributes["gateway.attempt.outcome"] == f"{timer}_timeout"
    assert attempt.attributes.get("http.response.status_code") == status
    assert attempt.seconds >= 0.59
    why = trace.server.attributes["gateway.retry.stop_reason"]
    assert why in {"attempts", "no other replica"}
    assert trace.tree == [
        "SERVER 504 backend_timeout, error",
        f"  CLIENT {status} backend-1 {timer}_timeout -> gave up: {why}, error",
        "    mock-model caller_left",
    ]
    assert trace.server.attributes["error.type"] == "504"


async def test_a_connect_timeout_is_named(start_stack: StartStack) -> None:
    with closing(socket.socket()) as full, ExitStack() as others:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        for _ in range(3):  # fill the queue of connections that nobody accepts
            other = others.enter_context(closing(socket.socket()))
            other.setblocking(False)
            other.connect_ex(("127.0.0.1", port))
        stack = await start_stack(f"http://127.0.0.1:{port}", gateway_connect_timeout=0.2, gateway_max_attempts=1)
        answer, trace = await stack.chat()

    assert answer.error["param"] == "connect"
    assert trace.tree[1] == "  CLIENT None backend-1 connect_timeout -> gave up: attempts, error"
    assert trace.attempts[0].attributes["gateway.timer"] == "connect"
    assert trace.attempts[0].attributes["error.type"] == "connect_timeout"


@pytest.mark.parametrize("stream", [False, True])
async def test_the_deadline_ends_the_attempt_under_way(start_stack: StartStack, *, stream: bool) -> None:
    stack = await start_stack(gateway_request_deadline=0.8)
    stack.mock.set_faults([{"kind": "hang_before_headers"}])
    answer, trace = await stack.chat(stream=stream, headers=CALLER)

    assert answer.status == 504
    assert trace.tree == [
        "SERVER 504 deadline_exceeded, error",
        "  CLIENT None backend-1 deadline_exceeded -> gave up: deadline, error",
        "    mock-model caller_left",
    ]
    assert trace.attempts[0].attributes["error.type"] == "deadline_exceeded"
    assert 0 < trace.attempts[0].attributes["gateway.deadline.left_seconds"] <= 0.8
    assert trace.server.attributes["gateway.retry.stop_reason"] == "deadline"


async def test_the_deadline_after_the_commit_fails_both_spans(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_request_deadline=1.0)
    stack.mock.set_faults([{"kind": "stall", "with": {"after_events": 4}}])
    answer, trace = await stack.chat(stream=True)

    assert answer.status == 200
    assert b"deadline_exceeded" in answer.body
    assert trace.tree == [
        "SERVER 200 deadline_exceeded, error",
        "  CLIENT 200 backend-1 deadline_exceeded -> gave up: deadline, error",
        "    mock-model caller_left",
    ]
    assert trace.server.attributes["error.type"] == "deadline_exceeded"


@pytest.mark.parametrize(
    ("fault", "outcome", "code", "ended"),
    [
        ({"kind": "cut", "with": {"after_events": 4}}, "invalid_response", "backend_invalid_response", "fault"),
        (
            {"kind": "cut", "with": {"after_events": 4, "how": "reset"}},
            "invalid_response",
            "backend_invalid_response",
            "fault",
        ),
        (
            {"kind": "malformed_event", "with": {"after_events": 4}},
            "invalid_response",
            "backend_invalid_response",
            "caller_left",
        ),
        ({"kind": "stall", "with": {"after_events": 4}}, "idle_timeout", "backend_timeout", "caller_left"),
    ],
)
async def test_a_stream_that_breaks_after_the_commit_is_an_error_under_a_200(
    start_stack: StartStack, fault: dict[str, Any], outcome: str, code: str, ended: str
) -> None:
    stack = await start_stack(gateway_idle_timeout=0.6, mock_settings={"mock_token_interval": 0.1})
    stack.mock.set_faults([fault])
    answer, trace = await stack.chat(stream=True, headers=CALLER)

    assert answer.status == 200
    assert trace.tree == [
        f"SERVER 200 {code}, error",
        f"  CLIENT 200 backend-1 {outcome} -> gave up: committed, error",
        f"    mock-model {ended}",
    ]
    assert trace.server.attributes["error.type"] == code
    assert trace.server.attributes["gateway.retry.stop_reason"] == "committed"
    assert trace.server.attributes["gen_ai.response.finish_reasons"] == ["error"]
    assert trace.attempts[0].attributes["error.type"] == outcome
    assert len(trace.server.events_named("gateway.first_token")) == 1


# Callers who leave.


async def leave(stack: Stack, *, after: int, **body: Any) -> None:  # noqa: ANN401
    """Post a chat prompt and leave: once the mock model has it, or after so many bytes of the answer."""
    document = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], **body}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        posting = asyncio.create_task(
            session.post(f"{stack.gateway.url}/v1/chat/completions", json=document, headers=CALLER)
        )
        await stack.mock.called(1)
        if not after:
            posting.cancel()
            await asyncio.gather(posting, return_exceptions=True)
            return
        answer = await posting
        await answer.content.readexactly(after)
        answer.close()


async def test_a_caller_who_leaves_before_the_answer_is_nobodys_failure(start_stack: StartStack) -> None:
    stack = await start_stack()
    stack.mock.set_faults([{"kind": "hang_before_headers"}])
    await leave(stack, after=0)
    trace = await stack.collector.trace(CALLER_TRACE, spans=3)

    assert trace.tree == [
        "SERVER 499 client_closed_request, unset",
        "  CLIENT None backend-1 cancelled -> gave up: cancelled, unset",
        "    mock-model caller_left",
    ]
    assert trace.server.attributes["error.type"] == "client_closed_request"
    assert trace.attempts[0].attributes["error.type"] == "cancelled"


async def test_a_caller_who_leaves_a_stream_is_nobodys_failure(start_stack: StartStack) -> None:
    stack = await start_stack(mock_settings={"mock_token_interval": 0.05, "mock_tokens": 2000})
    await leave(stack, after=10, stream=True)
    trace = await stack.collector.trace(CALLER_TRACE, spans=3)

    assert trace.tree == [
        "SERVER 200 client_closed_request, unset",
        "  CLIENT 200 backend-1 cancelled -> gave up: cancelled, unset",
        "    mock-model caller_left",
    ]
    assert trace.server.attributes["error.type"] == "client_closed_request"
    assert trace.server.attributes["gen_ai.response.finish_reasons"] == ["error"]


async def test_a_caller_who_leaves_during_a_backoff_is_told_in_the_last_attempts_decision(
    start_stack: StartStack,
) -> None:
    stack = await start_stack()
    stack.mock.set_faults([{"kind": "status", "with": {"status": 503, "headers": {"retry-after": "9"}}}])
    async with aiohttp.ClientSession() as session:
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
        posting = asyncio.create_task(
            session.post(f"{stack.gateway.url}/v1/chat/completions", json=body, headers=CALLER)
        )
        (replica,) = stack.gateway.parts.pool.replicas
        await until(lambda: replica.last_failed)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
    trace = await stack.collector.trace(CALLER_TRACE, spans=3)

    assert trace.tree == [
        "SERVER 499 client_closed_request, unset",
        "  CLIENT 503 backend-1 status_503 -> gave up: cancelled, error",
        "    mock-model fault",
    ]


async def test_a_request_cut_off_at_the_end_of_a_stop_has_its_whole_trace(start_stack: StartStack) -> None:
    stack = await start_stack()
    stack.mock.set_faults([{"kind": "hang_before_headers"}])
    asking = asyncio.create_task(stack.gateway.chat(headers=CALLER))
    await stack.mock.called(1)
    stack.gateway.parts.running.cut_off()
    answer = await asking
    trace = await stack.collector.trace(CALLER_TRACE, spans=3)

    assert answer.error["code"] == "gateway_draining"
    assert trace.tree == [
        "SERVER 503 gateway_draining, error",
        "  CLIENT None backend-1 cancelled -> gave up: cancelled, unset",
        "    mock-model caller_left",
    ]


# Requests without an attempt.


def breaker_event(old: str, new: str) -> dict[str, str]:
    return {"gateway.backend": "backend-1", "gateway.breaker.from": old, "gateway.breaker.to": new}


async def test_an_open_breaker_makes_no_attempt_and_its_changes_are_events(start_stack: StartStack) -> None:
    stack = await start_stack(
        gateway_breaker_failures=2, gateway_breaker_open_seconds=LONG, gateway_breaker_open_max=LONG
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
    assert stack.mock.journal.total == 2


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


# Names that come from outside.


async def raw(gateway: Gateway, request: bytes) -> bytes:
    """Send bytes as they are; the whole answer."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.client.port)
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


async def spans_of_all(stack: Stack, requests: int) -> list[Span]:
    """The SERVER spans of so many requests."""

    def servers() -> list[Span]:
        return [span for span in stack.collector.spans if span.kind == "SERVER" and span.service == "gateway"]

    await until(lambda: len(servers()) >= requests, lambda: f"{len(servers())} of {requests} SERVER spans came")
    return servers()


async def test_no_span_is_named_by_a_caller(start_stack: StartStack) -> None:
    stack = await start_stack()
    requests = [
        b"FOOBAR /v1/chat/completions HTTP/1.1\r\n",
        b"BREW / HTTP/1.1\r\n",
        b"PROPFIND /v1/chat/completions HTTP/1.1\r\n",
        b"UNSUBSCRIBE / HTTP/1.1\r\n",
        b"GET /v1/models/attacker-1 HTTP/1.1\r\n",
        b"GET /v1/models/%ff%fe HTTP/1.1\r\n",
        b"GET /v1/models/\xff\xfe HTTP/1.1\r\n",
        b"GET /attacker-2?attacker-3 HTTP/1.1\r\n",
        b"POST //v1/chat/completions HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nattacker-4\r\n",
    ]
    for request in requests:
        head = await raw(stack.gateway, request + b"Host: attacker\r\nConnection: close\r\n\r\n")
        assert head.split()[1].startswith(b"4"), (request, head)
    spans = await spans_of_all(stack, len(requests))

    assert {span.name for span in spans} <= {
        "HTTP",
        "HTTP /",
        "HTTP /v1/chat/completions",
        "GET",
        "GET /v1/models/{id}",
        "POST",
    }
    assert {span.attributes["http.request.method"] for span in spans} == {"_OTHER", "GET", "POST"}
    assert not [body for body in stack.collector.bodies if b"attacker" in body]


@pytest.mark.parametrize(
    "hostile", [b"\xff\xfe\xed\xa0\x80", b"a" * 129, b"a b", b"\x7f", "é".encode(), b"", "\u202e".encode()]
)
async def test_a_request_id_that_is_not_visible_ascii_is_replaced_everywhere(
    start_stack: StartStack, hostile: bytes
) -> None:
    stack = await start_stack()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}]}).encode()
    answer = await raw(
        stack.gateway,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nx-request-id: " + hostile + b"\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body) + body,
    )
    head, _, rest = answer.partition(b"\r\n\r\n")
    spans = await spans_of_all(stack, 1)

    if head.split()[1] != b"200":  # what no header may hold is malformed HTTP
        assert head.split()[1] == b"400", head
        assert json.loads(rest)["error"]["code"] == "invalid_request"
        return
    (span,) = spans
    ours = span.attributes["gateway.request_id"]
    assert ours.startswith("req-")
    assert f"x-request-id: {ours}".encode() in head
    assert stack.mock.journal.calls[0].request_id == ours


@pytest.mark.parametrize(
    "traceparent",
    [
        "garbage",
        f"00-{CALLER_TRACE}-{CALLER_SPAN}",
        f"00-{CALLER_TRACE}-{CALLER_SPAN}-01-more",
        f"ff-{CALLER_TRACE}-{CALLER_SPAN}-01",
        f"00-{CALLER_TRACE.upper()}-{CALLER_SPAN}-01",
        f"00-{'0' * 32}-{CALLER_SPAN}-01",
        f"00-{CALLER_TRACE}-{'0' * 16}-01",
        f"00-+{CALLER_TRACE[1:]}-{CALLER_SPAN}-01",
    ],
)
async def test_a_malformed_traceparent_begins_a_new_trace(start_stack: StartStack, traceparent: str) -> None:
    stack = await start_stack()
    answer, trace = await stack.chat(headers={"traceparent": traceparent})

    assert answer.status == 200
    assert trace.server.parent_id == ""
    assert trace.server.trace_id not in traceparent.lower()


async def test_the_state_of_a_trace_goes_on_with_it_and_not_with_another(start_stack: StartStack) -> None:
    stack = await start_stack()
    _, joined = await stack.chat(headers={**CALLER, "tracestate": "vendor=abc"})
    _, begun = await stack.chat(headers={"traceparent": "nonsense", "tracestate": "vendor=abc"})

    assert {span.trace_state for span in joined.spans} == {"vendor=abc"}
    assert {span.trace_state for span in begun.spans} == {""}


async def test_a_later_version_of_traceparent_is_joined(start_stack: StartStack) -> None:
    stack = await start_stack()
    _, trace = await stack.chat(headers={"traceparent": f"cc-{CALLER_TRACE}-{CALLER_SPAN}-01-what-comes"})

    assert trace.server.trace_id == CALLER_TRACE
    assert trace.server.parent_id == CALLER_SPAN


async def test_probes_and_scrapes_are_not_traced(start_stack: StartStack) -> None:
    stack = await start_stack()
    for path in ("/livez", "/readyz", "/health", "/metrics"):
        async with stack.gateway.client.get(path, headers=CALLER) as response:
            assert response.status == 200
        async with stack.gateway.client.post(path, headers=CALLER) as response:
            assert response.status == 405
    async with stack.gateway.client.get("/v1/models") as response:
        assert response.status == 200
    spans = await spans_of_all(stack, 1)

    assert [span.name for span in spans] == ["GET /v1/models"]


# Texts.


async def tell_secrets(stack: Stack) -> list[str]:
    """Send a secret in every way that a request can go; the texts of the answers."""
    texts = []
    prompt = {"messages": [{"role": "user", "content": SECRET}]}
    faults: list[list[dict[str, Any]]] = [
        [],
        [{"kind": "status", "with": {"status": 400, "body": {"error": {"message": SECRET, "code": SECRET}}}}],
        [{"kind": "status", "with": {"status": 500, "body": SECRET}}],
        [{"kind": "status", "with": {"status": 200, "body": {"error": {"message": SECRET}}}}],
        [{"kind": "not_json"}],
        [{"kind": "cut", "with": {"after_events": 4}}],
        [{"kind": "malformed_event", "with": {"after_events": 4}}],
    ]
    for fault in faults:
        for stream in (False, True):
            stack.mock.set_faults(fault)
            answer = await stack.gateway.chat(stream=stream, headers={"connection": "close"}, **prompt)
            if not fault and not stream:
                texts.append(json.loads(answer.body)["choices"][0]["message"]["content"])
    stack.mock.set_faults([])
    for bad in ({"messages": SECRET}, {"messages": [{"role": SECRET, "content": 1}], "n": SECRET}, {"model": 1}):
        await stack.gateway.chat(**{**prompt, **bad})
    for path in ("/v1/completions", "/v1/embeddings", "/v1/responses"):
        await stack.gateway.chat(path=path, prompt=SECRET, input=SECRET)
    async with stack.gateway.client.post(
        "/v1/chat/completions", data=f'{{"messages": [{SECRET}', headers={"content-type": "application/json"}
    ) as response:
        assert response.status == 400
    async with stack.gateway.client.post(f"/v1/{SECRET}?{SECRET}", headers={"authorization": f"Bearer {SECRET}"}):
        pass
    return texts


async def test_no_text_of_a_prompt_or_an_answer_is_in_spans_or_logs(
    start_stack: StartStack, caplog: pytest.LogCaptureFixture
) -> None:
    stack = await start_stack(gateway_breaker_failures=1000, gateway_max_attempts=2)
    (text,) = await tell_secrets(stack)
    await spans_of_all(stack, 22)
    await until(lambda: stack.gateway.log.getvalue().count("\n") >= 22)
    seen = b"".join(stack.collector.bodies) + stack.gateway.log.getvalue().encode() + caplog.text.encode()

    assert SECRET.encode() not in seen
    assert SECRET.rsplit(maxsplit=1)[-1].encode() not in seen
    assert text.encode() not in seen
    health = json.dumps(await stack.gateway.health())
    assert SECRET not in health + await stack.gateway.metrics()


async def test_texts_are_on_the_server_span_where_capturing_is_on(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_capture_content=True)
    prompt = {"messages": [{"role": "user", "content": SECRET}]}
    plain, unstreamed = await stack.chat(**prompt)
    events, streamed = await stack.chat(stream=True, **prompt)

    chunks = [json.loads(event[6:]) for event in events.body.split(b"\n\n")[:-2]]
    text = json.loads(plain.body)["choices"][0]["message"]["content"]
    for trace, answer in (
        (unstreamed, text),
        (streamed, "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)),
    ):
        assert json.loads(trace.server.attributes["gen_ai.input.messages"]) == [
            {"role": "user", "parts": [{"type": "text", "content": SECRET}]}
        ]
        assert len(answer) > 20
        assert json.loads(trace.server.attributes["gen_ai.output.messages"]) == [
            {"role": "assistant", "parts": [{"type": "text", "content": answer}], "finish_reason": "stop"}
        ]
        assert SECRET not in str(trace.attempts[0].attributes)
    assert SECRET not in stack.gateway.log.getvalue()


async def test_captured_texts_are_bounded(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_capture_content=True, mock_settings={"mock_tokens": 20_000})
    for stream in (False, True):
        _, trace = await stack.chat(stream=stream, messages=[{"role": "user", "content": "x" * 100_000}])

        for name in ("gen_ai.input.messages", "gen_ai.output.messages"):
            (message,) = json.loads(trace.server.attributes[name])
            assert len(message["parts"][0]["content"]) == 16_384


async def test_what_a_backend_says_about_its_answer_is_bounded(start_stack: StartStack) -> None:
    stack = await start_stack()
    long = "x" * 100_000
    body = {"id": long, "model": long, "choices": [{"index": 0, "finish_reason": long}], "usage": {}}
    stack.mock.set_faults([{"kind": "status", "with": {"status": 200, "body": body}}])
    answer, trace = await stack.chat()

    assert answer.status == 200
    assert max(len(str(value)) for value in trace.server.attributes.values()) < 1000


@pytest.mark.parametrize("tokens", [-5, 2**70, 10**400])
async def test_absurd_token_counts_of_a_backend_cost_nothing_but_themselves(
    start_stack: StartStack, tokens: int
) -> None:
    stack = await start_stack()
    body = json.dumps(
        {"id": "x", "model": "m", "choices": [], "usage": {"prompt_tokens": tokens, "completion_tokens": 3}}
    )
    headers = {"content-type": "application/json"}
    stack.mock.set_faults([{"kind": "status", "with": {"status": 200, "body": body, "headers": headers}}])
    answer, trace = await stack.chat()

    assert answer.status == 200
    assert trace.tree[0] == "SERVER 200 ok, unset"
    assert "gen_ai.usage.input_tokens" not in trace.server.attributes
    assert trace.server.attributes["gen_ai.usage.output_tokens"] == 3
    assert 'gateway_tokens_total{direction="output"} 3.0' in await stack.gateway.metrics()
    await until(lambda: '"output_tokens":3' in stack.gateway.log.getvalue())


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**30])
async def test_absurd_numbers_of_a_caller_are_not_falsified(start_stack: StartStack, value: int) -> None:
    stack = await start_stack()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": value})
    async with stack.gateway.client.post(
        "/v1/chat/completions", data=body, headers={"content-type": "application/json"}
    ) as response:
        assert response.status in {200, 400}, "a matter of the backend's taste"
    (span,) = await spans_of_all(stack, 1)

    assert span.attributes.get("gen_ai.request.max_tokens") in {None, str(value)}


# Sampling.


def sample(monkeypatch: pytest.MonkeyPatch, ratio: str) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("always_on", ""),
        ("always_off", ""),
        ("traceidratio", "0.3"),
        ("parentbased_always_on", ""),
        ("parentbased_always_off", ""),
        ("parentbased_traceidratio", "0"),
        ("parentbased_traceidratio", "0.3"),
        ("parentbased_traceidratio", "1"),
    ],
)
def test_new_traces_are_sampled_as_the_sdk_samples_them(
    monkeypatch: pytest.MonkeyPatch, name: str, argument: str
) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", name)
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", argument)
    tracer = Tracer(None)
    sampler = TracerProvider(shutdown_on_exit=False).sampler
    for _ in range(500):
        trace_id, _, parent, sampled = tracer.decide("POST", "/v1/chat/completions", None)
        decision = sampler.should_sample(None, trace_id, "POST /v1/chat/completions").decision
        assert parent is None
        assert sampled is (decision is Decision.RECORD_AND_SAMPLE), f"{trace_id:032x}"


async def marked(stack: Stack) -> None:
    """A request of our own that is exported for sure: what came before it is either here or was left out."""
    async with aiohttp.request("GET", f"{stack.gateway.url}/v1/models", headers=CALLER) as response:
        assert response.status == 200
    await until(lambda: any(span.name == "GET /v1/models" for span in stack.collector.spans))


def exported(stack: Stack) -> list[str]:
    """What the gateway exported, without the mark."""
    return [str(span) for span in stack.collector.spans if span.name != "GET /v1/models"]


def flags(stack: Stack) -> list[str]:
    """The sampled flags the mock model saw."""
    return [str(call.traceparent)[-2:] for call in stack.mock.journal.calls]


async def test_what_the_sampler_leaves_out_is_not_exported(
    start_stack: StartStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(monkeypatch, "0")
    stack = await start_stack()
    answers = [await stack.gateway.chat(stream=stream) for stream in (False, True)]
    await marked(stack)

    assert [answer.status for answer in answers] == [200, 200]
    assert all(len(answer.headers["x-trace-id"]) == 32 for answer in answers)
    assert exported(stack) == []
    assert flags(stack) == ["00", "00"]


@pytest.mark.parametrize("keep", [10, "off"])
async def test_failed_and_retried_requests_are_exported_whole_whatever_the_sampler_says(
    start_stack: StartStack, monkeypatch: pytest.MonkeyPatch, keep: float | str
) -> None:
    sample(monkeypatch, "0")
    stack = await start_stack(gateway_trace_keep_slow=keep, gateway_max_attempts=2)
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}, "times": 3}])
    failed = await stack.gateway.chat()
    retried = await stack.gateway.chat()
    stack.mock.set_faults([{"kind": "cut", "with": {"after_events": 4}}])
    cut = await stack.gateway.chat(stream=True)
    await marked(stack)

    assert [failed.status, retried.status, cut.status] == [500, 200, 200]
    assert flags(stack) == ["00"] * 5
    if keep == "off":
        assert exported(stack) == []
        return
    assert exported(stack) == [
        "SERVER 500 backend_error, error",
        "CLIENT 500 backend-1 status_500 -> retry, error",
        "CLIENT 500 backend-1 status_500 -> gave up: attempts, error",
        "SERVER 200 ok, unset",
        "CLIENT 500 backend-1 status_500 -> retry, error",
        "CLIENT 200 backend-1 ok -> answered, unset",
        "SERVER 200 backend_invalid_response, error",
        "CLIENT 200 backend-1 invalid_response -> gave up: committed, error",
    ]


async def test_a_fallback_is_exported_whatever_the_sampler_says_even_without_a_first_attempt(
    start_stack: StartStack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sample(monkeypatch, "0")
    stack = await start_stack(
        fallback=tmp_path,
        gateway_breaker_failures=1,
        gateway_breaker_open_seconds=LONG,
        gateway_breaker_open_max=LONG,
        gateway_max_attempts=1,
    )
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    for _ in range(2):
        assert (await stack.gateway.chat()).headers["x-gateway-backend"] == "secondary"
    await marked(stack)

    assert stack.mock.journal.total == 1
    assert exported(stack) == [
        "SERVER 200 ok, unset",
        "CLIENT 500 primary status_500 -> fallback, error",
        "CLIENT 200 secondary ok -> answered, unset",
        "SERVER 200 ok, unset",
        "CLIENT 200 secondary ok -> answered, unset",
    ]


@pytest.mark.parametrize("keep", [0.1, "off"])
async def test_a_slow_request_is_exported_whatever_the_sampler_says(
    start_stack: StartStack, monkeypatch: pytest.MonkeyPatch, keep: float | str
) -> None:
    sample(monkeypatch, "0")
    stack = await start_stack(gateway_trace_keep_slow=keep)
    stack.mock.set_faults([{"kind": "latency", "with": {"delay": 0.2}}])
    await stack.gateway.chat()
    await marked(stack)

    kept = ["SERVER 200 ok, unset", "CLIENT 200 backend-1 ok -> answered, unset"]
    assert exported(stack) == ([] if keep == "off" else kept)
    assert flags(stack) == ["00"]


async def test_a_callers_flag_wins_over_the_ratio(start_stack: StartStack, monkeypatch: pytest.MonkeyPatch) -> None:
    sample(monkeypatch, "0")
    stack = await start_stack()
    _, trace = await stack.chat(headers=CALLER)

    assert flags(stack) == ["01"]
    assert trace.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT 200 backend-1 ok -> answered, unset",
        "    mock-model complete",
    ]


async def test_a_caller_who_wants_no_trace_gets_one_only_of_a_failure(start_stack: StartStack) -> None:
    stack = await start_stack(gateway_max_attempts=1)
    unsampled = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"}
    await stack.gateway.chat(headers=unsampled)
    stack.mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    await stack.gateway.chat(headers=unsampled)
    await marked(stack)

    assert flags(stack) == ["00", "00"]
    assert exported(stack) == [
        "SERVER 500 backend_error, error",
        "CLIENT 500 backend-1 status_500 -> gave up: attempts, error",
    ]
    failed = [span for span in stack.collector.spans if span.name != "GET /v1/models"]
    assert {span.trace_id for span in failed} == {CALLER_TRACE}
    assert failed[0].parent_id == CALLER_SPAN
