"""What a worker answers to its parent, and takes from it."""

from typing import TYPE_CHECKING, Any

from gateway.workers.metrics_of_all import as_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from gateway.parts import Parts
    from gateway.policy.replica import Replica


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
        self._by_hint: dict[str, Callable[..., None]] = {
            "joined": parts.tell_trips,
            "guard": self._take_trip,
            "breaker": self._take_opened,
            "cooldown": self._take_cooldown,
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

    def _take_hint(self, kind: str, *about: Any) -> None:  # noqa: ANN401 - JSON
        """Take in what another worker has found out, or that it has begun."""
        self._by_hint[kind](*about)

    def _take_trip(self, fingerprint: str, model: str, trip: tuple[str, float, int, float]) -> None:
        """Take in that a target of a route has lost its traffic; with another configuration that says nothing."""
        if fingerprint == self._parts.generations.current.fingerprint:
            for route in self._parts.pool.routes:
                if route.model == model and route.guard is not None:
                    route.guard.hint(*trip)

    def _replicas(self, id_: str) -> "Iterator[Replica]":
        return (replica for replica in self._parts.pool.replicas if replica.id == id_)

    def _take_opened(self, id_: str) -> None:
        for replica in self._replicas(id_):
            replica.breaker.hint()

    def _take_cooldown(self, id_: str, model: str, seconds: float) -> None:
        for replica in self._replicas(id_):
            replica.cooldown.hint(model, seconds)
