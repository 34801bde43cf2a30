"""One replica of a backend: what is known about it, and the attempts under way at it."""

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gateway.errors import BackendError, ErrorAnswer, Rejected, Verdict
from gateway.policy.breaker import Breaker, State, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import ReplicaConfig
    from gateway.policy.retry_budget import RetryBudget


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
    """One url of a backend, with its breaker, its retry budget and its recent past.

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
        self, config: "ReplicaConfig", *, breaker: Breaker, budget: "RetryBudget", clock: "Callable[[], float]"
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
        """`ok`, `degraded` or `down`, as the contract defines them."""
        state = self.breaker.state
        if state is State.OPEN or (self.probe is not None and not self.probe.ok):
            return "down"
        if state is State.HALF_OPEN or self.last_failed:
            return "degraded"
        return "ok"

    def lease(self) -> "Lease | None":
        """Return a place for one attempt, or None when the breaker does not admit one."""
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
        """Whether it is the one attempt that a half-open breaker admits."""
        return self._ticket.trial

    def begin_answer(self) -> None:
        """Report the first content of an answer."""
        if self._ticket.trial:
            self.replica.breaker.record_first_content(self._ticket)

    def succeed(self) -> None:
        """Report a whole answer."""
        if self._end():
            self.replica.breaker.record_success(self._ticket)
            self._note_success()

    def fail(self, error: BackendError, trace_id: str) -> None:
        """Report a failure; the error says what it means to the breaker."""
        if not self._end():
            return
        replica = self.replica
        if error.verdict is Verdict.FAILURE:
            replica.breaker.record_failure(self._ticket, unreachable=error.unreachable)
        elif error.verdict is Verdict.SUCCESS:
            replica.breaker.record_success(self._ticket)
        else:
            replica.breaker.cancel(self._ticket)
        if isinstance(error, Rejected):  # the request was wrong, the backend is well
            self._note_success()
            return
        replica.last_failed = True
        code = error.outcome if isinstance(error, ErrorAnswer) and error.body is not None else error.code
        replica.last_error = LastError(code, error.message, replica.clock(), trace_id)

    def release(self) -> None:
        """Give the place back without a result."""
        if self._end():
            self.replica.breaker.cancel(self._ticket)

    def _end(self) -> bool:
        if self._over:
            return False
        self._over = True
        self.replica.in_flight -= 1
        return True

    def _note_success(self) -> None:
        self.replica.last_success = self.replica.clock()
        self.replica.last_failed = False
