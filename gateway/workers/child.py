"""A place for a worker, as its parent knows it."""

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from gateway.workers.channel import Channel, NoAnswer
from gateway.workers.in_flight_count import count_in, new_count

if TYPE_CHECKING:
    import asyncio
    import socket

ANSWER_WITHIN = 0.5
"""Seconds that a worker may take for an answer; then the others speak without it, and its shares stay as they are."""


class Child:
    """A place for a worker: its sockets at the port, its process, the channel to it.

    Attributes:
        number: 1, 2, ...
        sockets: that listen for it; empty while its place is closed.
        channel: to its process; None while there is none.
        serves: it has taken its sockets.
        has_served: its last process had taken them.
        behind: it is to read its configuration anew as soon as it serves.
        silent_looks: times in a row that it has not answered.
        count_descriptor: of the memory in which it keeps up the number of its requests in flight.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.sockets: list[socket.socket] = []
        self.channel: Channel | None = None
        self.process: asyncio.subprocess.Process | None = None
        self.serves = False
        self.has_served = False
        self.behind = False
        self.silent_looks = 0
        self.count_descriptor = new_count()
        self._count = count_in(self.count_descriptor)
        self.deaths = 0
        self.closing: asyncio.TimerHandle | None = None

    @property
    def in_flight(self) -> int:
        """Requests in flight; when its process has died, those that died with it."""
        return int(self._count[0])

    def forget_in_flight(self) -> None:
        """Begin anew with none."""
        self._count[0] = 0

    def close_place(self) -> None:
        """Close its place at the port: new connections go to the others, and those that wait are reset."""
        for listening in self.sockets:
            listening.close()
        self.sockets = []

    async def ask(self, what: str, data: Any = None) -> Any:  # noqa: ANN401 - JSON
        """Return its answer to a question; None where it gives none in time."""
        if self.channel is None:
            return None
        try:
            return await self.channel.ask(what, data, timeout=ANSWER_WITHIN)
        except NoAnswer:
            return None

    def tell(self, what: str, data: Any) -> None:  # noqa: ANN401 - JSON
        """Tell its process, if there is one."""
        if self.channel is not None:
            self.channel.tell(what, data)

    def send(self, number: int) -> None:
        """Send its process a signal."""
        if self.process is not None and self.process.returncode is None:
            with suppress(ProcessLookupError):
                self.process.send_signal(number)
