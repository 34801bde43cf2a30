"""The waits of one request: for the end of an outage (bridging), or of a cooldown."""

import math
from typing import TYPE_CHECKING

from gateway.policy.lease import take
from gateway.policy.waiting_room import Chance
from gateway.record import BRIDGING, COOLDOWN, FULL, Wait

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.errors import BackendError
    from gateway.forwarding.call import Call
    from gateway.policy.backend import Backend
    from gateway.policy.lease import Lease
    from gateway.policy.pool import Target
    from gateway.policy.replica import Replica
    from gateway.policy.retry import RetryPolicy
    from gateway.policy.waiting_room import WaitingLimit

NO_OUTAGE = 1.0
"""Seconds; a request that waited for the end of an outage which has ended is released within them."""


class Place:
    """What a request can wait for: a target, and a lease there in the end.

    Attributes:
        kind: bridging, cooldown or full.
        target, model: where, and what is asked for.
        first: the instant at which it is due, as it looks now.
        began: when the wait began.
    """

    __slots__ = ("_waits", "began", "first", "kind", "model", "target")

    def __init__(self, waits: "Waits", kind: str, target: "Target", model: str, first: float) -> None:
        self._waits = waits
        self.kind = kind
        self.target = target
        self.model = model
        self.first = first
        self.began = 0.0

    def due(self) -> float:
        """Return the instant of the next trial."""
        if self.kind == BRIDGING:
            return self.target.home.outage.trial_due
        return self._waits.end_of_cooldown(self)

    def until(self) -> float:
        """Return the instant at which the wait ends in vain."""
        return self._waits.end_of(self)


class Waits:
    """The waits of one request, made when no target could answer it.

    Attributes:
        queued_in_vain: whether its backends stayed full for too long.
    """

    __slots__ = (
        "_again",
        "_bridged_until",
        "_call",
        "_clock",
        "_cooled",
        "_end",
        "_limit",
        "_policy",
        "_queued",
        "_since",
        "_trial",
        "queued_in_vain",
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
        self._since = call.record.started
        self._again = False
        self._queued = False
        self.queued_in_vain = False
        self._trial: tuple[Backend, float] | None = None

    async def next(self, failure: "BackendError | None") -> "tuple[Target, Lease] | None":
        """Wait for a place for another attempt.

        Args:
            failure: of the latest attempt; None when there was none.

        Returns:
            The target and the place, or None when there is nothing to wait for, or it took too long.

        Raises:
            GatewayDraining: the gateway is stopping.
        """
        if self._call.committed:
            return None
        if failure is not None and not self._may_wait_after(failure):
            return None
        while (place := self._place(failure)) is not None and self._limit.takes(self._call.share.held):
            chance = await self._wait(place)
            if chance is None:
                self.queued_in_vain = place.kind == FULL
                return self._last_chance(place) if place.kind == BRIDGING else None
            lease = self._lease(place, chance)
            if lease is not None:
                self._call.bridged += place.kind == BRIDGING
                return place.target, lease
            self._again = True
        return None

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

    def _place(self, failure: "BackendError | None") -> Place | None:
        """Return what is due first, or None."""
        now = self._clock()
        if now >= self._end:
            return None
        places = []
        for target in self._call.targets:
            model = target.model or self._call.model
            asked = [replica for replica in target.replicas if replica not in self._call.given_up]
            if not asked:
                continue
            outage = target.home.outage
            if failure is None and target.full and not self._queued:
                places.append(Place(self, FULL, target, model, now))
            if outage.is_bridged and now < self._bridged_until:
                places.append(Place(self, BRIDGING, target, model, outage.trial_due))
            due = target.free_at(model, now, without=self._left_out(target))
            may_be_now = not outage.is_bridged and (failure is None or (failure.cools and target is self._call.target))
            if due is not None and (due > now or may_be_now) and self._waits_until(due, target):
                places.append(Place(self, COOLDOWN, target, model, due))
        return min(places, key=lambda place: place.first, default=None)

    def _waits_until(self, due: float, target: "Target") -> bool:
        """Return whether the end of a cooldown is near enough, and an attempt is left for it."""
        return (
            due <= self._end
            and self._cooled + due - self._clock() <= self._policy.retry_after_max
            and self._call.attempts_at(target) < self._policy.max_attempts
        )

    def _left_out(self, target: "Target") -> "list[Replica]":
        """Return the replicas that are not asked: given up for this request, or without a retry left for it."""
        needs_budget = bool(self._call.record.attempts)
        return [
            replica
            for replica in target.replicas
            if replica in self._call.given_up or (needs_budget and not replica.budget.left())
        ]

    async def _wait(self, place: Place) -> Chance | None:
        home, call = place.target.home, self._call
        place.began = self._clock()
        wait = Wait(place.kind, place.target.backend, place.began)
        call.record.waits.append(wait)
        room = home.bridging
        if place.kind == BRIDGING:
            self._bridged_until = min(self._bridged_until, home.outage.ends_waiting)
        elif place.kind == FULL:
            self._queued = True
            room = home.full
        else:
            room = home.cooling(place.model)
        try:
            return await room.wait(call.share.held, self._since, place, tried=self._again)
        finally:
            wait.ended = self._clock()
            if place.kind == COOLDOWN:
                self._cooled += wait.ended - wait.began
                home.forget_cooling(place.model)

    def end_of(self, place: Place) -> float:
        """Return the instant at which the wait for a place ends in vain."""
        if place.kind == BRIDGING:
            return self._end_of_bridging(place.target.home)
        longest = self._policy.queue_timeout if place.kind == FULL else self._policy.retry_after_max - self._cooled
        return min(self._end, place.began + longest)

    def _end_of_bridging(self, home: "Backend") -> float:
        if home.outage.is_tried:  # a slow answer is no failure
            return self._end
        end = home.outage.ends_waiting
        return min(self._end, end if end > 0 else self._bridged_until + NO_OUTAGE)

    def end_of_cooldown(self, place: Place) -> float:
        """Return the instant at which a replica is free."""
        due = place.target.free_at(place.model, -math.inf, without=self._left_out(place.target))
        return due if due is not None else math.inf

    def _last_chance(self, place: Place) -> "tuple[Target, Lease] | None":
        """Return the place for the one attempt of a request that waited for the end of an outage without any."""
        if self._call.record.attempts:
            return None
        lease = self._lease(place, Chance.RELEASED)
        return (place.target, lease) if lease is not None else None

    def _lease(self, place: Place, chance: Chance) -> "Lease | None":
        """Take the place for an attempt; None: not now."""
        if place.kind == BRIDGING and chance is Chance.TRIAL:
            return self._lease_trial(place)
        is_retry = bool(self._call.record.attempts)
        of_budget = is_retry and (chance is Chance.TRIAL or place.kind == COOLDOWN)
        left_out = self._left_out(place.target) if of_budget else self._call.given_up
        replica = place.target.pick(place.model, without=left_out)
        lease = take(replica, place.model) if replica is not None else None
        if lease is None:
            return None
        if of_budget:
            lease.replica.budget.take()
        elif not is_retry:
            lease.replica.budget.count_first()
        return lease

    def _lease_trial(self, place: Place) -> "Lease | None":
        """Take the place for the trial of an outage; a further attempt of its request comes from the budget.

        Where none is left the trials go on: they are far fewer than what those who wait would send themselves.
        """
        home = place.target.home
        trial = home.outage.begin_trial()
        asked = [replica for replica in place.target.replicas if replica not in self._call.given_up]
        picked = place.target.pick(place.model, without=self._call.given_up)
        for replica in sorted(asked, key=lambda replica: (replica is not picked, replica.in_flight)):
            lease = take(replica, place.model, trial=True)
            if lease is not None:
                if self._call.record.attempts:
                    replica.budget.take()
                else:
                    replica.budget.count_first()
                self._trial = home, trial
                return lease
        home.outage.end_trial(trial)
        return None
