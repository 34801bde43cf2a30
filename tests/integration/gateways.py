"""What the integration tests hold in their hands: a gateway that runs, and an answer of it."""

import io
import json
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import openai
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestClient
from aiohttp.web_runner import BaseRunner
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.app import Parts, runner_of
from mock_model.serve import MockModel

CHAT = {"model": "demo-model", "messages": [{"role": "user", "content": "Say something."}]}


class GatewayServer(BaseTestServer):
    """The gateway behind its own runner, as `python -m gateway` has it."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(host="127.0.0.1")
        self.app = app

    async def _make_runner(self, **_: Any) -> BaseRunner:  # noqa: ANN401
        return runner_of(self.app)


class Gateway:
    """A running gateway.

    Attributes:
        client: pytest-aiohttp's client for it.
        parts: what it is made of.
        log: its request lines, once it has stopped or `RequestLog.FLUSH_INTERVAL` has passed.
    """

    def __init__(
        self, client: TestClient[web.Request, web.Application], parts: Parts, exporter: SpanExporter, log: io.StringIO
    ) -> None:
        self.client = client
        self.parts = parts
        self.log = log
        self._exporter = exporter

    @property
    def url(self) -> str:
        """Without a trailing slash, without `/v1`."""
        return str(self.client.make_url("/")).rstrip("/")

    @property
    def sdk(self) -> openai.AsyncOpenAI:
        """The real SDK, without retries of its own; close it, or use `async with`."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="sk-test", max_retries=0)

    async def chat(self, **changes: Any) -> "Answer":  # noqa: ANN401
        """Post a chat prompt; `headers` and `path` are the request's, all else is the body's."""
        headers = changes.pop("headers", {})
        path = changes.pop("path", "/v1/chat/completions")
        async with self.client.post(path, json=CHAT | changes, headers=headers) as response:
            return Answer(response.status, dict(response.headers), await response.read())

    def limit_send_buffers(self, size: int) -> int:
        """The kernel holds about `size` bytes for each caller who is connected now; how many those are."""
        server = self.client.server
        if not isinstance(server, GatewayServer):
            raise TypeError("not the gateway's own runner")
        transports = [protocol.transport for protocol in server.handler.connections if protocol.transport is not None]
        for transport in transports:
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        return len(transports)

    def spans(self) -> tuple[ReadableSpan, ...]:
        """All spans so far (exported every 20 ms)."""
        if not isinstance(self._exporter, InMemorySpanExporter):
            raise TypeError("this gateway has another exporter")
        return self._exporter.get_finished_spans()

    async def health(self) -> dict[str, Any]:
        """The document of `/health`."""
        async with self.client.get("/health") as response:
            document: dict[str, Any] = await response.json()
            return document

    async def metrics(self) -> str:
        """The text of `/metrics`."""
        async with self.client.get("/metrics") as response:
            return await response.text()


class Answer:
    """A whole answer."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = {name.lower(): value for name, value in headers.items()}
        self.body = body

    @property
    def error(self) -> dict[str, Any]:
        """The envelope's inside."""
        document: dict[str, Any] = json.loads(self.body)["error"]
        return document

    @property
    def attempts(self) -> int:
        """As `x-gateway-attempts` has it."""
        return int(self.headers["x-gateway-attempts"])

    @property
    def timing(self) -> list[tuple[str, str, float]]:
        """`server-timing`, in order: name, description, milliseconds."""
        entries = []
        for entry in self.headers["server-timing"].split(", "):
            name, *parameters = entry.split(";")
            values = dict(parameter.split("=", 1) for parameter in parameters)
            entries.append((name, values.get("desc", "").strip('"'), float(values["dur"])))
        return entries

    @property
    def outcomes(self) -> list[str]:
        """Of each attempt: the replica and what became of it."""
        return [text for name, text, _ in self.timing if name.startswith("attempt-")]

    @property
    def backoffs(self) -> list[float]:
        """Each sleep between attempts, in milliseconds."""
        return [milliseconds for name, _, milliseconds in self.timing if name.startswith("backoff-")]


def prefer(gateway: Gateway, replica: str) -> None:
    """Make `replica` the one that is tried first: every other looks busy. A look inside, since the draw is random."""
    for other in gateway.parts.pool.replicas:
        other.in_flight += 1000 if other.name != replica else 0


StartMock = Callable[..., Awaitable[MockModel]]
StartGateway = Callable[..., Awaitable[Gateway]]
