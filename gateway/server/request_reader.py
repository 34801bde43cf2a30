"""Reads a caller's request: the headers that mean something to the gateway, and the body, decoded."""

import asyncio
import re
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.content_coding import (
    PIECE,
    BrokenCoding,
    CodingError,
    DecodedTooLarge,
    Decoder,
    coding_of,
)
from gateway.dialects.form_data import boundary_of
from gateway.dialects.passed_through import read_form
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from gateway.executor import LARGE
from gateway.headers import forwarded_as, seconds
from gateway.phase_timer import PhaseTimer
from gateway.pieces import joined, taken_from
from gateway.policy.deadline import Deadline
from gateway.settings import COMMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiohttp import StreamReader

    from gateway.dialects.dialect import Dialect, Prompt
    from gateway.executor import Executor
    from gateway.policy.byte_budget import Share
    from gateway.record import Record
    from gateway.settings import Commit, Settings

LARGE_BODY = 1 << 20
"""Bytes; decoding a larger body takes long enough to be done off the event loop."""
MANY_MEMBERS = 100
"""Of a compressed body; decoding more of them takes as long as a large body, however little they hold."""
_JSON_PARAMETERS = re.compile(
    r"""(?:
        [ \t]*;[ \t]*
        (?:charset=(?:utf-?8|"utf-?8"|us-ascii|"us-ascii")|(?!charset)[\w.+-]+=(?:[^\s";,\\]+|"[^"\\]*"))
        (?=[ \t;]|$)
    )*
    [ \t]*;?[ \t]*""",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)
"""Of a `content-type` of JSON, with no charset in which a server could read other fields than the gateway has."""


class RequestReader:
    """Reads requests within the limits of the settings.

    Args:
        settings: limits and timers.
        executor: looks into large bodies.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: "Settings", executor: "Executor", clock: "Callable[[], float]") -> None:
        self._settings = settings
        self._executor = executor
        self._clock = clock

    def deadline(self, request: web.Request, started: float) -> Deadline:
        """Return the deadline: ours, shortened by `x-request-timeout`; commit before the OpenAI SDK's read timeout.

        Raises:
            InvalidRequest: `x-request-timeout` is not a positive finite number.
        """
        total = self._settings.gateway_request_deadline
        asked = _only(request, "x-request-timeout")
        if asked is not None:
            shorter = seconds(asked)
            if shorter is None:
                raise InvalidRequest(
                    "x-request-timeout must be a positive number of seconds.", param="x-request-timeout"
                )
            total = min(total, shorter)
        return Deadline(self._clock, started, total, seconds(request.headers.get("x-stainless-read-timeout")))

    def commit(self, request: web.Request) -> "Commit":
        """Return when a stream is passed on. Raises: InvalidRequest."""
        asked = _only(request, "x-gateway-commit")
        if asked is None:
            return self._settings.gateway_stream_commit
        for known in COMMITS:
            if asked == known:
                return known
        raise InvalidRequest(
            "x-gateway-commit must be first_token, first_answer or complete.", param="x-gateway-commit"
        )

    async def prompt(
        self,
        request: web.Request,
        path: str,
        dialect: "Dialect",
        deadline: Deadline,
        share: "Share",
        *,
        boundary: bytes | None,
    ) -> "Prompt":
        """Read, decode and check the body of a request to `path`, which is one of the dialect's.

        `boundary`: of a form; None for JSON.

        Raises:
            CallerError: it is late, too large, malformed HTTP, in a wrong coding, or not what the dialect reads.
            DeadlineExceeded: it came later than the deadline.
            GatewayOverloaded: the share cannot hold it.
        """
        body = await self._body(request, deadline, share)
        if boundary is None and len(body) <= LARGE:
            return dialect.read_request(path, body)
        with PhaseTimer(self._clock, deadline.end, "The deadline passed before the request's body could be checked."):
            if boundary is not None:
                return await self._executor.run(len(body), read_form, dialect, path, body, boundary)
            return await self._executor.read(len(body), dialect.read_request, path, body)

    async def text_of(self, prompt: "Prompt") -> str:
        """Return what is kept of a prompt's text where it is captured."""
        return await self._executor.read(len(prompt.body), prompt.dialect.prompt_messages, prompt.body)

    async def _body(self, request: web.Request, deadline: Deadline, share: "Share") -> bytes:
        """Return the body without its content coding, held by `share`."""
        limit = self._settings.gateway_max_body_bytes
        decoder = _decoder_of(request, limit)
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        if decoder is not None or not _has_arrived(request.content):
            return await self._arriving(request, decoder, deadline, share)
        body = request.content.read_nowait()
        if len(body) > limit:
            raise _too_large(limit)
        share.hold(len(body))
        return body

    async def _arriving(
        self, request: web.Request, decoder: Decoder | None, deadline: Deadline, share: "Share"
    ) -> bytes:
        """Return a body that has yet to arrive or to be decoded."""
        limit = self._settings.gateway_max_body_bytes
        if "Expect" in request.headers and not _has_arrived(request.content):
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        pieces: list[bytes] = []
        size = 0
        try:
            while piece := await self._read(request.content, deadline):
                size += len(piece)
                if size > limit:
                    raise _too_large(limit)
                if decoder is None:
                    share.hold(len(piece))
                    pieces.append(piece)
                else:
                    await _decode(decoder, piece, pieces, share)
            if decoder is not None:
                pieces.append(decoder.end())
        except CodingError as error:
            raise _error_of(error) from None
        if size > LARGE or sum(map(len, pieces)) > LARGE:
            return await asyncio.to_thread(joined, taken_from(pieces))
        return b"".join(pieces)

    async def _read(self, content: "StreamReader", deadline: Deadline) -> bytes:
        """Return what has arrived of a body, waiting for it if need be; nothing at its end."""
        timer = PhaseTimer(self._clock, deadline.end, "The deadline passed before the request's body had arrived.")
        timer.limit(self._settings.gateway_body_timeout, self._late)
        try:
            with timer:
                return await content.readany()
        except (web.RequestPayloadError, HttpProcessingError):
            raise InvalidRequest("The request's body is malformed HTTP.") from None

    def _late(self) -> RequestTimeout:
        seconds = self._settings.gateway_body_timeout
        return RequestTimeout(f"Nothing of the request's body arrived for {seconds:g} s. Send it without such pauses.")


def _only(request: web.Request, name: str) -> str | None:
    """Return the value of a header, or None without it. Raises: InvalidRequest, if it is there more than once."""
    value = request.headers.get(name)
    if value is not None and len(request.headers.getall(name)) > 1:
        raise InvalidRequest(f"{name} is there more than once.", param=name)
    return value


def form_boundary(request: web.Request, dialect: "Dialect") -> bytes | None:
    """Return the boundary of a form, where the dialect takes forms; None for JSON.

    Raises:
        UnsupportedMediaType: the body is neither, or JSON in another charset than UTF-8 (RFC 8259, 8.1).
        InvalidRequest: it is a form without a good boundary.
    """
    content_type = request.headers.get("Content-Type", "")
    media_type, semicolon, rest = content_type.partition(";")
    media_type = media_type.strip().lower()
    if media_type == "application/json":
        if rest and _JSON_PARAMETERS.fullmatch(semicolon + rest) is None:
            raise UnsupportedMediaType(
                "The charset of JSON must be utf-8, or left out. Send content-type: application/json.",
                param="content-type",
            )
        return None
    if not dialect.passes_through:
        raise UnsupportedMediaType("Send the body as content-type: application/json.", param="content-type")
    if media_type != "multipart/form-data":
        raise UnsupportedMediaType(
            "Send the body as content-type: application/json or multipart/form-data.", param="content-type"
        )
    return boundary_of(content_type)


def forwarded_headers(request: web.Request, record: "Record") -> list[tuple[str, str]]:
    """Return the headers that go to the backend with every attempt, names in lower case."""
    headers = [(low, value) for name, value in request.headers.items() if (low := forwarded_as(name)) is not None]
    headers.append(("accept-encoding", "identity"))
    headers.append(("x-request-id", record.request_id))
    if record.trace_state is not None:
        headers.append(("tracestate", record.trace_state))
    return headers


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request's body is larger than {limit} bytes.")


def _has_arrived(content: "StreamReader") -> bool:
    """Return whether the body came with the headers, so that there is nothing to wait for."""
    return content.is_eof() and content.exception() is None


def _decoder_of(request: web.Request, limit: int) -> Decoder | None:
    """Return the decoder of a body, or None if it is plain. Raises: UnsupportedMediaType."""
    if "Content-Encoding" not in request.headers:
        return None
    try:
        coding = coding_of(request.headers.getall("Content-Encoding"))
    except CodingError as error:
        raise _error_of(error) from None
    return None if coding is None else Decoder(coding, limit)


async def _decode(decoder: Decoder, data: bytes, pieces: list[bytes], share: "Share") -> None:
    """Append to `pieces` what `data` decodes to, held by `share` as it comes; what takes long off the event loop.

    Raises:
        CodingError: as the decoder.
        GatewayOverloaded: the share cannot hold it.
    """
    source = decoder.pieces(data)
    piece: bytes | None = b""
    while piece is not None:
        if piece:
            share.hold(len(piece))
            pieces.append(piece)
        if decoder.decoded > LARGE_BODY or decoder.members > MANY_MEMBERS:
            piece = await asyncio.to_thread(_gather, source)
        else:
            piece = next(source, None)


def _gather(source: "Iterator[bytes]") -> bytes | None:
    """Return the next pieces as one, of `PIECE` bytes or a little more; None when there are no more."""
    pieces, size = [], 0
    for piece in source:
        pieces.append(piece)
        size += len(piece)
        if size >= PIECE:
            break
    return b"".join(pieces) if pieces else None


def _error_of(error: CodingError) -> GatewayError:
    """Return our error for a body that cannot be decoded."""
    if isinstance(error, DecodedTooLarge):
        return RequestTooLarge(f"The request's body {error}.")
    if isinstance(error, BrokenCoding):
        return InvalidRequest(f"The request's body {error}.", param="content-encoding")
    return UnsupportedMediaType(
        f"The request's body {error}. Send it in one of gzip, deflate, zstd, or without a content-encoding.",
        param="content-encoding",
    )
