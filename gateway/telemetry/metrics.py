"""The numbers at `/metrics`. Gauges are read when they are asked for; the children of counters are cached."""

from bisect import bisect_left
from itertools import accumulate
from time import time
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder

from gateway import __version__
from gateway.policy.breaker import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client.metrics_core import Metric

    from gateway.policy.admission import Admission
    from gateway.policy.byte_budget import ByteBudget
    from gateway.policy.pool import Pool
    from gateway.record import Record

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bucket bounds of durations."""
BREAKER_VALUES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
SHED_REASONS = ("queue_full", "queue_timeout", "memory")
OPENMETRICS = "application/openmetrics-text"
OTHER = "other"
"""The `route` of a call to an unknown path."""


class Metrics:
    """One set of instruments, in a registry of its own. No label value comes from a caller."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "gateway_requests", "Requests answered.", ["route", "status", "outcome"], registry=registry
        )
        self._duration = Durations(
            "gateway_request_duration_seconds", "From a request's headers to the end of its answer."
        )
        self._first_token = Durations(
            "gateway_time_to_first_token_seconds", "From a streamed request's headers to its first content event."
        )
        registry.register(self._duration)
        registry.register(self._first_token)
        self._queue_wait = Histogram(
            "gateway_queue_wait_seconds",
            "Time in the queue of requests that had to wait.",
            buckets=SECONDS,
            registry=registry,
        )
        self._attempts = Counter(
            "gateway_attempts", "HTTP calls to a backend.", ["backend", "outcome"], registry=registry
        )
        self._allowed = Counter("gateway_retries_allowed", "Retries that were sent.", ["backend"], registry=registry)
        self._refused = Counter(
            "gateway_retries_refused", "Retries the retry budget refused.", ["backend"], registry=registry
        )
        self._transitions = Counter(
            "gateway_breaker_transitions", "Changes of a breaker's state.", ["backend", "to"], registry=registry
        )
        self._shed = Counter("gateway_shed_requests", "Requests refused at admission.", ["reason"], registry=registry)
        for reason in SHED_REASONS:
            self._shed.labels(reason)
        self._disconnects = Counter("gateway_client_disconnects", "Callers who left early.", registry=registry)
        tokens = Counter("gateway_tokens", "Tokens, as the backends count them.", ["direction"], registry=registry)
        self._input_tokens = tokens.labels("input")
        self._output_tokens = tokens.labels("output")
        self.loop_lag = Gauge(
            "gateway_event_loop_lag_seconds",
            "How late the event loop was, at worst, in the last 15 s.",
            registry=registry,
        )
        Gauge("gateway_build_info", "1, with the version.", ["version"], registry=registry).labels(__version__).set(1)
        self._request_children: dict[tuple[str, int, str], Counter] = {}
        self._attempt_children: dict[tuple[str, str], Counter] = {}

    def watch(self, pool: "Pool", admission: "Admission", byte_budget: "ByteBudget") -> None:
        """Read gauges from these parts whenever the metrics are asked for."""
        for replica in pool.replicas:
            self._allowed.labels(replica.name)
            self._refused.labels(replica.name)
            for state in State:
                self._transitions.labels(replica.name, state.value)
        self._registry.register(_Parts(pool, admission, byte_budget))

    def watch_dropped(self, dropped: "Callable[[], int]") -> None:
        """Read the number of lost spans whenever the metrics are asked for."""
        self._registry.register(_Dropped(dropped))

    def count(self, record: "Record", *, kept: bool) -> None:
        """Count a request that has ended; `kept`: its trace is exported, and can be an exemplar."""
        route = record.path or OTHER
        key = (route, record.status, record.outcome)
        child = self._request_children.get(key)
        if child is None:
            child = self._request_children[key] = self._requests.labels(route, str(record.status), record.outcome)
        child.inc()
        trace_id = record.trace_id if kept else None
        self._duration.observe(route, record.seconds(0.0), trace_id)
        if record.first_token is not None:
            self._first_token.observe(route, record.first_token - record.started, trace_id)
        for attempt in record.attempts:
            self._count_attempt(attempt.backend, attempt.outcome or "ok")
        if record.input_tokens:
            self._input_tokens.inc(record.input_tokens)
        if record.output_tokens:
            self._output_tokens.inc(record.output_tokens)
        if record.queued:
            self._queue_wait.observe(record.queued)
        if record.shed is not None:
            self._shed.labels(record.shed).inc()
        if record.outcome == "client_closed_request":
            self._disconnects.inc()

    def retry_allowed(self, backend: str) -> None:
        """Count a retry sent to this replica."""
        self._allowed.labels(backend).inc()

    def retry_refused(self, backend: str) -> None:
        """Count a retry that the budget of this replica refused."""
        self._refused.labels(backend).inc()

    def breaker_changed(self, backend: str, to: State) -> None:
        """Count a change of a breaker's state."""
        self._transitions.labels(backend, to.value).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the form that `accept` asks for, and its content type."""
        # Not the header itself: an invalid version would fail, and any other would come back in the content type.
        encode, content_type = choose_encoder(OPENMETRICS if OPENMETRICS in accept else "")
        return encode(self._registry), content_type

    def _count_attempt(self, backend: str, outcome: str) -> None:
        child = self._attempt_children.get((backend, outcome))
        if child is None:
            child = self._attempt_children[backend, outcome] = self._attempts.labels(backend, outcome)
        child.inc()


class Durations:
    """A histogram by route, each bucket with the trace of its latest duration.

    prometheus-client's own builds and checks each exemplar when it comes, which takes longer than all else that is
    counted of a request (bench/README.md); here that is left to whoever asks.
    """

    def __init__(self, name: str, text: str) -> None:
        self._name = name
        self._text = text
        self._routes: dict[str, _Buckets] = {}

    def observe(self, route: str, seconds: float, trace_id: int | None) -> None:
        """One more; `trace_id` None: its trace cannot be looked up."""
        buckets = self._routes.get(route)
        if buckets is None:
            buckets = self._routes[route] = _Buckets()
        index = bisect_left(SECONDS, seconds)
        buckets.counts[index] += 1
        buckets.sum += seconds
        if trace_id is not None:
            buckets.latest[index] = trace_id, seconds, time()

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        family = HistogramMetricFamily(self._name, self._text, labels=["route"])
        for route, buckets in self._routes.items():
            family.add_metric([route], buckets.told(), buckets.sum)
            family.add_sample(f"{self._name}_created", {"route": route}, buckets.created)
        yield family


BOUNDS = (*map(str, SECONDS), "+Inf")


class _Buckets:
    __slots__ = ("counts", "created", "latest", "sum")

    def __init__(self) -> None:
        self.created = time()
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum = 0.0
        self.latest: list[tuple[int, float, float] | None] = [None] * (len(SECONDS) + 1)

    def told(self) -> "list[tuple[str, float] | tuple[str, float, Exemplar]]":
        """Each bound with how many stayed below it, and the exemplar if there is one."""
        told: list[tuple[str, float] | tuple[str, float, Exemplar]] = []
        for bound, count, latest in zip(BOUNDS, accumulate(self.counts), self.latest, strict=True):
            if latest is None:
                told.append((bound, count))
            else:
                trace_id, seconds, at = latest
                told.append((bound, count, Exemplar({"trace_id": f"{trace_id:032x}"}, seconds, at)))
        return told


class _Parts:
    """Gauges that the parts know."""

    def __init__(self, pool: "Pool", admission: "Admission", byte_budget: "ByteBudget") -> None:
        self._pool = pool
        self._admission = admission
        self._byte_budget = byte_budget

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        breakers = GaugeMetricFamily("gateway_breaker_state", "0 closed, 1 half open, 2 open.", labels=["backend"])
        probes = GaugeMetricFamily("gateway_backend_probe_ok", "Whether the last probe was good.", labels=["backend"])
        flying = GaugeMetricFamily("gateway_backend_in_flight", "Attempts under way.", labels=["backend"])
        for replica in self._pool.replicas:
            breakers.add_metric([replica.name], BREAKER_VALUES[replica.breaker.state])
            flying.add_metric([replica.name], replica.in_flight)
            if replica.probe is not None:
                probes.add_metric([replica.name], int(replica.probe.ok))
        yield breakers
        yield probes
        yield flying
        yield _gauge("gateway_in_flight_requests", "Requests with a slot.", self._admission.in_flight)
        yield _gauge("gateway_queued_requests", "Requests that wait for a slot.", self._admission.queued)
        yield _gauge("gateway_buffered_bytes", "Bytes of bodies and answers held.", self._byte_budget.held)


class _Dropped:
    """The lost spans."""

    def __init__(self, dropped: "Callable[[], int]") -> None:
        self._read = dropped

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        family = CounterMetricFamily("gateway_telemetry_dropped_spans", "Spans that could not be exported.")
        family.add_metric([], self._read())
        yield family


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family
