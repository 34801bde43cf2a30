"""How long a caller waits in total, and how much of that is left."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

READ_TIMEOUT_MARGIN = 0.1
"""An answer that arrives just as the OpenAI SDK gives up is too late: this share of the SDK's read timeout, at most
`READ_TIMEOUT_MARGIN_MAX` seconds, is kept for the way back."""
READ_TIMEOUT_MARGIN_MAX = 0.25


class Deadline:
    """One deadline for queueing, attempts and backoffs. Instants are seconds of `clock`.

    Attributes:
        start: when the request's headers had arrived.
        end: when its answer must have ended.
        commit_by: when the first byte of its answer must have been sent; never after `end`.
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
        """Return the seconds until the answer must have ended, never below 0."""
        left = self.end - self._clock()
        return left if left > 0 else 0.0

    def left_to_commit(self) -> float:
        """Return the seconds until the first byte of the answer must have been sent, never below 0."""
        left = self.commit_by - self._clock()
        return left if left > 0 else 0.0
