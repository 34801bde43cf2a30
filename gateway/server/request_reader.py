"""Reads a caller's request: the headers that mean something to the gateway, and the body."""

import asyncio
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.errors import (
    DeadlineExceeded,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from gateway.headers import forwarded_as, seconds
from gateway.policy.deadline import Deadline

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.dialects.dialect import Dialect, Prompt
    from gateway.policy.byte_budget import Share
    from gateway.record import Record
    from gateway.settings import Settings

LARGE_BODY = 1 << 20
"""Bytes; checking a larger body takes long enough to be done off the event loop."""


class RequestReader:
    """Reads requests within the limits of the settings. `clock`: seconds, monotonic."""

    def __init__(self, settings: "Settings", clock: "Callable[[], float]") -> None:
        self._settings = settings
        self._clock = clock

    def deadline(self, request: web.Request, started: float) -> Deadline:
        """Return the deadline: ours, shortened by `x-request-timeout`; commit before the OpenAI SDK's read timeout.

        Raises:
            InvalidRequest: `x-request-timeout` is not a positive finite number.
        """
        total = self._settings.gateway_request_deadline
        asked = request.headers.get("x-request-timeout")
        if asked is not None:
            shorter = seconds(asked)
            if shorter is None:
                raise InvalidRequest(
                    "x-request-timeout must be a positive number of seconds.", param="x-request-timeout"
                )
            total = min(total, shorter)
        return Deadline(self._clock, started, total, seconds(request.headers.get("x-stainless-read-timeout")))

    def holds_back(self, request: web.Request) -> bool:
        """Return whether a stream is held back until it is complete. Raises: InvalidRequest."""
        commit = request.headers.get("x-gateway-commit", self._settings.gateway_stream_commit)
        if commit not in {"first_token", "complete"}:
            raise InvalidRequest("x-gateway-commit must be first_token or complete.", param="x-gateway-commit")
        return commit == "complete"

    async def prompt(self, request: web.Request, dialect: "Dialect", deadline: Deadline, share: "Share") -> "Prompt":
        """Read and check the body.

        Raises:
            CallerError: it is late, too large, malformed HTTP, or not what the dialect reads.
            DeadlineExceeded: it came later than the deadline.
            GatewayOverloaded: the share cannot hold it.
        """
        body = await self._body(request, deadline, share)
        if len(body) < LARGE_BODY:
            return dialect.read_request(request.path, body)
        return await asyncio.to_thread(dialect.read_request, request.path, body)

    async def _body(self, request: web.Request, deadline: Deadline, share: "Share") -> bytes:
        """Return the body, held by `share`."""
        settings = self._settings
        limit = settings.gateway_max_body_bytes
        if (request.content_length or 0) > limit:
            raise _too_large(limit)
        content = request.content
        if content.is_eof() and content.exception() is None:  # it came with the headers: nothing to wait for
            body = content.read_nowait()
            if len(body) > limit:
                raise _too_large(limit)
            share.hold(len(body))
            return body
        timeout = min(settings.gateway_body_timeout, deadline.left())
        pieces, size = [], 0
        try:
            async with asyncio.timeout(timeout):
                if "Expect" in request.headers:
                    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                    request.writer.output_size = 0
                while content.exception() is not None or not content.at_eof():
                    piece = await content.readany()
                    size += len(piece)
                    if size > limit:
                        raise _too_large(limit)
                    share.hold(len(piece))
                    pieces.append(piece)
        except TimeoutError:
            if timeout < settings.gateway_body_timeout:
                raise DeadlineExceeded("The deadline passed before the request's body had arrived.") from None
            raise RequestTimeout(f"The request's body did not arrive within {timeout:g} s.") from None
        except (web.RequestPayloadError, HttpProcessingError):
            raise InvalidRequest("The request's body is malformed HTTP.") from None
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def check_media_type(request: web.Request) -> None:
    """Refuse a body that is not plain JSON. Raises: UnsupportedMediaType."""
    headers = request.headers
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Send the body as content-type: application/json.", param="content-type")
    if "Content-Encoding" in headers:
        raise UnsupportedMediaType("Send the body without a content-encoding.", param="content-encoding")


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
