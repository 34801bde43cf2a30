"""Promises: each looks at what was measured and gives a verdict with its numbers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from chaos.counts import Books
from testkit.load import Call, summary
from testkit.quantiles import quantile

PROMISED = 0.1
"""Seconds after its deadline by which a call must have ended."""
SHOWN = 3
"""Examples in a verdict."""


@dataclass(frozen=True)
class Verdict:
    """A promise, what was measured, and whether it was kept."""

    promise: str
    measured: str
    kept: bool

    def __str__(self) -> str:
        return f"{'kept  ' if self.kept else 'BROKEN'}  {self.promise}: {self.measured}"


def in_time(calls: Sequence[Call]) -> Verdict:
    """Judge that no caller waits longer than its deadline and 100 ms."""
    over = max((call.over for call in calls), default=0.0)
    hung = sum(call.outcome == "hung" for call in calls)
    longest = max((call.seconds for call in calls), default=0.0)
    late = f"{max(0.0, over) * 1000:.0f} ms over the deadline at worst"
    if lag := max((call.lag for call in calls), default=0.0):
        late += f" (not counted: up to {lag * 1000:.0f} ms in which the machine let nobody run)"
    return Verdict(
        f"every call ends by its deadline + {PROMISED * 1000:.0f} ms",
        f"{len(calls)} calls, the longest {longest:.2f} s, {late}, {hung} hung",
        bool(calls) and over <= PROMISED and not hung,
    )


def well_formed(calls: Sequence[Call]) -> Verdict:
    """Judge that every call ends with a whole, right answer, an error document, or one error event."""
    flawed = [call for call in calls if call.flaw or call.outcome in {"broken", "reset", "hung"}]
    doubled = [call for call in calls if call.error_events > 1]
    examples = "".join(f"; {call.id} ({call.outcome}): {call.flaw}" for call in flawed[:SHOWN])
    return Verdict(
        "every call ends with its own whole answer, an error document, or one error event",
        f"{len(calls)} calls: {len(flawed)} ill-formed, {len(doubled)} with two error events{examples}",
        bool(calls) and not flawed and not doubled,
    )


def agree(books: Books) -> Verdict:
    """Judge that callers, gateway and journal count the same."""
    return Verdict(
        "callers, gateway and journal agree to the last call",
        "; ".join([str(books), *books.differences[:SHOWN]]),
        not books.differences,
    )


def nothing_held(leaks: Sequence[str]) -> Verdict:
    """Judge that everything was given back."""
    return Verdict(
        "open files, connections, slots, tasks and threads are back where they were",
        "; ".join(leaks) or "they are",
        not leaks,
    )


def at_most(promise: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Judge a number that must not be larger."""
    return Verdict(f"{promise} <= {limit:g}{unit}", f"{value:.4g}{unit}", value <= limit)


def at_least(promise: str, value: float, limit: float, unit: str = "") -> Verdict:
    """Judge a number that must not be smaller."""
    return Verdict(f"{promise} >= {limit:g}{unit}", f"{value:.4g}{unit}", value >= limit)


def quantile_at_most(promise: str, values: Sequence[float], share: float, limit: float, unit: str = "") -> Verdict:
    """Judge a quantile that must not be larger; broken when there was nothing to measure."""
    value = quantile(values, share)
    return Verdict(
        f"{promise} <= {limit:g}{unit}", f"{value:.4g}{unit} of {len(values)}", bool(values) and value <= limit
    )


def all_good(calls: Sequence[Call], what: str = "callers") -> Verdict:
    """Judge that nobody saw a failure."""
    bad = sum(call.outcome != "ok" for call in calls)
    return Verdict(f"no failure for {what}", f"{len(calls)} calls: {summary(calls)}", bool(calls) and not bad)


def fails_as(calls: Sequence[Call], allowed: Collection[tuple[int, str]]) -> Verdict:
    """Judge that some calls fail, so that the fault was felt, and each of them with one of these (status, outcome)."""
    seen = {(call.status, call.outcome) for call in calls if call.outcome != "ok"}
    kinds = ", ".join(f"{status} {outcome}" for status, outcome in sorted(allowed))
    return Verdict(f"calls fail, and only with {kinds}", f"{summary(calls)}", bool(seen) and seen <= set(allowed))


def attempts_at_most(promise: str, calls: Sequence[Call], limit: float) -> Verdict:
    """Judge the attempts per request; broken when nothing was sent."""
    value = attempts_per_request(calls)
    return Verdict(f"{promise} <= {limit:g}", f"{value:.4g} of {len(calls)} calls", bool(calls) and value <= limit)


def attempts_per_request(calls: Sequence[Call]) -> float:
    """Return the attempts that the gateway made, per call."""
    return sum(len(call.tries) for call in calls) / len(calls) if calls else 0.0


def share_good(calls: Sequence[Call]) -> float:
    """Return the part of the calls that was answered."""
    return sum(call.outcome == "ok" for call in calls) / len(calls) if calls else 0.0
