"""What Linux tells of any process, in `/proc`."""

from contextlib import suppress
from pathlib import Path


def state_of(pid: int) -> str:
    """Return the letter that Linux has for the state of a process, Z for one that waits to be buried; X: it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(") ")[2][0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"


def lives(pid: int) -> bool:
    """Whether it has not ended; whether its end was noticed by its parent does not matter."""
    return state_of(pid) not in "XZ"


def has_stopped(pid: int) -> bool:
    """Whether none of its threads runs: all were stopped by a signal, or it has ended."""
    states = set()
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            states.add(state_of(int(thread.name)))
    return states <= set("TtXZ")


def children_of(pid: int) -> list[int]:
    """Return the process ids of those that its threads have started; of threads that end meanwhile, none."""
    children: list[int] = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError, ProcessLookupError):
            children += map(int, (thread / "children").read_text(encoding="utf-8").split())
    return children
