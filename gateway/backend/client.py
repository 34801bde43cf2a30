"""One HTTP call to one replica: send, read, classify. Only this file sees aiohttp's client errors."""

import asyncio
import socket
import ssl
from base64 import b64encode
from contextvars import ContextVar
from datetime import UTC
from email.utils import parsedate_to_datetime
from errno import ECONNREFUSED
from functools import partial
from os import strerror
from time import time
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import unquote_to_bytes

import aiohttp
import msgspec
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from yarl import URL

from gateway.dialects.json_text import NO_JSON, check, decode_with
from gateway.errors import (
    AnswerTooLarge,
    AuthRefused,
    BackendError,
    ConnectionFailed,
    ConnectTimeout,
    ErrorAnswer,
    Exhausted,
    InvalidRequest,
    InvalidResponse,
    Overloaded,
    Rejected,
    ServerFault,
    StaleConnection,
    Unreachable,
)
from gateway.headers import lines_of, passed_as
from gateway.policy.deadline import number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.client_reqrep import ConnectionKey
    from aiohttp.connector import Connection
    from aiohttp.http_parser import RawResponseMessage
    from aiohttp.tracing import Trace

    from gateway.policy.admission import Share
    from gateway.policy.pool import Replica

PROBE_TIMEOUT = 1.0
"""Seconds."""
MAX_WAIT = 1e9
"""Seconds or milliseconds; a longer wait is garbage."""
FOR_ANOTHER = frozenset({62, 64})
"""OpenSSL's `X509_V_ERR_HOSTNAME_MISMATCH` and `X509_V_ERR_IP_ADDRESS_MISMATCH`."""
LARGE_BODY = 1 << 20
"""Bytes; a larger body is not copied to stand beside its head."""
UNREPEATABLE = frozenset({501, 505})
"""5xx that no repetition changes: not implemented, HTTP version not supported."""
NULL = msgspec.Raw(b"null")
EXHAUSTED_CODES = frozenset(
    {"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "context_length_exceeded"}
)


class _Connecting:
    """Whether a call made a connection of its own; else it went over a kept-alive one."""

    __slots__ = ("fresh",)

    def __init__(self) -> None:
        self.fresh = False


_connecting: ContextVar[_Connecting] = ContextVar("_connecting")


class _Protocol(ResponseHandler):
    """One connection. aiohttp tells a body's reader that the connection ended, but not that its bytes are no HTTP."""

    def set_exception(self, exc: BaseException, exc_cause: BaseException | None = None) -> None:
        """What ends the connection ends a body that is under way."""
        super().set_exception(exc, exc_cause or exc)
        body = self._payload
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(aiohttp.ClientPayloadError("the connection failed in the middle of a body"))

    def resume_reading(self, resume_parser: bool = True) -> None:  # noqa: FBT001, FBT002 - aiohttp's signature
        """Called after every read; aiohttp would ask the parser for more each time, which only a paused one has."""
        if self._reading_paused:
            super().resume_reading(resume_parser)

    def connection_lost(self, exc: BaseException | None) -> None:
        """An answer that nobody will read holds the connection, which holds the answer."""
        super().connection_lost(exc)
        self._loop.call_soon(self._buffer.clear)  # not before who waits for it has read it


def _socket(address: tuple[Any, ...]) -> socket.socket:
    """Called by the connector for each new connection, in the context of the call that needs it."""
    _connecting.get().fresh = True
    family, kind, protocol = address[:3]
    return socket.socket(family=family, type=kind, proto=protocol)


class _Connector(aiohttp.TCPConnector):
    """Makes our connections, and of those that are kept takes the one used last.

    It is in every cache and least likely to be dead; what a peak has left over ends by its age. aiohttp takes turns.
    """

    def __init__(self, *, force_close: bool) -> None:
        super().__init__(limit=0, socket_factory=_socket, force_close=force_close)
        protocol: Callable[..., ResponseHandler] = _Protocol
        self._factory = partial(protocol, self._loop)

    async def _get(self, key: "ConnectionKey", traces: list["Trace"]) -> "Connection | None":
        kept = self._conns.get(key)
        if kept is not None:
            while kept and not kept[-1][0].is_connected():
                kept.pop()[0].close()
            kept.rotate()
        return await super()._get(key, traces)


class HttpClient:
    """The HTTP client side, as an async context manager.

    Admission is the only queue: the connectors have no limit of their own. Neither cookies nor redirects nor proxies
    from the environment: a backend is where its url says. Prompts go over aiohttp's connector and protocol directly:
    the session around them costs as much again and does nothing for a POST of bytes (bench/README.md).
    """

    def __init__(self, *, connect_timeout: float) -> None:
        self._connect_timeout = connect_timeout
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout)
        self._kept: _Connector
        self._fresh: _Connector
        self._session: aiohttp.ClientSession
        self._addressees: dict[tuple[str, str], _Addressee] = {}

    async def __aenter__(self) -> Self:
        self._kept = _Connector(force_close=False)
        self._fresh = _Connector(force_close=True)
        self._session = aiohttp.ClientSession(connector=self._fresh, cookie_jar=aiohttp.DummyCookieJar())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._kept.close()
        await self._session.close()

    async def send(
        self, replica: "Replica", path: str, body: bytes, headers: list[tuple[str, str]], *, fresh: bool
    ) -> "Exchange":
        """Post `body` and wait for the headers of the answer, without a timer but the connect timeout.

        Args:
            replica: where to.
            path: added to the replica's base url.
            body: bytes.
            headers: all but `host` and `content-length`; names in lower case.
            fresh: over a connection of its own, closed afterwards.

        Raises:
            ConnectionFailed: or its subclasses.
            InvalidResponse: what came is no HTTP answer.
        """
        addressee = self._addressees.get((replica.base, path))
        if addressee is None:
            addressee = self._addressees[replica.base, path] = _Addressee(replica.base + path)
        connecting = _Connecting()
        _connecting.set(connecting)
        connector = self._fresh if fresh else self._kept
        try:
            connection = await connector.connect(addressee.request, [], self._timeout)
            while not connecting.fresh and _spoiled(connection):
                connection.close()
                connection = await connector.connect(addressee.request, [], self._timeout)
            try:
                return await _post(connection, addressee.head(headers, len(body), close=fresh), body)
            except BaseException:
                connection.close()
                raise
        except (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError) as error:
            raise self._failure(error, replica, connecting) from None

    async def probe(self, replica: "Replica") -> str | None:
        """Ask the replica's health path, over a fresh connection; any answer below 500 is good. Never raises.

        Returns: what is wrong, None when it is good.
        """
        _connecting.set(_Connecting())
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT)
        url = URL(f"{replica.origin}{replica.probe_path}", encoded=True)
        headers = authorization(replica)
        try:
            async with self._session.get(url, headers=headers, timeout=timeout, allow_redirects=False) as response:
                return None if response.status < 500 else f"{replica.name} answered {response.status}."  # noqa: PLR2004
        except aiohttp.ClientConnectorError as error:
            self._forget_address(replica)
            return _unreachable(error, replica)
        except TimeoutError:
            return f"{replica.name} did not answer within {PROBE_TIMEOUT:g} s."
        except (aiohttp.ClientError, OSError, ValueError):  # ValueError: a name that is none
            return f"{replica.name} gave no HTTP answer."

    def _failure(self, error: Exception, replica: "Replica", connecting: _Connecting) -> BackendError:
        """Why there is no answer. The order matters: aiohttp's timeouts are connection errors too."""
        if isinstance(error, TimeoutError):
            self._forget_address(replica)
            return ConnectTimeout(f"{replica.name} did not accept a connection within {self._connect_timeout:g} s.")
        if isinstance(error, aiohttp.ClientConnectorError):
            self._forget_address(replica)
            return Unreachable(_unreachable(error, replica))
        if isinstance(error, (aiohttp.ServerDisconnectedError, OSError)):
            begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)
            if not connecting.fresh and not begun:  # begun: a part of the answer's head came, aiohttp hands it over
                return StaleConnection(f"A kept-alive connection to {replica.name} had died.")
            return ConnectionFailed(f"{replica.name} closed the connection before it answered.")
        return InvalidResponse(f"{replica.name} sent something that is no HTTP answer.")

    def _forget_address(self, replica: "Replica") -> None:
        """A container that comes back may have another address."""
        self._kept.clear_dns_cache(replica.host, replica.port)
        self._fresh.clear_dns_cache(replica.host, replica.port)


def _unreachable(error: aiohttp.ClientConnectorError, replica: "Replica") -> str:
    """Why there is no connection; names no host, which callers do not know."""
    cause = error.os_error
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return f"The host name of {replica.name} could not be resolved."
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = "it does not fit"
        if isinstance(error.certificate_error, ssl.SSLCertVerificationError):
            of_other = error.certificate_error.verify_code in FOR_ANOTHER
            reason = "it is for another host" if of_other else error.certificate_error.verify_message.rstrip(".")
        return f"The certificate of {replica.name} was not accepted: {reason}."
    if isinstance(error, aiohttp.ClientConnectorSSLError):
        reason = getattr(cause, "reason", None) or "no reason given"
        return f"{replica.name} does not speak TLS as we do: {reason}."
    if isinstance(cause, (ConnectionResetError, ConnectionAbortedError)):
        return f"{replica.name} closed the connection while it was made."
    if error.errno == ECONNREFUSED:
        return f"{replica.name} refused the connection."
    reason = strerror(error.errno) if error.errno is not None else "each of its addresses for another reason"
    return f"{replica.name} could not be reached: {reason}."


class _Addressee:
    """One url that is posted to: what the connector asks about it, and the lines of the head that stay the same."""

    def __init__(self, text: str) -> None:
        url = URL(text, encoded=True)
        self.request = aiohttp.ClientRequest("POST", url, loop=asyncio.get_running_loop())
        self._start = f"POST {url.raw_path_qs} HTTP/1.1\r\nhost: {self.request.headers['Host']}\r\n"

    def head(self, headers: list[tuple[str, str]], length: int, *, close: bool) -> bytes:
        """The request's head.

        Raises:
            InvalidRequest: a value holds a line end, and would be more than one header.
        """
        try:
            lines = lines_of(headers)
        except ValueError:
            raise InvalidRequest("A header holds a line end.") from None
        last = "connection: close\r\n\r\n" if close else "\r\n"
        return f"{self._start}{lines}content-length: {length}\r\n{last}".encode("utf-8", "surrogateescape")


def _spoiled(connection: "Connection") -> bool:
    """Whether something came on a kept connection since its last answer: it would pass for the next one's."""
    return connection.protocol is None or connection.protocol.should_close


async def _post(connection: "Connection", head: bytes, body: bytes) -> "Exchange":
    """Send a request over a connection and read the head of its answer."""
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
            return Exchange(connection, message, content)
        if message.code < 100 or message.code == 101:  # noqa: PLR2004 - of the 1xx alone another answer follows
            raise InvalidResponse(f"The backend answered {message.code}, which is no answer to a prompt.")


def authorization(replica: "Replica") -> list[tuple[str, str]]:
    """The header with the backend's own key; from the url's user info when there is no key."""
    if replica.api_key:
        return [("authorization", f"Bearer {replica.api_key}")]
    if replica.user_info:
        user, _, password = replica.user_info.partition(":")
        pair = unquote_to_bytes(user) + b":" + unquote_to_bytes(password)
        return [("authorization", f"Basic {b64encode(pair).decode()}")]
    return []


class Exchange:
    """An answer whose headers are there and whose body is still to be read. `close` it, on every way out."""

    __slots__ = ("_connection", "_content", "headers", "status")

    def __init__(self, connection: "Connection", message: "RawResponseMessage", content: aiohttp.StreamReader) -> None:
        self._connection = connection
        self._content = content
        self.status = message.code
        self.headers = message.headers

    @property
    def content_type(self) -> str:
        """The media type, in lower case, without parameters."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    def check_plain(self) -> None:
        """A good answer is not compressed: we asked for identity, and pass no `content-encoding` on.

        Raises:
            InvalidResponse: it is.
        """
        if self.headers.get("Content-Encoding", "").lower() not in {"", "identity"}:
            raise InvalidResponse("The backend's answer is compressed, although it was asked for plain bytes.")

    @property
    def at_end(self) -> bool:
        """Whether the whole body is there and has been read."""
        return self._content.at_eof()

    def passed_headers(self) -> dict[str, str]:
        """Those headers of the answer that pass to callers: of several with one name the first, of odd bytes none."""
        passed: dict[str, str] = {}
        for name, value in self.headers.items():
            low = passed_as(name)
            if low is not None and low not in passed and _fits(value):
                passed[low] = value
        return passed

    async def read(self) -> bytes:
        """The next bytes of the body, `b""` at its end.

        Raises:
            InvalidResponse: the body was cut.
        """
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, OSError):
            came_before: bytes = self._content._read_nowait(-1)  # noqa: SLF001 - aiohttp would lose it
            if came_before:
                return came_before
            raise InvalidResponse("The backend's answer was cut.") from None

    async def read_whole(self, share: "Share", limit: int, each_read: "Callable[[], None]") -> bytes:
        """The whole body, held by `share`; `each_read` is called before each read that may have to wait.

        Raises:
            InvalidResponse: the body was cut.
            AnswerTooLarge: it is larger than `limit` bytes.
            GatewayOverloaded: the share cannot hold it.
        """
        if self._content.is_eof() and self._content.exception() is None:  # it came with its headers
            whole = self._content.read_nowait()
            if len(whole) > limit:
                raise _too_large(limit)
            share.take(len(whole))
            return whole
        pieces, size = [], 0
        while not self._content.at_eof():
            if not self._content.is_eof():
                each_read()
            piece = await self.read()
            size += len(piece)
            if size > limit:
                raise _too_large(limit)
            share.take(len(piece))
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Give the connection back if the body has ended, else close it."""
        if self._content.at_eof():
            self._connection.release()
        else:
            self._connection.close()


def _fits(value: str) -> bool:
    """Whether a header value has nothing in it that a server may not send on."""
    return value.isascii() and (value.isprintable() or value.replace("\t", " ").isprintable())


def _too_large(limit: int) -> AnswerTooLarge:
    return AnswerTooLarge(f"The backend's answer is larger than {limit} bytes.")


class _Choice(msgspec.Struct):
    index: int = 0
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    """The tokens of an unstreamed answer, by either of their names."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None

    @property
    def input(self) -> int | None:
        """Of the prompt."""
        return self.prompt_tokens if self.prompt_tokens is not None else self.input_tokens

    @property
    def output(self) -> int | None:
        """Of the answer."""
        return self.completion_tokens if self.completion_tokens is not None else self.output_tokens


class Whole(msgspec.Struct):
    """What an unstreamed answer says about itself; an error is not taken apart, however large it is."""

    error: msgspec.Raw = NULL
    id: str | None = None
    model: str | None = None
    status: str | None = None
    choices: list[_Choice] | None = None
    usage: Usage | None = None

    @property
    def finish_reasons(self) -> list[str] | None:
        """Of each choice, or the status of a response."""
        if self.choices is not None:
            return [choice.finish_reason or "error" for choice in self.choices]
        return [self.status] if self.status else None


class _Bare(msgspec.Struct):
    error: msgspec.Raw = NULL


class _ErrorDetail(msgspec.Struct):
    code: str | int | float | bool | None = None
    type: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | None = None


_decode_error = msgspec.json.Decoder(_ErrorBody).decode
_decode_whole = msgspec.json.Decoder(Whole).decode
_decode_bare = msgspec.json.Decoder(_Bare).decode


def check_whole(content_type: str, body: bytes) -> Whole:
    """A good unstreamed answer: `application/json`, an object, without a non-null `error`.

    Raises:
        InvalidResponse: it is none.
    """
    if content_type != "application/json":
        raise InvalidResponse("The backend's answer is not application/json.")
    try:
        try:
            whole = decode_with(_decode_whole, body)
        except msgspec.ValidationError:
            whole = Whole(error=decode_with(_decode_bare, body).error)
    except msgspec.ValidationError:
        raise InvalidResponse("The backend's answer is no JSON object.") from None
    except NO_JSON:
        raise InvalidResponse("The backend's answer is not JSON.") from None
    if whole.error is not NULL and bytes(whole.error) != b"null":
        raise InvalidResponse("The backend's answer is an error with a good status.")
    return whole


def check_stream(content_type: str) -> None:
    """A good streamed answer is `text/event-stream`. Raises: InvalidResponse."""
    if content_type != "text/event-stream":
        raise InvalidResponse("The backend's answer is not text/event-stream.")


def classify(status: int, body: bytes, headers: "Mapping[str, str]") -> BackendError:
    """The failure that an answer with a status other than 2xx is; `headers` are the ones that pass to callers."""
    if status < 400:  # noqa: PLR2004
        return InvalidResponse(f"The backend answered {status}, which is no answer to a prompt.")
    if status in {401, 403}:
        return AuthRefused(f"The backend refuses the gateway's key ({status}).")
    words = _error_words(body)
    passed = body if words is not None else None
    kind: type[ErrorAnswer] = Rejected
    if status == 402 or (status < 500 and words and not EXHAUSTED_CODES.isdisjoint(words)):  # noqa: PLR2004
        kind = Exhausted
    elif status in {429, 503}:
        kind = Overloaded
    elif status == 408 or (status >= 500 and status not in UNREPEATABLE):  # noqa: PLR2004
        kind = ServerFault
    return kind(status, passed, headers, retry_after=retry_after(headers))


def _error_words(body: bytes) -> "list[str] | None":
    """Code and type of an error in OpenAI's form; empty for other JSON, None for what is no JSON."""
    try:
        error = decode_with(_decode_error, body).error
    except msgspec.ValidationError:
        return [] if _is_json(body) else None
    except NO_JSON:
        return None
    return [word for word in (error.code, error.type) if isinstance(word, str)] if error is not None else []


def _is_json(body: bytes) -> bool:
    try:
        check(body)
    except NO_JSON:
        return False
    return True


def retry_after(headers: "Mapping[str, str]") -> float | None:
    """Seconds that `retry-after-ms` or `Retry-After` (seconds or a date) asks to wait; None without or for garbage.

    Source: RFC 9110, 10.2.3; `retry-after-ms` is OpenAI's and wins.
    """
    milliseconds = _number(headers.get("retry-after-ms"))
    if milliseconds is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:  # asctime's form names no zone, and is GMT
            date = date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - time())
    except (ValueError, TypeError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    value = number(text)
    return value if 0 <= value < MAX_WAIT else None
