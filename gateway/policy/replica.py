"""One replica of a backend: what is known about it, and the attempts under way at it."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway.errors import ErrorAnswer
from gateway.policy.breaker import Breaker, State
from gateway.policy.fingerprints import BadBodies
from gateway.policy.lease import Lease

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import ReplicaConfig
    from gateway.errors import BackendError
    from gateway.policy.cooldown import Cooldown
    from gateway.policy.outage import Outage
    from gateway.policy.retry_budget import RetryBudget

AVOIDED = 10.0
"""Seconds for which a replica that refused our key, or does not know the model, comes after all others."""
FAILURES_AVOIDED = 5
"""Failures in a row, whatever their kind, after which a replica comes after all others for `AVOIDED_LIVELY`."""
AVOIDED_LIVELY = 5.0
"""Seconds."""
MAX_MODELS = 1000


class LastError:
    """The latest failure of a replica: code (`status_429` for an error answer), message, when, and its trace."""

    __slots__ = ("at", "code", "message", "trace_id")

    def __init__(self, code: str, message: str, at: float, trace_id: str) -> None:
        self.code = code
        self.message = message
        self.at = at
        self.trace_id = trace_id


class Probe:
    """The latest probe of a replica: when, how long it took (seconds), and whether it was good."""

    __slots__ = ("at", "latency", "ok")

    def __init__(self, *, ok: bool, latency: float, at: float) -> None:
        self.ok = ok
        self.latency = latency
        self.at = at


class Replica:
    """One url of a backend, with its breaker, its cooldowns, its retry budget and its recent past.

    Attributes:
        name: as in `x-gateway-backend`.
        base: the url without a trailing `/v1`; the path of a call is appended to it.
        origin: scheme, host and port; the path of the probe is appended to it.
        shown_url: the configured url without user info.
        user_info: user and password from the url, or None.
        in_flight: attempts under way.
        last_success, last_error, probe: what happened last; instants are seconds of `clock`.
        last_failed: whether the latest attempt failed.
    """

    def __init__(
        self,
        config: "ReplicaConfig",
        *,
        breaker: Breaker,
        cooldown: "Cooldown",
        outage: "Outage",
        budget: "RetryBudget",
        clock: "Callable[[], float]",
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
        self.cooldown = cooldown
        self.outage = outage
        self.budget = budget
        self.bad_bodies = BadBodies(clock)
        self.clock = clock
        self.in_flight = 0
        self.last_success: float | None = None
        self.last_error: LastError | None = None
        self.last_failed = False
        self.probe: Probe | None = None
        self._failures = 0  # in a row
        self._avoided: dict[str | None, float] = {}  # until when, by model; None: every one

    @property
    def status(self) -> str:
        """`ok`, `degraded` or `down`, as the contract defines them."""
        state = self.breaker.state
        if state is State.OPEN or (self.probe is not None and not self.probe.ok):
            return "down"
        if state is State.HALF_OPEN or self.last_failed or self.cooldown.left is not None:
            return "degraded"
        return "ok"

    def admits(self, model: str) -> bool:
        """Return whether an attempt for the model may be made now: breaker and cooldown allow it."""
        return self.breaker.admits and self.cooldown.due(model) is None

    def is_avoided(self, model: str) -> bool:
        """Return whether it is asked for the model only where no other replica or target can answer."""
        if not self._avoided:
            return False
        now = self.clock()
        return any(self._avoided.get(key, now) > now for key in (model, None))

    def lease(self, model: str) -> Lease | None:
        """Return a place for one attempt, or None when breaker or cooldown do not admit one."""
        if not self.admits(model):
            return None
        ticket = self.breaker.admit()
        return Lease(self, model, ticket) if ticket is not None else None

    def lease_trial(self, model: str) -> Lease | None:
        """Return a place for the trial of an outage, which an open breaker admits too, one at a time."""
        if self.cooldown.due(model) is not None:
            return None
        ticket = self.breaker.admit_trial()
        return Lease(self, model, ticket) if ticket is not None else None

    def note_success(self, model: str) -> None:
        """Note an answer."""
        self.last_success = self.clock()
        self.last_failed = False
        self._failures = 0
        if self._avoided:
            self._avoided.pop(model, None)
            self._avoided.pop(None, None)

    def note_failure(self, error: "BackendError", model: str, trace_id: str) -> None:
        """Note a failure; what repeats by nature changes the order in which replicas are asked."""
        now = self.clock()
        self.last_failed = True
        code = error.outcome if isinstance(error, ErrorAnswer) and error.body is not None else error.code
        self.last_error = LastError(code, error.message, now, trace_id)
        self._failures += 1
        if error.avoided:
            self._avoid(model, now + AVOIDED)
        elif self._failures >= FAILURES_AVOIDED:
            self._avoid(None, now + AVOIDED_LIVELY)

    def _avoid(self, model: str | None, until: float) -> None:
        self._avoided[model] = until
        if len(self._avoided) > MAX_MODELS:
            del self._avoided[next(iter(self._avoided))]
