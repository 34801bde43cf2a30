"""Setting the `model` of a JSON body while every other byte stays as it is."""

import re

import msgspec

from gateway.dialects.json_text import names_in

# Atomic groups: a long text is passed over in one go, without a way back into it.
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
    pieces, kept = [], 0
    for name, start in names_in(body):
        if name == "model" and (old := _VALUE.match(body, start)) is not None:
            pieces += [body[kept:start], value]
            kept = old.end()
    if pieces:
        return b"".join([*pieces, body[kept:]])
    return _added(body, value)


def _added(body: bytes, value: bytes) -> bytes:
    start = body.index(b"{") + 1
    comma = b"" if body[start:].lstrip().startswith(b"}") else b","
    return b"".join([body[:start], b'"model":', value, comma, body[start:]])
