"""Every override of aiohttp's client: its connections, used without the session around them.

The session costs as much again as all the rest and does nothing for a POST of bytes (docs/performance.md). What is used
here is not documented by aiohttp: its version is bounded in pyproject.toml, and tests/unit/gateway/test_aiohttp.py
asserts that each name exists and does what is assumed.
"""

import asyncio
import math
import socket
from contextvars import ContextVar
from errno import EADDRNOTAVAIL, ENETUNREACH
from functools import partial
from itertools import chain
from time import monotonic
from typing import TYPE_CHECKING, Any

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import LineTooLong
from yarl import URL

from gateway.backend.failures import SHORT_OF, headers_too_large
from gateway.errors import InternalError, InvalidResponse
from gateway.phase_timer import PhaseTimer

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Set as AbstractSet
    from ssl import SSLContext

    from aiohttp.abc import ResolveResult
    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.http_parser import RawResponseMessage
    from aiohttp.tracing import Trace

    from gateway.errors import GatewayError

LARGE_BODY = 1 << 20
"""Bytes; a larger body is not copied to follow its head in one write."""
MAX_HEADERS = 65_536
"""Bytes of an answer's headers, one by one and all together; aiohttp allows one 8 KiB."""
MAX_HEADER_LINES = 1024
FEW_LINES = 8
"""Lines whose sum is not worth its time: each is within the limit."""
READ = 65_536
"""Bytes of an answer that wait here until they are read; twice as many stop reading from its backend."""
RESOLVE_AFTER = 10.0
"""Seconds after which the name of a host with kept connections is resolved anew."""
INTERIM = frozenset(range(100, 200)) - {101}
"""Statuses that another answer follows."""
MAX_INTERIM = 100
"""Interim answers to one request; real servers send a few."""
NO_LIMITS = aiohttp.ClientTimeout(total=None)
"""aiohttp's timers are not used: see `PhaseTimer`."""


class Protocol(ResponseHandler):
    """One connection.

    Attributes:
        peer: the address at its other end.
        new: whether no call has got it yet.
    """

    peer = ""
    new = True
    _head: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Note who is at the other end."""
        super().connection_made(transport)
        name = transport.get_extra_info("peername")
        self.peer = _address(name[0]) if name else ""

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """End a body that is under way when the connection fails.

        aiohttp tells the body's reader that the connection was closed, but not that its bytes are not HTTP.
        """
        super().set_exception(exc, exc_cause or exc)
        self._end_body()

    def _end_body(self) -> None:
        """Tell the reader of a body that is under way that it was cut off."""
        body = self._payload
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection failed in the middle of a body"))

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """Resume reading only where it was paused.

        It is called after every read; aiohttp would ask the parser for more each time, which only a paused one has.
        """
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def limit_head(self) -> None:
        """Fail when what comes before an answer's body is larger than its headers may be."""
        head = self._head
        if head is None:
            head = self._head = _Head(self)
        head.parser, head.left = self._parser, MAX_HEADERS
        self._parser = head

    def hold_back(self) -> None:
        """Read nothing more until `go_on`."""
        self._pause_reading_for_buffer()

    def go_on(self) -> None:
        """Read again."""
        self._resume_reading_for_buffer()

    def read_less(self) -> None:
        """Read at most `READ` bytes at a time from here on, until `read_as_ever`."""
        if self.transport is not None:
            self.transport.set_protocol(_SmallReads(self))

    def read_as_ever(self) -> None:
        """Read as much at a time as comes."""
        if self.transport is not None:
            self.transport.set_protocol(self)

    def connection_lost(self, exc: BaseException | None) -> None:
        """End a body that lasts until the connection ends, and forget an answer that nobody will read.

        aiohttp takes a reset for the proper end of such a body. An answer would hold the connection, which holds it.
        """
        if exc is not None:
            self._end_body()
        super().connection_lost(exc)
        self._head = None
        self._loop.call_soon(self._buffer.clear)  # not before a reader that waits for it has read it


class _Head:
    """Stands for a protocol's parser until the head of an answer has come; aiohttp would hold a head of any size."""

    __slots__ = ("left", "parser", "protocol")

    def __init__(self, protocol: Protocol) -> None:
        self.protocol = protocol
        self.parser: Any = None
        self.left = 0

    def feed_data(self, data: bytes) -> Any:  # noqa: ANN401
        """Parse what has come. Raises: LineTooLong, when it is too much without a head."""
        parsed = self.parser.feed_data(data)
        if parsed[0] and parsed[0][-1][0].code >= 200:  # noqa: PLR2004
            self.protocol._parser, self.parser = self.parser, None  # noqa: SLF001
            return parsed
        self.left -= len(data)
        if self.left < 0:
            raise LineTooLong(b"", MAX_HEADERS)
        return parsed

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self.parser, name)


class _SmallReads(asyncio.BufferedProtocol):
    """Hands on to a protocol what comes, at most `READ` bytes at a time; an event loop reads up to 256 KiB."""

    _buffer = bytearray(READ)  # of all connections: it is empty again before another one reads

    def __init__(self, protocol: Protocol) -> None:
        self._protocol = protocol

    def get_buffer(self, _size: int) -> bytearray:
        """Return where to read to."""
        return self._buffer

    def buffer_updated(self, size: int) -> None:
        """Hand on what has been read."""
        self._protocol.data_received(bytes(memoryview(self._buffer)[:size]))

    def eof_received(self) -> None:
        """Hand on that nothing more will come."""
        self._protocol.eof_received()

    def pause_writing(self) -> None:
        """Hand on that what was sent has not been taken."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Hand on that it has been taken."""
        self._protocol.resume_writing()

    def connection_lost(self, exc: BaseException | None) -> None:
        """Hand on that the connection has ended."""
        self._protocol.connection_lost(exc)


class ConnectLimit(aiohttp.ClientTimeout):
    """How long a new connection may take: `seconds`; `late` makes the error of one that takes longer.

    To aiohttp, which hands it on to where a connection is opened, it says that there is no limit.
    """

    seconds: float
    late: "Callable[[], GatewayError]"

    def __init__(self, seconds: float = math.inf, late: "Callable[[], GatewayError]" = InternalError) -> None:
        super().__init__(total=None)
        object.__setattr__(self, "seconds", seconds)  # aiohttp's class is frozen
        object.__setattr__(self, "late", late)


NO_LIMIT = ConnectLimit()
_shortages: ContextVar[list[OSError]] = ContextVar("_shortages")
"""The errors, at each of a host's addresses, that say that the gateway's own machine lacks something."""


def _note_shortage(error: OSError) -> None:
    """Note a shortage of the gateway's own machine: of several addresses' errors aiohttp makes one without a number."""
    if error.errno in SHORT_OF:
        _shortages.get([]).append(error)


class _Socket(socket.socket):
    """A socket that tells the two reasons of one system error apart."""

    def connect(self, address: Any) -> None:  # noqa: ANN401
        """Connect. Raises: OSError; EADDRNOTAVAIL only where the local ports are used up."""
        try:
            super().connect(address)
        except OSError as error:
            if error.errno == EADDRNOTAVAIL and not _has_way_to(address, self.family):
                raise OSError(ENETUNREACH, "no address of this machine leads there") from None
            _note_shortage(error)
            raise


def _has_way_to(address: Any, family: int) -> bool:  # noqa: ANN401
    """Return whether this machine has an address from which another can be reached; nothing is sent."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as unsent:
            unsent.connect(address)
    except OSError as error:
        return error.errno != EADDRNOTAVAIL
    return True


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """Make the socket of a new connection; called in the context of the call that needs it."""
    family, kind, protocol = address[:3]
    try:
        return _Socket(family=family, type=kind, proto=protocol)
    except OSError as error:
        _note_shortage(error)
        raise


class Names(AbstractResolver):
    """Resolves names, and remembers what they were resolved to last.

    Args:
        resolver: asks the name servers.
        clock: seconds, monotonic.
        changed: called with host and port when a name has come to stand for other addresses.
    """

    def __init__(
        self, resolver: AbstractResolver, clock: "Callable[[], float]", changed: "Callable[[str, int], None]"
    ) -> None:
        self._resolver = resolver
        self._clock = clock
        self._changed = changed
        self._known: dict[tuple[str, int], tuple[frozenset[str], float]] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[None]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> "list[ResolveResult]":
        """Return the addresses of a host. Raises: OSError."""
        found = await self._resolver.resolve(host, port, family)
        self._known[host, port] = frozenset(_address(each["host"]) for each in found), self._clock()
        return found

    def addresses(self, host: str, port: int) -> frozenset[str] | None:
        """Return what a name was resolved to last, and resolve it anew in the background when that is long ago.

        None for what is no name. While the name servers do not answer, the last addresses are as good as any.
        """
        known = self._known.get((host, port))
        if known is None:
            return None
        addresses, since = known
        if self._clock() - since >= RESOLVE_AFTER and (host, port) not in self._asking:
            self._asking[host, port] = asyncio.get_running_loop().create_task(self._ask(host, port))
        return addresses

    def keep_only(self, names: "AbstractSet[tuple[str, int]]") -> None:
        """Forget what all others were resolved to."""
        for name in self._known.keys() - names - self._asking.keys():
            del self._known[name]

    async def close(self) -> None:
        """Ask nobody any more."""
        for task in self._asking.values():
            task.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)
        await self._resolver.close()

    async def _ask(self, host: str, port: int) -> None:
        before, _ = self._known[host, port]
        try:
            await self.resolve(host, port, socket.AF_UNSPEC)
        except OSError:
            self._known[host, port] = before, self._clock()
        finally:
            del self._asking[host, port]
        if self._known[host, port][0] != before:
            self._changed(host, port)


class Connector(aiohttp.TCPConnector):
    """Opens connections without a limit, and of those kept alive reuses the one used last.

    It is in every cache and least likely to be dead, and those that a peak left over end by their age. aiohttp takes
    turns. A kept connection is not reused when its host's name has come to stand for other addresses: a server that has
    moved may still answer at the old one, with an old model, or until it is shut down.

    Args:
        force_close: whether connections are closed after one answer.
        resolver: asks the name servers.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        force_close: bool,
        resolver: AbstractResolver | None = None,
        clock: "Callable[[], float]" = monotonic,
    ) -> None:
        self._names = Names(resolver or aiohttp.DefaultResolver(), clock, self.clear_dns_cache)
        super().__init__(limit=0, socket_factory=_socket, force_close=force_close, resolver=self._names)
        protocol: Callable[..., ResponseHandler] = Protocol
        self._factory = partial(protocol, self._loop)

    async def close(self, *, abort_ssl: bool = False) -> None:
        """Close all connections."""
        await super().close(abort_ssl=abort_ssl)
        await self._names.close()

    async def open(self, request: aiohttp.ClientRequest, limit: ConnectLimit = NO_LIMIT) -> tuple["Connection", bool]:
        """Return a connection for a request, and whether it is new.

        Args:
            request: of `request_to`.
            limit: for a new connection.

        Raises:
            aiohttp.ClientConnectorError, OSError: there is none.
            GatewayError: it took longer than the limit.
        """
        connection = await self.connect(request, [], limit)
        while not (new := _is_new(connection)) and _is_spoiled(connection):
            connection.close()
            connection = await self.connect(request, [], limit)
        return connection, new

    def keep_only(self, servers: "AbstractSet[tuple[str, int]]") -> None:
        """Close the idle connections to all other hosts and ports, and forget what those were resolved to."""
        for key in [key for key in self._conns if (key.host, key.port) not in servers]:
            for protocol, _ in self._conns.pop(key):
                protocol.close()
        self._names.keep_only(servers)

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list["Trace"],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - aiohttp's
    ) -> ResponseHandler:
        limit = timeout if isinstance(timeout, ConnectLimit) else NO_LIMIT  # a session has a timer of its own
        shortages: list[OSError] = []
        _shortages.set(shortages)
        timer = PhaseTimer(monotonic, math.inf)
        timer.limit(limit.seconds, limit.late)
        try:
            with timer:
                return await super()._create_connection(req, traces, timeout)
        except aiohttp.ClientConnectorError:
            if not shortages:
                raise
            raise aiohttp.ClientConnectorError(req.connection_key, shortages[0]) from None

    async def _get(self, key: "ConnectionKey", traces: list["Trace"]) -> "Connection | None":
        kept = self._conns.get(key)
        if kept is not None:
            addresses = self._names.addresses(key.host, key.port or 0)
            while kept and not _is_good(kept[-1][0], addresses):
                kept.pop()[0].close()
            kept.rotate()
        return await super()._get(key, traces)


def _is_good(protocol: ResponseHandler, addresses: frozenset[str] | None) -> bool:
    """Return whether a kept connection is alive and leads to one of the addresses; None: to any."""
    return protocol.is_connected() and (
        addresses is None or not isinstance(protocol, Protocol) or protocol.peer in addresses
    )


def _address(text: str) -> str:
    """Return an address without its zone, which not every call names."""
    return text.partition("%")[0]


def _is_new(connection: "Connection") -> bool:
    """Return whether a connection was opened for this call, which has it from now on."""
    protocol = connection.protocol
    if isinstance(protocol, Protocol) and protocol.new:
        protocol.new = False
        return True
    return False


def _is_spoiled(connection: "Connection") -> bool:
    """Return whether something came on a kept connection since its last answer: it would pass for the next answer."""
    return connection.protocol is None or connection.protocol.should_close


def request_to(url: URL, tls: "SSLContext | bool" = True) -> aiohttp.ClientRequest:  # noqa: FBT002
    """Return what the connector needs to know of requests to a url; it is never sent itself.

    Args:
        url: where to.
        tls: for an `https://` url; True stands for the usual checks.
    """
    return aiohttp.ClientRequest("POST", url, loop=asyncio.get_running_loop(), ssl=tls)


async def send(connection: "Connection", head: bytes, body: bytes) -> tuple["RawResponseMessage", aiohttp.StreamReader]:
    """Send a request over a connection and return the head of its answer, and the reader of its body.

    Raises:
        aiohttp.ClientError, HttpProcessingError, OSError: there is no answer.
        InvalidResponse: its status is below 200, and none follows.
        PartTooLarge: its headers are.
    """
    protocol: Any = connection.protocol
    transport = connection.transport
    if protocol is None or transport is None:
        raise aiohttp.ServerDisconnectedError
    protocol.set_response_params(
        auto_decompress=False,
        read_until_eof=True,
        read_bufsize=READ,
        max_line_size=MAX_HEADERS,
        max_field_size=MAX_HEADERS,
        max_headers=MAX_HEADER_LINES,
    )
    protocol.limit_head()
    if len(body) > LARGE_BODY:
        transport.write(head)
        transport.write(body)
    else:
        transport.write(head + body)
    for _ in range(MAX_INTERIM + 1):
        message, content = await protocol.read()
        if message.code >= 200:  # noqa: PLR2004
            lines = message.raw_headers
            if len(lines) > FEW_LINES and sum(map(len, chain.from_iterable(lines))) > MAX_HEADERS:
                raise headers_too_large()
            return message, content
        if message.code not in INTERIM:
            raise InvalidResponse(f"The backend answered {message.code}, which does not answer a prompt.")
    raise InvalidResponse(f"The backend sent more than {MAX_INTERIM} interim answers.")


def waiting(content: aiohttp.StreamReader) -> int:
    """Return how many bytes of a body have come and have not been read."""
    return content._size  # noqa: SLF001


def unread(content: aiohttp.StreamReader) -> bytes:
    """Return what came of a body before its connection failed; aiohttp would lose it."""
    return bytes(content._read_nowait(-1))  # noqa: SLF001
