"""Work that takes long, off the event loop: one at a time, so that few things are held and nobody else waits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from gateway.errors import GatewayOverloaded
from gateway.side_process import SideProcess, SideProcessDiedError

P = ParamSpec("P")
T = TypeVar("T")
LARGE = 131_072
"""Bytes; looking into fewer takes a few milliseconds at most, whatever they are."""
VERY_LARGE = 4 << 20
"""Bytes; reading more at once takes so long that even in a thread it would hold up all others."""
IDLE = 60.0
"""Seconds without work after which the process ends."""


class Executor:
    """One thread, and a process for what is very large, started with the first of it. `close` it in the end.

    Args:
        at_once: bytes that are looked into on the event loop.
        in_thread: bytes that are read in the thread.
    """

    def __init__(self, at_once: int = LARGE, in_thread: int = VERY_LARGE) -> None:
        self._at_once = at_once
        self._in_thread = max(at_once, in_thread)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-work")
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="very-large")  # waits for the process
        self._side_process = SideProcess()
        self._idle: asyncio.TimerHandle | None = None

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work on `size` bytes: at once where they are few, else in the thread, after what waits there already.

        Raises: what `work` raises.
        """
        if size <= self._at_once:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    async def read(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the same where single steps of it read all of the bytes: what is very large, in the process.

        Args:
            size: bytes.
            work: can be pickled, as its arguments and what it returns or raises; what it changes is lost.
            *args: its arguments.
            **kwargs: its arguments by name.

        Raises:
            GatewayOverloaded: the process died of it.
            Exception: what `work` raises.
        """
        if size <= self._in_thread:
            return await self.run(size, work, *args, **kwargs)
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._reader, lambda: self._side_process.call(work, *args, **kwargs))
        except SideProcessDiedError:
            raise GatewayOverloaded("The gateway has too little memory. Try again shortly.", reason="memory") from None
        finally:
            if self._idle is not None:
                self._idle.cancel()
            self._idle = asyncio.get_running_loop().call_later(IDLE, self._reader.submit, self._side_process.end)

    def close(self) -> None:
        """Begin nothing further."""
        if self._idle is not None:
            self._idle.cancel()
        for thread in (self._thread, self._reader):
            thread.shutdown(wait=False, cancel_futures=True)
        self._side_process.end()
