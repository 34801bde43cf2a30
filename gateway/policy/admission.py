"""How many requests are handled at once, and the bounded queue in front of them."""

import asyncio
from collections import deque

from gateway.errors import GatewayDraining, GatewayOverloaded
from gateway.phase_timer import PhaseTimer
from gateway.policy.waiting_room import WaitingLimit


class _Place:
    """A place in the queue."""

    __slots__ = ("caller", "slot")

    def __init__(self, caller: str) -> None:
        self.caller = caller
        self.slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()


class Admission:
    """At most `max_in_flight` requests at once; up to `max_queue` more wait, each at most `queue_timeout` seconds.

    The queue is first in, first out. A slot that becomes free goes straight to the first in the queue who may have it:
    one caller has at most half of the slots, so that the rest is for others. A caller without a name is nobody in
    particular, and has no such limit.

    Attributes:
        in_flight: requests that have a slot.
        draining: whether the gateway is stopping.
        waiting: the requests with a slot that wait for a backend; they take at most half of the slots and of the bytes.
    """

    def __init__(
        self, *, max_in_flight: int, max_queue: int, queue_timeout: float, max_buffered: int = 1 << 28
    ) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._waiting: deque[_Place] = deque()
        self._slots_of: dict[str, int] = {}
        self._slots_of_one = max(1, max_in_flight // 2)
        self.in_flight = 0
        self.draining = False
        self.waiting = WaitingLimit(max_requests=max(1, max_in_flight // 2), max_bytes=max_buffered // 2)

    @property
    def queued(self) -> int:
        """Number of requests that wait for a slot."""
        return len(self._waiting)

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
        if len(self._waiting) >= self._max_queue and not self._has_slot(caller):
            whose = "You have as many requests under way as you may" if self._has_slot("") else "The gateway is full"
            raise GatewayOverloaded(f"{whose}, and the queue is full. Try again shortly.", reason="queue_full")

    def enter_at_once(self, caller: str = "") -> bool:
        """Take a free slot; False when there is none, or the gateway is stopping: then `enter` waits or refuses."""
        mine = self._slots_of.get(caller, 0)
        if self.draining or self.in_flight >= self._max_in_flight or mine >= self._slots_of_one:
            return False
        self.in_flight += 1
        if caller:
            self._slots_of[caller] = mine + 1
        return True

    async def enter(self, left: float, caller: str = "") -> None:
        """Take a slot, waiting in the queue at most `left` seconds. `leave` gives it back.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: the queue is full, or the wait took longer than `queue_timeout`.
            DeadlineExceeded: `left` ended first.
        """
        self.check(caller)
        if self.enter_at_once(caller):
            return
        loop = asyncio.get_running_loop()
        place = _Place(caller)
        timer = PhaseTimer(loop.time, loop.time() + left, "The deadline passed while the request waited in the queue.")
        timer.limit(self._queue_timeout, self._queued_too_long)
        self._waiting.append(place)
        with timer:
            try:
                await place.slot
            except BaseException:
                self._give_up(place)
                raise

    def leave(self, caller: str = "") -> None:
        """Give the slot back: to the first in the queue who may have it."""
        self.in_flight -= 1
        if caller:
            left = self._slots_of[caller] - 1
            if left:
                self._slots_of[caller] = left
            else:
                del self._slots_of[caller]
        if self._waiting:
            self._hand_over()

    def drain(self) -> None:
        """Refuse new and queued requests from now on; requests in flight continue."""
        self.draining = True
        self.waiting.drain()
        while self._waiting:
            place = self._waiting.popleft()
            if not place.slot.done():
                place.slot.set_exception(GatewayDraining())

    def _has_slot(self, caller: str) -> bool:
        """Return whether a slot is free that the caller may have."""
        return self.in_flight < self._max_in_flight and self._slots_of.get(caller, 0) < self._slots_of_one

    def _hand_over(self) -> None:
        """Give a free slot to the first in the queue who may have it."""
        for place in self._waiting:
            if not place.slot.done() and self.enter_at_once(place.caller):
                self._waiting.remove(place)
                place.slot.set_result(None)
                return

    def _queued_too_long(self) -> GatewayOverloaded:
        return GatewayOverloaded(
            f"The request waited in the queue for longer than {self._queue_timeout:g} s.", reason="queue_timeout"
        )

    def _give_up(self, place: _Place) -> None:
        """Leave the queue; a slot that was handed over at the same moment goes on to the next request."""
        slot = place.slot
        if slot.done() and not slot.cancelled() and slot.exception() is None:
            self.leave(place.caller)
            return
        try:
            self._waiting.remove(place)
        except ValueError:
            return
