"""What becomes of a process whose parent dies."""

import ctypes
from contextlib import suppress

PR_SET_PDEATHSIG = 1
"""Of `prctl`: the signal that a process gets when the thread that started it ends."""


def ask_for_signal(number: int) -> None:
    """Have this process sent a signal when its parent dies (Linux alone has it). A stopped process sees nothing else.

    Source: PR_SET_PDEATHSIG(2const).
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
