"""What is counted of requests, kept by its labels until somebody asks for it.

prometheus-client's own instruments check and lock at each call, which costs more than all else that is counted of a
request.
"""

from bisect import bisect_left
from collections import defaultdict
from itertools import accumulate
from math import inf
from operator import itemgetter
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import Exemplar, HistogramMetricFamily

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from prometheus_client.metrics_core import Metric

    KnownBy = Callable[[tuple[object, ...]], object]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bucket bounds of durations."""
FIRST: "KnownBy" = itemgetter(0)
"""The label by which somebody is known, in most metrics."""


class _Every:
    """Holds every name: there is no configuration yet."""

    def __contains__(self, _name: object) -> bool:
        return True


EVERY = _Every()


class Durations:
    """A histogram in seconds, by labels or of all; the latest duration in each bucket leads to its trace.

    prometheus-client's own checks each exemplar and locks at each call, which costs more than all else that is counted
    of a request.
    """

    def __init__(
        self, name: str, text: str, registry: CollectorRegistry, *, labels: tuple[str, ...] = ("route",)
    ) -> None:
        self._name = name
        self._text = text
        self._labels = labels
        self._buckets: dict[tuple[str, ...], _Buckets] = {} if labels else {(): _Buckets()}
        registry.register(self)

    def observe(self, labels: tuple[str, ...], seconds: float, trace_id: int | None) -> None:
        """Count a duration; `trace_id` None: its trace cannot be looked up."""
        buckets = self._buckets.get(labels)
        if buckets is None:
            buckets = self._buckets[labels] = _Buckets()
        place = bisect_left(SECONDS, seconds)
        buckets.counts[place] += 1
        buckets.sum += seconds
        if trace_id is not None:
            buckets.latest[place] = seconds, trace_id

    def keep(self, known: "Container[object]") -> None:
        """Forget all but those with one of these sets of labels."""
        self._buckets = {labels: buckets for labels, buckets in self._buckets.items() if labels in known}

    def by_route(self) -> dict[str, list[int]]:
        """Return how many durations are in each bucket, by route."""
        return {labels[0]: list(buckets.counts) for labels, buckets in self._buckets.items()}

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for labels, buckets in self._buckets.items():
            family.add_metric(labels, list(buckets.cumulative()), buckets.sum)
        yield family


class _Buckets:
    """What one route has come to: durations by bucket, their sum, and the latest one of each with its trace."""

    __slots__ = ("counts", "latest", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0
        self.latest: dict[int, tuple[float, int]] = {}

    def cumulative(self) -> "Iterator[tuple[str, float] | tuple[str, float, Exemplar]]":
        """Yield each bound with the number of durations up to it, and its exemplar."""
        for place, (bound, number) in enumerate(zip((*SECONDS, inf), accumulate(self.counts), strict=True)):
            name = "+Inf" if bound == inf else str(bound)
            if place in self.latest:
                seconds, trace_id = self.latest[place]
                yield name, number, Exemplar({"trace_id": f"{trace_id:032x}"}, seconds)
            else:
                yield name, number


class Counts:
    """A counter by its labels. What is counted waits here until somebody asks: prometheus-client locks at each call."""

    def __init__(self, counter: Counter, known_by: "KnownBy") -> None:
        self._counter = counter
        self._known_by = known_by
        self._waiting: defaultdict[tuple[object, ...], int] = defaultdict(int)
        self._known: Container[object] = EVERY

    def add(self, *labels: object, by: int = 1) -> None:
        """Count."""
        self._waiting[labels] += by

    def keep(self, known: "Container[object]") -> None:
        """Count only those who are known by one of these, and forget all others."""
        self._known = known
        self.pass_on()
        forget_others(self._counter, known, self._known_by)

    def pass_on(self) -> None:
        """Add what waits to the counter."""
        for labels, number in self._waiting.items():
            if self._known_by(labels) not in self._known:
                continue
            self._counter.labels(*map(str, labels)).inc(number)
        self._waiting.clear()

    def totals(self) -> dict[tuple[str, ...], int]:
        """Return what was counted, by labels."""
        self.pass_on()
        (family,) = self._counter.collect()
        return {
            tuple(sample.labels.values()): int(sample.value)
            for sample in family.samples
            if sample.name.endswith("_total")
        }


def forget_others(counter: Counter, known: "Container[object]", known_by: "KnownBy" = FIRST) -> None:
    """Forget what a counter has of those who are known by none of these."""
    (family,) = counter.collect()
    labels = {tuple(sample.labels.values()) for sample in family.samples}
    for each in labels:
        if known_by(each) not in known:
            counter.remove(*each)
