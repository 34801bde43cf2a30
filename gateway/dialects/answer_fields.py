"""Reading the few fields of answers and events that the gateway needs; a backend may send anything in them."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec

from gateway.dialects.error_words import read_words
from gateway.dialects.json_text import BLOCK, BYTE_ORDER_MARK, NO_JSON, check, decode, decode_with, leniently
from gateway.errors import ErrorInside, InvalidResponse, WrongForm

NULL = msgspec.Raw(b"null")
MAX_NAME = 256
"""Characters kept of a name."""


class HasError(Protocol):
    """A whole answer; its error is not taken apart, however large it is."""

    error: msgspec.Raw

    @property
    def is_error(self) -> bool:
        """Whether it says of itself that it is an error."""


T = TypeVar("T", bound=HasError)


class _OuterWords(msgspec.Struct):
    """Where an error can be in an answer."""

    error: msgspec.Raw = NULL
    error_type: msgspec.Raw = NULL
    code: msgspec.Raw = NULL
    type: msgspec.Raw = NULL
    status: msgspec.Raw = NULL
    message: msgspec.Raw = NULL
    detail: msgspec.Raw = NULL


OUTER_WORDS = msgspec.json.Decoder(_OuterWords)


def read_whole(content_type: str, body: bytes, decode_typed: Callable[[bytes], T], make_empty: Callable[[], T]) -> T:
    """Check a whole answer: a JSON object, without a non-null `error`.

    Args:
        content_type: the media type, in lower case; "" for none.
        body: its bytes.
        decode_typed: reads the fields that describe the answer.
        make_empty: makes the description of an answer whose fields have other types.

    Raises:
        InvalidResponse: it is not a good answer; WrongForm: it is a stream; ErrorInside: it is an error.
    """
    if content_type != "application/json":
        _check_type(content_type)
    body = body.removeprefix(BYTE_ORDER_MARK)
    try:
        try:
            whole = decode_with(decode_typed, body)
        except msgspec.DecodeError:  # other types than expected, or what only Python takes for a number
            whole = leniently(lambda text: _read(text, decode_typed, make_empty), body)
    except msgspec.ValidationError:
        raise_error_inside(body)
        raise InvalidResponse("The backend's answer is not a JSON object.") from None
    except NO_JSON:
        raise InvalidResponse("The backend's answer is not JSON.") from None
    if (whole.error is not NULL and bytes(whole.error) != b"null") or whole.is_error:
        raise_error_inside(body)
        raise InvalidResponse("The backend's answer is an error with a good status.")
    return whole


def _check_type(content_type: str) -> None:
    if content_type == "text/event-stream":
        raise WrongForm("The backend's answer is a stream, although none was asked for.")
    if not is_json(content_type) and content_type not in {"", "text/plain"}:
        raise InvalidResponse("The backend's answer is not application/json.")


def is_json(content_type: str) -> bool:
    """Return whether a media type is JSON's (RFC 6839: `+json`)."""
    return content_type == "application/json" or content_type.endswith("+json")


def raise_error_inside(body: bytes) -> None:
    """Raise the error in an answer with a good status, if there is one.

    Raises:
        ErrorInside: there is.
    """
    try:
        words = read_words(_small_parts_of(body.removeprefix(BYTE_ORDER_MARK), OUTER_WORDS))
    except NO_JSON:
        return
    if words is not None:
        raise ErrorInside(words)


def _read(body: bytes, decode_typed: Callable[[bytes], T], make_empty: Callable[[], T]) -> T:
    try:
        return decode_with(decode_typed, body)
    except msgspec.ValidationError:
        whole = make_empty()
        whole.error = decode_with(OUTER_WORDS.decode, body).error
        return whole


def event_document(data: bytes, large: "msgspec.json.Decoder[Any]") -> object:
    """Return the document in an event; where that is large only its fields that `large` names, see `small_parts`.

    Raises:
        InvalidResponse: its data is not JSON.
    """
    try:
        return _small_parts_of(data, large)
    except NO_JSON:
        raise InvalidResponse("The backend sent an event whose data is not JSON.") from None


def _small_parts_of(data: bytes, large: "msgspec.json.Decoder[Any]") -> object:
    if len(data) <= BLOCK:
        return leniently(decode, data)
    try:
        return small_parts(leniently(lambda text: decode_with(large.decode, text), data))
    except msgspec.ValidationError:
        leniently(check, data)
        return None  # JSON, but no object


def small_parts(fields: msgspec.Struct) -> dict[str, Any]:
    """Return the values of fields that are all `msgspec.Raw`, `NULL` where one is missing.

    What is large among them, and is no text, stays as it is: decoded, it would take many times its bytes.
    """
    raws = msgspec.structs.asdict(fields).items()
    return {field: _small(bytes(raw)) for field, raw in raws if raw is not NULL}


def _small(raw: bytes) -> object:
    return decode(raw) if len(raw) <= BLOCK or raw.startswith(b'"') else raw


def name(value: object) -> str | None:
    """Return a name, bounded in length; None for anything else."""
    return value[:MAX_NAME] if isinstance(value, str) else None


def count(value: object) -> int | None:
    """Return a count; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
