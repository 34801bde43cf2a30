"""The total time a caller waits, and how much of it is left."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ_TIMEOUT_MARGIN = 0.1
"""An answer at the very moment the OpenAI SDK gives up comes too late: this share of its read timeout, and at most
`READ_TIMEOUT_MARGIN_MAX` seconds, is kept for the way back."""
READ_TIMEOUT_MARGIN_MAX = 0.25


class Deadline:
    """One deadline for queueing, attempts and sleeps. All instants in seconds of `clock`.

    Attributes:
        start: when the request's headers had arrived.
        end: when its answer must have ended.
        commit_by: when its first byte must have been sent; never after `end`.
    """

    __slots__ = ("_clock", "commit_by", "end", "start")

    def __init__(
        self, clock: "Callable[[], float]", start: float, seconds: float, read_timeout: float | None = None
    ) -> None:
        self._clock = clock
        self.start = start
        self.end = start + seconds
        self.commit_by = self.end
        if read_timeout is not None:
            margin = min(READ_TIMEOUT_MARGIN_MAX, read_timeout * READ_TIMEOUT_MARGIN)
            self.commit_by = min(self.end, start + read_timeout - margin)

    def left(self) -> float:
        """Seconds until the answer must have ended, never below 0."""
        return max(0.0, self.end - self._clock())

    def left_to_commit(self) -> float:
        """Seconds until the first byte of the answer must have been sent, never below 0."""
        return max(0.0, self.commit_by - self._clock())


def seconds(text: str | None) -> float | None:
    """A positive finite number of seconds, or None for anything else."""
    value = number(text)
    return value if 0 < value < math.inf else None


def number(text: str | None) -> float:
    """The number in a header; NaN for anything else, and for what only Python reads as one (`1_0`, foreign digits)."""
    if text is None or "_" in text or not text.isascii():
        return math.nan
    try:
        return float(text)
    except ValueError:
        return math.nan
