"""The four histograms that OpenTelemetry's conventions for GenAI name, for whoever takes metrics by OTLP.

Names, units and bounds: semantic conventions 1.41 (in development), the last release before those for GenAI moved to a
repository of their own. No attribute comes from a caller: the model is that of a route which names one, and
`gateway.route` the route's pattern.
"""

from bisect import bisect_left
from typing import TYPE_CHECKING

from gateway.telemetry.readings import Attributes, Buckets, Reading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.record import Record

SECONDS = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
TOKENS = tuple(float(4**power) for power in range(14))
FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
PER_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
"""Bounds of buckets, as the conventions advise."""

Key = tuple[str | None, ...]
"""Operation, provider, route, and the kind of error or token: what tells one series of an instrument from the other."""


class GenAiMetrics:
    """Counts requests that have ended, and gives what they have come to."""

    def __init__(self) -> None:
        self._duration = _Histogram(
            "gen_ai.client.operation.duration", "s", "GenAI operation duration.", SECONDS, "error.type"
        )
        self._tokens = _Histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used.",
            TOKENS,
            "gen_ai.token.type",
        )
        self._first_token = _Histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to generate first token for successful responses.",
            FIRST_TOKEN,
        )
        self._per_token = _Histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token generated after the first token for successful responses.",
            PER_TOKEN,
        )

    def count(self, record: "Record") -> None:
        """Count a request that has ended, if it is a prompt for which there is a route."""
        route, ended = record.route, record.ended
        if record.operation is None or route is None or ended is None:
            return
        operation, provider = record.operation, record.provider
        error = record.outcome if record.outcome != "ok" else None
        self._duration.observe((operation, provider, route, error), ended - record.started)
        if record.input_tokens is not None:
            self._tokens.observe((operation, provider, route, "input"), record.input_tokens)
        if record.output_tokens is not None:
            self._tokens.observe((operation, provider, route, "output"), record.output_tokens)
        if record.first_token is not None and error is None:
            self._first_token.observe((operation, provider, route), record.first_token - record.started)
            if record.output_tokens is not None and record.output_tokens > 1:
                seconds = (ended - record.first_token) / (record.output_tokens - 1)
                self._per_token.observe((operation, provider, route), seconds)

    def read(self) -> "Iterator[Reading]":
        """Yield the histograms that have counted something."""
        for histogram in (self._duration, self._tokens, self._first_token, self._per_token):
            if histogram.points:
                yield histogram.read()


class _Histogram:
    """A histogram by operation, provider, route and perhaps one thing more, named `further`."""

    def __init__(self, name: str, unit: str, text: str, bounds: tuple[float, ...], further: str | None = None) -> None:
        self.points: dict[Key, _Counts] = {}
        self._name = name
        self._unit = unit
        self._text = text
        self._bounds = bounds
        self._further = further

    def observe(self, key: Key, value: float) -> None:
        """Count a value."""
        point = self.points.get(key)
        if point is None:
            point = self.points[key] = _Counts(len(self._bounds) + 1)
        point.counts[bisect_left(self._bounds, value)] += 1
        point.sum += value

    def read(self) -> Reading:
        """Return what it has come to."""
        points = {self._attributes(key): Buckets(tuple(one.counts), one.sum) for key, one in self.points.items()}
        return Reading(self._name, self._text, "histogram", self._unit, points, {}, self._bounds)

    def _attributes(self, key: Key) -> Attributes:
        operation, provider, route, further = (*key, None)[:4]
        model = route if route is not None and not route.endswith("*") else None
        named = (
            ("gen_ai.operation.name", operation),
            ("gen_ai.provider.name", provider),
            ("gen_ai.request.model", model),
            ("gateway.route", route),
            (self._further or "", further),
        )
        return tuple((name, value) for name, value in named if value is not None)


class _Counts:
    """How many values fell into each bucket, and their sum."""

    __slots__ = ("counts", "sum")

    def __init__(self, size: int) -> None:
        self.counts = [0] * size
        self.sum = 0.0
