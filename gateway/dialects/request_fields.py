"""Reading the body of a request by the types of its fields, and naming the field that is wrong."""

from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from gateway.dialects.json_text import NO_JSON, check, decode_with
from gateway.errors import CallerError, InvalidJson, InvalidRequest

T = TypeVar("T", bound=Struct)

ModelName = Annotated[str, Meta(min_length=1, max_length=512, description="a text of 1 to 512 characters")]
Flag = Annotated[bool, Meta(description="true or false")]
Count = Annotated[int, Meta(ge=1, description="a whole number of at least 1")]
Number = Annotated[float, Meta(description="a number")]
Tokens = Annotated[int | float, Meta(description="a number")]
"""Some clients write 10.0 for 10."""
LARGE_LIST = 1 << 20
"""Bytes; of a larger list the wrong item is not searched for."""

_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def read_fields(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Return the fields of a request's body.

    Raises:
        InvalidJson: it is empty, not JSON in UTF-8, or nested too deep.
        InvalidRequest: it is no object, or a field is wrong; `param` names it.
    """
    if not body.strip():
        raise InvalidJson("The body is empty. Send a JSON object.")
    try:
        return decode_with(decoder.decode, body)
    except msgspec.ValidationError:
        raise _error_in(decoder.type, body) from None
    except NO_JSON as error:
        raise _not_json(error) from None


def check_text_or_list(name: str, value: msgspec.Raw, *, may_be_null: bool) -> None:
    """Check a prompt or an input, whose inside is the backend's business. Raises: InvalidRequest."""
    raw = bytes(value)
    if raw[:1] not in b'"[' and not (may_be_null and raw == b"null"):
        raise InvalidRequest(f"`{name}` must be a text or a list.", param=name)


def _not_json(error: Exception) -> InvalidJson:
    if isinstance(error, UnicodeDecodeError):
        return InvalidJson(f"The body is not valid UTF-8 at byte {error.start}.")
    if isinstance(error, RecursionError):
        return InvalidJson("The body is nested too deep.")
    return InvalidJson(f"The body is not valid JSON: {error}.")


def _error_in(kind: Any, body: bytes) -> CallerError:  # noqa: ANN401 - a type
    """Return the error of a body that does not have the type `kind`."""
    try:
        check(body)
    except NO_JSON as error:
        return _not_json(error)
    param, expected = _wrong_field(kind, body, "")
    if expected is None:
        return InvalidRequest(f"`{param}` is required.", param=param)
    subject = f"`{param}`" if param else "The body"
    return InvalidRequest(f"{subject} must be {expected}.", param=param or None)


def _wrong_field(kind: Any, raw: bytes, path: str) -> tuple[str, str | None]:  # noqa: ANN401
    """Return the path of the first wrong field in a value that is not of type `kind`, and what it must be.

    What a field that is missing must be is None.
    """
    bare = _without_extras(kind)
    if isinstance(bare, type) and issubclass(bare, Struct):
        if not _fits(dict[str, msgspec.Raw], raw):
            return path, "a JSON object"
        members = decode_with(_members, raw)
        for field in msgspec.structs.fields(bare):
            where = f"{path}.{field.name}" if path else field.name
            if field.name not in members:
                if field.required:
                    return where, None
            elif not _fits(field.type, value := bytes(members[field.name])):
                return _wrong_field(field.type, value, where)
    elif get_origin(bare) is list:
        searched = len(raw) <= LARGE_LIST and _fits(list[msgspec.Raw], raw)
        for number, item in enumerate(decode_with(_items, raw) if searched else ()):
            if not _fits(get_args(bare)[0], value := bytes(item)):
                return _wrong_field(get_args(bare)[0], value, f"{path}[{number}]")
    return path, _description(kind)


def _fits(kind: Any, raw: bytes) -> bool:  # noqa: ANN401
    try:
        decode_with(msgspec.json.Decoder(kind).decode, raw)
    except msgspec.ValidationError:
        return False
    return True


def _without_extras(kind: Any) -> Any:  # noqa: ANN401
    """Return a type without `Annotated` and `| None`."""
    if get_origin(kind) in {Union, UnionType}:
        kind = next(member for member in get_args(kind) if member is not NoneType)
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _description(kind: Any) -> str:  # noqa: ANN401
    """Return what a value of this type must be: the description of its `Meta`."""
    for part in (kind, *get_args(kind)):
        for extra in get_args(part) if get_origin(part) is Annotated else ():
            if isinstance(extra, Meta) and extra.description:
                return extra.description
    return "of another type"
