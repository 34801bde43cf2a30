"""What callers get besides a backend's own bytes: the explaining headers, and errors in the form of their dialect."""

from functools import lru_cache
from math import ceil
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from gateway import __version__
from gateway.errors import (
    BackendFull,
    BackendRateLimited,
    BackendUnavailable,
    ErrorAnswer,
    GatewayDraining,
    GatewayError,
    InvalidApiKey,
    Refusal,
)
from gateway.headers import RATE_LIMITS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.dialects.dialect import Dialect
    from gateway.policy.limits import Limits
    from gateway.record import Record

SERVER = f"llm-gateway/{__version__}"
CHALLENGE = 'Bearer realm="llm-gateway"'
"""What a 401 asks for (RFC 6750, 3)."""
CHALLENGE_AGAIN = f'{CHALLENGE}, error="invalid_token"'
"""The same, where a key came that is none of ours."""
RETRIED_BY_SDKS = frozenset({408, 409, 429})
"""The OpenAI SDKs send these and 5xx again unless told otherwise."""
UNASKED = (BackendFull, BackendRateLimited, BackendUnavailable, GatewayDraining)
"""Nobody who could answer was asked, though others may have been."""
OF_REQUESTS, OF_TOKENS = (
    tuple(f"{RATE_LIMITS}{what}-{kind}" for what in ("limit", "remaining", "reset")) for kind in ("requests", "tokens")
)
"""The names of the headers that tell a key what it may use, what is left, and when nothing is used any more."""

_encode = msgspec.json.encode


def explaining(record: "Record", now: float) -> dict[str, str]:
    """Return the headers that explain a request, on success and on error; `now`: instant of the record's clock."""
    headers = {
        "x-request-id": record.request_id,
        "x-trace-id": record.trace,
        "x-gateway-attempts": str(len(record.attempts)),
        "server-timing": record.server_timing(now),
        "server": SERVER,
    }
    if record.caller.limits is not None:
        _add_rate_limits(headers, record.caller.limits)
    backend = record.backend
    if backend is not None:
        headers["x-gateway-backend"] = backend
        request_id = (record.failed_by or record.attempt).request_id
        if request_id is not None:
            headers["x-backend-request-id"] = request_id
    return headers


def _add_rate_limits(headers: dict[str, str], limits: "Limits") -> None:
    """Add `x-ratelimit-*` in OpenAI's form: of requests, and of tokens, the limit of which the least is left."""
    now = limits.look()
    for meter, (limit, remaining, reset) in ((limits.requests, OF_REQUESTS), (limits.tokens, OF_TOKENS)):
        window = meter.tightest
        if window is not None:
            left = meter.end - meter.reading
            headers[limit] = window.shown
            headers[remaining] = str(left) if left > 0 else "0"
            headers[reset] = _duration(ceil(window.empty_in(now)))


@lru_cache(maxsize=256)
def _duration(seconds: int) -> str:
    """Return a number of seconds as OpenAI writes it: `1s`, `6m0s`, `23h59m8s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"


def json_response(document: object, *, status: int = 200, headers: "Mapping[str, str] | None" = None) -> web.Response:
    """Return an answer of the gateway itself."""
    return _json(_encode(document), status, headers or {})


def unrecorded_error(error: GatewayError, dialect: "Dialect", headers: "Mapping[str, str]") -> web.Response:
    """Return the answer to an error of a call that leaves no record."""
    return _json(dialect.error_body(error), error.status, headers)


def error_response(error: GatewayError, dialect: "Dialect", record: "Record", now: float) -> web.Response:
    """Return the answer to an error: a backend's own error unchanged, any other in the form of the dialect."""
    headers = explaining(record, now)
    body = None
    if isinstance(error, ErrorAnswer):
        headers.update(error.headers)
        body = error.body
        if body is None:
            headers["content-type"] = "application/json"
    if isinstance(error, InvalidApiKey):
        headers["www-authenticate"] = CHALLENGE_AGAIN if error.shown else CHALLENGE
    headers.update(retry_headers(error, attempts=len(record.attempts)))
    return _json(body if body is not None else dialect.error_body(error), error.status, headers)


def retry_headers(error: GatewayError, *, attempts: int) -> dict[str, str]:
    """Return `x-should-retry: false` or `Retry-After`, never both: nobody should retry on top of our retries."""
    if isinstance(error, UNASKED) or (isinstance(error, Refusal) and attempts == 0):
        return {"retry-after": str(max(1, ceil(error.retry_after or 1)))}
    if attempts == 0 or not (error.status in RETRIED_BY_SDKS or error.status >= 500):  # noqa: PLR2004
        return {}
    if isinstance(error, ErrorAnswer) and error.retry_after is not None:
        return {}  # the backend's own Retry-After is passed on, since nobody has waited for it yet
    return {"x-should-retry": "false"}


def _json(body: bytes, status: int, headers: "Mapping[str, str]") -> web.Response:
    return web.Response(body=body, status=status, headers={"content-type": "application/json", **headers})
