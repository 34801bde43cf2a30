"""Every override of aiohttp's client: its connections, used without the session around them.

The session costs as much again as all the rest and does nothing for a POST of bytes (docs/performance.md). What is used
here is not documented by aiohttp: its version is bounded in pyproject.toml, and tests/unit/gateway/test_aiohttp.py
asserts that each name exists and does what is assumed.
"""

import asyncio
import socket
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from gateway.errors import InvalidResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.http_parser import RawResponseMessage
    from aiohttp.tracing import Trace

LARGE_BODY = 1 << 20
"""Bytes; a larger body is not copied to follow its head in one write."""
INTERIM = frozenset(range(100, 200)) - {101}
"""Statuses that another answer follows."""


class Protocol(ResponseHandler):
    """One connection."""

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """End a body that is under way when the connection fails.

        aiohttp tells the body's reader that the connection was closed, but not that its bytes are not HTTP.
        """
        super().set_exception(exc, exc_cause or exc)
        body = self._payload
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection failed in the middle of a body"))

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """Resume reading only where it was paused.

        It is called after every read; aiohttp would ask the parser for more each time, which only a paused one has.
        """
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Forget an answer that nobody will read: it would hold the connection, which holds the answer."""
        super().connection_lost(exc)
        self._loop.call_soon(self._buffer.clear)  # not before a reader that waits for it has read it


class _Opening:
    """Whether a call opened a connection of its own, or got one that was kept alive."""

    __slots__ = ("new",)

    def __init__(self) -> None:
        self.new = False


_opening: ContextVar[_Opening] = ContextVar("_opening")


def note_new_connection() -> None:
    """Note that the current call opens a connection of its own."""
    opening = _opening.get(None)
    if opening is not None:
        opening.new = True


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """Make the socket of a new connection; called in the context of the call that needs it."""
    note_new_connection()
    family, kind, protocol = address[:3]
    return socket.socket(family=family, type=kind, proto=protocol)


class Connector(aiohttp.TCPConnector):
    """Opens connections without a limit, and of those kept alive reuses the one used last.

    It is in every cache and least likely to be dead, and those that a peak left over end by their age. aiohttp takes
    turns.

    Args:
        force_close: whether connections are closed after one answer.
        connect_timeout: seconds.
    """

    def __init__(self, *, force_close: bool, connect_timeout: float) -> None:
        super().__init__(limit=0, socket_factory=_socket, force_close=force_close)
        protocol: Callable[..., ResponseHandler] = Protocol
        self._factory = partial(protocol, self._loop)
        self._connect_timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout)

    async def open(self, request: aiohttp.ClientRequest) -> tuple["Connection", bool]:
        """Return a connection for a request, and whether it is new.

        Raises:
            aiohttp.ClientConnectorError, TimeoutError, OSError: there is none.
        """
        opening = _Opening()
        _opening.set(opening)
        connection = await self.connect(request, [], self._connect_timeout)
        while not opening.new and _is_spoiled(connection):
            connection.close()
            connection = await self.connect(request, [], self._connect_timeout)
        return connection, opening.new

    async def _get(self, key: "ConnectionKey", traces: list["Trace"]) -> "Connection | None":
        kept = self._conns.get(key)
        if kept is not None:
            while kept and not kept[-1][0].is_connected():
                kept.pop()[0].close()
            kept.rotate()
        return await super()._get(key, traces)


def _is_spoiled(connection: "Connection") -> bool:
    """Return whether something came on a kept connection since its last answer: it would pass for the next answer."""
    return connection.protocol is None or connection.protocol.should_close


def post_request(url: URL) -> aiohttp.ClientRequest:
    """Return what the connector needs to know of POSTs to a url; it is never sent itself."""
    return aiohttp.ClientRequest("POST", url, loop=asyncio.get_running_loop())


async def send(connection: "Connection", head: bytes, body: bytes) -> tuple["RawResponseMessage", aiohttp.StreamReader]:
    """Send a request over a connection and return the head of its answer, and the reader of its body.

    Raises:
        aiohttp.ClientError, HttpProcessingError, OSError: there is no answer.
        InvalidResponse: its status is below 200, and none follows.
    """
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None:
        raise aiohttp.ServerDisconnectedError
    protocol.set_response_params(auto_decompress=False, read_until_eof=True)
    if len(body) > LARGE_BODY:
        transport.write(head)
        transport.write(body)
    else:
        transport.write(head + body)
    while True:
        message, content = await protocol.read()
        if message.code >= 200:  # noqa: PLR2004
            return message, content
        if message.code not in INTERIM:
            raise InvalidResponse(f"The backend answered {message.code}, which does not answer a prompt.")


def unread(content: aiohttp.StreamReader) -> bytes:
    """Return what came of a body before its connection failed; aiohttp would lose it."""
    return bytes(content._read_nowait(-1))  # noqa: SLF001
