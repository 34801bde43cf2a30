"""A process of our own for what holds the interpreter for long: msgspec reads a text of any size in one go.

It is started with the first work, speaks through its standard input and output, and ends when they are closed, so also
when the gateway is killed; on Linux then even if it is stopped. Nothing but functions, their arguments and what they
return goes to and fro, as pickles; long texts go beside them, without a copy, and do not come back.
A `memoryview` goes as a long text does, and arrives as bytes.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from struct import Struct
from typing import IO, Any, ParamSpec, TypeVar, cast

from gateway.errors import drop_frames
from gateway.parent_death import ask_for_signal

P = ParamSpec("P")
T = TypeVar("T")
Text = bytes | memoryview

LONG = 65_536
"""Bytes; a longer text goes beside the pickle."""
OUT_OF_MEMORY_FIRST = "1000"
"""The system's highest `oom_score_adj`: where memory runs out, the gateway lives on."""
LONGEST = 60.0
"""Seconds that a work may take, which is many times as long as the largest takes; then the process is killed."""
_size = Struct("!Q")


class SideProcessDiedError(Exception):
    """The process ended in the middle of its work: killed, or out of memory."""


class SideProcess:
    """Does work in the process, one at a time; the calls of this class block.

    They belong into one thread, which the process does not outlive.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The id of the process; None when there is none."""
        return self._process.pid if self._process is not None else None

    def call(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do work whose function, arguments and result can be pickled, and return the result.

        Where no process can be started, it is done here.

        Raises:
            SideProcessDiedError: the process died; the next call starts another.
            Exception: what `work` raises.
        """
        try:
            process = self._started()
        except OSError:
            return work(*args, **kwargs)
        texts: list[Text] = []
        watchdog = threading.Timer(LONGEST, process.kill)
        watchdog.daemon = True
        watchdog.start()
        try:
            _send(cast("IO[bytes]", process.stdin), (work, args, kwargs), texts)
            result, error = _receive(cast("IO[bytes]", process.stdout), texts)
        except (OSError, EOFError):
            self.end()
            raise SideProcessDiedError from None
        finally:
            watchdog.cancel()
        if error is not None:
            try:
                raise error
            finally:
                del error  # its traceback holds this frame
        return result  # type: ignore[no-any-return]

    def end(self) -> None:
        """End the process, whatever it does."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        with suppress(OSError), process:  # closes the pipes, also with words in them, and waits
            pass

    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is not None and self._process.poll() is not None:
            self.end()
        if self._process is None:
            # With our own path: another gateway may lie in the working directory.
            program = f"import sys; sys.path[:] = {sys.path!r}; from gateway.side_process import main; main()"
            pipe = subprocess.PIPE
            command = [sys.executable, *_interpreter_options(), "-c", program]
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe)  # noqa: S603
        return self._process


def _interpreter_options() -> list[str]:
    """Return our interpreter's options that say which code runs: the process runs no other."""
    flags = sys.flags
    levels = {
        "I": flags.isolated,
        "E": flags.ignore_environment,
        "s": flags.no_user_site,
        "S": flags.no_site,
        "P": flags.safe_path,
        "B": flags.dont_write_bytecode,
        "O": flags.optimize,
    }
    return [f"-{letter * level}" for letter, level in levels.items() if level]


class _Pickler(pickle.Pickler):
    """Puts long texts, and views, into a list, and their numbers into the pickle."""

    def __init__(self, file: BytesIO, texts: list[Text]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._texts = texts
        self._numbers = {id(text): number for number, text in enumerate(texts)}

    def persistent_id(self, value: object) -> int | None:
        if not isinstance(value, memoryview) and (type(value) is not bytes or len(value) <= LONG):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self._texts)
            self._texts.append(value)
        return self._numbers[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BytesIO, texts: list[Text]) -> None:
        super().__init__(file)
        self._texts = texts

    def persistent_load(self, number: int) -> Text:
        return self._texts[number]


def _send(pipe: IO[bytes], value: object, texts: list[Text]) -> None:
    """Send a value, and those of its long texts that the other side does not have: `texts` are those that it has."""
    known = len(texts)
    pickled = BytesIO()
    _Pickler(pickled, texts).dump(value)
    parts = [pickled.getvalue(), *texts[known:]]
    pipe.write(_size.pack(len(parts)) + b"".join(_size.pack(len(part)) for part in parts))
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes], texts: list[Text]) -> Any:  # noqa: ANN401 - whatever was sent
    """Return what was sent; its long texts are added to `texts`. Raises: EOFError."""
    sizes = [_number(pipe) for _ in range(_number(pipe))]
    pickled, *more = [_read(pipe, size) for size in sizes]
    texts += more
    return _Unpickler(BytesIO(pickled), texts).load()


def _number(pipe: IO[bytes]) -> int:
    return int(_size.unpack(_read(pipe, _size.size))[0])


def _read(pipe: IO[bytes], size: int) -> bytes:
    data = pipe.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _serve(requests: IO[bytes], answers: IO[bytes]) -> None:
    """Do one work; nothing of it is held afterwards. Raises: EOFError, BrokenPipeError: nobody asks any more."""
    texts: list[Text] = []
    work, args, kwargs = _receive(requests, texts)
    outcome: tuple[object, Exception | None]
    try:
        outcome = work(*args, **kwargs), None
    except Exception as error:  # noqa: BLE001 - raised by whoever asked
        error.add_note(traceback.format_exc())
        drop_frames(error)  # ours among them, which holds the error and all that was received
        outcome = None, error
    _send(answers, outcome, texts)


def main() -> None:
    """Work until standard input ends. Signals to the gateway's whole group are not for this process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with suppress(OSError):  # Linux alone has it
        Path("/proc/self/oom_score_adj").write_text(OUT_OF_MEMORY_FIRST, encoding="ascii")
    ask_for_signal(signal.SIGKILL)  # stopped, it does not see that its input has ended
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    with suppress(EOFError, BrokenPipeError):
        while True:
            _serve(requests, answers)
