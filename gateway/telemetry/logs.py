"""Logs: one line per entry, readable in dev, JSON in prod. Nothing in a line commands the terminal that shows it."""

import logging
import sys
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, TextIO

import msgspec

from gateway.errors import CallerLeft
from gateway.record import TARGET_DRAWN, TARGET_SKIPPED
from gateway.telemetry.output import visible

if TYPE_CHECKING:
    from types import TracebackType

    from gateway.record import Record

    SysExcInfo = tuple[type[BaseException], BaseException, TracebackType | None] | tuple[None, None, None]

MAX_TEXT = 16_384
"""Characters of a message, and the last so many of an exception."""
MAX_MODEL = 128
"""Characters kept of a model's name."""
NO_FAILURE = frozenset({"ok", CallerLeft.code})
"""The outcomes of requests whose status is all there is to say."""
OWN_PER_SECOND = 20
"""Lines a second of the gateway at most: breaker changes, defects."""
OTHERS_PER_SECOND = 1
"""Lines a second at most of each library that complains while something is down."""


class JsonFormatter(logging.Formatter):
    """One JSON object per line.

    Args:
        worker: its number, where the process is one of several.
    """

    def __init__(self, worker: int | None = None) -> None:
        super().__init__()
        self._own = {} if worker is None else {"worker": worker}

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        document = {
            "time": _rfc3339(int(record.created * 1e9)),
            "level": record.levelname.lower(),
            "logger": record.name,
            **self._own,
            "message": record.getMessage()[:MAX_TEXT],
        }
        if record.exc_info:
            document["exception"] = self.formatException(record.exc_info)[-MAX_TEXT:]
        return _as_one_line(document)


class ReadableFormatter(logging.Formatter):
    """A line for people, with the traceback of an exception below it.

    Args:
        worker: its number, where the process is one of several.
    """

    def __init__(self, worker: int | None = None) -> None:
        who = "" if worker is None else f"worker {worker}: "
        super().__init__(f"%(asctime)s %(levelname)-7s {who}%(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """Return the line itself."""
        return visible(super().formatMessage(record)[:MAX_TEXT])

    def formatException(self, ei: "SysExcInfo") -> str:  # noqa: N802 - logging's name
        """Return the lines of a traceback."""
        return "\n".join(map(visible, super().formatException(ei)[-MAX_TEXT:].split("\n")))


class RateLimit(logging.Filter):
    """Lets a few lines a second of each logger through; the next one says how many were left out."""

    def __init__(self, *, own: int = OWN_PER_SECOND, others: int = OTHERS_PER_SECOND) -> None:
        super().__init__()
        self._own = own
        self._others = others
        self._counts: dict[str, _Count] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line is written."""
        count = self._counts.setdefault(record.name, _Count())
        second = int(record.created)
        if second != count.second:
            count.second, count.passed = second, 0
        if count.passed >= (self._own if record.name == "gateway" else self._others):
            count.lost += 1
            return False
        count.passed += 1
        if count.lost:
            record.msg = f"{record.getMessage()} ({count.lost} lines left out before)"
            record.args = ()
            count.lost = 0
        return True


class _Count:
    __slots__ = ("lost", "passed", "second")

    def __init__(self) -> None:
        self.second = self.passed = self.lost = 0


def setup_logs(level: str, *, as_json: bool, worker: int | None = None) -> None:
    """Set up standard logging to stderr; libraries only from WARNING on, and few lines a second.

    Args:
        level: of the gateway's own lines.
        as_json: one object per line; else for people.
        worker: its number, where the process is one of several.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(worker) if as_json else ReadableFormatter(worker))
    handler.addFilter(RateLimit())
    logging.captureWarnings(capture=True)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("gateway").setLevel(level)


class RequestLog:
    """One line per request, formed when it has ended; where it goes, no request waits for it (see `Output`)."""

    def __init__(self, *, level: str, as_json: bool, stream: TextIO | None = None) -> None:
        self._lowest: int = logging.getLevelName(level)
        self._form = _json_line if as_json else _readable_line
        self._put = (stream or sys.stdout).write

    def write(self, record: "Record") -> None:
        """Write the line of a request that has ended."""
        level = level_of(record)
        if self._lowest <= level:
            self._put(self._form(record, level))


def level_of(record: "Record") -> int:
    """Return WARNING for failures behind the caller, INFO for answers, wrong requests and callers who left."""
    failed = record.status >= 500 or (record.status < 400 and record.outcome not in NO_FAILURE)  # noqa: PLR2004
    return logging.WARNING if failed else logging.INFO


class _AttemptFields(msgspec.Struct, omit_defaults=True):
    backend: str
    outcome: str | None
    seconds: float
    backoff_seconds: float
    decision: str | None
    request_id: str | None = None


class _WaitFields(msgspec.Struct):
    kind: str
    backend: str
    seconds: float


class _DrawnFields(msgspec.Struct, omit_defaults=True):
    backend: str
    model: str
    weight: int
    tripped: list[str] | None = None


class _Fields(msgspec.Struct, omit_defaults=True, kw_only=True):
    """The fields of a line, in this order; those that are None are left out."""

    time: str
    level: str
    message: str
    method: str
    path: str | None = None
    status: int
    outcome: str
    seconds: float
    queued_seconds: float
    stream: bool
    key: str | None = None
    route: str | None = None
    model: str | None = None
    backend: str | None = None
    attempts: list[_AttemptFields]
    waits: list[_WaitFields] | None = None
    skipped: list[str] | None = None
    drawn: _DrawnFields | None = None
    stop_reason: str | None = None
    error: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    key_tokens: int | None = None
    key_tokens_source: str | None = None
    config_generation: int = 0
    request_id: str
    trace_id: str
    span_id: str


_encode = msgspec.json.Encoder().encode


def _as_one_line(fields: object) -> str:
    """Return a JSON object without characters that command a terminal; JSON itself escapes only those below U+0020."""
    line = _encode(fields).decode()
    return line if line.isascii() and "\x7f" not in line else visible(line)


def _json_line(record: "Record", level: int) -> str:
    fields = _Fields(
        time=_rfc3339(record.started_ns),
        level="warning" if level == logging.WARNING else "info",
        message="request",
        method=record.method,
        path=record.path,
        status=record.status,
        outcome=record.outcome,
        seconds=_rounded(record.seconds(0.0)),
        queued_seconds=_rounded(record.queued),
        stream=record.stream,
        attempts=[
            _AttemptFields(
                attempt.backend,
                attempt.outcome,
                _rounded((attempt.ended or attempt.started) - attempt.started),
                _rounded(attempt.backoff),
                attempt.decision,
                attempt.request_id,
            )
            for attempt in record.attempts
        ],
        request_id=record.request_id,
        trace_id=record.trace,
        span_id=record.span_id.to_bytes(8).hex(),
    )  # more than 15 at once would be put into a dictionary first
    fields.route = record.route
    fields.model = record.model and record.model[:MAX_MODEL]
    fields.backend = record.backend
    fields.stop_reason = record.stop_reason
    fields.error = record.error_message
    fields.input_tokens = record.input_tokens
    fields.output_tokens = record.output_tokens
    fields.config_generation = record.generation
    if record.caller.name is not None:
        fields.key = record.caller.name
        fields.key_tokens, fields.key_tokens_source = record.charged, record.charged_by
    if record.waits:
        fields.waits = [
            _WaitFields(wait.kind, wait.backend, _rounded((wait.ended or wait.began) - wait.began))
            for wait in record.waits
        ]
    if record.events:
        _describe_events(fields, record)
    return _as_one_line(fields) + "\n"


def _describe_events(fields: _Fields, record: "Record") -> None:
    skipped: list[str] = []
    for _, name, event in record.events:
        if name == TARGET_SKIPPED:
            skipped.append(event["gateway.backend"])
        elif name == TARGET_DRAWN:
            model = event["gen_ai.request.model"][:MAX_MODEL]
            fields.drawn = _DrawnFields(
                event["gateway.backend"], model, event["gateway.weight"], event.get("gateway.tripped")
            )
    fields.skipped = skipped or None


def _readable_line(record: "Record", _level: int) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(record.started_ns / 1e9))
    attempts = ", ".join(f"{attempt.backend} {attempt.outcome}" for attempt in record.attempts)
    error = " ".join((record.error_message or "").split())
    line = (
        f"{clock} {record.status} {record.method} {record.path or '(unknown path)'}"
        f" {record.seconds(0.0) * 1000:.1f} ms {record.outcome}"
        f"{f' [{attempts}]' if attempts else ''}"
        f"{f' key={record.caller.name}' if record.caller.name is not None else ''}"
        f" request={record.request_id} trace={record.trace}"
        f"{f' ({error})' if error else ''}"
    )
    return visible(line) + "\n"


def _rounded(seconds: float) -> float:
    """Round to microseconds; many times as fast as `round` with digits."""
    return round(seconds * 1e6) / 1e6 if seconds else 0.0


def _rfc3339(nanoseconds: int) -> str:
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{_second(seconds)}.{rest // 10**6:03}Z"


@lru_cache(maxsize=8)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
