"""Containers that die, stop, move and come back in any order."""

import asyncio
import json
import math
import time
from collections.abc import Callable

import pytest

from tests.stack.engine import PROJECT, Stack, docker, wait_for
from tests.stack.load import Outcome, flaws, load, summary
from tests.stack.test_images import OURS

DEADLINE = 3.0
PROBE_INTERVAL = 2.0
RECOVERY = 3.0


def assert_well_formed_and_in_time(outcomes: list[Outcome]) -> None:
    """Check that each caller got a whole answer or a typed error within its deadline."""
    assert flaws(outcomes) == []
    assert None not in {outcome.status for outcome in outcomes}, summary(outcomes)
    assert {outcome.status for outcome in outcomes} <= {200, 502, 503, 504}, summary(outcomes)
    assert max(outcome.seconds for outcome in outcomes) < DEADLINE + 0.5


def first_success_after(stack: Stack, moment: float, seconds: float) -> float:
    """How long after `moment` (`time.monotonic()`) a prompt is answered."""
    wait_for(lambda: stack.ask(x_request_timeout="1").status == 200, "a prompt is answered", seconds)
    return time.monotonic() - moment


async def measured(report: Callable[[], float]) -> float:
    return await asyncio.to_thread(report)


async def test_a_killed_backend_is_reported_and_survived(stack: Stack) -> None:
    async with load(stack, rate=10, deadline=DEADLINE) as outcomes:
        await asyncio.sleep(1)
        await asyncio.to_thread(stack.compose, "kill", "mock-model")
        killed = time.monotonic()

        def reported() -> float:
            wait_for(lambda: stack.gateway("/health").status == 503, "/health says so", PROBE_INTERVAL + 1, every=0.05)
            return time.monotonic() - killed

        await measured(reported)
        health = stack.gateway("/health").json
        assert (health["status"], health["downstream"]["status"]) == ("down", "down")
        assert stack.gateway("/readyz").status == 200
        assert stack.gateway("/livez").status == 200
        await asyncio.sleep(3)
        await asyncio.to_thread(stack.compose, "start", "mock-model")
        started = time.monotonic()
        recovered = await measured(lambda: first_success_after(stack, started, RECOVERY))
        await asyncio.sleep(1)
    assert recovered < RECOVERY
    assert_well_formed_and_in_time(outcomes)
    assert {200, 503} <= {outcome.status for outcome in outcomes}, summary(outcomes)


async def test_a_backend_that_comes_back_with_another_address_is_found(stack: Stack) -> None:
    before = stack.addresses("mock-model")
    squatter = f"{PROJECT}-squatter"
    await asyncio.to_thread(stack.compose, "kill", "mock-model")
    try:
        # Somebody else takes the addresses that have become free.
        docker("run", "--detach", "--name", squatter, "--network", f"{PROJECT}_inside", OURS["gateway"], "sleep", "300")
        docker("network", "connect", f"{PROJECT}_outside", squatter)
        async with load(stack, rate=5, deadline=DEADLINE) as outcomes:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(stack.compose, "start", "mock-model")
            started = time.monotonic()
            recovered = await measured(lambda: first_success_after(stack, started, RECOVERY))
        after = stack.addresses("mock-model")
        assert after.isdisjoint(before), (before, after)
    finally:
        docker("rm", "--force", squatter)
    assert recovered < RECOVERY
    assert_well_formed_and_in_time(outcomes)


async def test_a_process_that_dies_in_its_container_is_restarted(stack: Stack) -> None:
    restarts = stack.inspect("mock-model")["RestartCount"]
    async with load(stack, rate=5, deadline=DEADLINE) as outcomes:
        await asyncio.to_thread(stack.control, "POST", "/crash")
        crashed = time.monotonic()
        await measured(lambda: first_success_after(stack, crashed, 10))
        await asyncio.sleep(1)
    assert stack.inspect("mock-model")["RestartCount"] == restarts + 1
    assert_well_formed_and_in_time(outcomes)


@pytest.mark.timeout(150, func_only=True)
async def test_no_request_fails_without_collector_and_jaeger(stack: Stack) -> None:
    async with load(stack, rate=20, deadline=DEADLINE) as outcomes:
        await asyncio.to_thread(stack.compose, "stop", "jaeger")
        await asyncio.sleep(2)
        await asyncio.to_thread(stack.compose, "stop", "otel-collector")
        await asyncio.sleep(8)
        telemetry = stack.gateway("/health")
        await asyncio.to_thread(stack.compose, "start", "jaeger", "otel-collector")
        await asyncio.sleep(1)
    assert flaws(outcomes) == []
    assert {outcome.status for outcome in outcomes} == {200}, summary(outcomes)
    assert sorted(outcome.seconds for outcome in outcomes)[math.floor(len(outcomes) * 0.95)] < 1
    assert telemetry.status == 200
    assert telemetry.json["status"] == telemetry.json["telemetry"]["status"] == "degraded"
    assert telemetry.json["downstream"]["status"] == "ok"

    def traced() -> bool:
        return bool(stack.wait_for_spans(stack.ask().headers["x-trace-id"], ["gateway", "gateway", "mock-model"]))

    wait_for(traced, "spans flow again", 30)


async def test_a_stopped_gateway_finishes_what_it_began(stack: Stack) -> None:
    """Each request that was there before the signal ends well; a later one gets 503, or is refused after the exit."""
    stack.script({"kind": "latency", "with": {"delay": 1.0}, "match": {"stream": False}})
    container = stack.inspect("gateway")["Id"]
    since = time.time() - 1
    async with load(stack, rate=30, deadline=10, tokens=250) as outcomes:
        await asyncio.sleep(3)
        await asyncio.to_thread(stack.compose, "stop", "gateway")
        await asyncio.sleep(0.5)
    assert stack.inspect("gateway")["State"]["ExitCode"] == 0
    events = docker(
        *("events", "--since", f"{since:.6f}", "--until", f"{time.time():.6f}", "--format", "{{json .}}"),
        *("--filter", f"container={container}", "--filter", "type=container"),
    )
    moments: dict[str, float] = {}
    for line in events.splitlines():
        event = json.loads(line)
        moments.setdefault(event["Action"], event["timeNano"] / 1e9)
    signalled, exited = moments["kill"], moments["die"]

    before = [outcome for outcome in outcomes if outcome.started < signalled - 0.05]
    assert sum(outcome.ended > signalled + 0.1 for outcome in before) >= 10, "some were under way"
    assert flaws(outcomes) == []
    assert {outcome.status for outcome in before} == {200}, summary(before)
    after = [outcome for outcome in outcomes if outcome.started > signalled + 0.05]
    draining = [outcome for outcome in after if outcome.ended < exited - 0.2]
    assert len(draining) >= 10, "new requests came while it was draining"
    assert {(outcome.status, outcome.code) for outcome in draining} == {(503, "gateway_draining")}, summary(draining)
    assert {outcome.status for outcome in after} <= {503, None}, summary(after)
    assert exited - signalled < 10


@pytest.mark.timeout(180, func_only=True)
def test_the_services_start_in_any_order(stack: Stack) -> None:
    """The gateway first, then the model, then the collector, and Jaeger last."""
    stack.compose("stop", "--timeout=5", seconds=60)
    stack.compose("rm", "--force")
    stack.compose("up", "--detach", "--no-deps", "gateway")
    wait_for(lambda: stack.gateway("/readyz").status == 200, "the gateway is ready without a model", 15)
    answer = stack.ask(x_request_timeout="3")
    assert answer.status in {502, 503}
    assert answer.error["code"] in {"backend_connection_error", "backend_unavailable"}
    assert answer.seconds < 3.5

    stack.compose("up", "--detach", "--no-deps", "mock-model")
    wait_for(lambda: stack.ask(x_request_timeout="1").status == 200, "the model is found", 10)
    stack.compose("up", "--detach", "--no-deps", "otel-collector")
    assert stack.ask().status == 200
    stack.compose("up", "--detach", "--no-deps", "jaeger")

    def traced() -> bool:
        return bool(stack.wait_for_spans(stack.ask().headers["x-trace-id"], ["gateway", "gateway", "mock-model"]))

    wait_for(traced, "spans arrive", 40)
    stack.compose("up", "--wait")
    wait_for(lambda: stack.gateway("/health").json["status"] == "ok", "all is well", 15)
