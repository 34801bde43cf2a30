"""The limits of a key: requests and tokens in any minute and in any day, and requests in flight. All that are set hold.

Instants are seconds since the epoch of an injected clock that never goes back.
"""

import math
from operator import itemgetter
from typing import TYPE_CHECKING

from gateway.errors import RateLimitExceeded

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from gateway.config import LimitsConfig

SLOTS = 60
"""Parts of a window: seconds of a minute, 24 minutes of a day."""
MINUTE, DAY = 60, 86_400
"""Seconds."""


class Window:
    """What was used of one limit lately, in slots of time.

    A slot is forgotten when a whole window has passed since its end. So no stretch of time as long as the window holds
    more than the limit, wherever it begins.

    Args:
        name: of the limit, as configured.
        limit: what may be used in a window.
        seconds: the length of the window.

    Attributes:
        used: in the slots that are remembered, as of the latest look.
        touched: what was used has changed since somebody last set this to False.
    """

    __slots__ = ("_forget_at", "_seconds", "_slots", "limit", "name", "touched", "used")

    def __init__(self, name: str, limit: int, seconds: int) -> None:
        self.name = name
        self.limit = limit
        self.used = 0
        self.touched = False
        self._seconds = seconds // SLOTS  # of a slot
        self._slots: dict[int, int] = {}  # by number, the oldest first
        self._forget_at = math.inf  # the end of the oldest

    @property
    def is_of_a_day(self) -> bool:
        """Whether it is worth keeping over a restart."""
        return self._seconds * SLOTS == DAY

    def fits(self, amount: int, now: float) -> bool:
        """Return whether so much more fits now; more than the limit is cut to it."""
        if now >= self._forget_at:
            self._forget(now)
        return self.used + amount <= self.limit or (not self.used and amount > self.limit)

    def wait(self, amount: int, now: float) -> float:
        """Return the seconds until so much more fits, 0 for now.

        More than the limit fits in several windows, one after the other.
        """
        if self.fits(amount, now) and amount <= self.limit:
            return 0.0
        later, rest = divmod(max(amount, 1) - 1, self.limit)
        over = self.used + rest + 1 - self.limit
        wait = later * (SLOTS + 1) * self._seconds + 0.0
        for slot, used in self._slots.items() if over > 0 else ():
            over -= used
            if over <= 0:
                return wait + self._end(slot) - now
        return wait

    def add(self, amount: int, now: float) -> None:
        """Use so much now, whatever the limit."""
        slot, slots = int(now // self._seconds), self._slots
        if slot in slots:
            slots[slot] += amount
        else:
            slots[slot] = amount
            if len(slots) == 1:
                self._forget_at = self._end(slot)
        self.used += amount
        self.touched = True

    def change(self, at: float, amount: int, to: int, now: float) -> None:
        """Make `to` of an amount that was used at an instant.

        What becomes free was used then, and is gone with its slot; what is used beyond it is used now.
        """
        if to > amount:
            self.add(to - amount, now)
            return
        slot = int(at // self._seconds)
        if slot in self._slots:
            self._slots[slot] -= amount - to
            self.used -= amount - to
            self.touched = True

    def used_now(self, now: float) -> int:
        """Return what is used now."""
        if now >= self._forget_at:
            self._forget(now)
        return self.used

    def empty_in(self, now: float) -> float:
        """Return the seconds until nothing is used any more, unless more is used."""
        if not self.used_now(now):
            return 0.0
        return self._end(next(slot for slot in reversed(self._slots) if self._slots[slot])) - now

    def slots(self) -> dict[int, int]:
        """Return a copy of what was used in each slot, by its number since the epoch."""
        return dict(self._slots)

    def restore(self, slots: "Mapping[int, int]", now: float) -> None:
        """Add what was used before the process began; what lies in the future, by a clock that was wrong, is now."""
        newest = int(now // self._seconds)
        merged = self._slots
        for number, used in slots.items():
            slot = min(number, newest)
            merged[slot] = merged.get(slot, 0) + used
        self._slots = dict(sorted(merged.items()))
        self.used = sum(self._slots.values())
        self._forget(now)

    def _forget(self, now: float) -> None:
        """Forget the slots that a whole window has passed since."""
        while self._slots:
            slot = next(iter(self._slots))
            self._forget_at = self._end(slot)
            if now < self._forget_at:
                return
            self.used -= self._slots.pop(slot)
        self._forget_at = math.inf

    def _end(self, slot: int) -> float:
        """Return the instant at which a slot is forgotten."""
        return (slot + SLOTS + 1) * self._seconds


class Limits:
    """What a key may use, and has used.

    Args:
        config: the limits that are set.
        clock: seconds since the epoch; it never goes back.

    Attributes:
        requests, tokens: the windows of each; most_in_flight: requests at once, or None for any number.
        in_flight: requests at once now.
    """

    __slots__ = ("clock", "in_flight", "most_in_flight", "requests", "tokens")

    def __init__(self, config: "LimitsConfig", clock: "Callable[[], float]") -> None:
        self.clock = clock
        self.requests = _windows("requests", config.requests_per_minute, config.requests_per_day)
        self.tokens = _windows("tokens", config.tokens_per_minute, config.tokens_per_day)
        self.most_in_flight = config.max_in_flight
        self.in_flight = 0

    def state(self) -> "Iterator[tuple[str, int, int]]":
        """Yield each limit that is set: its name, what may be used, and what is used now."""
        now = self.clock()
        for window in (*self.requests, *self.tokens):
            yield window.name, window.limit, window.used_now(now)
        if self.most_in_flight is not None:
            yield "max_in_flight", self.most_in_flight, self.in_flight

    def reserve(self, tokens: int) -> "Reservation":
        """Return what one request needs, yet to be taken; tokens beyond a limit are cut to it."""
        return Reservation(self, tokens)


class Reservation:
    """What one request needs of its key's limits: taken before it is forwarded, settled by what it has used.

    Attributes:
        tokens: reserved.
    """

    __slots__ = ("_limits", "_taken_at", "tokens")

    def __init__(self, limits: Limits, tokens: int) -> None:
        self._limits = limits
        self._taken_at: float | None = None
        self.tokens = tokens

    def take(self) -> float | None:
        """Take it: None. Where it does not fit, return the seconds until it may; 0: when another request ends."""
        limits, tokens = self._limits, self.tokens
        now = limits.clock()
        if limits.most_in_flight is not None and limits.in_flight >= limits.most_in_flight:
            return self._wait(now)
        for window in limits.requests:
            if not window.fits(1, now):
                return self._wait(now)
        for window in limits.tokens:
            if not window.fits(tokens, now):
                return self._wait(now)
        for window in limits.requests:
            window.add(1, now)
        for window in limits.tokens:
            window.add(min(window.limit, tokens), now)
        limits.in_flight += 1
        self._taken_at = now
        return None

    def _wait(self, now: float) -> float:
        limits = self._limits
        waits = [window.wait(1, now) for window in limits.requests]
        return max(waits + [window.wait(min(self.tokens, window.limit), now) for window in limits.tokens], default=0.0)

    def settle(self, tokens: int) -> None:
        """Use so many tokens in place of those reserved; the request has ended. Once, after it was taken."""
        at, now = self._taken_at, self._limits.clock()
        if at is None:
            raise RuntimeError("nothing is taken")
        self._taken_at = None
        self._limits.in_flight -= 1
        for window in self._limits.tokens:
            reserved = min(window.limit, self.tokens)
            window.change(at, reserved, tokens, now)

    def give_back(self) -> None:
        """Give all of it back: the request was never forwarded."""
        at, now = self._taken_at, self._limits.clock()
        self.settle(0)
        for window in self._limits.requests:
            window.change(at or now, 1, 0, now)

    def refusal(self, ahead: "Iterable[Reservation]" = ()) -> RateLimitExceeded | None:
        """Return why it cannot be taken now, by the limit that lets it wait longest; None if it can.

        Args:
            ahead: those of the same key that are taken before it.
        """
        limits, now = self._limits, self._limits.clock()
        queue = [*ahead, self]
        waits = [(window.wait(len(queue), now), window) for window in limits.requests]
        waits += [
            (window.wait(sum(min(each.tokens, window.limit) for each in queue), now), window)
            for window in limits.tokens
        ]
        waits = [each for each in waits if each[0]]
        if waits:
            wait, window = max(waits, key=itemgetter(0))
            return RateLimitExceeded(
                f"The limit {window.name} of this key ({window.limit}) is used up.", limit=window.name, wait=wait
            )
        most = limits.most_in_flight
        if most is not None and limits.in_flight >= most:
            return RateLimitExceeded(
                f"As many requests of this key are under way as may be ({most}).", limit="max_in_flight", wait=0.0
            )
        return None


def tightest(windows: tuple[Window, ...], now: float) -> Window:
    """Return the window of which the least is left."""
    if len(windows) == 1:
        return windows[0]
    return min(windows, key=lambda window: window.limit - window.used_now(now))


def _windows(what: str, per_minute: int | None, per_day: int | None) -> tuple[Window, ...]:
    limits = ((f"{what}_per_minute", per_minute, MINUTE), (f"{what}_per_day", per_day, DAY))
    return tuple(Window(name, limit, seconds) for name, limit, seconds in limits if limit is not None)
