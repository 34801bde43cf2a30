"""The gateway and the mock model on real sockets, in the test's own event loop."""

import asyncio
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.app import PARTS, create_app
from gateway.config import Routing, load_routing
from gateway.files import Files
from gateway.settings import Settings, load
from gateway.telemetry import Telemetry, export_thread
from gateway.telemetry.logs import RequestLog
from gateway.telemetry.metric_export import MetricExport
from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from gateway.telemetry.tracing import MAX_WAITING, Tracer
from mock_model.serve import MockModel
from mock_model.settings import Settings as MockSettings
from testkit.limits_server import LimitsServer, why_no_server
from testkit.polling import PATIENCE
from tests.integration.backends_raw import StartRaw, raw_backends
from tests.integration.collector import Collector
from tests.integration.gateways import Gateway, GatewayServer, StartGateway, StartMock, patient
from tests.integration.recorder import Recorder, recording
from tests.integration.traced import Stack, StartStack, routes
from tests.suites import need


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
async def slow_mock(start_mock: StartMock) -> MockModel:
    """Each token on its own, so that what follows the first one comes after commit."""
    return await start_mock(mock_token_interval=0.03)


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    """A backend that keeps what it received."""
    async with recording() as one:
        yield one


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
def patient_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last export of a gateway that stops has as much time as it needs."""
    monkeypatch.setattr(export_thread, "LAST_EXPORT", PATIENCE)


@pytest.fixture
async def limits_server(tmp_path: Path) -> AsyncIterator[LimitsServer]:
    """A Valkey or Redis for limits that instances share; LIMITS_TESTS=require makes its absence a failure."""
    need(why_no_server(), "LIMITS_TESTS", "shared limits were not tested")
    async with LimitsServer(tmp_path) as server:
        yield server
        server.thaw()


@pytest.fixture
async def start_gateway(
    aiohttp_client: Callable[..., Awaitable[TestClient[web.Request, web.Application]]],
) -> StartGateway:
    """Start a gateway: `backends` are urls or mock models; what has no default here are its settings.

    No outage is bridged unless `gateway_outage_wait` says so: a failure shows at once.
    """

    async def start(
        *backends: str | MockModel,
        exporter: SpanExporter | None = None,
        max_waiting: int = MAX_WAITING,
        metric_export: MetricExport | None = None,
        **overrides: Any,  # noqa: ANN401
    ) -> Gateway:
        urls = [backend if isinstance(backend, str) else backend.url for backend in backends]
        if urls:
            overrides["gateway_backend_urls"] = urls
        overrides.setdefault("gateway_outage_wait", 0)
        files = Files()
        settings: Settings = load(files, **overrides)
        exporter = exporter or InMemorySpanExporter()
        log = io.StringIO()
        telemetry = Telemetry(
            settings,
            tracer=Tracer(exporter, interval=0.02, max_waiting=max_waiting),
            log=RequestLog(level="INFO", as_json=True, stream=log),
            metric_export=metric_export,
        )
        telemetry.metrics.max_age = 0.0  # what a test reads is what it has just done

        def read(files: Files) -> Routing:
            return load_routing(load(files, **overrides), files)

        app = create_app(settings, load_routing(settings, files), telemetry, read=read, files=files)
        client = await aiohttp_client(GatewayServer(app))
        return Gateway(client, app[PARTS], exporter, log)

    return start


@pytest.fixture
async def start_stack(collector: Collector, start_gateway: StartGateway) -> AsyncIterator[StartStack]:
    """Start a traced gateway before a traced mock model, or `backends`, or (a folder for `fallback`) two targets."""
    async with AsyncExitStack() as stack:

        async def start_mock(**settings: Any) -> MockModel:  # noqa: ANN401
            provider = TracerProvider(resource=Resource({"service.name": "mock-model"}), shutdown_on_exit=False)
            exporter = OTLPSpanExporter(endpoint=collector.endpoint)
            provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=20))
            stack.push_async_callback(asyncio.to_thread, provider.shutdown)
            defaults = {"port": 0, "control_port": 0, "mock_ttft": 0, "mock_token_interval": 0}
            mock = MockModel(MockSettings(**(defaults | settings)), tracer_provider=provider)
            return await stack.enter_async_context(mock)

        async def start(
            *backends: str,
            fallback: Path | None = None,
            mock_settings: dict[str, Any] | None = None,
            **settings: Any,  # noqa: ANN401
        ) -> Stack:
            count = 2 if fallback else 0 if backends else 1
            mocks = [await start_mock(**(mock_settings or {})) for _ in range(count)]
            if fallback:
                settings["gateway_config"] = routes(fallback, *(mock.url for mock in mocks))
            else:
                backends = backends or tuple(mock.url for mock in mocks)
            settings.setdefault("gateway_backoff_initial", 0.01)
            exporter = OtlpHttpExporter(endpoint=collector.endpoint)
            gateway = await patient(start_gateway)(*backends, exporter=exporter, **settings)
            return Stack(gateway, collector, mocks)

        yield start
