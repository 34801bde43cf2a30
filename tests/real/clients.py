"""Real client libraries, each in a process of its own: it takes calls as lines of JSON and answers each with one."""

import asyncio
import json
import shutil
from asyncio.subprocess import PIPE
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from testkit.processes import ProcessError, clean_environment, spawn
from tests.real.servers import ENVIRONMENT, HERE, PATIENCE

NODE = shutil.which("node")
PROGRAMS: dict[str, Sequence[str]] = {
    name: (str(ENVIRONMENT / "python"), "-m", f"tests.real.callers.{name}")
    for name in ("openai_python", "anthropic_python", "langchain", "pydantic_ai")
} | {name: (NODE or "", str(HERE / "node" / f"{name}.mjs")) for name in ("openai_node", "vercel_ai")}
"""By the name of a client, the program that calls with it."""


@dataclass(frozen=True)
class Outcome:
    """What a call with a client library came to.

    Attributes:
        value: What it returned; None when it raised.
        error: `status` (None if no answer came), `type` and `message` of what it raised; None when it returned.
    """

    value: Any
    error: dict[str, Any] | None

    @property
    def status(self) -> int | None:
        """The HTTP status of the error."""
        assert self.error is not None, self.value
        status: int | None = self.error["status"]
        return status


class Client:
    """A program with a client library.

    Args:
        name: Of the client.
        folder: Where its standard error goes.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self._errors = folder / f"{name}.log"
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Self:
        with self._errors.open("ab") as errors:
            self._process = await spawn(
                PROGRAMS[self.name], env=clean_environment({}), stdin=PIPE, stdout=PIPE, stderr=errors, limit=1 << 24
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.kill()
        await self._process.wait()

    async def call(self, name: str, url: str, prompt: str = "Say something.") -> Outcome:
        """Make one call at the API at `url`, which has no `/v1`.

        Raises:
            ProcessError: The program failed.
        """
        if self._process.stdin is None or self._process.stdout is None:
            raise TypeError("no pipes")
        self._process.stdin.write(json.dumps({"call": name, "url": url, "prompt": prompt}).encode() + b"\n")
        async with asyncio.timeout(PATIENCE):
            line = await self._process.stdout.readline()
        if not line:
            raise ProcessError(f"{self.name} ended", self._errors.read_text(encoding="utf-8", errors="replace"))
        answer = json.loads(line)
        return Outcome(answer.get("value"), answer.get("error"))
