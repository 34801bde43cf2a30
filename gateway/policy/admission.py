"""How many requests are handled at once, and the bounded queue in front of them."""

import asyncio
from collections import deque
from typing import TYPE_CHECKING

from gateway.errors import GatewayDraining, GatewayOverloaded, RateLimitExceeded
from gateway.phase_timer import PhaseTimer
from gateway.policy.waiting_room import WaitingLimit

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.policy.limits import Reservation

LEAST_WAIT = 0.001
"""Seconds until the queue is looked at again, at least."""


class _Place:
    """A place in the queue."""

    __slots__ = ("caller", "reservation", "slot")

    def __init__(self, caller: str, reservation: "Reservation | None") -> None:
        self.caller = caller
        self.reservation = reservation
        self.slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Admission:
    """At most `max_in_flight` requests at once; up to `max_queue` more wait, each at most `queue_timeout` seconds.

    A slot that becomes free goes straight to one who waits: to one caller after the other, and of each to the first in
    its line. One caller has at most half of the slots, so that the rest is for others; and whoever waits with more
    requests than anybody else makes room in a full queue. A caller without a name is nobody in particular, and has all
    slots. Together with the slot a request takes what it needs of its key's limits: its reservation.

    Attributes:
        in_flight: requests that have a slot.
        queued: requests that wait for one.
        stopping: whether the gateway is about to stop: nobody new should come, and no connection is kept.
        draining: whether it takes no more requests.
        short: is called where all slots are taken, or the queue is full; None: nobody could give more.
        waiting: the requests with a slot that wait for a backend; they take at most half of the slots and of the bytes.
    """

    def __init__(
        self, *, max_in_flight: int, max_queue: int, queue_timeout: float, max_buffered: int = 1 << 28
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._lines: dict[str, deque[_Place]] = {}  # of each caller who waits; whose turn is next comes first
        self._next_look: asyncio.TimerHandle | None = None
        self._slots_of: dict[str, int] = {}
        self._slots_of_one = max(1, max_in_flight // 2)
        self._asking = 0
        self.short: Callable[[], None] | None = None
        self.in_flight = 0
        self.queued = 0
        self.stopping = False
        self.draining = False
        self.waiting = WaitingLimit(max_requests=max(1, max_in_flight // 2), max_bytes=max_buffered // 2)

    def resize(self, *, max_in_flight: int, max_queue: int, max_buffered: int) -> None:
        """Have other limits from now on; what is under way and who waits stays."""
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._slots_of_one = max(1, max_in_flight // 2)
        self.waiting.resize(max_requests=max(1, max_in_flight // 2), max_bytes=max_buffered // 2)
        if self._lines:
            self._hand_over()

    def check_open(self) -> None:
        """Refuse a request while the gateway is stopping. Raises: GatewayDraining."""
        if self.draining:
            raise GatewayDraining

    def check(self, caller: str = "") -> None:
        """Refuse a request that could not even queue, before its body is read.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: all slots that the caller may have are taken, and so is the queue.
        """
        self.check_open()
        if self.queued >= self._max_queue and not self._has_slot(caller) and self._longest_line(caller) is None:
            self._ask_for_more()
            raise self._queue_full()

    def enter_at_once(self, caller: str = "", reservation: "Reservation | None" = None) -> bool:
        """Take a free slot, and the reservation; False when there is none, or it does not fit.

        Then, and when the gateway is stopping, `enter` waits or refuses.
        """
        if self.draining or not self._has_slot(caller):
            return False
        if reservation is not None and (caller in self._lines or reservation.take() is not None):
            return False
        self._occupy(caller)
        return True

    def limit_in_the_way(self, caller: str, reservation: "Reservation | None") -> str | None:
        """Return the limit of its key that a request waits for where there is a slot for it, or None."""
        if reservation is None or not self._has_slot(caller):
            return None
        refusal = reservation.refusal(self._ahead_of(caller, reservation))
        return refusal.limit if refusal is not None else None

    async def enter(self, left: float, caller: str = "", reservation: "Reservation | None" = None) -> None:
        """Take a slot, and the reservation, waiting in the queue at most `left` seconds. `leave` gives the slot back.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: the queue is full, or the wait took longer than `queue_timeout`.
            RateLimitExceeded: the reservation does not fit in that time.
            DeadlineExceeded: `left` ended first.
        """
        self.check(caller)
        if self.enter_at_once(caller, reservation):
            return
        self._ask_for_more()
        if reservation is not None:
            if (answer := reservation.ask()) is not None:
                await self._wait_for(answer, left)
                self.check(caller)
                if self.enter_at_once(caller, reservation):
                    return
            refusal = reservation.refusal(self._ahead_of(caller, reservation))
            if refusal is not None and refusal.wait > min(self._queue_timeout, left):
                raise refusal
        place = self._queue(caller, reservation)
        loop = asyncio.get_running_loop()
        timer = PhaseTimer(loop.time, loop.time() + left, "The deadline passed while the request waited in the queue.")
        timer.limit(self._queue_timeout, lambda: self._queued_too_long(place))
        with timer:
            try:
                await place.slot
            except BaseException:
                self._give_up(place)
                raise

    async def _wait_for(self, answer: "asyncio.Future[None]", left: float) -> None:
        """Wait until it is known what other processes leave, at most as long as in the queue; `left` is checked there.

        As many as may queue may wait so; the others go on with what is known.
        """
        if self._asking >= self._max_queue:
            return
        self._asking += 1
        try:
            await asyncio.wait([answer], timeout=min(self._queue_timeout, left))
        finally:
            self._asking -= 1

    def leave(self, caller: str = "") -> None:
        """Give the slot back: to one who waits and may have it."""
        self.in_flight -= 1
        if caller:
            left = self._slots_of[caller] - 1
            if left:
                self._slots_of[caller] = left
            else:
                del self._slots_of[caller]
        if self._lines:
            self._hand_over()

    def look_again(self) -> None:
        """Let those who wait for a limit of their key go on, or give up, where it has changed."""
        if self._lines:
            self._look_no_more()
            self._look()

    def announce_stop(self) -> None:
        """Tell whoever asks that the gateway will stop; requests are taken as ever."""
        self.stopping = True

    def drain(self) -> None:
        """Refuse new and queued requests from now on; requests in flight continue."""
        self.stopping = self.draining = True
        self.waiting.drain()
        for line in self._lines.values():
            for place in line:
                if not place.slot.done():
                    place.slot.set_exception(GatewayDraining())
        self._lines.clear()
        self.queued = 0
        self._look_no_more()

    def _ask_for_more(self) -> None:
        if self.short is not None and (self.in_flight >= self._max_in_flight or self.queued >= self._max_queue):
            self.short()

    def _has_slot(self, caller: str) -> bool:
        """Return whether a slot is free that the caller may have."""
        return self.in_flight < self._max_in_flight and self._slots_of.get(caller, 0) < self._slots_of_one

    def _occupy(self, caller: str) -> None:
        self.in_flight += 1
        if caller:
            self._slots_of[caller] = self._slots_of.get(caller, 0) + 1

    def _ahead_of(self, caller: str, reservation: "Reservation") -> "list[Reservation]":
        """Return what is taken before a reservation by those who wait in the line of its caller."""
        ahead = []
        for place in self._lines.get(caller, ()):
            if place.reservation is reservation:
                break
            if place.reservation is not None:
                ahead.append(place.reservation)
        return ahead

    def _queue(self, caller: str, reservation: "Reservation | None") -> _Place:
        """Return a place at the end of the caller's line, in a full queue in place of the last in the longest line.

        Raises:
            GatewayOverloaded, RateLimitExceeded: the queue is full, and no line is longer.
        """
        if self.queued >= self._max_queue:
            longest = self._longest_line(caller)
            if longest is None:
                raise self._why_not(caller, reservation, self._queue_full())
            last = longest.pop()
            self.queued -= 1
            if not last.slot.done():
                last.slot.set_exception(self._queue_full())
        place = _Place(caller, reservation)
        self._lines.setdefault(caller, deque()).append(place)
        self.queued += 1
        if reservation is not None:
            self._hand_over()  # finds out when it may be its turn
        return place

    def _longest_line(self, caller: str) -> "deque[_Place] | None":
        """Return the longest line, if it stays no shorter than the caller's when its last place goes to the caller."""
        longest = max(self._lines.values(), key=len, default=None)
        mine = len(self._lines.get(caller, ()))
        return longest if longest is not None and len(longest) > mine + 1 else None

    def _hand_over(self) -> None:
        """Give what is free to those who wait: one caller after the other, of each the first in its line."""
        while self.in_flight < self._max_in_flight and (caller := self._next_caller()) is not None:
            line = self._lines.pop(caller)
            place = line.popleft()
            self.queued -= 1
            if line:
                self._lines[caller] = line  # its next turn comes after everybody else's
            self._occupy(caller)
            place.slot.set_result(None)

    def _next_caller(self) -> str | None:
        """Return the next caller whose first place may have a slot; its reservation is taken."""
        for caller, line in list(self._lines.items()):
            while line and line[0].slot.done():  # who has left has yet to run
                line.popleft()
                self.queued -= 1
            if not line:
                del self._lines[caller]
            elif self._has_slot(caller) and self._takes(line[0].reservation):
                return caller
        return None

    def _takes(self, reservation: "Reservation | None") -> bool:
        """Take a reservation; if it does not fit yet, see to it that somebody looks again when it may."""
        wait = reservation.take() if reservation is not None else None
        if wait:
            loop = asyncio.get_running_loop()
            due = loop.time() + max(wait, LEAST_WAIT)
            if self._next_look is None or due < self._next_look.when():
                self._look_no_more()
                self._next_look = loop.call_at(due, self._look)
        return wait is None

    def _look(self) -> None:
        self._next_look = None
        self._hand_over()
        for line in self._lines.values():
            for place in line:
                refusal = place.reservation.in_vain(self._queue_timeout) if place.reservation is not None else None
                if refusal is not None and not place.slot.done():
                    place.slot.set_exception(refusal)

    def _look_no_more(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None

    def _queue_full(self) -> GatewayOverloaded:
        whose = "You have as many requests under way as you may" if self._has_slot("") else "The gateway is full"
        return GatewayOverloaded(f"{whose}, and the queue is full. Try again shortly.", reason="queue_full")

    def _queued_too_long(self, place: _Place) -> GatewayOverloaded | RateLimitExceeded:
        overloaded = GatewayOverloaded(
            f"The request waited in the queue for longer than {self._queue_timeout:g} s.", reason="queue_timeout"
        )
        return self._why_not(place.caller, place.reservation, overloaded)

    def _why_not(
        self, caller: str, reservation: "Reservation | None", overloaded: GatewayOverloaded
    ) -> GatewayOverloaded | RateLimitExceeded:
        """Return why a request may not go on: for a limit of its key, if it is not for want of a slot."""
        refusal = reservation.refusal(self._ahead_of(caller, reservation)) if reservation is not None else None
        return refusal if refusal is not None and self._has_slot(caller) else overloaded

    def _give_up(self, place: _Place) -> None:
        """Leave the queue; a slot that was handed over at the same moment goes on to the next request."""
        slot, line = place.slot, self._lines.get(place.caller)
        if slot.done() and not slot.cancelled() and slot.exception() is None:
            if place.reservation is not None:
                place.reservation.give_back()
            self.leave(place.caller)
        elif line is not None and place in line:
            line.remove(place)
            self.queued -= 1
            if not line:
                del self._lines[place.caller]
            self._hand_over()  # who was behind it may need less
