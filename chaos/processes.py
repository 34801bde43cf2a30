"""Real processes on this machine that can be killed, frozen, thawed and started again; each keeps its port."""

import asyncio
import contextlib
import ctypes
import json
import os
import random
import signal
import socket
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import aiohttp

from chaos import REPOSITORY
from chaos.counts import Exposition, from_log, parse

LOOPBACK = "127.0.0.1"
START_SECONDS = 30.0
POLL = 0.01
LOG_FLUSH = 0.6
"""Seconds after which what a gateway has logged is in its file."""
FIRST_PORT, LAST_PORT = 10_000, 32_000
"""Below the ports that kernels give to outgoing connections: one of those could take a killed process's place."""
OWN_VARIABLES = ("GATEWAY_", "OTEL_", "MOCK_", "CHAOS_")
OWN_NAMES = frozenset({"HOST", "PORT", "CONTROL_HOST", "CONTROL_PORT", "APP_MODE", "MODEL_NAME", "LOG_LEVEL"})


class ProcessFailed(Exception):
    """A process did not start, or ended on its own; the text holds its last words."""


def free_port() -> int:
    """A port nobody listens on."""
    while True:
        port = random.randint(FIRST_PORT, LAST_PORT)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port


def _end_with_parent() -> None:
    """Linux: a test that is killed leaves nothing behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Process:
    """`python -m module` with an environment of its own.

    Args:
        name: for messages, and of its output file.
        module: what runs.
        env: beside the environment of this process, less every variable that the gateway or the mock model reads.
        ready_url: answers 200 when it serves.
        folder: where its output goes.
        session: for questions to it.

    Attributes:
        lives: how often it was started.
    """

    def __init__(
        self,
        name: str,
        module: str,
        env: dict[str, str],
        *,
        ready_url: str,
        folder: Path,
        session: aiohttp.ClientSession,
    ) -> None:
        self.name = name
        self.module = module
        self.ready_url = ready_url
        self.output = folder / f"{name}.log"
        self.session = session
        outer = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(OWN_VARIABLES) and key.removesuffix("_FILE") not in OWN_NAMES
        }
        self.env = outer | {"PYTHONUNBUFFERED": "1", "NO_PROXY": "*"} | env
        self.lives = 0
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs. Raises: ProcessFailed."""
        if self._process is None:
            raise ProcessFailed(f"{self.name} does not run")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it was started and has not ended."""
        return self._process is not None and self._process.returncode is None

    async def start(self, *, wait: bool = True) -> None:
        """Start it and wait until it serves. Raises: ProcessFailed."""
        self.lives += 1
        with self.output.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", self.module),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self.env,
                cwd=REPOSITORY,
                process_group=0,
                preexec_fn=_end_with_parent,
            )
        if wait:
            await self.ready()

    async def ready(self, seconds: float = START_SECONDS) -> None:
        """Wait until it serves. Raises: ProcessFailed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not await self.serves():
                    if not self.running:
                        break
                    await asyncio.sleep(POLL)
                else:
                    return
        raise ProcessFailed(f"{self.name} does not serve {self.ready_url}\n{self.last_words()}")

    async def serves(self) -> bool:
        """Whether it answers now (a frozen one within 0.2 s)."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            async with self.session.get(self.ready_url, timeout=aiohttp.ClientTimeout(total=0.2)) as response:
                return response.status == 200
        return False

    def last_words(self, size: int = 3000) -> str:
        """The end of its output."""
        return self.output.read_bytes()[-size:].decode(errors="replace") if self.output.exists() else ""

    def signal(self, number: int) -> None:
        """Send a signal."""
        if self._process is not None and self._process.returncode is None:
            os.kill(self._process.pid, number)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.signal(signal.SIGKILL)
        await self.wait()

    def freeze(self) -> None:
        """SIGSTOP: the kernel still accepts connections, nobody answers."""
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    async def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and wait; gives the exit code. Raises: ProcessFailed after so many seconds."""
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(seconds):
                return await self.wait()
        except TimeoutError:
            await self.kill()
            raise ProcessFailed(f"{self.name} did not stop within {seconds:g} s\n{self.last_words()}") from None

    async def wait(self) -> int:
        """Wait for its end; the exit code, negative for a signal."""
        return await self._process.wait() if self._process is not None else 0


class Mock(Process):
    """A mock model: one replica of a backend.

    Attributes:
        url: of its API, without `/v1`.
        journal: the file it writes its journal to.
    """

    def __init__(
        self,
        name: str,
        env: dict[str, str],
        *,
        folder: Path,
        session: aiohttp.ClientSession,
        host: str = LOOPBACK,
        port: int | None = None,
    ) -> None:
        self.host = host
        self.port, self.control_port = port or free_port(), free_port()
        self.url = f"http://{host}:{self.port}"
        self.journal = folder / f"{name}.journal"
        own = {
            "HOST": host,
            "PORT": str(self.port),
            "CONTROL_PORT": str(self.control_port),
            "LOG_LEVEL": "warning",
            "MOCK_JOURNAL_FILE": str(self.journal),
        }
        super().__init__(name, "mock_model", own | env, ready_url=f"{self.url}/health", folder=folder, session=session)

    async def faults(self, *faults: dict[str, Any]) -> None:
        """Put a script of faults in place; none heals."""
        await self._control("PUT", "/faults", list(faults))

    async def crash(self) -> None:
        """Let the process end from inside."""
        await self._control("POST", "/crash")
        await self.wait()

    def arrivals(self) -> list[dict[str, Any]]:
        """The prompts that came, over all lives of the process."""
        return [line for line in self.lines() if line["event"] == "arrived" and line["path"] != "/v1/models"]

    def lines(self) -> list[dict[str, Any]]:
        """The whole lines of the journal."""
        whole = self.journal.read_bytes().split(b"\n")[:-1] if self.journal.exists() else []
        return [json.loads(line) for line in whole]

    async def _control(self, method: str, path: str, body: Any = None) -> None:  # noqa: ANN401
        url = f"http://{LOOPBACK}:{self.control_port}{path}"
        async with self.session.request(method, url, json=body) as response:
            if not response.ok:
                raise ProcessFailed(f"{self.name}: {method} {path}: {await response.text()}")


class Gateway(Process):
    """The gateway under test."""

    def __init__(
        self, name: str, env: dict[str, str], *, folder: Path, session: aiohttp.ClientSession, names: Path | None = None
    ) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._tasks = folder / f"{name}.tasks"
        own = {"HOST": LOOPBACK, "PORT": str(self.port), "APP_MODE": "prod", "CHAOS_TASKS": str(self._tasks)}
        if names is not None:
            own["CHAOS_NAMES"] = str(names)
        super().__init__(
            name, "chaos.inside", own | env, ready_url=f"{self.url}/readyz", folder=folder, session=session
        )

    async def metrics(self) -> Exposition:
        """What `/metrics` says now."""
        async with self.session.get(f"{self.url}/metrics") as response:
            return parse(await response.text())

    async def counted(self) -> Exposition:
        """Its metrics; when a life of it has ended, what its log says of the same, over all lives."""
        if self.running and self.lives == 1:
            return await self.metrics()
        await asyncio.sleep(LOG_FLUSH)
        return from_log(self.requests())

    async def health(self) -> dict[str, Any]:
        """The document of `/health`."""
        async with self.session.get(f"{self.url}/health") as response:
            document: dict[str, Any] = await response.json()
            return document

    async def tasks(self) -> int:
        """How many asyncio tasks live in it."""
        self._tasks.unlink(missing_ok=True)
        self.signal(signal.SIGUSR2)
        async with asyncio.timeout(5):
            while not self._tasks.exists():  # noqa: ASYNC110
                await asyncio.sleep(POLL)
        return int(self._tasks.read_text(encoding="utf-8"))

    def open_files(self) -> Counter[str]:
        """Its open files by kind: `socket`, `file`, ..."""
        kinds: Counter[str] = Counter()
        for entry in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                target = str(entry.readlink())
                kinds["file" if target.startswith("/") else target.partition(":")[0]] += 1
        return kinds

    def threads(self) -> int:
        """How many threads it has."""
        return sum(1 for _ in Path(f"/proc/{self.pid}/task").iterdir())

    def memory(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def requests(self) -> list[dict[str, Any]]:
        """The lines of its log that are about prompts, over all lives of the process."""
        documents = [json.loads(line) for line in self._lines() if line.startswith(b"{")]
        return [line for line in documents if line.get("message") == "request" and line.get("method") == "POST"]

    def complaints(self) -> int:
        """How many lines it has written so far that are about no request."""
        return sum(b'"message":"request"' not in line for line in self._lines())

    def _lines(self) -> list[bytes]:
        return self.output.read_bytes().split(b"\n")[:-1]


class Collector(Process):
    """Takes spans by OTLP/HTTP and counts them.

    Attributes:
        url: what `OTEL_EXPORTER_OTLP_ENDPOINT` is set to.
    """

    def __init__(self, name: str, *, folder: Path, session: aiohttp.ClientSession) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._file = folder / f"{name}.spans"
        super().__init__(
            name,
            "chaos.collector",
            {"CHAOS_COLLECTOR_PORT": str(self.port), "CHAOS_COLLECTOR_FILE": str(self._file)},
            ready_url=f"{self.url}/",
            folder=folder,
            session=session,
        )

    def spans(self) -> int:
        """How many came, over all lives of the process."""
        return sum(map(int, self._file.read_text(encoding="ascii").split())) if self._file.exists() else 0
