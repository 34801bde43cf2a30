"""A worker's side: its channel to the parent, and the sockets it is given."""

import asyncio
import os
import signal
import socket
from math import ceil
from time import monotonic
from typing import TYPE_CHECKING, Any

from gateway.parent_death import ask_for_signal
from gateway.telemetry.metrics import OPENMETRICS
from gateway.workers.channel import Channel, NoAnswer
from gateway.workers.health_of_all import health_of_all
from gateway.workers.in_flight_count import count_in
from gateway.workers.requests_of_all import found_of_all, listed_of_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.workers.channel import Answer

    Document = dict[str, Any]

MOST_SOCKETS = 64
"""Addresses of a host."""
BETWEEN_WORDS = 0.02
"""Seconds between two that say the same."""
LAST_WORDS = 10.0
"""Seconds beyond the grace until a worker that does not end is killed."""
SOCKETS_WITHIN = 60.0
"""Seconds that the parent may take to hand over sockets; to start another process would only keep it busier."""
ANSWER_WITHIN = 2.0
"""Seconds that the parent may take for an answer."""


class Worker:
    """What a process is among its siblings.

    Args:
        number: 1, 2, ...
        questions: the file descriptor of its end of the channel to the parent.
        handing: that of the socket on which it is given others.
        count: that of the memory that holds the number of its requests in flight.

    Attributes:
        in_flight: holds the number of its requests in flight, which the parent reads when it dies.
    """

    def __init__(self, number: int, questions: int, handing: int, count: int) -> None:
        self.number = number
        self.in_flight = count_in(count)
        self._answer: Answer | None = None
        self._begin: Callable[[list[int], int], None] | None = None
        self._questions = socket.socket(fileno=questions)
        self._handing = socket.socket(fileno=handing)
        self._channel = Channel(self._give_answer)
        self._next_word = 0.0

    def answer_with(self, answer: "Answer", *, begin: "Callable[[list[int], int], None]") -> None:
        """Have what this process serves with.

        Args:
            answer: gives the answers to the parent's questions.
            begin: takes its first shares of what all share, and the number of the configuration in force.
        """
        self._answer, self._begin = answer, begin

    async def open(self, grace: float) -> None:
        """Open the channel. Should the parent die, this process stops as it does at SIGTERM.

        Args:
            grace: seconds that a stop may take. It ends `LAST_WORDS` after them, whatever it does, as the parent would
                have it: nobody else ends it, and it has the port.
        """
        ask_for_signal(signal.SIGCONT)  # stopped, or about to be, it goes on, and sees that the channel is closed
        self._handing.setblocking(False)
        await self._channel.open(self._questions)
        self._watching = asyncio.create_task(self._watch(grace))

    async def _watch(self, grace: float) -> None:
        await self._channel.closed.wait()
        signal.alarm(ceil(grace + LAST_WORDS))  # it has no handler
        os.kill(os.getpid(), signal.SIGTERM)

    async def take_sockets(self) -> list[socket.socket]:
        """Return the sockets on which this process is to accept connections; none: all stop, or the parent is gone.

        Raises: NoAnswer.
        """
        if self._begin is None:
            raise RuntimeError("nothing is there yet that could serve")
        try:
            given = await self._channel.ask("sockets", timeout=SOCKETS_WITHIN)
        except NoAnswer:
            if not self._channel.closed.is_set():
                raise
            return []
        if given is None:
            return []
        self._begin(*given)
        _, descriptors, _, _ = socket.recv_fds(self._handing, 1, MOST_SOCKETS)
        return [socket.socket(fileno=descriptor) for descriptor in descriptors]

    async def leave(self) -> bool:
        """Tell the parent that this process is about to stop; return whether it is to accept no more connections.

        Others do so in its place, or the parent is gone: then whoever starts the gateway anew needs the port.
        """
        try:
            return bool(await self.ask("leave"))
        except NoAnswer:
            return self._channel.closed.is_set()

    def short(self) -> None:
        """Tell the parent that this process needs more of what is shared, now and then."""
        now = monotonic()
        if now >= self._next_word:
            self._next_word = now + BETWEEN_WORDS
            self._channel.tell("short")

    async def ask(self, what: str, data: Any = None, *, timeout: float = ANSWER_WITHIN) -> Any:  # noqa: ANN401, ASYNC109 - JSON; of one answer
        """Ask the parent. Raises: NoAnswer."""
        return await self._channel.ask(what, data, timeout=timeout)

    def tell(self, what: str, data: Any = None) -> None:  # noqa: ANN401 - JSON
        """Tell the parent."""
        self._channel.tell(what, data)

    async def metrics(self, accept: str) -> tuple[bytes, str] | None:
        """Return the metrics of all workers, as `Metrics.exposition` does; None if the parent does not answer."""
        answer = await self._of_all("metrics", OPENMETRICS in accept)
        return None if answer is None else (answer[0].encode(), answer[1])

    async def health(self, own: "Callable[[], Document]", *, in_full: bool) -> "Document":
        """Return the document of `/health` for all workers; if the parent does not answer, of this one alone."""
        return await self._of_all("health", in_full) or health_of_all([own()], None)

    async def snapshot(self, own: "Callable[[], Document]") -> "Document":
        """Return what the live page shows of all workers, or of this one alone."""
        if (document := await self._of_all("snapshot")) is None:
            document = own()
            document["health"] = health_of_all([document["health"]], None)
        return document  # type: ignore[no-any-return]

    async def listed(self, asked: dict[str, str], own: "Document") -> "Document":
        """Return the requests of all workers that fit filters, or of this one alone, as `RequestCalls.listed` does."""
        return await self._of_all("listed", asked) or listed_of_all([own], len(own["found"]), None)

    async def found(self, id_: str, own: "Callable[[], Document]") -> "Document":
        """Return what all workers know of a request, or this one alone, as `RequestCalls.found` does."""
        return await self._of_all("found", id_) or found_of_all([own()], None)

    async def _of_all(self, what: str, data: Any = None) -> Any:  # noqa: ANN401 - JSON
        """Return what the parent says of all workers; None if it does not answer."""
        try:
            return await self.ask(what, data)
        except NoAnswer:
            return None

    async def _give_answer(self, what: str, data: Any) -> Any:  # noqa: ANN401 - JSON
        if self._answer is None:
            raise LookupError(what)
        return await self._answer(what, data)
