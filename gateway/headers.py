"""Which headers pass through, and how they are written."""

from collections.abc import Callable, Iterable
from functools import lru_cache

FORWARDED_NAMES = frozenset({"content-type", "accept", "user-agent", "idempotency-key"})
FORWARDED_PREFIXES = ("openai-", "x-stainless-")
PASSED_NAMES = frozenset({"content-type", "retry-after", "retry-after-ms"})
PASSED_PREFIXES = ("openai-", "x-ratelimit-")


def only(names: frozenset[str], prefixes: tuple[str, ...]) -> Callable[[str], str | None]:
    """Judges a header's name: itself in lower case, or None when the header stays here."""

    @lru_cache(maxsize=512)
    def judge(name: str) -> str | None:
        low = name.lower()
        return low if low in names or low.startswith(prefixes) else None

    return judge


forwarded_as = only(FORWARDED_NAMES, FORWARDED_PREFIXES)
"""From callers to backends."""
passed_as = only(PASSED_NAMES, PASSED_PREFIXES)
"""From backends to callers."""


def lines_of(headers: Iterable[tuple[str, str]]) -> str:
    """The lines of a head.

    Raises:
        ValueError: a value holds a line end, and would be more than one header.
    """
    lines = [f"{name}: {value}\r\n" for name, value in headers]
    text = "".join(lines)
    if text.count("\n") != len(lines) or text.count("\r") != len(lines):
        raise ValueError("a header holds a line end")
    return text
