"""The guard of a route with weights: a target that fails too often loses its traffic to the others."""

from collections import deque
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SLICES = 60
"""Parts of a window; what is counted is forgotten up to one of them early."""
CHANCE = 3.0
"""Standard errors by which two error rates may differ by chance."""


@dataclass(slots=True)
class Counts:
    """Attempts at a target, each the first one of its request there.

    Attributes:
        first: those that were the first ones of their requests at all: only they show how the target does with the
            traffic that it is given.
        first_failed: of them.
        later: those after a failure elsewhere, or after a wait: their requests may be what fails.
        later_failed: of them.
        turned_away: requests that made no attempt at it, since its breakers are open.
    """

    first: int = 0
    first_failed: int = 0
    later: int = 0
    later_failed: int = 0
    turned_away: int = 0

    @property
    def error_rate(self) -> float:
        """The share of its first attempts that failed, 0 to 1; 0 without any."""
        return self.first_failed / self.first if self.first else 0.0

    @property
    def requests(self) -> int:
        """The requests that were given to it."""
        return self.first + self.turned_away


@dataclass(frozen=True, slots=True)
class Trip:
    """That a target has lost its traffic.

    Attributes:
        route, target: their names.
        error_rate: 0 to 1, of so many `requests` in `window` seconds; allowed are `max_error_rate`.
        at: the instant.
    """

    route: str
    target: str
    error_rate: float
    requests: int
    window: float
    max_error_rate: float
    at: float


class Watch:
    """What became of the requests that were given to one target.

    Attributes:
        backend, model: of the target, as configured; a model of None is the caller's.
        trip: when it lost its traffic, and why; None while it has it.
    """

    __slots__ = ("_guard", "_slices", "backend", "model", "trip")

    def __init__(self, guard: "Guard", backend: str, model: str | None) -> None:
        self._guard = guard
        self._slices: deque[tuple[int, Counts]] = deque()
        self.backend = backend
        self.model = model
        self.trip: Trip | None = None

    @property
    def name(self) -> str:
        """For people."""
        return target_name(self.backend, self.model)

    @property
    def counts(self) -> Counts:
        """What was counted within the window."""
        self._present()
        return total(counts for _, counts in self._slices)

    def note(self, *, failed: bool, first: bool) -> bool:
        """Note how an attempt has ended, the first one of its request here; return whether the guard trips.

        Args:
            failed: in a way that the breaker counts.
            first: whether it was the first one of its request at all.
        """
        present = self._present()
        if not first:
            present.later += 1
            present.later_failed += failed
            return False
        present.first += 1
        present.first_failed += failed
        return failed and self._guard.judge(self)

    def turn_away(self) -> bool:
        """Note that a request made no attempt here, since the breakers are open; return whether the guard trips."""
        self._present().turned_away += 1
        return self._guard.judge(self)

    def _present(self) -> Counts:
        """Return the counts of the present part of the window, and forget those that are too old."""
        number = self._guard.slice()
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, Counts()))
            while self._slices[0][0] <= number - SLICES:
                self._slices.popleft()
        return self._slices[-1][1]


class Guard:
    """Takes the traffic of a target whose error rate is too high, for good: it ends with its route.

    It compares, since a fault that all share says nothing about one of them: the others, taken together, must have
    answered `min_requests` as well, and fail within the same limit, or less often than by chance (a z-test of two
    proportions). So the last one never loses its traffic.

    Args:
        route: its name.
        max_error_rate: 0 to 1, of first attempts that ended in a failure that the breaker counts.
        window: seconds looked back on.
        min_requests: given to a target before it is judged.
        clock: seconds, monotonic.
        tripped: called when a target loses its traffic.

    Attributes:
        watches: one for each target that has a share of the traffic.
        lost: the names of those that have lost it; another list after each trip.
    """

    def __init__(
        self,
        route: str,
        *,
        max_error_rate: float,
        window: float,
        min_requests: int,
        clock: "Callable[[], float]",
        tripped: "Callable[[Trip], None]" = lambda _trip: None,
    ) -> None:
        self._route = route
        self._max_error_rate = max_error_rate
        self._window = window
        self._min_requests = min_requests
        self._clock = clock
        self._tripped = tripped
        self.watches: list[Watch] = []
        self.lost: list[str] = []

    def watch(self, backend: str, model: str | None) -> Watch:
        """Return the watch over one more target."""
        watch = Watch(self, backend, model)
        self.watches.append(watch)
        return watch

    def slice(self) -> int:
        """Return the number of the present part of the window."""
        return int(self._clock() * SLICES / self._window)

    def hint(self, target: str, error_rate: float, requests: int, age: float) -> None:
        """Take a target's traffic as somebody else's guard of the same route did, unless it is the last one's.

        Args:
            target: its name.
            error_rate: 0 to 1, of so many `requests`.
            requests: that were given to it.
            age: seconds since then.
        """
        for watch in self.watches:
            others = any(other.trip is None for other in self.watches if other is not watch)
            if watch.name == target and watch.trip is None and others:
                self._take(watch, error_rate, requests, age)

    def judge(self, watch: Watch) -> bool:
        """Return whether a target loses its traffic now."""
        if watch.trip is not None:
            return False
        seen = watch.counts
        rate = seen.error_rate
        if seen.requests < self._min_requests or rate <= self._max_error_rate:
            return False
        others = total(other.counts for other in self.watches if other is not watch and other.trip is None)
        asked, failed = others.first + others.later, others.first_failed + others.later_failed
        if asked < self._min_requests:
            return False
        if failed > self._max_error_rate * asked and not _is_higher(seen.first_failed, seen.first, failed, asked):
            return False
        self._tripped(self._take(watch, rate, seen.requests))
        return True

    def _take(self, watch: Watch, rate: float, requests: int, age: float = 0.0) -> Trip:
        """Take a target's traffic."""
        at = self._clock() - age
        trip = Trip(self._route, watch.name, rate, requests, self._window, self._max_error_rate, at)
        watch.trip = trip
        self.lost = [*self.lost, watch.name]
        return trip


def target_name(backend: str, model: str | None) -> str:
    """Return what people call a target, as configured; a model of None is the caller's."""
    return backend if model is None else f"{backend} ({model})"


def _is_higher(failed: int, asked: int, others_failed: int, others_asked: int) -> bool:
    """Return whether an error rate is higher than another one, and not by chance."""
    share = (failed + others_failed) / (asked + others_asked)
    error = sqrt(share * (1 - share) * (1 / asked + 1 / others_asked))
    return failed / asked - others_failed / others_asked > CHANCE * error


def total(counts: "Iterable[Counts]") -> Counts:
    """Return the sum."""
    whole = Counts()
    for each in counts:
        whole.first += each.first
        whole.first_failed += each.first_failed
        whole.later += each.later
        whole.later_failed += each.later_failed
        whole.turned_away += each.turned_away
    return whole
