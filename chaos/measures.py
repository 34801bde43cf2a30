"""What a game day measures: numbers over a span of an experiment, by the names that definitions use."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from testkit.load import Call
from testkit.quantiles import quantile


@dataclass(frozen=True)
class Sample:
    """One look at the gateway.

    Attributes:
        at: seconds since time zero.
        breakers: the state of each.
        attempts, requests: so far.
        retry_in: seconds until the last open breaker lets an attempt through; 0 when none is open.
        tripped: the backends of which `/health` says that a guard has taken their traffic, each with its url.
        tripped_metric: how many they are by the gateway's metric.
    """

    at: float
    breakers: dict[str, str]
    attempts: int
    requests: int
    retry_in: float = 0.0
    tripped: dict[str, str] = field(default_factory=dict)
    tripped_metric: int = 0


@dataclass
class Findings:
    """What an experiment left behind.

    Attributes:
        began: Time zero: the instant at which the steady state was there.
        calls: All of the load.
        samples: What was seen of the gateway.
        marks: What was done, and when, in seconds since time zero.
        revivals: When a backend that was started or thawed answered its own health probe, in seconds since time zero.
        arrivals: The request ids of the prompts that came to each backend by its own journal, by its url.
        stalled: Returns for how many seconds of a span (since time zero) the machine kept the stage from running.
    """

    began: float
    calls: list[Call] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)
    revivals: list[float] = field(default_factory=list)
    arrivals: dict[str, list[str]] = field(default_factory=dict)
    stalled: Callable[[float, float], float] = lambda _start, _end: 0.0

    def released(self, since: float, until: float) -> tuple[float, float] | None:
        """Return when the first and the last of those ended that `waiting` finds."""
        ends = [call.ended - self.began for call in self.waiting(since, until)]
        return (ends[0], ends[-1]) if ends else None

    def sent(self, since: float, until: float) -> list[Call]:
        """Return the calls sent in that span (seconds since time zero)."""
        return [call for call in self.calls if since <= call.started - self.began < until]

    def waiting(self, since: float, until: float) -> list[Call]:
        """Return the calls that waited for the first good answer that came after `since`, in the order of their ends.

        They were sent before it came (and before `until`) and ended with it or later: it is one of them itself.
        """
        sent = sorted(self.sent(-math.inf, until), key=lambda call: call.ended)
        ended = [call for call in sent if call.ended >= self.began + since]
        first = next((call.ended for call in ended if call.outcome == "ok"), None)
        return [] if first is None else [call for call in ended if call.ended >= first >= call.started]

    def revived(self, since: float, until: float) -> float:
        """Return when the first backend that was started in that span answered its own health probe.

        How long its start takes is the machine's affair, not the gateway's. Where none was started it is `since`.
        """
        return min((at for at in self.revivals if since <= at < until), default=since)


def _number(calls: list[Call], wanted: Callable[[Call], bool]) -> float | None:
    return sum(map(wanted, calls)) if calls else None


def _cut_short(call: Call) -> bool:
    """Tell whether an answer began and did not end as it should; a connection reset without one byte is no answer."""
    return call.status is not None and call.flaw is not None


def _unanswered(call: Call) -> bool:
    """Tell whether a call has failed before its answer began; of a stream that breaks off no other call can help."""
    return call.outcome != "ok" and not (call.status == 200 and call.first is not None)


def _failed_attempts(calls: list[Call]) -> float | None:
    return sum(one.outcome != "ok" for call in calls for one in call.tries) if calls else None


def _share_good(calls: list[Call]) -> float | None:
    return sum(call.outcome == "ok" for call in calls) / len(calls) if calls else None


def _over(calls: list[Call]) -> float | None:
    return max(0.0, *(call.over for call in calls)) if calls else None


def _p99(calls: list[Call]) -> float | None:
    return quantile([call.seconds for call in calls], 0.99) if calls else None


def _recovery(findings: Findings, since: float, until: float) -> float | None:
    """Return the seconds to the end of the first good answer to a call sent after `since`.

    They count from `since`, or from when a backend started after it answered its own health probe.
    """
    ends = [call.ended - findings.began for call in findings.sent(since, until) if call.outcome == "ok"]
    return max(0.0, min(ends) - findings.revived(since, until)) if ends else None


def _recovery_past_open(findings: Findings, since: float, until: float) -> float | None:
    """Return the same, but from the end of the breaker's open time, if one is running.

    It may also have been opened after `since`, by an attempt that was under way then: at most a deadline later.
    """
    recovery = _recovery(findings, since, until)
    if recovery is None:
        return None
    start = findings.revived(since, until)
    settled = start + max(call.deadline for call in findings.calls)
    ends = [one.at + one.retry_in for one in findings.samples if since <= one.at <= settled and one.retry_in]
    return max(0.0, recovery - max([0.0, *(end - start for end in ends)]))


def _release(findings: Findings, since: float, until: float) -> float | None:
    """Return the seconds from the first good answer after `since` until all calls that waited for it have ended.

    Those in which the machine stood still are not the gateway's.
    """
    span = findings.released(since, until)
    return span[1] - span[0] - findings.stalled(*span) if span is not None else None


def _attempts_per_request(findings: Findings, since: float, until: float) -> float | None:
    """Return it by the gateway's counters, from the last sample before `since`: the burst of a fault counts."""
    before = [sample for sample in findings.samples if sample.at <= since]
    span = [*before[-1:], *(sample for sample in findings.samples if since < sample.at < until)]
    if len(span) < 2 or span[-1].requests <= span[0].requests or span[-1].attempts < span[0].attempts:
        return None
    return (span[-1].attempts - span[0].attempts) / (span[-1].requests - span[0].requests)


def _guards_tripped(findings: Findings, since: float, until: float) -> float | None:
    """Return how many backends lost their traffic, as both `/health` and `/metrics` say."""
    seen = [sample for sample in findings.samples if since <= sample.at < until]
    return max((min(len(sample.tripped), sample.tripped_metric) for sample in seen), default=None)


def _arrivals_after_trip(findings: Findings, since: float, until: float) -> float | None:
    """Return how many prompts came to backends of which it had been seen that they had lost their traffic.

    Those of calls that were sent before it was seen do not count: they may have been under way to it.
    None where no backend has lost it, a journal is missing, or nothing was sent afterwards.
    """
    trips: dict[str, float] = {}
    for sample in findings.samples:
        for url in sample.tripped.values():
            trips.setdefault(url, sample.at)
    seen = {url: at for url, at in trips.items() if since <= at < until}
    if not seen or not seen.keys() <= findings.arrivals.keys():
        return None
    sent = {url: {call.id for call in findings.sent(at, until)} for url, at in seen.items()}
    if not any(sent.values()):
        return None
    return sum(one in ids for url, ids in sent.items() for one in findings.arrivals[url])


MEASURES: dict[str, Callable[[Findings, float, float], float | None]] = {
    "share_good": lambda f, since, until: _share_good(f.sent(since, until)),
    "failures": lambda f, since, until: _number(f.sent(since, until), lambda call: call.outcome != "ok"),
    "unanswered": lambda f, since, until: _number(f.sent(since, until), _unanswered),
    "failed_attempts": lambda f, since, until: _failed_attempts(f.sent(since, until)),
    "ill_formed": lambda f, since, until: _number(f.sent(since, until), lambda call: call.flaw is not None),
    "cut_short": lambda f, since, until: _number(f.sent(since, until), _cut_short),
    "hung": lambda f, since, until: _number(f.sent(since, until), lambda call: call.outcome == "hung"),
    "error_events": lambda f, since, until: max((call.error_events for call in f.sent(since, until)), default=None),
    "seconds_over_deadline": lambda f, since, until: _over(f.sent(since, until)),
    "p99_seconds": lambda f, since, until: _p99(f.sent(since, until)),
    "recovery_seconds": _recovery,
    "recovery_seconds_past_open": _recovery_past_open,
    "release_seconds": _release,
    "attempts_per_request": _attempts_per_request,
    "guards_tripped": _guards_tripped,
    "arrivals_after_trip": _arrivals_after_trip,
}
"""Each takes the findings and a span (seconds since time zero); None: there was nothing to measure."""

COUNTS = frozenset({"failures", "unanswered", "ill_formed", "cut_short", "hung"})


def measured(name: str, findings: Findings, since: float, until: float) -> tuple[float | None, str]:
    """Return the value, and the same as text."""
    value = MEASURES[name](findings, since, until)
    if value is None:
        return None, "not measured"
    text = f"{value:.3g} s" if "seconds" in name else f"{value:.4g}"
    calls = findings.sent(since, until)
    if name == "seconds_over_deadline":
        text += f" (the longest took {max(call.seconds for call in calls):.2f} s)"
    elif name == "release_seconds" and (span := findings.released(since, until)) is not None:
        text += f" for {len(findings.waiting(since, until))}"
        if stalled := findings.stalled(*span):
            text += f" (not counted: {stalled:.3g} s in which the machine stood still)"
    elif name == "failed_attempts":
        text += f" of {sum(len(call.tries) for call in calls)}, for {len(calls)} calls"
    elif name in COUNTS:
        text += f" of {len(calls)}"
    return value, text
