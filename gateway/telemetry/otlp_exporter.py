"""The SDK's OTLP/HTTP exporters, with a way in for encoded bytes and a transport that is bounded in time and bytes.

The way to set a transport is private to the SDK: pyproject.toml bounds its version, and tests/unit/gateway/test_otlp.py
asserts that it exists and is the one that is used.
"""

import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.http import metric_exporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.metrics.export import MetricsData

from gateway.settings import CollectorSettings
from gateway.telemetry.metric_export import ExportFailedError, NoMetricsTakenError
from gateway.telemetry.otlp_transport import Transport
from gateway.telemetry.partial_success import PartialSuccess

DIRECT = CollectorSettings()
TAKES_NO_METRICS = {HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED, HTTPStatus.NOT_IMPLEMENTED}
"""What collectors of spans alone answer."""


class OtlpHttpExporter(OTLPSpanExporter):
    """Posts `ExportTraceServiceRequest`s that are already encoded.

    Args:
        endpoint: url; None: what the environment says.
        timeout: seconds; None: what the environment says.
        reached: how the collector is reached.
        longest: seconds that the time limit is at most, whoever says it.

    Attributes:
        partial: what the collector rejects of the exports that it takes.

    Raises:
        OSError: a certificate cannot be read.
    """

    def __init__(
        self,
        endpoint: str | None = None,
        timeout: float | None = None,
        *,
        reached: CollectorSettings = DIRECT,
        longest: float | None = None,
    ) -> None:
        self.partial = PartialSuccess(ExportTraceServiceResponse, "spans")
        super().__init__(endpoint, timeout=timeout, **_transport(reached, self.partial.decode))
        _limit(self, longest)

    def send(self, body: bytes) -> bool:
        """Post a request, with the SDK's retries and time limit; return whether it was accepted."""
        result = self._client.export(body)
        return result.success and (result.status_code or 0) < 300  # noqa: PLR2004 - a redirect has not got the spans


class OtlpHttpMetricExporter(OTLPMetricExporter):
    """Posts metrics; arguments, attributes and errors are those of `OtlpHttpExporter`."""

    def __init__(
        self,
        endpoint: str | None = None,
        timeout: float | None = None,
        *,
        reached: CollectorSettings = DIRECT,
        longest: float | None = None,
    ) -> None:
        self.partial = PartialSuccess(ExportMetricsServiceResponse, "data_points")
        super().__init__(endpoint, timeout=timeout, **_transport(reached, self.partial.decode))
        _limit(self, longest)
        self._client._logger = _SILENT  # noqa: SLF001 - each failure would be a line; `MetricExport` tells of the first

    def send(self, data: MetricsData) -> None:
        """Post metrics, with the SDK's retries and time limit.

        Raises:
            NoMetricsTakenError: the collector does not know metrics.
            ExportFailedError: it has not got them.
        """
        result = self._client.export(encode_metrics(data).SerializeToString())
        if result.status_code in TAKES_NO_METRICS:
            raise NoMetricsTakenError(f"it answers {result.status_code}")
        if not result.success or (result.status_code or 0) >= 300:  # noqa: PLR2004 - a redirect
            why = str(result.error) if result.error is not None else result.reason
            raise ExportFailedError(f"{result.status_code or 'no answer'}: {why or 'in time'}")


_SILENT = logging.getLogger(f"{metric_exporter.__name__}.silent")
_SILENT.disabled = True


def _transport(reached: CollectorSettings, answered: Callable[[bytes], None]) -> dict[str, Any]:
    """Return our transport as an argument; none where a plugin of the SDK logs in, and the SDK's own must be used."""
    return {} if reached.by_provider else {"_transport": Transport(reached, answered)}


def _limit(exporter: OTLPSpanExporter | OTLPMetricExporter, longest: float | None) -> None:
    client = exporter._client  # noqa: SLF001
    if longest is not None:
        client._timeout = min(client._timeout, longest)  # noqa: SLF001
    if not isinstance(client._transport, Transport):  # noqa: SLF001
        # The session is the plugin's, of `requests`, which then reads no answer.
        client._transport._session.stream = True  # type: ignore[attr-defined]  # noqa: SLF001
