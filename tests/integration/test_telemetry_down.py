"""A collector that is gone, silent, slow or back again: no request notices, losses are told, spans flow again."""

import asyncio
import gc
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from gateway.record import Record
from gateway.telemetry import export_thread
from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from gateway.telemetry.tracing import Tracer
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.exposition import Exposition
from testkit.http import ask
from testkit.polling import PATIENCE, until
from testkit.ports import refusing_port
from tests.integration.collector import Collector
from tests.integration.gateways import Gateway, StartGateway, patient
from tests.integration.processes import running

TIMEOUT = 0.4
"""Seconds an export may take where it is to fail."""
LONG = 30.0
"""Seconds that an export under way may take where the stop is to end it."""
STOP = export_thread.LAST_EXPORT + 8.0
"""Seconds that stopping a tracer may take: its promise, and what a busy machine adds."""


@pytest.fixture
def start_gateway(start_gateway: StartGateway) -> StartGateway:
    return patient(start_gateway)


@pytest.fixture
def black_hole() -> Iterator[int]:
    """The port of a socket that takes connections and never says a word."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=128)) as silent:
        yield silent.getsockname()[1]


@pytest.fixture
def refusing() -> Iterator[int]:
    """A port where nobody listens."""
    with refusing_port() as port:
        yield port


def exporter_to(port: int, timeout: float = TIMEOUT) -> OtlpHttpExporter:
    return OtlpHttpExporter(endpoint=f"http://127.0.0.1:{port}/v1/traces", timeout=timeout)


async def all_is_well(gateway: Gateway, mock: MockModel, requests: int = 20) -> set[str]:
    """So many requests, half of them streams, are answered by one call of the mock model each; their traces."""
    before = mock.journal.total
    answers = await asyncio.gather(*(gateway.chat(stream=bool(number % 2)) for number in range(requests)))
    assert [answer.status for answer in answers] == [200] * requests
    assert [answer.headers["x-gateway-attempts"] for answer in answers] == ["1"] * requests
    assert mock.journal.total == before + requests
    traces = {answer.headers["x-trace-id"] for answer in answers}
    assert len(traces) == requests
    return traces


async def told(gateway: Gateway) -> tuple[str, dict[str, Any], float]:
    """What `/health` says of the whole and of telemetry, and the number of lost spans in `/metrics`."""
    health = await gateway.health()
    dropped = Exposition.parse(await gateway.metrics()).only("gateway_telemetry_dropped_spans_total")
    assert dropped is not None
    return health["status"], health["telemetry"], dropped


async def lost(gateway: Gateway, spans: int) -> None:
    """Wait until so many spans are lost; `/health` and `/metrics` agree about it."""
    telemetry = gateway.parts.telemetry
    await until(lambda: telemetry.spans_dropped >= spans, lambda: f"{telemetry.spans_dropped} of {spans} are lost")
    status, document, dropped = await told(gateway)
    assert status == "degraded"
    assert document == {"status": "degraded", "spans_dropped": spans}
    assert dropped == spans
    async with gateway.client.get("/health") as response:
        assert response.status == 200
    async with gateway.client.get("/readyz") as response:
        assert response.status == 200


async def test_a_collector_that_refuses_costs_spans_and_no_request(
    mock: MockModel, start_gateway: StartGateway, refusing: int
) -> None:
    gateway = await start_gateway(mock, exporter=exporter_to(refusing))
    await all_is_well(gateway, mock)
    await lost(gateway, 40)
    await all_is_well(gateway, mock)
    await lost(gateway, 80)


async def test_a_collector_that_never_answers_costs_spans_and_no_request(
    mock: MockModel, start_gateway: StartGateway, black_hole: int
) -> None:
    gateway = await start_gateway(mock, exporter=exporter_to(black_hole))
    await all_is_well(gateway, mock)
    await lost(gateway, 40)
    await all_is_well(gateway, mock)


@pytest.mark.parametrize("status", [400, 413, 500, 503])
async def test_a_collector_that_answers_errors_costs_spans_and_no_request(
    mock: MockModel, start_gateway: StartGateway, status: int
) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        gateway = await start_gateway(mock, exporter=exporter_to(server.sockets[0].getsockname()[1]))
        await all_is_well(gateway, mock)
        await lost(gateway, 40)


async def test_a_slow_collector_gets_everything(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    collector.delay = 0.3
    gateway = await start_gateway(mock, exporter=OtlpHttpExporter(endpoint=collector.endpoint))
    for _ in range(3):
        await all_is_well(gateway, mock)
    await until(lambda: len(collector.spans) >= 120)

    assert len(collector.spans) == 120
    assert await told(gateway) == ("ok", {"status": "ok", "spans_dropped": 0}, 0)


async def test_spans_flow_again_when_the_collector_is_back(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    exporter = exporter_to(collector.port, PATIENCE)
    gateway = await start_gateway(mock, exporter=exporter)
    await all_is_well(gateway, mock)
    await until(lambda: len(collector.spans) >= 40)
    await collector.stop()
    exporter._client._timeout = TIMEOUT  # only where it is to run out: the collector shares a busy event loop
    await all_is_well(gateway, mock)
    await lost(gateway, 40)
    await collector.start()
    exporter._client._timeout = PATIENCE
    await all_is_well(gateway, mock)
    await until(lambda: len(collector.spans) >= 80)

    await until(lambda: gateway.parts.telemetry.status == "ok")
    assert await told(gateway) == ("ok", {"status": "ok", "spans_dropped": 40}, 40)
    assert len(collector.spans) == 80


@pytest.mark.parametrize("grpc", [False, True])
async def test_a_collector_that_is_back_is_noticed_without_a_request(
    mock: MockModel, start_gateway: StartGateway, *, grpc: bool
) -> None:
    class Exporter(InMemorySpanExporter):
        good = False

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            super().export(spans)
            return SpanExportResult.SUCCESS if self.good else SpanExportResult.FAILURE

    class HttpExporter(OtlpHttpExporter):
        good = False

        def send(self, body: bytes) -> bool:  # noqa: ARG002
            return self.good

    exporter = Exporter() if grpc else HttpExporter(endpoint="http://127.0.0.1:9/v1/traces")
    gateway = await start_gateway(mock, exporter=exporter)
    await gateway.chat()
    await until(lambda: gateway.parts.telemetry.status == "degraded")
    exporter.good = True
    await until(lambda: gateway.parts.telemetry.status == "ok")

    assert gateway.parts.telemetry.spans_dropped == 2


async def test_a_collector_that_restarts_within_the_time_of_an_export_loses_nothing(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    exporter = OtlpHttpExporter(endpoint=collector.endpoint, timeout=30)
    gateway = await start_gateway(mock, exporter=exporter)
    await collector.stop()
    await all_is_well(gateway, mock)
    await asyncio.sleep(0.2)  # so that the first try meets nobody
    await collector.start()
    await until(lambda: len(collector.spans) >= 40)

    assert await told(gateway) == ("ok", {"status": "ok", "spans_dropped": 0}, 0)


async def test_what_waits_for_a_dead_collector_is_bounded_and_what_is_pushed_out_is_told(
    mock: MockModel, start_gateway: StartGateway, black_hole: int
) -> None:
    exporter = OtlpHttpExporter(endpoint=f"http://127.0.0.1:{black_hole}/v1/traces", timeout=60)
    gateway = await start_gateway(mock, exporter=exporter, max_waiting=50)
    tracer = gateway.parts.telemetry._tracer
    await gateway.chat()
    await until(lambda: not tracer._waiting)  # the thread holds that one, for a minute
    await all_is_well(gateway, mock, 50)
    assert await told(gateway) == ("ok", {"status": "ok", "spans_dropped": 0}, 0)
    await all_is_well(gateway, mock, 20)

    assert len(tracer._waiting) == 50
    await lost(gateway, 40)


async def test_an_exporter_that_raises_costs_spans_and_not_the_thread(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    class Broken(SpanExporter):
        raises = True

        def export(self, spans: Any) -> Any:  # noqa: ANN401
            if self.raises:
                raise RuntimeError("a defect")
            return super().export(spans)

    gateway = await start_gateway(mock, exporter=Broken())
    await all_is_well(gateway, mock)
    await lost(gateway, 40)
    assert gateway.parts.telemetry._tracer._thread is not None
    assert gateway.parts.telemetry._tracer._thread.is_alive()


# The stop.


def stopped_in(exporter: SpanExporter) -> float:
    """Seconds that a tracer with a span to export takes to stop."""
    tracer = Tracer(exporter, interval=0.01)
    tracer.start()
    tracer.export(finished())
    time.sleep(0.1)
    tracer.export(finished())
    began = time.monotonic()
    tracer.stop()
    return time.monotonic() - began


def finished() -> Record:
    record = Record(
        "GET", "/", trace_id=1, span_id=2, request_id="r", started=time.monotonic(), started_ns=time.time_ns()
    )
    record.ended, record.status = record.started, 200
    return record


def test_a_dead_collector_does_not_hold_up_the_stop(black_hole: int, refusing: int) -> None:
    for port in (black_hole, refusing):
        assert stopped_in(exporter_to(port, LONG)) < STOP


def test_a_dead_grpc_collector_does_not_hold_up_the_stop(black_hole: int, refusing: int) -> None:
    for port in (black_hole, refusing):
        assert stopped_in(GrpcExporter(endpoint=f"http://127.0.0.1:{port}", timeout=LONG)) < STOP


@pytest.mark.usefixtures("patient_stop")
async def test_the_last_spans_are_exported_at_the_stop(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    gateway = await start_gateway(mock, exporter=OtlpHttpExporter(endpoint=collector.endpoint))
    await all_is_well(gateway, mock)
    await gateway.client.close()

    assert len(collector.spans) == 40


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
async def test_a_process_stops_in_time_while_the_collector_is_silent(
    mock: MockModel, black_hole: int, protocol: str
) -> None:
    environment = {
        "HOST": "127.0.0.1",
        "PORT": "0",
        "APP_MODE": "prod",
        "GATEWAY_BACKEND_URLS": mock.url,
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{black_hole}",
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_EXPORTER_OTLP_TIMEOUT": "120",
    }
    async with running(**environment) as gateway:
        await gateway.up()
        for _ in range(20):
            assert (await ask(gateway.url + CHAT_PATH, method="POST", body=CHAT)).status == 200
        gateway.signal(signal.SIGTERM)
        async with asyncio.timeout(25):  # far less than the export under way may take
            code = await gateway.wait()

    assert code == 0


# Memory.


async def test_requests_are_not_kept_when_their_spans_are_lost(
    mock: MockModel, start_gateway: StartGateway, refusing: int
) -> None:
    # What other tests have left is held, so that nothing new gets its address.
    before = {id(one): one for one in gc.get_objects() if isinstance(one, Record)}

    def kept() -> int:
        gc.collect()
        return sum(isinstance(one, Record) and id(one) not in before for one in gc.get_objects())

    gateway = await start_gateway(mock, exporter=exporter_to(refusing), gateway_kept_requests=0)
    await all_is_well(gateway, mock)
    assert kept()
    await lost(gateway, 40)
    await gateway.client.session.close()  # aiohttp keeps the last request of each open connection

    for _ in range(30):
        if not kept():
            break
        await asyncio.sleep(0.5)
    assert not kept(), f"{kept()} of 20 requests are still held"
