"""What a game day measures: numbers over a span of an experiment, by the names that definitions use."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from chaos.promises import quantile

if TYPE_CHECKING:
    from collections.abc import Callable

    from chaos.load import Call


@dataclass(frozen=True)
class Sample:
    """One look at the gateway: seconds since the load began, state of each breaker, attempts and requests so far."""

    at: float
    breakers: dict[str, str]
    attempts: int
    requests: int


@dataclass
class Findings:
    """What an experiment left behind; `began` is the instant of the load's first call."""

    began: float
    calls: "list[Call]" = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)

    def sent(self, since: float, until: float) -> "list[Call]":
        """The calls sent in that span (seconds since the load began)."""
        return [call for call in self.calls if since <= call.started - self.began < until]


def _good(calls: "list[Call]") -> float | None:
    return sum(call.outcome == "ok" for call in calls) / len(calls) if calls else None


def _recovery(findings: Findings, since: float, until: float) -> float | None:
    """Seconds from `since` to the end of the first good answer to a call sent after it."""
    ends = [call.ended - findings.began for call in findings.sent(since, until) if call.outcome == "ok"]
    return min(ends) - since if ends else None


def _attempts_per_request(findings: Findings, since: float, until: float) -> float | None:
    """From the gateway's own counters, between the looks that are nearest to the span's ends."""
    span = [sample for sample in findings.samples if since <= sample.at < until]
    if len(span) < 2 or span[-1].requests == span[0].requests:
        return None
    return (span[-1].attempts - span[0].attempts) / (span[-1].requests - span[0].requests)


def _over(calls: "list[Call]") -> float | None:
    return max((call.over for call in calls), default=None)


def _p99(calls: "list[Call]") -> float | None:
    return quantile([call.seconds for call in calls], 0.99) if calls else None


MEASURES: "dict[str, Callable[[Findings, float, float], float | None]]" = {
    "share_good": lambda f, since, until: _good(f.sent(since, until)),
    "failures": lambda f, since, until: sum(call.outcome != "ok" for call in f.sent(since, until)),
    "ill_formed": lambda f, since, until: sum(call.flaw is not None for call in f.sent(since, until)),
    "hung": lambda f, since, until: sum(call.outcome == "hung" for call in f.sent(since, until)),
    "error_events": lambda f, since, until: max((call.error_events for call in f.sent(since, until)), default=0),
    "seconds_over_deadline": lambda f, since, until: _over(f.sent(since, until)),
    "p99_seconds": lambda f, since, until: _p99(f.sent(since, until)),
    "recovery_seconds": _recovery,
    "attempts_per_request": _attempts_per_request,
}
"""Each takes the findings and a span (seconds since the load began); None: it could not be measured."""
