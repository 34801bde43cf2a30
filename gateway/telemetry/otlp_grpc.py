"""The SDK's OTLP/gRPC exporters, which also read what the collector answers. Imported when asked for: grpcio is slow.

The names of the mixin that are used here are private to the SDK, see `otlp_exporter.py`.
"""

from typing import TYPE_CHECKING, Any

import grpc  # type: ignore[import-untyped]
from opentelemetry.exporter.otlp.proto.grpc import exporter
from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.metrics.export import MetricExportResult, MetricsData

from gateway.telemetry.metric_export import ExportFailedError, NoMetricsTakenError
from gateway.telemetry.partial_success import PartialSuccess

if TYPE_CHECKING:
    import logging
    from collections.abc import Callable


def _not_of_metrics(record: "logging.LogRecord") -> bool:
    """Return whether a line is not about an export of metrics: `MetricExport` tells of the first that fails."""
    return not (isinstance(record.args, tuple) and "metrics" in record.args)


exporter.logger.addFilter(_not_of_metrics)


class OtlpGrpcExporter(OTLPSpanExporter):
    """Sends spans.

    Args:
        longest: seconds that the time limit is at most, whatever the environment says.

    Attributes:
        partial: what the collector rejects of the exports that it takes.
    """

    def __init__(self, *, longest: float | None = None) -> None:
        self.partial = PartialSuccess(ExportTraceServiceResponse, "spans")
        super().__init__()
        self._timeout = min(self._timeout, longest or self._timeout)

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
        self._client: Any = _Reading(self._client.Export, self.partial)


class OtlpGrpcMetricExporter(OTLPMetricExporter):
    """Sends metrics; arguments and attributes are those of `OtlpGrpcExporter`."""

    def __init__(self, *, longest: float | None = None) -> None:
        self.partial = PartialSuccess(ExportMetricsServiceResponse, "data_points")
        super().__init__()
        self._timeout = min(self._timeout, longest or self._timeout)

    def _initialize_channel_and_stub(self) -> None:
        super()._initialize_channel_and_stub()  # type: ignore[no-untyped-call]
        self._client: Any = _Reading(self._client.Export, self.partial)

    def send(self, data: MetricsData) -> None:
        """Send metrics, with the SDK's retries and time limit.

        Raises:
            NoMetricsTakenError: the collector does not know metrics.
            ExportFailedError: it has not got them.
        """
        if self.export(data) is MetricExportResult.SUCCESS:
            return
        code = self._client.failed_with
        if code is grpc.StatusCode.UNIMPLEMENTED:
            raise NoMetricsTakenError(f"it answers {code.name}")
        raise ExportFailedError(code.name if code is not None else "no answer")


class _Reading:
    """A stub whose answers are read.

    Attributes:
        failed_with: the code of the latest call; None where it was answered.
    """

    def __init__(self, export: "Callable[..., Any]", partial: PartialSuccess) -> None:
        self._export = export
        self._partial = partial
        self.failed_with: Any = None

    def Export(self, **call: Any) -> None:  # noqa: ANN401, N802 - gRPC's name
        """Send a request. Raises: grpc.RpcError."""
        try:
            answer = self._export(**call)
        except grpc.RpcError as error:
            self.failed_with = error.code()
            raise
        self.failed_with = None
        self._partial.read(answer)
