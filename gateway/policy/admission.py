"""Who may come in: requests in flight, a bounded queue before them, and the bytes held for all of them together."""

import asyncio
from collections import deque
from typing import Self

from gateway.errors import DeadlineExceeded, GatewayDraining, GatewayOverloaded


class Admission:
    """At most `max_in_flight` requests at once; up to `max_queue` more wait, each at most `queue_timeout` seconds.

    The queue is first in, first out. A slot that becomes free goes to the head of the queue directly.
    """

    def __init__(self, *, max_in_flight: int, max_queue: int, queue_timeout: float) -> None:
        self._max_in_flight = max_in_flight
        self._max_queue = max_queue
        self._queue_timeout = queue_timeout
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.in_flight = 0
        self.draining = False

    @property
    def queued(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def check_open(self) -> None:
        """Raises: GatewayDraining: the gateway is stopping."""
        if self.draining:
            raise GatewayDraining("The gateway is stopping; send the request again.", retry_after=1.0)

    def check(self) -> None:
        """Refuse at once what could not even queue, before its body is read.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: all slots are taken and the queue is full.
        """
        self.check_open()
        if self.in_flight >= self._max_in_flight and len(self._waiting) >= self._max_queue:
            raise GatewayOverloaded("The gateway is full: its queue has no place left.", reason="queue_full")

    def enter_at_once(self) -> bool:
        """Take a slot, if there is one and nobody has to be refused; else `enter` waits for one or refuses."""
        if self.draining or self.in_flight >= self._max_in_flight:
            return False
        self.in_flight += 1
        return True

    async def enter(self, left: float) -> None:
        """Take a slot, waiting in the queue at most `left` seconds; `leave` gives it back.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: the queue is full, or the wait was longer than `queue_timeout`.
            DeadlineExceeded: `left` ended first.
        """
        self.check()
        if self.enter_at_once():
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            async with asyncio.timeout(min(self._queue_timeout, left)):
                await place
        except TimeoutError:
            self._give_up(place)
            if left <= self._queue_timeout:
                raise DeadlineExceeded("The deadline ended in the gateway's queue.") from None
            raise GatewayOverloaded(
                f"The request queued longer than {self._queue_timeout:g} s.", reason="queue_timeout"
            ) from None
        except BaseException:
            self._give_up(place)
            raise

    def leave(self) -> None:
        """Give the slot back, to the head of the queue if there is one."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self.in_flight -= 1

    def drain(self) -> None:
        """Refuse whoever comes or waits; requests in flight go on."""
        self.draining = True
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(
                    GatewayDraining("The gateway is stopping; send the request again.", retry_after=1.0)
                )

    def _give_up(self, place: "asyncio.Future[None]") -> None:
        """Leave the queue; a slot that was handed over in the same moment goes on to the next."""
        if place.done() and not place.cancelled() and place.exception() is None:
            self.leave()
            return
        try:
            self._waiting.remove(place)
        except ValueError:
            return


class Memory:
    """The bytes of bodies and answers held for all requests together, at most `limit`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def share(self) -> "Share":
        """One request's share."""
        return Share(self)

    def take(self, size: int) -> None:
        """Hold `size` more bytes.

        Raises:
            GatewayOverloaded: that would be above the limit.
        """
        if self.held + size > self._limit:
            raise GatewayOverloaded("The gateway holds as many bytes as it may.", reason="memory")
        self.held += size


class Share:
    """What one request holds, in bytes; as a context manager it gives all back at the end, on every way out."""

    __slots__ = ("_memory", "held")

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back()

    def take(self, size: int) -> None:
        """Hold `size` more bytes. Raises: GatewayOverloaded."""
        self._memory.take(size)
        self.held += size

    def give_back(self, size: int | None = None) -> None:
        """Give back `size` bytes, or all."""
        size = self.held if size is None else size
        self._memory.held -= size
        self.held -= size
