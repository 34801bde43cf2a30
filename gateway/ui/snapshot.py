"""What the live page shows of the gateway now: totals, of which the page makes rates, and the state of each backend."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from gateway.dialects.table import BY_PATH
from gateway.telemetry.counts import SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gateway.health import Health
    from gateway.policy.admission import Admission
    from gateway.policy.caller import Caller
    from gateway.telemetry.metrics import Metrics, Totals

MAX_CALLERS = 200
"""Callers that are shown: those with most requests."""
MAX_MODELS = 20
"""Names of models that are shown of a caller."""


class Snapshot:
    """Takes snapshots.

    Args:
        health: knows the backends.
        metrics: has counted requests, attempts and tokens.
        admission: knows what waits.
        callers: whom the keys belong to.
        wall_clock: seconds since the epoch.
    """

    def __init__(
        self,
        *,
        health: "Health",
        metrics: "Metrics",
        admission: "Admission",
        callers: "Callable[[], Sequence[Caller]]",
        wall_clock: "Callable[[], float]",
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._admission = admission
        self._callers = callers
        self._wall_clock = wall_clock

    def document(self) -> dict[str, Any]:
        """Return what is shown now: instants in seconds since the epoch, all counts since the start.

        Of requests only prompts and what is passed through are counted: not, for example, those for `/v1/models`, which
        the page itself asks for. `seconds` are the bounds of `latency` and `first_token`, which have one bucket more.
        """
        totals = self._metrics.totals()
        outcomes: Counter[str] = Counter()
        for (route, _, outcome), number in totals.requests.items():
            if route in BY_PATH:
                outcomes[outcome] += number
        attempts: Counter[str] = Counter()
        for (backend, _), number in totals.attempts.items():
            attempts[backend] += number
        callers, keys = self._callers(), _keys(totals)
        numbers = {caller: number for number, caller in enumerate(callers, 1)}
        shown = sorted(callers, key=lambda caller: -keys.get(caller.name or "", _NOTHING)["requests"])[:MAX_CALLERS]
        return {
            "at": round(self._wall_clock(), 3),
            "health": self._health.document(in_full=True),
            "waiting": len(self._admission.waiting),
            "requests": outcomes,
            "attempts": attempts,
            "tokens": {direction: number for (direction,), number in totals.tokens.items()},
            "seconds": SECONDS,
            "latency": _summed(totals.durations),
            "first_token": _summed(totals.first_tokens),
            "callers": [
                _caller(caller, keys.get(caller.name or "", _NOTHING), f"key {numbers[caller]}") for caller in shown
            ],
            "callers_in_all": len(callers),
        }


_NOTHING = {"requests": 0, "failed": 0, "refused": 0, "tokens": 0}


def _summed(by_route: "Mapping[str, Sequence[int]]") -> list[int]:
    """Return the buckets of all routes together that are forwarded."""
    routes = [buckets for route, buckets in by_route.items() if route in BY_PATH]
    return [sum(column) for column in zip(*routes, strict=True)] or [0] * (len(SECONDS) + 1)


def _keys(totals: "Totals") -> dict[str, dict[str, int]]:
    """Return what was counted by the names of keys."""
    keys: dict[str, dict[str, int]] = {}
    for (key, outcome), number in totals.key_requests.items():
        counts = keys.setdefault(key, dict(_NOTHING))
        counts["requests"] += number
        counts["failed"] += number if outcome != "ok" else 0
    for what, by_key in (("refused", totals.key_refused), ("tokens", totals.key_tokens)):
        for (key, _), number in by_key.items():
            keys.setdefault(key, dict(_NOTHING))[what] += number
    return keys


def _caller(caller: "Caller", counts: "Mapping[str, int]", number: str) -> dict[str, Any]:
    limits: Iterable[tuple[str, int, int]] = caller.limits.state() if caller.limits is not None else ()
    return {
        "name": caller.name or number,
        "named": caller.name is not None,
        "models": caller.models and list(caller.models[:MAX_MODELS]),
        "more_models": max(0, len(caller.models or ()) - MAX_MODELS),
        "limits": [{"name": name, "limit": limit, "used": used} for name, limit, used in limits],
        **counts,
    }
