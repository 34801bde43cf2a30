"""The waits of one request: for the end of an outage (bridging), or of a cooldown."""

import math
from operator import itemgetter
from typing import TYPE_CHECKING

from gateway.policy.waiting_room import Chance, Waiter
from gateway.record import BRIDGING, COOLDOWN, FULL, Wait
from gateway.stalls import stalled_since

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.errors import BackendError
    from gateway.forwarding.call import Call
    from gateway.policy.backend import Backend
    from gateway.policy.lease import Lease
    from gateway.policy.pool import Target
    from gateway.policy.replica import Replica
    from gateway.policy.retry import RetryPolicy
    from gateway.policy.waiting_room import WaitingLimit, WaitingRoom

NO_OUTAGE = 1.0
"""Seconds; a request that waited for the end of an outage which has ended is released within them."""


class Waits:
    """The waits of one request, made when no target could answer it; one at a time.

    Attributes:
        kind: what the latest one is for: bridging, cooldown or full.
        target, model: where, and what is asked for.
        led_to_attempt: whether one of them did.
        queued_in_vain: whether its backends stayed full for too long.
    """

    __slots__ = (
        "_again",
        "_bridged_until",
        "_call",
        "_clock",
        "_cooled",
        "_end",
        "_is_retry",
        "_limit",
        "_missed",
        "_over",
        "_policy",
        "_trial",
        "kind",
        "led_to_attempt",
        "model",
        "queued_in_vain",
        "target",
    )

    def __init__(
        self, call: "Call", *, policy: "RetryPolicy", limit: "WaitingLimit", clock: "Callable[[], float]"
    ) -> None:
        self._call = call
        self._policy = policy
        self._limit = limit
        self._clock = clock
        self._end = call.deadline.commit_by - min(target.connect_timeout for target in call.targets)
        self._bridged_until = math.inf
        self._cooled = 0.0
        self._again = False
        self._missed = False
        self._is_retry = False
        self._over = False
        self.kind = ""
        self.target = call.target
        self.model = call.model
        self.led_to_attempt = False
        self.queued_in_vain = False
        self._trial: tuple[Backend, float] | None = None

    def begin(self, failure: "BackendError | None") -> Waiter | None:
        """Begin to wait for a place for another attempt; `end` the wait when its chance has come, or in any other case.

        Args:
            failure: of the latest attempt; None when nobody was asked who could have answered.

        Returns:
            The wait, or None when there is nothing to wait for, or it took too long.

        Raises:
            GatewayDraining: the gateway is stopping.
        """
        if self._over or self._call.committed:
            return None
        if failure is not None and not self._missed and not self._may_wait_after(failure):
            return None
        self._is_retry = failure is not None
        places = self._places(failure)
        if not places or not self._limit.takes(self._call.share.held):
            return None
        _, self.kind, self.target, self.model = min(places, key=itemgetter(0))
        return self._wait()

    def end(self, waiter: Waiter) -> None:
        """End a wait, however it ended."""
        self._room().leave(waiter)
        wait = self._call.record.waits[-1]
        wait.ended = self._clock()
        if self.kind == COOLDOWN:
            self._cooled += wait.ended - wait.began
            self.target.home.forget_cooling(self.model)

    def take(self, chance: Chance | None) -> "Lease | None":
        """Take the place at `target` that a wait was for; None: it is gone, or the wait was in vain.

        Args:
            chance: what the wait ended with.

        Raises:
            GatewayDraining: the gateway is stopping.
        """
        self._limit.check_open()
        if chance is not None:
            lease = self._lease(chance)
            self._missed = lease is None
            self._again = self._again or self._missed
            self._call.bridged += self.kind == BRIDGING and not self._missed
        else:
            lease = self._last_chance() if self.kind == BRIDGING else None
            self._over = lease is None
            self.queued_in_vain = self.kind == FULL
        self.led_to_attempt = self.led_to_attempt or lease is not None
        return lease

    def _may_wait_after(self, failure: "BackendError") -> bool:
        """Return whether waiting may help: also where a retry could not be made since an outage had begun."""
        may_be_retried = failure.retried and failure.same_replica
        return failure.outage or failure.cools or (may_be_retried and self._call.target.home.outage.is_bridged)

    def end_trial(self) -> None:
        """Note that the attempt after a wait has ended."""
        self._again = True
        if self._trial is not None:
            home, trial = self._trial
            home.outage.end_trial(trial)
            self._trial = None

    def _places(self, failure: "BackendError | None") -> "list[tuple[float, str, Target, str]]":
        """Return what can be waited for, each as (when it is due as it looks now, kind, target, model)."""
        now = self._clock()
        places: list[tuple[float, str, Target, str]] = []
        if now >= self._end:
            return places
        for target in self._call.targets:
            model = target.model or self._call.model
            asked = [replica for replica in target.replicas if replica not in self._call.given_up]
            if not asked:
                continue
            outage = target.home.outage
            if failure is None and target.full:
                places.append((now, FULL, target, model))
            if outage.is_bridged and now < self._bridged_until:
                places.append((outage.trial_due, BRIDGING, target, model))
            due = target.free_at(model, now, without=self._left_out(target))
            may_be_now = not outage.is_bridged and (failure is None or (failure.cools and target is self._call.target))
            if due is not None and (due > now or may_be_now) and self._waits_until(due, target):
                places.append((due, COOLDOWN, target, model))
        return places

    def _waits_until(self, due: float, target: "Target") -> bool:
        """Return whether the end of a cooldown is near enough, and an attempt is left for it."""
        return (
            due <= self._end
            and self._cooled + due - self._clock() <= self._policy.retry_after_max
            and self._call.attempts_at(target) < self._policy.max_attempts
        )

    def _left_out(self, target: "Target") -> "list[Replica]":
        """Return the replicas that are not asked: given up for this request, or without a retry left for it."""
        return [
            replica
            for replica in target.replicas
            if replica in self._call.given_up or (self._is_retry and not replica.budget.left())
        ]

    def _wait(self) -> Waiter:
        call = self._call
        call.record.waits.append(Wait(self.kind, self.target.backend, self._clock()))
        if self.kind == BRIDGING:
            self._bridged_until = min(self._bridged_until, self.target.home.outage.ends_waiting)
        tried = self._again and self.kind != FULL  # who came too late for a place keeps the turn
        return self._room().enter(call.share.held, call.record.started, self, tried=tried)

    def _room(self) -> "WaitingRoom":
        """Return where those wait who wait for the same."""
        home = self.target.home
        if self.kind == BRIDGING:
            return home.bridging
        return home.full if self.kind == FULL else home.cooling(self.model)

    def due(self) -> float:
        """Return the instant of the next trial."""
        if self.kind == BRIDGING:
            return self.target.home.outage.trial_due
        due = self.target.free_at(self.model, -math.inf, without=self._left_out(self.target))
        return due if due is not None else math.inf

    def until(self) -> float:
        """Return the instant at which the wait ends in vain."""
        if self.kind == BRIDGING:
            return self._end_of_bridging(self.target.home)
        longest = self._policy.queue_timeout if self.kind == FULL else self._policy.retry_after_max - self._cooled
        waits = self._call.record.waits
        began = next((wait.began for wait in waits if wait.kind == FULL == self.kind), waits[-1].began)
        return min(self._end, began + longest + stalled_since(began))

    def _end_of_bridging(self, home: "Backend") -> float:
        if home.outage.is_tried:  # a slow answer is no failure
            return self._end
        end = home.outage.ends_waiting
        return min(self._end, end if end > 0 else self._bridged_until + NO_OUTAGE)

    def _last_chance(self) -> "Lease | None":
        """Return the place for the one attempt of a request that waited for the end of an outage without any."""
        return self._lease(Chance.RELEASED) if not self._is_retry else None

    def _lease(self, chance: Chance) -> "Lease | None":
        """Take the place for an attempt; None: not now."""
        if self.kind == BRIDGING and chance is Chance.TRIAL:
            return self._lease_trial()
        of_budget = self._is_retry and (chance is Chance.TRIAL or self.kind == COOLDOWN)
        left_out = self._left_out(self.target) if of_budget else self._call.given_up
        lease = self.target.lease(self.model, without=left_out)
        if lease is None:
            return None
        if of_budget:
            lease.replica.budget.take()
        elif not self._is_retry:
            lease.replica.budget.count_first()
        return lease

    def _lease_trial(self) -> "Lease | None":
        """Take the place for the trial of an outage; a further attempt of its request comes from the budget.

        Where none is left the trials go on: they are far fewer than what those who wait would send themselves.
        """
        home = self.target.home
        trial = home.outage.begin_trial()
        asked = [replica for replica in self.target.replicas if replica not in self._call.given_up]
        picked = self.target.pick(self.model, without=self._call.given_up)
        for replica in sorted(asked, key=lambda replica: (replica is not picked, replica.in_flight)):
            lease = self.target.take(replica, self.model, trial=True)
            if lease is not None:
                if self._is_retry:
                    replica.budget.take()
                else:
                    replica.budget.count_first()
                self._trial = home, trial
                return lease
        home.outage.end_trial(trial)
        return None
