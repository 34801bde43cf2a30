"""How many requests are handled at once, and the bounded queue in front of them."""

import asyncio
from collections import deque

from gateway.errors import GatewayDraining, GatewayOverloaded
from gateway.phase_timer import PhaseTimer
from gateway.policy.waiting_room import WaitingLimit


class Admission:
    """At most `max_in_flight` requests at once; up to `max_queue` more wait, each at most `queue_timeout` seconds.

    The queue is first in, first out. A slot that becomes free goes straight to the head of the queue.

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
        self._waiting: deque[asyncio.Future[None]] = deque()
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

    def check(self) -> None:
        """Refuse a request that could not even queue, before its body is read.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: all slots are taken and the queue is full.
        """
        self.check_open()
        if self.in_flight >= self._max_in_flight and len(self._waiting) >= self._max_queue:
            raise GatewayOverloaded("The gateway is full, and so is its queue. Try again shortly.", reason="queue_full")

    def enter_at_once(self) -> bool:
        """Take a free slot; False when there is none, or the gateway is stopping: then `enter` waits or refuses."""
        if self.draining or self.in_flight >= self._max_in_flight:
            return False
        self.in_flight += 1
        return True

    async def enter(self, left: float) -> None:
        """Take a slot, waiting in the queue at most `left` seconds. `leave` gives it back.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: the queue is full, or the wait took longer than `queue_timeout`.
            DeadlineExceeded: `left` ended first.
        """
        self.check()
        if self.enter_at_once():
            return
        loop = asyncio.get_running_loop()
        place: asyncio.Future[None] = loop.create_future()
        timer = PhaseTimer(loop.time, loop.time() + left, "The deadline passed while the request waited in the queue.")
        timer.limit(self._queue_timeout, self._queued_too_long)
        self._waiting.append(place)
        with timer:
            try:
                await place
            except BaseException:
                self._give_up(place)
                raise

    def leave(self) -> None:
        """Give the slot back: to the head of the queue, if there is one."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.in_flight -= 1

    def drain(self) -> None:
        """Refuse new and queued requests from now on; requests in flight continue."""
        self.draining = True
        self.waiting.drain()
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(GatewayDraining())

    def _queued_too_long(self) -> GatewayOverloaded:
        return GatewayOverloaded(
            f"The request waited in the queue for longer than {self._queue_timeout:g} s.", reason="queue_timeout"
        )

    def _give_up(self, place: "asyncio.Future[None]") -> None:
        """Leave the queue; a slot that was handed over at the same moment goes on to the next request."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.leave()
            return
        try:
            self._waiting.remove(place)
        except ValueError:
            return
