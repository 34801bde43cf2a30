"""The first seconds of an outage of a backend, in which requests wait in place of failing."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

FIRST_TRIAL = 0.25
"""Seconds from the beginning to the first trial; doubled for each further one."""
TRIAL_INTERVAL_MAX = 1.0
TRIALS = 6
"""So many are made in the 5 s that requests wait by default: other retries leave them in the budget."""


class Outage:
    """Begins with the first failure after a success that says that the backend cannot be used; a success ends it.

    Such failures are: refused, unresolved, not connected in time, reset before headers, 502, 503, 504 and 529; and
    500s to two different bodies.

    Args:
        wait: seconds in which requests wait; 0 for none.
        clock: seconds, monotonic.
        over: called when an outage has ended.
        failed: called at each failure of that kind.

    Attributes:
        number: of the outage; answers to attempts from before it do not end it.
    """

    def __init__(
        self,
        *,
        wait: float,
        clock: "Callable[[], float]",
        over: "Callable[[], None]" = lambda: None,
        failed: "Callable[[], None]" = lambda: None,
    ) -> None:
        self._wait = wait
        self._clock = clock
        self._over = over
        self._failed = failed
        self._began: float | None = None
        self._bodies: set[bytes] = set()
        self._interval = FIRST_TRIAL
        self._due = math.inf
        self._trials: list[float] = []
        self._by_500s = False
        self.number = 0

    @property
    def ends_waiting(self) -> float:
        """The instant until which requests wait; the past when there is no outage."""
        return -math.inf if self._began is None else self._began + self._wait

    @property
    def is_bridged(self) -> bool:
        """Whether requests wait now."""
        return self._clock() < self.ends_waiting

    @property
    def holds_newcomers(self) -> bool:
        """Whether those who come now wait without an attempt of their own.

        Not while there were only error answers with 500: they may have been about the prompts.
        """
        return self.is_bridged and not self._by_500s

    @property
    def trial_due(self) -> float:
        """The instant of the next trial."""
        return self._due

    @property
    def current(self) -> int:
        """The number of the outage that goes on; 0 when there is none."""
        return self.number if self._began is not None else 0

    @property
    def is_tried(self) -> bool:
        """Whether a trial is under way."""
        return bool(self._trials)

    def record_failure(self, *, by_500s: bool = False) -> None:
        """Count a failure that says that the backend cannot be used; `by_500s`: only error answers with 500 did."""
        self._by_500s = by_500s and (self._began is None or self._by_500s)
        if self._began is None:
            now = self._began = self._clock()
            self.number += 1
            self._interval = 2 * FIRST_TRIAL
            self._due = now + FIRST_TRIAL
            self._trials.clear()
        self._failed()

    def record_500(self, body: bytes) -> bool:
        """Count an error answer with 500 to a body (its fingerprint); return whether it means an outage."""
        if self._began is None:
            self._bodies.add(body)
            if len(self._bodies) < 2:  # noqa: PLR2004
                return False
        self.record_failure(by_500s=True)
        return True

    def record_success(self, number: int) -> None:
        """Count the answer to an attempt that began in the outage with this number; 0 before the first one."""
        if number != self.number:
            return
        if self._bodies:
            self._bodies.clear()
        if self._began is not None:
            self._began = None
            self._due = math.inf
            self._over()

    def go_on_from(self, other: "Outage") -> None:
        """Be in the outage in which another one is: it is the same servers that cannot be used."""
        self._began, self._bodies = other._began, set(other._bodies)  # noqa: SLF001 - one of its kind
        self._interval, self._due = other._interval, other._due  # noqa: SLF001
        self._by_500s = other._by_500s  # noqa: SLF001
        self.number = other.number

    def begin_trial(self) -> float:
        """Note that a trial begins; return its name for `end_trial`."""
        now = self._clock()
        self._due = now + self._interval
        self._interval = min(TRIAL_INTERVAL_MAX, 2 * self._interval)
        self._trials.append(now)
        return now

    def end_trial(self, trial: float) -> None:
        """Note that a trial has ended, however."""
        if trial in self._trials:
            self._trials.remove(trial)
