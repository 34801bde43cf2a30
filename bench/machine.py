"""The machine that the bench runs on: its cores, and what is installed on it."""

import os
import shutil
import sys
from typing import NamedTuple


class BenchError(Exception):
    """The bench cannot go on; the text says why."""


class Missing(BenchError):
    """A peer or tool is not installed; the text says what to install."""


class Cores(NamedTuple):
    """Which core runs what: the system under test has its own."""

    measured: frozenset[int]
    others: frozenset[int]

    @classmethod
    def of_this_machine(cls, measured: int = 1) -> "Cores":
        """Return the first cores we may use, and all further ones; where there are none, they share.

        Args:
            measured: how many the system under test has.

        Raises:
            BenchError: This is not Linux.
        """
        if not sys.platform.startswith("linux"):
            raise BenchError("the bench pins processes and reads /proc: it runs on Linux only")
        cores = sorted(os.sched_getaffinity(0))
        return cls(frozenset(cores[:measured]), frozenset(cores[measured:] or cores))


def tool(name: str, hint: str, variable: str | None = None) -> str:
    """Return the path of an installed program; `variable` may name it in the environment.

    Raises:
        Missing: It is not installed.
    """
    found = (os.environ.get(variable) if variable else None) or shutil.which(name)
    if not found:
        raise Missing(f"{name}: not installed ({hint})")
    return found
