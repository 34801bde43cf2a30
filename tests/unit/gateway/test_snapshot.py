"""What the live page is sent stays small, however much there is."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gateway import ui
from gateway.kept_requests import NO_FAILURE
from gateway.policy.caller import Caller
from gateway.record import AttemptRecord, Record
from gateway.telemetry.counts import SECONDS
from gateway.telemetry.metrics import Metrics
from gateway.ui.snapshot import MAX_CALLERS, MAX_MODELS, Snapshot


class Health:
    def document(self, *, in_full: bool) -> dict[str, Any]:
        return {"in_full": in_full}


def counted(metrics: Metrics, caller: Caller, path: str | None = "/v1/chat/completions", seconds: float = 0.3) -> None:
    record = Record("POST", path, trace_id=1, span_id=2, request_id="r", started=10.0, started_ns=0)
    record.caller = caller
    record.status = 200
    record.ended = 10.0 + seconds
    record.attempts.append(AttemptRecord(1, "backend-1", span_id=3, started=10.0, outcome="ok"))
    metrics.count(record, kept=False)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def snapshot(metrics: Metrics, *callers: Caller) -> dict[str, Any]:
    taken = Snapshot(
        health=cast("Any", Health()),
        metrics=metrics,
        admission=cast("Any", SimpleNamespace(waiting=[1, 2])),
        callers=lambda: callers,
        wall_clock=lambda: 1_700_000_000.1234,
    ).document()
    document: dict[str, Any] = json.loads(json.dumps(taken))
    return document


def test_totals_go_on_and_only_what_is_forwarded_counts(metrics: Metrics) -> None:
    caller = Caller("key a", "a")
    assert snapshot(metrics)["latency"] == [0] * (len(SECONDS) + 1)
    counted(metrics, caller)
    counted(metrics, caller, seconds=1000.0)
    counted(metrics, caller, path="/v1/models")
    counted(metrics, caller, path=None)
    shown = snapshot(metrics, caller)

    assert shown["requests"] == {"ok": 2}
    assert shown["latency"][SECONDS.index(0.5)] == shown["latency"][-1] == 1
    assert sum(shown["latency"]) == 2
    assert shown["attempts"] == {"backend-1": 4}
    assert (shown["at"], shown["waiting"], shown["health"]) == (1_700_000_000.123, 2, {"in_full": True})
    assert snapshot(metrics, caller)["requests"] == {"ok": 2}


def test_of_many_callers_and_models_a_bounded_number_is_shown_and_the_rest_is_counted(metrics: Metrics) -> None:
    models = tuple(f"model-{number}" for number in range(1000))
    callers = [Caller(f"key {number}", f"team-{number}", models) for number in range(1000)]
    counted(metrics, callers[-1])
    shown = snapshot(metrics, *callers)

    assert (len(shown["callers"]), shown["callers_in_all"]) == (MAX_CALLERS, 1000)
    assert shown["callers"][0]["name"] == "team-999", "who asks most comes first"
    assert len(shown["callers"][0]["models"]) == MAX_MODELS
    assert shown["callers"][0]["more_models"] == 1000 - MAX_MODELS
    assert len(json.dumps(shown)) < 200_000


def test_keys_without_a_name_are_shown_by_their_number(metrics: Metrics) -> None:
    (caller,) = snapshot(metrics, Caller("key of 0a"))["callers"]
    assert (caller["name"], caller["named"], caller["models"], caller["limits"]) == ("key 1", False, None, [])


def test_the_page_and_the_gateway_agree_on_what_is_the_callers_own_doing() -> None:
    script = (Path(ui.__file__).parent / "elements.js").read_text(encoding="utf-8")
    (names,) = re.findall(r"CALLERS_OWN = new Set\(\[(.*?)\]\)", script, re.DOTALL)
    assert set(json.loads(f"[{names}]")) == NO_FAILURE - {"ok"}
