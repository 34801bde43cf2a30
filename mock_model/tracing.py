"""Spans: one SERVER span for each call under `/v1`, below the caller's."""

import threading
from typing import TYPE_CHECKING

from aiohttp import web
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mock_model.call import Call
from mock_model.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.util.types import AttributeValue

SCHEDULE_MILLIS = 1000
BATCH = 128
FLUSH = 2.0
_SERVER_ERROR = 500
_W3C = TraceContextTextMapPropagator()


def build_provider(settings: Settings) -> TracerProvider:
    """Return a provider that exports by OTLP to the endpoint of the environment; without one nothing is recorded."""
    provider = TracerProvider(
        sampler=None if settings.exports_traces else ALWAYS_OFF,
        resource=Resource.create({"service.name": settings.otel_service_name}),
        shutdown_on_exit=False,
    )
    if settings.exports_traces:
        exporter = _exporter(settings.traces_protocol)
        provider.add_span_processor(
            BatchSpanProcessor(exporter, schedule_delay_millis=SCHEDULE_MILLIS, max_export_batch_size=BATCH)
        )
    return provider


def _exporter(protocol: str) -> SpanExporter:
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc  # noqa: PLC0415

        return Grpc()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http  # noqa: PLC0415

    return Http()


def flush_and_stop(provider: TracerProvider, timeout: float = FLUSH) -> None:
    """Export what is left and stop, within `timeout` seconds whatever the collector does."""
    thread = threading.Thread(target=provider.shutdown, name="stop-tracing", daemon=True)
    thread.start()
    thread.join(timeout)


def start_span(tracer: Tracer, request: web.Request, route: str, operation: str | None) -> Span:
    """Return the span of a call, begun before its body is read."""
    attributes: dict[str, AttributeValue] = {
        "http.request.method": request.method,
        "http.route": route,
        "url.path": request.path,
        "url.scheme": "http",
        "gen_ai.provider.name": "mock-model",
    }
    if operation is not None:
        attributes["gen_ai.operation.name"] = operation
    return tracer.start_span(
        f"{request.method} {route}",
        context=_W3C.extract(request.headers),
        kind=SpanKind.SERVER,
        attributes=attributes,
    )


def describe(span: Span, call: Call) -> None:
    """Note on the span what was asked for and how it ended, but no text."""
    if not span.is_recording():
        return
    entry, answer = call.entry, call.answer
    attributes: dict[str, AttributeValue] = {
        "gen_ai.request.model": entry.model or "",
        "gen_ai.request.stream": call.stream,
        "mock_model.fingerprint": entry.fingerprint,
        "mock_model.occurrence": call.occurrence,
        "mock_model.ended": entry.ended or "",
        "mock_model.events_sent": entry.events_sent,
    }
    if entry.request_id is not None:
        attributes["mock_model.request_id"] = entry.request_id
    if entry.fault is not None:
        attributes["mock_model.fault"] = entry.fault
    if call.status is not None:
        attributes["http.response.status_code"] = call.status
    if entry.ended == "complete" and answer.input_tokens:
        attributes["gen_ai.usage.input_tokens"] = answer.input_tokens
        attributes["gen_ai.usage.output_tokens"] = answer.output_tokens
        attributes["gen_ai.response.finish_reasons"] = list(answer.finish_reasons)
    span.set_attributes(attributes)
    if entry.ended == "fault":
        span.set_attribute("error.type", entry.fault or "stopped")
        span.set_status(Status(StatusCode.ERROR))
    elif call.status is not None and call.status >= _SERVER_ERROR:
        span.set_attribute("error.type", str(call.status))
        span.set_status(Status(StatusCode.ERROR))
