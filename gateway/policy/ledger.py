"""The ledger of a key that several processes share: what all have used of its limits, and what each still holds.

Each process leases a part of what is left (`allotment.py`), spends it from memory, and reports. The invariant: what
was used in the window, and what the processes hold and have not spent, is together no more than the limit. So a process
never asks before it spends what it holds. `limits_ledger.lua` is the same in a store; tests compare the two.
"""

import math
from typing import TYPE_CHECKING

from msgspec import Struct

from gateway.policy.window import DAY, SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

LIVES = 30.0
"""Seconds after its last report until what a process holds, and its requests in flight, count no more."""
FORGOTTEN = 600.0
"""Seconds after its last report until a process is unknown."""
SETTLES = 3.0
"""Seconds in which those who find the ledger emptied report what they have used, before it grants anything."""
SLOWING = 95
"""Per cent of a process's pace that stay at each report, if it uses less."""
SCARCE = 10
"""What is left is scarce below this part of the limit."""


class Asked(Struct, array_like=True, frozen=True):
    """What a process reports of one limit, and asks for.

    Attributes:
        name: of the limit. limit: what all may use. seconds: the length of its window; 0: of requests in flight.
        held: requests in flight; 0 for a window.
        keep: what the process holds and has not spent; it gives back the rest of what it was granted.
        want: what it would like to hold. need: what it must hold for those who wait now.
        changes: of what was used, by the number of the slot since the epoch.
    """

    name: str
    limit: int
    seconds: int
    held: int
    keep: int
    want: int
    need: int
    changes: list[tuple[int, int]]


class Report(Struct, array_like=True, frozen=True):
    """What a process reports of one key.

    Attributes:
        process: its id. number: of the report; one that comes after a later one is not read.
        batch: of the changes; the same are reported again, by the same number, until an answer comes.
        epoch: of the ledger that the process has reported to; "" for none.
        new_epoch: of a ledger that begins with this report.
        lost: the process has reported changes that still count, and would be lost with an older ledger.
        limits: of the key.
    """

    process: str
    number: int
    batch: int
    epoch: str
    new_epoch: str
    lost: bool
    limits: list[Asked]


class Granted(Struct, array_like=True, frozen=True):
    """The answer for one limit.

    Attributes:
        more: to hold, in addition to what the process keeps.
        portion: of what is left, if the ledger cannot be asked any more; those of all are together no more than it.
        used: by all, the process included.
        wait: seconds until what is needed, at least 1, may be granted; 0: it was, or others hold it, who give it back
            when they are asked.
        empty_in: seconds until nothing is used any more.
        scarce: who holds what it does not need gives it back.
    """

    more: int
    portion: int
    used: int
    wait: float
    empty_in: float
    scarce: bool


class Answer(Struct, array_like=True, frozen=True):
    """What the ledger answers to a report.

    Attributes:
        time: by the clock of the ledger, seconds since the epoch.
        epoch: of the ledger. Another than that of the report: nothing was read, and all is to be reported anew.
        settling: others may have yet to report; nothing is granted.
        limits: in the order of the report.
    """

    time: float
    epoch: str
    settling: bool
    limits: list[Granted]


class _Hold:
    """What a process holds of one limit. `pace` is about the most that it uses between two reports."""

    __slots__ = ("free", "held", "pace", "portion", "unmet", "want")

    def __init__(self) -> None:
        self.free = 0
        self.pace = 0
        self.portion = 0
        self.held = 0
        self.want = 0
        self.unmet = 0


class _Process:
    __slots__ = ("batch", "holds", "number", "seen", "sender")

    def __init__(self, sender: int) -> None:
        self.sender = sender
        self.number = 0
        self.batch = 0
        self.seen = 0.0
        self.holds: dict[str, _Hold] = {}


class Used:
    """What was used of one limit by all, in slots of time, as `limits.Window` has them."""

    __slots__ = ("_slots", "name", "seconds")

    def __init__(self, name: str, seconds: int) -> None:
        self.name = name
        self.seconds = seconds
        self._slots: dict[int, int] = {}

    def slots(self) -> dict[int, int]:
        """Return what was used in each slot, by its number since the epoch."""
        return self._slots

    def restore(self, slots: "Mapping[int, int]", now: float) -> None:
        """Add what was used before the process began."""
        self.add(slots.items(), now)

    def add(self, changes: "Iterable[tuple[int, int]]", now: float) -> None:
        """Take in changes; slots that are over are forgotten."""
        present = int(now // (self.seconds // SLOTS))
        slots: dict[int, int] = {}
        for number, amount in [*self._slots.items(), *changes]:
            slot = min(number, present + 1)  # a clock that was set back must not keep it for longer
            if slot >= present - SLOTS:
                slots[slot] = slots.get(slot, 0) + amount
        self._slots = slots

    def whole(self, now: float) -> int:
        """Return what counts now."""
        oldest = int(now // (self.seconds // SLOTS)) - SLOTS
        return max(0, sum(amount for slot, amount in self._slots.items() if slot >= oldest))


class Ledger:
    """The ledger of one key, in memory.

    Args:
        clock: seconds since the epoch.
        days: the names of its limits of a day, if they are known.

    Attributes:
        touched: something was used of those of a day since somebody last set this to False.
    """

    def __init__(self, clock: "Callable[[], float]", days: "Iterable[str]" = ()) -> None:
        self._clock = clock
        self.touched = False
        self._epoch = ""
        self._created = 0.0
        self._settled_at = 0.0
        self._processes: dict[str, _Process] = {}
        self._used = {name: Used(name, DAY) for name in days}

    def of_a_day(self) -> tuple[Used, ...]:
        """Return what was used of its limits of a day."""
        return tuple(used for used in self._used.values() if used.seconds == DAY)

    def used(self) -> dict[str, int]:
        """Return what was used of each limit that has a window."""
        now = self._clock()
        return {name: used.whole(now) for name, used in self._used.items()}

    def is_over(self) -> bool:
        """Return whether nothing is known any more that counts."""
        self._forget(self._clock())
        return not self._processes and not any(self.used().values())

    def ended(self, sender: int) -> None:
        """Take back what the processes of a sender hold: they have ended.

        What they have used since their last report nobody knows. It counts as about the most that they used between two
        reports, and is no more than they held.
        """
        now = self._clock()
        for name, process in list(self._processes.items()):
            if process.sender != sender:
                continue
            del self._processes[name]
            for limit, hold in process.holds.items():
                used = self._used.get(limit)
                if used is not None and (lost := min(hold.free, hold.pace)):
                    used.add([(int(now // (used.seconds // SLOTS)), lost)], now)
                    self.touched = self.touched or used.seconds == DAY

    def exchange(self, report: Report, sender: int = 0) -> Answer:
        """Take in a report, and grant what may be granted; `sender`: whoever has this process."""
        now = self._clock()
        if not self._epoch:
            self._epoch, self._created = report.new_epoch, now
        if report.epoch != self._epoch:
            if report.lost and now < self._created + SETTLES:
                self._settled_at = self._created + SETTLES
            return Answer(now, self._epoch, settling=True, limits=[])
        me = self._processes.setdefault(report.process, _Process(sender))
        if report.number <= me.number:
            return Answer(now, self._epoch, settling=True, limits=[])
        me.number, me.seen = report.number, now
        changed = report.batch > me.batch
        me.batch = max(report.batch, me.batch)
        self._forget(now)
        settling = now < self._settled_at
        granted = [self._grant(asked, me, now, changed=changed, settling=settling) for asked in report.limits]
        return Answer(now, self._epoch, settling=settling, limits=granted)

    def _forget(self, now: float) -> None:
        """End the leases of processes that report no more."""
        for name, process in list(self._processes.items()):
            if now > process.seen + FORGOTTEN:
                del self._processes[name]
            elif now > process.seen + LIVES:
                process.holds = {}

    def _grant(self, asked: Asked, me: _Process, now: float, *, changed: bool, settling: bool) -> Granted:
        mine = me.holds.setdefault(asked.name, _Hold())
        mine.held, mine.want = asked.held, asked.want
        holds = [each.holds[asked.name] for each in self._processes.values() if asked.name in each.holds]
        slots: dict[int, int] = {}
        if asked.seconds:
            spent = self._take_in(asked, now, changed=changed)
            mine.pace = max(spent, asked.need, mine.pace * SLOWING // 100)
            slots = self._used[asked.name].slots()
            used = max(0, sum(slots.values()))
        else:
            used = sum(hold.held for hold in holds)
        others = [hold for hold in holds if hold is not mine]
        room = asked.limit - used - asked.keep - sum(hold.free for hold in others)
        more = 0
        if not settling:
            fair = 0
            if not any(hold.unmet for hold in others):
                fair = room * asked.want // max(1, sum(hold.want for hold in holds))
            more = max(0, min(room, max(asked.want, asked.need) - asked.keep, max(asked.need - asked.keep, fair)))
        mine.free = asked.keep + more
        mine.unmet = max(0, asked.need - mine.free)
        left = max(0, room - more)
        weight = (1 / len(holds) + (asked.want + 1) / sum(hold.want + 1 for hold in holds)) / 2
        mine.portion = max(0, min(int(left * weight), left - sum(hold.portion for hold in others)))
        scarce = left * SCARCE < asked.limit or any(hold.unmet for hold in holds)
        over = used + max(asked.need, 1) - asked.limit
        wait, empty_in = _ends(slots, over, asked.seconds / SLOTS, now)
        return Granted(more, mine.portion, used, wait, empty_in, scarce)

    def _take_in(self, asked: Asked, now: float, *, changed: bool) -> int:
        """Take in what a process has used; return how much."""
        used = self._used.setdefault(asked.name, Used(asked.name, asked.seconds))
        changes = asked.changes if changed else []
        used.add(changes, now)
        if changes and used.seconds == DAY:
            self.touched = True
        return sum(amount for _, amount in changes)


def _ends(slots: dict[int, int], over: int, length: float, now: float) -> tuple[float, float]:
    """Return the seconds until so much of what was used is forgotten, and until all of it is."""
    wait = empty_in = 0.0
    for slot in sorted(slots):
        if slots[slot] > 0:
            empty_in = max(0.0, (slot + SLOTS + 1) * length - now)
            if over > 0:
                over -= slots[slot]
                wait = empty_in
    if over > 0 and slots:
        wait = (SLOTS + 1) * length
    return wait, empty_in


def ledger_shift(offset: float, seconds: int) -> int:
    """Return how many slots later the ledger counts what a process has used in one of its own.

    The end of a slot, by the process's clock, lies in that slot of the ledger: so nothing is forgotten too early,
    and at most one slot too late.

    Args:
        offset: seconds that the clock of the ledger is ahead.
        seconds: the length of the window.
    """
    return math.floor(offset / (seconds // SLOTS)) + 1
