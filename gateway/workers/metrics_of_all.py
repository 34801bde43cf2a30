"""The metrics of all workers as those of one gateway."""

from typing import TYPE_CHECKING, Any

from prometheus_client.core import Exemplar, Metric
from prometheus_client.samples import Sample

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping

USED = "gateway_key_limit_used"
SUMMED = {
    "gateway_backend_in_flight",
    "gateway_buffered_bytes",
    "gateway_in_flight_requests",
    USED,
    "gateway_open_connections",
    "gateway_queued_requests",
    "gateway_waiting_requests",
}
"""Gauges that count what each worker has for itself."""
GENERATION = "gateway_config_generation"
LEAST = {"gateway_backend_probe_ok", GENERATION}
"""Gauges of which the least counts: it is good where it is good for all, and in force where all have it."""
GAUGE, COUNTED = "gauge", frozenset({"counter", "histogram"})

Families = list[list[Any]]
"""Metrics as JSON: for each its name, its text, its type, and its samples: name, labels, value, exemplar or null."""
_Key = tuple[str, tuple[tuple[str, str], ...]]


def as_json(metrics: "Iterable[Metric]") -> Families:
    """Return metrics as JSON."""
    return [
        [
            metric.name,
            metric.documentation,
            metric.type,
            [
                [each.name, each.labels, each.value, each.exemplar and [each.exemplar.labels, each.exemplar.value]]
                for each in metric.samples
            ],
        ]
        for metric in metrics
    ]


def generation_of(families: Families) -> int:
    """Return the number of the configuration that is in force in a worker; 1 where it does not say."""
    samples = [sample for name, _, _, samples in families if name == GENERATION for sample in samples]
    return max((int(value) for _, _, value, _ in samples), default=1)


class MetricsOfAll:
    """Adds up what workers count. What one has counted stays in the sums when it is gone: no counter ever falls."""

    def __init__(self) -> None:
        self._last: dict[int, Families] = {}
        self._gone = _Sum()

    def take(self, worker: int, families: Families) -> None:
        """Take in what a worker has counted so far."""
        self._last[worker] = families

    def ended(self, worker: int) -> None:
        """Keep the counters of a worker that has ended; its gauges end with it."""
        self._gone.add(self._last.pop(worker, []), gauges=False)

    def families(self, present: "Collection[int]", used: "Mapping[tuple[str, str], int]") -> "Iterator[Metric]":
        """Yield the metrics of all.

        Args:
            present: the workers of which gauges count.
            used: by all, of limits by key and limit, as their ledgers know it.
        """
        total = _Sum()
        total.add_sum(self._gone)
        for worker, families in self._last.items():
            total.add(families, gauges=worker in present)
        for metric in total.metrics():
            if metric.name == USED:
                metric.samples = [
                    each._replace(value=max(each.value, used.get((each.labels["key"], each.labels["limit"]), 0)))
                    for each in metric.samples
                ]
            yield metric


class _Sum:
    def __init__(self) -> None:
        self.families: dict[str, tuple[str, str, dict[_Key, Sample]]] = {}

    def add(self, families: Families, *, gauges: bool) -> None:
        for name, text, type_, samples in families:
            if type_ in COUNTED or gauges:
                mine = self._samples(name, text, type_)
                for sample, labels, value, exemplar in samples:
                    at = None if exemplar is None else Exemplar(*exemplar)
                    self._count(name, type_, mine, Sample(sample, labels, value, None, at))

    def add_sum(self, other: "_Sum") -> None:
        for name, (text, type_, samples) in other.families.items():
            self._samples(name, text, type_).update(samples)

    def metrics(self) -> "Iterator[Metric]":
        for name, (text, type_, samples) in self.families.items():
            metric = Metric(name, text, type_)
            metric.samples = list(samples.values())
            yield metric

    def _samples(self, name: str, text: str, type_: str) -> dict[_Key, Sample]:
        return self.families.setdefault(name, (text, type_, {}))[2]

    def _count(self, name: str, type_: str, samples: dict[_Key, Sample], new: Sample) -> None:
        key = new.name, tuple(sorted(new.labels.items()))
        old = samples.get(key)
        if old is not None:
            new = new._replace(value=_joined(name, type_, new, old), exemplar=new.exemplar or old.exemplar)
        samples[key] = new


def _joined(name: str, type_: str, new: Sample, old: Sample) -> float:
    if new.name.endswith("_created"):
        return min(new.value, old.value)
    if type_ in COUNTED or name in SUMMED:
        return new.value + old.value
    return min(new.value, old.value) if name in LEAST else max(new.value, old.value)
