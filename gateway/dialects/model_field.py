"""Setting the `model` of a JSON body while every other byte stays as it is."""

import re
from typing import TYPE_CHECKING

import msgspec

from gateway.dialects.json_text import at_top_level, value_after
from gateway.pieces import BLOCK, joined

if TYPE_CHECKING:
    from collections.abc import Iterator

# Atomic groups: a long text is passed over in one go, without a way back into it.
_VALUE = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[^\s,}\]]++', re.DOTALL)
_NAME = re.compile(rb'"(?<!\\")(?:m|\\u006[dD])(?:o|\\u006[fF])(?:d|\\u0064)(?:e|\\u0065)(?:l|\\u006[cC])"')
LONGEST = len(rb'"\u006d\u006f\u0064\u0065\u006c"')
"""Bytes of the name with all of its letters escaped."""
MAX_MODEL = 512
"""Characters of a model's name."""
_EMPTY = re.compile(rb"\s*}")


def with_model(body: bytes, model: str) -> bytes:
    """Return the same JSON object with its top-level `model` replaced or, if it has none, added in front.

    Every other byte stays: spaces, number forms, order, unknown fields.

    Args:
        body: an object that a dialect has checked: its `model` is a text or null.
        model: the new value.
    """
    value = msgspec.json.encode(model)
    names = dict(_names(body))
    large = len(body) > BLOCK
    join = joined if large else b"".join
    view = memoryview(body) if large else body  # not copied piece by piece
    pieces: list[bytes | memoryview] = []
    kept = 0
    for start in at_top_level(body, names):
        at = value_after(body, names[start])
        if at is not None and (old := _VALUE.match(body, at)) is not None:
            pieces += [view[kept:at], value]
            kept = old.end()
    if pieces:
        return join([*pieces, view[kept:]])
    start = body.index(b"{") + 1
    comma = b"" if _EMPTY.match(body, start) else b","
    return join([view[:start], b'"model":', value, comma, view[start:]])


def _names(body: bytes) -> "Iterator[tuple[int, int]]":
    """Yield where each text "model" begins and ends, also one with escaped letters."""
    for block in range(0, len(body), BLOCK):  # block by block: other threads get their turn
        end = block + BLOCK + LONGEST
        if body.find(b"\\u00", block, end) < 0 and body.find(b'"model"', block, end) < 0:
            continue
        for found in _NAME.finditer(body, block, end):
            if found.start() < block + BLOCK:
                yield found.span()
