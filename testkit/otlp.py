"""A receiver of spans and metrics by OTLP/HTTP: inside a program, or as a process of its own that counts spans.

`python -m testkit.otlp PORT FILE` writes a line for each export to FILE: the sender's name and the number of spans.
"""

import asyncio
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from aiohttp import web
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process, python

MAX_EXPORT = 1 << 28
"""Bytes."""
PATH = "/v1/traces"


@dataclass(frozen=True)
class Export:
    """One export of spans.

    Attributes:
        sender: What precedes `/v1/traces` in the path, without slashes.
        headers: Names in lower case.
        body: The encoded spans, uncompressed.
    """

    sender: str
    headers: dict[str, str]
    body: bytes

    @cached_property
    def request(self) -> ExportTraceServiceRequest:
        """The spans, decoded."""
        request: ExportTraceServiceRequest = ExportTraceServiceRequest.FromString(self.body)
        return request

    @property
    def count(self) -> int:
        """The number of spans."""
        return sum(len(scope.spans) for resource in self.request.resource_spans for scope in resource.scope_spans)


class Receiver:
    """Takes exports at a port of its own, which it keeps when it is stopped and started again.

    Args:
        take: Called with each export.
        port: Where it listens; 0 for a free one, which stays free while nothing listens.

    Attributes:
        delay: Seconds until it takes an export and answers.
        answer: To exports of spans, metrics_answer: To those of metrics.
        metrics: Exports of metrics that came, if they are kept.
    """

    def __init__(self, take: Callable[[Export], None], port: int = 0, *, keep_metrics: bool = False) -> None:
        self.port = port or free_port()
        self.delay = 0.0
        self.answer = ExportTraceServiceResponse()
        self.metrics_answer = ExportMetricsServiceResponse()
        self.metrics: list[ExportMetricsServiceRequest] = []
        self._keep_metrics = keep_metrics
        self._take = take
        self._runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def endpoint(self) -> str:
        """Where an exporter sends spans."""
        return self.url + PATH

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=MAX_EXPORT)
        app.router.add_post("/{sender:.*}v1/traces", self._receive)
        app.router.add_post("/{sender:.*}v1/metrics", self._receive_metrics)
        app.router.add_get("/", self._serves)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, LOOPBACK, self.port, reuse_address=True)
        await site.start()
        self.port = site.port

    async def stop(self) -> None:
        """Refuse connections."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _receive(self, request: web.Request) -> web.Response:
        body = await request.read()  # aiohttp has uncompressed it
        headers = {name.lower(): value for name, value in request.headers.items()}
        if self.delay:
            await asyncio.sleep(self.delay)
        self._take(Export(request.match_info["sender"].strip("/"), headers, body))
        return web.Response(body=self.answer.SerializeToString(), content_type="application/x-protobuf")

    async def _receive_metrics(self, request: web.Request) -> web.Response:
        body = await request.read()
        if self.delay:
            await asyncio.sleep(self.delay)
        if self._keep_metrics:
            self.metrics.append(ExportMetricsServiceRequest.FromString(body))
        return web.Response(body=self.metrics_answer.SerializeToString(), content_type="application/x-protobuf")

    async def _serves(self, _request: web.Request) -> web.Response:
        return web.Response()


class Sink(Process):
    """A receiver as a process, which counts spans over all its lives.

    Attributes:
        url: What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to; a path behind it is the sender's name.
    """

    def __init__(self, name: str, folder: Path, *, cores: Collection[int] | None = None) -> None:
        port = free_port()
        self.url = f"http://{LOOPBACK}:{port}"
        self._counts = folder / f"{name}.spans"
        super().__init__(
            name,
            python("testkit.otlp", str(port), str(self._counts)),
            env={},
            folder=folder,
            ready_url=f"{self.url}/",
            cores=cores,
        )

    def spans(self, sender: str | None = None) -> int:
        """Count the spans that came so far, of one sender or of all."""
        text = self._counts.read_text(encoding="utf-8") if self._counts.exists() else ""
        lines = (line.rpartition(" ") for line in text.splitlines())
        return sum(int(count) for name, _, count in lines if sender in {None, name})


async def main(port: int, file: Path) -> None:
    """Serve forever."""
    with file.open("a", encoding="utf-8", buffering=1) as counts:
        async with Receiver(lambda export: print(export.sender, export.count, file=counts), port):
            await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), Path(sys.argv[2])))
