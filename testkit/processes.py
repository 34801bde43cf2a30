"""Child processes: started, watched, broken and ended by their id, never by their name."""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from testkit import REPOSITORY
from testkit.http import answers
from testkit.polling import STEP
from testkit.process_table import has_stopped

START_SECONDS = 30.0
STOP_SECONDS = 30.0
LAST_SECONDS = 10.0
"""How long a process may take to stop at the end of a block, before it is killed."""
PROBE_SECONDS = 0.2
"""Seconds within which a process that serves must answer: a frozen one does not."""
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


class ProcessError(Exception):
    """A process did not start, or ended unexpectedly.

    Attributes:
        output: The last lines that it wrote.
    """

    def __init__(self, message: str, output: str = "") -> None:
        super().__init__(f"{message}\n{output}".rstrip())
        self.message = message
        self.output = output


def clean_environment(own: Mapping[str, str]) -> dict[str, str]:
    """Return an environment of these variables and of what every program needs: no settings of this shell, no proxy."""
    inherited = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return inherited | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"} | dict(own)


def python(module: str, *args: str) -> list[str]:
    """Return the command that runs a module of this repository."""
    return [sys.executable, "-m", module, *args]


async def spawn(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: int | IO[bytes] = DEVNULL,
    stdout: int | IO[bytes] | None = None,
    stderr: int | IO[bytes] | None = None,
    cwd: Path = REPOSITORY,
    cores: Collection[int] | None = None,
    limit: int = 1 << 16,
) -> asyncio.subprocess.Process:
    """Start a process in a session of its own, out of reach of the terminal's Ctrl-C, that ends when this one does.

    `env` is its whole environment, `cores` are those it may run on (None: all), and `limit` is the longest line, in
    bytes, that can be read from its output; all else is as `subprocess` takes it.
    """

    def prepare() -> None:
        if cores is not None:
            os.sched_setaffinity(0, cores)
        with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG

    return await asyncio.create_subprocess_exec(
        *command,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
        preexec_fn=prepare,
        limit=limit,
    )


class Process:
    """A program that can be started, killed, frozen and started again; what it writes goes to a file.

    Args:
        name: For messages, and for the names of its files.
        command: The program and its arguments.
        env: Its environment, in addition to what every program needs.
        folder: Where its output goes.
        ready_url: Answers 200 when it serves.
        cwd: Where it runs.
        cores: The cores it may run on; None for all.

    Attributes:
        output: The file with its standard output.
        errors: The file with its standard error: the same one, unless a subclass names another.
        lives: How often it was started.
        start_seconds: How long its last start took until it served; 0 where nobody waited for that.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        env: Mapping[str, str],
        folder: Path,
        ready_url: str,
        cwd: Path = REPOSITORY,
        cores: Collection[int] | None = None,
    ) -> None:
        self.name = name
        self.command = command
        self.env = clean_environment(env)
        self.ready_url = ready_url
        self.output = self.errors = folder / f"{name}.log"
        self.lives = 0
        self.start_seconds = 0.0
        self._cwd = cwd
        self._cores = cores
        self._swept = True
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.kill()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessError):
            await self.stop(LAST_SECONDS)

    @property
    def pid(self) -> int:
        """The id of the process that runs, or ran last.

        Raises:
            ProcessError: It was never started.
        """
        if self._process is None:
            raise ProcessError(f"{self.name} was not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it serves.

        Raises:
            ProcessError: It does not serve.
        """
        self.lives += 1
        self._swept = False
        began = time.monotonic()
        with self.output.open("ab") as output, self.errors.open("ab") as errors:
            self._process = await spawn(
                self.command, env=self.env, stdout=output, stderr=errors, cwd=self._cwd, cores=self._cores
            )
        if wait:
            await self.ready()
            self.start_seconds = time.monotonic() - began

    async def ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it serves.

        Raises:
            ProcessError: It ended, or does not serve in time.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not await self.serves():
                    self.check()
                    await asyncio.sleep(STEP)
                return
        raise ProcessError(f"{self.name} does not serve {self.ready_url} after {seconds:g} s", self.last_lines())

    async def serves(self) -> bool:
        """Tell whether it answers now."""
        return await answers(self.ready_url, PROBE_SECONDS)

    def check(self) -> None:
        """Raise if it has ended.

        Raises:
            ProcessError: It has, with its last lines.
        """
        if not self.running:
            raise ProcessError(f"{self.name} {self._end()}", self.last_lines())

    def last_lines(self, count: int = 20) -> str:
        """Return the end of what it wrote to its standard error."""
        text = self.errors.read_text(encoding="utf-8", errors="replace") if self.errors.exists() else ""
        return "\n".join(text.splitlines()[-count:])

    async def lines(self) -> AsyncIterator[str]:
        """Yield each line that it writes from now on, forever."""
        with self.output.open("rb") as output:
            output.seek(0, os.SEEK_END)
            rest = b""
            while True:
                *lines, rest = (rest + output.read()).split(b"\n")
                for line in lines:
                    yield line.decode(errors="replace")
                await asyncio.sleep(STEP)

    def signal(self, number: int) -> None:
        """Send a signal to it alone."""
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, number)

    def freeze(self) -> None:
        """Stop it where it is: the kernel still accepts connections, but nothing answers.

        When this returns it has stopped: until then it may go on for a moment, on another core.
        """
        self.signal(signal.SIGSTOP)
        while self.running and sys.platform.startswith("linux") and not has_stopped(self.pid):
            time.sleep(0.001)

    def thaw(self) -> None:
        """Let it go on."""
        self.signal(signal.SIGCONT)

    async def kill(self) -> None:
        """Kill it and whatever it started, and wait until it is gone."""
        if self._process is not None and not self._swept:
            self._swept = True  # its id may be another's later
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        await self.wait()

    async def stop(self, seconds: float = STOP_SECONDS) -> int:
        """Ask it to end, wait for that, and return the exit code; whatever it started ends with it.

        Raises:
            ProcessError: It did not end within `seconds`, and was killed.
        """
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                return await self.wait()
        except TimeoutError:
            raise ProcessError(f"{self.name} did not stop within {seconds:g} s", self.last_lines()) from None
        finally:
            await self.kill()

    async def wait(self) -> int:
        """Wait for its end and return the exit code, negative for a signal."""
        return await self._process.wait() if self._process is not None else 0

    def _end(self) -> str:
        code = None if self._process is None else self._process.returncode
        if code is None:
            return "was not started"
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
