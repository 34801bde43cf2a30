"""Backends that fail as the mock model cannot: on bare sockets, byte by byte."""

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from typing import Any, Self

from testkit.polling import PATIENCE

STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
OPEN_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
"""Of a body that ends with its connection."""
END = b"0\r\n\r\n"
ANSWER = b'{"id": "raw", "object": "chat.completion", "choices": []}'


class RawCall:
    """One prompt, as it came, and the means of answering it.

    Attributes:
        line: method, path and query, version.
        headers: names in lower case.
        body: bytes.
        number: 1, 2, ... over all prompts; `turn`: over those on this connection.
    """

    def __init__(
        self,
        line: str,
        headers: dict[str, str],
        body: bytes,
        *,
        number: int,
        turn: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.line = line
        self.headers = headers
        self.body = body
        self.number = number
        self.turn = turn
        self._reader = reader
        self._writer = writer

    async def send(self, data: bytes) -> None:
        """As they are; waits while the other side does not read."""
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, body: bytes = ANSWER, *, status: str = "200 OK", headers: str = "") -> None:
        """A whole answer, kept alive."""
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n{headers}\r\n"
        await self.send(head.encode() + body)

    async def events(self, *events: bytes) -> None:
        """Events, all in one chunk of a chunked body."""
        data = b"".join(events)
        await self.send(b"%x\r\n%s\r\n" % (len(data), data))

    async def left(self) -> float:
        """Send nothing more; the instant when the other side has closed the connection."""
        with suppress(ConnectionError):
            while await self._reader.read(65_536):
                pass
        return monotonic()

    def close(self) -> None:
        """End the connection after what was sent."""
        self._writer.close()

    def reset(self) -> None:
        """Break the connection with a TCP RST."""
        connection: socket.socket = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Play = Callable[[RawCall], Awaitable[object]]


class RawBackend:
    """Listens on 127.0.0.1 while it is entered; what it answers to a prompt, `play` decides.

    Attributes:
        calls: the prompts that came.
        probes: how often its health was asked; `healthy`: what it said.
        lists: the head of each question for its models; the answer is 404.
    """

    def __init__(self, play: Play) -> None:
        self.calls: list[RawCall] = []
        self.probes = 0
        self.lists: list[list[str]] = []
        self.healthy = True
        self._play = play
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    @property
    def url(self) -> str:
        """Without `/v1`."""
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()

    async def called(self, total: int) -> None:
        """Wait until so many prompts have come."""
        async with asyncio.timeout(PATIENCE):
            while len(self.calls) < total:  # noqa: ASYNC110
                await asyncio.sleep(0.005)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._talk(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        turn = 0
        while not writer.is_closing():
            lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            if lines[0].startswith("GET /health"):
                self.probes += 1
                status = b"200 OK" if self.healthy else b"500 Internal Server Error"
                writer.write(b"HTTP/1.1 %s\r\ncontent-length: 0\r\n\r\n" % status)
                continue
            if lines[0].startswith("GET ") and "/models" in lines[0]:
                self.lists.append(lines)
                writer.write(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                continue
            turn += 1
            call = RawCall(lines[0], headers, body, number=len(self.calls) + 1, turn=turn, reader=reader, writer=writer)
            self.calls.append(call)
            await self._play(call)
        await writer.wait_closed()


StartRaw = Callable[[Play], Awaitable[RawBackend]]


@asynccontextmanager
async def raw_backends() -> AsyncIterator[StartRaw]:
    """Start backends; all of them end with the block."""
    async with AsyncExitStack() as stack:

        async def start(play: Play) -> RawBackend:
            return await stack.enter_async_context(RawBackend(play))

        yield start


@asynccontextmanager
async def full_backlog() -> AsyncIterator[str]:
    """The url of a listener that accepts nobody: its backlog is full, so that a further connect gets no reply."""
    loop = asyncio.get_running_loop()
    listener = socket.socket()
    waiting: list[socket.socket] = []
    try:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(64):
            connection = socket.socket()
            connection.setblocking(False)
            waiting.append(connection)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.3):
                    await loop.sock_connect(connection, listener.getsockname())
            if not _is_connected(connection):  # where it is, the time was over because the machine stood still
                break
        else:
            raise AssertionError("this kernel never lets a backlog be full")
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for connection in [*waiting, listener]:
            connection.close()


def _is_connected(connection: socket.socket) -> bool:
    try:
        connection.getpeername()
    except OSError:
        return False
    return True


def chunk(content: str | None = None, *, finish: str | None = None, index: int = 0, **more: Any) -> bytes:  # noqa: ANN401
    """One event of a chat's stream: the role chunk when it has neither content nor a finish reason."""
    delta: dict[str, Any] = {}
    if content is not None:
        delta["content"] = content
    elif finish is None:
        delta["role"] = "assistant"
    choice = {"index": index, "delta": delta, "finish_reason": finish}
    return event({"id": "raw", "object": "chat.completion.chunk", "choices": [choice], **more})


def event(document: object, *, name: str | None = None) -> bytes:
    """A server-sent event."""
    line = b"" if name is None else f"event: {name}\n".encode()
    return line + b"data: " + json.dumps(document).encode() + b"\n\n"
