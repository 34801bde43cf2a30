"""Just enough of HTTP/1.1 to be cheap on both ends of a bench: one message at a time, on raw sockets."""

import re

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Incoming:
    """Requests as they come in on one connection, one at a time (no pipelining)."""

    def __init__(self) -> None:
        self._buffer = b""
        self._need = 0

    def take(self, data: bytes) -> tuple[bytes, bytes] | None:
        """Return the head and the body of a request, once it is whole."""
        self._buffer = buffer = self._buffer + data if self._buffer else data
        if len(buffer) < self._need:
            return None
        end = buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            return None
        head = buffer[:end]
        length = _LENGTH.search(head)
        self._need = end + (int(length[1]) if length else 0)
        if len(buffer) < self._need:
            return None
        body = buffer[end : self._need]
        self._buffer, self._need = b"", 0
        return head, body
