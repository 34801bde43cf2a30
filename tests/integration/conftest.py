"""The gateway and the mock model on real sockets, in the test's own event loop."""

import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.app import PARTS, create_app
from gateway.backend.client import PROBE_TIMEOUT, HttpClient
from gateway.config import load_routing
from gateway.settings import Settings, load
from gateway.telemetry import Telemetry
from gateway.telemetry.logs import RequestLog
from gateway.telemetry.tracing import MAX_WAITING, Tracer
from mock_model.serve import MockModel
from mock_model.settings import Settings as MockSettings
from tests.integration.backends_raw import StartRaw, raw_backends
from tests.integration.collector import Collector
from tests.integration.gateways import Gateway, GatewayServer, StartGateway, StartMock


@pytest.fixture
async def start_mock() -> AsyncIterator[StartMock]:
    """Start a mock model; keyword arguments are its settings."""
    async with AsyncExitStack() as stack:

        async def start(**settings: Any) -> MockModel:  # noqa: ANN401
            defaults = {"port": 0, "control_port": 0, "mock_ttft": 0, "mock_token_interval": 0}
            return await stack.enter_async_context(MockModel(MockSettings(**(defaults | settings))))

        yield start


@pytest.fixture
async def mock(start_mock: StartMock) -> MockModel:
    """One mock model, without delays."""
    return await start_mock()


@pytest.fixture
async def start_raw() -> AsyncIterator[StartRaw]:
    """Start a backend on bare sockets."""
    async with raw_backends() as start:
        yield start


@pytest.fixture
async def collector() -> AsyncIterator[Collector]:
    """An OTLP/HTTP receiver."""
    async with Collector() as running:
        yield running


@pytest.fixture
async def start_gateway(
    aiohttp_client: Callable[..., Awaitable[TestClient[web.Request, web.Application]]],
) -> StartGateway:
    """Start a gateway: `backends` are urls or mock models; what has no default here are its settings."""

    async def start(
        *backends: str | MockModel,
        exporter: SpanExporter | None = None,
        max_waiting: int = MAX_WAITING,
        probe_timeout: float = PROBE_TIMEOUT,
        **overrides: Any,  # noqa: ANN401
    ) -> Gateway:
        urls = [backend if isinstance(backend, str) else backend.url for backend in backends]
        if urls:
            overrides["gateway_backend_urls"] = urls
        settings: Settings = load(**overrides)
        exporter = exporter or InMemorySpanExporter()
        log = io.StringIO()
        telemetry = Telemetry(
            settings,
            tracer=Tracer(exporter, interval=0.02, max_waiting=max_waiting),
            log=RequestLog(level="INFO", as_json=True, stream=log),
        )
        http = HttpClient(connect_timeout=settings.gateway_connect_timeout, probe_timeout=probe_timeout)
        app = create_app(settings, load_routing(settings), telemetry, client=http)
        client = await aiohttp_client(GatewayServer(app))
        return Gateway(client, app[PARTS], exporter, log)

    return start
