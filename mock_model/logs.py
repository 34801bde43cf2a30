"""One line each: readable in dev, JSON in prod; never the text of a prompt."""

import atexit
import json
import logging
import os
import re
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import Literal, TextIO, cast

MAX_WAITING = 10_000
"""Lines; while nobody reads stderr, further ones are dropped."""
STDERR = 2
"""The last of the three standard file descriptors."""
LAST_WRITE = 1.0
"""Seconds for which a process that ends still writes what waits."""

_HIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters, line ends, and what turns the direction of writing."""


class Errors:
    """Stands for `sys.stderr`: `write` never waits, a thread writes to the file descriptor.

    Python's own stream holds a lock while it writes, and the interpreter cannot end while a blocked thread holds it.
    """

    def __init__(self, stream: TextIO) -> None:
        self._descriptor = stream.fileno()
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="stderr", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        """Take a text, which the thread writes."""
        if self._lines.qsize() < MAX_WAITING:
            self._lines.put(text)
        return len(text)

    def flush(self) -> None:
        """Return at once."""

    def finish(self) -> None:
        """Write what waits, for at most `LAST_WRITE` seconds."""
        self._lines.put(None)
        self._thread.join(LAST_WRITE)

    def _run(self) -> None:
        while (text := self._lines.get()) is not None:
            left = memoryview(text.encode("utf-8", "backslashreplace"))
            with suppress(OSError):  # a closed terminal, a full disk
                while left:
                    left = left[os.write(self._descriptor, left) :]


def let_nobody_wait_for_stderr() -> None:
    """Put a stream that never waits in the place of `sys.stderr`, until the process has ended."""
    # A standard descriptor that is closed would be given to a socket, and libuv aborts when that is closed.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= STDERR:
        pass
    os.close(descriptor)
    if sys.stderr is not None:
        errors = Errors(sys.stderr)
        sys.stderr = cast("TextIO", errors)
        atexit.register(errors.finish)


class _OneLine(logging.Formatter):
    """A readable line; of an exception only its name and message."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC).astimezone()
        return f"{moment:%H:%M:%S} {record.levelname:<7} mock-model  {_message(record)}"


class _Json(logging.Formatter):
    """A JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, UTC)
        line = {
            "time": moment.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": "mock-model",
            "logger": record.name,
            "message": _message(record),
        }
        return json.dumps(line, ensure_ascii=False)


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if record.exc_info and record.exc_info[0] is not None:  # some libraries put False there
        text = f"{text}: {record.exc_info[0].__name__}: {record.exc_info[1]}"
    return _HIDDEN.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\n", " "))


def start_logging(level: int, mode: Literal["dev", "prod"]) -> None:
    """Send the log lines of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine() if mode == "dev" else _Json())
    logging.basicConfig(level=level, handlers=[handler], force=True)
