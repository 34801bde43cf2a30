"""Setting the `model` of a JSON body while every other byte stays as it is."""

import re

import msgspec

from gateway.dialects.json_text import decode

# Atomic groups: a long text is passed over in one go, without a way back into it.
_TOKEN = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[{}\[\]]', re.DOTALL)
_AFTER_KEY = re.compile(rb"\s*:\s*")
_VALUE = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[^\s,}\]]++', re.DOTALL)


def with_model(body: bytes, model: str) -> bytes:
    """Return the same JSON object with its top-level `model` replaced or, if it has none, added in front.

    Every other byte stays: spaces, number forms, order, unknown fields.

    Args:
        body: an object that a dialect has checked: its `model` is a text or null.
        model: the new value.
    """
    value = msgspec.json.encode(model)
    if b'"model"' not in body and b"\\u" not in body:  # no key can be it, not even an escaped one
        return _added(body, value)
    pieces, kept, depth, position = [], 0, 0, 0
    while (token := _TOKEN.search(body, position)) is not None:
        position = token.end()
        first = token.group()[:1]
        if first in b"{[":
            depth += 1
        elif first in b"}]":
            depth -= 1
        elif depth == 1 and (colon := _AFTER_KEY.match(body, position)) is not None:
            position = colon.end()
            if decode(token.group()) == "model" and (old := _VALUE.match(body, position)) is not None:
                pieces += [body[kept : old.start()], value]
                kept = position = old.end()
    if pieces:
        return b"".join([*pieces, body[kept:]])
    return _added(body, value)


def _added(body: bytes, value: bytes) -> bytes:
    start = body.index(b"{") + 1
    comma = b"" if body[start:].lstrip().startswith(b"}") else b","
    return b"".join([body[:start], b'"model":', value, comma, body[start:]])
