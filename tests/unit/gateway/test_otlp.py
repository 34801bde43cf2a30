"""Our encoder writes what the SDK's own writes; the exporters are the ones the environment names."""

import json
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from sys import getsizeof
from time import monotonic
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, SamplingResult, TraceIdRatioBased

from gateway import __version__
from gateway.dialects.captured_text import output_messages
from gateway.dialects.openai.chat import OpenAIChat
from gateway.errors import InvalidRequest
from gateway.record import MAX_MESSAGE, MAX_TRACE_STATE, AttemptRecord, Record
from gateway.settings import CollectorSettings, SettingsError, load, load_collector, load_otel
from gateway.telemetry.exporters import exporter_for
from gateway.telemetry.otlp_encoder import Encoder
from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from gateway.telemetry.otlp_grpc import OtlpGrpcExporter
from gateway.telemetry.otlp_transport import Transport
from gateway.telemetry.sdk_spans import SCOPE, to_readable
from gateway.telemetry.span_data import CLIENT, ERROR, SERVER, UNSET, Shared, SpanData, Value
from gateway.telemetry.spans import spans_of
from gateway.telemetry.terminal import TreePrinter
from gateway.telemetry.trace_context import is_sampled
from gateway.telemetry.tracing import BATCH, CHUNK, MAX_EXTRA, Tracer

MOST_BY_GRPC = 4_194_304
"""Bytes that a collector takes by gRPC."""
RESOURCE = Resource(
    {"service.name": "gateway", "flag": True, "number": -1, "share": 0.5, "list": ["a", "b"], "empty": ""}
)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(codec="utf-8"), max_size=300)
NAME = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
VALUE: st.SearchStrategy[Value] = st.one_of(
    TEXT, INT64, st.booleans(), st.floats(allow_nan=False), st.lists(TEXT, max_size=5)
)
ATTRIBUTES = st.dictionaries(NAME, VALUE, max_size=8).map(lambda found: list(found.items()))
INSTANT = st.integers(0, 2**64 - 1)


def encoded(spans: list[SpanData]) -> ExportTraceServiceRequest:
    encoder = Encoder(RESOURCE.attributes, SCOPE.name, __version__)
    request = ExportTraceServiceRequest()
    request.ParseFromString(encoder.request([encoder.span(span) for span in spans]))
    return request


def by_the_sdk(spans: list[SpanData]) -> ExportTraceServiceRequest:
    request: ExportTraceServiceRequest = encode_spans([to_readable(span, RESOURCE) for span in spans])
    return request


@st.composite
def span_data(draw: st.DrawFn) -> SpanData:
    attributes = draw(ATTRIBUTES)
    cut = draw(st.integers(0, len(attributes)))
    span = SpanData(
        Shared(draw(NAME), draw(st.sampled_from([SERVER, CLIENT])), attributes[:cut]),
        trace_id=draw(st.integers(1, 2**128 - 1)),
        span_id=draw(st.integers(1, 2**64 - 1)),
        parent_id=draw(st.just(0) | st.integers(1, 2**64 - 1)),
    )
    span.own = attributes[cut:]
    span.start, span.end = draw(INSTANT), draw(INSTANT)
    span.events = draw(st.lists(st.tuples(INSTANT, NAME, ATTRIBUTES), max_size=3))
    span.status = draw(st.sampled_from([UNSET, ERROR]))
    span.trace_state = draw(st.sampled_from([None, "vendor=abc", "a=1,b=2"]))
    if span.status == ERROR:
        span.error = draw(st.none() | TEXT)
    return span


@given(st.lists(span_data(), min_size=1, max_size=4))
def test_spans_are_encoded_as_the_sdk_encodes_them(spans: list[SpanData]) -> None:
    assert encoded(spans) == by_the_sdk(spans)
    assert encoded(spans) == by_the_sdk(spans), "the second time, attributes that recur come from memory"


@pytest.mark.parametrize("name", ["a", "gen_ai.usage.output_tokens", "n" * 119, "n" * 130])
def test_attributes_of_every_length_are_encoded_as_the_sdk_encodes_them(name: str) -> None:
    values: list[Value] = ["x" * size for size in range(300)]
    values += [*range(-2, 300), 2**31, 2**63 - 1, True, False, 0.0, -1.5e300]
    spans = []
    for value in values:
        span = SpanData(Shared("s", SERVER, []), trace_id=1, span_id=1, parent_id=0)
        span.own = [(name, value)]
        spans.append(span)

    assert encoded(spans) == by_the_sdk(spans)


def a_record(number: int) -> Record:
    """The record of a request with much to tell."""
    record = Record(
        "POST",
        "/v1/chat/completions",
        trace_id=number + 1,
        span_id=7,
        request_id="r",
        started=monotonic(),
        started_ns=1_700_000_000_000_000_000,
    )
    record.parent_id = 5 if number % 2 else None
    body = {"model": "größe", "messages": [{"role": "user"}], "temperature": 0.5, "max_tokens": 3, "n": 2}
    prompt = OpenAIChat().read_request(record.path or "", json.dumps(body).encode())
    prompt.describe_in(record, model="größe", route="*")
    record.input_text = prompt.dialect.prompt_messages(prompt.body)
    for attempt_number in (1, 2):
        attempt = AttemptRecord(attempt_number, "backend-1", attempt_number, monotonic())
        attempt.url, attempt.host, attempt.port = "http://127.0.0.1:8001/v1/chat/completions", "127.0.0.1", 8001
        attempt.ended = monotonic()
        record.attempts.append(attempt)
    failed = record.attempts[0]
    failed.outcome, failed.error_type, failed.message, failed.decision = "status_500", "500", "kaputt: ü", "retry"
    failed.status, failed.retry_after, failed.timer = 500, 0.25, "idle"
    record.attempts[1].backoff = 0.125
    record.events.append((monotonic(), "gateway.breaker", {"backend": "b", "from": "closed", "to": "open"}))
    record.first_token = record.ended = monotonic()
    record.queued = 0.5
    record.status, record.outcome, record.error_message = 503, "backend_error", "schlecht: ß"
    record.describe_answer(response_id="x", model="m", finish_reasons=["stop"], input_tokens=0, output_tokens=7)
    record.output_text = output_messages(["Antwort"], record.finish_reasons)
    return record


def test_the_spans_of_requests_are_encoded_as_the_sdk_encodes_them() -> None:
    spans = [span for number in range(4) for span in spans_of(a_record(number))]

    assert len(spans) == 12
    assert encoded(spans) == by_the_sdk(spans)


def test_captured_texts_close_a_batch_early_and_beyond_a_limit_are_left_out() -> None:
    sizes: list[int] = []
    texts: list[bool] = []

    class Exporter(OtlpHttpExporter):
        def send(self, body: bytes) -> bool:
            sizes.append(len(body))
            (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
            spans = [span for span in resource.scope_spans[0].spans if span.kind == SERVER]
            texts.extend(any(a.key == "gen_ai.input.messages" for a in span.attributes) for span in spans)
            return True

    tracer = Tracer(Exporter(endpoint="http://127.0.0.1:9/v1/traces"))
    records = [a_record(number) for number in range(1000)]
    for record in records:
        record.input_text, record.output_text = "\U0001f600" * 16_384, None
        tracer.export(record)
    kept = sum(record.input_text is not None for record in records)
    assert MAX_EXTRA // 2 - 70_000 < sum(record.extra for record in tracer._waiting) <= MAX_EXTRA
    tracer._export_waiting()

    assert len(texts) == 1000
    assert 0 < texts.count(True) == kept <= MAX_EXTRA // 2 // (4 * 16_384)
    assert max(sizes) < MOST_BY_GRPC
    assert not [record for record in records if record.input_text]
    assert tracer._extra == 0


def worst(number: int) -> Record:
    """The record of a request whose caller and backend say as much as they can."""
    wide = "\U0001f600" * 100_000
    record = a_record(number)
    del record.attempts[1:], record.events[:]
    record.input_text = record.output_text = None
    record.request_id = record.attempts[0].request_id = "r" * 128
    record.trace_state = "\xff" * MAX_TRACE_STATE
    record.describe_request(
        operation="chat",
        provider="openai",
        model=wide[:512],
        route=wide[:512],
        stream=True,
        choices=10**4000,
        max_tokens=10**4000,
        temperature=0.1,
        top_p=0.1,
    )
    record.describe_answer(
        response_id=wide, model=wide, finish_reasons=[wide] * 1000, input_tokens=2**62, output_tokens=2**62
    )
    record.end_with(InvalidRequest(wide))
    record.attempts[0].model = wide[:512]
    record.attempts[0].message = "m" * MAX_MESSAGE
    return record


@pytest.mark.parametrize("more", ["nothing", "texts", "attempts", "events"])
def test_an_export_is_bounded_in_bytes_whatever_its_requests_hold(more: str) -> None:
    sizes: list[int] = []

    class Exporter(OtlpHttpExporter):
        def send(self, body: bytes) -> bool:
            sizes.append(len(body))
            return True

    tracer = Tracer(Exporter(endpoint="http://127.0.0.1:9/v1/traces"))
    for number in range(2 * BATCH):
        record = worst(number)
        if more == "texts":
            record.input_text = record.output_text = "ÿ" * 50_000
        elif more == "attempts":
            record.attempts *= 40
        elif more == "events":
            record.events += [(monotonic(), "gateway.target_skipped", {"gateway.backend": "b" * 128})] * 400
        tracer.export(record)
    while tracer._waiting:
        tracer._export_batch()

    assert sum(sizes) > 2_000_000
    assert max(sizes) < MOST_BY_GRPC
    assert tracer.dropped == 0
    assert tracer._extra == 0


def test_what_waits_is_bounded_in_bytes_and_what_is_pushed_out_is_counted() -> None:
    tracer = Tracer(OtlpHttpExporter(endpoint="http://127.0.0.1:9/v1/traces"))
    for number in range(100):
        record = worst(number)
        record.attempts *= 200
        tracer.export(record)
    ordinary = worst(100)
    tracer.export(ordinary)

    waiting = len(tracer._waiting) - 1
    assert 0 < waiting < 100
    assert sum(record.extra for record in tracer._waiting) == tracer._extra <= MAX_EXTRA
    assert tracer.dropped == 201 * (100 - waiting)
    assert tracer._waiting[-1] is ordinary


def test_what_every_request_may_hold_is_little() -> None:
    """What is counted as nothing extra: so much memory, as many as 4,096 times."""
    seen: set[int] = set()

    def size(one: object) -> int:
        if id(one) in seen or one is None:
            return 0
        seen.add(id(one))
        parts: list[object] = list(one) if isinstance(one, list | tuple) else []
        if isinstance(one, Record):
            parts = [getattr(one, field.name) for field in fields(one)]
        elif isinstance(one, AttemptRecord):
            parts = [getattr(one, name) for name in one.__struct_fields__]
        return getsizeof(one) + sum(map(size, parts))

    assert size(worst(1)) < 24_000


def test_batches_that_large_texts_close_early_follow_each_other() -> None:
    exports: list[int] = []

    class Exporter(OtlpHttpExporter):
        def send(self, body: bytes) -> bool:
            exports.append(len(body))
            return True

    tracer = Tracer(Exporter(endpoint="http://127.0.0.1:9/v1/traces"))
    for number in range(200):
        record = a_record(number)
        record.input_text = "x" * 16_384
        tracer.export(record)
    tracer._export_waiting()

    assert len(exports) > 1
    assert not tracer._waiting


class Choosy(TraceIdRatioBased):
    """One that leaves something out by its name."""

    def should_sample(self, *args: Any, **kwargs: Any) -> SamplingResult:  # noqa: ANN401
        return ALWAYS_OFF.should_sample(*args, **kwargs)


def test_the_sampler_decides_and_nothing_else() -> None:
    half = TraceIdRatioBased(0.5)
    low, high = 1, 2**64 - 1
    for sampler in (half, ParentBased(half)):
        assert is_sampled(sampler, low, "POST", None)
        assert not is_sampled(sampler, high, "POST", None)
    assert is_sampled(ParentBased(half), high, "POST", (high, 1, 1))
    assert not is_sampled(ParentBased(half), low, "POST", (low, 1, 0))
    assert not is_sampled(Choosy(0.5), low, "POST", None)


def test_what_arrives_during_an_export_waits_for_the_next_one() -> None:
    exports: list[int] = []

    class Exporter(OtlpHttpExporter):
        def send(self, body: bytes) -> bool:
            (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
            exports.append(sum(span.kind == SERVER for span in resource.scope_spans[0].spans))
            tracer.export(a_record(1))
            return len(exports) < 10

    tracer = Tracer(Exporter(endpoint="http://127.0.0.1:9/v1/traces"))
    for number in range(BATCH + 2 * CHUNK):
        tracer.export(a_record(number))
    tracer._export_waiting()

    assert sum(exports) >= BATCH
    assert len(exports) == 1
    assert len(tracer._waiting) == BATCH + 2 * CHUNK - sum(exports) + 1, "less than a batch, so that it is not urgent"


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 10**400])
def test_an_integer_that_otlp_cannot_hold_is_text(value: int) -> None:
    span = SpanData(Shared("name", SERVER, [("number", value)]), trace_id=1, span_id=1, parent_id=0)
    (found,) = encoded([span]).resource_spans[0].scope_spans[0].spans[0].attributes

    assert found.value.string_value == str(value)


def test_half_a_surrogate_costs_a_letter_and_not_the_batch() -> None:
    span = SpanData(Shared("name", SERVER, [("text", "a\ud800b")]), trace_id=1, span_id=1, parent_id=0)
    span.own = [("list", ["\udfff"])]
    span.status, span.error = ERROR, "\udcff"
    found = encoded([span]).resource_spans[0].scope_spans[0].spans[0]

    assert found.attributes[0].value.string_value == "a?b"
    assert found.status.message == "?"


# Which exporter.


@pytest.mark.parametrize(
    ("environment", "mode", "kind"),
    [
        ({}, "dev", TreePrinter),
        ({}, "prod", None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, "dev", OtlpHttpExporter),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"}, "prod", OtlpHttpExporter),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            "prod",
            OtlpGrpcExporter,
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317",
                "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
            },
            "prod",
            OtlpHttpExporter,
        ),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "TRUE"}, "dev", None),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, "dev", None),
    ],
)
def test_the_environment_chooses_the_exporter(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], mode: str, kind: type | None
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    exporter = exporter_for(load(app_mode=mode), load_otel())

    assert type(exporter) is (kind or type(None))
    if exporter is not None:
        exporter.shutdown()


PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")


@pytest.mark.parametrize(
    ("url", "environment", "reached"),
    [
        ("http://collector:4318", {}, CollectorSettings()),
        ("http://collector:4318", {"https_proxy": "http://proxy"}, CollectorSettings()),
        ("https://collector:4318", {"https_proxy": "http://proxy"}, CollectorSettings(proxy="http://proxy")),
        ("http://collector:4318", {"all_proxy": "http://proxy"}, CollectorSettings(proxy="http://proxy")),
        ("http://collector:4318", {"all_proxy": "http://proxy", "no_proxy": "collector"}, CollectorSettings()),
        ("http://collector:4318", {"NETRC": "/there"}, CollectorSettings(trusts_environment=True)),
        ("https://collector", {"OTEL_EXPORTER_OTLP_CERTIFICATE": "ca"}, CollectorSettings(certificate="ca")),
        (
            "https://collector",
            {
                "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": "all",
                "OTEL_EXPORTER_OTLP_TRACES_CLIENT_CERTIFICATE": "cert",
                "OTEL_EXPORTER_OTLP_TRACES_CLIENT_KEY": "key",
            },
            CollectorSettings(client_certificate="cert", client_key="key"),
        ),
        (
            "http://collector",
            {"OTEL_PYTHON_EXPORTER_OTLP_HTTP_CREDENTIAL_PROVIDER": "plugin"},
            CollectorSettings(by_provider=True),
        ),
    ],
)
@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_how_a_collector_is_reached(  # noqa: PLR0917
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    url: str,
    environment: dict[str, str],
    reached: CollectorSettings,
) -> None:
    for proxy in PROXIES:
        monkeypatch.delenv(proxy, raising=False)
        monkeypatch.delenv(proxy.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for variable, value in {name: url, **environment}.items():
        monkeypatch.setenv(variable, value)

    assert load_otel().collector == reached


def test_the_sdk_takes_our_transport() -> None:
    exporter = OtlpHttpExporter("http://127.0.0.1:9/v1/traces")

    assert type(exporter._client._transport) is Transport
    exporter.shutdown()  # type: ignore[no-untyped-call]


def test_a_plugin_that_logs_in_has_a_session_whose_answers_are_not_read() -> None:
    exporter = OtlpHttpExporter("http://127.0.0.1:9/v1/traces", reached=CollectorSettings(by_provider=True))

    assert exporter._client._transport._session.stream  # type: ignore[attr-defined]
    exporter.shutdown()  # type: ignore[no-untyped-call]


def test_a_certificate_that_is_not_there_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "https://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_CERTIFICATE", "/not/there")

    with pytest.raises(SettingsError, match="a certificate for the collector of spans cannot be read"):
        exporter_for(load(app_mode="prod"), load_otel())


def test_a_home_that_cannot_be_looked_into_holds_no_passwords(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError

    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr("os.stat", refuse)

    assert not load_collector("http://collector:4318").trusts_environment


def test_an_unknown_protocol_stops_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")

    with pytest.raises(SettingsError, match="OTEL_EXPORTER_OTLP_PROTOCOL='http/json' is not valid"):
        load_otel()


@pytest.mark.parametrize("name", [None, "my-gateway"])
def test_the_service_is_the_gateway_unless_the_environment_names_it(
    monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    if name:
        monkeypatch.setenv("OTEL_SERVICE_NAME", name)
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    attributes = Tracer(None).resource.attributes

    assert attributes["service.name"] == (name or "gateway")
    assert attributes["service.version"] == __version__
    assert attributes["deployment.environment.name"] == "test"


class GrpcCollector(TraceServiceServicer):
    """An OTLP/gRPC receiver."""

    def __init__(self) -> None:
        self.requests: list[ExportTraceServiceRequest] = []

    def Export(self, request: ExportTraceServiceRequest, *_: Any) -> ExportTraceServiceResponse:  # noqa: ANN401, N802
        self.requests.append(request)
        return ExportTraceServiceResponse()


@contextmanager
def grpc_collector() -> Iterator[tuple[GrpcCollector, int]]:
    collector = GrpcCollector()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield collector, port
    finally:
        server.stop(None).wait()


def test_spans_go_out_by_grpc(monkeypatch: pytest.MonkeyPatch) -> None:
    with grpc_collector() as (collector, port):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
        tracer = Tracer(exporter_for(load(app_mode="prod"), load_otel()))
        tracer.start()
        tracer.export(a_record(1))
        tracer.stop()

    (request,) = collector.requests
    (resource,) = request.resource_spans
    spans = resource.scope_spans[0].spans
    assert [span.name for span in spans] == ["POST /v1/chat/completions"] * 3
    assert [span.kind for span in spans] == [SERVER, CLIENT, CLIENT]
    assert spans[0].parent_span_id.hex() == f"{5:016x}"
    assert {span.parent_span_id for span in spans[1:]} == {spans[0].span_id}
    assert tracer.dropped == 0
