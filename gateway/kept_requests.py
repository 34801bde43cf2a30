"""The last requests, kept in memory to be explained: what failed, was retried or slow stays longest.

Pure: no HTTP, no telemetry.
"""

import heapq
from collections import deque
from copy import copy
from operator import itemgetter
from sys import getsizeof
from typing import TYPE_CHECKING, NamedTuple

from gateway.errors import CallerError, CallerLeft, InvalidApiKey, RateLimitExceeded
from gateway.policy.caller import NOBODY
from gateway.record import MAX_REASON

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gateway.record import Record

BYTES_EACH = 8192
"""Bytes that a kept request may take on average; beyond that fewer are kept."""
RECORD_BYTES = 2048
"""Bytes of a record and of its place here, without attempts and texts of any length."""
ATTEMPT_BYTES, EVENT_BYTES, PASSED_OVER_BYTES, CANDIDATE_BYTES = 960, 640, 80, 8
"""Bytes of an attempt, of an event or a wait, of a replica that was passed over, and of a target of the route, without
such texts."""
SHORT = 256
"""Characters; names that are no longer in all are not looked at one by one: a character takes four bytes at most."""
REASON_BYTES = 4 * MAX_REASON + 88
"""Bytes of a finish reason."""
SLOW = 10.0
"""Seconds from which a request is slow, where no setting says so."""
STRANGE, ORDINARY = 0.1, 0.4
"""Shares of what is kept: so many requests of callers whom nobody knows, and of those that neither failed nor were
retried or slow, stay whatever else comes. What one kind does not need is for all."""
NO_FAILURE = frozenset(
    {"ok", CallerLeft.code, RateLimitExceeded.code, *(error.code for error in CallerError.__subclasses__())}
)
"""Outcomes that are the caller's own doing."""


_Entry = tuple[int, int, "Record"]


class Kept(NamedTuple):
    """A request, its number (1, 2, ... as they ended), and the bytes that it takes."""

    number: int
    size: int
    record: "Record"


class KeptRequests:
    """Keeps the last requests.

    Args:
        most: that are kept; 0: none.
        slow: seconds from which a request is slow.
        bytes_each: that one may take on average.

    Attributes:
        size: bytes that they take, about.
    """

    def __init__(self, most: int, *, slow: float = SLOW, bytes_each: int = BYTES_EACH) -> None:
        self._most = most
        self._slow = slow
        self._max_bytes = most * bytes_each
        self._notable: deque[_Entry] = deque()  # failed, retried, slow
        self._ordinary: deque[_Entry] = deque()  # answered, or the caller's own mistake
        self._strange: deque[_Entry] = deque()  # of callers whom nobody knows
        self._count = 0
        self._number = 0
        self.size = 0

    def __len__(self) -> int:
        return self._count

    def add(self, record: "Record") -> None:
        """Keep a request that has ended, without its texts; the oldest one that can be spared goes."""
        if not self._most:
            return
        if record.input_text is not None or record.output_text is not None:
            record = copy(record)  # the texts go with the spans
            record.forget_texts()
        size = size_of(record)
        # The instant of its end, so that what several processes keep has one order; no two have the same number.
        ended = record.started_ns + int(record.seconds(0.0) * 1e9)
        self._number = ended if ended > self._number else self._number + 1
        self._ring_of(record).append((self._number, size, record))
        self._count += 1
        self.size += size
        while self._count > self._most or self.size > self._max_bytes:
            self._drop()

    def newest(self, before: int | None = None) -> "Iterator[Kept]":
        """Yield what is kept, the newest first; `before`: only what ended before the request with this number."""
        rings = map(reversed, (self._notable, self._ordinary, self._strange))
        newest = heapq.merge(*rings, key=itemgetter(0), reverse=True)
        return (Kept(*entry) for entry in newest if before is None or entry[0] < before)

    def find(self, id_: str) -> "list[Record]":
        """Return the requests with this request id or trace id, the newest first: callers choose both."""
        return [kept.record for kept in self.newest() if has_id(kept.record, id_)]

    def _ring_of(self, record: "Record") -> "deque[_Entry]":
        if record.caller is NOBODY or record.outcome == InvalidApiKey.code:
            return self._strange
        if record.outcome in NO_FAILURE and len(record.attempts) < 2 and not record.waits:  # noqa: PLR2004
            return self._ordinary if record.seconds(0.0) < self._slow else self._notable
        return self._notable

    def _drop(self) -> None:
        """Drop the oldest of the least telling kind that has more than its share of what is kept."""
        ring = self._notable
        if len(self._strange) > STRANGE * self._count:
            ring = self._strange
        elif len(self._ordinary) > ORDINARY * self._count:
            ring = self._ordinary
        self.size -= ring.popleft()[1]
        self._count -= 1


def has_id(record: "Record", id_: str) -> bool:
    """Return whether a request has this request id or trace id."""
    return id_ in {record.request_id, record.trace}


def size_of(record: "Record") -> int:
    """Return the bytes that a request takes, at most, about."""
    attempts, reasons = record.attempts, record.finish_reasons
    size = RECORD_BYTES + ATTEMPT_BYTES * len(attempts) + CANDIDATE_BYTES * len(record.candidates)
    characters = len(record.model or "") + len(record.response_id or "") + len(record.response_model or "")
    if characters < SHORT:
        size += 4 * characters
    else:
        size += _size_of(record.model, record.response_id, record.response_model)
    if reasons is not None:
        size += REASON_BYTES if len(reasons) == 1 else _size_of(*reasons)
    if record.trace_state is not None or record.error_message is not None:
        size += _size_of(record.trace_state, record.error_message)
    for attempt in attempts:
        if attempt.message is not None:
            size += _size_of(attempt.message)
        if attempt.passed_over:
            size += PASSED_OVER_BYTES * len(attempt.passed_over)
    if record.events or record.waits:
        size += EVENT_BYTES * (len(record.events) + len(record.waits))
    return size


def _size_of(*texts: str | None) -> int:
    return sum(getsizeof(text) + 8 for text in texts if text is not None)
