"""What the instruments have come to at one moment, and the same as OpenTelemetry's data model of metrics has it. Pure.

Source: opentelemetry-proto 1.x, metrics.proto; temporality as in OpenTelemetry's metrics data model.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    NumberDataPoint,
    Sum,
)
from prometheus_client import Metric as Family
from prometheus_client.samples import Sample

Attributes = tuple[tuple[str, str], ...]
UNITS = {"_seconds": "s", "_bytes": "By"}
"""Units (UCUM) by the ends of Prometheus' names."""


@dataclass(frozen=True, slots=True)
class Buckets:
    """Values of a histogram: how many fell into each bucket, the last one without a bound, and their sum."""

    counts: tuple[int, ...]
    sum: float

    def __add__(self, other: "Buckets") -> "Buckets":
        counts = tuple(one + another for one, another in zip(self.counts, other.counts, strict=True))
        return Buckets(counts, self.sum + other.sum)

    def __sub__(self, earlier: "Buckets") -> "Buckets":
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Buckets(counts, self.sum - earlier.sum)


@dataclass(frozen=True, slots=True)
class Reading:
    """One instrument.

    Attributes:
        kind: a `sum` only grows, a `gauge` does not only.
        unit: UCUM's, or empty.
        points: by attributes; since the start, for a gauge now.
        starts: nanoseconds since the epoch from which a point counts, where it is not the start of all.
        bounds: upper bounds of a histogram's buckets, without infinity.
    """

    name: str
    text: str
    kind: Literal["sum", "gauge", "histogram"]
    unit: str
    points: Mapping[Attributes, "float | Buckets"]
    starts: Mapping[Attributes, int]
    bounds: tuple[float, ...] = ()


def readings_of(families: Iterable[Family]) -> Iterator[Reading]:
    """Yield the instruments of `/metrics`, each under its name there."""
    for family in families:
        unit = next((unit for end, unit in UNITS.items() if family.name.endswith(end)), "")
        if family.type == "histogram":
            bounds, histograms = _histograms(family.samples)
            yield Reading(family.name, family.documentation, "histogram", unit, histograms, {}, bounds)
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        points = {_attributes(sample): sample.value for sample in family.samples if sample.name == name}
        starts = {
            _attributes(sample): int(sample.value * 1e9)
            for sample in family.samples
            if sample.name == f"{family.name}_created"
        }
        kind: Literal["sum", "gauge"] = "sum" if family.type == "counter" else "gauge"
        yield Reading(name, family.documentation, kind, unit, points, starts)


def since(earlier: Mapping[str, Reading], readings: Iterable[Reading]) -> Iterator[Reading]:
    """Yield what sums and histograms have gained since earlier readings, by name: delta temporality."""
    for reading in readings:
        before = earlier.get(reading.name)
        if reading.kind == "gauge" or before is None:
            yield reading
            continue
        points = {key: _gained(value, before.points.get(key)) for key, value in reading.points.items()}
        yield replace(reading, points=points)


def metric_of(reading: Reading, *, start: int, now: int, delta: bool) -> Metric:
    """Return an instrument in the SDK's form.

    Args:
        reading: of the instrument.
        start: nanoseconds since the epoch from which it counts; with `delta` it wins over the point's own.
        now: of the reading.
        delta: whether it counts since the reading before.
    """
    temporality = AggregationTemporality.DELTA if delta else AggregationTemporality.CUMULATIVE
    numbers, histograms = [], []
    for attributes, value in reading.points.items():
        began = start if delta else reading.starts.get(attributes, start)
        if isinstance(value, Buckets):
            histograms.append(
                HistogramDataPoint(
                    attributes=dict(attributes),
                    start_time_unix_nano=began,
                    time_unix_nano=now,
                    count=sum(value.counts),
                    sum=value.sum,
                    bucket_counts=value.counts,
                    explicit_bounds=reading.bounds,
                    # Optional in OTLP, and kept by nobody here.
                    min=None,  # type: ignore[arg-type]
                    max=None,  # type: ignore[arg-type]
                )
            )
        else:
            numbers.append(NumberDataPoint(dict(attributes), began if reading.kind == "sum" else 0, now, value))
    data: Sum | Gauge | Histogram
    if reading.kind == "sum":
        data = Sum(numbers, temporality, is_monotonic=True)
    elif reading.kind == "gauge":
        data = Gauge(numbers)
    else:
        data = Histogram(histograms, temporality)
    return Metric(reading.name, reading.text, reading.unit, data)


def _gained(now: "float | Buckets", then: "float | Buckets | None") -> "float | Buckets":
    if isinstance(now, Buckets):
        return now - then if isinstance(then, Buckets) else now
    return now - then if isinstance(then, float | int) else now


def _attributes(sample: Sample) -> Attributes:
    return tuple((name, value) for name, value in sample.labels.items() if name != "le")


def _histograms(samples: Iterable[Sample]) -> tuple[tuple[float, ...], dict[Attributes, Buckets]]:
    """Return the bounds and the points of a histogram, whose samples count up from bound to bound."""
    bounds: tuple[float, ...] = ()
    up_to: dict[Attributes, list[tuple[float, int]]] = {}
    sums: dict[Attributes, float] = {}
    for sample in samples:
        if sample.name.endswith("_bucket"):
            up_to.setdefault(_attributes(sample), []).append((float(sample.labels["le"]), int(sample.value)))
        elif sample.name.endswith("_sum"):
            sums[_attributes(sample)] = sample.value
    points = {}
    for attributes, numbers in up_to.items():
        bounds = tuple(bound for bound, _ in numbers[:-1])
        counts = tuple(now - before for before, now in pairwise((0, *(number for _, number in numbers))))
        points[attributes] = Buckets(counts, sums.get(attributes, 0.0))
    return bounds, points
