"""Spans as they arrive, joined to traces; a trace as a tree."""

import asyncio
import base64
import copy
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from testkit.otlp import Export

KINDS = {1: "INTERNAL", 2: "SERVER", 3: "CLIENT"}
STATUS = ("unset", "ok", "error")
GATEWAY = "gateway"
BAR_WIDTH, NAME_WIDTH = 24, 46
QUIET_SECONDS = 1.5
"""After which a trace with its root counts as whole, whatever may be missing."""
LOOK_EVERY = 0.1
"""Seconds between two looks at the traces: those are counted, so that a machine that stood still was not quiet."""
MAX_TRACES = 2000
"""How many unfinished traces are kept: a load test leaves some."""


@dataclass(frozen=True)
class Span:
    """One span.

    Attributes:
        kind: `SERVER`, `CLIENT` or `INTERNAL`.
        trace_id: Hexadecimal, as the other ids.
        parent_id: Empty without a parent.
        start: Nanoseconds since the epoch, as all instants here.
        status: `unset`, `ok` or `error`; its text is `message`.
        events: Name, attributes and instant of each.
    """

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    trace_state: str
    status: str
    message: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any], int]]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.start) / 1e9

    @property
    def failed(self) -> bool:
        """Whether its status is an error."""
        return self.status == "error"

    @property
    def outcome(self) -> str:
        """What came of it, in the words of the gateway or of the mock model, and what followed."""
        found = self.attributes
        word = found.get("gateway.attempt.outcome") or found.get("gateway.outcome") or found.get("error.type")
        words = [found.get("http.response.status_code"), word or found.get("mock_model.ended")]
        if "gateway.decision" in found:
            words.append(f"-> {found['gateway.decision']}")
        if "gateway.backoff_seconds" in found:
            words.append(f"(after a backoff of {found['gateway.backoff_seconds'] * 1000:.0f} ms)")
        return " ".join(str(word) for word in words if word)

    def events_named(self, name: str) -> list[dict[str, Any]]:
        """Return the attributes of its events with this name."""
        return [attributes for found, attributes, _ in self.events if found == name]

    def __str__(self) -> str:
        """Who, and what came of it: the words in which tests expect a tree."""
        found = self.attributes
        if self.service != GATEWAY:
            return f"{self.service} {found.get('mock_model.ended')}"
        code = found.get("http.response.status_code")
        if self.kind == "SERVER":
            return f"SERVER {code} {found['gateway.outcome']}, {self.status}"
        words = f"{found['gateway.backend']} {found['gateway.attempt.outcome']} -> {found['gateway.decision']}"
        return f"CLIENT {code} {words}, {self.status}"


class Trace:
    """The spans of one trace, as far as they are here."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans

    @property
    def server(self) -> Span:
        """The gateway's SERVER span."""
        (span,) = (span for span in self.spans if span.service == GATEWAY and span.kind == "SERVER")
        return span

    @property
    def attempts(self) -> list[Span]:
        """The gateway's CLIENT spans, in order."""
        found = [span for span in self.spans if span.service == GATEWAY and span.kind == "CLIENT"]
        return sorted(found, key=lambda span: int(span.attributes["gateway.attempt"]))

    @property
    def tree(self) -> list[str]:
        """One line for each span, indented below its parent; a span whose parent is missing is at the left."""
        return [f"{'  ' * len(last)}{span}" for span, last in self.walk()]

    @property
    def has_root(self) -> bool:
        """Whether the span that ends last is here: the gateway's, or one with no parent."""
        return any(span.kind == "SERVER" and (not span.parent_id or span.service == GATEWAY) for span in self.spans)

    @property
    def is_whole(self) -> bool:
        """Whether each attempt has the span of the other side too; one that reached nobody never has."""
        parents = {span.parent_id for span in self.spans}
        return self.has_root and all(span.span_id in parents for span in self.spans if span.kind == "CLIENT")

    def walk(self) -> Iterator[tuple[Span, tuple[bool, ...]]]:
        """Yield each span after its parent, siblings by their start.

        Beside it, for the span and each ancestor below the root, from above: whether it is its parent's last child.
        """
        known = {span.span_id for span in self.spans}
        children: defaultdict[str, list[Span]] = defaultdict(list)
        for span in sorted(self.spans, key=lambda span: span.start):
            children[span.parent_id if span.parent_id in known else ""].append(span)

        def below(parent: str, above: tuple[bool, ...]) -> Iterator[tuple[Span, tuple[bool, ...]]]:
            for span in children[parent]:
                last = (*above, span is children[parent][-1]) if parent else ()
                yield span, last
                yield from below(span.span_id, last)

        return below("", ())


def draw(trace: Trace, good: Callable[[str], str], bad: Callable[[str], str]) -> str:
    """Draw a trace: a line for each span with its share of the time, its length and how it went."""
    begin = min(span.start for span in trace.spans)
    whole = max(1, max(span.end for span in trace.spans) - begin)
    lines = []
    for span, last in trace.walk():
        branch = "".join("   " if one else "│  " for one in last[:-1]) + ("└─ " if last[-1] else "├─ ") if last else ""
        attempt = span.attributes.get("gateway.attempt")
        name = f"attempt {attempt}, {span.attributes['gateway.backend']}" if attempt else span.name
        left = min(BAR_WIDTH - 1, (span.start - begin) * BAR_WIDTH // whole)
        width = max(1, round((span.end - begin) * BAR_WIDTH / whole) - left)
        bar = f"{' ' * left}{'━' * width}".ljust(BAR_WIDTH)
        paint = bad if span.failed else good
        label = f"{branch}{span.service}: {name}"
        lines.append(f"{label:<{NAME_WIDTH}} {paint(bar)} {span.seconds * 1e3:8.1f} ms  {paint(span.outcome)}")
    return "\n".join(lines)


class Joiner:
    """Joins spans that come from several processes, and hands out each trace once."""

    def __init__(self) -> None:
        self._open: dict[str, list[Span]] = {}
        self._quiet_looks: dict[str, int] = {}
        self._done: deque[str] = deque(maxlen=MAX_TRACES)

    def take(self, export: Export) -> None:
        """Take in the spans of an export."""
        for span in read_spans(export.request):
            if span.trace_id not in self._done:
                self._open.setdefault(span.trace_id, []).append(span)
                self._quiet_looks[span.trace_id] = 0
        while len(self._open) > MAX_TRACES:
            self._close(next(iter(self._open)))

    async def traces(self) -> AsyncIterator[tuple[str, Trace]]:
        """Yield each trace with its id, forever: when it is whole, or has its root and nothing followed for a while."""
        while True:
            for trace_id, spans in list(self._open.items()):
                trace = Trace(spans)
                quiet = self._quiet_looks[trace_id] * LOOK_EVERY >= QUIET_SECONDS
                self._quiet_looks[trace_id] += 1
                if trace.is_whole or (trace.has_root and quiet):
                    self._close(trace_id)
                    self._done.append(trace_id)
                    yield trace_id, trace
            await asyncio.sleep(LOOK_EVERY)

    def _close(self, trace_id: str) -> None:
        self._open.pop(trace_id, None)
        self._quiet_looks.pop(trace_id, None)


def read_spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    """Read the spans of an export."""
    for resource in request.resource_spans:
        service = _values(resource.resource.attributes)["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield _span(service, span)


def read_json_spans(document: Mapping[str, Any]) -> Iterator[Span]:
    """Read the spans of a document in OTLP's JSON form, as Jaeger's API has it: ids are hexadecimal."""
    document = copy.deepcopy(dict(document))
    for resource in document["resourceSpans"]:
        for scope in resource["scopeSpans"]:
            for span in scope["spans"]:
                for key in {"traceId", "spanId", "parentSpanId"} & span.keys():
                    span[key] = base64.b64encode(bytes.fromhex(span[key])).decode()
    return read_spans(ParseDict(document, ExportTraceServiceRequest(), ignore_unknown_fields=True))


def _span(service: str, span: ProtoSpan) -> Span:
    return Span(
        service=service,
        name=span.name,
        kind=KINDS[span.kind],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        trace_state=span.trace_state,
        status=STATUS[span.status.code],
        message=span.status.message,
        attributes=_values(span.attributes),
        events=[(event.name, _values(event.attributes), event.time_unix_nano) for event in span.events],
    )


def _values(pairs: Any) -> dict[str, Any]:  # noqa: ANN401 - protobuf's repeated KeyValue
    """Read attributes; a name that is there twice is a defect."""
    found: dict[str, Any] = {}
    pair: KeyValue
    for pair in pairs:
        assert pair.key not in found, f"{pair.key} is there twice"
        found[pair.key] = _value(pair.value)
    return found


def _value(value: AnyValue) -> Any:  # noqa: ANN401 - any value
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind is not None else None
