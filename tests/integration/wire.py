"""A caller's bare connection: any bytes out, answers in, byte for byte."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit

from testkit.completions import CHAT
from testkit.http import Answer
from testkit.polling import PATIENCE
from tests.integration.gateways import Gateway

BODY = json.dumps(CHAT).encode()


class Wire:
    """A TCP connection to the gateway."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """As they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of the next answer, a `100 Continue` included."""
        async with asyncio.timeout(PATIENCE):
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1]), headers

    async def answer(self) -> Answer:
        """The next answer, whole."""
        status, headers = await self.head()
        low = {name.lower(): value for name, value in headers.items()}
        if low.get("transfer-encoding") == "chunked":
            body = await self._chunks()
        else:
            body = await self.some(int(low["content-length"]))
        return Answer(status, headers, body)

    async def some(self, size: int) -> bytes:
        """The next `size` bytes."""
        async with asyncio.timeout(PATIENCE):
            return await self._reader.readexactly(size)

    async def rest(self) -> bytes:
        """All that comes until the other side closes; a reset is an end as well."""
        pieces = []
        async with asyncio.timeout(PATIENCE):
            with suppress(ConnectionResetError):
                while piece := await self._reader.read(65_536):
                    pieces.append(piece)
        return b"".join(pieces)

    async def rest_and_reset(self) -> tuple[bytes, bool]:
        """All that comes until the other side closes, and whether that was a reset."""
        pieces = []
        async with asyncio.timeout(PATIENCE):
            try:
                while piece := await self._reader.read(65_536):
                    pieces.append(piece)
            except ConnectionResetError:
                return b"".join(pieces), True
        return b"".join(pieces), False

    async def rest_of_chunks(self) -> bytes:
        """The body of a chunked answer whose head has been read."""
        return await self._chunks()

    def leave(self) -> None:
        """Close at once."""
        self._writer.transport.abort()

    def half_close(self) -> None:
        """Say that nothing more will be sent."""
        self._writer.write_eof()

    async def _chunks(self) -> bytes:
        pieces = []
        while piece := await self._chunk():
            pieces.append(piece)
        return b"".join(pieces)

    async def _chunk(self) -> bytes:
        async with asyncio.timeout(PATIENCE):  # for each: a large body takes a busy machine long
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            piece = await self._reader.readexactly(size)
            assert await self._reader.readexactly(2) == b"\r\n"
        return piece


@asynccontextmanager
async def dial(url: str, *, receive_buffer: int | None = None) -> AsyncIterator[Wire]:
    """Connect; `receive_buffer` bytes make a caller who takes little while he does not read."""
    parts = urlsplit(url)
    connection = socket.socket()
    connection.setblocking(False)
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(connection, (parts.hostname, parts.port))
    limit = receive_buffer if receive_buffer is not None else 1 << 20
    reader, writer = await asyncio.open_connection(sock=connection, limit=limit)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()
        with suppress(ConnectionError):
            await writer.wait_closed()


def chunks_in(data: bytes) -> tuple[bytes, bool]:
    """The body in the chunks of a connection that has ended, and whether it has its proper end."""
    pieces: list[bytes] = []
    while b"\r\n" in data:
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        if not size:
            return b"".join(pieces), True
        pieces.append(data[:size])
        data = data[size + 2 :]
    return b"".join(pieces), False


async def send(gateway: Gateway, data: bytes) -> Answer:
    """Send bytes on a connection of their own; the answer."""
    async with dial(gateway.url) as wire:
        await wire.send(data)
        return await wire.answer()


def post(body: bytes = BODY, headers: Mapping[str, str] | None = None, *, path: str = "/v1/chat/completions") -> bytes:
    """A prompt as bytes; `headers` come on top of the usual ones, or in their place."""
    merged = {
        "host": "gateway",
        "content-type": "application/json",
        "content-length": str(len(body)),
        **(headers or {}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in merged.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode("utf-8", "surrogateescape") + body


def chunked(*chunks: bytes, end: bytes = b"0\r\n\r\n", headers: Mapping[str, str] | None = None) -> bytes:
    """The same without a length, in chunks."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\ncontent-type: application/json\r\n"
        f"{extra}transfer-encoding: chunked\r\n\r\n"
    )
    return head.encode() + b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + end
