"""The trace of a request that fails, is retried, falls back or loses its caller: each attempt, and what followed."""

import asyncio
import socket
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from testkit.polling import until
from tests.integration.traced import CALLER, CALLER_TRACE, LONG, Stack, StartStack

# Failures, and what was decided about them


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

    before, after = trace.attempts
    first, second = before.attributes, after.attributes
    assert first["gateway.retry_after_seconds"] == pytest.approx(0.07)
    assert first["gateway.decision"] == "waited: cooldown"
    assert "gateway.backoff_seconds" not in second
    (cooldown,) = trace.server.events_named("gateway.cooldown")
    assert 0 < cooldown.pop("gateway.cooldown_seconds") <= 0.07, "what was left of it when the attempt had ended"
    assert cooldown == {"gateway.backend": "backend-1"}
    (waited,) = trace.server.events_named("gateway.waited")
    assert (waited["gateway.wait"], waited["gateway.backend"]) == ("cooldown", "backend")
    assert waited["gateway.wait_seconds"] > 0
    assert after.start - before.start >= 0.07e9


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
    first.set_faults([{"kind": "status", "with": {"status": 408}}])
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


# Callers who leave


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
    stack.gateway.parts.in_flight.cut_off()
    answer = await asking
    trace = await stack.collector.trace(CALLER_TRACE, spans=3)

    assert answer.error["code"] == "gateway_draining"
    assert trace.tree == [
        "SERVER 503 gateway_draining, error",
        "  CLIENT None backend-1 cancelled -> gave up: cancelled, unset",
        "    mock-model caller_left",
    ]
