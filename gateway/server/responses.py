"""What callers get besides the backend's own bytes: the explaining headers, and errors in OpenAI's envelope."""

import math
from typing import TYPE_CHECKING, Any

import msgspec
from aiohttp import HttpVersion11, web
from aiohttp.helpers import rfc822_formatted_time

from gateway import __version__
from gateway.dialects.json_text import decode
from gateway.errors import ErrorAnswer, GatewayDraining, GatewayError, Refusal
from gateway.headers import lines_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp.abc import AbstractStreamWriter

    from gateway.record import Record

SERVER = f"llm-gateway/{__version__}"
MAX_OWN_WORDS = 65_536
"""Bytes of a backend's error answer that is taken apart for an error event."""
RETRIED_BY_SDKS = frozenset({408, 409, 429})
"""These and 5xx are what the OpenAI SDKs send again unless told otherwise."""

_encode = msgspec.json.encode


class WholeAnswer(web.Response):
    """A backend's unstreamed answer, its head and body put together and sent in one go.

    aiohttp's way to the same bytes takes 4 us longer (bench/README.md); what needs it still goes it: HTTP/1.0, and
    connections that end with the answer.
    """

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(body=body, status=status, headers=headers)
        self._bytes = body

    async def prepare(self, request: web.BaseRequest) -> "AbstractStreamWriter | None":
        """Send all of it.

        Raises:
            ConnectionError: nobody is there any more.
            ValueError: a header holds a line end.
        """
        if self.prepared or self.keep_alive is False or request.version != HttpVersion11 or not request.keep_alive:
            return await super().prepare(request)
        lines = lines_of(self.headers.items())
        start = f"HTTP/1.1 {self.status} {self.reason}\r\ndate: {rfc822_formatted_time()}\r\n"
        head = f"{start}{lines}content-length: {len(self._bytes)}\r\n\r\n"
        self._keep_alive = self._eof_sent = True
        await request.writer.write(head.encode() + self._bytes)
        await request.writer.drain()
        return request.writer


def explaining(record: "Record", now: float) -> dict[str, str]:
    """The headers that explain a request, on success and on error; `now` in seconds of `time.monotonic`."""
    headers = {
        "x-request-id": record.request_id,
        "x-trace-id": f"{record.trace_id:032x}",
        "x-gateway-attempts": str(len(record.attempts)),
        "server-timing": record.server_timing(now),
        "server": SERVER,
    }
    backend = record.backend
    if backend is not None:
        headers["x-gateway-backend"] = backend
    return headers


def json_answer(document: object, *, status: int = 200, headers: "Mapping[str, str] | None" = None) -> web.Response:
    """An answer of our own."""
    return web.Response(
        body=_encode(document),
        status=status,
        headers={"content-type": "application/json", "server": SERVER, **(headers or {})},
    )


def error_answer(error: GatewayError, record: "Record", now: float) -> web.Response:
    """The answer an error has: a backend's own error as it came, every other in OpenAI's envelope."""
    headers = explaining(record, now)
    if isinstance(error, ErrorAnswer):
        status = error.answer_status
        headers.update(error.headers)
        body = error.body
        if body is None:
            headers["content-type"] = "application/json"
            body = _encode(error.envelope())
        headers.setdefault("content-type", "application/json")
    else:
        status = error.status
        headers["content-type"] = "application/json"
        body = _encode(error.envelope())
    headers.update(when_to_come_again(error, status, attempts=len(record.attempts)))
    return web.Response(body=body, status=status, headers=headers)


def when_to_come_again(error: GatewayError, status: int, *, attempts: int) -> dict[str, str]:
    """`x-should-retry: false` or `Retry-After`, never both, so that nobody retries on top of our retries."""
    if isinstance(error, GatewayDraining) or (isinstance(error, Refusal) and attempts == 0):
        return {"retry-after": str(max(1, math.ceil(error.retry_after or 1)))}
    if attempts == 0 or not (status in RETRIED_BY_SDKS or status >= 500):  # noqa: PLR2004
        return {}
    if isinstance(error, ErrorAnswer) and error.retry_after is not None:
        return {}  # the backend's own Retry-After is passed on, and nobody has waited for it yet
    return {"x-should-retry": "false"}


def error_event(error: GatewayError, sequence_number: int | None) -> bytes:
    """A failure after the status went out, as the last event of a stream; numbered in `/v1/responses`."""
    body = error.envelope()["error"] | _own_words(error)
    if sequence_number is None:
        return b"data: " + _encode({"error": body}) + b"\n\n"
    event = {
        "type": "error",
        "sequence_number": sequence_number,
        "code": body["code"],
        "message": body["message"],
        "param": body["param"],
        "error": body,
    }
    return b"event: error\ndata: " + _encode(event) + b"\n\n"


def _own_words(error: GatewayError) -> dict[str, Any]:
    """What a backend's own error answer says of itself, if it is in OpenAI's form."""
    body = error.body if isinstance(error, ErrorAnswer) else None
    document = decode(body) if body is not None and len(body) <= MAX_OWN_WORDS else None
    own = document.get("error") if isinstance(document, dict) else None
    return own if isinstance(own, dict) else {}
