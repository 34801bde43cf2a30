"""What the parts of the gateway tell of themselves whenever the metrics are asked for."""

from typing import TYPE_CHECKING

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gateway.policy.breaker import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence, Sized

    from prometheus_client.metrics_core import Metric

    from gateway.generation import Generations
    from gateway.policy.admission import Admission
    from gateway.policy.byte_budget import ByteBudget
    from gateway.telemetry.output import Output

STATUS_VALUES = {"ok": 0, "degraded": 1, "down": 2}
BREAKER_VALUES = {State.CLOSED: 0, State.HALF_OPEN: 1, State.OPEN: 2}


class Configuration:
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


class Parts:
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


class Keys:
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


class Dropped:
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


class DroppedPoints:
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
