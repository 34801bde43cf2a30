"""Spans in the form of OpenTelemetry's SDK, for exporters that take no other: gRPC, the terminal, tests."""

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState

from gateway import __version__
from gateway.telemetry.span_data import CLIENT, ERROR, SpanData

SCOPE = InstrumentationScope("gateway", __version__)
_KINDS = {CLIENT: SpanKind.CLIENT}


def to_readable(span: SpanData, resource: Resource) -> ReadableSpan:
    """Return a span in the SDK's form, which any `SpanExporter` takes."""
    flags = TraceFlags(TraceFlags.SAMPLED)
    state = TraceState.from_header([span.trace_state]) if span.trace_state else None
    context = SpanContext(span.trace_id, span.span_id, is_remote=False, trace_flags=flags, trace_state=state)
    parent = None
    if span.parent_id:
        parent = SpanContext(span.trace_id, span.parent_id, is_remote=span.parent_is_remote)
    return ReadableSpan(
        name=span.shared.name,
        context=context,
        parent=parent,
        resource=resource,
        attributes=dict(span.attributes),
        events=[Event(name, dict(attributes), timestamp=moment) for moment, name, attributes in span.events],
        kind=_KINDS.get(span.shared.kind, SpanKind.SERVER),
        status=Status(StatusCode.ERROR, span.error) if span.status == ERROR else Status(),
        start_time=span.start,
        end_time=span.end,
        instrumentation_scope=SCOPE,
    )
