r"""JSON as RFC 8259 has it, where it allows what msgspec takes for an error.

Some servers and clients cut texts between the two halves of a surrogate pair; RFC 8259, section 8.2, allows what comes
of that (`\ud83d`). What is decoded here is only looked at: the bytes go on as they came.
"""

import re
from collections.abc import Callable
from typing import TypeVar

import msgspec

T = TypeVar("T")
NO_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What the functions here raise for a text that is no JSON."""

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
        return _decode(data)
    except msgspec.DecodeError:
        return _decode_any_number(_SURROGATE.sub(rb"\\ufffd", data))


def decode_with(decode_typed: Callable[[bytes], T], data: bytes) -> T:
    """The same, by a typed decoder.

    Raises:
        msgspec.ValidationError: it is another type.
        NO_JSON: it is no JSON.
    """
    try:
        return decode_typed(data)
    except msgspec.ValidationError:
        raise
    except msgspec.DecodeError:
        if _SURROGATE.search(data) is None:
            raise
        return decode_typed(_SURROGATE.sub(rb"\\ufffd", data))


def check(data: bytes) -> None:
    """Whether it is JSON at all; nothing is built of it.

    Raises:
        NO_JSON: it is none.
    """
    decode_with(_pass_over, data)


def check_utf8(data: bytes) -> None:
    """What a typed decoder leaves out where it passes over a text. Raises: UnicodeDecodeError."""
    if not data.isascii():
        data.decode()
