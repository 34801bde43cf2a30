"""`python -m chaos.inside`: the gateway, with two doors more that a chaos test needs and production does not.

`CHAOS_NAMES` names a JSON file `{host name: address}`: it is the DNS of this process, read at each question, and a name
that is not in it cannot be resolved. `CHAOS_TASKS` names a file: at each SIGUSR2 the number of asyncio tasks is written
to it.
"""

import asyncio
import json
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

import gateway.program as production

if TYPE_CHECKING:
    from gateway.files import Files
    from gateway.settings import Settings
    from gateway.workers.worker import Worker


class FileResolver(AbstractResolver):
    """Looks names up in a file."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the address of a name.

        Raises:
            OSError: There is none.
        """
        address = json.loads(self._file.read_text(encoding="utf-8")).get(host)
        if address is None:
            raise OSError(None, f"no such name: {host}")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=socket.AI_NUMERICHOST)
        ]

    async def close(self) -> None:
        """Do nothing: nothing is held."""


def main() -> int:
    """Open the doors, then be the gateway."""
    names, tasks = os.environ.get("CHAOS_NAMES"), os.environ.get("CHAOS_TASKS")
    if names:
        vars(aiohttp)["DefaultResolver"] = lambda **_: FileResolver(Path(names))
    run = production.run

    async def run_with_doors(settings: "Settings", files: "Files", worker: "Worker | None" = None) -> None:
        if tasks:
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGUSR2, lambda: _write(Path(tasks), str(len(asyncio.all_tasks(loop)))))
        await run(settings, files, worker)

    production.run = run_with_doors
    return production.main()


def _write(file: Path, text: str) -> None:
    """Write a file whole or not at all: a test waits for it to appear."""
    draft = file.with_suffix(".draft")
    draft.write_text(text, encoding="utf-8")
    draft.replace(file)


if __name__ == "__main__":
    sys.exit(main())
