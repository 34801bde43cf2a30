"""The exporters that the environment asks for by OpenTelemetry's own variables."""

from typing import TYPE_CHECKING

from gateway.settings import SettingsError
from gateway.telemetry.metric_export import MetricExport, MetricExporter
from gateway.telemetry.otlp_exporter import OtlpHttpExporter, OtlpHttpMetricExporter
from gateway.telemetry.terminal import TreePrinter
from gateway.telemetry.tracing import BATCH, INTERVAL, MAX_WAITING, Tracer

if TYPE_CHECKING:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace.export import SpanExporter

    from gateway.settings import OtelSettings, Settings


def exporter_for(settings: "Settings", otel: "OtelSettings") -> "SpanExporter | None":
    """Return an OTLP exporter where an endpoint is set; without one, the terminal's in dev and none in prod.

    Raises:
        SettingsError: a certificate cannot be read.
    """
    if otel.disabled:
        return None
    if not otel.has_endpoint:
        return TreePrinter() if settings.app_mode == "dev" else None
    longest = otel.batches.timeout
    if otel.protocol == "grpc":
        from gateway.telemetry.otlp_grpc import OtlpGrpcExporter  # noqa: PLC0415 - grpcio is slow to load

        return OtlpGrpcExporter(longest=longest)
    try:
        return OtlpHttpExporter(reached=otel.collector, longest=longest)
    except OSError as error:
        raise SettingsError(f"a certificate for the collector of spans cannot be read: {error}") from None


def tracer_for(otel: "OtelSettings", exporter: "SpanExporter | None") -> Tracer:
    """Return what traces requests. `OTEL_BSP_*` counts spans: a request has two, and one more for each retry."""
    batches = otel.batches
    return Tracer(
        exporter,
        interval=batches.delay or INTERVAL,
        max_waiting=max(1, batches.queue // 2) if batches.queue is not None else MAX_WAITING,
        batch=max(1, batches.size // 2) if batches.size is not None else BATCH,
        most_spans=batches.size,
    )


def metric_export_for(otel: "OtelSettings", resource: "Resource") -> MetricExport | None:
    """Return what exports metrics by OTLP where an endpoint for them is set, else None.

    Raises:
        SettingsError: a certificate cannot be read.
    """
    metrics = otel.metrics
    if not metrics.enabled:
        return None
    exporter: MetricExporter
    if metrics.protocol == "grpc":
        from gateway.telemetry.otlp_grpc import OtlpGrpcMetricExporter  # noqa: PLC0415 - grpcio is slow to load

        exporter = OtlpGrpcMetricExporter(longest=metrics.timeout)
    else:
        try:
            exporter = OtlpHttpMetricExporter(reached=metrics.collector, longest=metrics.timeout)
        except OSError as error:
            raise SettingsError(f"a certificate for the collector of metrics cannot be read: {error}") from None
    return MetricExport(exporter, resource=resource, interval=metrics.interval, delta=metrics.delta)
