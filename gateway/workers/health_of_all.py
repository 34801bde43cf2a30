"""The documents of `/health` of all workers as that of one gateway."""

from operator import itemgetter
from typing import TYPE_CHECKING, Any

from gateway.health import downstream_status, whole_status

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

Document = dict[str, Any]
BACKEND, GUARD = itemgetter("name"), itemgetter("route", "backend", "model")
"""By what one is known."""
BREAKERS = ("closed", "half_open", "open")
"""The better ones first."""
STATUSES = ("off", "ok", "degraded", "down")
"""The same, for parts that have one."""


def health_of_all(documents: "Sequence[Document]", missing: "Sequence[int] | None") -> Document:
    """Return one document for several workers.

    A backend is `down` where it is so for all, and no better than `degraded` where it is not `ok` for one. Counts are
    sums; of instants and errors the latest counts.

    Args:
        documents: of the workers that answered, at least one.
        missing: the numbers of those that did not; None: nobody knows.
    """
    first = documents[0]
    backends = [_backend_of_all(same) for same in _alike(documents, "backends", BACKEND)]
    guards = [max(same, key=_guard_rank) for same in _alike(documents, "guards", GUARD)]
    downstream = downstream_status(backends, guards)
    telemetry = _worst(STATUSES, [each["telemetry"]["status"] for each in documents])
    limits = _worst(STATUSES, [each["limits"]["status"] for each in documents])
    degraded = (
        missing is None or bool(missing) or "degraded" in {telemetry, limits, *(each["status"] for each in documents)}
    )
    return first | {
        "status": whole_status(downstream, degraded=degraded),
        "uptime_seconds": max(each["uptime_seconds"] for each in documents),
        "draining": any(each["draining"] for each in documents),
        "in_flight": sum(each["in_flight"] for each in documents),
        "queued": sum(each["queued"] for each in documents),
        "config": _config_of_all([each["config"] for each in documents]),
        "downstream": {"status": downstream, "backends": backends, "guards": guards},
        "telemetry": {
            "status": telemetry,
            "spans_dropped": sum(each["telemetry"]["spans_dropped"] for each in documents),
        },
        "limits": {"status": limits},
        "workers": who_answered(documents, missing),
    }


def who_answered(answers: "Collection[Document]", missing: "Sequence[int] | None") -> Document:
    """Return how many workers have their part in a document, and who has not; None: nobody knows who else there is."""
    return {"answered": len(answers), "missing": missing}


def _alike(documents: "Sequence[Document]", part: str, key: "Callable[[Document], object]") -> list[list[Document]]:
    """Return what workers say of each backend, or guard: while they reload, not all of them have the same."""
    found: dict[object, list[Document]] = {}
    for document in documents:
        for each in document["downstream"][part]:
            found.setdefault(key(each), []).append(each)
    return list(found.values())


def _config_of_all(configs: "Sequence[Document]") -> Document:
    """Return the oldest generation in force, and an error if there is one."""
    error = next((each["error"] for each in configs if each["error"]), None)
    return min(configs, key=_generation) | {"error": error}


def _generation(config: Document) -> int:
    return int(config["generation"])


def _guard_rank(guard: Document) -> tuple[bool, int]:
    """Order what workers say of the same guard: the one that tripped counts, else the one that has seen most."""
    return bool(guard["tripped"]), int(guard["requests"])


def _backend_of_all(same: "Sequence[Document]") -> Document:
    statuses = [each["status"] for each in same]
    error = min((each for each in same if each["last_error"]), key=_error_age, default=same[0])["last_error"]
    probe = min(same, key=_probe_age)["probe"]
    return same[0] | {
        "status": statuses[0] if len(set(statuses)) == 1 else "degraded",
        "breaker": _worst(BREAKERS, [each["breaker"] for each in same]),
        "retry_in_seconds": _least(each["retry_in_seconds"] for each in same),
        "cooling_seconds": max((each["cooling_seconds"] for each in same if each["cooling_seconds"]), default=None),
        "in_flight": sum(each["in_flight"] for each in same),
        "consecutive_failures": max(each["consecutive_failures"] for each in same),
        "last_success_seconds_ago": _least(each["last_success_seconds_ago"] for each in same),
        "last_error": error,
        "probe": probe,
    }


def _worst(order: "Sequence[str]", values: "Sequence[str]") -> str:
    return max(values, key=order.index)


def _least(values: Any) -> float | None:  # noqa: ANN401 - numbers of JSON
    return min((value for value in values if value is not None), default=None)


def _error_age(document: Document) -> float:
    return float(document["last_error"]["seconds_ago"])


def _probe_age(document: Document) -> float:
    age = document["probe"]["seconds_ago"]
    return float("inf") if age is None else float(age)
