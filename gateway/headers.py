"""HTTP headers: which ones pass through, how they are written, and what those say that are read."""

import math
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime
from functools import lru_cache

FORWARDED_NAMES = frozenset({"content-type", "accept", "user-agent", "idempotency-key"})
FORWARDED_PREFIXES = ("openai-", "anthropic-", "x-stainless-")
PASSED_NAMES = frozenset({"content-type", "retry-after", "retry-after-ms"})
RATE_LIMITS = "x-ratelimit-"
PASSED_PREFIXES = ("openai-", "anthropic-")
KEY_ENDINGS = ("key", "token", "secret", "authorization")
"""Of names of headers that hold keys: none of them passes by its prefix."""
GATEWAY_NAMES = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer"),
        *("transfer-encoding", "upgrade", "host", "content-length", "content-type", "content-encoding", "expect"),
        *("accept-encoding", "idempotency-key", "traceparent", "tracestate", "x-request-id", "x-request-timeout"),
    }
)
"""To backends: those of a hop, and those that the gateway makes or that describe the caller's body and request."""
MAX_REQUEST_ID = 128
"""Characters."""
MAX_WAIT = 1e9
"""Seconds or milliseconds; a longer wait is taken for garbage."""


def only(names: frozenset[str], prefixes: tuple[str, ...]) -> Callable[[str], str | None]:
    """Return a function that gives a header's name in lower case, or None when the header does not pass."""

    @lru_cache(maxsize=512)
    def judge(name: str) -> str | None:
        low = name.lower()
        if low in names or (low.startswith(prefixes) and not low.endswith(KEY_ENDINGS)):
            return low
        return None

    return judge


forwarded_as = only(FORWARDED_NAMES, FORWARDED_PREFIXES)
"""From callers to backends."""
passed_as = only(PASSED_NAMES, (*PASSED_PREFIXES, RATE_LIMITS))
"""From backends to callers."""
passed_to_limited = only(PASSED_NAMES, PASSED_PREFIXES)
"""From backends to callers who have limits of their own: those are told in their place."""


def passed_headers(headers: Mapping[str, str], *, limited: bool) -> dict[str, str]:
    """Return the headers of a backend's answer that pass to a caller: the first of each name whose value may pass."""
    name_of = passed_to_limited if limited else passed_as
    passed: dict[str, str] = {}
    for name, value in headers.items():
        low = name_of(name)
        if low is not None and low not in passed and _is_plain(value):
            passed[low] = value
    return passed


def lines_of(headers: Iterable[tuple[str, str]]) -> str:
    """Return headers as the lines of an HTTP message.

    Raises:
        ValueError: a value holds a line end, and would become more than one header.
    """
    lines = [f"{name}: {value}" for name, value in headers]
    text = "".join(lines)
    if "\n" in text or "\r" in text:
        raise ValueError("a header holds a line end")
    return "\r\n".join([*lines, ""])


def is_request_id(text: str) -> bool:
    """Return whether a text is fit to be the id of a request: 1 to 128 visible ASCII characters."""
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable() and " " not in text


def seconds(text: str | None) -> float | None:
    """Return a positive finite number of seconds, or None for anything else."""
    if text is None:
        return None
    value = _number(text)
    return value if 0 < value < math.inf else None


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that `retry-after-ms` or `Retry-After` (seconds or a date) asks to wait, if it is valid.

    Args:
        headers: names in lower case.
        now: seconds since the epoch.

    Source: RFC 9110, 10.2.3; `retry-after-ms` is OpenAI's, and wins.
    """
    milliseconds = _wait(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    wait = _wait(text)
    if wait is not None or text is None:
        return wait
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # asctime's form names no zone, and is GMT
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - now)
    except (ValueError, TypeError, OverflowError):
        return None


def _is_plain(value: str) -> bool:
    """Return whether a value holds only what a server may send: ASCII without control characters, except tabs."""
    return value.isascii() and (value.isprintable() or value.replace("\t", " ").isprintable())


def _wait(text: str | None) -> float | None:
    value = _number(text)
    return value if 0 <= value < MAX_WAIT else None


def _number(text: str | None) -> float:
    """Return the number in a header; NaN for anything else, and for what only Python accepts (`1_0`, other digits)."""
    if text is None or "_" in text or not text.isascii():
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan
