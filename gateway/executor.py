"""Work that takes long, off the event loop: one at a time, so that few things are held and nobody else waits."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
LARGE = 131_072
"""Bytes; looking into fewer takes a few milliseconds at most, whatever they are."""


class Executor:
    """One thread. `close` it in the end. `at_once`: bytes that are looked into on the event loop."""

    def __init__(self, at_once: int = LARGE) -> None:
        self._at_once = at_once
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="large-work")

    async def run(self, size: int, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work on `size` bytes: at once where they are few, else in the thread, after what waits there already.

        Raises: what `work` raises.
        """
        if size <= self._at_once:
            return work(*args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: work(*args, **kwargs))

    def close(self) -> None:
        """Begin nothing further."""
        self._thread.shutdown(wait=False, cancel_futures=True)
