"""What is written to stdout and stderr costs nobody any time, whatever becomes of it there."""

import fcntl
import io
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import pytest

from gateway.telemetry import output as module
from gateway.telemetry.output import LINES, MAX_WAITING, Output, visible, write_last

PATIENCE = 30.0


class Pipe:
    """A pipe as a text stream, and who reads it."""

    def __init__(self) -> None:
        self.reading, writing = os.pipe()
        self.stream = os.fdopen(writing, "w", encoding="latin-1")

    def fill(self) -> None:
        """Nothing more goes into it."""
        os.set_blocking(self.stream.fileno(), False)
        try:
            while True:
                os.write(self.stream.fileno(), b"." * 4096)
        except BlockingIOError:
            os.set_blocking(self.stream.fileno(), True)

    def read_until(self, end: str) -> str:
        """All up to an end."""
        found = ""
        while not found.endswith(end):
            found += os.read(self.reading, 1 << 20).decode()
        return found


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    one = Pipe()
    yield one
    os.close(one.reading)
    one.stream.close()


def started(output: Output) -> Output:
    output.start()
    return output


def test_lines_are_written_soon_in_order_and_in_any_alphabet(pipe: Pipe) -> None:
    output = started(Output("stdout", pipe.stream))
    for number in range(3 * LINES):
        output.write(f"{number}\n")
    print("日本 \ud800", file=cast("TextIO", output))
    found = pipe.read_until("\\ud800\n").splitlines()
    write_last(output)

    assert found == [*map(str, range(3 * LINES)), "日本 \\ud800"]
    assert output.dropped == 0
    assert not output.isatty()


def test_a_reader_who_sleeps_costs_lines_and_nobodys_time(pipe: Pipe) -> None:
    pipe.fill()
    output = started(Output("stderr", pipe.stream))
    line = "x" * 9_999 + "\n"
    for _ in range(1000):
        output.write(line)  # or it would never come back
    os.read(pipe.reading, fcntl.fcntl(pipe.stream.fileno(), fcntl.F_GETPIPE_SZ))
    output.write("the end\n")
    found = pipe.read_until("the end\n").lstrip(".").splitlines()
    write_last(output)

    lost = 1001 - len(found)
    assert output.dropped == lost
    assert 0 < 1000 * len(line) - MAX_WAITING < (lost + 2 * LINES) * len(line)
    assert lost < 500


def test_a_process_that_ends_waits_a_second_in_all_for_readers_who_sleep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LAST_WRITE", 0.2)
    pipes = [Pipe(), Pipe()]
    outputs = []
    for pipe in pipes:
        pipe.fill()
        outputs.append(started(Output("stderr", pipe.stream)))
        outputs[-1].write("last words\n")
    ended = threading.Event()

    def end() -> None:
        write_last(*outputs)
        ended.set()

    threading.Thread(target=end, daemon=True).start()

    assert ended.wait(PATIENCE)
    for pipe, output in zip(pipes, outputs, strict=True):
        pipe.read_until("last words\n")
        output.wait(PATIENCE)
        os.close(pipe.reading)
        pipe.stream.close()


def test_what_waits_at_the_end_is_written(pipe: Pipe) -> None:
    output = started(Output("stdout", pipe.stream))
    output.write("last words\n")
    write_last(output)

    assert pipe.read_until("last words\n") == "last words\n"


def test_a_closed_reader_costs_lines_is_told_once_and_may_come_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        output = Output("stdout", stream)
        for _ in range(3):
            output.write("line\n")
            output._write_waiting()
        assert output.dropped == 3
        assert [record.getMessage() for record in caplog.records] == [
            "stdout takes no lines ([Errno 32] Broken pipe); they are lost until it does"
        ]
        with (tmp_path / "log").open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
        output.write("back\n")
        output._write_waiting()

    assert (tmp_path / "log").read_text() == "back\n"
    assert output.dropped == 3


def test_an_output_that_was_closed_before_the_start_takes_everything(caplog: pytest.LogCaptureFixture) -> None:
    output = Output("stderr", None)
    output.write("line\n")
    output._write_waiting()

    assert output.dropped == 0
    assert not caplog.records
    assert not output.isatty()
    with pytest.raises(io.UnsupportedOperation):
        output.fileno()


def test_a_descriptor_that_somebody_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.stream.fileno(), False)
    output = started(Output("stdout", pipe.stream))
    text = "y" * 300_000 + "\n"
    output.write(text)
    time.sleep(0.3)
    found = pipe.read_until("\n")
    write_last(output)

    assert found == text
    assert output.dropped == 0


def test_a_writing_destructor_in_the_middle_of_a_write_waits_for_nobody() -> None:
    output = Output("stderr", io.StringIO())
    with output._lock:
        for _ in range(LINES):
            output.write("from `__del__`, while garbage is collected\n")

    assert sum(lines for _, lines in output._waiting) == LINES


def test_no_line_holds_what_failed() -> None:
    output = Output("stderr", None)
    handler = logging.StreamHandler(cast("TextIO", output))

    class Request:
        gone = False

        def __del__(self) -> None:
            Request.gone = True

    def fail(_request: Request) -> None:
        raise ValueError("a defect")

    try:
        fail(Request())
    except ValueError:
        handler.emit(logging.LogRecord("gateway", logging.ERROR, __file__, 1, "failed", None, sys.exc_info()))

    assert Request.gone
    assert "a defect" in output._new[0]


@pytest.mark.parametrize("text", ["plain", "größe", "日本", "a \\ b", "👍🏽"])
def test_words_stay_as_they_are(text: str) -> None:
    assert visible(text) == text


@pytest.mark.parametrize(
    "code",
    [*range(0x20), *range(0x7F, 0xA0), 0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)],
)
def test_what_commands_a_terminal_is_shown(code: int) -> None:
    assert visible(f"a{chr(code)}b") == f"a\\u{code:04x}b"
