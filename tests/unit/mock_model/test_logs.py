import json
import logging
import os
import sys
from contextlib import suppress

from mock_model.logs import MAX_WAITING, Errors, _Json, _OneLine


def record(message: str = "port %d is open") -> logging.LogRecord:
    return logging.LogRecord("mock_model.serve", logging.INFO, __file__, 1, message, (8001,), None)


def test_dev_lines_are_readable() -> None:
    assert _OneLine().format(record()).endswith("INFO    mock-model  port 8001 is open")


def test_prod_lines_are_json() -> None:
    line = json.loads(_Json().format(record()))

    assert line["message"] == "port 8001 is open"
    assert line["level"] == "info"
    assert line["service"] == "mock-model"


def test_an_exception_is_still_one_line() -> None:
    broken = record()
    try:
        int("two\nlines")
    except ValueError:
        broken.exc_info = sys.exc_info()

    assert _OneLine().format(broken).count("port 8001 is open: ValueError: invalid literal") == 1
    assert "\n" not in _Json().format(broken)


def test_an_exception_that_is_false_is_none() -> None:
    odd = record()
    odd.exc_info = False  # type: ignore[assignment]

    assert _OneLine().format(odd).endswith("port 8001 is open")


def test_no_line_commands_a_terminal() -> None:
    evil = "a\x1b[31m\x7f\x85\u2028\u202e"
    for formatter in (_OneLine(), _Json()):
        line = formatter.format(record(f"%d {evil}"))

        assert line.isprintable()
        assert "a" + "".join(f"\\u{ord(one):04x}" if not one.isprintable() else one for one in evil[1:]) in (
            line.replace("\\\\", "\\")
        )


def test_nobody_waits_for_a_reader_and_what_waits_is_bounded() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w") as stream:
        errors = Errors(stream)
        for _ in range(2 * MAX_WAITING):
            errors.write("x" * 99 + "\n")  # the pipe takes some hundred of them
        assert errors._lines.qsize() <= MAX_WAITING
        errors._lines.put(None)
        os.set_blocking(reading, False)
        while errors._thread.is_alive():
            with suppress(BlockingIOError):
                os.read(reading, 1 << 16)
    os.close(reading)
