"""What a process uses: CPU time, memory, open files, threads. Read from Linux's `/proc`."""

import contextlib
import os
import re
import time
from collections import Counter
from pathlib import Path

CPUCLOCK_SCHED = 2
PROC = Path("/proc")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time, user and system, of a process and of those it started, in seconds."""
    return sum(map(_cpu_seconds, _tree(pid)))


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and of those it started, in bytes."""
    return sum(map(_resident_bytes, _tree(pid)))


def open_files(pid: int) -> Counter[str]:
    """Count the open files of a process by kind: `socket`, `file`, ..."""
    kinds: Counter[str] = Counter()
    for entry in (PROC / f"{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = str(entry.readlink())
            kinds["file" if target.startswith("/") else target.partition(":")[0]] += 1
    return kinds


def threads(pid: int) -> int:
    """Count the threads of a process."""
    return sum(1 for _ in (PROC / f"{pid}/task").iterdir())


def run_delay(pid: int) -> float:
    """Return for how long the main thread was ready to run and did not, in seconds; 0 where that is unknown."""
    try:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:  # noqa: PTH123 - read a hundred times a second
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _tree(pid: int) -> list[int]:
    """Return the process and those it started, directly or not."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (parent := _parent(entry)):
            children.setdefault(parent, []).append(int(entry.name))
    tree = [pid]
    for one in tree:
        tree.extend(children.get(one, ()))
    return tree


def _parent(process: Path) -> int | None:
    with contextlib.suppress(OSError):
        found = re.search(r"\) \S (\d+) ", (process / "stat").read_text())
        return int(found[1]) if found else None
    return None


def _cpu_seconds(pid: int) -> float:
    """Read the clock that clock_getcpuclockid(3) names: `/proc` counts in steps of 10 ms."""
    with contextlib.suppress(OSError):
        return time.clock_gettime((~pid << 3) | CPUCLOCK_SCHED)
    return 0.0  # it is gone


def _resident_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        return int((PROC / f"{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
