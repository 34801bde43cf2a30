"""What a worker answers to its parent, and takes from it."""

from typing import TYPE_CHECKING, Any

from gateway.workers.metrics_of_all import as_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.parts import Parts


class Answers:
    """Gives the answers to each question, by its name.

    Args:
        parts: of the worker's application.
    """

    def __init__(self, parts: "Parts") -> None:
        self._parts = parts
        self._by_question: dict[str, Callable[[Any], Any]] = {
            "metrics": lambda _: as_json(parts.telemetry.metrics.read()),
            "health": lambda in_full: parts.health.document(in_full=in_full),
            "snapshot": lambda _: parts.live_page.snapshot.document(),
            "listed": parts.request_calls.listed,
            "found": parts.request_calls.found,
            "use": lambda _: self._use(),
            "shares": self.take_shares,
            "hint": lambda hint: self._take_hint(*hint),
        }

    async def to(self, what: str, data: Any) -> Any:  # noqa: ANN401 - JSON
        """Return the answer to a question. Raises: LookupError, for one that nobody knows."""
        return self._by_question[what](data)

    def begin(self, shares: list[int], generation: int) -> None:
        """Take this process's first shares, and the number of the configuration: what the others have in force."""
        self.take_shares(shares)
        self._parts.generations.count_from(generation)

    def take_shares(self, shares: list[int]) -> list[int]:
        """Take this process's shares of the limits that all share; return what it holds of them, which may be more."""
        in_flight, queued, held = shares
        self._parts.admission.resize(max_in_flight=in_flight, max_queue=queued, max_buffered=held)
        self._parts.byte_budget.resize(held)
        return list(map(max, shares, self._use()))

    def _use(self) -> list[int]:
        """Return what is used of them."""
        parts = self._parts
        return [parts.admission.in_flight, parts.admission.queued, parts.byte_budget.held]

    def _take_hint(self, kind: str, about: Any, *more: Any) -> None:  # noqa: ANN401 - JSON
        """Take in what another worker has found out about a replica, or a target of a route; or that it has begun."""
        if kind == "joined":
            self._parts.tell_trips()
            return
        if kind == "guard":
            for route in self._parts.pool.routes:
                if route.model == about and route.guard is not None:
                    route.guard.hint(*more)
            return
        for replica in self._parts.pool.replicas:
            if replica.id == about and kind == "breaker":
                replica.breaker.hint()
            elif replica.id == about:
                replica.cooldown.hint(*more)
