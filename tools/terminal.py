"""What is shown in a terminal, and a terminal whose Ctrl-C reaches this program alone."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator

from testkit.processes import Process
from testkit.traces import Joiner, draw

TREES_PER_SECOND = 5


def _paint(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def bold(text: str) -> str:
    """Mark a heading."""
    return _paint("1", text)


def dim(text: str) -> str:
    """Mark what is of minor interest."""
    return _paint("2", text)


def red(text: str) -> str:
    """Mark a failure."""
    return _paint("31", text)


def green(text: str) -> str:
    """Mark a success."""
    return _paint("32", text)


def say(text: str = "", end: str = "\n") -> None:
    """Print at once, even into a pipe."""
    try:
        print(text, end=end, flush=True)
    except OSError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.raise_signal(signal.SIGTERM)


async def show_output(process: Process) -> None:
    """Print what a process writes from now on, forever."""
    async for line in process.lines():
        say(f"{dim(f'{process.name:>10} |')} {line}")


async def show_traces(joiner: Joiner, own: str, own_shown: asyncio.Event) -> None:
    """Print each trace that comes in, forever; under load some, and how many were left out.

    Args:
        joiner: Where they come from.
        own: The id of a trace that is waited for.
        own_shown: Set when that one is shown.
    """
    second, shown, left_out = 0, 0, 0
    async for trace_id, trace in joiner.traces():
        if int(time.monotonic()) != second:
            if left_out:
                say(dim(f"... and {left_out} more traces"))
            second, shown, left_out = int(time.monotonic()), 0, 0
        if shown < TREES_PER_SECOND:
            shown += 1
            say(f"\n{bold('trace')}     {trace_id}\n{draw(trace, green, red)}")
        else:
            left_out += 1
        if trace_id == own:
            own_shown.set()


@contextlib.contextmanager
def own_terminal() -> Iterator[None]:
    """Hold the terminal for a while: Ctrl-C then reaches this program alone, and make ends with its exit code."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDWR)
    except OSError:  # started without one
        yield
        return
    starter = os.getpgrp()
    try:
        if starter == os.getpid() or os.tcgetpgrp(terminal) != starter:  # nobody to share it with, or in the background
            yield
            return
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the shell would not see that the program has stopped
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpgrp())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.tcsetpgrp(terminal, starter)
    finally:
        os.close(terminal)
