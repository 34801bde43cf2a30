"""HTTP/1.1 messages as they come on a connection, one after the other: each head as it is, each body piece by piece."""

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

MAX_HEAD = 1 << 16
"""Bytes; the limit that a `StreamReader` needs."""
PIECE = 1 << 16
"""Bytes."""
BODILESS = frozenset({204, 304})
EVENT_STREAM = b"text/event-stream"


class NotHttp(Exception):
    """What comes is not HTTP/1.1.

    Attributes:
        data: What was read of it.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__("not HTTP/1.1")
        self.data = data


@dataclass(frozen=True)
class Head:
    """The head of a request or of an answer.

    Attributes:
        raw: Its bytes, the empty line included.
        words: The three parts of its first line.
        headers: Names in lower case; of several with one name the last.
    """

    raw: bytes
    words: tuple[bytes, bytes, bytes]
    headers: Mapping[bytes, bytes]

    @property
    def status(self) -> int:
        """Of an answer."""
        return int(self.words[1])

    @property
    def is_interim(self) -> bool:
        """Whether it is an answer that only announces another one."""
        return self.words[1].startswith(b"1")

    @property
    def path(self) -> str:
        """Of a request, without its query."""
        return self.words[1].partition(b"?")[0].decode("latin-1")

    @property
    def is_chunked(self) -> bool:
        """Whether the body is in chunks, which say where it ends."""
        return self.headers.get(b"transfer-encoding", b"").lower().endswith(b"chunked")

    @property
    def length(self) -> int | None:
        """The body's length in bytes, where the head says it."""
        return int(self.headers.get(b"content-length", -1)) if self._has_length else None

    @property
    def is_event_stream(self) -> bool:
        """Whether the body is server-sent events."""
        return self.headers.get(b"content-type", b"").lower().startswith(EVENT_STREAM)

    @property
    def _has_length(self) -> bool:
        return not self.is_chunked and self.headers.get(b"content-length", b"").isdigit()

    def closing(self, length: int | None) -> bytes:
        """Return the head of an answer after which the connection closes; its body has this length, if it has one."""
        lines = self.raw.removesuffix(b"\r\n")
        lines = re.sub(rb"(?im)^(?:connection|keep-alive):.*\r\n", b"", lines)
        if length is not None:
            lines = re.sub(rb"(?im)^content-length:.*\r\n", b"Content-Length: %d\r\n" % length, lines)
        return lines + b"Connection: close\r\n\r\n"

    def frame(self, piece: bytes) -> bytes:
        """Return a piece of the body as it is sent."""
        return b"%x\r\n%b\r\n" % (len(piece), piece) if piece and self.is_chunked else piece

    @property
    def end(self) -> bytes:
        """What is sent after the last piece."""
        return b"0\r\n\r\n" if self.is_chunked else b""

    async def request_body(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        """Yield the body of a request as it comes; one that says no length has none."""
        async for piece in self._body(reader, self.length or 0):
            yield piece

    async def answer_body(self, reader: asyncio.StreamReader, method: bytes) -> AsyncIterator[bytes]:
        """Yield the body of the answer to such a request as it comes; one that says no length ends with the connection.

        Raises:
            EOFError: The connection ends before the body does.
            OSError: It breaks.
        """
        if method != b"HEAD" and self.status not in BODILESS:
            async for piece in self._body(reader, self.length):
                yield piece

    async def _body(self, reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
        if not self.is_chunked:
            async for piece in _pieces(reader, length):
                yield piece
            return
        while size := await _size(reader):
            async for piece in _pieces(reader, size):
                yield piece
            await reader.readexactly(2)
        while (await reader.readuntil(b"\n")).strip():
            pass  # trailers


async def read_head(reader: asyncio.StreamReader) -> Head | None:
    """Read the head of the next message; None: the connection ends.

    Raises:
        NotHttp: It is none.
        OSError: The connection breaks.
    """
    try:
        raw = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise NotHttp(error.partial) from None
        return None
    except asyncio.LimitOverrunError:
        raise NotHttp(b"") from None
    first, *lines = raw.split(b"\r\n")[:-2]
    one, two, three, *_ = (*first.split(b" ", 2), b"", b"")
    of_answer, of_request = one.startswith(b"HTTP/1.") and two.isdigit(), three.startswith(b"HTTP/1.")
    if not of_answer and not of_request:
        raise NotHttp(raw)
    parts = (line.partition(b":") for line in lines)
    return Head(raw, (one, two, three), {name.strip().lower(): value.strip() for name, _, value in parts})


async def _size(reader: asyncio.StreamReader) -> int:
    line = await reader.readuntil(b"\n")
    try:
        return int(line.partition(b";")[0], 16)
    except ValueError:
        raise ConnectionError(f"not the size of a chunk: {line[:100]!r}") from None


async def _pieces(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    left = length
    while left is None or left > 0:
        piece = await reader.read(PIECE if left is None else min(left, PIECE))
        if not piece:
            if left is None:
                return
            raise asyncio.IncompleteReadError(b"", left)
        if left is not None:
            left -= len(piece)
        yield piece
