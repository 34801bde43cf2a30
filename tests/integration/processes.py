"""`python -m gateway` and `python -m mock_model` as real processes."""

import asyncio
import os
import re
import signal
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
PATIENCE = 50.0
"""Seconds for a process to come up or to end; far above what a busy machine needs."""
_ADDRESS = re.compile(r"(?:listens on|the API is at) (http://[^\s/,\"]+)")


class Process:
    """A process under way.

    Attributes:
        url: where it listens, without a trailing slash; empty until `up`.
    """

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._errors = b""
        self.url = ""

    async def up(self) -> None:
        """Wait until it says where it listens."""
        stderr = self._process.stderr
        assert stderr is not None
        async with asyncio.timeout(PATIENCE):
            while not self.url:
                line = await stderr.readline()
                self._errors += line
                assert line, f"it ended: {self._errors.decode()}"
                found = _ADDRESS.search(line.decode())
                self.url = found.group(1).replace("0.0.0.0", "127.0.0.1") if found else ""

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self._process.send_signal(number)

    async def end(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, and all it wrote to stdout and to stderr."""
        async with asyncio.timeout(PATIENCE):
            output, errors = await self._process.communicate()
        assert self._process.returncode is not None
        return self._process.returncode, output.decode(), (self._errors + errors).decode()

    @property
    def ended(self) -> bool:
        """Whether it has."""
        return self._process.returncode is not None

    async def kill(self) -> None:
        """Whatever it does."""
        if self._process.returncode is None:
            self._process.kill()
            await self._process.communicate()


@asynccontextmanager
async def running(module: str = "gateway", **environment: str) -> AsyncIterator[Process]:
    """Start it; it is killed at the end if it still runs."""
    base = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
    process = Process(
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, cwd=ROOT, env={**base, **environment}, stdout=PIPE, stderr=PIPE
        )
    )
    try:
        yield process
    finally:
        await process.kill()


async def run(module: str = "gateway", **environment: str) -> tuple[int, str, str]:
    """Start it and wait for its end: exit code, stdout, stderr."""
    async with running(module, **environment) as process:
        return await process.end()
