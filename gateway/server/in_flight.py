"""The requests under way, so that a stop can wait for them and, at the end of its grace, end what is left."""

import asyncio

TURN = 0.02
"""Seconds between two looks at what callers have not taken yet."""


class Running:
    """The tasks of requests under way, and the connections their answers go out on."""

    def __init__(self) -> None:
        self._connections: set[asyncio.WriteTransport] = set()
        self._tasks: set[asyncio.Task[object]] = set()
        self._cut_off: set[asyncio.Task[object]] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._tasks)

    def enter(self, task: "asyncio.Task[object]") -> None:
        """A request begins."""
        self._tasks.add(task)
        self._empty.clear()

    def leave(self, task: "asyncio.Task[object]") -> None:
        """It has ended."""
        self._tasks.discard(task)
        self._cut_off.discard(task)
        if not self._tasks:
            self._empty.set()

    def connected(self, connection: asyncio.WriteTransport) -> None:
        """A caller has come."""
        self._connections.add(connection)

    def disconnected(self, connection: asyncio.WriteTransport) -> None:
        """He has gone."""
        self._connections.discard(connection)

    def was_cut_off(self, task: "asyncio.Task[object]") -> bool:
        """Whether the task's cancellation was ours, not a caller's who left."""
        return task in self._cut_off

    async def wait(self, seconds: float) -> bool:
        """Wait until none is left and every answer has been taken, at most `seconds`; whether that is so."""
        try:
            async with asyncio.timeout(seconds):
                await self._empty.wait()
                await asyncio.sleep(TURN)  # an answer is written after its task has left
                while any(connection.get_write_buffer_size() for connection in self._connections):  # noqa: ASYNC110
                    await asyncio.sleep(TURN)
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """End what is left; each gets its typed error."""
        for task in self._tasks:
            self._cut_off.add(task)
            task.cancel()
