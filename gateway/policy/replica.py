"""One replica of a backend: what is known about it, and the attempts under way at it."""

from collections import deque
from typing import TYPE_CHECKING
from weakref import WeakSet

from gateway.errors import ErrorAnswer
from gateway.policy.breaker import Breaker, State
from gateway.policy.fingerprints import BadBodies

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.errors import BackendError
    from gateway.policy.backend import Backend
    from gateway.policy.cooldown import Cooldown
    from gateway.policy.outage import Outage
    from gateway.policy.retry_budget import RetryBudget

AVOIDED = 10.0
"""Seconds for which a replica that refused our key, or does not know the model or the path, comes after all others."""
FAILURES_AVOIDED = 5
"""Failures beyond its successes, whatever their kind, after which a replica comes after all others."""
AVOIDED_AFTER_FAILURES = 5.0
"""Seconds for which it does."""
MAX_MODELS = 1000


SLOW_PROBE = 1.0
"""Seconds; a good probe that took longer says that the replica did not answer for a while, and does now."""
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
    """What is known about one url of a backend: its breaker, its cooldowns, its retry budget and its recent past.

    It outlives generations of the configuration; how it is asked is the `Endpoint` of each.

    Args:
        name: as the latest generation that has it calls it.
        breaker, cooldown, budget: its own.
        clock: seconds, monotonic.
        homes: of its outages and of those who wait for it: itself, and its backend where that has other replicas.
        id_: what it is known by in all generations.

    Attributes:
        name, homes, id: see there.
        max_in_flight: attempts at once, as the latest generation that has it says, or None for any number.
        in_flight: attempts under way.
        awaits_probe: it is new, and comes after all others until its first probe has ended.
        last_success, last_error, probe: what happened last (a probe by `note_probe`); instants are seconds of `clock`.
        last_failed: whether the latest attempt failed.
        models: what it listed when it was last asked; None: nothing so far.
    """

    def __init__(
        self,
        name: str,
        *,
        breaker: Breaker,
        cooldown: "Cooldown",
        budget: "RetryBudget",
        clock: "Callable[[], float]",
        homes: "tuple[Backend, ...]" = (),
        id_: str = "",
    ) -> None:
        self.id = id_
        self.name = name
        self.breaker = breaker
        self.cooldown = cooldown
        self.budget = budget
        self.homes: tuple[Backend, ...] = ()
        self._outages: tuple[Outage, ...] = ()
        self._former: WeakSet[Backend] | None = None
        self.settle_in(*homes)
        self.bad_bodies = BadBodies(clock)
        self.clock = clock
        self.max_in_flight: int | None = None
        self.in_flight = 0
        self.awaits_probe = False
        self.last_success: float | None = None
        self.last_error: LastError | None = None
        self.last_failed = False
        self.probe: Probe | None = None
        self.models: tuple[str, ...] | None = None
        self._failures = 0  # each success makes up for one
        self._avoided: dict[str | None, float] = {}  # until when, by model; None: every one
        self._lacking: dict[str, tuple[str | None, float]] = {}  # by path: for which model, None: any, and until when
        self._failed_probes: deque[float] = deque(maxlen=PROBES_TO_BE_DOWN)  # since the last good one: when

    def settle_in(self, *homes: "Backend") -> None:
        """Have these homes. The former ones hear of it as well, as long as requests under way are there."""
        former = WeakSet(home for home in (*self.homes, *(self._former or ())) if home not in homes)
        self._former = former if len(former) else None
        self.homes = homes
        self._outages = tuple(home.outage for home in homes)

    @property
    def outages(self) -> "tuple[Outage, ...]":
        """Those of its homes."""
        if self._former is None:
            return self._outages
        return (*self._outages, *(home.outage for home in self._former))

    @property
    def alone(self) -> "Backend":
        """Its backend as far as it is this replica, for requests that no other one can answer."""
        return self.homes[0]

    @property
    def backend(self) -> "Backend":
        """Its backend as a whole."""
        return self.homes[-1]

    def freed(self) -> None:
        """Let those look again who wait because as many attempts were under way as may be."""
        for home in (*self.homes, *(self._former or ())):
            home.full.wake()

    def cooldown_changed(self, model: str | None, over: bool) -> None:  # noqa: FBT001 - of Cooldown.changed
        """Tell those who wait that a cooldown has ended or changed; model None: of every model."""
        for home in (*self.homes, *(self._former or ())):
            home.cooldown_changed(model, over)

    @property
    def status(self) -> str:
        """`ok`, `degraded` or `down`, as the contract defines them."""
        state = self.breaker.state
        if state is State.OPEN or self._is_silent():
            return "down"
        if state is State.HALF_OPEN or self._failed_probes or self.last_failed or self.cooldown.left is not None:
            return "degraded"
        return "ok"

    @property
    def full(self) -> bool:
        """Whether as many attempts are under way as the replica may have at once."""
        return self.max_in_flight is not None and self.in_flight >= self.max_in_flight

    def admits(self, model: str) -> bool:
        """Return whether an attempt for the model may be made now: breaker, cooldown and `max_in_flight` allow it."""
        if self.max_in_flight is not None and self.full:
            return False
        return self.breaker.admits and self.cooldown.due(model) is None

    def why_not(self, model: str) -> str | None:
        """Return why others are asked for the model first: `breaker`, `cooldown`, `full` or `avoided`; or None."""
        if not self.breaker.admits:
            return "breaker"
        if self.cooldown.due(model) is not None:
            return "cooldown"
        return "full" if self.full else "avoided" if self.is_avoided(model) else None

    def note_probe(self, probe: Probe) -> None:
        """Take a probe's result into account."""
        self.probe = probe
        if probe.ok:
            self._failed_probes.clear()
        else:
            self._failed_probes.append(probe.at)
        if probe.latency >= SLOW_PROBE:
            self.breaker.record_probe(good=False)
        self.breaker.record_probe(good=probe.ok)

    def _is_silent(self) -> bool:
        """Return whether the probes say that it is down, and no attempt says otherwise: a busy server probes late."""
        if len(self._failed_probes) < PROBES_TO_BE_DOWN:
            return False
        return self.last_success is None or self.last_success < self._failed_probes[0]

    def is_avoided(self, model: str) -> bool:
        """Return whether it is asked for the model only where no other replica can answer."""
        if self.awaits_probe:
            return True
        if not self._avoided:
            return False
        now = self.clock()
        return any(self._avoided.get(key, now) > now for key in (model, None))

    def refuses(self, model: str) -> bool:
        """Return whether it refused our key or the model a short time ago: other targets are asked first, too."""
        return bool(self._avoided) and self._avoided.get(model, 0.0) > self.clock()

    def lacks(self, path: str, model: str) -> bool:
        """Return whether it did not have the path a short time ago, when it was asked for the model."""
        if not self._lacking or path not in self._lacking:
            return False
        lacking, until = self._lacking[path]
        return until > self.clock() and lacking in {model, None}

    def note_success(self, model: str) -> None:
        """Note a good answer, or one that says that the request was wrong."""
        self.last_success = self.clock()
        self.last_failed = False
        if self._failures:
            self._failures -= 1
        if self._avoided:
            self._avoided.pop(model, None)
            if not self._failures:
                self._avoided.pop(None, None)

    def note_answer(self) -> None:
        """Note that it is well, whatever it says."""
        self.last_success = self.clock()
        self.last_failed = False

    def note_failure(self, error: "BackendError", trace_id: str) -> None:
        """Note a failure; many in a row change the order in which replicas are asked."""
        now = self.clock()
        self.last_failed = True
        code = error.outcome if isinstance(error, ErrorAnswer) and error.body is not None else error.code
        self.last_error = LastError(code, error.message, now, trace_id)
        self._count_failure(now)

    def avoid(self, model: str) -> None:
        """Ask it for the model after all others for a while: its refusal repeats by nature."""
        now = self.clock()
        self._avoid(model, now + AVOIDED)
        self._count_failure(now)

    def _count_failure(self, now: float) -> None:
        self._failures = min(FAILURES_AVOIDED, self._failures + 1)
        if self._failures >= FAILURES_AVOIDED:
            self._avoid(None, now + AVOIDED_AFTER_FAILURES)

    def avoid_path(self, path: str, model: str) -> None:
        """Ask it by this path for the model after all others for a while, after a second model for any."""
        now = self.clock()
        other, until = self._lacking.get(path, (model, now))
        self._lacking[path] = (model if other == model or until <= now else None), now + AVOIDED

    def _avoid(self, model: str | None, until: float) -> None:
        self._avoided[model] = until
        if len(self._avoided) > MAX_MODELS:
            del self._avoided[next(iter(self._avoided))]
