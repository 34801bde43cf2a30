"""A collector of spans and metrics in the test's own event loop: what came, decoded and as trees."""

from testkit.otlp import Export, Receiver
from testkit.polling import until
from testkit.traces import Span, Trace, read_spans


class Collector(Receiver):
    """A receiver that keeps everything.

    Attributes:
        spans: All that came.
        bodies: Of the exports, uncompressed.
        headers: Of the exports, names in lower case.
    """

    def __init__(self) -> None:
        super().__init__(self._keep, keep_metrics=True)
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []

    async def trace(self, trace_id: str, *, spans: int) -> Trace:
        """Wait until so many spans of the trace are here."""
        found: list[Span] = []

        def enough() -> bool:
            found[:] = [span for span in self.spans if span.trace_id == trace_id]
            return len(found) >= spans

        await until(enough, lambda: f"{len(found)} of {spans} spans came: {[str(span) for span in found]}")
        return Trace(found)

    def _keep(self, export: Export) -> None:
        self.headers.append(export.headers)
        self.bodies.append(export.body)
        self.spans += read_spans(export.request)
