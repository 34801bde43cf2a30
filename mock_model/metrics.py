"""Prometheus metrics; every name begins with `mock_model_`."""

from time import monotonic

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mock_model.call import Call
from mock_model.load import Load

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
DURATIONS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96)


class Metrics:
    """All metrics, in a registry of their own: several mock models can live in one process."""

    def __init__(self, load: Load) -> None:
        self._registry = CollectorRegistry()
        self._calls = Counter("mock_model_calls", "Calls that ended.", ["route", "ended"], registry=self._registry)
        self._faults = Counter("mock_model_faults", "Faults begun.", ["kind"], registry=self._registry)
        self._events = Counter("mock_model_events_sent", "Server-sent events.", registry=self._registry)
        self._tokens = Counter(
            "mock_model_tokens", "Tokens of complete answers.", ["direction"], registry=self._registry
        )
        self._durations = Histogram(
            "mock_model_call_duration_seconds",
            "From the end of a request to the end of its answer.",
            ["route"],
            buckets=DURATIONS,
            registry=self._registry,
        )
        self._in_flight = Gauge("mock_model_in_flight_calls", "Calls that have not ended.", registry=self._registry)
        running = Gauge("mock_model_running_calls", "Calls being answered.", registry=self._registry)
        running.set_function(lambda: load.running)
        waiting = Gauge("mock_model_waiting_calls", "Calls that wait for a place.", registry=self._registry)
        waiting.set_function(lambda: load.waiting)
        self._input = self._tokens.labels("input")
        self._output = self._tokens.labels("output")
        self._ended: dict[tuple[str, str], Counter] = {}
        self._took: dict[str, Histogram] = {}
        self.in_flight = 0
        self._in_flight.set_function(lambda: self.in_flight)

    def arrive(self) -> None:
        """Count a call that has come."""
        self.in_flight += 1

    def begin_fault(self, kind: str) -> None:
        """Count a fault that begins: one that hangs may never end."""
        self._faults.labels(kind).inc()

    def end(self, call: Call, route: str) -> None:
        """Count a call that has ended."""
        self.in_flight -= 1
        entry = call.entry
        key = (route, entry.ended or "fault")
        if key not in self._ended:
            self._ended[key] = self._calls.labels(*key)
        if route not in self._took:
            self._took[route] = self._durations.labels(route)
        self._ended[key].inc()
        self._took[route].observe(monotonic() - call.start)
        if entry.events_sent:
            self._events.inc(entry.events_sent)
        if entry.ended == "complete":
            self._input.inc(call.answer.input_tokens)
            self._output.inc(call.answer.output_tokens)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text form."""
        return generate_latest(self._registry)
