"""What a caller's HTTP request says besides its body, and the reading of that body."""

import asyncio
import hmac
from hashlib import sha256
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from gateway.errors import (
    DeadlineExceeded,
    InvalidApiKey,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from gateway.headers import forwarded_as
from gateway.policy.deadline import Deadline, seconds

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.policy.admission import Share
    from gateway.record import Record
    from gateway.settings import Settings


class Keys:
    """The gateway keys; none = everybody may come in. Compared by digest, in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def fit(self, request: web.Request) -> bool:
        """Whether the request carries a valid key, or none is asked for."""
        if not self._digests:
            return True
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # all of them, always  # noqa: C419

    def check(self, request: web.Request) -> None:
        """Raises: InvalidApiKey."""
        if not self.fit(request):
            raise InvalidApiKey("Send a gateway key as `Authorization: Bearer KEY`.")


def deadline_of(request: web.Request, settings: "Settings", clock: "Callable[[], float]", started: float) -> Deadline:
    """The deadline: ours, shortened by `x-request-timeout`; commit capped by the OpenAI SDK's read timeout.

    Raises:
        InvalidRequest: `x-request-timeout` is not a positive finite number.
    """
    total = settings.gateway_request_deadline
    asked = request.headers.get("x-request-timeout")
    if asked is not None:
        shorter = seconds(asked)
        if shorter is None:
            raise InvalidRequest("x-request-timeout is a positive number of seconds.", param="x-request-timeout")
        total = min(total, shorter)
    return Deadline(clock, started, total, seconds(request.headers.get("x-stainless-read-timeout")))


def holds_back(request: web.Request, settings: "Settings") -> bool:
    """Whether a stream is held back until it is whole. Raises: InvalidRequest."""
    commit = request.headers.get("x-gateway-commit", settings.gateway_stream_commit)
    if commit not in {"first_token", "complete"}:
        raise InvalidRequest("x-gateway-commit is first_token or complete.", param="x-gateway-commit")
    return commit == "complete"


def check_media_type(request: web.Request) -> None:
    """Raises: UnsupportedMediaType."""
    headers = request.headers
    if headers.get("Content-Type", "").partition(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType("Send the body as content-type: application/json.", param="content-type")
    if "Content-Encoding" in headers:
        raise UnsupportedMediaType("Send the body without a content-encoding.", param="content-encoding")


def forwarded_headers(request: web.Request, record: "Record") -> list[tuple[str, str]]:
    """The headers that go to the backend whatever the attempt; all names in lower case."""
    headers = [(low, value) for name, value in request.headers.items() if (low := forwarded_as(name)) is not None]
    headers.append(("accept-encoding", "identity"))
    headers.append(("x-request-id", record.request_id))
    if record.trace_state is not None:
        headers.append(("tracestate", record.trace_state))
    return headers


async def read_body(request: web.Request, deadline: Deadline, share: "Share", settings: "Settings") -> bytes:
    """The caller's body, held by `share`.

    Raises:
        RequestTooLarge: above `GATEWAY_MAX_BODY_BYTES`, declared or not.
        RequestTimeout: later than `GATEWAY_BODY_TIMEOUT`; DeadlineExceeded: later than the deadline.
        InvalidRequest: its chunks are malformed.
        GatewayOverloaded: the share cannot hold it.
    """
    limit = settings.gateway_max_body_bytes
    if (request.content_length or 0) > limit:
        raise _too_large(limit)
    content = request.content
    if content.is_eof() and content.exception() is None:  # all of it came with the headers: nothing to wait for
        body = content.read_nowait()
        if len(body) > limit:
            raise _too_large(limit)
        share.take(len(body))
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
                share.take(len(piece))
                pieces.append(piece)
    except TimeoutError:
        if timeout < settings.gateway_body_timeout:
            raise DeadlineExceeded("The deadline ended before the request's body was there.") from None
        raise RequestTimeout(f"The request's body was not there within {timeout:g} s.") from None
    except (web.RequestPayloadError, HttpProcessingError):
        raise InvalidRequest("The request's body is malformed HTTP.") from None
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _too_large(limit: int) -> RequestTooLarge:
    return RequestTooLarge(f"The request's body is larger than {limit} bytes.")
