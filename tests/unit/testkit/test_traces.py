"""Spans joined to traces, and a trace as a tree."""

import asyncio
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue
from opentelemetry.proto.resource.v1.resource_pb2 import Resource
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Status
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from testkit import traces
from testkit.otlp import Export
from testkit.traces import Joiner, Span, Trace, draw, read_json_spans, read_spans

BEGIN = 10**18
SERVER_KIND, CLIENT_KIND = ProtoSpan.SPAN_KIND_SERVER, ProtoSpan.SPAN_KIND_CLIENT


def span(span_id: str, parent_id: str = "", *, service: str = "gateway", kind: str = "SERVER", **more: Any) -> Span:  # noqa: ANN401
    fields: dict[str, Any] = {
        "name": "POST /x",
        "trace_id": "t",
        "start": BEGIN,
        "end": BEGIN + 10**9,
        "trace_state": "",
        "status": "unset",
        "message": "",
        "attributes": {},
        "events": [],
    }
    return Span(service=service, kind=kind, span_id=span_id, parent_id=parent_id, **(fields | more))


SERVER = span("1", attributes={"http.response.status_code": 200, "gateway.outcome": "ok"})
FIRST, SECOND = (
    span(
        str(number + 1),
        "1",
        kind="CLIENT",
        start=BEGIN + number * 10**8,
        status=status,
        attributes={
            "http.response.status_code": code,
            "gateway.backend": "b",
            "gateway.attempt": number,
            "gateway.attempt.outcome": outcome,
            "gateway.decision": decision,
            **({"gateway.backoff_seconds": 0.05} if number > 1 else {}),
        },
    )
    for number, code, outcome, decision, status in (
        (1, 500, "status_500", "retry", "error"),
        (2, 200, "ok", "answered", "unset"),
    )
)
MODELS = [
    span(f"m{one.span_id}", one.span_id, service="mock-model", attributes={"mock_model.ended": "complete"})
    for one in (FIRST, SECOND)
]
WHOLE = Trace([SECOND, *MODELS, FIRST, SERVER])


def test_a_trace_is_a_tree_whatever_the_order_in_which_spans_came() -> None:
    assert WHOLE.tree == [
        "SERVER 200 ok, unset",
        "  CLIENT 500 b status_500 -> retry, error",
        "    mock-model complete",
        "  CLIENT 200 b ok -> answered, unset",
        "    mock-model complete",
    ]
    assert (WHOLE.server, WHOLE.attempts) == (SERVER, [FIRST, SECOND])


def test_a_span_whose_parent_is_missing_is_at_the_left() -> None:
    assert Trace([MODELS[0], SERVER]).tree == ["mock-model complete", "SERVER 200 ok, unset"]


def test_a_trace_is_whole_when_each_attempt_has_its_other_side() -> None:
    assert WHOLE.is_whole
    assert not Trace([SERVER, FIRST]).is_whole
    assert Trace([SERVER, FIRST]).has_root
    assert not Trace([FIRST, MODELS[0]]).has_root
    assert Trace([MODELS[0], span("x", "caller")]).is_whole, "the caller's span is not ours to wait for"


def test_a_drawn_trace_has_a_line_for_each_span() -> None:
    lines = draw(WHOLE, str, lambda text: f"<{text}>").splitlines()
    assert [line[: traces.NAME_WIDTH].rstrip() for line in lines] == [
        "gateway: POST /x",
        "├─ gateway: attempt 1, b",
        "│  └─ mock-model: POST /x",
        "└─ gateway: attempt 2, b",
        "   └─ mock-model: POST /x",
    ]
    assert lines[0].endswith("━━━   1000.0 ms  200 ok")
    assert lines[1].endswith(" ms  <500 status_500 -> retry>")
    assert lines[3].endswith(" ms  200 ok -> answered (after a backoff of 50 ms)")


def text(name: str, value: str) -> KeyValue:
    return KeyValue(key=name, value=AnyValue(string_value=value))


def exported(service: str, *spans: ProtoSpan) -> ExportTraceServiceRequest:
    resource = Resource(attributes=[text("service.name", service)])
    return ExportTraceServiceRequest(
        resource_spans=[ResourceSpans(resource=resource, scope_spans=[ScopeSpans(spans=spans)])]
    )


def proto(
    span_id: bytes,
    parent_id: bytes = b"",
    *,
    kind: ProtoSpan.SpanKind.ValueType = SERVER_KIND,
    **more: Any,  # noqa: ANN401
) -> ProtoSpan:
    return ProtoSpan(name="n", kind=kind, trace_id=b"t", span_id=span_id, parent_span_id=parent_id, **more)


def test_spans_are_read_from_an_export() -> None:
    numbers = AnyValue(array_value=ArrayValue(values=[AnyValue(int_value=1), AnyValue(double_value=0.5)]))
    (found,) = read_spans(
        exported(
            "gateway",
            proto(
                b"\x02",
                b"\x01",
                attributes=[KeyValue(key="a", value=numbers)],
                events=[ProtoSpan.Event(name="e", time_unix_nano=5, attributes=[text("b", "c")])],
                status=Status(code=Status.STATUS_CODE_ERROR, message="m"),
                start_time_unix_nano=1,
                end_time_unix_nano=1 + 10**9,
            ),
        )
    )
    assert (found.service, found.kind, found.span_id, found.parent_id) == ("gateway", "SERVER", "02", "01")
    assert (found.attributes, found.events) == ({"a": [1, 0.5]}, [("e", {"b": "c"}, 5)])
    assert found.events_named("e") == [{"b": "c"}]
    assert (found.failed, found.message, found.seconds) == (True, "m", 1)


def test_an_attribute_that_is_there_twice_is_a_defect() -> None:
    with pytest.raises(AssertionError, match="a is there twice"):
        list(read_spans(exported("gateway", proto(b"\x01", attributes=[text("a", "1"), text("a", "2")]))))


def test_spans_are_read_from_json() -> None:
    document = {
        "resourceSpans": [
            {
                "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "gateway"}}]},
                "scopeSpans": [
                    {
                        "spans": [
                            {
                                "traceId": "0a",
                                "spanId": "02",
                                "parentSpanId": "01",
                                "name": "n",
                                "kind": 3,
                                "startTimeUnixNano": "5",
                                "endTimeUnixNano": "7",
                                "attributes": [{"key": "a", "value": {"intValue": "1"}}],
                                "status": {"code": 2},
                            },
                            {
                                "traceId": "0a",
                                "spanId": "01",
                                "name": "n",
                                "kind": 2,
                                "startTimeUnixNano": "5",
                                "endTimeUnixNano": "7",
                            },
                        ]
                    }
                ],
            }
        ]
    }
    client, server = read_json_spans(document)
    assert (client.kind, client.parent_id, client.attributes, client.failed) == ("CLIENT", "01", {"a": 1}, True)
    assert (server.kind, server.parent_id, server.attributes, server.failed) == ("SERVER", "", {}, False)


async def first(joiner: Joiner) -> tuple[str, Trace]:
    async with asyncio.timeout(10):
        async for found in joiner.traces():
            return found
    raise AssertionError


async def test_spans_of_several_exports_are_joined_and_handed_out_once() -> None:
    joiner = Joiner()
    joiner.take(Export("", {}, exported("mock-model", proto(b"\x03", b"\x02")).SerializeToString()))
    joiner.take(
        Export(
            "", {}, exported("gateway", proto(b"\x02", b"\x01", kind=CLIENT_KIND), proto(b"\x01")).SerializeToString()
        )
    )
    trace_id, trace = await first(joiner)
    assert (trace_id, len(trace.spans)) == (b"t".hex(), 3)
    joiner.take(Export("", {}, exported("gateway", proto(b"\x04")).SerializeToString()))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await first(joiner)


async def test_a_trace_that_misses_a_span_is_handed_out_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "QUIET_SECONDS", 0.05)
    joiner = Joiner()
    joiner.take(
        Export(
            "", {}, exported("gateway", proto(b"\x02", b"\x01", kind=CLIENT_KIND), proto(b"\x01")).SerializeToString()
        )
    )
    assert len((await first(joiner))[1].spans) == 2


def test_a_load_test_leaves_only_so_many_traces_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "MAX_TRACES", 3)
    joiner = Joiner()
    for number in range(10):
        open_one = ProtoSpan(name="n", kind=CLIENT_KIND, trace_id=bytes([number]), span_id=b"\x01")
        joiner.take(Export("", {}, exported("gateway", open_one).SerializeToString()))
    assert list(joiner._open) == ["07", "08", "09"]
