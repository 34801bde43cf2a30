"""Metrics by OTLP: what comes is what is counted, and no collector, however odd, costs a request or a stop."""

import asyncio
import logging
import socket
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import closing, contextmanager, suppress
from time import monotonic
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.resources import Resource

from gateway.settings import load, load_otel
from gateway.telemetry import export_thread, metric_export
from gateway.telemetry.exporters import exporter_for, metric_export_for, tracer_for
from gateway.telemetry.metric_export import MetricExport
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.otlp_exporter import OtlpHttpExporter, OtlpHttpMetricExporter
from gateway.telemetry.otlp_transport import MAX_ANSWER, Transport
from mock_model.serve import MockModel
from testkit.exposition import Exposition
from testkit.polling import PATIENCE, until
from testkit.ports import LOOPBACK, refusing_port
from tests.integration.collector import Collector
from tests.integration.gateways import Gateway, StartGateway, patient

TIMEOUT = 0.4
"""Seconds an export may take where it is to fail."""
OFTEN = 0.05
"""Seconds between exports, where more than the last one is wanted."""
SELDOM = 3600.0
STOP = export_thread.LAST_EXPORT + 8.0
"""Seconds that a stop may take: its promise, and what a busy machine adds."""


@pytest.fixture
def start_gateway(start_gateway: StartGateway) -> StartGateway:
    return patient(start_gateway)


def export_to(port: int, *, interval: float = SELDOM, delta: bool = False, timeout: float = PATIENCE) -> MetricExport:
    exporter = OtlpHttpMetricExporter(f"http://{LOOPBACK}:{port}/v1/metrics", timeout=timeout)
    return MetricExport(exporter, resource=Resource({"service.name": "gateway"}), interval=interval, delta=delta)


def numbers(request: ExportMetricsServiceRequest, name: str) -> list[float]:
    """The values of a counter's points, or how often a histogram's were observed."""
    (resource,) = request.resource_metrics
    for metric in resource.scope_metrics[0].metrics:
        if metric.name == name:
            if metric.WhichOneof("data") == "sum":
                return [point.as_double for point in metric.sum.data_points]
            return [point.count for point in metric.histogram.data_points]
    return []


def latest(collector: Collector, name: str) -> list[float]:
    """The same of the latest export."""
    return numbers(collector.metrics[-1], name) if collector.metrics else []


async def dropped(gateway: Gateway) -> float:
    return Exposition.parse(await gateway.metrics()).only("gateway_telemetry_dropped_data_points_total") or 0.0


async def all_is_well(gateway: Gateway, mock: MockModel, requests: int = 10) -> None:
    """So many requests, half of them streams, are answered by one call of the mock model each."""
    before = mock.journal.total
    answers = await asyncio.gather(*(gateway.chat(stream=bool(number % 2)) for number in range(requests)))
    assert [answer.status for answer in answers] == [200] * requests
    assert mock.journal.total == before + requests


@contextmanager
def silent() -> Iterator[int]:
    """The port of a socket that takes connections and never says a word."""
    with closing(socket.create_server((LOOPBACK, 0), backlog=128)) as listening:
        yield listening.getsockname()[1]


def lines(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.usefixtures("patient_stop")
async def test_what_is_counted_goes_out_with_genai_s_names_and_the_last_of_it_at_the_stop(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    gateway = await start_gateway(mock, metric_export=export_to(collector.port))
    await all_is_well(gateway, mock, 4)
    assert collector.metrics == []
    await gateway.client.close()

    (request,) = collector.metrics
    (resource,) = request.resource_metrics
    assert {one.key: one.value.string_value for one in resource.resource.attributes} == {"service.name": "gateway"}
    assert numbers(request, "gateway_requests_total") == [4]
    assert numbers(request, "gateway_attempts_total") == [4]
    assert numbers(request, "gen_ai.client.operation.duration") == [4]
    assert numbers(request, "gen_ai.server.time_to_first_token") == [2]
    assert len(numbers(request, "gen_ai.client.token.usage")) == 2


async def test_exports_follow_each_other_and_add_up(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    gateway = await start_gateway(mock, metric_export=export_to(collector.port, interval=OFTEN))
    for rounds in (1, 2):
        await all_is_well(gateway, mock, 4)
        await until(lambda: latest(collector, "gateway_requests_total") == [4 * rounds])  # noqa: B023

    assert gateway.parts.telemetry.status == "ok"
    assert await dropped(gateway) == 0


@pytest.mark.usefixtures("patient_stop")
async def test_deltas_of_all_exports_together_are_what_was_counted(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    gateway = await start_gateway(mock, metric_export=export_to(collector.port, interval=OFTEN, delta=True))
    for _ in range(3):
        await all_is_well(gateway, mock, 4)
        seen = len(collector.metrics)
        await until(lambda: len(collector.metrics) > seen + 1)  # noqa: B023
    await gateway.client.close()

    for name in ("gateway_requests_total", "gen_ai.client.operation.duration"):
        assert sum(sum(numbers(request, name)) for request in collector.metrics) == 12, name


@pytest.mark.parametrize("kind", [silent, refusing_port])
async def test_a_collector_that_is_gone_costs_points_and_no_request_and_is_told_once(
    mock: MockModel,
    start_gateway: StartGateway,
    caplog: pytest.LogCaptureFixture,
    kind: Callable[[], Any],
) -> None:
    with kind() as port:
        gateway = await start_gateway(mock, metric_export=export_to(port, interval=OFTEN, timeout=TIMEOUT))
        telemetry = gateway.parts.telemetry
        await all_is_well(gateway, mock)
        await until(lambda: telemetry.status == "degraded")
        lost = await dropped(gateway)
        await until(lambda: telemetry.data_points_dropped > lost)
        await all_is_well(gateway, mock)

        assert lost > 20
        assert (await gateway.health())["telemetry"]["status"] == "degraded"
        assert len(lines(caplog, "metrics could not be exported")) == 1
        assert not lines(caplog, "Failed to export metrics")
        began = monotonic()
        await gateway.client.close()
        assert monotonic() - began < STOP


async def test_metrics_flow_again_when_the_collector_is_back(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    gateway = await start_gateway(mock, metric_export=export_to(collector.port, interval=OFTEN, timeout=TIMEOUT))
    telemetry = gateway.parts.telemetry
    await collector.stop()
    await all_is_well(gateway, mock)
    await until(lambda: telemetry.status == "degraded")
    await collector.start()
    await until(lambda: telemetry.status == "ok")
    await until(lambda: latest(collector, "gateway_requests_total") == [10], "nothing that was counted is missing")


async def test_a_failed_export_is_soon_followed_by_another(
    mock: MockModel, start_gateway: StartGateway, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metric_export, "AGAIN", OFTEN)
    export = export_to(collector.port, interval=OFTEN, timeout=TIMEOUT)
    await collector.stop()
    gateway = await start_gateway(mock, metric_export=export)
    await until(lambda: gateway.parts.telemetry.status == "degraded")
    export._interval = SELDOM
    await collector.start()

    await until(lambda: gateway.parts.telemetry.status == "ok")
    seen = len(collector.metrics)
    await asyncio.sleep(6 * OFTEN)
    assert len(collector.metrics) <= seen + 1, "then at its interval again; one may have been under way"


@pytest.mark.parametrize("status", [404, 405, 501])
async def test_a_collector_of_spans_alone_is_no_failure(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    asked = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal asked
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            asked += 1
            writer.write(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)

    caplog.set_level(logging.INFO, "gateway")
    server = await asyncio.start_server(refuse, LOOPBACK, 0)
    async with server:
        gateway = await start_gateway(mock, metric_export=export_to(server.sockets[0].getsockname()[1], interval=OFTEN))
        await until(lambda: asked > 2)
        await all_is_well(gateway, mock)

        assert (await gateway.health())["telemetry"]["status"] == "ok", "spans go out"
        assert await dropped(gateway) == 0
        assert len(lines(caplog, "the collector takes no metrics")) == 1


async def test_a_redirect_or_an_error_is_a_failure(mock: MockModel, start_gateway: StartGateway) -> None:
    for head in (b"307 No\r\nLocation: http://127.0.0.1:1/", b"400 No", b"500 No", b"503 No\r\nRetry-After: 100"):

        async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: bytes = head) -> None:
            with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):  # who has given up
                await reader.readuntil(b"\r\n\r\n")
                writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % head)

        server = await asyncio.start_server(refuse, LOOPBACK, 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            gateway = await start_gateway(mock, metric_export=export_to(port, interval=OFTEN, timeout=TIMEOUT))
            await all_is_well(gateway, mock, 2)
            await until(lambda: gateway.parts.telemetry.status == "degraded")  # noqa: B023
            await gateway.client.close()


async def test_a_slow_collector_gets_the_newest_numbers(
    mock: MockModel, start_gateway: StartGateway, collector: Collector
) -> None:
    collector.delay = OFTEN * 4
    gateway = await start_gateway(mock, metric_export=export_to(collector.port, interval=OFTEN))
    await until(lambda: len(collector.metrics) >= 2)
    await all_is_well(gateway, mock)
    await until(lambda: latest(collector, "gateway_requests_total") == [10])


# What a collector takes only in part.


async def test_spans_that_a_collector_rejects_are_counted_and_told_once(
    mock: MockModel, start_gateway: StartGateway, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.answer.partial_success.rejected_spans = 1
    collector.answer.partial_success.error_message = "too old\x1b[2J\nlevel=error"
    gateway = await start_gateway(mock, exporter=OtlpHttpExporter(endpoint=collector.endpoint))
    telemetry = gateway.parts.telemetry
    for number in (1, 2):
        await gateway.chat()
        await until(lambda: telemetry.spans_dropped == number)  # noqa: B023

    assert (await gateway.health())["telemetry"] == {"status": "degraded", "spans_dropped": 2}
    (line,) = lines(caplog, "the collector rejected 1 of the spans of an export")
    assert line.endswith(r"too old\u001b[2J\u000alevel=error")
    collector.answer.Clear()
    await gateway.chat()
    await until(lambda: telemetry.status == "ok")
    assert telemetry.spans_dropped == 2


async def test_data_points_that_a_collector_rejects_are_counted(
    mock: MockModel, start_gateway: StartGateway, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.metrics_answer.partial_success.rejected_data_points = 3
    gateway = await start_gateway(mock, metric_export=export_to(collector.port, interval=OFTEN))
    await until(lambda: len(collector.metrics) > 3)

    assert gateway.parts.telemetry.data_points_dropped % 3 == 0 < gateway.parts.telemetry.data_points_dropped
    assert (await gateway.health())["telemetry"]["status"] == "degraded"
    assert lines(caplog, "rejected 3 of the data points of an export: it does not say why") != []
    assert len(lines(caplog, "rejected 3")) == 1


@pytest.mark.usefixtures("patient_stop")
@pytest.mark.parametrize("rejected", [2**62, -(2**62)])
async def test_no_collector_can_reject_more_than_it_got(
    mock: MockModel, start_gateway: StartGateway, collector: Collector, rejected: int
) -> None:
    collector.answer.partial_success.rejected_spans = rejected
    collector.answer.partial_success.error_message = "x" * (MAX_ANSWER // 2)
    gateway = await start_gateway(mock, exporter=OtlpHttpExporter(endpoint=collector.endpoint))
    await gateway.chat()
    await until(lambda: len(collector.spans) == 2)
    await gateway.client.close()

    assert gateway.parts.telemetry.spans_dropped == (2 if rejected > 0 else 0)


@pytest.mark.parametrize("body", [b"\xff\xff\xff", b"{}", b"<html>", b"\x0a\x7f"])
async def test_an_answer_that_is_none_says_nothing(body: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\nx")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (len(body), body))

    server = await asyncio.start_server(answer, LOOPBACK, 0)
    async with server:
        exporter = OtlpHttpExporter(f"http://{LOOPBACK}:{server.sockets[0].getsockname()[1]}/v1/traces", timeout=20)
        taken = await asyncio.to_thread(exporter.send, b"x")
        await asyncio.to_thread(exporter.shutdown)

    assert taken
    assert exporter.partial.take(10) == 0


class GrpcSpans(TraceServiceServicer):
    """Rejects one span of each export."""

    def Export(self, *_: Any) -> ExportTraceServiceResponse:  # noqa: ANN401, N802
        answer = ExportTraceServiceResponse()
        answer.partial_success.rejected_spans = 1
        answer.partial_success.error_message = "by gRPC"
        return answer


class GrpcMetrics(MetricsServiceServicer):
    """Keeps metrics, and rejects a data point of each export."""

    def __init__(self) -> None:
        self.requests: list[ExportMetricsServiceRequest] = []

    def Export(self, request: ExportMetricsServiceRequest, *_: Any) -> ExportMetricsServiceResponse:  # noqa: ANN401, N802
        self.requests.append(request)
        answer = ExportMetricsServiceResponse()
        answer.partial_success.rejected_data_points = 1
        return answer


@contextmanager
def grpc_collector(*, metrics: bool) -> Iterator[tuple[GrpcMetrics, int]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    add_TraceServiceServicer_to_server(GrpcSpans(), server)  # type: ignore[no-untyped-call]
    kept = GrpcMetrics()
    if metrics:
        add_MetricsServiceServicer_to_server(kept, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port(f"{LOOPBACK}:0")
    server.start()
    try:
        yield kept, port
    finally:
        server.stop(None).wait()


async def test_by_grpc_metrics_go_out_and_what_is_rejected_is_counted_too(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    with grpc_collector(metrics=True) as (kept, port):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{LOOPBACK}:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
        otel = load_otel()
        exporter = exporter_for(load(app_mode="prod"), otel)
        export = metric_export_for(otel, tracer_for(otel, exporter).resource)
        gateway = await start_gateway(mock, exporter=exporter, metric_export=export)
        await gateway.chat()
        telemetry = gateway.parts.telemetry
        await until(lambda: telemetry.spans_dropped == 1)
        await until(lambda: kept.requests != [] and numbers(kept.requests[-1], "gateway_requests_total") == [1])
        await until(lambda: telemetry.data_points_dropped > 0)
        await gateway.client.close()

    (resource,) = kept.requests[-1].resource_metrics
    named = {one.key: one.value.string_value for one in resource.resource.attributes}
    assert named["service.name"] == "gateway"
    assert named["service.instance.id"]


async def test_a_collector_by_grpc_that_takes_spans_alone_is_no_failure(
    mock: MockModel,
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "gateway")
    with grpc_collector(metrics=False) as (_, port):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", f"http://{LOOPBACK}:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "grpc")
        monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "50")
        export = metric_export_for(load_otel(), Resource({}))
        gateway = await start_gateway(mock, metric_export=export)
        await until(lambda: lines(caplog, "the collector takes no metrics (it answers UNIMPLEMENTED)") != [])
        await all_is_well(gateway, mock, 2)

        assert gateway.parts.telemetry.status == "ok"
        assert gateway.parts.telemetry.data_points_dropped == 0
        assert not lines(caplog, "Failed to export metrics")
        await gateway.client.close()


# What the environment says.


@pytest.mark.parametrize(
    ("environment", "kind"),
    [
        ({}, None),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_METRICS_EXPORTER": "none"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318/"}, "http://127.0.0.1:4318/v1/metrics"),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:9/there"}, "http://127.0.0.1:9/there"),
    ],
)
def test_the_environment_says_where_metrics_go(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], kind: str | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    export = metric_export_for(load_otel(), Resource({}))

    assert (None if export is None else export._exporter._endpoint) == kind  # type: ignore[attr-defined]
    assert export is None or isinstance(export._exporter._client._transport, Transport)  # type: ignore[attr-defined]


def test_the_shorter_time_limit_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_TIMEOUT", "1500")
    monkeypatch.setenv("OTEL_BSP_EXPORT_TIMEOUT", "2500")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "7")
    spans, export = exporter_for(load(app_mode="prod"), load_otel()), metric_export_for(load_otel(), Resource({}))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    shorter = exporter_for(load(app_mode="prod"), load_otel())

    assert isinstance(spans, OtlpHttpExporter)
    assert isinstance(shorter, OtlpHttpExporter)
    assert export is not None
    assert spans._client._timeout == 2.5
    assert shorter._client._timeout == 1
    assert export._exporter._client._timeout == 1.5  # type: ignore[attr-defined]


async def test_batches_are_as_large_as_the_environment_says(
    mock: MockModel, start_gateway: StartGateway, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "3")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "40")
    otel = load_otel()
    exporter = exporter_for(load(app_mode="prod"), otel)
    tracer = tracer_for(otel, exporter)
    gateway = await start_gateway(mock, exporter=exporter)
    gateway.parts.telemetry._tracer.export = tracer.export  # type: ignore[method-assign]
    await all_is_well(gateway, mock, 24)
    assert tracer.dropped == 2 * 4, "40 spans wait, of 20 requests"
    await asyncio.to_thread(tracer._export_waiting)

    assert len(collector.spans) == 40
    assert len(collector.bodies) == 14


def test_a_defect_of_an_instrument_does_not_end_the_exports(caplog: pytest.LogCaptureFixture) -> None:
    class Exporter(OtlpHttpMetricExporter):
        def send(self, data: Any) -> None:  # noqa: ANN401, ARG002
            raise ZeroDivisionError

    async def run() -> MetricExport:
        export = MetricExport(Exporter("http://127.0.0.1:9/v1/metrics"), resource=Resource({}), interval=0.01)
        calls = 0

        def read() -> list[Any]:
            nonlocal calls
            calls += 1
            if calls == 1:
                raise ValueError
            return Metrics().read()

        export.start(read)
        await until(lambda: calls > 2 and export.status == "degraded")
        await export.stop(read)
        return export

    asyncio.run(run())
    assert len(lines(caplog, "metrics could not be read")) == 1
    assert lines(caplog, "the exporter of metrics failed")
