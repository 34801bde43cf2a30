"""An OTLP/HTTP receiver for tests: what a collector would get, decoded and as trees."""

import asyncio
import gzip
from collections.abc import Callable, Iterator
from typing import Any, Self

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan

from tests.integration.gateways import Gateway, StartGateway

KINDS = {ProtoSpan.SPAN_KIND_SERVER: "SERVER", ProtoSpan.SPAN_KIND_CLIENT: "CLIENT"}
STATUS = {0: "unset", 1: "ok", 2: "error"}
PATIENCE = 15.0
"""Seconds until what a test waits for counts as missing."""


class Span:
    """One span as it arrived. Instants are nanoseconds; `events` are (name, attributes, instant)."""

    def __init__(self, service: str, span: ProtoSpan) -> None:
        self.service = service
        self.name = span.name
        self.kind = KINDS[span.kind]
        self.trace_id = span.trace_id.hex()
        self.span_id = span.span_id.hex()
        self.parent_id = span.parent_span_id.hex()
        self.start = span.start_time_unix_nano
        self.end = span.end_time_unix_nano
        self.trace_state = span.trace_state
        self.status = STATUS[span.status.code]
        self.message = span.status.message
        self.attributes = values(span.attributes)
        self.events = [(event.name, values(event.attributes), event.time_unix_nano) for event in span.events]

    @property
    def seconds(self) -> float:
        """How long it took."""
        return (self.end - self.start) / 1e9

    def events_named(self, name: str) -> list[dict[str, Any]]:
        """The attributes of its events of this name."""
        return [attributes for found, attributes, _ in self.events if found == name]

    def __str__(self) -> str:
        """Who, and what came of it: the words in which tests expect a tree."""
        found = self.attributes
        if self.service != "gateway":
            return f"{self.service} {found.get('mock_model.ended')}"
        code = found.get("http.response.status_code")
        if self.kind == "SERVER":
            return f"SERVER {code} {found['gateway.outcome']}, {self.status}"
        words = f"{found['gateway.backend']} {found['gateway.attempt.outcome']} -> {found['gateway.decision']}"
        return f"CLIENT {code} {words}, {self.status}"


class Trace:
    """All spans of one trace."""

    def __init__(self, spans: list[Span]) -> None:
        self.spans = spans

    @property
    def server(self) -> Span:
        """The gateway's SERVER span."""
        (span,) = (span for span in self.spans if span.service == "gateway" and span.kind == "SERVER")
        return span

    @property
    def attempts(self) -> list[Span]:
        """The gateway's CLIENT spans, in order."""
        found = [span for span in self.spans if span.service == "gateway" and span.kind == "CLIENT"]
        return sorted(found, key=lambda span: int(span.attributes["gateway.attempt"]))

    @property
    def tree(self) -> list[str]:
        """One line per span, below its parent; a span whose parent is missing stands at the left."""
        known = {span.span_id for span in self.spans}
        roots = [span for span in self.spans if span.parent_id not in known]
        return [line for root in sorted(roots, key=lambda span: span.start) for line in self._lines(root, "")]

    def _lines(self, span: Span, indent: str) -> Iterator[str]:
        yield f"{indent}{span}"
        children = [child for child in self.spans if child.parent_id == span.span_id]
        for child in sorted(children, key=lambda child: child.start):
            yield from self._lines(child, indent + "  ")


class Collector:
    """Listens on a port of its own, which it keeps when it is stopped and started again.

    Attributes:
        spans: all that came.
        bodies: the requests, as bytes.
        headers: theirs, names in lower case.
        delay: seconds until it answers.
        port: 0 before the first start.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.bodies: list[bytes] = []
        self.headers: list[dict[str, str]] = []
        self.delay = 0.0
        self.port = 0
        self._runner: web.AppRunner | None = None

    @property
    def endpoint(self) -> str:
        """For `OTLPSpanExporter(endpoint=...)`."""
        return f"http://127.0.0.1:{self.port}/v1/traces"

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=2**28)
        app.router.add_post("/v1/traces", self._receive)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        self.port = site.port

    async def stop(self) -> None:
        """Refuse connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def trace(self, trace_id: str, *, spans: int) -> Trace:
        """Wait until so many spans of the trace are here."""
        found: list[Span] = []

        def enough() -> bool:
            found[:] = [span for span in self.spans if span.trace_id == trace_id]
            return len(found) >= spans

        await until(enough, lambda: f"{len(found)} of {spans} spans came: {[str(span) for span in found]}")
        return Trace(found)

    async def _receive(self, request: web.Request) -> web.Response:
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        body = await request.read()
        if request.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.delay:
            await asyncio.sleep(self.delay)
        self.take(body)
        return web.Response()

    def take(self, body: bytes) -> None:
        """Decode an `ExportTraceServiceRequest`."""
        self.bodies.append(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = values(resource.resource.attributes)["service.name"]
            self.spans += [Span(service, span) for scope in resource.scope_spans for span in scope.spans]


def patient(start: StartGateway) -> StartGateway:
    """The same with a connect timeout that even a busy machine does not reach."""

    async def start_patient(*backends: Any, **settings: Any) -> Gateway:  # noqa: ANN401
        return await start(*backends, **{"gateway_connect_timeout": 30, **settings})

    return start_patient


async def until(condition: Callable[[], bool], what: Callable[[], str] = lambda: "it did not happen") -> None:
    """Wait for a condition; `what` says what is missing."""
    try:
        async with asyncio.timeout(PATIENCE):
            while not condition():  # noqa: ASYNC110 - the condition has no event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(what()) from None


def values(pairs: Any) -> dict[str, Any]:  # noqa: ANN401
    """Attributes as a dictionary; a name that comes twice is a defect."""
    found: dict[str, Any] = {}
    pair: KeyValue
    for pair in pairs:
        assert pair.key not in found, f"{pair.key} is there twice"
        found[pair.key] = value_of(pair.value)
    return found


def value_of(value: AnyValue) -> Any:  # noqa: ANN401
    """The value as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [value_of(item) for item in value.array_value.values]
    return getattr(value, kind) if kind is not None else None
