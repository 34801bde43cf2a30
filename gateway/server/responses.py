"""What callers get besides a backend's own bytes: the explaining headers, and errors in the form of their dialect."""

from math import ceil
from typing import TYPE_CHECKING

import msgspec

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
from gateway.server.aiohttp_protocol import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.dialects.dialect import Dialect
    from gateway.policy.limits import Limits
    from gateway.policy.window import Meter, Window
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

_encode = msgspec.json.encode


def explaining(record: "Record", now: float) -> bytes:
    """Return the end of a head that explains a request, on success and on error; `now`: by the record's clock.

    Whoever makes one of the values sees to it that it is of visible ASCII: names of backends are configured so, and ids
    of others are checked (`headers.is_request_id`).
    """
    answered = told = ""
    if (backend := record.backend) is not None:
        request_id = (record.failed_by or record.attempt).request_id
        answered = f"x-gateway-backend: {backend}\r\n"
        if request_id is not None:
            answered += f"x-backend-request-id: {request_id}\r\n"
    if (limits := record.caller.limits) is not None:
        told = _rate_limits(limits, now)
    return (
        f"x-request-id: {record.request_id}\r\nx-trace-id: {record.trace}\r\n"
        f"x-gateway-attempts: {len(record.attempts)}\r\nserver-timing: {record.server_timing(now)}\r\n"
        f"{answered}{told}\r\n"
    ).encode("ascii")


def _rate_limits(limits: "Limits", now: float) -> str:
    """Return `x-ratelimit-*` in OpenAI's form: of requests, and of tokens, the limit of which the least is left."""
    instant = now + limits.epoch
    if instant >= limits.rolls_at:  # as `look` does: a call less at each answer
        limits.roll(instant)
    requests, tokens = limits.requests, limits.tokens
    lines = ""
    if requests.tightest is not None:
        told = requests.told or _told(requests, requests.tightest, instant, "requests")
        left = requests.end - requests.reading
        lines = f"{told}{left if left > 0 else 0}\r\n"  # noqa: FURB136 - at each answer
    if tokens.tightest is not None:
        told = tokens.told or _told(tokens, tokens.tightest, instant, "tokens")
        left = tokens.end - tokens.reading
        return f"{lines}{told}{left if left > 0 else 0}\r\n"  # noqa: FURB136 - at each answer
    return lines


def _told(meter: "Meter", tightest: "Window", instant: float, kind: str) -> str:
    """Return what stands before the number that is left.

    It is the same until the meter is aimed again, once something is used of the present slot.
    """
    told = (
        f"{RATE_LIMITS}limit-{kind}: {tightest.limit}\r\n"
        f"{RATE_LIMITS}reset-{kind}: {_duration(tightest.empty_in(int(instant)))}\r\n{RATE_LIMITS}remaining-{kind}: "
    )
    if meter.reading > meter.opened:
        meter.told = told
    return told


def _duration(seconds: int) -> str:
    """Return a number of seconds as OpenAI writes it: `1s`, `6m0s`, `23h59m8s`."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes}m{rest}s" if hours else f"{minutes}m{rest}s" if minutes else f"{rest}s"


def json_response(document: object, *, status: int = 200, headers: "Mapping[str, str] | None" = None) -> Answer:
    """Return an answer of the gateway itself."""
    return _json(_encode(document), status, headers or {})


def unrecorded_error(error: GatewayError, dialect: "Dialect", headers: "Mapping[str, str]") -> Answer:
    """Return the answer to an error of a call that leaves no record."""
    return _json(dialect.error_body(error), error.status, headers)


def error_response(error: GatewayError, dialect: "Dialect", record: "Record", now: float) -> Answer:
    """Return the answer to an error: a backend's own error unchanged, any other in the form of the dialect."""
    headers: dict[str, str] = {}
    body = None
    if isinstance(error, ErrorAnswer):
        headers.update(error.headers)
        body = error.body
        if body is None:
            headers["content-type"] = "application/json"
    if isinstance(error, InvalidApiKey):
        headers["www-authenticate"] = CHALLENGE_AGAIN if error.shown else CHALLENGE
    headers.update(retry_headers(error, attempts=len(record.attempts)))
    answer = _json(body if body is not None else dialect.error_body(error), error.status, headers)
    answer.lines = explaining(record, now)
    return answer


def retry_headers(error: GatewayError, *, attempts: int) -> dict[str, str]:
    """Return `x-should-retry: false` or `Retry-After`, never both: nobody should retry on top of our retries."""
    if isinstance(error, UNASKED) or (isinstance(error, Refusal) and attempts == 0):
        return {"retry-after": str(max(1, ceil(error.retry_after or 1)))}
    if attempts == 0 or not (error.status in RETRIED_BY_SDKS or error.status >= 500):  # noqa: PLR2004
        return {}
    if isinstance(error, ErrorAnswer) and error.retry_after is not None:
        return {}  # the backend's own Retry-After is passed on, since nobody has waited for it yet
    return {"x-should-retry": "false"}


def _json(body: bytes, status: int, headers: "Mapping[str, str]") -> Answer:
    return Answer(body=body, status=status, headers={"content-type": "application/json", "server": SERVER, **headers})
