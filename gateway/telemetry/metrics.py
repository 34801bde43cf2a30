"""The numbers at `/metrics`. Gauges, and what was counted of requests, are read when they are asked for."""

from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import CounterMetricFamily, Exemplar, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import choose_encoder

from gateway import __version__
from gateway.policy.breaker import State

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator, Sequence, Sized

    from prometheus_client.metrics_core import Metric

    from gateway.generation import Generation, Generations
    from gateway.policy.admission import Admission
    from gateway.policy.byte_budget import ByteBudget
    from gateway.record import Record
    from gateway.telemetry.output import Output

    KnownBy = Callable[[tuple[object, ...]], object]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Bucket bounds of durations."""
STATUS_VALUES = {"ok": 0, "degraded": 1, "down": 2}
BREAKER_VALUES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}
SHED_REASONS = (
    "queue_full",
    "queue_timeout",
    "memory",
    "backend_full",
    "connections",
    "descriptors",
    "ports",
    "buffers",
)
CLOSE_REASONS = ("keepalive_timeout", "headers_timeout", "made_room", "write_timeout")
BRIDGED_OUTCOMES = ("answered", "failed", "left", "draining")
_BRIDGED = {"ok": "answered", "client_closed_request": "left", "gateway_draining": "draining"}
MAX_AGE = 1.0
"""Seconds for which a document is given again: rendering one takes milliseconds, and anybody may ask for it."""
OPENMETRICS = "application/openmetrics-text"
TARGET = ("route", "backend", "model")
"""A target of a route with weights, by its configured names; where it names no model, that of the route."""
FIRST: "KnownBy" = itemgetter(0)
"""The label by which somebody is known, in most metrics."""
OTHER = "other"
"""The `route` of a call to an unknown path."""


class _Every:
    """Holds every name: there is no configuration yet."""

    def __contains__(self, _name: object) -> bool:
        return True


EVERY = _Every()


class Metrics:
    """One set of instruments, in a registry of its own. No label value comes from a caller.

    Args:
        clock: seconds, monotonic.

    Attributes:
        max_age: seconds for which a document is given again.
    """

    def __init__(self, *, clock: "Callable[[], float]" = monotonic) -> None:
        self.max_age = MAX_AGE
        self._clock = clock
        self._documents: dict[bool, tuple[float, bytes, str]] = {}
        self._counted: list[_Counts] = []
        self._backends: Container[str] = EVERY
        self._registry = registry = CollectorRegistry()
        self._requests = self._counts(
            Counter("gateway_requests", "Requests answered.", ["route", "status", "outcome"], registry=registry)
        )
        self._duration = _Durations(
            "gateway_request_duration_seconds", "From a request's headers to the end of its answer.", registry
        )
        self._first_token = _Durations(
            "gateway_time_to_first_token_seconds",
            "From a streamed request's headers to its first content event.",
            registry,
        )
        self._queue_wait = _Durations(
            "gateway_queue_wait_seconds", "Time in the queue of requests that had to wait.", registry, labels=()
        )
        self._attempts = self._counts(
            Counter("gateway_attempts", "HTTP calls to a backend.", ["backend", "outcome"], registry=registry)
        )
        self._target_attempts = self._counts(
            Counter(
                "gateway_target_attempts",
                "HTTP calls to a target of a route with weights.",
                [*TARGET, "outcome"],
                registry=registry,
            ),
            known_by=itemgetter(slice(len(TARGET))),
        )
        self._target_duration = _Durations(
            "gateway_target_duration_seconds", "Good attempts at it, to the end of the answer.", registry, labels=TARGET
        )
        self._target_first_token = _Durations(
            "gateway_target_first_token_seconds", "Good streams of it, to the first content.", registry, labels=TARGET
        )
        self._allowed = Counter("gateway_retries_allowed", "Retries that were sent.", ["backend"], registry=registry)
        self._refused = Counter(
            "gateway_retries_refused", "Retries the retry budget refused.", ["backend"], registry=registry
        )
        self._transitions = Counter(
            "gateway_breaker_transitions", "Changes of a breaker's state.", ["backend", "to"], registry=registry
        )
        self._shed = Counter("gateway_shed_requests", "Requests refused for load.", ["reason"], registry=registry)
        for reason in SHED_REASONS:
            self._shed.labels(reason)
        self._bridged = Counter(
            "gateway_bridged_requests", "Requests that waited for the end of an outage.", ["outcome"], registry=registry
        )
        for outcome in BRIDGED_OUTCOMES:
            self._bridged.labels(outcome)
        self._closed_connections = Counter(
            "gateway_connections_closed", "Callers' connections that the gateway closed.", ["reason"], registry=registry
        )
        for reason in CLOSE_REASONS:
            self._closed_connections.labels(reason)
        self._disconnects = Counter("gateway_client_disconnects", "Callers who left early.", registry=registry)
        self._tokens = self._counts(
            Counter("gateway_tokens", "Tokens, as the backends count them.", ["direction"], registry=registry)
        )
        self._tokens.add("input", by=0)
        self._tokens.add("output", by=0)
        self._key_requests = self._counts(
            Counter("gateway_key_requests", "Requests with a named key.", ["key", "outcome"], registry=registry)
        )
        self._key_tokens = self._counts(
            Counter("gateway_key_tokens", "Tokens that count for a named key.", ["key", "source"], registry=registry)
        )
        self._key_refused = self._counts(
            Counter("gateway_key_refused", "Requests that a limit refused.", ["key", "limit"], registry=registry)
        )
        self.loop_lag = Gauge(
            "gateway_event_loop_lag_seconds",
            "How late the event loop was, at worst, in the last 15 s.",
            registry=registry,
        )
        Gauge("gateway_build_info", "1, with the version.", ["version"], registry=registry).labels(__version__).set(1)

    def watch(
        self, generations: "Generations", admission: "Admission", byte_budget: "ByteBudget", connections: "Sized"
    ) -> None:
        """Read gauges from these parts whenever the metrics are asked for."""
        self._registry.register(_Configuration(generations))
        self._registry.register(_Parts(generations, admission, byte_budget, connections))
        self._registry.register(_Keys(generations))
        self.follow(generations.current)

    def follow(self, generation: "Generation") -> None:
        """Have the labels of this generation's replicas and keys, and no others: each stays for ever."""
        backends = {endpoint.name for endpoint in generation.pool.endpoints.values()}
        keys = {caller.name for caller in generation.keys.callers if caller.name is not None}
        targets = {target.labels for route in generation.pool.routes for target in route.targets if target.labels}
        self._backends = backends
        for counter in (self._allowed, self._refused, self._transitions):
            _forget_others(counter, backends)
        self._attempts.keep(backends)
        for counts in (self._key_requests, self._key_tokens, self._key_refused):
            counts.keep(keys)
        for held in (self._target_attempts, self._target_duration, self._target_first_token):
            held.keep(targets)
        for labels in targets:
            self._target_attempts.add(*labels, "ok", by=0)
        for name in backends:
            self._allowed.labels(name)
            self._refused.labels(name)
            for state in State:
                self._transitions.labels(name, state.value)

    def watch_limits(self, degraded: "Callable[[], bool]") -> None:
        """Tell whether the limits of keys can be kept beyond the process whenever the metrics are asked for."""
        Gauge(
            "gateway_limits_degraded",
            "1 while the limits of keys cannot be kept beyond this process.",
            registry=self._registry,
        ).set_function(lambda: float(degraded()))

    def watch_dropped(self, spans: "Callable[[], int]", outputs: "Sequence[Output]") -> None:
        """Read the numbers of lost spans and of lost lines whenever the metrics are asked for."""
        self._registry.register(_Dropped(spans, outputs))

    def watch_export(self, dropped: "Callable[[], int]") -> None:
        """Read the number of lost data points whenever the metrics are asked for."""
        self._registry.register(_DroppedPoints(dropped))

    def read(self) -> "list[Metric]":
        """Return all instruments as they are now; called on the event loop, as all that counts is."""
        for counts in self._counted:
            counts.pass_on()
        return list(self._registry.collect())

    def _counts(self, counter: Counter, *, known_by: "KnownBy" = FIRST) -> "_Counts":
        counts = _Counts(counter, known_by)
        self._counted.append(counts)
        return counts

    def count(self, record: "Record", *, kept: bool) -> None:
        """Count a request that has ended; `kept`: its trace is exported, and can be an exemplar."""
        route = (record.path or OTHER,)
        self._requests.add(*route, record.status, record.outcome)
        trace_id = record.trace_id if kept else None
        self._duration.observe(route, record.seconds(0.0), trace_id)
        if record.first_token is not None:
            self._first_token.observe(route, record.first_token - record.started, trace_id)
        self._count_attempts(record, trace_id)
        if record.input_tokens:
            self._tokens.add("input", by=record.input_tokens)
        if record.output_tokens:
            self._tokens.add("output", by=record.output_tokens)
        if record.queued:
            self._queue_wait.observe((), record.queued, trace_id)
        if record.shed is not None:
            self._shed.labels(record.shed).inc()
        if record.waits and record.is_bridged:
            self._bridged.labels(_BRIDGED.get(record.outcome, "failed")).inc()
        if record.outcome == "client_closed_request":
            self._disconnects.inc()
        if record.caller.name is not None:
            self._count_key(record, record.caller.name)

    def _count_attempts(self, record: "Record", trace_id: int | None) -> None:
        """Count the attempts of a request, by replica, and by target where a route has weights."""
        for attempt in record.attempts:
            outcome, target = attempt.outcome or "ok", attempt.target
            self._attempts.add(attempt.backend, outcome)
            if target is None:
                continue
            self._target_attempts.add(*target, outcome)
            if attempt.outcome == "ok" and attempt.ended is not None:
                self._target_duration.observe(target, attempt.ended - attempt.started, trace_id)
                if record.first_token is not None:
                    self._target_first_token.observe(target, record.first_token - attempt.started, trace_id)

    def _count_key(self, record: "Record", key: str) -> None:
        """Count a request with a named key."""
        self._key_requests.add(key, record.outcome)
        tokens, source = record.charged, record.charged_by
        if tokens is None:
            tokens, source = (record.input_tokens or 0) + (record.output_tokens or 0), "reported"
        if tokens:
            self._key_tokens.add(key, source, by=tokens)
        if record.limit is not None:
            self._key_refused.add(key, record.limit)

    def retry_allowed(self, backend: str) -> None:
        """Count a retry sent to this replica."""
        if backend in self._backends:
            self._allowed.labels(backend).inc()

    def retry_refused(self, backend: str) -> None:
        """Count a retry that the budget of this replica refused."""
        if backend in self._backends:
            self._refused.labels(backend).inc()

    def breaker_changed(self, backend: str, to: State) -> None:
        """Count a change of a breaker's state."""
        if backend in self._backends:
            self._transitions.labels(backend, to.value).inc()

    def connection_closed(self, reason: str) -> None:
        """Count a connection of a caller that the gateway closed."""
        self._closed_connections.labels(reason).inc()

    def totals(self) -> "Totals":
        """Return what was counted since the start: of requests, attempts, keys and tokens."""
        return Totals(
            requests=self._requests.totals(),
            attempts=self._attempts.totals(),
            tokens=self._tokens.totals(),
            key_requests=self._key_requests.totals(),
            key_tokens=self._key_tokens.totals(),
            key_refused=self._key_refused.totals(),
            durations=self._duration.by_route(),
            first_tokens=self._first_token.by_route(),
        )

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics in the form that `accept` asks for, up to `max_age` seconds old, and its content type."""
        # Not the header itself: an invalid version would fail, and any other would come back in the content type.
        newer = OPENMETRICS in accept
        now = self._clock()
        rendered, document, content_type = self._documents.get(newer, (-inf, b"", ""))
        if now - rendered >= self.max_age:
            encode, content_type = choose_encoder(OPENMETRICS if newer else "")
            self._pass_on()
            document = encode(self._registry)
            self._documents[newer] = now, document, content_type
        return document, content_type

    def _pass_on(self) -> None:
        for counts in self._counted:
            counts.pass_on()


@dataclass(frozen=True)
class Totals:
    """What was counted since the start.

    Attributes:
        requests: by route, status and outcome.
        attempts: by backend and outcome.
        tokens: by direction.
        key_requests, key_tokens, key_refused: by key and outcome, source, limit.
        durations, first_tokens: by route, how many were within each of the bounds `SECONDS`, and beyond them.
    """

    requests: dict[tuple[str, ...], int]
    attempts: dict[tuple[str, ...], int]
    tokens: dict[tuple[str, ...], int]
    key_requests: dict[tuple[str, ...], int]
    key_tokens: dict[tuple[str, ...], int]
    key_refused: dict[tuple[str, ...], int]
    durations: dict[str, list[int]]
    first_tokens: dict[str, list[int]]


class _Durations:
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


class _Counts:
    """A counter by its labels. What is counted waits here until somebody asks: prometheus-client locks at each call."""

    def __init__(self, counter: Counter, known_by: "KnownBy") -> None:
        self._counter = counter
        self._known_by = known_by
        self._waiting: dict[tuple[object, ...], int] = {}
        self._known: Container[object] = EVERY

    def add(self, *labels: object, by: int = 1) -> None:
        """Count."""
        self._waiting[labels] = self._waiting.get(labels, 0) + by

    def keep(self, known: "Container[object]") -> None:
        """Count only those who are known by one of these, and forget all others."""
        self._known = known
        self.pass_on()
        _forget_others(self._counter, known, self._known_by)

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


def _forget_others(counter: Counter, known: "Container[object]", known_by: "KnownBy" = FIRST) -> None:
    """Forget what a counter has of those who are known by none of these."""
    (family,) = counter.collect()
    labels = {tuple(sample.labels.values()) for sample in family.samples}
    for each in labels:
        if known_by(each) not in known:
            counter.remove(*each)


class _Configuration:
    """The generation in force, and how many could not follow."""

    def __init__(self, generations: "Generations") -> None:
        self._generations = generations

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        number = self._generations.current.number
        yield _gauge("gateway_config_generation", "The configuration in force, counted from the start.", number)
        errors = CounterMetricFamily("gateway_config_errors", "Configurations that were wrong.")
        errors.add_metric([], self._generations.errors)
        yield errors


class _Parts:
    """Gauges that the parts know."""

    def __init__(
        self, generations: "Generations", admission: "Admission", byte_budget: "ByteBudget", connections: "Sized"
    ) -> None:
        self._generations = generations
        self._admission = admission
        self._byte_budget = byte_budget
        self._connections = connections

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        breakers = GaugeMetricFamily("gateway_breaker_state", "0 closed, 1 half open, 2 open.", labels=["backend"])
        probes = GaugeMetricFamily("gateway_backend_probe_ok", "Whether the last probe was good.", labels=["backend"])
        cooling = GaugeMetricFamily(
            "gateway_backend_cooling", "1 while a replica has asked to be left alone.", labels=["backend"]
        )
        statuses = GaugeMetricFamily(
            "gateway_backend_status", "As in /health: 0 ok, 1 degraded, 2 down.", labels=["backend"]
        )
        flying = GaugeMetricFamily("gateway_backend_in_flight", "Attempts under way.", labels=["backend"])
        tripped: dict[tuple[str, str], bool] = {}
        for route in self._generations.current.pool.routes:
            for watch in route.watches:
                place = route.model, watch.backend  # which may be there twice, for two models
                tripped[place] = tripped.get(place, False) or watch.trip is not None
        guards = GaugeMetricFamily(
            "gateway_guard_tripped", "1 where a guard has taken a target's traffic.", labels=["route", "backend"]
        )
        for place, has_tripped in tripped.items():
            guards.add_metric(place, int(has_tripped))
        for replica in self._generations.current.pool.replicas:
            breakers.add_metric([replica.name], BREAKER_VALUES[replica.breaker.state])
            cooling.add_metric([replica.name], int(replica.cooldown.left is not None))
            flying.add_metric([replica.name], replica.in_flight)
            statuses.add_metric([replica.name], STATUS_VALUES[replica.status])
            if replica.probe is not None:
                probes.add_metric([replica.name], int(replica.probe.ok))
        yield breakers
        yield cooling
        yield probes
        yield statuses
        yield flying
        yield guards
        yield _gauge("gateway_open_connections", "Connections of callers.", len(self._connections))
        yield _gauge("gateway_in_flight_requests", "Requests with a slot.", self._admission.in_flight)
        yield _gauge("gateway_queued_requests", "Requests that wait for a slot.", self._admission.queued)
        yield _gauge("gateway_waiting_requests", "Requests that wait for a backend.", len(self._admission.waiting))
        yield _gauge("gateway_buffered_bytes", "Bytes of bodies and answers held.", self._byte_budget.held)


class _Keys:
    """The limits of keys, and what is used of them."""

    def __init__(self, generations: "Generations") -> None:
        self._generations = generations

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        limits = GaugeMetricFamily("gateway_key_limit", "What a key may use, by limit.", labels=["key", "limit"])
        used = GaugeMetricFamily("gateway_key_limit_used", "What of it is used now.", labels=["key", "limit"])
        for caller in self._generations.current.keys.callers:
            for name, most, now in caller.limits.state() if caller.limits is not None else ():
                limits.add_metric([str(caller.name), name], most)
                used.add_metric([str(caller.name), name], now)
        yield limits
        yield used


class _Dropped:
    """The lost spans and lines."""

    def __init__(self, spans: "Callable[[], int]", outputs: "Sequence[Output]") -> None:
        self._spans = spans
        self._outputs = outputs

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        spans = CounterMetricFamily("gateway_telemetry_dropped_spans", "Spans that could not be exported.")
        spans.add_metric([], self._spans())
        yield spans
        lines = CounterMetricFamily(
            "gateway_log_lines_dropped", "Lines of the logs that could not be written.", labels=["stream"]
        )
        for output in self._outputs:
            lines.add_metric([output.name], output.dropped)
        yield lines


class _DroppedPoints:
    """The lost data points of metrics."""

    def __init__(self, dropped: "Callable[[], int]") -> None:
        self._dropped = dropped

    def collect(self) -> "Iterator[Metric]":
        """Called for each exposition."""
        points = CounterMetricFamily(
            "gateway_telemetry_dropped_data_points", "Data points of metrics that could not be exported."
        )
        points.add_metric([], self._dropped())
        yield points


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text)
    family.add_metric([], value)
    return family
