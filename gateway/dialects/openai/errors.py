"""Errors in OpenAI's form: a backend's, read; the gateway's own, written."""

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.dialects.json_text import NO_JSON, check, decode, decode_with
from gateway.errors import (
    AuthRefused,
    BackendError,
    ErrorAnswer,
    Exhausted,
    GatewayError,
    InvalidResponse,
    Overloaded,
    Rejected,
    ServerFault,
)

EXHAUSTED_CODES = frozenset(
    {"insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached", "context_length_exceeded"}
)
UNREPEATABLE = frozenset({501, 505})
"""5xx that no repetition changes: not implemented, HTTP version not supported."""
MAX_OWN_WORDS = 65_536
"""Bytes of a backend's error answer that is taken apart for an error event."""
encode = msgspec.json.encode


class _ErrorDetail(msgspec.Struct):
    code: str | int | float | bool | None = None
    type: str | None = None


class _ErrorBody(msgspec.Struct):
    error: _ErrorDetail | None = None


_decode_error = msgspec.json.Decoder(_ErrorBody).decode


def envelope(error: GatewayError) -> dict[str, str | None]:
    """Return the inside of OpenAI's error envelope, all four keys."""
    if error.status == 401:  # noqa: PLR2004
        kind = "authentication_error"
    else:
        kind = "invalid_request_error" if error.status < 500 else "server_error"  # noqa: PLR2004
    return {"message": error.message, "type": kind, "param": error.param, "code": error.code}


def error_body(error: GatewayError) -> bytes:
    """Return an error in OpenAI's envelope."""
    return encode({"error": envelope(error)})


def envelope_with_own_words(error: GatewayError) -> dict[str, Any]:
    """Return the inside of the envelope with what a backend's error answer says of itself, if it has OpenAI's form."""
    body = error.body if isinstance(error, ErrorAnswer) else None
    document = decode(body) if body is not None and len(body) <= MAX_OWN_WORDS else None
    own = document.get("error") if isinstance(document, dict) else None
    return envelope(error) | (own if isinstance(own, dict) else {})


def read_error(status: int, body: bytes, headers: Mapping[str, str], retry_after: float | None) -> BackendError:
    """Return the failure that an answer with a status of 300 and above is (see `Dialect.read_error`)."""
    if status < 400:  # noqa: PLR2004
        return InvalidResponse(f"The backend answered {status}, which does not answer a prompt.")
    if status in {401, 403}:
        return AuthRefused(f"The backend refused the gateway's key ({status}).")
    words = _error_words(body)
    passed = body if words is not None else None
    kind: type[ErrorAnswer] = Rejected
    if status == 402 or (status < 500 and words and not EXHAUSTED_CODES.isdisjoint(words)):  # noqa: PLR2004
        kind = Exhausted
    elif status in {429, 503}:
        kind = Overloaded
    elif status == 408 or (status >= 500 and status not in UNREPEATABLE):  # noqa: PLR2004
        kind = ServerFault
    return kind(status, passed, headers, retry_after=retry_after)


def _error_words(body: bytes) -> list[str] | None:
    """Return code and type of an error in OpenAI's form; none for other JSON, None for what is not JSON."""
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
