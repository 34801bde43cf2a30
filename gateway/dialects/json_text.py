r"""JSON as RFC 8259 has it, where it allows what msgspec takes for an error.

Some servers and clients cut texts between the two halves of a surrogate pair; RFC 8259, section 8.2, allows what comes
of that (`\ud83d`). What is decoded here is only looked at: the bytes go on as they came.
"""

import re
from collections.abc import Callable
from itertools import accumulate
from typing import TypeVar

import msgspec

T = TypeVar("T")
MAX_DEPTH = 500
"""Levels of arrays and objects in each other. RFC 8259, section 9, allows a limit; that of the interpreter is 1,000 at
some versions, tens of thousands at others, and whoever is handed on what is deeper may fail on it."""
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the functions here raise for a text that is no JSON."""

_NO_MARKS = bytes(set(range(256)) - set(b'"[]{}'))
_STEPS = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
_STRETCH = 4096
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_decode = msgspec.json.Decoder().decode
_pass_over = msgspec.json.Decoder(msgspec.Raw).decode
_decode_any_number = msgspec.json.Decoder(float_hook=float).decode


def decode(data: bytes) -> object:
    """The value of a JSON text; a number too large for a float is infinite, halves of surrogates are U+FFFD.

    Raises:
        NO_JSON: it is none.
    """
    try:
        value = _decode(data)
    except msgspec.DecodeError:
        value = _decode_any_number(_SURROGATE.sub(rb"\\ufffd", data))
    _check_depth(data)
    return value


def decode_with(decode_typed: Callable[[bytes], T], data: bytes) -> T:
    """The same, by a typed decoder.

    Raises:
        msgspec.ValidationError: it is another type.
        NO_JSON: it is no JSON.
    """
    if not data.isascii():
        data.decode()  # a typed decoder passes over texts without that look
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


def check(data: bytes) -> None:
    """Whether it is JSON at all; nothing is built of it.

    Raises:
        NO_JSON: it is none.
    """
    decode_with(_pass_over, data)


def _check_depth(data: bytes) -> None:
    """Of JSON. What has few brackets, in texts too, is not taken apart. Raises: RecursionError."""
    if len(data) <= 2 * MAX_DEPTH or data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    # Without escapes each quote begins or ends a text; two side by side change nothing for the brackets after them.
    marks = data.replace(rb"\\", b"").replace(rb"\"", b"").translate(None, _NO_MARKS).replace(b'""', b"")
    brackets = b"".join(marks.split(b'"')[::2])
    depth = 0
    for at in range(0, len(brackets), _STRETCH):  # in stretches, so that other threads get their turn
        depths = list(accumulate((_STEPS[byte] for byte in brackets[at : at + _STRETCH]), initial=depth))
        if max(depths) > MAX_DEPTH:
            raise RecursionError("the JSON is nested too deep")
        depth = depths[-1]
