"""`python -m gateway` and `python -m mock_model` as a container runs them: by their environment alone."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from testkit.polling import until
from testkit.processes import Process, python

PATIENCE = 50.0
"""Seconds for a process to come up or to end: far more than a busy machine needs."""
_ADDRESS = re.compile(r"(?:listens on|the API is at) (http://[^\s/,\"]+)")


class Program(Process):
    """A program that says where it listens.

    Attributes:
        url: Where it listens, without a trailing slash; empty until `up`.
    """

    def __init__(self, module: str, environment: dict[str, str], folder: Path) -> None:
        super().__init__(module, python(module), env=environment, folder=folder, ready_url="")
        self.errors = folder / f"{module}.errors"
        self.url = ""

    async def up(self) -> None:
        """Wait until it says where it listens."""

        def listens() -> bool:
            self.check()
            found = _ADDRESS.search(self.errors.read_text())
            self.url = found[1].replace("0.0.0.0", "127.0.0.1") if found else ""
            return bool(found)

        await until(listens, f"{self.name} listens", seconds=PATIENCE)

    async def end(self) -> tuple[int, str, str]:
        """Wait for its end: the exit code, and all it wrote to stdout and to stderr."""
        async with asyncio.timeout(PATIENCE):
            code = await self.wait()
        return code, self.output.read_text(), self.errors.read_text()


@asynccontextmanager
async def running(module: str = "gateway", **environment: str) -> AsyncIterator[Program]:
    """Start it; it is killed at the end if it still runs."""
    with TemporaryDirectory() as folder:
        open_files = environment.pop("OPEN_FILES", "")  # a limit, no variable of its own
        program = Program(module, environment, Path(folder))
        if open_files:
            program.command = ["sh", "-c", f'ulimit -n {open_files}; exec "$@"', "sh", *program.command]
        try:
            await program.start(wait=False)
            yield program
        finally:
            await program.kill()


async def run(module: str = "gateway", **environment: str) -> tuple[int, str, str]:
    """Start it and wait for its end: exit code, stdout, stderr."""
    async with running(module, **environment) as program:
        return await program.end()
