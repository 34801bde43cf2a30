"""Reading the few fields of answers and events that the gateway needs; a backend may send anything in them."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

import msgspec

from gateway.dialects.error_words import read_words
from gateway.dialects.json_text import (
    BYTE_ORDER_MARK,
    NO_JSON,
    beginning_of_text,
    check,
    decode,
    decode_with,
    leniently,
)
from gateway.dialects.server_sent_events import DONE
from gateway.errors import ErrorInside, InvalidResponse, WrongForm
from gateway.pieces import BLOCK
from gateway.policy.response_homes import MAX_ID

if TYPE_CHECKING:
    from gateway.dialects.dialect import Dialect

NULL = msgspec.Raw(b"null")
MAX_NAME = 256
"""Characters kept of a name."""
MAX_REASONS = 16
"""Finish reasons kept of a large answer."""


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


class Description(NamedTuple):
    """What an answer says about itself, within bounds; see `Answer`."""

    response_id: str | None
    model: str | None
    finish_reasons: list[str] | None
    input_tokens: int | None
    output_tokens: int | None


def describe(dialect: "Dialect", content_type: str, body: bytes) -> Description:
    """Check a whole answer of any size, and return little. Raises: InvalidResponse, as `Dialect.read_answer`."""
    answer = dialect.read_answer(content_type, body)
    reasons = answer.finish_reasons
    return Description(
        identifier(answer.response_id),
        name(answer.model),
        None if reasons is None else [reason[:MAX_NAME] for reason in reasons[:MAX_REASONS]],
        count(answer.input_tokens),
        count(answer.output_tokens),
    )


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
        words = read_words(outer_words(body.removeprefix(BYTE_ORDER_MARK)))
    except NO_JSON:
        return
    if words is not None:
        raise ErrorInside(words)


def outer_words(body: bytes) -> object:
    """Return a document, of a large one the parts in which an error can be. Raises: NO_JSON."""
    if len(body) <= BLOCK:
        return leniently(decode, body)
    return _shortened(body, lambda text: small_parts(decode_with(OUTER_WORDS.decode, text)))


def _read(body: bytes, decode_typed: Callable[[bytes], T], make_empty: Callable[[], T]) -> T:
    try:
        return decode_with(decode_typed, body)
    except msgspec.ValidationError:
        whole = make_empty()
        whole.error = decode_with(OUTER_WORDS.decode, body).error
        return whole


def event_document(data: bytes) -> object:
    """Return the document in an event that is not large.

    Raises:
        InvalidResponse: its data is not JSON.
    """
    try:
        return leniently(decode, data)
    except NO_JSON:
        raise InvalidResponse("The backend sent an event whose data is not JSON.") from None


def abridged_event(data: bytes, shorten: Callable[[bytes], object]) -> bytes:
    """Return the data of a large event as far as anything of it is read, in few bytes.

    Args:
        data: JSON, `[DONE]`, or something else that is no event.
        shorten: returns the parts of an object that are read, see `small_parts`.

    Raises:
        InvalidResponse: its data is not JSON.
    """
    data = data.strip()
    if data == DONE:
        return data
    try:
        return msgspec.json.encode(_shortened(data, shorten))
    except NO_JSON:
        raise InvalidResponse("The backend sent an event whose data is not JSON.") from None


def _shortened(data: bytes, shorten: Callable[[bytes], object]) -> object:
    try:
        return leniently(shorten, data)
    except msgspec.ValidationError:
        leniently(check, data)
        return None  # JSON, but no object


def small_parts(fields: msgspec.Struct, *apart: str) -> dict[str, Any]:
    """Return the values of fields that are all `msgspec.Raw`, `NULL` where one is missing.

    What is large among them would take many times its bytes: of a text the beginning is returned, else True. What is
    large and named in `apart` stays as it is.
    """
    raws = msgspec.structs.asdict(fields).items()
    return {field: raw if field in apart and _is_large(raw) else _small(raw) for field, raw in raws if raw is not NULL}


def parts_inside(
    fields: msgspec.Struct, inside: "Mapping[str, Callable[[bytes | msgspec.Raw], msgspec.Struct]]"
) -> dict[str, Any]:
    """Return the same with the small parts of what is large in it: `inside` decodes those by their names."""
    parts = small_parts(fields, *inside)
    for part, decode_part in inside.items():
        if isinstance(large := parts.get(part), msgspec.Raw):
            parts[part] = small_parts(decode_part(large)) if is_object(large) else None
    return parts


def is_object(raw: msgspec.Raw) -> bool:
    """Return whether a value is an object."""
    return bytes(memoryview(raw)[:1]) == b"{"


def _is_large(raw: msgspec.Raw) -> bool:
    return memoryview(raw).nbytes > BLOCK


def _small(raw: msgspec.Raw) -> object:
    view = memoryview(raw)
    if view.nbytes <= BLOCK:
        return decode(bytes(view))
    return decode(beginning_of_text(bytes(view[: BLOCK + 1])) + b'"') if bytes(view[:1]) == b'"' else True


def name(value: object) -> str | None:
    """Return a name, bounded in length; None for anything else."""
    return value[:MAX_NAME] if isinstance(value, str) else None


def identifier(value: object) -> str | None:
    """Return the whole id of an answer, by which further calls may name it; None for one that is too long."""
    return value if isinstance(value, str) and len(value) <= MAX_ID else None


def count(value: object) -> int | None:
    """Return a count; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
