"""What is exported of the instruments is what `/metrics` shows, and adds up in deltas too."""

from collections.abc import Iterable

import pytest
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics
from opentelemetry.sdk.resources import Resource

from gateway.record import AttemptRecord, Record
from gateway.telemetry.gen_ai_metrics import FIRST_TOKEN, PER_TOKEN, SECONDS, TOKENS, GenAiMetrics
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.readings import Reading, metric_of, readings_of, since
from gateway.telemetry.sdk_spans import SCOPE
from testkit.exposition import Exposition

START, NOW = 10**18, 10**18 + 5


def a_record(
    seconds: float = 0.5,
    *,
    route: str | None = "demo",
    outcome: str = "ok",
    first_token: float | None = 0.1,
    tokens: tuple[int | None, int | None] = (7, 5),
) -> Record:
    record = Record(
        "POST", "/v1/chat/completions", trace_id=1, span_id=2, request_id="r", started=100.0, started_ns=START
    )
    record.operation, record.provider, record.route, record.model = "chat", "openai", route, "the caller's words"
    record.status, record.outcome = (200, "ok") if outcome == "ok" else (504, outcome)
    record.attempts.append(AttemptRecord(1, "backend-1", 3, 100.0))
    record.first_token = None if first_token is None else 100.0 + first_token
    record.ended = 100.0 + seconds
    record.input_tokens, record.output_tokens = tokens
    return record


def encoded(readings: Iterable[Reading], *, delta: bool = False) -> dict[str, metrics_pb2.Metric]:
    """By the SDK's own encoder, as they go out."""
    metrics = [metric_of(reading, start=START, now=NOW, delta=delta) for reading in readings]
    data = MetricsData([ResourceMetrics(Resource({}), [ScopeMetrics(SCOPE, metrics, "")], "")])
    (resource,) = encode_metrics(data).resource_metrics
    return {metric.name: metric for metric in resource.scope_metrics[0].metrics}


def attributes(point: metrics_pb2.NumberDataPoint | metrics_pb2.HistogramDataPoint) -> dict[str, str]:
    return {one.key: one.value.string_value for one in point.attributes}


def test_every_number_of_the_page_goes_out_under_the_same_name() -> None:
    metrics = Metrics()
    for seconds in (0.001, 0.5, 7.0, 1000.0):
        metrics.count(a_record(seconds), kept=True)
    metrics.retry_refused("backend-1")
    page = Exposition.parse(metrics.exposition("")[0].decode())
    found = encoded(readings_of(metrics.read()))

    told: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for name, metric in found.items():
        for point in [*metric.sum.data_points, *metric.gauge.data_points]:
            told[name, tuple(sorted(attributes(point).items()))] = point.as_double
        for bucketed in metric.histogram.data_points:
            labels = tuple(sorted(attributes(bucketed).items()))
            told[f"{name}_count", labels] = bucketed.count
            told[f"{name}_sum", labels] = bucketed.sum
            up_to = 0
            for bound, number in zip(
                [*map(str, bucketed.explicit_bounds), "+Inf"], bucketed.bucket_counts, strict=True
            ):
                up_to += number
                told[f"{name}_bucket", tuple(sorted([*labels, ("le", bound)]))] = up_to
    shown = {
        (name, tuple(sorted(dict(labels).items()))): value
        for (name, labels), value in page.samples.items()
        if not name.endswith("_created")
    }
    assert len(shown) > 60
    assert told == shown


def test_kinds_units_and_times_are_those_of_the_data_model() -> None:
    metrics = Metrics()
    metrics.count(a_record(), kept=False)
    found = encoded(readings_of(metrics.read()))

    requests, duration, lag = (
        found[name]
        for name in ("gateway_requests_total", "gateway_request_duration_seconds", "gateway_event_loop_lag_seconds")
    )
    assert requests.sum.is_monotonic
    assert requests.sum.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE
    (point,) = requests.sum.data_points
    assert point.time_unix_nano == NOW
    assert 0 < point.start_time_unix_nano != START, "since the counter's own beginning"
    assert duration.unit == "s"
    assert duration.histogram.data_points[0].start_time_unix_nano == START
    assert not duration.histogram.data_points[0].HasField("min")
    assert lag.WhichOneof("data") == "gauge"
    assert lag.gauge.data_points[0].start_time_unix_nano == 0


def test_deltas_add_up_to_what_is_counted_and_gauges_stay() -> None:
    metrics, gen_ai = Metrics(), GenAiMetrics()
    before: dict[str, Reading] = {}
    sums: dict[str, float] = {}
    for number in range(1, 4):
        for _ in range(number):
            metrics.count(a_record(0.25), kept=False)
            gen_ai.count(a_record(0.25))
        readings = [*readings_of(metrics.read()), *gen_ai.read()]
        found = encoded(since(before, readings), delta=True)
        before = {reading.name: reading for reading in readings}
        for name in ("gateway_requests_total", "gateway_tokens_total"):
            assert found[name].sum.aggregation_temporality == metrics_pb2.AGGREGATION_TEMPORALITY_DELTA
            sums[name] = sums.get(name, 0) + sum(point.as_double for point in found[name].sum.data_points)
        for name in ("gateway_request_duration_seconds", "gen_ai.client.operation.duration"):
            (point,) = found[name].histogram.data_points
            assert (point.count, sum(point.bucket_counts), point.sum) == (number, number, pytest.approx(0.25 * number))
            assert point.start_time_unix_nano == START
        assert found["gateway_build_info"].gauge.data_points[0].as_double == 1

    assert sums == {"gateway_requests_total": 6, "gateway_tokens_total": 6 * 12}


def test_genai_metrics_have_the_names_units_and_bounds_of_the_conventions() -> None:
    gen_ai = GenAiMetrics()
    gen_ai.count(a_record(0.5, first_token=0.1, tokens=(7, 5)))
    found = encoded(gen_ai.read())

    assert {
        name: (metric.unit, tuple(metric.histogram.data_points[0].explicit_bounds)) for name, metric in found.items()
    } == {
        "gen_ai.client.operation.duration": ("s", SECONDS),
        "gen_ai.client.token.usage": ("{token}", TOKENS),
        "gen_ai.server.time_to_first_token": ("s", FIRST_TOKEN),
        "gen_ai.server.time_per_output_token": ("s", PER_TOKEN),
    }
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "demo",
        "gateway.route": "demo",
    }
    (duration,) = found["gen_ai.client.operation.duration"].histogram.data_points
    (first,) = found["gen_ai.server.time_to_first_token"].histogram.data_points
    (per_token,) = found["gen_ai.server.time_per_output_token"].histogram.data_points
    assert [attributes(point) for point in (duration, first, per_token)] == [common] * 3
    assert [point.sum for point in (duration, first, per_token)] == [
        pytest.approx(0.5),
        pytest.approx(0.1),
        pytest.approx(0.1),
    ]
    usage = {
        attributes(point)["gen_ai.token.type"]: point.sum
        for point in found["gen_ai.client.token.usage"].histogram.data_points
    }
    assert usage == {"input": 7, "output": 5}


def test_bounds_are_those_that_the_conventions_advise() -> None:
    assert tuple(0.01 * 2**power for power in range(14)) == pytest.approx(SECONDS)
    assert TOKENS == (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)


@pytest.mark.parametrize("route", ["*", "qwen*"])
def test_the_model_of_a_route_for_many_is_not_told(route: str) -> None:
    gen_ai = GenAiMetrics()
    gen_ai.count(a_record(route=route))
    for metric in encoded(gen_ai.read()).values():
        for point in metric.histogram.data_points:
            assert "gen_ai.request.model" not in attributes(point)
            assert attributes(point)["gateway.route"] == route
            assert "the caller's words" not in attributes(point).values()


def test_a_failure_is_told_by_its_code_and_has_no_first_token() -> None:
    gen_ai = GenAiMetrics()
    gen_ai.count(a_record(outcome="backend_timeout", tokens=(None, None)))
    found = encoded(gen_ai.read())

    (duration,) = found["gen_ai.client.operation.duration"].histogram.data_points
    assert attributes(duration)["error.type"] == "backend_timeout"
    assert set(found) == {"gen_ai.client.operation.duration"}


def test_tokens_of_good_and_failed_requests_add_up() -> None:
    gen_ai = GenAiMetrics()
    gen_ai.count(a_record(tokens=(7, 5)))
    gen_ai.count(a_record(tokens=(70, 50), outcome="backend_timeout"))
    usage = encoded(gen_ai.read())["gen_ai.client.token.usage"].histogram.data_points

    assert {attributes(point)["gen_ai.token.type"]: (point.count, point.sum) for point in usage} == {
        "input": (2, 77),
        "output": (2, 55),
    }


def test_what_is_no_prompt_or_has_no_route_is_not_counted() -> None:
    gen_ai = GenAiMetrics()
    gen_ai.count(a_record(route=None))
    unknown = a_record()
    unknown.operation = None
    gen_ai.count(unknown)

    assert list(gen_ai.read()) == []


def test_one_token_has_no_time_per_token() -> None:
    gen_ai = GenAiMetrics()
    for tokens in (None, 0, 1):
        gen_ai.count(a_record(tokens=(1, tokens)))

    assert "gen_ai.server.time_per_output_token" not in encoded(gen_ai.read())
