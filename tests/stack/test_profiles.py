"""The profiles `fallback` and `metrics`."""

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from chaos.promises import Verdict, in_time, well_formed
from testkit import REPOSITORY
from testkit.completions import prompt
from testkit.dashboard import queries
from testkit.load import now
from testkit.polling import wait_for
from tests.chaos.verdict import keep
from tests.stack.engine import PATIENCE, Stack, call
from tests.stack.load import load


@pytest.fixture
def fallback_stack(stack: Stack) -> Iterator[Stack]:
    """The stack with a second mock model and docker/routes.yaml."""
    with_fallback = stack.with_profile("fallback", GATEWAY_CONFIG="docker/routes.yaml")
    with_fallback.compose("up", "--wait")
    with_fallback.steady()
    yield with_fallback
    with_fallback.compose("rm", "--stop", "--force", "mock-model-b")
    stack.compose("up", "--wait")


def test_what_one_model_cannot_answer_the_other_does(fallback_stack: Stack) -> None:
    assert fallback_stack.ask().headers["x-gateway-backend"] == "primary"
    fallback_stack.compose("kill", "mock-model")
    for _ in range(10):
        answer = fallback_stack.ask(x_request_timeout="4")
        assert (answer.status, answer.headers["x-gateway-backend"]) == (200, "secondary"), answer
    assert answer.json["model"] == "small-model"
    health = fallback_stack.gateway("/health")
    assert (health.status, health.json["status"]) == (200, "degraded")
    fallback_stack.compose("start", "mock-model")
    wait_for(
        lambda: fallback_stack.ask().headers["x-gateway-backend"] == "primary",
        "the first model is used again",
        PATIENCE,
    )


@pytest.fixture
def replicated_stack(stack: Stack) -> Iterator[Stack]:
    """The stack with two replicas of one backend."""
    urls = "http://mock-model:8001,http://mock-model-b:8001"
    with_two = stack.with_profile("fallback", GATEWAY_BACKEND_URLS=urls)
    with_two.compose("up", "--wait")
    with_two.steady()
    yield with_two
    with_two.compose("rm", "--stop", "--force", "mock-model-b")
    stack.compose("up", "--wait")


async def test_of_two_replicas_one_is_killed_and_nobody_sees_it(replicated_stack: Stack) -> None:
    """Killed for 3 s under 40 calls/s and started again.

    0 failures, but for streams already committed, of which there are some: one error event each.
    """
    slow = {"kind": "drip", "with": {"bytes": 100, "interval": 0.05}, "match": {"stream": True}}
    replicated_stack.script(slow)
    async with load(replicated_stack, 40, kinds=("answer", "stream", "stream", "answer")) as calling:
        await asyncio.sleep(2)
        await asyncio.to_thread(replicated_stack.compose, "kill", "mock-model")
        killed = now()
        await asyncio.sleep(3)
        await asyncio.to_thread(replicated_stack.compose, "start", "mock-model")
        await asyncio.sleep(2)
    failed = [call for call in calling.calls if call.outcome != "ok"]
    events = [call.error_events for call in failed if call.first is not None and call.first < killed]
    keep(
        calling.calls,
        in_time(calling.calls),
        well_formed(calling.calls),
        Verdict(
            "only committed streams fail, with one error event each",
            f"{len(failed)} failed, error events of committed streams {events}",
            0 < len(failed) == len(events) and set(events) == {1},
        ),
    )

    def both_are_used() -> bool:
        return {replicated_stack.ask().headers["x-gateway-backend"] for _ in range(4)} == {"backend-1", "backend-2"}

    wait_for(both_are_used, "both replicas are used again", PATIENCE)


@pytest.fixture(scope="module")
def metrics_stack(built_stack: Stack) -> Iterator[Stack]:
    """The stack with Prometheus. Without Grafana, whose image is not to be had everywhere that these tests run."""
    with_metrics = built_stack.with_profile("metrics")
    with_metrics.compose("up", "--wait", "prometheus")
    with_metrics.steady()
    yield with_metrics
    with_metrics.compose("rm", "--stop", "--force", "prometheus")


def prometheus(stack: Stack, path: str) -> Any:  # noqa: ANN401
    answer = call("GET", stack.url("PROMETHEUS_PORT", f"/api/v1/{path}"))
    assert answer.status == 200, answer
    return answer.json["data"]


def alerts(stack: Stack) -> dict[str, str]:
    """The alerts that are pending or firing, and which of the two."""
    return {alert["labels"]["alertname"]: alert["state"] for alert in prometheus(stack, "alerts")["alerts"]}


def query(stack: Stack, expression: str) -> list[float]:
    found = prometheus(stack, f"query?query={quote(expression)}")["result"]
    return [float(sample["value"][1]) for sample in found]


def load_of_all_kinds(stack: Stack) -> None:
    """Answers, streams, a retry, a failure of the backend, and a wrong request."""
    stack.script({"kind": "status", "with": {"status": 500}, "times": 4})
    for _ in range(3):
        stack.ask()
        stack.ask(prompt(stream=True, stream_options={"include_usage": True}))
    stack.ask({"model": "demo-model"})


def test_prometheus_reads_every_target_and_every_rule(metrics_stack: Stack) -> None:
    def targets() -> set[tuple[str, str]]:
        active = prometheus(metrics_stack, "targets")["activeTargets"]
        return {(target["labels"]["job"], target["health"]) for target in active}

    jobs = {("gateway", "up"), ("otel-collector", "up"), ("span-metrics", "up"), ("otlp", "up")}
    wait_for(lambda: targets() == jobs, "all targets are up", PATIENCE)

    def rules() -> dict[str, str]:
        groups = prometheus(metrics_stack, "rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    groups = yaml.safe_load((REPOSITORY / "otel" / "alerts.yaml").read_text(encoding="utf-8"))["groups"]
    names = [rule.get("alert") or rule["record"] for group in groups for rule in group["rules"]]
    wait_for(lambda: rules() == dict.fromkeys(names, "ok"), "all rules work", 60)
    before = query(metrics_stack, "sum(gateway_requests_total)")
    metrics_stack.ask()
    wait_for(lambda: query(metrics_stack, "sum(gateway_requests_total)") > before, "requests are counted", PATIENCE)


def test_metrics_by_otlp_are_genai_s_alone_and_nothing_is_counted_twice(metrics_stack: Stack) -> None:
    def counted() -> list[float]:
        load_of_all_kinds(metrics_stack)
        return query(metrics_stack, 'gen_ai_client_operation_duration_seconds_count{gen_ai_operation_name="chat"}')

    wait_for(counted, "the operations of GenAI", 60, every=1)
    for name in (
        "gen_ai_server_time_to_first_token_seconds_bucket",
        "gen_ai_server_time_per_output_token_seconds_bucket",
        'gen_ai_client_token_usage_sum{gen_ai_token_type="output"}',
    ):
        wait_for(lambda: query(metrics_stack, name), name, 40, every=1)  # noqa: B023
    instances = prometheus(metrics_stack, "label/instance/values?match[]=gateway_requests_total")
    assert instances == ["gateway:8000"]
    names = prometheus(metrics_stack, "label/__name__/values?match[]=" + quote('{gen_ai_operation_name!=""}'))
    assert {name for name in names if name.startswith("gateway")} == set()
    health = metrics_stack.gateway("/health").json["telemetry"]
    assert health["status"] == "ok"
    dropped = query(metrics_stack, "gateway_telemetry_dropped_data_points_total")
    assert dropped == [0]


OF_LIMITS = {"Time in the queue", "Limits of keys", "Guards"}
"""Panels that show something only of a gateway that is full, or has keys with limits or a guard."""


def without_a_number(stack: Stack, panels: Callable[[str], bool]) -> list[str]:
    """The queries of these panels that find nothing, or nothing that is a number."""
    return [
        f"{one.panel}: {one.expression}"
        for one in queries()
        if panels(one.panel) and all(map(math.isnan, query(stack, one.over("30s"))))
    ]


def test_each_query_of_the_dashboard_finds_something(metrics_stack: Stack) -> None:
    metrics_stack.steady()
    empty: list[str] = []

    def all_found() -> bool:
        load_of_all_kinds(metrics_stack)
        empty[:] = without_a_number(metrics_stack, lambda panel: panel not in OF_LIMITS)
        return not empty

    try:
        wait_for(all_found, "numbers for each query", 90, every=2)
    finally:
        assert empty == []


@pytest.fixture
def limited_stack(metrics_stack: Stack) -> Iterator[Stack]:
    """The stack with Prometheus, and a gateway that does one thing at a time for those who have a key."""
    files = {"GATEWAY_ENV_FILE": "tests/stack/limits.env", "GATEWAY_CONFIG": "tests/stack/limits.yaml"}
    limited = Stack(metrics_stack.env | files, metrics_stack.profiles)
    limited.compose("up", "--wait", "gateway")
    yield limited
    metrics_stack.compose("up", "--wait", "gateway")
    metrics_stack.steady()


def test_the_dashboard_shows_limits_and_queues(limited_stack: Stack) -> None:
    limited_stack.script({"kind": "latency", "with": {"delay": 0.2}})
    empty: list[str] = []

    def all_found() -> bool:
        with ThreadPoolExecutor(4) as callers:
            asking = [callers.submit(limited_stack.ask, authorization="Bearer team-a-key") for _ in range(4)]
        assert {one.result().status for one in asking} == {200}
        empty[:] = without_a_number(limited_stack, lambda panel: panel in OF_LIMITS)
        return not empty

    try:
        wait_for(all_found, "numbers of limits", 60, every=1)
    finally:
        assert empty == []


def test_the_points_on_the_dashboard_lead_to_traces(metrics_stack: Stack) -> None:
    metrics_stack.steady()
    shown = [one for one in queries() if one.exemplars]
    began = int(time.time()) - 5

    def traces() -> list[str]:
        load_of_all_kinds(metrics_stack)
        now = int(time.time()) + 5
        found = [
            prometheus(metrics_stack, f"query_exemplars?query={quote(one.over('30s'))}&start={began}&end={now}")
            for one in shown
        ]
        if not all(found):
            return []
        return [series[-1]["exemplars"][-1]["labels"]["trace_id"] for series in found]

    for trace_id in wait_for(traces, "exemplars", 40, every=1) or []:
        wait_for(lambda: metrics_stack.spans(trace_id), f"trace {trace_id} in Jaeger", PATIENCE)  # noqa: B023


def test_the_metrics_that_the_alerts_need_are_there(metrics_stack: Stack) -> None:
    page = metrics_stack.gateway("/metrics").body.decode()
    for name in (
        "gateway_requests_total",
        "gateway_breaker_state",
        "gateway_backend_status",
        "gateway_telemetry_dropped_spans_total",
    ):
        assert f"\n{name}" in page


@pytest.mark.timeout(300, func_only=True)
def test_a_killed_backend_fires_its_alert(metrics_stack: Stack) -> None:
    metrics_stack.steady()
    wait_for(lambda: "BackendDown" not in alerts(metrics_stack), "no alert before", 45)
    metrics_stack.compose("kill", "mock-model")
    try:

        def fired() -> bool:
            metrics_stack.ask(x_request_timeout="1")
            now = alerts(metrics_stack)
            return now.get("BackendDown") == now.get("ErrorBudgetBurnsFast") == "firing"

        wait_for(fired, "the cause and the broken promise are told", 90, every=0.25)
        assert "GatewayDown" not in alerts(metrics_stack)
    finally:
        metrics_stack.compose("start", "mock-model")
    metrics_stack.steady()
    wait_for(lambda: "BackendDown" not in alerts(metrics_stack), "the alert ends", 90, every=0.5)


@pytest.mark.timeout(240, func_only=True)
def test_a_gateway_that_is_gone_fires_its_alert(metrics_stack: Stack) -> None:
    metrics_stack.compose("stop", "gateway")
    try:
        wait_for(lambda: alerts(metrics_stack).get("GatewayDown") == "firing", "the alert fires", 90, every=0.5)
    finally:
        metrics_stack.compose("start", "gateway")
    metrics_stack.steady()


@pytest.mark.timeout(240, func_only=True)
def test_spans_that_are_dropped_fire_their_alert(metrics_stack: Stack) -> None:
    metrics_stack.compose("stop", "otel-collector")
    try:

        def fired() -> bool:
            metrics_stack.ask()
            return alerts(metrics_stack).get("TelemetryDropping") == "firing"

        wait_for(fired, "the alert fires", 90, every=0.5)
    finally:
        metrics_stack.compose("start", "otel-collector")
    metrics_stack.steady()


def test_jaeger_s_monitor_tab_has_data(metrics_stack: Stack) -> None:
    metrics_stack.steady()

    def points() -> list[Any]:
        metrics_stack.ask()
        path = "/api/metrics/calls?service=gateway&lookback=600000&step=5000&ratePer=60000&spanKind=server"
        (family,) = call("GET", metrics_stack.url("JAEGER_PORT", path)).json["metrics"]
        found: list[Any] = family["metricPoints"]
        return found

    wait_for(points, "calls per second of the gateway", 60, every=1)
