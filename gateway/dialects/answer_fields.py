"""Reading the few fields of answers and events that the gateway needs; a backend may send anything in them."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import msgspec

from gateway.dialects.json_text import NO_JSON, decode, decode_with
from gateway.errors import InvalidResponse

NULL = msgspec.Raw(b"null")
MAX_NAME = 256
"""Characters kept of a name."""


class HasError(Protocol):
    """A whole answer; its error is not taken apart, however large it is."""

    error: msgspec.Raw


T = TypeVar("T", bound=HasError)


class _OnlyError(msgspec.Struct):
    error: msgspec.Raw = NULL


_decode_only_error = msgspec.json.Decoder(_OnlyError).decode


def read_whole(content_type: str, body: bytes, decode_typed: Callable[[bytes], T], make_empty: Callable[[], T]) -> T:
    """Check a whole answer: `application/json`, an object, without a non-null `error`.

    Args:
        content_type: the media type, in lower case.
        body: its bytes.
        decode_typed: reads the fields that describe the answer.
        make_empty: makes the description of an answer whose fields have other types.

    Raises:
        InvalidResponse: it is not a good answer.
    """
    if content_type != "application/json":
        raise InvalidResponse("The backend's answer is not application/json.")
    try:
        try:
            whole = decode_with(decode_typed, body)
        except msgspec.ValidationError:
            whole = make_empty()
            whole.error = decode_with(_decode_only_error, body).error
    except msgspec.ValidationError:
        raise InvalidResponse("The backend's answer is not a JSON object.") from None
    except NO_JSON:
        raise InvalidResponse("The backend's answer is not JSON.") from None
    if whole.error is not NULL and bytes(whole.error) != b"null":
        raise InvalidResponse("The backend's answer is an error with a good status.")
    return whole


def event_document(data: bytes) -> object:
    """Return the document in an event.

    Raises:
        InvalidResponse: its data is not JSON.
    """
    try:
        return decode(data)
    except NO_JSON:
        raise InvalidResponse("The backend sent an event whose data is not JSON.") from None


def name(value: object) -> str | None:
    """Return a name, bounded in length; None for anything else."""
    return value[:MAX_NAME] if isinstance(value, str) else None


def count(value: object) -> int | None:
    """Return a count; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
