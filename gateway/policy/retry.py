"""What follows a failed attempt within a target: which replica is asked next, after which backoff, or why none is."""

from typing import TYPE_CHECKING

from tenacity import wait_exponential

from gateway.policy.outage import TRIALS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from tenacity import RetryCallState

    from gateway.errors import BackendError
    from gateway.policy.deadline import Deadline
    from gateway.policy.lease import Lease
    from gateway.policy.pool import Target
    from gateway.policy.replica import Replica
    from gateway.settings import Settings


class RetryPolicy:
    """The numbers of the policy: attempts per target, and backoffs."""

    def __init__(self, settings: "Settings", rng: "Random") -> None:
        self.max_attempts = settings.gateway_max_attempts
        self.queue_timeout = settings.gateway_queue_timeout
        self.retry_after_max = settings.gateway_retry_after_max
        self._longest = wait_exponential(multiplier=settings.gateway_backoff_initial, max=settings.gateway_backoff_max)
        self._rng = rng

    def backoff(self, state: "RetryCallState") -> float:
        """Draw a backoff in seconds with full jitter: uniform between 0 and the exponential step.

        Source: "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
        """
        return self._longest(state) * self._rng.random()


class Retry:
    """The decisions after failures of one request within one target. Made when its first attempt has failed.

    For each further attempt: `backoff` decides, the caller sleeps, `lease` takes the place.

    Args:
        policy: the numbers.
        target: where the attempts are made.
        model: what it is asked for.
        deadline: of the request.
        given_up: the replicas that are not asked again for this request; shared with its other targets.
        is_repeat: whether the same request failed before: each replica is then asked once, without backoff.
        made: attempts of the request at the target before the one that failed first here.

    Attributes:
        stopped: why no further attempt follows, or None.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        target: "Target",
        model: str,
        deadline: "Deadline",
        *,
        given_up: "set[Replica]",
        is_repeat: bool = False,
        made: int = 0,
    ) -> None:
        self._policy = policy
        self._target = target
        self._model = model
        self._deadline = deadline
        self._given_up = given_up
        self._is_repeat = is_repeat
        self._made = made
        self._tried: list[Replica] = []  # those that failed, in order
        self._was_trial = False  # whether the latest attempt was the trial of a breaker
        self._next: Replica | None = None
        self._free = False  # whether the next attempt costs nothing of the budget
        self._due = 0.0  # when the next attempt is due
        self._refused: Replica | None = None
        self.stopped: str | None = None

    @property
    def refused_by(self) -> "Replica":
        """The replica whose budget refused the attempt that would have followed."""
        return self._refused or self._tried[-1]

    def count(self, replica: "Replica", failure: "BackendError", *, trial: bool) -> None:
        """Count a failed attempt; `trial`: it was the one that an unwell breaker admits."""
        self._tried.append(replica)
        self._was_trial = trial
        self._made -= failure.everywhere
        if not (failure.same_replica or failure.cools):
            self._given_up.add(replica)

    def backoff(self, failure: "BackendError", state: "RetryCallState") -> float:
        """Decide about the attempt after `failure`; return the seconds to wait before it.

        Raises:
            BackendError: `failure`, when no attempt follows; `stopped` says why.
        """
        self._next, self._free = None, False
        seconds = self._decide(failure, state)
        if self.stopped is None and seconds + self._target.connect_timeout > self._deadline.left_to_commit():
            self.stopped = "deadline"
        if self.stopped is not None:
            raise failure
        return seconds

    def lease(self, failure: "BackendError") -> "Lease":
        """Take the place for the next attempt from its replica's breaker and budget.

        Raises:
            BackendError: `failure`, when breaker or budget refuse at the last moment.
        """
        replica = self._next or self._pick(without=self._tried) or self._pick(without=self._tried[-1:]) or self._pick()
        lease = self._target.take(replica, self._model) if replica is not None else None
        if lease is None:
            self.stopped = self._why_nobody() or "breaker"
            raise failure
        if not self._free and not (self._left(lease.replica) and lease.replica.budget.take()):
            lease.release()
            self._refused = lease.replica
            self.stopped = "budget"
            raise failure
        return lease

    def is_over(self, _state: "RetryCallState") -> bool:
        """Return whether no further attempt follows: tenacity's `stop`."""
        return self.stopped is not None

    def _decide(self, failure: "BackendError", state: "RetryCallState") -> float:
        if (why := self._why_final(failure)) is not None:
            return self._stop(why)
        last = self._tried[-1]
        self._due = last.clock()
        once = self._is_repeat and not (failure.unreachable or failure.cools)
        if (failure.at_once_elsewhere or self._was_trial or once) and self._goes_elsewhere(failure):
            return 0.0
        if not failure.same_replica or once:
            self._refused = next((each for each in self._candidates() if each not in self._tried), None)
            if self._refused is not None:
                return self._stop("budget")
            return self._stop("cooldown" if failure.cools else "repeat" if once else "no other replica")
        seconds = self._policy.backoff(state)
        self._due += seconds
        why = self._why_nobody()
        return seconds if why is None else self._stop(why)

    def _why_final(self, failure: "BackendError") -> str | None:
        if not failure.retried:
            return "not retryable"
        if failure.everywhere:
            return None
        if self._made + len(self._tried) >= self._policy.max_attempts:
            return "attempts"
        return None if self._tried[-1].budget.allows_any else "budget"

    def _goes_elsewhere(self, failure: "BackendError") -> bool:
        """Choose another replica for an attempt at once, if there is one."""
        self._free = failure.free_elsewhere or self._was_trial
        self._next = self._pick(without=self._tried)
        if self._next is None and not (failure.same_replica or self._is_repeat):
            self._next = self._pick()
        if self._next is None:
            self._free = False
        return self._next is not None

    def _candidates(self) -> "list[Replica]":
        """Return the replicas that may be asked when the next attempt is due, whatever their budget."""
        return [
            replica
            for replica in self._target.replicas
            if replica not in self._given_up
            and (replica.cooldown.due(self._model) or 0.0) <= self._due
            and replica.breaker.admits
        ]

    def _pick(self, *, without: "Sequence[Replica]" = ()) -> "Replica | None":
        """Return one of the candidates that has a retry left, or needs none."""
        able = [replica for replica in self._candidates() if self._free or self._left(replica)]
        others = [replica for replica in self._target.replicas if replica in without or replica not in able]
        return self._target.pick(self._model, without=others)

    def _left(self, replica: "Replica") -> int:
        """Return the retries that may be sent to a replica now.

        While an outage is bridged, one that failed already keeps what the trials need: without them nobody would
        notice its end.
        """
        left = replica.budget.left()
        return max(0, left - TRIALS) if replica in self._tried and self._target.home.outage.is_bridged else left

    def _why_nobody(self) -> str | None:
        """Return why no replica could be asked when the next attempt is due, or None."""
        candidates = self._candidates()
        if not candidates:
            return "breaker"
        if any(self._left(replica) for replica in candidates):
            return None
        self._refused = candidates[0]
        return "budget"

    def _stop(self, why: str) -> float:
        self.stopped = why
        return 0.0
