"""The numbers at `/metrics`: which there are, what counts for them, and the document. Read when they are asked for."""

from dataclasses import dataclass
from math import inf
from operator import itemgetter
from time import monotonic
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.exposition import choose_encoder

from gateway import __version__
from gateway.policy.breaker import State
from gateway.telemetry.counts import EVERY, FIRST, Counts, Durations, forget_others
from gateway.telemetry.gauges import Configuration, Dropped, DroppedPoints, Keys, Parts

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Sequence, Sized

    from prometheus_client.metrics_core import Metric

    from gateway.generation import Generation, Generations
    from gateway.policy.admission import Admission
    from gateway.policy.byte_budget import ByteBudget
    from gateway.record import Record
    from gateway.telemetry.counts import KnownBy
    from gateway.telemetry.output import Output

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
OTHER = "other"
"""The `route` of a call to an unknown path."""


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
        self._counted: list[Counts] = []
        self._backends: Container[str] = EVERY
        self._registry = registry = CollectorRegistry()
        self._requests = self._counts(
            Counter("gateway_requests", "Requests answered.", ["route", "status", "outcome"], registry=registry)
        )
        self._duration = Durations(
            "gateway_request_duration_seconds", "From a request's headers to the end of its answer.", registry
        )
        self._first_token = Durations(
            "gateway_time_to_first_token_seconds",
            "From a streamed request's headers to its first content event.",
            registry,
        )
        self._queue_wait = Durations(
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
        self._target_duration = Durations(
            "gateway_target_duration_seconds", "Good attempts at it, to the end of the answer.", registry, labels=TARGET
        )
        self._target_first_token = Durations(
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
        self._registry.register(Configuration(generations))
        self._registry.register(Parts(generations, admission, byte_budget, connections))
        self._registry.register(Keys(generations))
        self.follow(generations.current)

    def follow(self, generation: "Generation") -> None:
        """Have the labels of this generation's replicas and keys, and no others: each stays for ever."""
        backends = {endpoint.name for endpoint in generation.pool.endpoints.values()}
        keys = {caller.name for caller in generation.keys.callers if caller.name is not None}
        targets = {target.labels for route in generation.pool.routes for target in route.targets if target.labels}
        self._backends = backends
        for counter in (self._allowed, self._refused, self._transitions):
            forget_others(counter, backends)
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
        self._registry.register(Dropped(spans, outputs))

    def watch_export(self, dropped: "Callable[[], int]") -> None:
        """Read the number of lost data points whenever the metrics are asked for."""
        self._registry.register(DroppedPoints(dropped))

    def read(self) -> "list[Metric]":
        """Return all instruments as they are now; called on the event loop, as all that counts is."""
        for counts in self._counted:
            counts.pass_on()
        return list(self._registry.collect())

    def _counts(self, counter: Counter, *, known_by: "KnownBy" = FIRST) -> "Counts":
        counts = Counts(counter, known_by)
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
