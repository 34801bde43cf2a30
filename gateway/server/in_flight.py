"""The requests in flight: a stop waits for them and, at the end of its grace, ends what is left."""

import asyncio

POLL = 0.02
"""Seconds between two looks at what is left."""


class InFlight:
    """The tasks of requests, and the connections their answers go out on."""

    def __init__(self) -> None:
        self._connections: set[asyncio.WriteTransport] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._cut_off: set[asyncio.Task[object]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def add(self, task: "asyncio.Task[object]") -> None:
        """Add the task of a request that begins."""
        self._tasks.add(task)

    def remove(self, task: "asyncio.Task[object]") -> None:
        """Remove the task of a request that has ended."""
        self._tasks.discard(task)
        self._cut_off.discard(task)

    def add_connection(self, connection: asyncio.WriteTransport) -> None:
        """Add a caller's connection."""
        self._connections.add(connection)

    def remove_connection(self, connection: asyncio.WriteTransport) -> None:
        """Remove a connection that was closed."""
        self._connections.discard(connection)

    def was_cut_off(self, task: "asyncio.Task[object]") -> bool:
        """Return whether the task was cancelled by `cut_off`, not by a caller who left."""
        return task in self._cut_off

    async def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` until all have ended and every answer has been taken; return whether that is so."""
        try:
            async with asyncio.timeout(seconds):
                while self._tasks:  # noqa: ASYNC110 - polling, since what callers take is polled as well
                    await asyncio.sleep(POLL)
                await asyncio.sleep(POLL)  # an answer is written after its task was removed
                while any(connection.get_write_buffer_size() for connection in self._connections):  # noqa: ASYNC110
                    await asyncio.sleep(POLL)
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """Cancel what is left; each request still gets its error."""
        for task in self._tasks:
            self._cut_off.add(task)
            task.cancel()
