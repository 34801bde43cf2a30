"""A gateway that runs in the test's own event loop."""

import asyncio
import io
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
from aiohttp import web
from aiohttp.test_utils import BaseTestServer, TestClient
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from yarl import URL

from gateway.app import PARTS, runner_of
from gateway.parts import Parts
from gateway.server.aiohttp_protocol import Runner
from gateway.server.listener import Listener, listening_sockets
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import Answer
from testkit.polling import until

KEY = "gw-key-1"
REFUSED = "http://127.0.0.1:1"
"""A backend's url at which nothing listens."""
EXPLAINING = {"x-request-id", "x-trace-id", "x-gateway-attempts", "server-timing"}
"""The headers of every answer of `/v1`."""

LIMITS = {
    "hang_before_headers": ("answer", "first_token"),
    "hang_after_headers": ("idle", "first_token"),
    "slow_first_token": ("idle", "first_token"),
    "stall": ("idle", "idle"),
}
"""The time limit that passes first with a fault that waits: of a whole answer, of a stream."""


class GatewayServer(BaseTestServer):
    """The gateway behind its own runner and listener, as `python -m gateway` has it."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(host="127.0.0.1")
        self.app = app

    async def _make_runner(self, **_: Any) -> Runner:  # noqa: ANN401
        return runner_of(self.app)

    async def start_server(self, loop: asyncio.AbstractEventLoop | None = None, **_: Any) -> None:  # noqa: ANN401
        """Once."""
        if self.runner is not None:
            return
        self._loop = loop
        self.runner = runner = await self._make_runner()
        await runner.setup()
        self._listener = Listener(runner, self.app[PARTS].connections)
        self._listener.start(listening_sockets(self.host, 0))
        self._root = URL(self._listener.url)
        self.port = self._root.port

    async def close(self) -> None:
        """The listener, then the runner."""
        if self.started and not self.closed:
            await self._listener.close()
        await super().close()


class Gateway:
    """A running gateway.

    Attributes:
        client: pytest-aiohttp's client for it.
        parts: what it is made of.
        log: its request lines.
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

    async def chat(self, **changes: Any) -> Answer:  # noqa: ANN401
        """Post a chat prompt; `headers` and `path` are the request's, all else is the body's."""
        headers = changes.pop("headers", {})
        path = changes.pop("path", CHAT_PATH)
        async with self.client.post(path, json=CHAT | changes, headers=headers) as response:
            return await Answer.of(response)

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


def soon(kind: str, *, stream: bool) -> dict[str, Any]:
    """The setting with which the time limit of a fault that waits passes soon; no other one is shorter than usual."""
    return {f"gateway_{LIMITS[kind][stream]}_timeout": 0.3} if kind in LIMITS else {}


async def get(gateway: Gateway, path: str, **headers: str) -> Answer:
    """GET a path."""
    async with gateway.client.get(path, headers=headers) as response:
        return await Answer.of(response)


def config(folder: Path, text: str) -> Path:
    """Write a configuration for `GATEWAY_CONFIG`."""
    file = folder / "gateway.yaml"
    file.write_text(text)
    return file


async def listed(gateway: Gateway) -> None:
    """Wait until the backends have listed their models: nothing more goes to them by itself, where none is probed."""
    await until(lambda: all(replica.models is not None for replica in gateway.parts.pool.listing))


def prefer(gateway: Gateway, replica: str) -> None:
    """Make `replica` the one that is tried first: every other looks busy. A look inside, since the draw is random."""
    for other in gateway.parts.pool.replicas:
        other.in_flight += 1000 if other.name != replica else 0


StartMock = Callable[..., Awaitable[MockModel]]
StartGateway = Callable[..., Awaitable[Gateway]]


def patient(start: StartGateway) -> StartGateway:
    """The same with a connect timeout that even a busy machine does not reach."""

    async def start_patient(*backends: Any, **settings: Any) -> Gateway:  # noqa: ANN401
        return await start(*backends, **{"gateway_connect_timeout": 30, **settings})

    return start_patient
