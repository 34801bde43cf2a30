"""Server-sent events, split without being changed.

Source: WHATWG HTML, section "Server-sent events": lines end with LF, CR LF or CR; an empty line ends an event; a line
that begins with a colon is a comment.

What every event passes is searched with `find`: `in` takes bytes for a number first, which costs 1,000 instructions.
"""

import re

from gateway.errors import PartTooLarge
from gateway.pieces import BLOCK, joined, taken_from

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BEGINNINGS = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":", b"\n", b"\r")
"""How a stream begins, after a byte order mark."""
DONE = b"[DONE]"
LF = ord("\n")

BORDER = 3
"""Bytes before new ones that can be part of the end of an event."""
MAX_LINES = 200_000
"""Lines of one event, of whatever kind; real servers write a few."""

TWO_ENDS = (b"\n\n", b"\n\r", b"\r\r")
"""What every end of an event holds, and nothing else: CR LF is one line end."""
_ENDS = re.compile(rb"(?>\r\n|\n|\r){2}(?>(?>:[^\r\n]*+(?>\r\n|\n|\r))*+(?>\r\n|\n|\r))*+")
"""With the further empty lines and events of comments that follow: one by one they would cost as much as real ones."""


class EventSplitter:
    """Takes bytes in any pieces and returns whole events, each with the empty line that ends it, byte for byte.

    Comments and further empty lines that follow it at once belong to it.

    An event that has not ended stays inside: half an event never goes on.

    Args:
        limit: bytes of an event.

    Attributes:
        waiting: bytes of the event that has not ended.
    """

    __slots__ = ("_before", "_border", "_limit", "_pieces", "waiting")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[bytes] = []
        self._before = 0  # bytes of the pieces
        self._border = b""
        self.waiting = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes.

        Raises:
            PartTooLarge: an event is longer than the limit.
        """
        if self.waiting:
            data = self._border + data
            if not _has_end(data) and self._before + len(data) <= self._limit:
                self._wait_with(data)
                return []
        if data.find(b"\r") >= 0 or data.find(b"\n\n\n") >= 0 or data.find(b"\n\n:") >= 0:
            events, rest = _split_any(data)
        elif data.endswith(b"\n\n") and data.find(b"\n\n") == len(data) - 2:  # not copied: it may be large
            events, rest = [data], b""
        else:
            parts = data.split(b"\n\n")
            rest = parts.pop()
            events = [part + b"\n\n" for part in parts]
        before = self._before
        if before and events:
            self._pieces.append(events[0])
            events[0] = joined(taken_from(self._pieces))
            self._before = 0
        self._border, self.waiting = b"", self._before
        if rest:
            self._wait_with(rest)
        if before + len(data) > self._limit and max([self.waiting, *map(len, events)]) > self._limit:
            raise PartTooLarge(f"The backend sent an event longer than {self._limit} bytes.")
        if before + len(data) > BLOCK and any(map(_has_many_lines, events)):
            raise PartTooLarge(f"The backend sent an event of more than {MAX_LINES} lines.")
        return events

    def _wait_with(self, data: bytes) -> None:
        """Keep what has no end yet, its border apart: what is searched once is not searched again."""
        if len(data) > BORDER:
            self._pieces.append(data[:-BORDER])
            self._before += len(data) - BORDER
        self._border = data[-BORDER:]
        self.waiting = self._before + len(self._border)

    def end(self, *, proper: bool) -> list[bytes]:
        """Return what the end of the body completes: the event whose last CR could have been followed by an LF.

        A proper end completes any last event; it gets the line ends that it lacks.
        """
        self._pieces.append(self._border)
        rest = joined(taken_from(self._pieces))
        self._border, self._before, self.waiting = b"", 0, 0
        if _has_end(rest):
            return [rest]
        if not proper or (data_of(rest) is None and error_of(rest) is None):
            return []
        return [rest + (b"\n" if rest.endswith((b"\n", b"\r")) else b"\n\n")]


def _has_end(data: bytes) -> bool:
    """Return whether an event ends; as `_ENDS` would say, which takes ten times as long to find nothing."""
    return any(data.find(end) >= 0 for end in TWO_ENDS)


def _has_many_lines(event: bytes) -> bool:
    lines = 0
    for at in range(0, len(event), BLOCK):  # block by block: other threads get their turn
        lines += max(event.count(b"\n", at, at + BLOCK), event.count(b"\r", at, at + BLOCK))
    return lines > MAX_LINES


def _split_any(data: bytes) -> tuple[list[bytes], bytes]:
    events = []
    start = 0
    for match in _ENDS.finditer(data):
        end = match.end()
        if end == len(data) and data.endswith(b"\r"):  # the LF of this CR may follow
            earlier = _ENDS.match(data, match.start(), end - 1)
            if earlier is None:
                break
            end = earlier.end()
        events.append(data[start:end])
        start = end
    return events, data[start:]


def line_of(event: bytes) -> bytes | None:
    """Return the data of a single event of one line, which nearly every read of a stream is; None for all else."""
    return event[6:-2] if _is_one_line(event) else None


def _is_one_line(event: bytes) -> bool:
    end = len(event) - 2
    return event.find(b"\n") == end and event[-1] == LF and event.find(b"\r") < 0 and event.startswith(b"data: ")


def data_of(event: bytes) -> bytes | None:
    """Return the data of an event; None when it has none, as a comment has not."""
    if _is_one_line(event):
        return event[6:-2] if len(event) <= BLOCK else joined([memoryview(event)[6:-2]])
    if event.find(b"data") < 0:
        return None
    lines = []
    for line in event.removeprefix(BYTE_ORDER_MARK).splitlines():
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None


def view_of_data(event: bytes) -> bytes | memoryview | None:
    """Return the same of a large event, that of one line without a copy."""
    return memoryview(event)[6:-2] if _is_one_line(event) else data_of(event)


def error_of(event: bytes) -> bytes | None:
    """Return the value of an `error:` field, which llama.cpp wrote until autumn 2025; None when it has none."""
    if b"error:" not in event:
        return None
    for line in event.removeprefix(BYTE_ORDER_MARK).splitlines():
        if line.startswith(b"error:"):
            return line[6:].strip()
    return None


def begins_as_stream(data: bytes) -> bool:
    """Return whether a body without a content type begins as a stream does."""
    return data.removeprefix(BYTE_ORDER_MARK).startswith(BEGINNINGS)
