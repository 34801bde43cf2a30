"""What a backend's error means for a request, whatever the API family: the failure that it is."""

from collections.abc import Mapping
from typing import Any

from gateway.dialects.error_words import Meaning, meaning_of, read_words, status_of
from gateway.dialects.json_text import BYTE_ORDER_MARK, NO_JSON, check, decode, leniently
from gateway.errors import (
    ERROR_STATUSES,
    OVERLOADED_STATUSES,
    AuthRefused,
    BackendError,
    ContextTooLong,
    ErrorAnswer,
    ErrorWords,
    GatewayError,
    InvalidResponse,
    NoSuchModel,
    NoSuchPath,
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
    Meaning.PATH: NoSuchPath,
    Meaning.RESPONSE: NoSuchResponse,
    Meaning.CONTENT: Rejected,
}
"""What servers say of a request, whatever the status below 500."""
UNREPEATABLE = frozenset({501, 505})
"""5xx that no repetition changes: not implemented, HTTP version not supported."""
MAX_OWN_WORDS = 65_536
"""Bytes of a backend's error answer that is taken apart."""


def read_error(status: int, body: bytes, headers: Mapping[str, str], retry_after: float | None) -> BackendError:
    """Return the failure that an answer other than a good one is: unreadable, unless it has the status of an error.

    Args:
        status: HTTP status.
        body: its bytes.
        headers: those that pass to callers.
        retry_after: seconds that it asks to wait, or None.
    """
    if status not in ERROR_STATUSES:
        return InvalidResponse(f"The backend answered {status}, which does not answer a prompt.")
    words = _words_in(body)
    if words is not None:
        passed: bytes | None = body
    else:
        passed = body if _is_json(body) else None
    return _failure(status, words, passed, headers, retry_after)


def read_error_inside(
    words: ErrorWords, body: bytes, headers: Mapping[str, str], retry_after: float | None
) -> BackendError:
    """Return the failure that an error inside an answer with a good status is; as `read_error` otherwise.

    Args:
        words: what it says.
        body: the same as the body of an error answer, in the form of the dialect (`Dialect.error_inside`).
        headers: those that pass to callers.
        retry_after: seconds that the answer asks to wait, or None.
    """
    headers = {name: value for name, value in headers.items() if name != "content-type"}
    return _failure(status_of(words), words, body, headers | {"content-type": "application/json"}, retry_after)


def own_words(words: ErrorWords) -> dict[str, Any]:
    """Return what a server says in an error inside a good answer: as it came, or its message and a name as `type`."""
    document = words.document
    if isinstance(document, dict) and isinstance(document.get("message"), str):
        return document
    own = {"message": words.message or "The backend sent an error without a message."}
    return own | ({"type": min(words.names)} if words.names else {})


def own_error(error: GatewayError) -> dict[str, Any]:
    """Return the `error` of a backend's error answer; empty for any other error, or if it has none of this form."""
    body = error.body if isinstance(error, ErrorAnswer) else None
    document = decode(body) if body is not None and len(body) <= MAX_OWN_WORDS else None
    own = document.get("error") if isinstance(document, dict) else None
    return own if isinstance(own, dict) else {}


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
        kind = NoSuchPath
    elif status == 402:  # noqa: PLR2004
        kind = QuotaSpent
    elif status == 429 or (status in OVERLOADED_STATUSES and retry_after is not None):  # noqa: PLR2004
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
