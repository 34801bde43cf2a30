"""One line each: readable in dev, JSON in prod; never the text of a prompt."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal


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
    return text.replace("\n", " ")


def start_logging(level: int, mode: Literal["dev", "prod"]) -> None:
    """Send the log lines of this process to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine() if mode == "dev" else _Json())
    logging.basicConfig(level=level, handlers=[handler], force=True)
