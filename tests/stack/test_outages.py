"""Containers that die, stop, freeze, move, lose their network and come back in any order."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence

import pytest

from chaos.promises import Verdict, all_good, fails_as, in_time, quantile_at_most, well_formed
from testkit.exposition import Exposition
from testkit.load import Call, now, sent_between, summary
from testkit.polling import wait_for
from testkit.servers import METRICS_AGE
from tests.chaos.verdict import keep, soon
from tests.stack.engine import PATIENCE, PROJECT, Stack, docker
from tests.stack.load import CUT, SILENT, UNREACHABLE, load, recovers, stalls
from tests.stack.test_images import OURS

DEADLINE = 3.0
PROBE_INTERVAL = 2.0
SOME_TIME = 4.0
"""Seconds of a fault: more than the timers of tests/stack/gateway.env."""
DRIP = {"kind": "drip", "with": {"bytes": 200, "interval": 0.05}, "match": {"stream": True}}
"""A stream takes a second: always some under way."""


def well_formed_and_in_time(calls: Sequence[Call], *verdicts: Verdict) -> None:
    """Each caller got a whole answer or a typed error by its deadline + 100 ms, and the rest holds, too."""
    keep(calls, in_time(calls), well_formed(calls), *verdicts)


async def test_a_killed_backend_is_reported_and_survived(stack: Stack) -> None:
    """Killed for some 3 s under 10 calls/s.

    /health says `down` within the probe interval + 1 s, /readyz and /livez stay 200; first success < 3 s after the
    model that was started answers, and <= 1 s after a good probe.
    """

    def says_down() -> bool:
        return stack.gateway("/health").status == 503

    async with load(stack, 10, DEADLINE) as calling:
        await asyncio.sleep(1)
        await asyncio.to_thread(stack.compose, "kill", "mock-model")
        killed = now()
        with stalls(calling) as machine:
            await asyncio.to_thread(wait_for, says_down, "/health says so", PATIENCE, 0.05)
            noticed = now()
        health = stack.gateway("/health").json
        assert (health["status"], health["downstream"]["status"]) == ("down", "down")
        assert stack.gateway("/readyz").status == 200
        assert stack.gateway("/livez").status == 200
        await asyncio.sleep(3)
        await asyncio.to_thread(stack.compose, "start", "mock-model")
        recovery = await recovers(stack, calling, now())
        recovered = now()
        await asyncio.sleep(1)
    well_formed_and_in_time(
        calling.calls,
        soon(machine, "/health says down", killed, noticed, PROBE_INTERVAL + 1),
        fails_as(calling.calls, UNREACHABLE | CUT | {(504, "backend_timeout")}),
        *recovery,
        all_good(sent_between(calling.calls, recovered, now()), "callers after"),
    )


async def test_a_paused_backend_holds_nobody_beyond_the_deadline(stack: Stack) -> None:
    """`docker pause` for 4 s under 10 calls/s, timers of 1.5 s, then `docker unpause`.

    Failures are 504 or, with the breaker open, 503; a stream under way ends with one error event; first success < 3 s
    after `unpause`, and <= 1 s after a good probe.
    """
    stack.script(DRIP)
    async with load(stack, 10) as calling:
        await asyncio.sleep(2)
        await asyncio.to_thread(stack.compose, "pause", "mock-model")
        paused = now()
        try:
            await asyncio.sleep(SOME_TIME)
        finally:
            await asyncio.to_thread(stack.compose, "unpause", "mock-model")
        recovery = await recovers(stack, calling, now())
        recovered = now()
        await asyncio.sleep(1)
    well_formed_and_in_time(
        calling.calls,
        fails_as(calling.calls, SILENT | {(503, "backend_unavailable")}),
        ends_with_one_event(calling.calls, paused),
        *recovery,
        all_good(sent_between(calling.calls, recovered, now()), "callers after"),
    )


async def test_a_backend_cut_off_from_its_networks_is_a_black_hole(stack: Stack) -> None:
    """`docker network disconnect` from both for 4 s under 10 calls/s, then `connect`: every packet is lost meanwhile.

    Failures are 504, 502 (its name is gone, too) or, with the breaker open, 503; a stream under way ends with one error
    event; first success < 3 s after `connect`, and <= 1 s after a good probe.
    """
    container = stack.inspect("mock-model")
    networks = list(container["NetworkSettings"]["Networks"])
    assert len(networks) == 2
    stack.script(DRIP)
    async with load(stack, 10) as calling:
        await asyncio.sleep(2)
        lost = now()
        try:
            for network in networks:
                await asyncio.to_thread(docker, "network", "disconnect", network, container["Id"])
            await asyncio.sleep(SOME_TIME)
        finally:
            for network in networks:
                await asyncio.to_thread(docker, "network", "connect", "--alias", "mock-model", network, container["Id"])
        recovery = await recovers(stack, calling, now())
        recovered = now()
        await asyncio.sleep(1)
    well_formed_and_in_time(
        calling.calls,
        fails_as(calling.calls, SILENT | UNREACHABLE),
        ends_with_one_event(calling.calls, lost),
        *recovery,
        all_good(sent_between(calling.calls, recovered, now()), "callers after"),
    )


def ends_with_one_event(calls: Sequence[Call], moment: float) -> Verdict:
    """What became of the streams that had begun at a moment and did not end well."""
    failed = [call for call in calls if call.first is not None and call.first < moment and call.outcome != "ok"]
    events = [call.error_events for call in failed]
    return Verdict("streams under way end with one error event", f"{events}", bool(events) and set(events) == {1})


async def test_a_backend_that_comes_back_with_another_address_is_found(stack: Stack) -> None:
    """First success < 3 s after the model that was started answers, and <= 1 s after a good probe."""
    before = stack.addresses("mock-model")
    squatter = f"{PROJECT}-squatter"
    await asyncio.to_thread(stack.compose, "kill", "mock-model")
    try:
        # Somebody else takes the addresses that have become free.
        docker("run", "--detach", "--name", squatter, "--network", f"{PROJECT}_inside", OURS["gateway"], "sleep", "300")
        docker("network", "connect", f"{PROJECT}_outside", squatter)
        async with load(stack, 10, DEADLINE) as calling:
            await asyncio.sleep(1.5)
            await asyncio.to_thread(stack.compose, "start", "mock-model")
            recovery = await recovers(stack, calling, now())
        after = stack.addresses("mock-model")
        assert after.isdisjoint(before), (before, after)
    finally:
        docker("rm", "--force", squatter)
    well_formed_and_in_time(calling.calls, fails_as(calling.calls, UNREACHABLE | {(504, "backend_timeout")}), *recovery)


async def test_a_process_that_dies_in_its_container_is_restarted(stack: Stack) -> None:
    """Crashed under 10 calls/s; the engine starts it again.

    First success < 3 s after the model serves, and <= 1 s after a good probe. Failures, if the retries do not hide them
    all, are 502, 504 or, with the breaker open, 503.
    """
    restarts = stack.inspect("mock-model")["RestartCount"]

    def restarted() -> bool:
        return bool(stack.inspect("mock-model")["RestartCount"] > restarts)

    async with load(stack, 10, DEADLINE) as calling:
        await asyncio.sleep(1)
        await asyncio.to_thread(stack.control, "POST", "/crash")
        await asyncio.to_thread(wait_for, restarted, "it is restarted", PATIENCE)
        await asyncio.to_thread(wait_for, lambda: stack.control("GET", "/faults"), "it serves", PATIENCE)
        recovery = await recovers(stack, calling, now())
        await asyncio.sleep(1)
    assert stack.inspect("mock-model")["RestartCount"] == restarts + 1
    failures = {(call.status, call.outcome) for call in calling.calls if call.outcome != "ok"}
    assert failures <= UNREACHABLE | CUT | {(504, "backend_timeout")}, summary(calling.calls)
    well_formed_and_in_time(calling.calls, *recovery)


@pytest.mark.timeout(240, func_only=True)
async def test_no_request_fails_without_collector_and_jaeger(stack: Stack) -> None:
    def telemetry_is_degraded() -> bool:
        return bool(stack.gateway("/health").json["telemetry"]["status"] == "degraded")

    async with load(stack, 20, DEADLINE) as calling:
        await asyncio.to_thread(stack.compose, "stop", "jaeger")
        await asyncio.sleep(2)
        await asyncio.to_thread(stack.compose, "stop", "otel-collector")
        await asyncio.to_thread(wait_for, telemetry_is_degraded, "an export has failed for good", PATIENCE)
        telemetry = await asyncio.to_thread(stack.gateway, "/health")
        await asyncio.to_thread(stack.compose, "start", "jaeger", "otel-collector")
        await asyncio.sleep(1)
    assert telemetry.status == 200
    assert telemetry.json["status"] == telemetry.json["telemetry"]["status"] == "degraded"
    assert telemetry.json["downstream"]["status"] == "ok"
    unnoticed(calling.calls)
    spans_flow(stack)


@pytest.mark.timeout(180, func_only=True)
async def test_no_request_notices_a_collector_that_hangs(stack: Stack) -> None:
    """`docker pause` for 5 s under 20 calls/s, then `unpause`: 0 failures, 95 % in < 1 s, spans flow by themselves."""
    async with load(stack, 20, DEADLINE) as calling:
        await asyncio.sleep(1)
        await asyncio.to_thread(stack.compose, "pause", "otel-collector")
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.to_thread(stack.compose, "unpause", "otel-collector")
        await asyncio.sleep(1)
    unnoticed(calling.calls)
    spans_flow(stack)


def unnoticed(calls: Sequence[Call]) -> None:
    seconds = [call.seconds for call in calls]
    slow = quantile_at_most("95 % of the answers take", seconds, 0.95, 1, " s")
    well_formed_and_in_time(calls, all_good(calls), slow)


def spans_flow(stack: Stack) -> None:
    """Check that a prompt's whole trace comes to Jaeger again."""

    def traced() -> bool:
        services = ["gateway", "gateway", "mock-model"]
        return bool(stack.wait_for_spans(stack.ask().headers["x-trace-id"], services, seconds=15))

    wait_for(traced, "spans flow again", 90)


async def test_callers_who_leave_in_a_storm_give_everything_back(stack: Stack) -> None:
    """300 streams, 20 at a time, 100 a second; every caller leaves after three events.

    All 300 calls end at the model <= 1 s after the last has left; the gateway counts 300 disconnects, holds nothing and
    blames nobody.
    """

    def ends() -> Counter[str]:
        ended = Counter(str(call["ended"]) for call in stack.control("GET", "/journal").json["calls"])
        return ended if "None" not in ended else Counter()

    def held() -> tuple[int, int, int, str]:
        health = stack.gateway("/health").json
        backend = health["downstream"]["backends"][0]
        return health["in_flight"], health["queued"], backend["in_flight"], backend["breaker"]

    stack.script(DRIP)
    before = disconnects(stack)
    async with load(stack, 100, 10, total=300, burst=20, kinds=("stream",), leave_after=3) as calling:
        await calling.until(lambda calls: len(calls) == 300, 60)
        left_at = max(call.ended for call in calling.calls)
        with stalls(calling) as machine:
            ended = await asyncio.to_thread(wait_for, ends, "every call has ended at the model", PATIENCE, 0.05)
            ended_at = now()
    await asyncio.to_thread(wait_for, lambda: sum(held()[:3]) == 0, "nothing is held", PATIENCE)
    left = sum(call.outcome == "left" for call in calling.calls)
    keep(
        calling.calls,
        well_formed(calling.calls),
        Verdict("all callers leave", f"{left}", left == 300),
        Verdict("all calls end at the model", f"{dict(ended)}", ended == {"caller_left": 300}),
        soon(machine, "the model has ended all", left_at, ended_at, 1),
        Verdict("disconnects counted", f"{disconnects(stack) - before:g}", disconnects(stack) - before == 300),
        Verdict("nothing is held, nobody blamed", f"{held()}", held() == (0, 0, 0, "closed")),
    )
    stack.script()
    assert stack.ask().status == 200


def disconnects(stack: Stack) -> float:
    """How many callers left, as the gateway counts them."""
    time.sleep(METRICS_AGE)
    return Exposition.parse(stack.gateway("/metrics").body.decode()).value("gateway_client_disconnects_total")


async def test_a_stopped_gateway_finishes_what_it_began(stack: Stack) -> None:
    """Each request that was there before the signal ends well; one that comes when /readyz says so gets 503.

    After the exit they are refused. Who was there is told by the model's journal.
    """
    stack.script({"kind": "drip", "with": {"bytes": 60, "interval": 0.5}, "match": {"stream": False}})  # some seconds
    container = stack.inspect("gateway")["Id"]
    to_monotonic = now() - time.time()
    since = time.time() - 1

    def drains() -> bool:
        return stack.gateway("/readyz").status == 503

    async with load(stack, 30, 10) as calling:
        await asyncio.sleep(3)
        journal = (await asyncio.to_thread(stack.control, "GET", "/journal")).json["calls"]
        stopping = asyncio.create_task(asyncio.to_thread(stack.compose, "stop", "gateway"))
        await asyncio.to_thread(wait_for, drains, "/readyz answers 503", PATIENCE, 0.05)
        drained = now()
        await stopping
        await asyncio.sleep(0.5)
    arrived = {call["request_id"] for call in journal}
    assert stack.inspect("gateway")["State"]["ExitCode"] == 0
    events = docker(
        *("events", "--since", f"{since:.6f}", "--until", f"{time.time():.6f}", "--format", "{{json .}}"),
        *("--filter", f"container={container}", "--filter", "type=container"),
    )
    moments: dict[str, float] = {}
    for line in events.splitlines():
        event = json.loads(line)
        moments.setdefault(event["Action"], event["timeNano"] / 1e9 + to_monotonic)
    signalled, exited = moments["kill"], moments["die"]

    before = [call for call in calling.calls if call.id in arrived]
    draining = [call for call in calling.calls if (call.status, call.outcome) == (503, "gateway_draining")]
    gone = [call for call in sent_between(calling.calls, drained, now()) if call not in draining]
    assert sum(call.ended > signalled + 0.1 for call in before) >= 10, "some were under way"
    assert len(draining) >= 10, "new requests came while it was draining"
    # The engine's proxy takes a connection for a moment longer than the gateway lives: it is reset.
    assert {call.outcome for call in gone} <= {"refused", "reset"}, summary(gone)
    last = max(call.started for call in draining)
    assert all(call.ended > last for call in gone), "it answered one who came later than one whom it refused"
    assert exited - signalled < 10
    keep(calling.calls, all_good(before, "requests under way"), well_formed([*before, *draining]))


@pytest.mark.timeout(300, func_only=True)
def test_the_services_start_in_any_order(stack: Stack) -> None:
    """The gateway first, then the model, then the collector, and Jaeger last."""
    stack.compose("stop", "--timeout=5", seconds=60)
    stack.compose("rm", "--force")
    stack.compose("up", "--detach", "--no-deps", "gateway")
    wait_for(lambda: stack.gateway("/readyz").status == 200, "the gateway is ready without a model", PATIENCE)
    answer = stack.ask(x_request_timeout="3")
    assert answer.status in {502, 503}
    assert answer.own_error["code"] in {"backend_connection_error", "backend_unavailable"}
    assert answer.seconds < 3.5

    stack.compose("up", "--detach", "--no-deps", "mock-model")
    wait_for(lambda: stack.ask(x_request_timeout="1").status == 200, "the model is found", PATIENCE)
    stack.compose("up", "--detach", "--no-deps", "otel-collector")
    assert stack.ask().status == 200
    stack.compose("up", "--detach", "--no-deps", "jaeger")
    spans_flow(stack)
    stack.compose("up", "--wait")
    wait_for(lambda: stack.gateway("/health").json["status"] == "ok", "all is well", PATIENCE)
