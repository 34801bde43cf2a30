"""Receive spans by OTLP/HTTP from several processes, join them to traces, and draw a trace as a tree for a terminal."""

import asyncio
import contextlib
import socket
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

BAR_WIDTH = 24
NAME_WIDTH = 46
QUIET_SECONDS = 1.5  # a trace whose root is there is told after so long without another span, whatever may be missing
MAX_TRACES = 2000  # what a load test would leave unfinished here is forgotten beyond this


@dataclass
class Trace:
    """The spans of one trace as far as they have come in."""

    spans: dict[bytes, Span] = field(default_factory=dict)
    services: dict[bytes, str] = field(default_factory=dict)
    last_arrival: float = 0.0

    def add(self, service: str, span: Span) -> None:
        """Take in a span of a service."""
        self.spans[span.span_id] = span
        self.services[span.span_id] = service
        self.last_arrival = time.monotonic()

    def children(self) -> dict[bytes, list[Span]]:
        """Spans by their parent's id, in order of their start; those whose parent is not here are under b""."""
        tree: defaultdict[bytes, list[Span]] = defaultdict(list)
        for span in sorted(self.spans.values(), key=lambda span: span.start_time_unix_nano):
            tree[span.parent_span_id if span.parent_span_id in self.spans else b""].append(span)
        return tree

    def has_root(self) -> bool:
        """Tell whether the span that ends last is here: the gateway's, or one that nobody called for."""
        return any(
            span.kind == Span.SPAN_KIND_SERVER and (not span.parent_span_id or self.services[span.span_id] == "gateway")
            for span in self.spans.values()
        )

    def is_whole(self) -> bool:
        """Tell whether each attempt has the span of the other side too; one that reached nobody never has."""
        tree = self.children()
        attempts = (span for span in self.spans.values() if span.kind == Span.SPAN_KIND_CLIENT)
        return self.has_root() and all(tree[span.span_id] for span in attempts)


def attributes(span: Span) -> dict[str, str]:
    """Read a span's attributes as text."""
    return {pair.key: _text(pair.value) for pair in span.attributes}


def _text(value: AnyValue) -> str:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return ", ".join(_text(item) for item in value.array_value.values)
    content = getattr(value, kind) if kind else ""
    return f"{content:g}" if isinstance(content, float) else str(content)


def draw(trace: Trace, good: Callable[[str], str], bad: Callable[[str], str]) -> str:
    """Draw a trace: a line for each span with its share of the time, its length and how it went."""
    tree = trace.children()
    begin = min(span.start_time_unix_nano for span in trace.spans.values())
    whole = max(1, max(span.end_time_unix_nano for span in trace.spans.values()) - begin)
    lines: list[str] = []

    def line(span: Span, indent: str) -> None:
        left = min(BAR_WIDTH - 1, (span.start_time_unix_nano - begin) * BAR_WIDTH // whole)
        width = max(1, round((span.end_time_unix_nano - begin) * BAR_WIDTH / whole) - left)
        bar = f"{' ' * left}{'━' * width}".ljust(BAR_WIDTH)
        milliseconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e6
        paint = bad if span.status.code == Status.STATUS_CODE_ERROR else good
        name = f"{indent}{trace.services[span.span_id]}: {_name(span)}"
        lines.append(f"{name:<{NAME_WIDTH}} {paint(bar)} {milliseconds:8.1f} ms  {paint(_outcome(span))}")

    def below(parent: bytes, indent: str) -> None:
        for span in tree[parent]:
            last = span is tree[parent][-1]
            line(span, f"{indent}{'└─ ' if last else '├─ '}")
            below(span.span_id, f"{indent}{'   ' if last else '│  '}")

    for root in tree[b""]:
        line(root, "")
        below(root.span_id, "")
    return "\n".join(lines)


def _name(span: Span) -> str:
    """The span's own name, or the attempt it stands for."""
    found = attributes(span)
    return (
        f"attempt {found['gateway.attempt']}, {found['gateway.backend']}" if "gateway.attempt" in found else span.name
    )


def _outcome(span: Span) -> str:
    """Status, what came of it, and what followed; the attributes are those of the gateway and of the mock model."""
    found = attributes(span)
    word = found.get("gateway.attempt.outcome") or found.get("gateway.outcome") or found.get("error.type", "")
    ended = found.get("mock_model.ended", "")
    words = [found.get("http.response.status_code", ""), word or ended]
    if "gateway.decision" in found:
        words.append(f"-> {found['gateway.decision']}")
    if "gateway.backoff_seconds" in found:
        words.append(f"(after a backoff of {float(found['gateway.backoff_seconds']) * 1000:.0f} ms)")
    return " ".join(word for word in words if word)


class Receiver:
    """An OTLP/HTTP endpoint that hands out each trace once, when it is whole or nothing followed for a while."""

    def __init__(self) -> None:
        self._open: dict[bytes, Trace] = {}
        self._told: deque[bytes] = deque(maxlen=MAX_TRACES)

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Serve on a free port of the loopback; gives the address."""
        app = web.Application(client_max_size=64 << 20)
        app.router.add_post("/v1/traces", self._receive)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        listener = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(runner, listener, shutdown_timeout=1).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            await runner.cleanup()

    async def _receive(self, request: web.Request) -> web.Response:
        for resource in ExportTraceServiceRequest.FromString(await request.read()).resource_spans:
            service = next(
                (_text(pair.value) for pair in resource.resource.attributes if pair.key == "service.name"), "?"
            )
            for scope in resource.scope_spans:
                for span in scope.spans:
                    if span.trace_id not in self._told:
                        self._open.setdefault(span.trace_id, Trace()).add(service, span)
        while len(self._open) > MAX_TRACES:
            del self._open[next(iter(self._open))]
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )

    async def traces(self) -> AsyncIterator[tuple[str, Trace]]:
        """Give each trace with its id (hexadecimal), forever."""
        while True:
            now = time.monotonic()
            for trace_id, trace in list(self._open.items()):
                if trace.is_whole() or (trace.has_root() and now - trace.last_arrival > QUIET_SECONDS):
                    del self._open[trace_id]
                    self._told.append(trace_id)
                    yield trace_id.hex(), trace
            await asyncio.sleep(0.1)
