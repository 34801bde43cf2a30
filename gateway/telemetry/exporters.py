"""The exporter that the environment asks for by OpenTelemetry's own variables."""

from typing import TYPE_CHECKING

from gateway.settings import SettingsError
from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from gateway.telemetry.terminal import TreePrinter

if TYPE_CHECKING:
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
    if otel.protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import (  # noqa: PLC0415 - grpcio is slow to load
            OTLPSpanExporter as GrpcExporter,
        )

        return GrpcExporter()
    try:
        return OtlpHttpExporter(reached=otel.collector)
    except OSError as error:
        raise SettingsError(f"a certificate for the collector of spans cannot be read: {error}") from None
