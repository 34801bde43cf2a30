"""A prompt through the whole stack, and its trace in Jaeger."""

import json
import secrets
import subprocess
import sys

from testkit import REPOSITORY
from testkit.completions import prompt
from testkit.polling import wait_for
from tests.stack.engine import PATIENCE, PROJECT, SERVICES, Stack, call, docker


def test_all_are_healthy(stack: Stack) -> None:
    def states() -> dict[str, tuple[str, str | None]]:
        found = {}
        for container in docker("ps", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}").split():
            inspected = json.loads(docker("inspect", container))[0]
            health = inspected["State"].get("Health", {}).get("Status")
            service = inspected["Config"]["Labels"]["com.docker.compose.service"]
            found[service] = inspected["State"]["Status"], health
        return found

    # The collector's image holds nothing that could ask it; its neighbour's health is its health.
    healthy = dict.fromkeys(SERVICES, ("running", "healthy")) | {"otel-collector": ("running", None)}
    wait_for(lambda: healthy.items() <= states().items(), "all are healthy", PATIENCE, every=0.5)
    stack.ask()  # a failure that an earlier test left behind as the last attempt's is over
    wait_for(lambda: stack.gateway("/health").json["status"] == "ok", "the gateway is ok", PATIENCE, every=0.5)
    assert stack.gateway("/").json["app_mode"] == "prod"


def test_a_prompt_is_answered_through_the_published_port(stack: Stack) -> None:
    answer = stack.ask()
    assert answer.status == 200
    assert answer.text
    assert answer.headers["x-gateway-attempts"] == "1"
    assert answer.headers["x-gateway-backend"] == "backend-1"


def test_a_stream_is_answered_through_the_published_port(stack: Stack) -> None:
    answer = stack.ask(prompt(stream=True))
    assert answer.status == 200
    assert answer.events[-1] == "[DONE]"
    assert answer.text


def test_json_ends_at_the_same_depth_on_the_image_s_interpreter(stack: Stack) -> None:
    deep: object = 1
    for _ in range(700):
        deep = [deep]
    answer = stack.ask(prompt(metadata=deep))
    assert (answer.status, answer.json["error"]["code"]) == (400, "invalid_json")


def test_a_prompt_is_one_trace_over_both_services(stack: Stack) -> None:
    trace_id = stack.ask().headers["x-trace-id"]
    spans = stack.wait_for_spans(trace_id, ["gateway", "gateway", "mock-model"])
    (request,) = [span for span in spans if span.service == "gateway" and span.kind == "SERVER"]
    (attempt,) = [span for span in spans if span.service == "gateway" and span.kind == "CLIENT"]
    (model,) = [span for span in spans if span.service == "mock-model"]
    assert request.name == "POST /v1/chat/completions"
    assert request.parent_id == ""
    assert attempt.parent_id == request.span_id
    assert (model.parent_id, model.kind) == (attempt.span_id, "SERVER")
    assert not any(span.failed for span in spans)
    assert "http.request.resend_count" not in attempt.attributes


def test_a_caller_s_trace_is_joined(stack: Stack) -> None:
    trace_id, span_id = secrets.token_hex(16), secrets.token_hex(8)
    answer = stack.ask(traceparent=f"00-{trace_id}-{span_id}-01")
    assert answer.headers["x-trace-id"] == trace_id
    spans = stack.wait_for_spans(trace_id, ["gateway", "gateway", "mock-model"])
    assert [span.parent_id for span in spans if span.kind == "SERVER" and span.service == "gateway"] == [span_id]


def test_a_failing_then_good_attempt_shows_as_two_attempt_spans(stack: Stack) -> None:
    stack.script({"kind": "status", "with": {"status": 503}, "times": 1})
    answer = stack.ask()
    assert (answer.status, answer.headers["x-gateway-attempts"]) == (200, "2")
    spans = stack.wait_for_spans(answer.headers["x-trace-id"], [*["gateway"] * 3, *["mock-model"] * 2])
    (request,) = [span for span in spans if span.service == "gateway" and span.kind == "SERVER"]
    attempts = [span for span in spans if span.service == "gateway" and span.kind == "CLIENT"]
    first, second = sorted(attempts, key=lambda span: span.attributes.get("http.request.resend_count", 0))
    assert first.parent_id == second.parent_id == request.span_id
    assert (first.failed, first.attributes["http.response.status_code"]) == (True, 503)
    assert (second.failed, second.attributes["http.response.status_code"]) == (False, 200)
    assert second.attributes["http.request.resend_count"] == 1
    models = {span.parent_id for span in spans if span.service == "mock-model"}
    assert models == {first.span_id, second.span_id}


def test_make_trace_prints_the_answer_and_where_its_trace_is(stack: Stack) -> None:
    run = subprocess.run(
        [sys.executable, "tools/trace.py", "--stream", "Hello"],
        cwd=REPOSITORY,
        env=stack.env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    address = run.stdout.strip().splitlines()[-1].removeprefix("trace: ")
    assert address.startswith(stack.url("JAEGER_PORT", "/trace/"))
    assert call("GET", address).status == 200
    stack.wait_for_spans(address.rpartition("/")[2], ["gateway", "gateway", "mock-model"])
