"""Errors as OpenAI words them."""

from typing import Any

import msgspec

from gateway.dialects.error_answers import own_error, own_words
from gateway.dialects.error_words import status_of
from gateway.errors import ErrorWords, GatewayError

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
    """Return the inside of the envelope with what a backend's error answer says of itself, if it has this form."""
    return envelope(error) | own_error(error)


def error_inside(words: ErrorWords) -> bytes:
    """Return what a server says in an error inside a good answer, in the envelope."""
    return encode({"error": {"type": type_of(status_of(words)), "param": None, "code": None} | own_words(words)})
