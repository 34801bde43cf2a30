"""An attempt under way at a replica, and what its end means to the replica."""

from typing import TYPE_CHECKING

from gateway.errors import (
    BackendError,
    ContextTooLong,
    CutOff,
    ErrorAnswer,
    NoSuchModel,
    NoSuchPath,
    NoSuchResponse,
    Rejected,
    Verdict,
)
from gateway.policy.breaker import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.policy.breaker import Ticket
    from gateway.policy.outage import Outage
    from gateway.policy.replica import Replica

PLAIN_FAULT = 500
"""The status that servers also answer to what is wrong with a prompt."""


def take(replica: "Replica", model: str, *, trial: bool = False) -> "Lease | None":
    """Return a place for one attempt at a replica; None when breaker, cooldown or `max_in_flight` do not admit it.

    `trial`: of an outage, which an open breaker admits too, one at a time.
    """
    if (replica.max_in_flight is not None and replica.full) or replica.cooldown.due(model) is not None:
        return None
    ticket = replica.breaker.admit_trial() if trial else replica.breaker.admit()
    return Lease(replica, model, ticket) if ticket is not None else None


class Lease:
    """An attempt under way at a replica. Ends exactly once: `succeed`, `fail` or `release`.

    Attributes:
        replica: where it is made.
        model: the one it asks for.
        passed_over: the other replicas of its backend that were looked at and could not, or should not, be asked in its
            place, each with the reason.
    """

    __slots__ = (
        "_asked_at",
        "_first_after_cooldown",
        "_outages",
        "_over",
        "_ticket",
        "model",
        "passed_over",
        "replica",
    )

    def __init__(self, replica: "Replica", model: str, ticket: "Ticket") -> None:
        self.replica = replica
        self.model = model
        self.passed_over: tuple[tuple[str, str], ...] = ()
        self._ticket = ticket
        self._over = False
        self._asked_at = replica.clock()
        self._outages = [(outage, outage.number) for outage in replica.outages]
        self._first_after_cooldown = replica.cooldown.take(model)
        replica.in_flight += 1

    @property
    def trial(self) -> bool:
        """Whether it is the one attempt that an unwell breaker admits."""
        return self._ticket.trial

    def begin_answer(self) -> None:
        """Report the first content of an answer."""
        if self._ticket.trial:
            self.replica.breaker.record_first_content(self._ticket)
        self._end_pauses()

    def succeed(self) -> None:
        """Report a whole answer."""
        if self._end():
            self.replica.breaker.record_success(self._ticket)
            self._end_pauses()
            self.replica.note_success(self.model)

    def fail(
        self,
        error: BackendError,
        trace_id: str,
        *,
        counted: bool,
        body: "Callable[[], bytes]",
        outages: "dict[Outage, int]",
    ) -> bool:
        """Report a failure; the error says what it means to the breaker. Return whether the breaker counted it.

        Args:
            error: the failure.
            trace_id: of its request.
            counted: whether a failure of the same request has counted for this breaker before.
            body: returns the fingerprint of what was sent.
            outages: those that the same request failed in, by number. One that others have ended since says that the
                request itself is what fails.
        """
        if error.ours:
            self.release()
            self._note(error, trace_id)
            return False
        if not self._end():
            return False
        replica = self.replica
        known = self._tell_outage(error, body, outages)
        counts = self._tell_breaker(error, counted=counted or known, known=known)
        if isinstance(error, CutOff) and replica.breaker.state is State.OPEN:
            error.outage = True
            for outage in replica.outages:
                outage.record_failure()
                outages[outage] = outage.number
        if error.cools:
            replica.cooldown.begin(self.model, error.retry_after, self._asked_at)
        elif error.verdict is Verdict.SUCCESS and not error.outage:
            self._end_pauses()
        elif self._first_after_cooldown:
            replica.cooldown.let_go(self.model)
        self._note(error, trace_id)
        return counts

    def release(self) -> None:
        """Give the place back without a result."""
        if not self._over and self._end():
            self.replica.breaker.cancel(self._ticket)
            if self._first_after_cooldown:
                self.replica.cooldown.let_go(self.model)

    def _note(self, error: BackendError, trace_id: str) -> None:
        replica = self.replica
        if isinstance(error, (Rejected, ContextTooLong, NoSuchResponse)):  # the request was wrong, the backend is well
            replica.note_success(self.model)
        elif isinstance(error, (NoSuchModel, NoSuchPath)):
            replica.note_answer()
        elif not error.ours:
            replica.note_failure(error, trace_id)
        if error.avoided:
            replica.avoid(self.model)

    def _tell_outage(self, error: BackendError, body: "Callable[[], bytes]", outages: "dict[Outage, int]") -> bool:
        """Tell whether the backend cannot be used; return whether the body is known to be answered with 500."""
        going_on = [each for each in self.replica.outages if outages.get(each, each.current) == each.current]
        if isinstance(error, ErrorAnswer) and error.status == PLAIN_FAULT:
            known = self.replica.bad_bodies.add(body())
            going_on = [outage for outage in going_on if outage.record_500(body())]
        else:
            known = False
            going_on = going_on if error.outage else []
            for outage in going_on:
                outage.record_failure()
        error.outage = bool(going_on)
        outages.update((outage, outage.number) for outage in going_on)
        return known

    def _tell_breaker(self, error: BackendError, *, counted: bool, known: bool) -> bool:
        breaker = self.replica.breaker
        if error.verdict is Verdict.SUCCESS:
            breaker.record_success(self._ticket)
        elif error.verdict is Verdict.FAILURE and (not counted or (self._ticket.trial and not known)):
            breaker.record_failure(self._ticket, unreachable=error.unreachable)
            return True
        else:
            breaker.cancel(self._ticket)
        return False

    def _end(self) -> bool:
        if self._over:
            return False
        self._over = True
        replica = self.replica
        replica.in_flight -= 1
        if replica.max_in_flight is not None:
            replica.freed()
        return True

    def _end_pauses(self) -> None:
        """End cooldown and outage: the backend answers."""
        replica = self.replica
        replica.cooldown.succeed(self.model, self._asked_at)
        for outage, number in self._outages:
            outage.record_success(number)
