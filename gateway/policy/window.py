"""A limit's window: what was used of it lately, in slots of time; and the meter that all windows of a kind share.

Instants are seconds since the epoch of an injected clock that never goes back; those that each request compares are
floats, since a float and an integer take several times as long.
"""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

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
