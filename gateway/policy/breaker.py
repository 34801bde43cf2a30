"""The circuit breaker of one replica: closed, open, half open."""

from enum import StrEnum
from typing import TYPE_CHECKING

from msgspec import Struct

if TYPE_CHECKING:
    from collections.abc import Callable

SPREAD = 0.2
"""The open time is drawn within +- this share, so that many gateways do not come back in step."""


class State(StrEnum):
    """The state of a breaker."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Ticket(Struct, eq=False):
    """An attempt that the breaker admitted. Its result counts only in the generation that admitted it."""

    generation: int
    trial: bool
    early: bool = False


class Breaker:
    """Opens after consecutive failures. Open, it admits nothing; half open, one attempt at a time.

    It turns half open when its open time is over, or earlier at the next good probe if the replica was unreachable or
    has failed a probe since the breaker opened. Only a real answer closes it. A change of state begins a new
    generation; results of attempts admitted in an earlier one change nothing.

    Args:
        failures: consecutive failures that open it.
        open_seconds: the first open time, +- 20 %; doubled after each failed half-open attempt.
        open_max: the longest open time, seconds.
        clock: seconds, monotonic.
        draw: uniform in [0, 1).
        changed: called with (old, new) at each change of state.
    """

    def __init__(
        self,
        *,
        failures: int,
        open_seconds: float,
        open_max: float,
        clock: "Callable[[], float]",
        draw: "Callable[[], float]",
        changed: "Callable[[State, State], None]" = lambda _old, _new: None,
    ) -> None:
        self._limit = failures
        self._open_seconds = open_seconds
        self._open_max = open_max
        self._clock = clock
        self._draw = draw
        self._changed = changed
        self._state = State.CLOSED
        self._generation = 0
        self._until = 0.0
        self._reopened = 0
        self._trial_out = False
        self._probe_may_end = False
        self.consecutive_failures = 0

    @property
    def state(self) -> State:
        """The state now. An open time that is over shows as half open; the change itself happens at `admit`."""
        if self._state is State.OPEN and self._clock() >= self._until:
            return State.HALF_OPEN
        return self._state

    @property
    def admits(self) -> bool:
        """Whether `admit` would give a ticket now."""
        if self._state is State.CLOSED:
            return True
        return self.state is State.HALF_OPEN and not self._trial_out

    @property
    def retry_in(self) -> float | None:
        """Seconds until it turns half open; 0 when it is, None when it is closed."""
        if self._state is State.CLOSED:
            return None
        return max(0.0, self._until - self._clock()) if self._state is State.OPEN else 0.0

    def admit(self) -> Ticket | None:
        """Return a ticket for one attempt, or None. Each ticket ends in a recorded success or failure, or `cancel`."""
        if not self.admits:
            return None
        if self._state is State.CLOSED:
            return Ticket(self._generation, trial=False)
        if self._state is State.OPEN:
            self._turn(State.HALF_OPEN)
        self._trial_out = True
        return Ticket(self._generation, trial=True)

    def admit_trial(self) -> Ticket | None:
        """Return a ticket for the trial of an outage: also while it is open, one at a time.

        Its failure does not lengthen the open time.
        """
        if self.state is not State.OPEN:
            ticket = self.admit()
            if ticket is not None:
                ticket.early = ticket.trial
            return ticket
        if self._trial_out:
            return None
        self._trial_out = True
        return Ticket(self._generation, trial=True, early=True)

    def record_first_content(self, ticket: Ticket) -> None:
        """Close a half-open breaker: an answer has begun. Its ticket stays valid in the new generation."""
        if ticket.generation == self._generation and ticket.trial:
            self._turn(State.CLOSED)
            ticket.generation = self._generation
            ticket.trial = False

    def record_success(self, ticket: Ticket) -> None:
        """Count a whole answer."""
        self.record_first_content(ticket)
        if ticket.generation == self._generation:
            self.consecutive_failures = 0

    def record_failure(self, ticket: Ticket, *, unreachable: bool = False) -> None:
        """Count a failure; `unreachable`: nothing listens there."""
        if ticket.generation != self._generation:
            return
        self.consecutive_failures += 1
        if ticket.early and self._state is State.OPEN:
            self._trial_out = False
            self._probe_may_end = self._probe_may_end or unreachable
        elif ticket.trial:
            self._reopened += not ticket.early
            self._open(unreachable=unreachable)
        elif self.consecutive_failures >= self._limit:
            self._reopened = 0
            self._open(unreachable=unreachable)

    def cancel(self, ticket: Ticket) -> None:
        """Count neither success nor failure; a half-open place becomes free again."""
        if ticket.generation == self._generation and ticket.trial:
            self._trial_out = False

    def hint(self) -> None:
        """Open at the next failure: somebody else's breaker of the same replica has opened. A success forgets it."""
        if self._state is State.CLOSED:
            self.consecutive_failures = max(self.consecutive_failures, self._limit - 1)

    def record_probe(self, *, good: bool) -> None:
        """Take a probe's result into account."""
        if self.state is not State.OPEN:
            return
        if not good:
            self._probe_may_end = True
        elif self._probe_may_end and not self._trial_out:  # a trial under way tells more
            self._turn(State.HALF_OPEN)

    def _open(self, *, unreachable: bool) -> None:
        planned: float = self._open_seconds * 2 ** min(self._reopened, 32)
        spread = 1 - SPREAD + 2 * SPREAD * self._draw()
        self._until = self._clock() + min(self._open_max, min(self._open_max, planned) * spread)
        self._probe_may_end = unreachable
        self._turn(State.OPEN)

    def _turn(self, state: State) -> None:
        old, self._state = self._state, state
        self._generation += 1
        self._trial_out = False
        if state is State.CLOSED:
            self.consecutive_failures = 0
            self._reopened = 0
        self._changed(old, state)
