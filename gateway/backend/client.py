"""The HTTP client: one call to one replica."""

import asyncio
import math
from base64 import b64encode
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Self
from urllib.parse import unquote_to_bytes
from weakref import WeakKeyDictionary

import aiohttp
from aiohttp.http_exceptions import HttpProcessingError
from multidict import istr
from yarl import URL

from gateway.backend.aiohttp_connection import (
    MAX_HEADERS,
    NO_LIMITS,
    READ,
    ConnectLimit,
    Connector,
    Protocol,
    request_to,
    send,
    unread,
    waiting,
)
from gateway.backend.failures import failure_of, why_unreachable
from gateway.content_coding import CodingError, DecodedTooLarge, Decoder, coding_of
from gateway.errors import AnswerTooLarge, ConnectTimeout, CutOff, InvalidRequest, InvalidResponse, Silent
from gateway.executor import LARGE
from gateway.headers import is_request_id, lines_of, passed_headers
from gateway.phase_timer import PhaseTimer
from gateway.pieces import joined, taken_from

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from ssl import SSLContext

    from aiohttp.connector import Connection
    from aiohttp.http_parser import RawResponseMessage

    from gateway.config import ProbeConfig
    from gateway.policy.byte_budget import Share
    from gateway.policy.endpoint import Endpoint

X_REQUEST_ID, REQUEST_ID = istr("X-Request-Id"), istr("Request-Id")


class HttpClient:
    """The client side of HTTP, as an async context manager.

    Admission is the only queue: there is no limit of connections. No cookies, no redirects, no proxies from the
    environment: a backend is where its url says.
    """

    def __init__(self) -> None:
        self._kept: Connector
        self._fresh: Connector
        self._session: aiohttp.ClientSession
        self._addressees: WeakKeyDictionary[Endpoint, _Addressee] = WeakKeyDictionary()

    async def __aenter__(self) -> Self:
        self._kept = Connector(force_close=False)
        self._fresh = Connector(force_close=True)
        self._session = aiohttp.ClientSession(
            connector=self._fresh,
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=NO_LIMITS,
            max_line_size=MAX_HEADERS,
            max_field_size=MAX_HEADERS,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kept.close()
        await self._session.close()

    def follow(self, endpoints: "Iterable[Endpoint]") -> None:
        """Keep connections, and addresses of names, for these endpoints alone; those in use end with age."""
        servers = {(endpoint.host, endpoint.port) for endpoint in endpoints}
        for connector in (self._kept, self._fresh):
            connector.keep_only(servers)

    async def send(
        self,
        endpoint: "Endpoint",
        method: str,
        target: str,
        body: bytes,
        headers: list[tuple[str, str]],
        *,
        fresh: bool,
    ) -> "Exchange":
        """Send a request and wait for the headers of the answer; only the connect timeout applies.

        Args:
            endpoint: where to.
            method: of HTTP.
            target: path and query, as `Endpoint.target_of` gives them.
            body: bytes.
            headers: all but `host`, `content-length` and the endpoint's own, which win; names in lower case.
            fresh: over a connection of its own, closed afterwards.

        Raises:
            ConnectionFailed: or one of its subclasses.
            InvalidResponse: what came is not an HTTP answer.
            NoConnection: the gateway's own machine lacks something.
        """
        addressee = self._addressees.get(endpoint)
        if addressee is None:
            addressee = self._addressees[endpoint] = _Addressee(endpoint)
        connector = self._fresh if fresh else self._kept
        new = True
        try:
            connection, new = await connector.open(addressee.request, addressee.connect_limit)
            try:
                head = addressee.head(method, target, headers, len(body), close=fresh)
                message, content = await send(connection, head, body)
            except BaseException:
                connection.close()
                raise
        except ConnectTimeout:
            self._forget_address(endpoint)
            raise
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            if isinstance(error, aiohttp.ClientConnectorError):
                self._forget_address(endpoint)
            raise failure_of(error, endpoint, new=new) from None
        return Exchange(connection, message, content)

    async def probe(self, endpoint: "Endpoint", config: "ProbeConfig") -> str | None:
        """Ask its health path over a new connection; any answer below 500 is good.

        It carries no key: a server may answer by asking a model of its own, which costs.

        Returns:
            What is wrong, or None when it is well.

        Raises:
            NoConnection: the gateway's own machine lacks something, which says nothing about the replica.
        """
        late = f"{endpoint.name} did not answer within {config.timeout:g} s."
        timer = PhaseTimer(monotonic, math.inf)
        timer.limit(config.timeout, lambda: Silent(late, timer="probe"))
        url = URL(f"{endpoint.origin}{config.path}", encoded=True)
        headers, tls = endpoint.config.headers, _tls(endpoint)
        try:
            with timer:
                async with self._session.get(url, headers=headers, allow_redirects=False, ssl=tls) as response:
                    good = response.status < 500  # noqa: PLR2004
                    return None if good else f"{endpoint.name} answered {response.status}."
        except aiohttp.ClientConnectorError as error:
            self._forget_address(endpoint)
            return why_unreachable(error, endpoint)
        except Silent as silent:
            return silent.message
        except (aiohttp.ClientError, OSError, ValueError):  # ValueError: an invalid host name
            return f"{endpoint.name} sent an answer that is not valid HTTP."

    def _forget_address(self, endpoint: "Endpoint") -> None:
        """Resolve the name anew next time: a container that comes back may have another address."""
        self._kept.clear_dns_cache(endpoint.host, endpoint.port)
        self._fresh.clear_dns_cache(endpoint.host, endpoint.port)


class _Addressee:
    """An endpoint as requests see it: what the connector asks about it, and the lines of the head that never change.

    Attributes:
        request: what the connector needs to know.
        connect_limit: of a new connection.
    """

    def __init__(self, endpoint: "Endpoint") -> None:
        own = own_headers(endpoint)
        self.request = request_to(URL(endpoint.base, encoded=True), _tls(endpoint))
        seconds = endpoint.timeouts.connect
        self.connect_limit = ConnectLimit(seconds, partial(_not_accepted, endpoint.name, seconds))
        self._own = frozenset(name for name, _ in own)
        self._start = f" HTTP/1.1\r\nhost: {self.request.headers['Host']}\r\n{lines_of(own)}"

    def head(self, method: str, target: str, headers: list[tuple[str, str]], length: int, *, close: bool) -> bytes:
        """Return the request's head; the endpoint's own headers win over the caller's.

        Raises:
            InvalidRequest: a value holds a line end, and would become more than one header.
        """
        if self._own:
            headers = [header for header in headers if header[0] not in self._own]
        try:
            lines = lines_of(headers)
        except ValueError:
            raise InvalidRequest("A header holds a line end.") from None
        last = "connection: close\r\n\r\n" if close else "\r\n"
        return f"{method} {target}{self._start}{lines}content-length: {length}\r\n{last}".encode(
            "utf-8", "surrogateescape"
        )


def _not_accepted(replica: str, seconds: float) -> ConnectTimeout:
    return ConnectTimeout(f"{replica} did not accept a connection within {seconds:g} s.")


def own_headers(endpoint: "Endpoint") -> list[tuple[str, str]]:
    """Return the endpoint's headers, among them its key; without a key, the user info of its url."""
    config = endpoint.config
    own = [*config.headers, *config.secret_headers]
    if config.api_key:
        scheme = "Bearer " if config.api_key_header == "authorization" else ""
        own.append((config.api_key_header, f"{scheme}{config.api_key}"))
    elif endpoint.user_info and not any(name == "authorization" for name, _ in own):
        user, _, password = endpoint.user_info.partition(":")
        pair = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
        own.append(("authorization", f"Basic {b64encode(pair).decode()}"))
    return own


def _tls(endpoint: "Endpoint") -> "SSLContext | bool":
    """Return what the connector takes: True stands for the usual checks."""
    return endpoint.config.tls or True


class Exchange:
    """An answer whose headers have come and whose body is still to be read. `close` it, on every way out.

    Attributes:
        status: HTTP status.
        headers: of the answer.
    """

    __slots__ = ("_connection", "_content", "_decoded", "_decoder", "_peeked", "_reads_less", "headers", "status")

    def __init__(self, connection: "Connection", message: "RawResponseMessage", content: aiohttp.StreamReader) -> None:
        self._connection = connection
        self._content = content
        self._peeked = b""
        self._decoder: Decoder | None = None
        self._reads_less: Protocol | None = None
        self._decoded: Iterator[bytes] | None = None  # what is there, piece by piece; None: all of it has been read
        self.status = message.code
        self.headers = message.headers

    @property
    def content_type(self) -> str:
        """The media type, in lower case, without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def length(self) -> int | None:
        """Bytes of the body as `read` returns it; None where its end alone tells, or it is compressed."""
        if self._decoder is not None or "Transfer-Encoding" in self.headers:
            return None
        length = self.headers.get("Content-Length")
        return int(length) if length is not None else None

    def decode_within(self, limit: int) -> None:
        """Decode the body as it is read, if it is compressed: we asked for identity, and some compress all the same.

        Raises:
            InvalidResponse: in a coding that is unknown here.
        """
        if "Content-Encoding" not in self.headers:
            return
        try:
            coding = coding_of(self.headers.getall("Content-Encoding"))
        except CodingError as unknown:
            raise InvalidResponse(f"The backend's answer {unknown}.") from None
        if coding is not None:
            self._decoder, self._decoded = Decoder(coding, limit), iter(())

    @property
    def request_id(self) -> str | None:
        """What the backend calls the request, or None."""
        given = self.headers.get(X_REQUEST_ID) or self.headers.get(REQUEST_ID)
        return given if given is not None and is_request_id(given) else None

    async def peek(self) -> bytes:
        """Return the first bytes of the body, which `read` returns again. Raises: as `read`."""
        self._peeked = await self.read()
        return self._peeked

    @property
    def at_end(self) -> bool:
        """Whether the whole body has come and been read."""
        if self._decoder is not None and self._decoded is not None:
            return False
        return self._content.at_eof() and self._content.exception() is None and not self._peeked

    @property
    def waiting(self) -> int:
        """How many bytes of the body have come and have not been read."""
        return waiting(self._content)

    def hold_back(self) -> None:
        """Read nothing more of the backend until `go_on`."""
        protocol = self._connection.protocol
        if isinstance(protocol, Protocol):
            protocol.hold_back()

    def go_on(self) -> None:
        """Read of the backend again."""
        protocol = self._connection.protocol
        if isinstance(protocol, Protocol):
            protocol.go_on()

    def read_less(self, size: int) -> None:
        """Read less at a time of a backend that has sent `size` bytes at once, so that less waits for a slow caller."""
        protocol = self._connection.protocol
        if size > READ and self._reads_less is None and isinstance(protocol, Protocol):
            self._reads_less = protocol
            protocol.read_less()

    def passed_headers(self, *, limited: bool) -> dict[str, str]:
        """Return the headers of the answer that pass to its caller, who is limited by the gateway or not."""
        return passed_headers(self.headers, limited=limited)

    async def read(self) -> bytes:
        """Return the next bytes of the body, `b""` at its end.

        Raises:
            InvalidResponse: the body was cut off, or cannot be decoded.
        """
        if self._peeked:
            peeked, self._peeked = self._peeked, b""
            return peeked
        if self._decoder is not None:
            return await self._read_decoded(self._decoder)
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError):
            return self._came_before_cut()

    async def _read_decoded(self, decoder: Decoder) -> bytes:
        try:
            while self._decoded is not None:
                for piece in self._decoded:
                    if piece:
                        return piece
                try:
                    raw = await self._content.readany()
                except (aiohttp.ClientError, OSError):
                    raw = self._came_before_cut()
                self._decoded = decoder.pieces(raw) if raw else None
            decoder.end()
        except DecodedTooLarge as error:
            raise AnswerTooLarge(f"The backend's answer {error}.") from None
        except CodingError as error:
            raise InvalidResponse(f"The backend's answer {error}.") from None
        return b""

    def _came_before_cut(self) -> bytes:
        """Return what came before a body was cut off. Raises: InvalidResponse, when all of that has been read."""
        if came_before := unread(self._content):
            return came_before
        raise CutOff("The backend's answer was cut off.") from None

    async def read_whole(self, share: "Share", limit: int, each_read: "Callable[[], None]") -> bytes:
        """Return the whole body, held by `share`; `each_read` is called before each read that may have to wait.

        Raises:
            InvalidResponse: the body was cut off.
            AnswerTooLarge: it is larger than `limit` bytes.
            GatewayOverloaded: the share cannot hold it.
        """
        # Most bodies come with their headers.
        at_once = self._decoder is None and not self._peeked
        if at_once and self._content.is_eof() and self._content.exception() is None:
            whole = self._content.read_nowait()
            if len(whole) > limit:
                raise _too_large(limit)
            share.hold(len(whole))
            return whole
        pieces, size = [], 0
        while not self.at_end:
            if not self._content.is_eof():
                each_read()
            piece = await self.read()
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            share.hold(len(piece))
            pieces.append(piece)
        return b"".join(pieces) if size <= LARGE else await asyncio.to_thread(joined, taken_from(pieces))

    def close(self) -> None:
        """Give the connection back if the body has ended, else close it."""
        if self._reads_less is not None:
            self._reads_less.read_as_ever()
        if self._content.at_eof():
            self._connection.release()
        else:
            self._connection.close()


def _too_large(limit: int) -> AnswerTooLarge:
    return AnswerTooLarge(f"The backend's answer is larger than {limit} bytes.")
