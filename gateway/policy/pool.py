"""The pool: backends, their replicas, and who is tried next."""

from random import random, sample
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway.errors import BackendError, ErrorAnswer, Rejected, Verdict
from gateway.policy.breaker import Breaker, State, Ticket
from gateway.policy.retry_budget import RetryBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from gateway.config import ReplicaConfig, RouteConfig, Routing
    from gateway.settings import Settings


class LastError:
    """The latest failure of a replica: code (`status_429` for an error answer), message, when, and its trace."""

    __slots__ = ("at", "code", "message", "trace_id")

    def __init__(self, code: str, message: str, at: float, trace_id: str) -> None:
        self.code = code
        self.message = message
        self.at = at
        self.trace_id = trace_id


class Probe:
    """The latest probe of a replica."""

    __slots__ = ("at", "latency", "ok")

    def __init__(self, *, ok: bool, latency: float, at: float) -> None:
        self.ok = ok
        self.latency = latency
        self.at = at


class Replica:
    """One url of a backend, with its breaker, its retry budget and what is known about it.

    Attributes:
        name: as in `x-gateway-backend`.
        base: the url without a trailing `/v1`; a call's path is added to it.
        origin: scheme, host and port; the probe's path is added to it.
        shown_url: the configured url without user info.
        in_flight: attempts under way.
        last_success, last_error, probe: what happened last; instants are seconds of the pool's clock.
        last_failed: whether the latest attempt failed.
    """

    def __init__(
        self, config: "ReplicaConfig", *, breaker: Breaker, budget: RetryBudget, clock: "Callable[[], float]"
    ) -> None:
        parts = urlsplit(config.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
        self.name = config.name
        self.api_key = config.api_key
        self.probe_path = config.probe
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.origin = f"{parts.scheme}://{host}{port}"
        self.base = self.origin + parts.path.rstrip("/").removesuffix("/v1")
        self.shown_url = self.origin + parts.path
        self.user_info = parts.netloc.rpartition("@")[0] or None
        self.breaker = breaker
        self.budget = budget
        self.clock = clock
        self.in_flight = 0
        self.last_success: float | None = None
        self.last_error: LastError | None = None
        self.last_failed = False
        self.probe: Probe | None = None

    @property
    def status(self) -> str:
        """`ok`, `degraded` or `down`, by the contract."""
        state = self.breaker.state
        if state is State.OPEN or (self.probe is not None and not self.probe.ok):
            return "down"
        if state is State.HALF_OPEN or self.last_failed:
            return "degraded"
        return "ok"

    def lease(self) -> "Lease | None":
        """A place for one attempt, or None when the breaker says no."""
        ticket = self.breaker.admit()
        return Lease(self, ticket) if ticket is not None else None


class Lease:
    """An attempt under way at a replica. Ends exactly once: `succeed`, `fail` or `release`."""

    __slots__ = ("_over", "_ticket", "replica")

    def __init__(self, replica: Replica, ticket: Ticket) -> None:
        self.replica = replica
        self._ticket = ticket
        self._over = False
        replica.in_flight += 1

    @property
    def trial(self) -> bool:
        """Whether it is the one attempt of a half-open breaker."""
        return self._ticket.trial

    def answered(self) -> None:
        """The first content of the answer is there."""
        if self._ticket.trial:
            self.replica.breaker.answered(self._ticket)

    def succeed(self) -> None:
        """A whole answer."""
        if self._end():
            self.replica.breaker.succeed(self._ticket)
            self._note_success()

    def fail(self, error: BackendError, trace_id: str) -> None:
        """The attempt failed; the error says what the breaker makes of it."""
        if not self._end():
            return
        replica = self.replica
        if error.verdict is Verdict.FAILURE:
            replica.breaker.fail(self._ticket, unreachable=error.unreachable)
        elif error.verdict is Verdict.SUCCESS:
            replica.breaker.succeed(self._ticket)
        else:
            replica.breaker.release(self._ticket)
        if isinstance(error, Rejected):  # the request was wrong, the backend is well
            self._note_success()
            return
        replica.last_failed = True
        code = error.outcome if isinstance(error, ErrorAnswer) and error.body is not None else error.code
        replica.last_error = LastError(code, error.message, replica.clock(), trace_id)

    def release(self) -> None:
        """Neither success nor failure."""
        if self._end():
            self.replica.breaker.release(self._ticket)

    def _end(self) -> bool:
        if self._over:
            return False
        self._over = True
        self.replica.in_flight -= 1
        return True

    def _note_success(self) -> None:
        self.replica.last_success = self.replica.clock()
        self.replica.last_failed = False


def _less_busy(first: Replica, second: Replica) -> Replica:
    if first.in_flight == second.in_flight:
        return first if random() < 0.5 else second  # noqa: PLR2004
    return first if first.in_flight < second.in_flight else second


class Target:
    """A backend's replicas and the model to ask them for; None keeps the caller's."""

    __slots__ = ("backend", "model", "replicas")

    def __init__(self, backend: str, model: str | None, replicas: "tuple[Replica, ...]") -> None:
        self.backend = backend
        self.model = model
        self.replicas = replicas

    def pick(self, *, without: "Collection[Replica]" = ()) -> Replica | None:
        """Of two random replicas that would be admitted the one with less in flight; None when there is none."""
        if len(self.replicas) > 2 and not without:  # noqa: PLR2004
            pair = sample(self.replicas, 2)  # mostly both are free, and the others need not be looked at
            if pair[0].breaker.admits and pair[1].breaker.admits:
                return _less_busy(*pair)
        free = [replica for replica in self.replicas if replica not in without and replica.breaker.admits]
        if len(free) > 2:  # noqa: PLR2004 - the power of two choices
            free = sample(free, 2)
        if len(free) == 2:  # noqa: PLR2004
            return _less_busy(*free)
        return free[0] if free else None

    def retry_in(self) -> float | None:
        """Seconds until a replica may be tried again; None when none is open."""
        waits = [wait for replica in self.replicas if (wait := replica.breaker.retry_in) is not None]
        return min(waits, default=None)


class Route:
    """A model name (or `*`) and its targets."""

    __slots__ = ("model", "targets")

    def __init__(self, model: str, targets: tuple[Target, ...]) -> None:
        self.model = model
        self.targets = targets


class Pool:
    """All replicas and routes."""

    def __init__(
        self,
        routing: "Routing",
        settings: "Settings",
        clock: "Callable[[], float]",
        breaker_changed: "Callable[[str, State, State], None]",
        draw: "Callable[[], float]" = random,
    ) -> None:
        self._default_model = settings.model_name

        def replica(config: "ReplicaConfig") -> Replica:
            breaker = Breaker(
                failures=settings.gateway_breaker_failures,
                open_seconds=settings.gateway_breaker_open_seconds,
                open_max=settings.gateway_breaker_open_max,
                clock=clock,
                draw=draw,
                changed=lambda old, new: breaker_changed(config.name, old, new),
            )
            budget = RetryBudget(ratio=settings.gateway_retry_budget, floor=settings.gateway_retry_floor, clock=clock)
            return Replica(config, breaker=breaker, budget=budget, clock=clock)

        backends = {backend.name: tuple(map(replica, backend.replicas)) for backend in routing.backends}

        def route(config: "RouteConfig") -> Route:
            return Route(config.model, tuple(Target(t.backend, t.model, backends[t.backend]) for t in config.targets))

        self.replicas = tuple(replica for replicas in backends.values() for replica in replicas)
        self.routes = tuple(map(route, routing.routes))

    def route(self, model: str) -> Route | None:
        """The first route that matches."""
        for route in self.routes:
            if route.model in (model, "*"):
                return route
        return None

    @property
    def models(self) -> list[str]:
        """The named routes in order, and `MODEL_NAME` where a route `*` exists; each once."""
        names = [self._default_model if route.model == "*" else route.model for route in self.routes]
        return list(dict.fromkeys(names))
