"""Reading the body of a request by the types of its fields, and naming the field that is wrong."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from gateway.dialects.json_text import (
    BYTE_ORDER_MARK,
    LONGEST_ESCAPE,
    NO_JSON,
    at_top_level,
    blocks,
    check,
    decode_with,
    value_after,
)
from gateway.dialects.model_field import MAX_MODEL
from gateway.errors import CallerError, InvalidJson, InvalidRequest
from gateway.pieces import BLOCK, joined

T = TypeVar("T", bound=Struct)

ModelName = Annotated[
    str, Meta(min_length=1, max_length=MAX_MODEL, description=f"a text of 1 to {MAX_MODEL} characters")
]
Flag = Annotated[bool, Meta(description="true or false")]
Count = (
    Annotated[int, Meta(ge=1, description="a whole number of at least 1")]
    | Annotated[float, Meta(ge=1, le=1 << 53, multiple_of=1)]
)
"""Some clients write 1.0 for 1."""
Number = Annotated[float, Meta(description="a number")]
Tokens = Annotated[int | float, Meta(description="a number")]
"""Some clients write 10.0 for 10."""


class Message(Struct):
    """One message of a chat; its content is the backend's business."""

    role: Annotated[str, Meta(description="a text")]


ListOfMessages = Annotated[list[Message], Meta(min_length=1, description="a list of at least one message")]
LARGE_LIST = 1 << 18
"""Bytes; of a larger list the wrong item is not searched for."""
MAX_PLACES = 5_000
"""Places of a name in a body, at whatever level, beyond which it is not searched for the one at the top level."""

_A_MESSAGE = re.compile(rb"\s*\[\s*\{")
_ESCAPED = re.compile(rb"\\u00(?:4[1-9a-fA-F]|5[0-9aAfF]|6[1-9a-fA-F]|7[0-9aA])|\\u017[fF]|\\u212[aA]")
"""What could stand for a letter or underscore of a name, in either case."""
_ALSO_LETTERS = {
    **dict.fromkeys(("\u017f".encode(), rb"\u017f", rb"\u017F"), b"S"),
    **dict.fromkeys(("\u212a".encode(), rb"\u212a", rb"\u212A"), b"K"),
}
"""The long s and the sign of Kelvin: Go's JSON takes them for letters in another case."""
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
    if not text or text.isspace():
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


def check_messages(value: msgspec.Raw) -> None:
    """Check messages that are too many to look into: a list that begins with an object. Raises: InvalidRequest."""
    if _A_MESSAGE.match(value) is None:
        raise InvalidRequest("`messages` must be a list of at least one message.", param="messages")


class _Names:
    """The names of the fields that are read.

    Attributes:
        quoted: each as it stands in JSON; all: without that.
        pattern: finds any of them.
        longest: bytes of the longest.
        escapes: of their letters in either case, each with its letter, by what all those of a row begin with.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.quoted = {name: b'"%s"' % name.encode() for name in names}
        self.all = frozenset(self.quoted)
        self.pattern = re.compile(b"|".join(self.quoted.values()))
        self.longest = max(map(len, self.quoted.values()))
        self.escapes: dict[bytes, list[tuple[bytes, bytes]]] = {}
        letters = "".join(self.quoted)
        for letter in sorted({*letters, *letters.upper()}):
            for digits in sorted({f"{ord(letter):04x}", f"{ord(letter):04X}"}):
                escape = b"\\u" + digits.encode()
                self.escapes.setdefault(escape[:-1], []).append((escape, letter.encode()))


@cache
def _names_of(kind: type[Struct]) -> _Names:
    return _Names(kind.__struct_fields__)


def _check_names(names: _Names, body: bytes) -> None:
    """Refuse what a backend could read otherwise than the gateway: a field that is there twice or in another case.

    Args:
        names: of the fields that are read.
        body: a valid JSON object.

    Raises:
        InvalidRequest: `param` names the field.
    """
    if len(body) <= BLOCK and _is_plain(names, body):
        return
    if _may_hide(body) or (not body.isascii() and any(letter in body for letter in _ALSO_LETTERS)):
        _check_doubtful(names, joined(_unescaped(names, block) for block in blocks(body)))
    elif _may_be_twice(names, body):
        _check_doubtful(names, body)


def _is_plain(names: _Names, body: bytes) -> bool:
    """Return whether there is no room in a body for anything twice, and no name in another case."""
    try:
        members = _members(body)
    except msgspec.DecodeError:  # half a surrogate pair
        return False
    quoted = names.quoted
    return len(_encode(members)) == len(body) and (
        names.all.issuperset(members) or all(name in quoted or name.casefold() not in quoted for name in members)
    )


def _may_hide(body: bytes) -> bool:
    """Return whether a letter of a name may be written as an escape."""
    if len(body) <= BLOCK and b"\\u" not in body:
        return False
    starts = range(0, len(body), BLOCK)  # block by block: other threads get their turn
    return any(_ESCAPED.search(body, at, at + BLOCK + LONGEST_ESCAPE) is not None for at in starts)


def _may_be_twice(names: _Names, body: bytes) -> bool:
    """Return whether a name is in a body twice, or in another case, at whatever level."""
    seen: set[bytes] = set()
    for at in range(0, len(body), BLOCK):  # block by block: other threads get their turn
        block = body[at : at + BLOCK + names.longest]
        found = names.pattern.findall(block.lower())
        if not found:
            continue
        before = len(seen)
        seen.update(found)
        if len(seen) != before + len(found) or names.pattern.findall(block) != found:
            return True
    return False


def _check_doubtful(names: _Names, body: bytes) -> None:
    """Look at which level the names stand. Raises: InvalidRequest."""
    body = joined(block.replace(rb"\\", b"//").replace(rb"\"", b"''") for block in blocks(body))
    low = body.lower()
    names_at: dict[int, str] = {}
    for name, quoted in names.quoted.items():
        places = list(islice(_places(quoted, low), MAX_PLACES + 1))
        if len(places) > MAX_PLACES:
            raise InvalidRequest(f"`{name}` comes more than {MAX_PLACES} times in the body.", param=name)
        names_at.update(dict.fromkeys(places, name))
    seen: set[str] = set()
    for start in at_top_level(low, sorted(names_at)):
        name = names_at[start]
        quoted = names.quoted[name]
        if value_after(low, start + len(quoted)) is None:
            continue
        if name in seen:
            raise InvalidRequest(f"`{name}` is there more than once. Send it once.", param=name)
        if not body.startswith(quoted, start):
            raise InvalidRequest(f"`{name}` must be written in lower case.", param=name)
        seen.add(name)


def _places(quoted: bytes, text: bytes) -> Iterator[int]:
    """Yield where a quoted name begins."""
    at = text.find(quoted)
    while at >= 0:
        yield at
        at = text.find(quoted, at + len(quoted) - 1)


def _unescaped(names: _Names, body: bytes) -> bytes:
    """Return a text in which what stands for a letter of a name, in either case, is that letter."""
    body = body.replace(rb"\\", b"//")
    for row, escapes in names.escapes.items():
        for escape, letter in escapes:
            if row not in body:
                break
            body = body.replace(escape, letter)
    for letter, capital in _ALSO_LETTERS.items():
        body = body.replace(letter, capital)
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
