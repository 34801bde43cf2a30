"""What the live page shows of all workers."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from gateway.workers.health_of_all import health_of_all

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Document = dict[str, Any]
COUNTS = ("requests", "attempts", "tokens")
"""Counters by name."""
BUCKETS = ("latency", "first_token")
OF_CALLER = ("requests", "failed", "refused", "tokens")


class PageOfAll:
    """Adds up snapshots (`gateway/ui/snapshot.py`). What a worker has counted stays in the sums when it is gone."""

    def __init__(self) -> None:
        self._last: dict[int, Document] = {}
        self._gone: list[Document] = []

    def ended(self, worker: int) -> None:
        """Keep what a worker that has ended had counted."""
        last = self._last.pop(worker, None)
        if last is not None:
            self._gone = [_without_use(_sum([*self._gone, last]))]

    def snapshot(
        self, answers: "Mapping[int, Document]", missing: "Sequence[int]", used: "Mapping[tuple[str, str], int]"
    ) -> Document:
        """Return one snapshot of those of several workers, at least one.

        Args:
            answers: the snapshots by the workers' numbers.
            missing: the numbers of those that gave none; what they had counted before still counts.
            used: by all, of limits by key and limit, as their ledgers know it.
        """
        self._last |= answers
        documents = list(answers.values())
        whole = _sum([*self._last.values(), *self._gone])
        for caller in whole["callers"]:
            for limit in caller["limits"]:
                limit["used"] = max(limit["used"], used.get((caller["name"], limit["name"]), 0))
        return (
            documents[0]
            | whole
            | {
                "at": max(each["at"] for each in documents),
                "health": health_of_all([each["health"] for each in documents], missing),
                "waiting": sum(each["waiting"] for each in documents),
            }
        )


def _without_use(document: Document) -> Document:
    """Return what was counted, without what was used of limits, which is forgotten with time."""
    callers = [
        caller | {"limits": [limit | {"used": 0} for limit in caller["limits"]]} for caller in document["callers"]
    ]
    return document | {"callers": callers}


def _sum(documents: "Sequence[Document]") -> Document:
    """Return the sums of what is counted."""
    first = documents[0]
    whole: Document = {name: sum((Counter(each[name]) for each in documents), Counter()) for name in COUNTS}
    for name in BUCKETS:
        whole[name] = [sum(column) for column in zip(*(each[name] for each in documents), strict=True)]
    by_name: dict[str, list[Document]] = {}
    for document in documents:
        for caller in document["callers"]:
            by_name.setdefault(caller["name"], []).append(caller)
    shown = [caller["name"] for caller in first["callers"]]
    whole["callers"] = [_caller(by_name[name]) for name in shown]
    return whole


def _caller(same: "Sequence[Document]") -> Document:
    limits = [
        limit | {"used": sum(_used(each, place) for each in same)} for place, limit in enumerate(same[0]["limits"])
    ]
    return same[0] | {"limits": limits} | {name: sum(each[name] for each in same) for name in OF_CALLER}


def _used(caller: Document, place: int) -> int:
    return int(caller["limits"][place]["used"]) if place < len(caller["limits"]) else 0
