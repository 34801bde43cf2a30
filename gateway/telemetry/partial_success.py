"""What a collector rejects of an export that it takes: OTLP's `partial_success`."""

import logging
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from gateway.telemetry.output import visible

if TYPE_CHECKING:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

MAX_MESSAGE = 512
"""Characters of a collector's message that are written to the log."""

_log = logging.getLogger("gateway")


class PartialSuccess:
    """Reads answers, keeps the number of the latest, and tells of a collector that complains once.

    Args:
        answer: the class of the answers.
        what: is exported, as the name of the answer's field has it: `spans` or `data_points`.
    """

    def __init__(self, answer: "type[ExportTraceServiceResponse | ExportMetricsServiceResponse]", what: str) -> None:
        self._answer = answer
        self._field = f"rejected_{what}"
        self._what = what.replace("_", " ")
        self._rejected = 0
        self._told = False

    def decode(self, body: bytes) -> None:
        """Read an encoded answer; what is none says nothing."""
        if not body:
            self._told = False
            return
        try:
            answer = self._answer.FromString(body)
        except DecodeError:
            return
        self.read(answer)

    def read(self, answer: "ExportTraceServiceResponse | ExportMetricsServiceResponse") -> None:
        """Read an answer."""
        partial = answer.partial_success
        self._rejected = max(0, getattr(partial, self._field))
        if not self._rejected and not partial.error_message:
            self._told = False
        elif not self._told:
            self._told = True
            message = visible(partial.error_message[:MAX_MESSAGE]) or "it does not say why"
            _log.warning("the collector rejected %d of the %s of an export: %s", self._rejected, self._what, message)

    def take(self, most: int) -> int:
        """Return how many the latest answer rejected, of as many as `most` that were sent; the next call returns 0."""
        rejected, self._rejected = min(self._rejected, most), 0
        return rejected
