"""One replica of a backend: what is known about it, and the attempts under way at it."""

from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode, urlsplit

from gateway.errors import BackendError, ErrorAnswer, Rejected, Verdict
from gateway.policy.breaker import Breaker, State, Ticket

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import ReplicaConfig
    from gateway.policy.retry_budget import RetryBudget


PROBES_TO_BE_DOWN = 3
"""Failed probes in a row, without a successful attempt since the first of them, after which a replica is down."""


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
        config: what was configured for it.
        name: as in `x-gateway-backend`.
        timeouts: of its attempts.
        base: what the SDKs call `base_url`: the url, with `/v1` if it has no path of its own.
        query: begins with `?` and ends the url of every call; empty for none.
        origin: scheme, host and port; the path of the probe is appended to it.
        shown_url: the configured url without user info.
        user_info: user and password from the url, or None.
        in_flight: attempts under way.
        last_success, last_error, probe: what happened last (a probe by `note_probe`); instants are seconds of `clock`.
        last_failed: whether the latest attempt failed.
    """

    def __init__(
        self, config: "ReplicaConfig", *, breaker: Breaker, budget: "RetryBudget", clock: "Callable[[], float]"
    ) -> None:
        parts = urlsplit(config.url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname or ""
        port = f":{parts.port}" if parts.port else ""
        path = parts.path.rstrip("/")
        self.config = config
        self.name = config.name
        self.timeouts = config.timeouts
        self.host = parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        self.origin = f"{parts.scheme}://{host}{port}"
        self.base = self.origin + (path or "/v1")
        self.query = f"?{urlencode(config.query, quote_via=quote)}" if config.query else ""
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
        self._failed_probes: deque[float] = deque(maxlen=PROBES_TO_BE_DOWN)  # since the last good one: when
        self._max_in_flight = config.max_in_flight

    @property
    def status(self) -> str:
        """`ok`, `degraded` or `down`, as the contract defines them."""
        state = self.breaker.state
        if state is State.OPEN or self._is_silent():
            return "down"
        if state is State.HALF_OPEN or self._failed_probes or self.last_failed:
            return "degraded"
        return "ok"

    @property
    def full(self) -> bool:
        """Whether as many attempts are under way as the replica may have at once."""
        return self._max_in_flight is not None and self.in_flight >= self._max_in_flight

    @property
    def admits(self) -> bool:
        """Whether `lease` would give a place now."""
        return self.breaker.admits and (self._max_in_flight is None or not self.full)

    def url_of(self, path: str) -> str:
        """Return the url of a call, without the query: its path without `/v1` follows the base."""
        return self.base + path.removeprefix("/v1")

    def note_probe(self, probe: Probe) -> None:
        """Take a probe's result into account."""
        self.probe = probe
        if probe.ok:
            self._failed_probes.clear()
        else:
            self._failed_probes.append(probe.at)
        self.breaker.record_probe(good=probe.ok)

    def _is_silent(self) -> bool:
        """Return whether the probes say that it is down, and no attempt says otherwise: a busy server probes late."""
        if len(self._failed_probes) < PROBES_TO_BE_DOWN:
            return False
        return self.last_success is None or self.last_success < self._failed_probes[0]

    def lease(self) -> "Lease | None":
        """Return a place for one attempt, or None when it is full or the breaker does not admit one."""
        ticket = self.breaker.admit() if self._max_in_flight is None or not self.full else None
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
