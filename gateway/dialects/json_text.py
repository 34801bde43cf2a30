r"""JSON as RFC 8259 defines it, including what msgspec rejects.

Some servers and clients cut texts between the two halves of a surrogate pair; RFC 8259, section 8.2, allows the result
(`\ud83d`). What is decoded here is only inspected: the bytes go on unchanged.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import TypeVar

import msgspec

from gateway.pieces import BLOCK, joined

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

LONGEST_ESCAPE = len(rb"\u0000")
STRETCH = 256
"""Brackets that are counted in one go."""

_COLON = re.compile(rb"\s*:\s*")
_DROPPED = bytes(set(range(256)) - set(b'"[]{}'))
_DROPPED_BESIDE_COMMAS = bytes(set(range(256)) - set(b'",'))
_STEPS = bytes({"[": 1, "{": 1, "]": 255, "}": 255}.get(chr(byte), 0) for byte in range(256))
"""What each byte adds to the depth; 255 is -1 in a signed byte."""
_SURROGATES = [rb"\ud%c" % digit for digit in b"89abcdefABCDEF"]
_decode = msgspec.json.Decoder().decode
_pass_over = msgspec.json.Decoder(msgspec.Raw).decode
_decode_any_number = msgspec.json.Decoder(float_hook=float).decode


def decode(data: bytes) -> object:
    """Return the value of a JSON text; numbers too large for a float become infinite.

    Where it has half a surrogate pair, surrogates become characters for private use.

    Raises:
        NO_JSON: it is not JSON.
    """
    try:
        value = _decode(data)
    except msgspec.DecodeError:
        value = _decode_any_number(_without_surrogates(data))
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
        whole = _without_surrogates(data)
        if whole is data:
            raise
        value = decode_typed(whole)
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
        return read(joined(map(_block_of_finite_numbers, blocks(data))))


def _block_of_finite_numbers(block: bytes) -> bytes:
    """Return a block with null for what is not finite, in texts too: what is decoded here is only inspected."""
    return block.replace(b"NaN", b"null").replace(b"-Infinity", b"null").replace(b"Infinity", b"null")


def blocks(data: bytes) -> Iterator[bytes]:
    """Yield a text in blocks: what replaces something in the whole of a large text holds the interpreter for as long.

    They end behind a comma, which tears nothing; where there is none for long, between two characters of a text.
    """
    start = 0
    while start < len(data):
        end = data.find(b",", start + BLOCK, start + 2 * BLOCK) + 1 or max(
            _between_characters(data, start + 2 * BLOCK), start + BLOCK
        )
        yield data[start:end]
        start = end


def beginning_of_text(data: bytes) -> bytes:
    """Return the beginning of a text that goes on, without a part of an escape or of a character at its end."""
    return data[: _between_characters(data, len(data) - 1)]


def _between_characters(data: bytes, place: int) -> int:
    """Return the last place up to `place` at which neither an escape nor a character in UTF-8 is torn."""
    if place >= len(data):
        return len(data)
    while data[place] & 0xC0 == 0x80:  # noqa: PLR2004 - a further byte of a character
        place -= 1
    escape = data.rfind(b"\\", place - LONGEST_ESCAPE, place)
    if escape < 0:
        return place
    start = len(data[:escape].rstrip(b"\\")) if data[escape - 1 : escape] == b"\\" else escape
    return escape - (escape - start) % 2


def check(data: bytes) -> None:
    """Check that it is JSON, without building anything of it.

    Raises:
        NO_JSON: it is not.
    """
    decode_with(_pass_over, data)


def has_many_objects(data: bytes) -> bool:
    """Return whether a text holds so many objects that they would take many times its bytes.

    What real clients and servers send is text, tokens or numbers for the most part.
    """
    least = len(data) // 64
    if data.count(b"{") < least:
        return False
    return sum(brackets.count(b"{") for brackets in _brackets(data, 0, len(data))) >= least


def has_many_values(data: bytes) -> bool:
    """Return whether a text holds so many values, of whatever kind, that they would take many times its bytes."""
    return has_values(data, len(data) // 16)


def has_values(data: bytes, least: int) -> bool:
    """Return whether a text holds so many commas between values."""
    return (
        data.count(b",") >= least
        and sum(commas.count(b",") for commas in _brackets(data, 0, len(data), dropped=_DROPPED_BESIDE_COMMAS)) >= least
    )


def at_top_level(data: bytes, starts: Iterable[int]) -> Iterator[int]:
    """Yield those of some places, in order and outside of texts, that are directly in a valid JSON object."""
    depth = at = 0
    for start in starts:
        for brackets in _brackets(data, at, start):
            depth += _rise(brackets)
        at = start
        if depth == 1:
            yield start


def without_escapes(data: bytes) -> bytes:
    """Return JSON without escaped backslashes and quotes: every quote that is left begins or ends a text."""
    return data.replace(rb"\\", b"").replace(rb"\"", b"")


def value_after(data: bytes, end: int) -> int | None:
    """Return where the value of a name begins that ends at `end`; None for a text that is no name."""
    colon = _COLON.match(data, end)
    return colon.end() if colon is not None else None


def _without_surrogates(data: bytes) -> bytes:
    """Return a text whose escaped surrogates are characters for private use; itself when it has none."""
    if b"\\ud" not in data and b"\\uD" not in data:
        return data
    return joined(map(_block_without_surrogates, blocks(data)))


def _block_without_surrogates(block: bytes) -> bytes:
    block = block.replace(rb"\uD", rb"\ud")
    for escape in _SURROGATES:
        if rb"\ud" not in block:
            break
        block = block.replace(escape, rb"\ue0")
    return block


def _check_depth(data: bytes) -> None:
    """Check the depth of valid JSON; what has few brackets, texts included, cannot be deep. Raises: RecursionError."""
    if len(data) <= SHALLOW or data.count(b"[") + data.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for brackets in _brackets(data, 0, len(data)):
        for at in range(0, len(brackets), STRETCH):
            stretch = brackets[at : at + STRETCH]
            opened = stretch.count(b"[") + stretch.count(b"{")
            if depth + opened > MAX_DEPTH:
                steps = memoryview(stretch.translate(_STEPS)).cast("b")
                if max(accumulate(steps, initial=depth)) > MAX_DEPTH:
                    raise RecursionError("the JSON is nested too deep")
            depth += 2 * opened - len(stretch)


def _rise(brackets: bytes) -> int:
    """Return by how much the depth is greater after some brackets than before."""
    return 2 * (brackets.count(b"[") + brackets.count(b"{")) - len(brackets)


def _brackets(data: bytes, start: int, end: int, dropped: bytes = _DROPPED) -> Iterator[bytes]:
    """Yield the brackets between two places of valid JSON, the first of them outside of texts; none that texts hold.

    `dropped`: all characters but quotes and what is yielded in place of brackets.
    """
    inside = 0
    while start < end:
        block = data[start : min(start + BLOCK, end)]
        torn = (len(block) - len(block.rstrip(b"\\"))) % 2
        start += len(block) - torn
        if b"\\" in block:
            block = without_escapes(block[: len(block) - torn])
        # Two adjacent quotes do not affect the brackets after them.
        pieces = block.translate(None, dropped).replace(b'""', b"").split(b'"')
        yield b"".join(pieces[inside::2])
        inside = (inside + len(pieces) - 1) % 2
