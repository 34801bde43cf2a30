"""Three counts that must agree: what callers saw, what the gateway counted, what the mock models' journals hold."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from testkit.exposition import Exposition, Labels
from testkit.load import Call

UNSURE = frozenset(
    """
    connection_error connect_timeout stale_connection answer_timeout first_token_timeout deadline_exceeded cancelled
    client_closed_request gateway_draining
    """.split()  # noqa: SIM905
)
"""Outcomes of attempts that may end before the backend has read the request; every other one is an answer of it."""
NEVER_TOOK = frozenset({"refused"})
"""Outcomes of calls no gateway took."""
LEFT = "client_closed_request"


def from_log(lines: Iterable[Mapping[str, Any]]) -> Exposition:
    """Return what the metrics of a gateway that has ended would say of the prompts in its log."""
    counted: Counter[tuple[str, Labels]] = Counter()
    for line in lines:
        counted["gateway_requests_total", (("outcome", line["outcome"]),)] += 1
        for one in line["attempts"]:
            labels = (("backend", one["backend"]), ("outcome", one["outcome"]))
            counted["gateway_attempts_total", labels] += 1
    return Exposition({key: float(number) for key, number in counted.items()})


@dataclass
class Books:
    """The three counts of a run, and where they differ.

    Attributes:
        requests: by outcome: as callers saw them, as the gateway counted them.
        attempts: by backend and outcome: as callers were told, as the gateway counted them.
        arrivals: prompts in the journals; never_arrived: attempts that did not reach a mock model.
        differences: lines; empty when everything agrees.
    """

    requests: tuple[Counter[str], Counter[str]]
    attempts: tuple[Counter[tuple[str, ...]], Counter[tuple[str, ...]]]
    arrivals: int
    never_arrived: int
    differences: list[str]

    def __str__(self) -> str:
        seen, counted = self.requests
        return (
            f"callers {seen.total()} = gateway {counted.total()} requests; gateway {self.attempts[1].total()} attempts"
            f" = journal {self.arrivals} + {self.never_arrived} that never arrived"
        )


def reconcile(
    calls: Sequence[Call], gateway: Iterable[Exposition], journals: Mapping[str, Iterable[Mapping[str, Any]]]
) -> Books:
    """Compare the counts, to the last one.

    Args:
        calls: all of them.
        gateway: the metrics of each gateway, which served nothing else since it started.
        journals: the arrivals at each replica, by the gateway's name for it.
    """
    gateway = list(gateway)
    differences: list[str] = []
    taken = [call for call in calls if call.outcome not in NEVER_TOOK]
    seen = Counter(_word(call) for call in taken)
    requests = sum((one.by("gateway_requests_total", "outcome") for one in gateway), Counter[str]())
    seen["gateway_draining"] += sum(call.drained for call in calls)
    _compare("requests", +seen, requests, differences)

    told: Counter[tuple[str, ...]] = Counter((one.backend, one.outcome) for call in taken for one in call.tries)
    by_backend = (one.by_labels("gateway_attempts_total", "backend", "outcome") for one in gateway)
    metered = sum(by_backend, Counter[tuple[str, ...]]())
    known = Counter(told)
    left = [call for call in taken if call.outcome == "left"]
    if left:  # they were not told: what the gateway counted beyond the others' is theirs
        for call in left:
            known.subtract(Counter((one.backend, one.outcome) for one in call.tries))
        theirs = metered - +known
        _compare("attempts of callers who stayed", +known, metered - theirs, differences)
        if any(outcome not in UNSURE | {"stale_connection"} for _, outcome in theirs):
            differences.append(f"attempts that no caller was told of: {dict(theirs)}")
    else:
        _compare("attempts", told, metered, differences)

    arrived = {name: Counter(str(entry["request_id"]) for entry in entries) for name, entries in journals.items()}
    ids = {call.id for call in calls}
    for name, numbers in arrived.items():
        differences += [f"{name} has a call of nobody: {one}" for one in list(numbers)[:5000] if one not in ids]
    for call in taken:
        if call.outcome != "left":
            differences += _compare_call(call, arrived)
    total = sum(numbers.total() for numbers in arrived.values())
    never = metered.total() - total
    unsure = sum(number for (_, outcome), number in metered.items() if outcome in UNSURE)
    if not 0 <= never <= unsure:
        differences.append(f"{metered.total()} attempts, {total} arrivals, but {unsure} that may not have arrived")
    return Books((+seen, requests), (told, metered), total, never, differences)


def _word(call: Call) -> str:
    return LEFT if call.outcome == "left" else call.outcome


def _compare(what: str, callers: Counter[Any], gateway: Counter[Any], differences: list[str]) -> None:
    differences += [
        f"{what} {key}: callers {callers[key]}, gateway {gateway[key]}"
        for key in sorted(callers.keys() | gateway.keys(), key=str)
        if callers[key] != gateway[key]
    ]


def _compare_call(call: Call, arrived: Mapping[str, Counter[str]]) -> list[str]:
    """Check that each attempt that was answered has arrived, and that no attempt has arrived twice."""
    differences = []
    for name, numbers in arrived.items():
        made = [one.outcome for one in call.tries if one.backend == name]
        sure = sum(outcome not in UNSURE for outcome in made)
        if not sure <= numbers[call.id] <= len(made):
            differences.append(f"{call.id}: {name} got {numbers[call.id]}, the caller was told of {made}")
    return differences
