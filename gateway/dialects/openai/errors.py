"""Errors in OpenAI's form: a backend's, read; the gateway's own, written."""

from collections.abc import Mapping
from typing import Any

import msgspec

from gateway.dialects.error_words import Meaning, meaning_of, read_words, status_of
from gateway.dialects.json_text import BYTE_ORDER_MARK, NO_JSON, check, decode, leniently
from gateway.errors import (
    ERROR_STATUSES,
    AuthRefused,
    BackendError,
    ContextTooLong,
    ErrorAnswer,
    ErrorWords,
    GatewayError,
    InvalidResponse,
    NoSuchModel,
    NoSuchResponse,
    QuotaSpent,
    RateLimited,
    Rejected,
    ServerFault,
)

KINDS: dict[Meaning, type[ErrorAnswer]] = {
    Meaning.CONTEXT: ContextTooLong,
    Meaning.QUOTA: QuotaSpent,
    Meaning.MODEL: NoSuchModel,
    Meaning.RESPONSE: NoSuchResponse,
    Meaning.CONTENT: Rejected,
}
"""What servers say of a request, whatever the status below 500."""
UNREPEATABLE = frozenset({501, 505})
"""5xx that no repetition changes: not implemented, HTTP version not supported."""
MAX_OWN_WORDS = 65_536
"""Bytes of a backend's error answer that is taken apart."""
encode = msgspec.json.encode


def envelope(error: GatewayError) -> dict[str, str | None]:
    """Return the inside of OpenAI's error envelope, all four keys."""
    return {"message": error.message, "type": type_of(error.status), "param": error.param, "code": error.code}


def type_of(status: int) -> str:
    """Return the `type` of an error with this HTTP status."""
    by_status = {401: "authentication_error", 429: "rate_limit_error"}
    return by_status.get(status, "invalid_request_error" if status < 500 else "server_error")  # noqa: PLR2004


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
    """Return the failure that an answer other than a good one is (see `Dialect.read_error`)."""
    if status not in ERROR_STATUSES:
        return InvalidResponse(f"The backend answered {status}, which does not answer a prompt.")
    words = _words_in(body)
    if words is not None:
        passed: bytes | None = body
    else:
        passed = body if _is_json(body) else None
    return _failure(status, words, passed, headers, retry_after)


def read_error_inside(words: ErrorWords, headers: Mapping[str, str], retry_after: float | None) -> BackendError:
    """Return the failure that an error inside a good answer is (see `Dialect.read_error_inside`)."""
    document = words.document
    if not (isinstance(document, dict) and isinstance(document.get("message"), str)):
        document = {
            "message": words.message or "The backend sent an error without a message.",
            "type": next(iter(sorted(words.names)), type_of(status_of(words))),
            "param": None,
            "code": None,
        }
    headers = {name: value for name, value in headers.items() if name != "content-type"}
    body = encode({"error": document})
    return _failure(status_of(words), words, body, headers | {"content-type": "application/json"}, retry_after)


def _failure(
    status: int,
    words: ErrorWords | None,
    body: bytes | None,
    headers: Mapping[str, str],
    retry_after: float | None,
) -> BackendError:
    meaning = meaning_of(words, status) if words is not None else None
    kind: type[ErrorAnswer] = Rejected
    if status in {401, 403} and meaning is not Meaning.CONTENT:
        return AuthRefused(f"The backend refused the gateway's key ({status}).")
    if meaning is not None and status < 500:  # noqa: PLR2004
        kind = KINDS[meaning]
    elif status == 404 and not _is_about_the_request(words):  # noqa: PLR2004
        kind = NoSuchModel  # the path is gone, or somebody else listens there
    elif status == 402:  # noqa: PLR2004
        kind = QuotaSpent
    elif status == 429 or (status == 503 and retry_after is not None):  # noqa: PLR2004
        kind = RateLimited
    elif status == 408 or (status >= 500 and status not in UNREPEATABLE):  # noqa: PLR2004
        kind = ServerFault
    return kind(status, body, headers, retry_after=retry_after)


def _is_about_the_request(words: ErrorWords | None) -> bool:
    """Return whether an error has an error object: a plain 404 says nothing about a prompt."""
    return words is not None and bool(words.names or words.number) and isinstance(words.document, dict)


def _words_in(body: bytes) -> ErrorWords | None:
    """Return what an error answer says; None for what is not JSON, holds no error, or is too large to look into."""
    if len(body) > MAX_OWN_WORDS:
        return None
    try:
        return read_words(leniently(decode, body.removeprefix(BYTE_ORDER_MARK)))
    except NO_JSON:
        return None


def _is_json(body: bytes) -> bool:
    try:
        leniently(check, body.removeprefix(BYTE_ORDER_MARK))
    except NO_JSON:
        return False
    return True
