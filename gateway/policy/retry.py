"""What follows a failed attempt: where the next one goes, after which sleep, or why there is none."""

from typing import TYPE_CHECKING

from tenacity import wait_random_exponential

from gateway.errors import BackendError, Overloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tenacity import RetryCallState

    from gateway.policy.deadline import Deadline
    from gateway.policy.pool import Lease, Replica, Target
    from gateway.settings import Settings


class RetryPolicy:
    """The numbers of the policy: attempts per target, sleeps, and what a further attempt needs of the deadline."""

    def __init__(self, settings: "Settings") -> None:
        self.max_attempts = settings.gateway_max_attempts
        self.retry_after_max = settings.gateway_retry_after_max
        self.connect_timeout = settings.gateway_connect_timeout
        self.backoff = wait_random_exponential(
            multiplier=settings.gateway_backoff_initial, max=settings.gateway_backoff_max
        )
        """Full jitter: uniform between 0 and the exponential step (AWS architecture blog, 2015)."""


class Retry:
    """The decisions within one target, for one request. `wait` and `stop` are tenacity's hooks, called in this order.

    Attributes:
        stopped: why no further attempt follows, or None.
        slept: the sleep before the next attempt, seconds.
        tried: the replicas that have failed; silent: those that must not be asked again.
        refused: the replica whose budget refused the next attempt, or None.
    """

    def __init__(self, policy: RetryPolicy, target: "Target", deadline: "Deadline") -> None:
        self._policy = policy
        self._target = target
        self._deadline = deadline
        self._next: Replica | None = None
        self._free = False
        self._at = 0.0  # when the next attempt is due
        self._asked_until: dict[Replica, float] = {}  # before these instants they asked not to be asked
        self.stopped: str | None = None
        self.slept = 0.0
        self.tried: list[Replica] = []
        self.refused: Replica | None = None
        self.silent: set[Replica] = set()

    def wait(self, state: "RetryCallState") -> float:
        """Seconds to sleep before the next attempt; sets `stopped` when there is none."""
        failure = state.outcome.exception() if state.outcome is not None else None
        if self.stopped is not None or not isinstance(failure, BackendError):
            return 0.0
        self._next, self._free = None, False
        self.slept = self._decide(failure, state)
        if self.stopped is None and self.slept + self._policy.connect_timeout > self._deadline.left_to_commit():
            self.stopped = "deadline"
        return self.slept

    def stop(self, _state: "RetryCallState") -> bool:
        """Whether `wait` found that no attempt follows."""
        return self.stopped is not None

    def lease(self, failure: BackendError) -> "Lease":
        """The place for the next attempt, taken from its replica's breaker and budget.

        Raises:
            BackendError: `failure`, when breaker or budget say no in the last moment.
        """
        replica = self._next or self._pick(without=self.tried) or self._pick(without=self.tried[-1:]) or self._pick()
        lease = replica.lease() if replica is not None else None
        if lease is None:
            self.stopped = self._nobody_may() or "breaker"
            raise failure
        if not self._free and not lease.replica.budget.take():
            lease.release()
            self.refused = lease.replica
            self.stopped = "budget"
            raise failure
        return lease

    def _decide(self, failure: BackendError, state: "RetryCallState") -> float:
        if (why := self._final(failure, state)) is not None:
            return self._stop(why)
        last = self.tried[-1]
        self._at = last.clock()
        hint = failure.retry_after if isinstance(failure, Overloaded) else None
        if hint is not None:
            self._asked_until[last] = self._at + hint
        if failure.at_once_elsewhere or hint is not None:
            self._free = failure.free_elsewhere
            self._next = self._pick(without=self.tried)
            if self._next is None and not failure.same_replica:
                self._next = self._pick()
            if self._next is not None:
                return 0.0
            self._free = False
        if not failure.same_replica:
            self.refused = next(iter(self._candidates()), None)
            return self._stop("budget" if self.refused is not None else "no other replica")
        if hint is not None and hint > self._policy.retry_after_max:
            return self._stop("retry-after")
        sleep = hint if hint is not None else self._policy.backoff(state)
        self._at += sleep
        why = self._nobody_may()
        return sleep if why is None else self._stop(why)

    def _final(self, failure: BackendError, state: "RetryCallState") -> str | None:
        if not failure.retried:
            return "not retryable"
        if state.attempt_number >= self._policy.max_attempts:
            return "attempts"
        return None if self.tried[-1].budget.allows_any else "budget"

    def _candidates(self) -> "list[Replica]":
        """Replicas that may be asked when the next attempt is due, whatever their budget."""
        return [
            replica
            for replica in self._target.replicas
            if replica not in self.silent
            and self._asked_until.get(replica, self._at) <= self._at
            and replica.breaker.admits
        ]

    def _pick(self, *, without: "Sequence[Replica]" = ()) -> "Replica | None":
        """One of the candidates that has a retry left, or need not have one."""
        able = [replica for replica in self._candidates() if self._free or replica.budget.left()]
        return self._target.pick(without=[r for r in self._target.replicas if r in without or r not in able])

    def _nobody_may(self) -> str | None:
        """Why there is nobody to ask after a sleep; looked at before it."""
        candidates = self._candidates()
        if not candidates:
            return "breaker"
        if any(replica.budget.left() for replica in candidates):
            return None
        self.refused = candidates[0]
        return "budget"

    def _stop(self, why: str) -> float:
        self.stopped = why
        return 0.0
