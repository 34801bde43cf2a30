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

Key = tuple[str, str | None, str, str]
"""Operation, provider, route, outcome."""


class GenAiMetrics:
    """Counts requests that have ended, and gives what they have come to."""

    def __init__(self) -> None:
        self._counts: dict[Key, _Counts] = {}

    def count(self, record: "Record") -> None:
        """Count a request that has ended, if it is a prompt for which there is a route."""
        route, ended = record.route, record.ended
        if record.operation is None or route is None or ended is None:
            return
        key = (record.operation, record.provider, route, record.outcome)
        counts = self._counts.get(key)
        if counts is None:
            counts = self._counts[key] = _Counts()
        seconds = ended - record.started
        counts.duration[bisect_left(SECONDS, seconds)] += 1
        counts.duration_sum += seconds
        sent, got = record.input_tokens, record.output_tokens
        if sent is not None:
            counts.input[bisect_left(TOKENS, sent)] += 1
            counts.input_sum += sent
        if got is not None:
            counts.output[bisect_left(TOKENS, got)] += 1
            counts.output_sum += got
        if record.first_token is not None and record.outcome == "ok":
            seconds = record.first_token - record.started
            counts.first_token[bisect_left(FIRST_TOKEN, seconds)] += 1
            counts.first_token_sum += seconds
            if got is not None and got > 1:
                seconds = (ended - record.first_token) / (got - 1)
                counts.per_token[bisect_left(PER_TOKEN, seconds)] += 1
                counts.per_token_sum += seconds

    def read(self) -> "Iterator[Reading]":
        """Yield the histograms that have counted something."""
        duration = _Histogram("gen_ai.client.operation.duration", "s", "GenAI operation duration.", SECONDS)
        tokens = _Histogram("gen_ai.client.token.usage", "{token}", "Number of input and output tokens used.", TOKENS)
        first_token = _Histogram(
            "gen_ai.server.time_to_first_token",
            "s",
            "Time to generate first token for successful responses.",
            FIRST_TOKEN,
        )
        per_token = _Histogram(
            "gen_ai.server.time_per_output_token",
            "s",
            "Time per output token generated after the first token for successful responses.",
            PER_TOKEN,
        )
        for (operation, provider, route, outcome), counts in self._counts.items():
            common = _attributes(operation, provider, route)
            failed = (("error.type", outcome),) if outcome != "ok" else ()
            duration.add((*common, *failed), counts.duration, counts.duration_sum)
            tokens.add((*common, ("gen_ai.token.type", "input")), counts.input, counts.input_sum)
            tokens.add((*common, ("gen_ai.token.type", "output")), counts.output, counts.output_sum)
            first_token.add(common, counts.first_token, counts.first_token_sum)
            per_token.add(common, counts.per_token, counts.per_token_sum)
        for histogram in (duration, tokens, first_token, per_token):
            if histogram.points:
                yield histogram.read()


class _Counts:
    """What requests with one key have come to: values by bucket, and their sums."""

    __slots__ = (
        "duration",
        "duration_sum",
        "first_token",
        "first_token_sum",
        "input",
        "input_sum",
        "output",
        "output_sum",
        "per_token",
        "per_token_sum",
    )

    def __init__(self) -> None:
        self.duration = [0] * (len(SECONDS) + 1)
        self.input, self.output = [0] * (len(TOKENS) + 1), [0] * (len(TOKENS) + 1)
        self.first_token = [0] * (len(FIRST_TOKEN) + 1)
        self.per_token = [0] * (len(PER_TOKEN) + 1)
        self.duration_sum = self.first_token_sum = self.per_token_sum = 0.0
        self.input_sum = self.output_sum = 0


class _Histogram:
    """A histogram that is put together; what has the same attributes becomes one point."""

    def __init__(self, name: str, unit: str, text: str, bounds: tuple[float, ...]) -> None:
        self.points: dict[Attributes, Buckets] = {}
        self._name = name
        self._unit = unit
        self._text = text
        self._bounds = bounds

    def add(self, attributes: Attributes, counts: list[int], total: float) -> None:
        """Add what was counted, if anything was."""
        if any(counts):
            added = Buckets(tuple(counts), float(total))
            there = self.points.get(attributes)
            self.points[attributes] = added if there is None else there + added

    def read(self) -> Reading:
        """Return it."""
        return Reading(self._name, self._text, "histogram", self._unit, self.points, {}, self._bounds)


def _attributes(operation: str, provider: str | None, route: str) -> Attributes:
    named = (
        ("gen_ai.operation.name", operation),
        ("gen_ai.provider.name", provider),
        ("gen_ai.request.model", route if not route.endswith("*") else None),
        ("gateway.route", route),
    )
    return tuple((name, value) for name, value in named if value is not None)
