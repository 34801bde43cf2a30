"""Server-sent events, split without being changed.

Source: WHATWG HTML, section "Server-sent events": lines end with LF, CR LF or CR; an empty line ends an event; a line
that begins with a colon is a comment.
"""

import re

from gateway.errors import InvalidResponse

MAX_EVENT = 1 << 20
"""Bytes. A longer event is a failure, like a cut stream."""

DONE = b"[DONE]"

_END_OF_EVENT = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE = re.compile(rb"\r\n|\n|\r")


class EventSplitter:
    """Takes bytes in any pieces and returns whole events, each with the empty line that ends it, byte for byte.

    An event that has not ended stays inside: half an event never goes on.

    Attributes:
        waiting: bytes of the event that has not ended.
    """

    __slots__ = ("_pieces", "waiting")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self.waiting = 0

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that `data` completes.

        Raises:
            InvalidResponse: an event is longer than `MAX_EVENT`.
        """
        if self._pieces:
            whole_line = b"\n" in data or b"\r" in data or self._pieces[-1].endswith(b"\r")
            if not whole_line and self.waiting + len(data) <= MAX_EVENT:
                self._pieces.append(data)  # joined when a line ends: small pieces of a large event stay cheap
                self.waiting += len(data)
                return []
            data = b"".join([*self._pieces, data])
        if b"\r" in data:
            events, rest = _split_any(data)
        else:
            parts = data.split(b"\n\n")
            rest = parts.pop()
            events = [part + b"\n\n" for part in parts]
        self._pieces = [rest] if rest else []
        self.waiting = len(rest)
        if len(data) > MAX_EVENT and max(map(len, [rest, *events])) > MAX_EVENT:
            raise InvalidResponse(f"The backend sent an event longer than {MAX_EVENT} bytes.")
        return events

    def end(self) -> list[bytes]:
        """Return what the end of the body completes: the event whose last CR could have been followed by an LF."""
        rest = b"".join(self._pieces)
        self._pieces, self.waiting = [], 0
        return [rest] if _END_OF_EVENT.search(rest) else []


def _split_any(data: bytes) -> tuple[list[bytes], bytes]:
    events = []
    start = 0
    for match in _END_OF_EVENT.finditer(data):
        end = match.end()
        if end == len(data) and data.endswith(b"\r"):
            break  # the LF of this CR may follow
        events.append(data[start:end])
        start = end
    return events, data[start:]


def line_of(event: bytes) -> bytes | None:
    """Return the data of a single event of one line, which nearly every read of a stream is; None for all else."""
    plain = event.startswith(b"data: ") and event.endswith(b"\n\n") and b"\r" not in event
    return event[6:-2] if plain and event.find(b"\n") == len(event) - 2 and len(event) <= MAX_EVENT else None


def data_of(event: bytes) -> bytes | None:
    """Return the data of an event; None when it has none, as a comment has not."""
    line = line_of(event)
    if line is not None:
        return line
    lines = []
    for line in _LINE.split(event):
        if line.startswith(b"data:"):
            lines.append(line[6:] if line.startswith(b"data: ") else line[5:])
        elif line == b"data":
            lines.append(b"")
    return b"\n".join(lines) if lines else None
