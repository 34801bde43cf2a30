"""Traces in the terminal, without Jaeger: one line per span, with a bar for when and how long."""

import sys
from typing import TYPE_CHECKING, TextIO

from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind, StatusCode

from gateway.telemetry.output import visible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

WIDTH = 30
"""Characters of the bar."""


class TreePrinter(SpanExporter):
    """Prints each trace as a tree. Colours only on a terminal."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._colours = self._stream.isatty()

    def export(self, spans: "Sequence[ReadableSpan]") -> SpanExportResult:
        """Print the traces of these spans."""
        traces: dict[int, list[ReadableSpan]] = {}
        for span in spans:
            if span.context is not None:
                traces.setdefault(span.context.trace_id, []).append(span)
        for trace_id, members in traces.items():
            self._print(trace_id, members)
        self._stream.flush()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Nothing is held."""

    def _print(self, trace_id: int, spans: "list[ReadableSpan]") -> None:
        root = next((span for span in spans if span.kind is SpanKind.SERVER), spans[0])
        began, ended = root.start_time or 0, root.end_time or 0
        total = max(1, ended - began)
        lines = [f"trace {trace_id:032x}"]
        for span in spans:
            start, end = span.start_time or began, span.end_time or ended
            left = min(WIDTH - 1, max(0, (start - began) * WIDTH // total))
            width = max(1, min(WIDTH - left, (end - start) * WIDTH // total))
            bar = " " * left + "#" * width + " " * (WIDTH - left - width)
            lines.append(f"  |{self._paint(span, bar)}| {(end - start) / 1e6:8.1f} ms  {visible(_describe(span))}")
        self._stream.write("\n".join(lines) + "\n")

    def _paint(self, span: "ReadableSpan", bar: str) -> str:
        if not self._colours:
            return bar
        colour = 31 if span.status.status_code is StatusCode.ERROR else 32
        return f"\x1b[{colour}m{bar}\x1b[0m"


def _describe(span: "ReadableSpan") -> str:
    attributes = span.attributes or {}
    if span.kind is SpanKind.SERVER:
        return f"{span.name}: {attributes.get('http.response.status_code')} {attributes.get('gateway.outcome')}"
    words = [
        f"  attempt {attributes.get('gateway.attempt')} at {attributes.get('gateway.backend')}:",
        str(attributes.get("gateway.attempt.outcome")),
        f"-> {attributes.get('gateway.decision')}",
    ]
    slept = attributes.get("gateway.backoff_seconds")
    if isinstance(slept, float):
        words.append(f"(after {slept:.3f} s of backoff)")
    return " ".join(words)
