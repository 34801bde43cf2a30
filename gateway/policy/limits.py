"""The limits of a key: requests and tokens in any minute and in any day, and requests in flight. All that are set hold.

Instants are seconds since the epoch of an injected clock that never goes back; those that each request compares are
floats, since a float and an integer take several times as long.
"""

import math
from operator import itemgetter
from typing import TYPE_CHECKING

from msgspec import Struct

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


class Meter:
    """What was used of one kind, requests or tokens. Each limit of the kind is a window on it.

    So one sum is all that a request changes, whatever limits there are.

    Attributes:
        windows: its limits.
        began: the instant at which the present slot of all of them began.
        reading: what was used since the process began, whatever of it is forgotten or changed later.
        bound: the reading up to which all windows hold, as they are now.
        smallest: the least of the limits.
        tightest: the window of which the least is left; None: there is no limit.
        end: the reading at which nothing is left of that.
        opened: the reading at which nothing is used of the present slot of that window.
        told: what is told of all this before the number that is left; it holds until it is aimed again, or nothing is
            used of that slot any more; None: nobody has found it yet.
    """

    __slots__ = ("began", "bound", "end", "opened", "reading", "smallest", "tightest", "told", "windows")

    def __init__(self) -> None:
        self.reading = 0
        self.watch(())

    def watch(self, windows: "tuple[Window, ...]") -> None:
        """Have these windows from now on."""
        self.windows = windows
        self.aim()

    def aim(self) -> None:
        """Find out what holds, after a window has changed."""
        bound = smallest = least = math.inf
        began = -math.inf
        self.tightest: Window | None = None
        for window in self.windows:
            if (most := window.zero + window.most) < bound:
                bound = most
            smallest = min(smallest, window.limit)
            began = max(began, window.began)
            if (end := window.zero + window.limit - window.elsewhere) < least:
                least, self.tightest = end, window
        self.opened = self.tightest.opened if self.tightest is not None else self.reading
        self.told: str | None = None
        self.began = float(began)
        self.bound: float = bound
        self.smallest: float = smallest
        self.end: float = least

    def change(self, at: float, by: int) -> None:
        """Change what was used at an instant, in all windows that know of it."""
        for window in self.windows:
            window.change(at, by)
        self.aim()


class Window:
    """What was used of one limit lately, in slots of time.

    A slot is forgotten when a whole window has passed since its end. So no stretch of time as long as the window holds
    more than the limit, wherever it begins. `roll` comes before each use of it.

    Args:
        name: of the limit, as configured.
        limit: what may be used in a window.
        seconds: the length of the window.
        meter: what is used; the window begins with nothing.
        since: the instant at which it begins: what was used before is none of its.

    Attributes:
        limit: what may be used in a window; `have` changes it.
        began: the instant at which the present slot began, or the window.
        leased: what was used here and is forgotten may not be used again until it is granted.
        zero: the reading at which nothing is used; opened: that at which nothing of the present slot is.
        free_at, empty_at: the instants at which all of them may use more, and have used nothing.
    """

    __slots__ = (
        "_elsewhere",
        "_ends",
        "_meter",
        "_most",
        "_past",
        "_seconds",
        "_since",
        "_slot",
        "began",
        "empty_at",
        "free_at",
        "leased",
        "limit",
        "name",
        "opened",
        "zero",
    )

    def __init__(self, name: str, limit: int, seconds: int, meter: Meter, since: float = -math.inf) -> None:
        self.name = name
        self.began = since
        self.leased = False
        self.free_at = self.empty_at = 0.0
        self.limit = self._most = limit
        self._elsewhere = 0
        self._meter = meter
        self.zero = meter.reading
        self._since = since
        self._seconds = seconds // SLOTS  # of a slot
        self._slot = 0  # the number of the present one
        self._ends = 0  # the instant at which that is forgotten
        self._past: dict[int, int] = {}  # what was used in those before it, the oldest first
        self.opened = meter.reading

    @property
    def seconds(self) -> int:
        """The length of the window."""
        return self._seconds * SLOTS

    @property
    def used(self) -> int:
        """What was used in all slots that are remembered; what the meter counts is used in the present one."""
        return self._meter.reading - self.zero

    @property
    def most(self) -> int:
        """What may be used here; less than the limit where it is shared with other processes (`allotment.py`)."""
        return self._most

    @most.setter
    def most(self, most: int) -> None:
        self._most = most
        self._meter.aim()

    @property
    def elsewhere(self) -> int:
        """What other processes have used, as far as is known."""
        return self._elsewhere

    @elsewhere.setter
    def elsewhere(self, used: int) -> None:
        self._elsewhere = used
        self._meter.aim()

    @property
    def left(self) -> int:
        """What is left of the limit, below 0 where more was used."""
        return self.limit - self.used - self._elsewhere

    def have(self, limit: int) -> None:
        """Have another limit from now on."""
        self.limit = limit
        self._meter.aim()

    def roll(self, now: float) -> float:
        """Begin the slot of an instant, and forget those that are too old; return the instant of the next one.

        The meter is to aim anew.
        """
        slot = int(now // self._seconds)
        if slot > self._slot:
            reading = self._meter.reading
            if reading > self.opened:
                self._past[self._slot] = reading - self.opened
            self.opened = reading
            while self._past and (oldest := next(iter(self._past))) < slot - SLOTS:
                forgotten = self._past.pop(oldest)
                self.zero += forgotten
                if self.leased:
                    self._most -= forgotten
            self._slot = slot
            self._ends = self._end(slot)
            self.began = max(self._since, slot * self._seconds)
            if now >= self.empty_at:
                self._elsewhere = 0  # nobody has told of it since
        return (self._slot + 1) * self._seconds

    def wait(self, amount: int, now: float) -> float:
        """Return the seconds until so much more fits, 0 for now.

        More than the limit fits in several windows, one after the other.
        """
        if self.used + amount <= self._most:
            return 0.0
        if self.leased:
            if amount <= self.left:
                return SOON
            return max(SOON, self.free_at - now, self._own_wait(amount, self.limit, now))
        return self._own_wait(amount, self._most, now)

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
        """Change what was used at an instant; what is forgotten, or was before it began, stays so.

        The meter is to aim anew.
        """
        slot = int(at // self._seconds)
        if at < self._since:
            return
        if slot in self._past:
            self._past[slot] += by
        elif slot == self._slot:
            self.opened -= by
        else:
            return
        self.zero -= by

    def empty_in(self, second: int) -> int:
        """Return the seconds from an instant, without its part of a second, until nothing is used unless more is."""
        if self._meter.reading > self.opened:
            own = self._ends - second
        elif not self.used:
            own = 0
        else:
            own = self._end(next(slot for slot in reversed(self._past) if self._past[slot])) - second
        return max(own, math.ceil(self.empty_at) - second) if self._elsewhere else own

    def slots(self) -> dict[int, int]:
        """Return what was used in each slot, by its number since the epoch, the oldest first."""
        return {**self._past, self._slot: self._meter.reading - self.opened}

    def restore(self, slots: "Mapping[int, int]", now: float) -> None:
        """Add what was used before the process began; what lies in the future, by a clock that was wrong, is now."""
        self.roll(now)
        merged = self.slots()
        for number, used in slots.items():
            slot = min(number, self._slot)
            if slot >= self._slot - SLOTS:
                merged[slot] = merged.get(slot, 0) + used
        self.zero = self._meter.reading - sum(merged.values())
        self.opened = self._meter.reading - merged.pop(self._slot)
        self._past = dict(sorted(merged.items()))
        self._meter.aim()

    def _end(self, slot: int) -> int:
        """Return the instant at which a slot is forgotten."""
        return (slot + SLOTS + 1) * self._seconds


class Limits:
    """What a key may use, and has used.

    Args:
        config: the limits that are set.
        clock: seconds; it never goes back.
        epoch: what its seconds lack to be those since the epoch.

    Attributes:
        requests, tokens: what is used of each; max_in_flight: requests at once, or None for any number.
        most_in_flight: those that may be here; fewer where other processes have the rest.
        in_flight: requests at once now.
        rolls_at: the instant from which `roll` is due.
        touched: something was used since somebody last set this to False.
        allotment: the part of them that this process holds; None where they are its own.
    """

    __slots__ = (
        "allotment",
        "clock",
        "epoch",
        "in_flight",
        "max_in_flight",
        "most_in_flight",
        "requests",
        "rolls_at",
        "tokens",
        "touched",
    )

    def __init__(self, config: "LimitsConfig", clock: "Callable[[], float]", epoch: float = 0.0) -> None:
        self.clock = clock
        self.epoch = epoch
        self.requests = Meter()
        self.tokens = Meter()
        self.in_flight = 0
        self.touched = False
        self.allotment: Allotment | None = None
        self._set(config, -math.inf)

    def change(self, config: "LimitsConfig") -> None:
        """Have other limits from now on; what was used of those that stay still counts."""
        self._set(config, math.nextafter(self.clock() + self.epoch, math.inf))

    def _set(self, config: "LimitsConfig", since: float) -> None:
        """Have these limits; those that are new begin at an instant."""
        self.rolls_at = 0.0
        for meter, limits in (
            (self.requests, _of("requests", config.requests_per_minute, config.requests_per_day)),
            (self.tokens, _of("tokens", config.tokens_per_minute, config.tokens_per_day)),
        ):
            known = {window.name: window for window in meter.windows}
            for name, limit, _ in limits:
                if (window := known.get(name)) is not None:
                    window.have(limit)
                    if self.allotment is None:
                        window.most = limit
            meter.watch(
                tuple(known.get(name) or Window(name, limit, seconds, meter, since) for name, limit, seconds in limits)
            )
        self.max_in_flight = config.max_in_flight
        if self.allotment is None or config.max_in_flight is None:
            self.most_in_flight = config.max_in_flight

    @property
    def windows(self) -> "tuple[Window, ...]":
        """All windows: of requests, then of tokens."""
        return (*self.requests.windows, *self.tokens.windows)

    def of_a_day(self) -> tuple[Window, ...]:
        """Return its windows of a day: they are worth keeping over a restart."""
        return tuple(window for window in self.windows if window.seconds == DAY)

    def look(self) -> float:
        """Return the instant, at which all windows are as they are to be."""
        now = self.clock() + self.epoch
        if now >= self.rolls_at:
            self.roll(now)
        return now

    def roll(self, now: float) -> None:
        """Have all windows as they are to be at an instant; they are aimed anew once a second."""
        self.rolls_at = float(min([math.floor(now) + 1, *[window.roll(now) for window in self.windows]]))
        self.requests.aim()
        self.tokens.aim()

    def state(self) -> "Iterator[tuple[str, int, int]]":
        """Yield each limit that is set: its name, what may be used, and what is used now, by this process."""
        self.look()
        for window in self.windows:
            yield window.name, window.limit, window.used
        if self.max_in_flight is not None:
            yield "max_in_flight", self.max_in_flight, self.in_flight


class _Cut:
    """A reservation of more tokens than the smallest of the limits, each of which has its own part of it.

    Attributes:
        tokens: all limits have these.
    """

    def __init__(self, meter: Meter, tokens: int) -> None:
        self._meter = meter
        self.tokens = smallest = int(meter.smallest)
        self._more = [(window, min(tokens, window.limit) - smallest) for window in meter.windows]

    def fits(self) -> bool:
        """Return whether it fits in the limits that are larger."""
        return all(window.used + self.tokens + more <= window.most for window, more in self._more)

    def change(self, at: float, times: int) -> None:
        """Use what the larger limits have beyond the smallest, or less of it."""
        for window, more in self._more:
            window.change(at, times * more)
        self._meter.aim()


class Reservation(Struct, eq=False):
    """What one request needs of its key's limits: taken before it is forwarded, settled by what it has used.

    Attributes:
        limits: of the key.
        tokens: reserved; those beyond a limit are cut to it.
    """

    limits: Limits
    tokens: int
    _taken_at: float | None = None
    _cut: "_Cut | None" = None

    def take(self) -> float | None:
        """Take it: None. Where it does not fit, return the seconds until it may; 0: when another request ends."""
        limits, tokens = self.limits, self.tokens
        now = limits.clock() + limits.epoch
        if now >= limits.rolls_at:  # as `look` does: a call less at each request
            limits.roll(now)
        of_requests, of_tokens = limits.requests, limits.tokens
        cut = None
        if tokens > of_tokens.smallest:
            cut = _Cut(of_tokens, tokens)
            tokens = cut.tokens
        if (
            of_requests.reading >= of_requests.bound
            or of_tokens.reading + tokens > of_tokens.bound
            or (limits.most_in_flight is not None and limits.in_flight >= limits.most_in_flight)
            or (cut is not None and not cut.fits())
        ):
            return self._wait(now)
        of_requests.reading += 1
        of_tokens.reading += tokens
        if cut is not None:
            self._cut = cut
            cut.change(now, 1)
        limits.in_flight += 1
        limits.touched = True
        self._taken_at = now
        return None

    def _wait(self, now: float) -> float:
        limits = self.limits
        if limits.allotment is not None:
            limits.allotment.lacks(self)
            return SOON
        waits = [window.wait(1, now) for window in limits.requests.windows]
        waits += [window.wait(min(self.tokens, window.limit), now) for window in limits.tokens.windows]
        return max(waits, default=0.0)

    def ask(self) -> "Future[None] | None":
        """Ask for what it lacks, where other processes may hold it; None where that makes no sense (now).

        Returns:
            What is done when an answer has come, or none will.
        """
        allotment = self.limits.allotment
        return allotment.ask(self) if allotment is not None else None

    def in_vain(self, wait: float) -> RateLimitExceeded | None:
        """Return why it cannot be taken within so many seconds, where other processes have used what it lacks."""
        if self.limits.allotment is None:
            return None
        refusal = self.refusal()
        return refusal if refusal is not None and refusal.wait > wait else None

    def settle(self, tokens: int) -> None:
        """Use so many tokens in place of those reserved; the request has ended. Once, after it was taken.

        What becomes free was used when it was taken, and is forgotten with that; what is used beyond it is used now.
        """
        at, limits = self._taken_at, self.limits
        if at is None:
            raise RuntimeError("nothing is taken")
        self._taken_at = None
        limits.in_flight -= 1
        limits.touched = True
        of_tokens, more = limits.tokens, tokens - self.tokens
        if self._cut is not None:
            more = tokens - self._cut.tokens
            self._cut.change(at, -1)
        if more > 0:
            limits.look()
            of_tokens.reading += more
        elif at >= of_tokens.began:
            of_tokens.reading += more
            if of_tokens.reading <= of_tokens.opened:
                of_tokens.told = None
        else:
            of_tokens.change(at, more)

    def give_back(self) -> None:
        """Give all of it back: the request was never forwarded."""
        at = self._taken_at
        self.settle(0)
        if at is not None:
            self.limits.requests.change(at, -1)

    def refusal(self, ahead: "Iterable[Reservation]" = ()) -> RateLimitExceeded | None:
        """Return why it cannot be taken now, by the limit that lets it wait longest; None if it can.

        Args:
            ahead: those of the same key that are taken before it.
        """
        limits, now = self.limits, self.limits.look()
        queue = [*ahead, self]
        waits = [(window.wait(len(queue), now), window) for window in limits.requests.windows]
        waits += [
            (window.wait(sum(min(each.tokens, window.limit) for each in queue), now), window)
            for window in limits.tokens.windows
        ]
        waits = [each for each in waits if each[0]]
        if waits:
            wait, window = max(waits, key=itemgetter(0))
            needed = 1 if window in limits.requests.windows else min(self.tokens, window.limit)
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


def _of(what: str, per_minute: int | None, per_day: int | None) -> list[tuple[str, int, int]]:
    """Return the limits of a kind that are set: name, limit, seconds."""
    limits = ((f"{what}_per_minute", per_minute, MINUTE), (f"{what}_per_day", per_day, DAY))
    return [(name, limit, seconds) for name, limit, seconds in limits if limit is not None]
