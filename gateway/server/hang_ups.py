"""Callers who hang up while nothing is read from them."""

import asyncio
import select
from contextlib import suppress


class HangUps:
    """Aborts a connection as soon as its caller closes or resets it, although nothing is read from it.

    An event loop notices a hang-up only by reading, and of a reset connection that is not read, never. The kernel tells
    all the same (`EPOLLRDHUP`, epoll_ctl(2)), also while bytes wait unread. One epoll object knows all connections that
    are not read, and the loop watches that. Where the system has no epoll, a hang-up is noticed when reading goes on.
    """

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._loop: asyncio.AbstractEventLoop
        self._numbers: dict[asyncio.Transport, int] = {}  # of their sockets
        self._connections: dict[int, asyncio.Transport] = {}

    def watch(self, connection: asyncio.Transport) -> None:
        """Watch a connection from which nothing is read from here on."""
        if connection in self._numbers or not hasattr(select, "epoll"):
            return
        if self._epoll is None:
            try:
                self._epoll = select.epoll()
            except OSError:  # no descriptor
                return
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._epoll.fileno(), self._look)
        own = connection.get_extra_info("socket")
        if own is None:
            return
        number = own.fileno()
        with suppress(OSError, ValueError):  # the socket has been closed, which is noticed anyway
            self._epoll.register(number, select.EPOLLRDHUP)
            self._numbers[connection] = number
            self._connections[number] = connection

    def forget(self, connection: asyncio.Transport) -> None:
        """Watch a connection no longer: it is read again, or lost."""
        number = self._numbers.pop(connection, None)
        # The number of a closed socket may already be another's.
        if number is None or self._epoll is None or self._connections.get(number) is not connection:
            return
        del self._connections[number]
        with suppress(OSError):  # a closed socket is no longer registered
            self._epoll.unregister(number)

    def close(self) -> None:
        """Watch nothing any more."""
        if self._epoll is not None:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None
        self._numbers.clear()
        self._connections.clear()

    def _look(self) -> None:
        if self._epoll is None:
            return
        for number, _ in self._epoll.poll(0):
            connection = self._connections.get(number)
            if connection is not None:
                self.forget(connection)
                connection.abort()
