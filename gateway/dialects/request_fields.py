"""Reading the body of a request by the types of its fields, and naming the field that is wrong."""

import re
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from gateway.dialects.json_text import BYTE_ORDER_MARK, NO_JSON, check, decode_with, names_in, value_after
from gateway.errors import CallerError, InvalidJson, InvalidRequest

T = TypeVar("T", bound=Struct)

ModelName = Annotated[str, Meta(min_length=1, max_length=512, description="a text of 1 to 512 characters")]
Flag = Annotated[bool, Meta(description="true or false")]
Count = (
    Annotated[int, Meta(ge=1, description="a whole number of at least 1")]
    | Annotated[float, Meta(ge=1, le=1 << 53, multiple_of=1)]
)
"""Some clients write 1.0 for 1."""
Number = Annotated[float, Meta(description="a number")]
Tokens = Annotated[int | float, Meta(description="a number")]
"""Some clients write 10.0 for 10."""
LARGE_VALUE = 512
SMALL_VALUE = 16
"""Bytes; the names of a body are searched without the values that are larger: first the large ones, then nearly all."""
SMALL_BODY = 65_536
"""Bytes; a larger body is not copied to be compared."""
LARGE_LIST = 1 << 20
"""Bytes; of a larger list the wrong item is not searched for."""

_ESCAPED_LETTER = re.compile(rb"\\u00(?:5[fF]|6[1-9a-fA-F]|7[0-9aA])")
"""Of a name that is read: they consist of small letters and underscores."""
_encode = msgspec.json.Encoder().encode
_members = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_items = msgspec.json.Decoder(list[msgspec.Raw]).decode


def read_fields(decoder: "msgspec.json.Decoder[T]", body: bytes) -> T:
    """Return the fields of a request's body.

    Raises:
        InvalidJson: it is empty, not JSON in UTF-8, or nested too deep.
        InvalidRequest: it is no object, or a field is wrong, there twice or in another case; `param` names it.
    """
    text = body.removeprefix(BYTE_ORDER_MARK)
    if not text.strip():
        raise InvalidJson("The body is empty. Send a JSON object.")
    try:
        fields = decode_with(decoder.decode, text)
    except msgspec.ValidationError:
        raise _error_in(decoder.type, text) from None
    except NO_JSON as error:
        raise _not_json(error) from None
    _check_names(_names_of(decoder.type), text)
    return fields


def check_text_or_list(name: str, value: msgspec.Raw, *, may_be_null: bool) -> None:
    """Check a prompt or an input, whose inside is the backend's business. Raises: InvalidRequest."""
    raw = bytes(value)
    if raw[:1] not in b'"[' and not (may_be_null and raw == b"null"):
        raise InvalidRequest(f"`{name}` must be a text or a list.", param=name)


@cache
def _names_of(kind: type[Struct]) -> dict[str, bytes]:
    """Return the names of the fields that are read, each as it stands in JSON."""
    return {name: b'"%s"' % name.encode() for name in kind.__struct_fields__}


def _check_names(names: dict[str, bytes], body: bytes) -> None:
    """Refuse what a backend could read otherwise than the gateway: a field that is there twice or in another case.

    Args:
        names: of the fields that are read, each as it stands in JSON.
        body: a valid JSON object.

    Raises:
        InvalidRequest: `param` names the field.
    """
    try:
        members = _members(body)
    except msgspec.DecodeError:  # half a surrogate pair
        members = decode_with(_members, body)
    if not members.keys() <= names.keys():
        for name in members:
            if name not in names and (low := name.lower()) in names:
                raise InvalidRequest(f"`{low}` must be written in lower case.", param=low)
    if len(body) <= SMALL_BODY:
        least = len(_encode(members))
    else:  # quotes, colons, commas and braces
        least = sum(map(len, members)) + sum(map(len, members.values())) + 4 * len(members) + 1
    if len(body) == least:  # there is no room for anything that comes twice
        return
    _check_repeats(names, members, body)


def _check_repeats(names: dict[str, bytes], members: dict[str, msgspec.Raw], body: bytes) -> None:
    """Refuse a body that holds one of the names twice. Raises: InvalidRequest."""
    known = members.keys() & names
    quoted = [names[name] for name in known]
    for largest in (LARGE_VALUE, SMALL_VALUE):
        if len(body) > largest:
            body = _without_values(body, members, largest)
        if not _may_repeat(quoted, body):
            return
    there = [name for name, _ in names_in(body) if name in names]
    for name in known:
        if there.count(name) > 1:
            raise InvalidRequest(f"`{name}` is there more than once. Send it once.", param=name)


def _may_repeat(quoted: list[bytes], body: bytes) -> bool:
    """Return whether one of the names stands in the text more than once, or could with its letters escaped."""
    if b"\\u00" in body and _ESCAPED_LETTER.search(body) is not None:
        return True
    return any([body.count(name) > 1 for name in quoted])  # a generator costs more  # noqa: C419


def _without_values(body: bytes, members: dict[str, msgspec.Raw], largest: int) -> bytes:
    """Return an object with the same top-level names, but without those larger values that are quickly found."""
    for name, raw in members.items():
        if len(raw) > largest:
            value = bytes(raw)
            start = value_after(name, body, value)
            if start is not None:
                body = b"0".join([body[:start], body[start + len(value) :]])
    return body


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
