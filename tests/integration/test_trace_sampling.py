"""Which traces are exported: those the sampler takes, and whatever it says, failures, retries and slow requests."""

from pathlib import Path

import aiohttp
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import Decision

from gateway.telemetry.tracing import Tracer
from testkit.polling import until
from tests.integration.gateways import KEY
from tests.integration.traced import CALLER, CALLER_SPAN, CALLER_TRACE, LONG, Stack, StartStack


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
    failed = await stack.gateway.chat(user="failed")
    retried = await stack.gateway.chat(user="retried")
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


STRANGER = {"traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-01", "tracestate": "vendor=abc"}
"""Without a key: wants to be sampled, and to be remembered."""


async def test_calls_without_a_key_are_sampled_by_ratio_alone_and_leave_only_their_outcome(
    start_stack: StartStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(monkeypatch, "0")
    stack = await start_stack(gateway_api_keys=[KEY], gateway_trace_keep_slow=1e-9)
    refused = [
        await stack.gateway.chat(headers={**STRANGER, **headers}, path=path)
        for headers in ({}, {"authorization": "Bearer none of them"})
        for path in ("/v1/chat/completions", "/v1/messages", "/v1/nothing")
    ]
    failed = await stack.gateway.chat(headers={"authorization": f"Bearer {KEY}"}, messages="none")
    await until(lambda: exported(stack))

    assert [answer.status for answer in [*refused, failed]] == [401] * 6 + [400]
    assert exported(stack) == ["SERVER 400 invalid_request, unset"]


async def test_a_call_without_a_key_is_exported_where_the_ratio_takes_it(
    start_stack: StartStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(monkeypatch, "1")
    stack = await start_stack(gateway_api_keys=[KEY])
    unsampled = {**STRANGER, "traceparent": f"00-{CALLER_TRACE}-{CALLER_SPAN}-00"}
    answer = await stack.gateway.chat(headers=unsampled)
    trace = await stack.collector.trace(answer.headers["x-trace-id"], spans=1)

    assert answer.status == 401
    assert trace.tree == ["SERVER 401 invalid_api_key, unset"]
    assert trace.server.trace_state == ""
