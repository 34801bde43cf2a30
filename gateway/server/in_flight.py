"""The requests in flight: a stop waits for them and, at the end of its grace, ends what is left."""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, MutableSequence

    from gateway.record import Record
    from gateway.server.connections import Connections

POLL = 0.02
"""Seconds between two looks at what is left."""


class InFlight:
    """The tasks of requests.

    Args:
        connections: those their answers go out on.
        number: holds how many there are, for whoever watches.
    """

    def __init__(self, connections: "Connections", number: "MutableSequence[int] | memoryview | None" = None) -> None:
        self._connections = connections
        self._tasks: dict[asyncio.Task[object], Record] = {}
        self._cut_off: set[asyncio.Task[object]] = set()
        self._number = [0] if number is None else number

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> "Iterator[Record]":
        """Yield the records, in the order in which the requests began."""
        return iter(self._tasks.values())

    def add(self, task: "asyncio.Task[object]", record: "Record") -> None:
        """Add the task of a request that begins."""
        self._tasks[task] = record
        self._number[0] = len(self._tasks)

    def remove(self, task: "asyncio.Task[object]") -> None:
        """Remove the task of a request that has ended."""
        self._tasks.pop(task, None)
        self._number[0] = len(self._tasks)
        self._cut_off.discard(task)

    def was_cut_off(self, task: "asyncio.Task[object]") -> bool:
        """Return whether the task was cancelled by `cut_off`, not by a caller who left."""
        return task in self._cut_off

    async def wait(self, seconds: float) -> bool:
        """Wait at most `seconds` until all have ended and their answers have been taken; return whether that is so.

        Callers who take nothing are not waited for.
        """
        try:
            async with asyncio.timeout(seconds):
                while self._tasks:  # noqa: ASYNC110 - polling, since what callers take is polled as well
                    await asyncio.sleep(POLL)
                await asyncio.sleep(POLL)  # an answer is written after its task was removed
                await self._connections.answers_taken()
        except TimeoutError:
            return False
        return True

    def cut_off(self) -> None:
        """Cancel what is left; each request still gets its error."""
        for task in self._tasks:
            self._cut_off.add(task)
            task.cancel()
