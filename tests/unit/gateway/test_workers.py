"""What workers share, and what they say as one."""

import asyncio
import ctypes
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.policy.shares import divided
from gateway.server.listener import held_sockets, listening_sockets
from gateway.settings import load
from gateway.workers.channel import Channel, NoAnswer
from gateway.workers.child import Child
from gateway.workers.health_of_all import health_of_all
from gateway.workers.in_flight_count import new_count
from gateway.workers.metrics_of_all import MetricsOfAll, as_json
from gateway.workers.page_of_all import PageOfAll
from gateway.workers.parent import Parent
from gateway.workers.parent_store import MOST, Values
from gateway.workers.requests_of_all import found_of_all, listed_of_all
from gateway.workers.sharing import Sharing
from gateway.workers.whole import SILENT_LOOKS, Whole
from gateway.workers.worker import Worker
from testkit.polling import until
from testkit.ports import free_port

PR_SET_CHILD_SUBREAPER = 36
"""Of `prctl`: what descendants leave behind is left to this process."""
USES = st.lists(st.integers(0, 200), min_size=1, max_size=16)


@given(st.integers(0, 1000), USES)
def test_shares_come_to_the_whole_and_nobody_loses_what_it_uses(total: int, used: list[int]) -> None:
    shares = divided(total, used)
    assert all(share >= use for share, use in zip(shares, used, strict=True))
    assert sum(shares) == max(total, sum(max(min(1, total), use) for use in used))


@given(st.integers(4, 1000), st.integers(2, 8))
def test_whoever_is_short_again_and_again_gets_nearly_all(total: int, number: int) -> None:
    shares = divided(total, [0] * number)
    for _ in range(total):
        shares = divided(total, [shares[0]] + [0] * (number - 1))
    assert shares[0] >= total - number
    assert sum(shares) == max(total, number)


async def _pair(first: Any, second: Any) -> tuple[Channel, Channel]:  # noqa: ANN401
    ends = socket.socketpair(socket.AF_UNIX)
    channels = Channel(first), Channel(second)
    for channel, end in zip(channels, ends, strict=True):
        await channel.open(end)
    return channels


async def _nothing(what: str, data: object) -> None:
    raise LookupError(what, data)


async def test_questions_are_answered_in_any_order_and_large_answers_come_whole() -> None:
    async def answer(what: str, data: Any) -> Any:  # noqa: ANN401
        await asyncio.sleep(0 if what == "large" else 0.01)
        return data * 300_000 if what == "large" else [data]

    asking, answering = await _pair(_nothing, answer)
    slow, large = await asyncio.gather(asking.ask("slow", 1, timeout=60), asking.ask("large", "ab", timeout=60))
    assert slow == [1]
    assert large == "ab" * 300_000
    answering.close()
    with pytest.raises(NoAnswer):
        await asking.ask("slow", timeout=60)
    await asking.closed.wait()
    asking.tell("what nobody reads")


async def test_a_question_ends_with_the_other_process_with_its_failure_and_with_time() -> None:
    async def answer(what: str, _: object) -> None:
        if what == "fails":
            raise ValueError
        await asyncio.Event().wait()

    asking, answering = await _pair(_nothing, answer)
    with pytest.raises(NoAnswer, match="ValueError"):
        await asking.ask("fails", timeout=60)
    with pytest.raises(NoAnswer, match=r"0\.01 s"):
        await asking.ask("waits", timeout=0.01)
    waiting = asyncio.create_task(asking.ask("waits", timeout=60))
    await asyncio.sleep(0.01)
    answering.close()
    with pytest.raises(NoAnswer, match="ended"):
        await waiting


async def test_time_in_which_this_process_stood_still_is_none_that_the_other_has_taken() -> None:
    """Both are one process here, so that none of them runs; the answer comes after the time for it."""

    async def answer(_what: str, _data: object) -> str:
        time.sleep(0.5)  # noqa: ASYNC251 - the loop is to stand still
        return "here it is"

    asking, answering = await _pair(_nothing, answer)
    await asyncio.sleep(0.2)  # the loop runs
    assert await asking.ask("waits", timeout=0.3) == "here it is"
    answering.close()


class _Process:
    """A worker that uses something, behind a channel."""

    def __init__(self, in_flight: int) -> None:
        self.in_flight = in_flight
        self.shares = [0, 0, 0]

    async def ask(self, what: str, data: Any = None, *, timeout: float) -> Any:  # noqa: ANN401, ASYNC109
        assert timeout
        if what == "shares":
            self.shares = data
        return [self.in_flight, 0, 0] if what == "use" else list(map(max, data, [self.in_flight, 0, 0]))

    def tell(self, what: str, data: Any) -> None:  # noqa: ANN401
        assert what == "shares"
        self.shares = data


async def test_shares_move_to_the_worker_that_needs_them_and_never_exceed_the_whole() -> None:
    settings = load(gateway_max_in_flight=100, gateway_max_queue=10, gateway_max_buffered_bytes=1000)
    children = [Child(1), Child(2)]
    sharing = Sharing(settings, children)
    busy, idle = _Process(0), _Process(0)
    for child, process in zip(children, (busy, idle), strict=True):
        child.channel = cast("Channel", process)
        process.shares = sharing.first(child)
    assert busy.shares == idle.shares == [50, 5, 500]
    for _ in range(8):
        busy.in_flight = busy.shares[0]
        sharing.short()
        await until(lambda: not sharing.moving, "shares have moved")
        assert busy.shares[0] + idle.shares[0] <= 100
    assert busy.shares[0] == 99
    sharing.ended(children[1])
    assert sharing.first(children[1])[0] == 1  # what the other has is not given twice
    busy.in_flight = 0
    sharing.short()
    await until(lambda: not sharing.moving, "shares have moved")
    assert (busy.shares[0], idle.shares[0]) == (50, 50)


class _Silent:
    """A worker that hangs, or not."""

    def __init__(self, *, hangs: bool) -> None:
        self.hangs = hangs

    async def ask(self, what: str, data: Any = None, *, timeout: float) -> Any:  # noqa: ANN401, ASYNC109
        assert (what, data, timeout > 0) == ("metrics", None, True)
        if self.hangs:
            raise NoAnswer
        return []


async def test_a_worker_that_does_not_answer_many_times_in_a_row_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    children, workers = [Child(1), Child(2)], (_Silent(hangs=False), _Silent(hangs=True))
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(Child, "send", lambda child, number: sent.append((child.number, number)))
    for child, worker in zip(children, workers, strict=True):
        child.channel, child.serves = cast("Channel", worker), True
    whole = Whole(children)
    for _ in range(SILENT_LOOKS - 1):
        await whole.look()
    workers[1].hangs = False
    await whole.look()
    workers[1].hangs = True
    for _ in range(SILENT_LOOKS - 1):
        await whole.look()
    assert sent == []
    await whole.look()
    await whole.look()
    assert sent == [(2, signal.SIGKILL)]


def _families(requests: int, in_flight: int, probe: int, seconds: float) -> Any:  # noqa: ANN401
    registry = CollectorRegistry()
    Counter("gateway_requests", "R.", ["route"], registry=registry).labels("a").inc(requests)
    Gauge("gateway_in_flight_requests", "F.", registry=registry).set(in_flight)
    Gauge("gateway_backend_probe_ok", "P.", ["backend"], registry=registry).labels("b").set(probe)
    Gauge("gateway_breaker_state", "B.", ["backend"], registry=registry).labels("b").set(2 - 2 * probe)
    Histogram("gateway_seconds", "S.", buckets=(1, 10), registry=registry).observe(seconds, {"trace_id": f"{requests}"})
    return as_json(registry.collect())


def _values(metrics: MetricsOfAll, present: set[int]) -> dict[str, float]:
    return {
        sample.name + sample.labels.get("le", ""): sample.value
        for metric in metrics.families(present, {})
        for sample in metric.samples
    }


def test_counters_are_sums_that_never_fall_and_gauges_are_of_those_present() -> None:
    metrics = MetricsOfAll()
    metrics.take(1, _families(3, 2, 1, 0.5))
    metrics.take(2, _families(4, 5, 0, 5))
    both = _values(metrics, {1, 2})
    assert both["gateway_requests_total"] == 7
    assert both["gateway_in_flight_requests"] == 7
    assert both["gateway_backend_probe_ok"] == 0
    assert both["gateway_breaker_state"] == 2
    assert both["gateway_seconds_bucket1.0"] == 1
    assert both["gateway_seconds_bucket10.0"] == 2
    exemplars = [each.exemplar for metric in metrics.families({1, 2}, {}) for each in metric.samples if each.exemplar]
    assert {exemplar.labels["trace_id"] for exemplar in exemplars} == {"3", "4"}
    silent = _values(metrics, {1})
    assert (silent["gateway_requests_total"], silent["gateway_in_flight_requests"]) == (7, 2)
    metrics.ended(2)
    metrics.take(2, _families(1, 1, 1, 20))
    assert _values(metrics, {1, 2})["gateway_requests_total"] == 8
    metrics.ended(2)
    metrics.ended(2)
    assert _values(metrics, {1})["gateway_requests_total"] == 8


def test_what_is_used_of_a_key_s_limit_is_no_less_than_its_ledger_knows() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("gateway_key_limit_used", "U.", ["key", "limit"], registry=registry)
    for limit, used in (("tokens_per_day", 5), ("tokens_per_minute", 5), ("max_in_flight", 1)):
        gauge.labels("team", limit).set(used)
    metrics = MetricsOfAll()
    metrics.take(1, as_json(registry.collect()))
    ledgers = {("team", "tokens_per_day"): 70, ("team", "tokens_per_minute"): 4, ("other", "tokens_per_day"): 9}
    (metric,) = metrics.families({1}, ledgers)
    by_limit = {each.labels["limit"]: each.value for each in metric.samples}
    assert by_limit == {"tokens_per_day": 70, "tokens_per_minute": 5, "max_in_flight": 1}


def _health(status: str, breaker: str, **more: object) -> dict[str, Any]:
    backend = {
        "name": "b",
        "status": status,
        "breaker": breaker,
        "retry_in_seconds": 3.0 if breaker == "open" else None,
        "cooling_seconds": None,
        "in_flight": 2,
        "consecutive_failures": 5 if breaker == "open" else 0,
        "last_success_seconds_ago": None if breaker == "open" else 1.0,
        "last_error": {"code": "c", "seconds_ago": 2.0} if breaker == "open" else None,
        "probe": {"ok": True, "latency_ms": 1.0, "seconds_ago": None if breaker == "open" else 0.5},
    }
    return {
        "status": status,
        "uptime_seconds": 5.0,
        "draining": False,
        "in_flight": 2,
        "queued": 1,
        "config": {"generation": 2, "loaded_seconds_ago": 1.0, "error": None},
        "downstream": {"status": status, "backends": [backend], "guards": []},
        "telemetry": {"status": "ok", "spans_dropped": 1},
        "limits": {"status": "off"},
    } | more


def test_a_backend_is_down_where_it_is_so_for_all_and_no_better_than_degraded_for_one() -> None:
    well, ill = _health("ok", "closed"), _health("down", "open")
    one = health_of_all([well, ill], [])
    assert one["status"] == one["downstream"]["status"] == "degraded"
    (backend,) = one["downstream"]["backends"]
    assert (backend["breaker"], backend["in_flight"], backend["retry_in_seconds"]) == ("open", 4, 3.0)
    assert (backend["last_success_seconds_ago"], backend["last_error"]["code"]) == (1.0, "c")
    assert backend["probe"]["seconds_ago"] == 0.5
    assert (one["in_flight"], one["queued"], one["telemetry"]["spans_dropped"]) == (4, 2, 2)
    assert health_of_all([ill, ill], [])["status"] == "down"
    behind = _health("ok", "closed", config={"generation": 1, "loaded_seconds_ago": 9.0, "error": "wrong"})
    assert health_of_all([well, behind], [])["config"] == {"generation": 1, "loaded_seconds_ago": 9.0, "error": "wrong"}
    tripped = _health("ok", "closed")
    watch = {"route": "r", "backend": "b", "model": "m"}
    tripped["downstream"]["guards"] = [watch | {"tripped": True, "requests": 20}]
    well["downstream"]["guards"] = [watch | {"tripped": False, "requests": 30}]
    guarded = health_of_all([well, tripped], [])
    assert guarded["status"] == "degraded"
    assert guarded["downstream"]["guards"] == [watch | {"tripped": True, "requests": 20}]
    assert health_of_all([well, well], [])["status"] == "ok"
    assert health_of_all([well], [2])["status"] == "degraded"
    assert health_of_all([well], [2])["workers"] == {"answered": 1, "missing": [2]}
    alone = health_of_all([well], None)
    assert (alone["status"], alone["workers"]) == ("degraded", {"answered": 1, "missing": None})


def test_while_workers_reload_each_backend_is_told_of_with_those_who_know_it() -> None:
    def knows(*names: str) -> dict[str, Any]:
        document = _health("ok", "closed")
        (backend,) = document["downstream"]["backends"]
        document["downstream"]["backends"] = [backend | {"name": name, "in_flight": 2} for name in names]
        return document

    backends = health_of_all([knows("a", "b"), knows("new", "b"), knows("b")], [])["downstream"]["backends"]
    assert {each["name"]: each["in_flight"] for each in backends} == {"a": 2, "b": 6, "new": 2}


def _snapshot(number: int) -> dict[str, Any]:
    return {
        "at": 100.0 + number,
        "health": _health("ok", "closed"),
        "waiting": number,
        "requests": {"ok": number, **({"failed": 1} if number == 3 else {})},
        "attempts": {"b": number},
        "tokens": {"input": number, "output": 2 * number},
        "seconds": [1.0],
        "latency": [number, 1],
        "first_token": [0, number],
        "callers": [
            {
                "name": "team",
                "limits": [{"name": "requests_per_day", "limit": 9, "used": number}],
                **dict.fromkeys(("requests", "failed", "refused", "tokens"), number),
            }
        ],
        "callers_in_all": 1,
    }


def test_the_page_shows_sums_that_do_not_fall_when_a_worker_dies() -> None:
    page = PageOfAll()
    both = page.snapshot({1: _snapshot(3), 2: _snapshot(4)}, [], {})
    assert (both["requests"], both["attempts"]) == ({"ok": 7, "failed": 1}, {"b": 7})
    assert (both["latency"], both["first_token"], both["waiting"], both["at"]) == ([7, 2], [0, 7], 7, 104.0)
    (caller,) = both["callers"]
    assert (caller["requests"], caller["limits"][0]["used"], caller["limits"][0]["limit"]) == (7, 7, 9)
    page.ended(1)
    alone = page.snapshot({2: _snapshot(4)}, [], {})["callers"][0]
    assert (alone["requests"], alone["limits"][0]["used"]) == (7, 4), "what the dead one used is its ledger's to know"
    known = page.snapshot({2: _snapshot(4)}, [], {("team", "requests_per_day"): 8, ("team", "?"): 99})
    assert known["callers"][0]["limits"][0]["used"] == 8
    after = page.snapshot({1: _snapshot(1), 2: _snapshot(4)}, [], {})
    assert (after["requests"], after["latency"]) == ({"ok": 8, "failed": 1}, [8, 3])
    silent = page.snapshot({2: _snapshot(4)}, [1], {})
    assert (silent["requests"]["ok"], silent["waiting"]) == (8, 4)
    assert silent["health"]["workers"] == {"answered": 1, "missing": [1]}


def test_lists_of_requests_are_put_together_by_their_ends() -> None:
    one = {"found": [{"number": 9, "request": "i"}, {"number": 4, "request": "d"}], "more": True, "kept": 5}
    two = {"found": [{"number": 7, "request": "g"}], "more": False, "kept": 1}
    listed = listed_of_all([one, two], 2, [3])
    assert listed["workers"] == {"answered": 2, "missing": [3]}
    assert ([each["request"] for each in listed["found"]], listed["more"], listed["kept"]) == (["i", "g"], True, 6)
    nothing: dict[str, Any] = {"number": 0, "request": None, "others": [], "kept": 2}
    older = {"number": 1, "request": {"request_id": "a", "trace_id": "t1"}, "others": [], "kept": 3}
    newer = {"number": 2, "request": {"request_id": "a", "trace_id": "t2"}, "others": [{"request_id": "a"}], "kept": 4}
    found = found_of_all([older, nothing, newer], [])
    assert (found["request"]["trace_id"], found["kept"]) == ("t2", 9)
    assert found["others"] == [{"request_id": "a"}, {"request_id": "a", "trace_id": "t1"}]
    assert found_of_all([nothing], None) == nothing | {"workers": {"answered": 1, "missing": None}}


def test_a_parent_keeps_values_for_a_time_and_not_too_many() -> None:
    now = 0.0
    values = Values(clock=lambda: now)
    values.publish(10, [(str(number), "x") for number in range(MOST + 5)])
    assert (values.look_up("4"), values.look_up("5"), values.look_up("none")) == (None, "x", None)
    now = 10.0
    assert values.look_up("5") is None


# The parent's processes


def _parent(*code: str, workers: int = 2) -> Parent:
    settings = load(host="127.0.0.1", port=free_port(), gateway_workers=workers, gateway_shutdown_grace=1)
    return Parent(settings, command=(sys.executable, "-c", *code))


async def test_a_worker_that_fails_before_any_serves_ends_the_gateway_with_its_code() -> None:
    assert await _parent("import sys; sys.exit(3)").run() == 3
    assert await _parent("").run() == 1, "one that just ends has failed, too"


async def test_a_worker_that_cannot_be_started_is_said(caplog: pytest.LogCaptureFixture) -> None:
    settings = load(host="127.0.0.1", port=free_port(), gateway_workers=2)
    assert await Parent(settings, command=("/nowhere/python",)).run() == 1
    assert caplog.text.count("worker 1 cannot be started: ") == 1


LEAVES = """
import os, pathlib, sys, time
file = pathlib.Path(sys.argv[1])
if not file.exists():
    left = os.fork()
    if left:
        file.write_text(str(left))
        sys.exit(4)
    time.sleep(4)
    os._exit(0)
time.sleep(600)
"""
"""A worker that leaves a process behind, which lives longer than it; those after it leave none."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux has subreapers")
async def test_what_a_dead_worker_has_left_behind_is_buried_whenever_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "left"
    parent = _parent(LEAVES, str(file), workers=1)
    parent._has_served = True  # else the first death would be the end of all
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        running = asyncio.create_task(parent.run())
        await until(lambda: file.exists() and file.read_text(), "it has left a process behind", seconds=50)
        left = Path(f"/proc/{file.read_text()}")
        await until(lambda: not left.exists(), "it is buried", seconds=50)
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    finally:
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


async def test_nobody_waits_at_a_port_where_no_worker_serves_yet_and_no_other_gateway_gets_it() -> None:
    settings = load(host="127.0.0.1", port=free_port(), gateway_workers=2)
    parent = Parent(settings, command=(sys.executable, "-c", "import time; time.sleep(600)"))
    running = asyncio.create_task(parent.run())
    await until(lambda: all(child.process for child in parent.children) and bool(parent.children), seconds=50)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", settings.port)
    with pytest.raises(OSError, match="in use"):
        listening_sockets("127.0.0.1", settings.port)
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 128 + signal.SIGTERM


def test_a_port_that_is_held_is_for_those_alone_who_share_it() -> None:
    holding = held_sockets("127.0.0.1", 0)
    port = holding[0].getsockname()[1]
    for _ in range(2):
        with pytest.raises(OSError, match="in use"):
            held_sockets("127.0.0.1", port)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=50)
        both = [*listening_sockets("127.0.0.1", port, shared=True), *listening_sockets("127.0.0.1", port, shared=True)]
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", port), timeout=50):
                pass
        with pytest.raises(OSError, match="in use"):
            listening_sockets("127.0.0.1", port)
        for each in both:
            each.close()
    for each in holding:
        each.close()
    for each in listening_sockets("127.0.0.1", port):
        each.close()


async def test_a_worker_whose_parent_has_died_ends_whatever_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    questions, its_questions = socket.socketpair()
    handing, its_handing = socket.socketpair()
    worker = Worker(1, its_questions.detach(), its_handing.detach(), new_count())
    done: list[tuple[str, int]] = []
    monkeypatch.setattr(signal, "alarm", lambda seconds: done.append(("alarm", seconds)))
    monkeypatch.setattr(os, "kill", lambda _, number: done.append(("kill", number)))
    await worker.open(20.5)
    await asyncio.sleep(0.05)
    assert done == []
    questions.close()
    await until(lambda: len(done) == 2)
    assert done == [("alarm", 31), ("kill", signal.SIGTERM)]
    assert await worker.leave(), "whoever starts the gateway anew needs the port"
    handing.close()
    worker._handing.close()  # which a process has for life


@pytest.mark.parametrize(("wanted", "in_flight", "workers"), [(4, 1, 1), (4, 3, 3), (4, 4, 4), (2, 1024, 2)])
def test_no_more_workers_run_than_requests_may(wanted: int, in_flight: int, workers: int) -> None:
    assert load(gateway_workers=wanted, gateway_max_in_flight=in_flight).workers == workers


def test_a_worker_for_each_core_but_not_for_each_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(1_000)))
    assert load(gateway_workers=0, gateway_max_in_flight=10_000).workers == 256
