import json
import logging
import sys

from mock_model.logs import _Json, _OneLine


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
