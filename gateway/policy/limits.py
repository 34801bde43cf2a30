"""The limits of a key: requests and tokens in any minute and in any day, and requests in flight. All that are set hold.

Instants are seconds since the epoch of an injected clock that never goes back.
"""

import math
from operator import itemgetter
from typing import TYPE_CHECKING

from gateway.errors import RateLimitExceeded

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gateway.config import LimitsConfig
    from gateway.policy.allotment import Allotment

SLOTS = 60
"""Parts of a window: seconds of a minute, 24 minutes of a day."""
MINUTE, DAY = 60, 86_400
"""Seconds."""
SOON = 0.2
"""Seconds until a request that other processes hold up is looked at again."""


class Window:
    """What was used of one limit lately, in slots of time.

    A slot is forgotten when a whole window has passed since its end. So no stretch of time as long as the window holds
    more than the limit, wherever it begins. `roll` comes before each use of it.

    Args:
        name: of the limit, as configured.
        limit: what may be used in a window.
        seconds: the length of the window.

    Attributes:
        shown: the limit as text.
        used: in all slots that are remembered; what is added to it is used in the present one.
        began: the instant at which the present slot began.
        most: what may be used here; less than the limit where it is shared with other processes (`allotment.py`).
        leased: what was used here and is forgotten may not be used again until it is granted.
        elsewhere: what other processes have used, as far as is known.
        free_at, empty_at: the instants at which all of them may use more, and have used nothing.
    """

    __slots__ = (
        "_past",
        "_past_used",
        "_seconds",
        "_slot",
        "began",
        "elsewhere",
        "empty_at",
        "free_at",
        "leased",
        "limit",
        "most",
        "name",
        "shown",
        "used",
    )

    def __init__(self, name: str, limit: int, seconds: int) -> None:
        self.name = name
        self.limit = limit
        self.shown = str(limit)
        self.used = 0
        self.began = 0.0
        self.most = limit
        self.leased = False
        self.elsewhere = 0
        self.free_at = self.empty_at = 0.0
        self._seconds = seconds // SLOTS  # of a slot
        self._slot = 0  # the number of the present one
        self._past: dict[int, int] = {}  # what was used in those before it, the oldest first
        self._past_used = 0

    @property
    def seconds(self) -> int:
        """The length of the window."""
        return self._seconds * SLOTS

    @property
    def left(self) -> int:
        """What is left of the limit, below 0 where more was used."""
        return self.limit - self.used - self.elsewhere

    def roll(self, now: float) -> float:
        """Begin the slot of an instant, and forget those that are too old; return the instant of the next one."""
        slot = int(now // self._seconds)
        if slot > self._slot:
            if self.used > self._past_used:
                self._past[self._slot] = self.used - self._past_used
            while self._past and (oldest := next(iter(self._past))) < slot - SLOTS:
                forgotten = self._past.pop(oldest)
                self.used -= forgotten
                if self.leased:
                    self.most -= forgotten
            self._past_used = self.used
            self._slot = slot
            self.began = slot * self._seconds
            if now >= self.empty_at:
                self.elsewhere = 0  # nobody has told of it since
        return (self._slot + 1) * self._seconds

    def wait(self, amount: int, now: float) -> float:
        """Return the seconds until so much more fits, 0 for now.

        More than the limit fits in several windows, one after the other.
        """
        if self.used + amount <= self.most:
            return 0.0
        if self.leased:
            if amount <= self.left:
                return SOON
            return max(SOON, self.free_at - now, self._own_wait(amount, self.limit, now))
        return self._own_wait(amount, self.most, now)

    def _own_wait(self, amount: int, most: int, now: float) -> float:
        later, rest = divmod(max(amount, 1) - 1, most)
        over = self.used + rest + 1 - most
        wait = later * (SLOTS + 1) * self._seconds + 0.0
        for slot, used in self.slots().items() if over > 0 else ():
            over -= used
            if over <= 0:
                return wait + self._end(slot) - now
        return wait

    def change(self, at: float, by: int) -> None:
        """Change what was used at an instant before the present slot; what is forgotten stays so."""
        slot = int(at // self._seconds)
        if slot in self._past:
            self._past[slot] += by
            self._past_used += by
            self.used += by

    def empty_in(self, now: float) -> float:
        """Return the seconds until nothing is used any more, unless more is used."""
        if self.used > self._past_used:
            own = self._end(self._slot) - now
        elif not self.used:
            own = 0.0
        else:
            own = self._end(next(slot for slot in reversed(self._past) if self._past[slot])) - now
        return max(own, self.empty_at - now) if self.elsewhere else own

    def slots(self) -> dict[int, int]:
        """Return what was used in each slot, by its number since the epoch, the oldest first."""
        return {**self._past, self._slot: self.used - self._past_used}

    def restore(self, slots: "Mapping[int, int]", now: float) -> None:
        """Add what was used before the process began; what lies in the future, by a clock that was wrong, is now."""
        self.roll(now)
        merged = self.slots()
        for number, used in slots.items():
            slot = min(number, self._slot)
            if slot >= self._slot - SLOTS:
                merged[slot] = merged.get(slot, 0) + used
        self.used = sum(merged.values())
        self._past_used = self.used - merged.pop(self._slot)
        self._past = dict(sorted(merged.items()))

    def _end(self, slot: int) -> float:
        """Return the instant at which a slot is forgotten."""
        return (slot + SLOTS + 1) * self._seconds


class Limits:
    """What a key may use, and has used.

    Args:
        config: the limits that are set.
        clock: seconds since the epoch; it never goes back.

    Attributes:
        requests, tokens: the windows of each; max_in_flight: requests at once, or None for any number.
        most_in_flight: those that may be here; fewer where other processes have the rest.
        in_flight: requests at once now.
        touched: something was used since somebody last set this to False.
        allotment: the part of them that this process holds; None where they are its own.
    """

    __slots__ = (
        "_rolls_at",
        "allotment",
        "clock",
        "in_flight",
        "max_in_flight",
        "most_in_flight",
        "requests",
        "tokens",
        "touched",
    )

    def __init__(self, config: "LimitsConfig", clock: "Callable[[], float]") -> None:
        self.clock = clock
        self.requests = _windows("requests", config.requests_per_minute, config.requests_per_day)
        self.tokens = _windows("tokens", config.tokens_per_minute, config.tokens_per_day)
        self.max_in_flight = self.most_in_flight = config.max_in_flight
        self.in_flight = 0
        self.touched = False
        self.allotment: Allotment | None = None
        self._rolls_at = 0.0

    def change(self, config: "LimitsConfig") -> None:
        """Have other limits from now on; what was used of those that stay still counts."""
        known = {window.name: window for window in (*self.requests, *self.tokens)}

        def kept(windows: tuple[Window, ...]) -> tuple[Window, ...]:
            for window in windows:
                if (old := known.get(window.name)) is not None:
                    old.limit, old.shown = window.limit, window.shown
                    if self.allotment is None:
                        old.most = window.limit
            return tuple(known.get(window.name, window) for window in windows)

        self.requests = kept(_windows("requests", config.requests_per_minute, config.requests_per_day))
        self.tokens = kept(_windows("tokens", config.tokens_per_minute, config.tokens_per_day))
        self.max_in_flight = config.max_in_flight
        if self.allotment is None or config.max_in_flight is None:
            self.most_in_flight = config.max_in_flight
        self._rolls_at = 0.0

    def of_a_day(self) -> tuple[Window, ...]:
        """Return its windows of a day: they are worth keeping over a restart."""
        return tuple(window for window in (*self.requests, *self.tokens) if window.seconds == DAY)

    def look(self) -> float:
        """Return the instant, at which all windows are as they are to be."""
        now = self.clock()
        if now >= self._rolls_at:
            self._rolls_at = min((window.roll(now) for window in (*self.requests, *self.tokens)), default=math.inf)
        return now

    def state(self) -> "Iterator[tuple[str, int, int]]":
        """Yield each limit that is set: its name, what may be used, and what is used now, by this process."""
        self.look()
        for window in (*self.requests, *self.tokens):
            yield window.name, window.limit, window.used
        if self.max_in_flight is not None:
            yield "max_in_flight", self.max_in_flight, self.in_flight

    def reserve(self, tokens: int) -> "Reservation":
        """Return what one request needs, yet to be taken; tokens beyond a limit are cut to it."""
        return Reservation(self, tokens)


class Reservation:
    """What one request needs of its key's limits: taken before it is forwarded, settled by what it has used.

    Attributes:
        tokens: reserved.
    """

    __slots__ = ("_limits", "_requests", "_taken", "_taken_at", "tokens")

    def __init__(self, limits: Limits, tokens: int) -> None:
        self._limits = limits
        self._taken_at: float | None = None
        self._requests: tuple[Window, ...] = ()  # of which it took one each
        self._taken: list[tuple[Window, int]] = []  # the tokens that it took of each
        self.tokens = tokens

    def take(self) -> float | None:
        """Take it: None. Where it does not fit, return the seconds until it may; 0: when another request ends."""
        limits, tokens = self._limits, self.tokens
        now = limits.look()
        if limits.most_in_flight is not None and limits.in_flight >= limits.most_in_flight:
            return self._wait(now)
        for window in limits.requests:
            if window.used >= window.most:
                return self._wait(now)
        for window in limits.tokens:
            most = window.most
            if window.used + tokens > most and (tokens <= window.limit or window.used + window.limit > most):
                return self._wait(now)
        for window in limits.requests:
            window.used += 1
        self._requests = limits.requests  # by the time it is settled there may be other limits
        for window in limits.tokens:
            cut = tokens if tokens < window.limit else window.limit  # noqa: FURB136 - at each request
            window.used += cut
            self._taken.append((window, cut))
        limits.in_flight += 1
        limits.touched = True
        self._taken_at = now
        return None

    def _wait(self, now: float) -> float:
        limits = self._limits
        if limits.allotment is not None:
            limits.allotment.lacks(self)
            return SOON
        waits = [window.wait(1, now) for window in limits.requests]
        return max(waits + [window.wait(min(self.tokens, window.limit), now) for window in limits.tokens], default=0.0)

    def ask(self) -> "Future[None] | None":
        """Ask for what it lacks, where other processes may hold it; None where that makes no sense (now).

        Returns:
            What is done when an answer has come, or none will.
        """
        allotment = self._limits.allotment
        return allotment.ask(self) if allotment is not None else None

    def in_vain(self, wait: float) -> RateLimitExceeded | None:
        """Return why it cannot be taken within so many seconds, where other processes have used what it lacks."""
        if self._limits.allotment is None:
            return None
        refusal = self.refusal()
        return refusal if refusal is not None and refusal.wait > wait else None

    def settle(self, tokens: int) -> None:
        """Use so many tokens in place of those reserved; the request has ended. Once, after it was taken.

        What becomes free was used when it was taken, and is forgotten with that; what is used beyond it is used now.
        """
        at, limits = self._taken_at, self._limits
        if at is None:
            raise RuntimeError("nothing is taken")
        self._taken_at = None
        limits.look()
        limits.in_flight -= 1
        limits.touched = True
        for window, taken in self._taken:
            more = tokens - taken
            if more > 0 or at >= window.began:
                window.used += more
            else:
                window.change(at, more)

    def give_back(self) -> None:
        """Give all of it back: the request was never forwarded."""
        at = self._taken_at
        self.settle(0)
        for window in self._requests:
            if at is not None and at < window.began:
                window.change(at, -1)
            else:
                window.used -= 1

    def refusal(self, ahead: "Iterable[Reservation]" = ()) -> RateLimitExceeded | None:
        """Return why it cannot be taken now, by the limit that lets it wait longest; None if it can.

        Args:
            ahead: those of the same key that are taken before it.
        """
        limits, now = self._limits, self._limits.look()
        queue = [*ahead, self]
        waits = [(window.wait(len(queue), now), window) for window in limits.requests]
        waits += [
            (window.wait(sum(min(each.tokens, window.limit) for each in queue), now), window)
            for window in limits.tokens
        ]
        waits = [each for each in waits if each[0]]
        if waits:
            wait, window = max(waits, key=itemgetter(0))
            needed = 1 if window in limits.requests else min(self.tokens, window.limit)
            whose = f"Of this key's {window.name} ({window.limit})"
            left = max(0, window.left)
            if limits.allotment is not None and not window.leased:
                left = max(0, window.most - window.used)
                whose = f"Other instances cannot be asked now. {whose} this one may use {window.most} meanwhile:"
            return RateLimitExceeded(
                f"{whose} {left} are left, and this request needs {needed}.", limit=window.name, wait=wait
            )
        most = limits.most_in_flight
        if most is not None and limits.in_flight >= most:
            return RateLimitExceeded(
                f"As many requests of this key are under way as may be ({limits.max_in_flight}).",
                limit="max_in_flight",
                wait=0.0,
            )
        return None


def tightest(windows: tuple[Window, ...]) -> Window:
    """Return the window of which the least is left."""
    least = windows[0]
    for window in windows[1:]:
        if window.left < least.left:
            least = window
    return least


def _windows(what: str, per_minute: int | None, per_day: int | None) -> tuple[Window, ...]:
    limits = ((f"{what}_per_minute", per_minute, MINUTE), (f"{what}_per_day", per_day, DAY))
    return tuple(Window(name, limit, seconds) for name, limit, seconds in limits if limit is not None)
