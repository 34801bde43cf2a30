"""Standard output and standard error, written by a thread each: no request waits for a terminal or a full pipe."""

import io
import logging
import os
import re
import select
import sys
import threading
import time
from collections import deque
from typing import TextIO, cast

FLUSH_INTERVAL = 0.2
"""Seconds that a line may wait to be written."""
MAX_WAITING = 8_000_000
"""Characters; while the terminal or the log driver blocks, older lines are dropped."""
LINES = 64
"""Lines that are measured, written and lost together: one by one they would cost each request more."""
STDERR = 2
"""The last of the three standard file descriptors."""
LAST_WRITE = 1.0
"""Seconds for which a process that ends still writes what waits."""

_log = logging.getLogger("gateway")
_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, line ends, and what turns the direction of writing (Unicode's `Bidi_Control`)."""


def visible(text: str) -> str:
    r"""Return a text whose control and bidirectional characters are written as `\uXXXX`: they command terminals."""
    return text if text.isprintable() else _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class Output:
    """Stands for `sys.stdout` or `sys.stderr`: `write` never waits, and a thread passes on what was written.

    It writes to the file descriptor. Python's own streams hold a lock while they write, and the interpreter cannot end
    while a blocked thread holds it.

    Args:
        name: for the log and the metrics.
        stream: what it stands for; None: it was closed before the process began.

    Attributes:
        dropped: lines that are lost, since the stream blocked for too long or failed.
    """

    encoding = "utf-8"  # whatever the locale: no character may lose a line

    __slots__ = (
        "_descriptor",
        "_failing",
        "_lock",
        "_new",
        "_size",
        "_stopping",
        "_stream",
        "_thread",
        "_waiting",
        "dropped",
        "name",
    )

    def __init__(self, name: str, stream: TextIO | None) -> None:
        self.name = name
        self.dropped = 0
        self._stream = stream
        self._descriptor = _descriptor(stream)
        self._new: deque[str] = deque()
        self._waiting: deque[tuple[str, int]] = deque()
        self._size = 0
        # Garbage may be collected while it is held, and a destructor may write.
        self._lock = threading.RLock()
        self._stopping = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Let the thread write what waits, and end."""
        self._stopping.set()

    def write(self, text: str) -> int:
        """Take a text, which the thread writes later."""
        self._new.append(text)
        if len(self._new) >= LINES:
            self._gather()
        return len(text)

    def flush(self) -> None:
        """Return at once."""

    def isatty(self) -> bool:
        """Return whether it is a terminal."""
        return self._stream is not None and self._stream.isatty()

    def fileno(self) -> int:
        """Return the file descriptor. Raises: UnsupportedOperation, without one."""
        if self._descriptor is None:
            raise io.UnsupportedOperation("there is no file descriptor")
        return self._descriptor

    def wait(self, seconds: float) -> None:
        """Wait for the end of the thread, for so many seconds at most."""
        self._thread.join(seconds)

    def _run(self) -> None:
        while not self._stopping.wait(FLUSH_INTERVAL):
            self._write_waiting()
        self._write_waiting()

    def _write_waiting(self) -> None:
        while taken := self._take():
            text, lines = taken
            try:
                self._put(text)
            except (OSError, ValueError) as error:  # a full disk, a closed terminal: the thread goes on
                self._lose(lines, error)
            else:
                self._failing = False

    def _take(self) -> tuple[str, int] | None:
        """Return the oldest text that waits, and of how many lines it is."""
        with self._lock:
            if not self._waiting:
                self._gather()
            if not self._waiting:
                return None
            text, lines = self._waiting.popleft()
            self._size -= len(text)
            return text, lines

    def _gather(self) -> None:
        """Put new lines together, and drop the oldest of all that are too much."""
        with self._lock:
            lines = [self._new.popleft() for _ in range(len(self._new))]
            if lines:
                text = "".join(lines)
                self._waiting.append((text, len(lines)))
                self._size += len(text)
            while self._size > MAX_WAITING:
                text, lost = self._waiting.popleft()
                self._size -= len(text)
                self.dropped += lost

    def _put(self, text: str) -> None:
        if self._stream is None:
            return  # closed before the start: nobody wants to know
        if self._descriptor is None:
            self._stream.write(text)
            self._stream.flush()
            return
        left = memoryview(text.encode("utf-8", "backslashreplace"))
        while left:
            try:
                left = left[os.write(self._descriptor, left) :]
            except BlockingIOError:  # whoever shares it has made it not block
                select.select((), (self._descriptor,), ())

    def _lose(self, lines: int, error: Exception) -> None:
        """Count lines that could not be written, and tell of it once."""
        with self._lock:
            self.dropped += lines
        if not self._failing:
            self._failing = True
            _log.warning("%s takes no lines (%s); they are lost until it does", self.name, error)


def standard_outputs() -> tuple[Output, Output]:
    """Put outputs in the place of `sys.stdout` and `sys.stderr`, until the process has ended, and return them.

    Whoever prints, warns or fails does not wait for a reader either.
    """
    # One that was closed before the start would be given to a socket, and libuv aborts when that is closed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)
    outputs = Output("stdout", sys.stdout), Output("stderr", sys.stderr)
    sys.stdout, sys.stderr = (cast("TextIO", output) for output in outputs)
    for output in outputs:
        output.start()
    return outputs


def write_last(*outputs: Output) -> None:
    """Let outputs write what waits, for at most `LAST_WRITE` seconds in all: they may block."""
    end = time.monotonic() + LAST_WRITE
    for output in outputs:
        output.stop()
    for output in outputs:
        output.wait(max(0.0, end - time.monotonic()))


def _descriptor(stream: TextIO | None) -> int | None:
    try:
        return stream.fileno() if stream is not None else None
    except (OSError, ValueError):  # of a test, without one
        return None
