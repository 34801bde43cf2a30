"""Child processes: each pinned to its cores, read from /proc, ended by its id."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).parents[1]
CPUCLOCK_SCHED = 2
PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""What a child gets of the environment: no setting of the gateway's or OpenTelemetry's, no proxy."""


class BenchError(Exception):
    """The bench cannot go on; the text says why."""


class Missing(BenchError):
    """A peer or tool is not installed; the text says what would bring it."""


class Cores(NamedTuple):
    """Who runs where: what is measured has a core of its own."""

    measured: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls) -> "Cores":
        """The first core we may use, and all further ones; with a single core they share it.

        Raises:
            BenchError: not on Linux.
        """
        if not sys.platform.startswith("linux"):
            raise BenchError("the bench pins processes and reads /proc: it runs on Linux only")
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[:1]), frozenset(cores[1:] or cores))


def python(module: str, *args: str) -> list[str]:
    """The command of one of our own modules."""
    return [sys.executable, "-m", module, *args]


def tool(name: str, hint: str, variable: str | None = None) -> str:
    """The path of an installed program; `variable` may name it in the environment.

    Raises:
        Missing: it is not installed.
    """
    found = (os.environ.get(variable) if variable else None) or shutil.which(name)
    if not found:
        raise Missing(f"{name}: not installed ({hint})")
    return found


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((LOOPBACK, 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()


class Running:
    """A child process, with those it has started.

    Attributes:
        name: for messages.
        log: the file its output goes to.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def cpu(self) -> float:
        """Seconds of CPU used so far: user and system, of the whole tree."""
        return sum(_cpu(pid) for pid in self._tree())

    def rss(self) -> float:
        """Resident megabytes (10^6 bytes) of the whole tree."""
        return sum(_rss(pid) for pid in self._tree())

    def open_files(self) -> int:
        """Open file descriptors, sockets included."""
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def check_alive(self) -> None:
        """Raises: BenchError: it has ended, with its last words."""
        if self._process.poll() is not None:
            raise BenchError(f"{self.name} ended with exit code {self._process.returncode}:\n{self.last_words()}")

    def last_words(self) -> str:
        """The end of its output."""
        return self.log.read_bytes()[-2000:].decode(errors="replace")

    def wait_until_ready(self, url: str, seconds: float) -> None:
        """Wait until GET `url` answers 200.

        Raises:
            BenchError: it does not, or the process has ended.
        """
        deadline = time.monotonic() + seconds
        while not answers(url):
            self.check_alive()
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name} is not ready after {seconds:g} s:\n{self.last_words()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it and whatever it started: politely, then for good."""
        if self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)  # its own session: nobody else is in it
        self._process.wait()

    def _tree(self) -> list[int]:
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and (stat := _stat(int(entry.name))):
                children.setdefault(int(stat[1]), []).append(int(entry.name))
        tree = [self.pid]
        for pid in tree:
            tree.extend(children.get(pid, ()))
        return tree


@contextmanager
def running(name: str, argv: list[str], *, env: dict[str, str], cores: frozenset[int], log: Path) -> Iterator[Running]:
    """Start a process on `cores` and stop it at the end."""
    clean = {key: os.environ[key] for key in PASSED_ON if key in os.environ}
    with log.open("ab") as output, on_cores(cores):
        process = subprocess.Popen(
            argv,
            env=clean | {"PYTHONPATH": str(ROOT)} | env,
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    child = Running(name, process, log)
    try:
        yield child
    finally:
        child.stop()


@contextmanager
def on_cores(cores: frozenset[int]) -> Iterator[None]:
    """Children started here inherit the cores from their first instruction on."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def answers(url: str) -> bool:
    """Whether GET `url` answers 200."""
    try:
        fetch(url)
    except (OSError, HTTPException):
        return False
    return True


def fetch(url: str) -> bytes:
    """GET a local url.

    Raises:
        OSError: it does not answer, or not with 2xx.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url, timeout=5) as answer:
        content: bytes = answer.read()
        return content


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, ...; empty when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _cpu(pid: int) -> float:
    """Seconds of CPU time of all its threads, by the clock that clock_getcpuclockid(3) names; `/proc` counts 10 ms."""
    try:
        return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
    except OSError:
        return 0.0  # it is gone


def _rss(pid: int) -> float:
    try:
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return resident * os.sysconf("SC_PAGE_SIZE") / 1e6
