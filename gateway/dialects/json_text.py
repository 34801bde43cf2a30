r"""JSON as RFC 8259 defines it, including what msgspec rejects.

Some servers and clients cut texts between the two halves of a surrogate pair; RFC 8259, section 8.2, allows the result
(`\ud83d`). What is decoded here is only inspected: the bytes go on unchanged.
"""

import re
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TypeVar

import msgspec

T = TypeVar("T")
MAX_DEPTH = 500
"""Levels of nested arrays and objects. RFC 8259, section 9, allows a limit. The interpreter's own is 1,000 in some
versions and tens of thousands in others, and a backend that receives deeper JSON may fail on it."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some clients write it before a text. RFC 8259, section 8.1, lets a reader ignore it."""
SHALLOW = 2 * MAX_DEPTH
"""Bytes; a shorter text cannot be deeper, since each level takes two."""
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What these functions raise for text that is not JSON."""

# Atomic groups: a long text is passed over in one go, without a way back into it.
_TOKEN = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[{}\[\]]', re.DOTALL)
_COLON = re.compile(rb"\s*:\s*")
_NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
_STRETCH = 4096
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_NOT_FINITE = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|-?Infinity|NaN', re.DOTALL)
_decode = msgspec.json.Decoder().decode
_pass_over = msgspec.json.Decoder(msgspec.Raw).decode
_decode_any_number = msgspec.json.Decoder(float_hook=float).decode


def decode(data: bytes) -> object:
    """Return the value of a JSON text; numbers too large for a float become infinite, half surrogates U+FFFD.

    Raises:
        NO_JSON: it is not JSON.
    """
    try:
        value = _decode(data)
    except msgspec.DecodeError:
        value = _decode_any_number(_SURROGATE.sub(rb"\\ufffd", data))
    _check_depth(data)
    return value


def decode_with(decode_typed: Callable[[bytes], T], data: bytes) -> T:
    """Return the value that a typed decoder reads.

    Raises:
        msgspec.ValidationError: it is of another type.
        NO_JSON: it is not JSON.
    """
    if not data.isascii():
        data.decode()  # typed decoders skip texts without checking their encoding
    try:
        value = decode_typed(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if _SURROGATE.search(data) is None:
            raise
        value = decode_typed(_SURROGATE.sub(rb"\\ufffd", data))
    _check_depth(data)
    return value


def leniently(read: Callable[[bytes], T], data: bytes) -> T:
    """Return what `read` reads, with `NaN` and `Infinity` as null where it finds no JSON: Python's servers write them.

    Raises:
        NO_JSON: it is no JSON even so.
    """
    try:
        return read(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if b"NaN" not in data and b"Infinity" not in data:
            raise
        return read(_NOT_FINITE.sub(_null, data))


def _null(found: "re.Match[bytes]") -> bytes:
    """Return a text as it is, a number that is not finite as null."""
    return found[0] if found[0].startswith(b'"') else b"null"


def check(data: bytes) -> None:
    """Check that it is JSON, without building anything of it.

    Raises:
        NO_JSON: it is not.
    """
    decode_with(_pass_over, data)


def names_in(data: bytes) -> Iterator[tuple[str, int]]:
    """Yield the name of each top-level member of a valid JSON object, and where its value begins."""
    depth = position = 0
    while (token := _TOKEN.search(data, position)) is not None:
        position = token.end()
        first = token.group()[:1]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and (colon := _COLON.match(data, position)) is not None:
            position = colon.end()
            yield str(decode(token.group())), position


def value_after(name: str, data: bytes, value: bytes) -> int | None:
    """Return where `value` stands, if it is that of the first member called `name`, at whatever level."""
    at = data.find(b'"%s"' % name.encode())
    colon = _COLON.match(data, at + len(name.encode()) + 2) if at >= 0 else None
    return colon.end() if colon is not None and data.startswith(value, colon.end()) else None


def _check_depth(data: bytes) -> None:
    """Check the depth of valid JSON; what has few brackets, texts included, cannot be deep. Raises: RecursionError."""
    if len(data) <= SHALLOW or data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    # Without escapes every quote begins or ends a text; two adjacent ones do not affect the brackets after them.
    marks = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_MARKS).replace(b'""', b"")
    brackets = b"".join(marks.split(b'"')[::2])
    depth = 0
    for at in range(0, len(brackets), _STRETCH):  # in stretches: other threads get their turn
        depths = list(accumulate((_STEPS[byte] for byte in brackets[at : at + _STRETCH]), initial=depth))
        if max(depths) > MAX_DEPTH:
            raise RecursionError("the JSON is nested too deep")
        depth = depths[-1]
