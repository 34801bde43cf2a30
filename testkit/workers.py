"""A worker: a child process that takes an order as a line of JSON and answers in lines of JSON.

It reads the order from its standard input, writes an empty line once it has begun and then a line for each result, and
finishes when its standard input says so or ends.
"""

import asyncio
import contextlib
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Collection
from typing import Self

from testkit.processes import START_SECONDS, ProcessError, clean_environment, python, spawn

LONGEST_LINE = 1 << 24
"""Bytes."""


class Worker:
    """A worker, from its beginning to its end.

    Args:
        module: What runs.
        order: What it is to do, without line ends.
        cores: The cores it may run on; None for all.

    Attributes:
        pid: Of its process; 0 before it has begun.
    """

    def __init__(self, module: str, order: bytes, *, cores: Collection[int] | None = None) -> None:
        self.pid = 0
        self._module = module
        self._order = order
        self._cores = cores
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        env = clean_environment({})
        self._process = await spawn(
            python(self._module), env=env, stdin=PIPE, stdout=PIPE, cores=self._cores, limit=LONGEST_LINE
        )
        self.pid = self._process.pid
        try:
            self._write(self._order + b"\n")
            await self._begun()
        except BaseException:
            await self._kill()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kill()

    async def results(self) -> AsyncIterator[bytes]:
        """Yield each result, until the worker has ended.

        Raises:
            ProcessError: It failed.
        """
        while line := await self._line():
            yield line
        if code := await self._process.wait():
            raise ProcessError(f"{self._module} ended with exit code {code}")

    def finish(self) -> None:
        """Ask it to finish."""
        with contextlib.suppress(ConnectionError):
            self._write(b"finish\n")

    async def _begun(self) -> None:
        async with asyncio.timeout(START_SECONDS):
            if await self._line() != b"\n":
                raise ProcessError(f"{self._module} did not begin")

    async def _line(self) -> bytes:
        return await self._process.stdout.readline() if self._process.stdout is not None else b""

    def _write(self, line: bytes) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(line)

    async def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()


@contextlib.asynccontextmanager
async def ordered() -> AsyncIterator[tuple[bytes, asyncio.Event]]:
    """In the worker: read the order; give it, and the event that is set when the worker is to finish."""
    reader = asyncio.StreamReader(limit=LONGEST_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    order, finish = await reader.readline(), asyncio.Event()

    async def listen() -> None:
        await reader.readline()
        finish.set()

    listening = asyncio.create_task(listen())
    try:
        yield order, finish
    finally:
        listening.cancel()


def report(result: bytes = b"") -> None:
    """In the worker: write a result; nothing says that it has begun."""
    sys.stdout.buffer.write(result + b"\n")
    sys.stdout.buffer.flush()
