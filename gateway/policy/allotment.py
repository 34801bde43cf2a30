"""What a process holds of the limits of a key that it shares with others: spent from memory, leased in the background.

The ledger (`ledger.py`) grants it; who carries the reports there is not known here. Where the ledger cannot be asked,
the process goes on with its share: what it had used and held, and its portion of what was left, when it last could.
"""

import math
from typing import TYPE_CHECKING

from gateway.policy.ledger import LIVES, Answer, Asked, Report, ledger_shift
from gateway.policy.window import SLOTS, SOON

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable

    from gateway.policy.ledger import Granted
    from gateway.policy.limits import Limits, Reservation
    from gateway.policy.window import Window

INTERVAL = 0.2
"""Seconds between two reports of a key that is used."""
HOLDING = 0.5
"""Seconds between two of a key that is not used, but of which something is held: leases are kept by them."""
KEEPS = 60.0
"""Seconds after its last use for which something of a key is held."""
MEMORY = 1.0
"""Seconds over which the rate of use is taken, about."""
AHEAD = 2.0
"""Seconds of use at this rate that are held; while it is scarce, as much as was used since the last report."""
RESERVE = 20
"""So many-th part of the limit is held at least, while it is not scarce."""
PEAK = 10.0
"""Seconds for which the most requests in flight are remembered, about."""
MOST_OFF = 1.0
"""Seconds that the clock of the ledger may drift before the slots are counted anew."""


class _Windowed:
    """A window, and what is known of it at the ledger."""

    def __init__(self, window: "Window") -> None:
        self.window = window
        self.name, self.seconds = window.name, window.seconds
        self.share: int | None = None
        self.share_of = 1
        self.scarce = False
        self.changes: list[tuple[int, int]] = []
        """Those of the batch that is on its way, by our own slots."""
        self._rate = 0.0
        self._spent = 0
        self._reported: dict[int, int] = {}
        self._seen: dict[int, int] = {}

    @property
    def limit(self) -> int:
        return self.window.limit

    @property
    def free(self) -> int:
        return self.window.most - self.window.used

    @property
    def held(self) -> int:
        return 0

    @property
    def counted(self) -> bool:
        """Whether the ledger has something of it that counts."""
        return any(self._reported.values())

    def need(self, lacking: "set[Reservation]") -> int:
        needs = (1 if self.name.startswith("requests") else min(each.tokens, self.limit) for each in lacking)
        return min(self.limit, sum(needs))

    def look(self, elapsed: float) -> None:
        """Take in what was used since the last report."""
        slots = self.window.slots()
        self._spent = sum(max(0, used - self._seen.get(slot, 0)) for slot, used in slots.items())
        self._seen = slots
        self._rate = self._rate * math.exp(-elapsed / MEMORY) + self._spent / MEMORY

    def target(self, *, kept: bool) -> int:
        """Return what is to be held beside what is needed now; `kept`: the key was used lately."""
        if self.scarce:
            return self._spent
        return max(math.ceil(self._rate * AHEAD), self.limit // RESERVE if kept else 0)

    def collect(self) -> None:
        """Begin a batch of changes."""
        slots = self.window.slots()
        oldest = max(slots) - SLOTS
        self._reported = {slot: used for slot, used in self._reported.items() if slot >= oldest}
        self.changes = [
            (slot, more)
            for slot in sorted(slots.keys() | self._reported.keys())
            if (more := slots.get(slot, 0) - self._reported.get(slot, 0))
        ]

    def reported(self) -> None:
        """The batch has come to the ledger."""
        for slot, more in self.changes:
            self._reported[slot] = self._reported.get(slot, 0) + more
        self.changes = []

    def forgotten(self) -> None:
        """The ledger knows nothing of it any more."""
        self._reported, self.changes = {}, []

    def granted(self, granted: "Granted", now: float, *, used: int) -> None:
        """Take in an answer; `used`: what was used here when it was asked for."""
        window = self.window
        window.most = granted.more + (window.most if window.leased else used)
        window.leased = True
        self.share, self.share_of = window.most + granted.portion, self.limit
        self.told(granted, now)

    def told(self, granted: "Granted", now: float) -> None:
        """Take in what an answer tells about the others."""
        oldest = max(self.window.slots()) - SLOTS
        own = sum(used for slot, used in self._reported.items() if slot >= oldest)
        self.window.elsewhere = max(0, granted.used - own)
        self.window.free_at, self.window.empty_at = now + granted.wait, now + granted.empty_in
        self.scarce = granted.scarce

    def give_back(self, keep: int) -> None:
        self.window.most = self.window.used + keep

    def lease(self) -> None:
        self.window.leased, self.window.most = True, self.window.used

    def go_on_with(self, most: int) -> None:
        self.window.leased, self.window.most = False, most

    @property
    def used(self) -> int:
        return self.window.used


class _InFlight:
    """The requests in flight, and what is known of them at the ledger."""

    name, seconds, counted = "max_in_flight", 0, False

    def __init__(self, limits: "Limits") -> None:
        self._limits = limits
        self.share: int | None = None
        self.share_of = 1
        self.scarce = False
        self.changes: list[tuple[int, int]] = []
        self._peak = 0.0

    @property
    def limit(self) -> int:
        return self._limits.max_in_flight or 1

    @property
    def used(self) -> int:
        return self._limits.in_flight

    @property
    def held(self) -> int:
        return self._limits.in_flight

    @property
    def most(self) -> int:
        return self._limits.most_in_flight or 0

    @property
    def free(self) -> int:
        return self.most - self.used

    def need(self, lacking: "set[Reservation]") -> int:
        return min(self.limit, len(lacking))

    def look(self, elapsed: float) -> None:
        self._peak = max(self.used, self._peak * math.exp(-elapsed / PEAK))

    def target(self, *, kept: bool) -> int:
        if self.scarce:
            return max(0, self.free) // 2  # more may be in flight than its share
        return max(math.ceil(self._peak * 1.25) - self.used, self.limit // RESERVE if kept else 0, 0)

    def collect(self) -> None:
        """Nothing of it is counted over time."""

    reported = forgotten = collect

    def granted(self, granted: "Granted", now: float, *, used: int) -> None:
        leased = self._limits.allotment is not None and self._limits.allotment.leased
        most = granted.more + (self.most if leased else used)
        self._may_be(most)
        self.share, self.share_of = most + granted.portion, self.limit
        self.told(granted, now)

    def told(self, granted: "Granted", _now: float) -> None:
        self.scarce = granted.scarce

    def give_back(self, keep: int) -> None:
        self._may_be(self.used + keep)

    def lease(self) -> None:
        self._may_be(self.used)

    def go_on_with(self, most: int) -> None:
        self._may_be(most)

    def _may_be(self, most: int) -> None:
        if self._limits.max_in_flight is not None:  # else the limit has gone since the ledger was asked
            self._limits.most_in_flight = most


class Allotment:
    """What this process holds of the limits of one key. `report`, then `answered` or `unanswered`, by turns.

    Args:
        limits: of the key; from now on they hold no more than is held of them.
        process: its id at the ledger; no other has the same.
        fallback: the part of a limit that may be used where the ledger never answered.
        asked: called when something is needed at once; it returns what is done with the next answer, or failure.

    Attributes:
        leased: whether what is held was granted; else the ledger cannot be asked, and the share holds.
        at_once: the last answer asks for a report at once.
    """

    def __init__(
        self, limits: "Limits", process: str, fallback: float, asked: "Callable[[Allotment], Future[None]]"
    ) -> None:
        self._limits = limits
        self._process = process
        self._fallback = fallback
        self._asked = asked
        self._parts: list[_Windowed | _InFlight] = []
        self._reporting: list[_Windowed | _InFlight] = []
        self._lacking: set[Reservation] = set()
        self._number = 0
        self._batch = 0
        self._epoch = ""
        self._offset = 0.0
        self._under_way: Report | None = None
        self._used: list[int] = []
        self._at = self._last_use = limits.look() - KEEPS
        self._answered_at = -math.inf
        self._none_until = 0.0
        self._behind = False
        self._asks = False
        self.at_once = False
        self.leased = False
        limits.allotment = self
        self.follow()

    def follow(self) -> None:
        """Take in that the key has other limits, or the same with other numbers."""
        known = {part.window: part for part in self._parts if isinstance(part, _Windowed)}
        in_flight = [part for part in self._parts if isinstance(part, _InFlight)]
        before = self._parts
        self._parts = [known.get(window) or _Windowed(window) for window in self._limits.windows]
        if self._limits.max_in_flight is not None:
            self._parts += in_flight or [_InFlight(self._limits)]
        for part in self._parts:
            if part not in before and self.leased:
                part.lease()
            elif not self.leased:
                part.go_on_with(self._share(part))

    def lacks(self, reservation: "Reservation") -> None:
        """Note what could not be taken; the next report asks for it."""
        if self.leased:
            self._lacking.add(reservation)

    def ask(self, reservation: "Reservation") -> "Future[None] | None":
        """Ask for it at once; None where the ledger cannot be asked, or has just said that there is no more."""
        if not self.leased or self._limits.look() < self._none_until:
            return None
        self._lacking.add(reservation)
        return self._asked(self)

    def due(self, now: float) -> bool:
        """Return whether a report is due."""
        limits = self._limits
        if limits.touched or self._lacking or self._behind:
            return now >= self._at + INTERVAL
        held = [part for part in self._parts if part.free > 0] if self.leased else []
        often = any(part.scarce for part in held)
        return bool(limits.in_flight or held) and now >= self._at + (INTERVAL if often else HOLDING)

    @property
    def known(self) -> bool:
        """Whether the ledger has ever answered."""
        return bool(self._epoch)

    @property
    def counted(self) -> bool:
        """Whether the ledger must have something of it: if it has been emptied, that is reported anew."""
        return bool(self._limits.in_flight) or any(part.counted for part in self._parts)

    def report(self, new_epoch: str) -> Report:
        """Return the next report. What it gives back may not be spent any more."""
        limits, again = self._limits, any(part.changes for part in self._parts)
        now = limits.look()
        elapsed, self._at = now - self._at, now
        if limits.touched:
            self._last_use = now
        limits.touched = False
        kept = now < self._last_use + KEEPS
        catching_up = again or not self._epoch
        if not catching_up:
            self._batch += 1
        self._behind = catching_up  # what was used since is in the next one
        asked = []
        for part in self._parts:
            part.look(elapsed)
            keep = want = need = 0
            if self.leased and elapsed < LIVES - HOLDING:  # else it has ended, and may be somebody else's
                keep = want = max(0, part.free)
            if not catching_up:
                part.collect()
            if not catching_up and self._asks:
                need = part.need(self._lacking)
                want = min(part.limit, need + part.target(kept=kept))
                keep = min(keep, want)
            if self.leased:  # more may have been used than was held: that is the ledger's from here on
                part.give_back(max(0, min(keep, part.free)))
            shift = ledger_shift(self._offset, part.seconds) if part.seconds else 0
            changes = [(slot + shift, by) for slot, by in part.changes]
            asked.append(Asked(part.name, part.limit, part.seconds, part.held, keep, want, need, changes))
        if not catching_up:
            self._lacking.clear()
        self._reporting = list(self._parts)
        self._used = [part.used for part in self._parts]
        self._number += 1
        lost = bool(self._epoch) and self.counted
        self._under_way = Report(self._process, self._number, self._batch, self._epoch, new_epoch, lost, asked)
        return self._under_way

    def answered(self, answer: Answer) -> None:
        """Take in the answer to the last report."""
        report, now = self._under_way, self._limits.look()
        if report is None:
            raise RuntimeError("nothing was reported")
        self._under_way = None
        self.at_once = answer.epoch != self._epoch or (self._behind and not answer.settling)
        offset = answer.time - self._at  # rather too much: what was used is not forgotten too early
        if not self._epoch or abs(offset - self._offset) > MOST_OFF:
            self._offset = offset
        if answer.epoch != self._epoch:
            self._begin_anew(answer.epoch, lost=report.lost)
            return
        for part in self._reporting:
            part.reported()
        if answer.settling or self._behind or not self._asks:
            if answer.settling and self.leased:
                self.go_on()
            self._behind = self._behind or answer.settling
            for part, granted in zip(self._reporting, answer.limits, strict=False):
                part.told(granted, now)
            return
        self._take_in(report, answer, now)

    def _begin_anew(self, epoch: str, *, lost: bool) -> None:
        """Report all that counts to a ledger that does not know it."""
        if lost:
            self.go_on()  # until the others have reported, too
        self._epoch = epoch
        self._behind = True
        for part in self._parts:
            part.forgotten()

    def _take_in(self, report: Report, answer: Answer, now: float) -> None:
        """Take in what was granted."""
        unmet = False
        for part, asked, granted, used in zip(self._reporting, report.limits, answer.limits, self._used, strict=True):
            part.granted(granted, now, used=used)
            unmet = unmet or asked.keep + granted.more < asked.need
        self.leased = True
        self._answered_at = now
        self._none_until = now + SOON if unmet else 0.0

    def go_on(self) -> None:
        """Go on with the share: the ledger cannot be asked. One that was not kept may be somebody else's by now."""
        self.leased = False
        self._lacking.clear()
        for part in self._parts:
            part.go_on_with(self._share(part))

    def _share(self, part: _Windowed | _InFlight) -> int:
        """Return it; of a limit that has changed since it was granted it is the same part."""
        lost = self._limits.look() > self._answered_at + LIVES
        if part.share is None or lost:
            return max(1, int(part.limit * self._fallback))
        return max(1, part.share * part.limit // part.share_of)

    def catch_up(self) -> None:
        """Report what was used without the ledger, and go on with the share until `come_back`: others report, too."""
        self._asks = False
        self._behind = self._limits.touched or self.counted

    def come_back(self) -> None:
        """Lease (again): the ledger can be asked."""
        self._asks = True
        if not self.leased and (self._limits.touched or self.counted):
            self._behind = True  # what was used without it is reported first
        elif not self.leased:
            self.leased = True
            for part in self._parts:
                part.lease()

    def leave(self) -> Report:
        """Return a last report that gives back all."""
        self._last_use = -math.inf
        report = self.report("")
        given_back = [Asked(each.name, each.limit, each.seconds, 0, 0, 0, 0, each.changes) for each in report.limits]
        return Report(report.process, report.number, report.batch, report.epoch, "", False, given_back)
