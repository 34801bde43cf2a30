"""Spans as OTLP protobuf, encoded directly.

The generated protobuf classes cost about 50 us a span in pure Python, more than all the rest of a request. Most
attributes repeat in many spans, so their bytes are kept. Source: opentelemetry-proto 1.x, trace.proto and common.proto;
a test compares the bytes with those of the SDK's own encoder, field by field.
"""

from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING

from gateway.telemetry.span_data import UNSET

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.telemetry.span_data import Shared, SpanData, Value

_fixed64 = Struct("<Q").pack
_double = Struct("<d").pack
_instants = Struct("<BQBQ").pack
_ids = Struct(">BBQQBBQ").pack
_ids_and_parent = Struct(">BBQQBBQBBQ").pack
_LOW = 2**64 - 1
SHORT = 128
"""Lengths and numbers below it take one byte."""


class Encoder:
    """Encodes spans of one resource and scope."""

    def __init__(self, resource: "Mapping[str, object]", scope: str, version: str) -> None:
        self._resource = _field(1, b"".join(_field(1, _key_value(*item)) for item in resource.items()))
        self._scope = _field(1, _field(1, scope.encode()) + _field(2, version.encode()))

    def span(self, span: "SpanData") -> bytes:
        """Return one span, as `request` takes it."""
        return _field(2, _span(span))

    def request(self, spans: list[bytes]) -> bytes:
        """Return an `ExportTraceServiceRequest` of encoded spans."""
        return _field(1, self._resource + _field(2, self._scope + b"".join(spans)))


def _span(span: "SpanData") -> bytes:
    high, low = span.trace_id >> 64, span.trace_id & _LOW
    parts = [
        _ids_and_parent(0x0A, 16, high, low, 0x12, 8, span.span_id, 0x22, 8, span.parent_id)
        if span.parent_id
        else _ids(0x0A, 16, high, low, 0x12, 8, span.span_id),
        _instants(0x39, span.start, 0x41, span.end),
        span.shared.encoded or _encode_shared(span.shared),
    ]
    parts += _attributes(span.own)
    if span.trace_state:
        parts.append(_field(3, span.trace_state.encode("utf-8", "replace")))
    for moment, name, attributes in span.events:
        event = [b"\x09", _fixed64(moment), _field(2, name.encode())]
        event += [_field(3, _key_value(key, value)) for key, value in attributes]
        parts.append(_field(11, b"".join(event)))
    if span.status == UNSET:
        parts.append(b"\x7a\x00")
    else:
        message = _field(2, span.error.encode("utf-8", "replace")) if span.error else b""
        parts.append(_field(15, message + bytes((0x18, span.status))))
    parts.append(_FLAGS_REMOTE if span.parent_id and span.parent_is_remote else _FLAGS_LOCAL)
    return b"".join(parts)


# Field 16 (flags): whether the parent is remote.
_FLAGS_LOCAL = b"\x85\x01\x00\x01\x00\x00"
_FLAGS_REMOTE = b"\x85\x01\x00\x03\x00\x00"


def _encode_shared(shared: "Shared") -> bytes:
    name_and_kind = _field(5, shared.name.encode()) + bytes((0x30, shared.kind))
    shared.encoded = name_and_kind + b"".join(_attributes(shared.attributes))
    return shared.encoded


def _attributes(attributes: "list[tuple[str, Value]]") -> list[bytes]:
    """Return attributes; short texts, floats and counts, which nearly all are, need only a few steps."""
    encoded: list[bytes] = []
    for name, value in attributes:
        if type(value) is str and len(value) < SHORT and value.isascii():
            encoded += (_before_texts(name)[len(value)], value.encode())
        elif type(value) is float:
            encoded += (_before_double(name), _double(value))
        elif type(value) is int and 0 <= value < 1 << 14:  # not a bool
            encoded += (_before_counts(name)[value >= SHORT], _length(value))
        else:
            encoded.append(_field(9, _key_value(name, value)))
    return encoded


@lru_cache(maxsize=64)
def _before_texts(name: str) -> list[bytes]:
    """Return what comes before a text, by its length."""
    return [_field(9, _key_value(name, "x" * size))[: -size or None] for size in range(SHORT)]


@lru_cache(maxsize=64)
def _before_double(name: str) -> bytes:
    return _field(9, _key_value(name, 0.0))[:-8]


@lru_cache(maxsize=64)
def _before_counts(name: str) -> tuple[bytes, bytes]:
    """Return what comes before a number of one byte, and of two."""
    return _field(9, _key_value(name, 0))[:-1], _field(9, _key_value(name, SHORT))[:-2]


def _key_value(name: str, value: object) -> bytes:
    return _key(name) + _field(2, _any(value))


@lru_cache(maxsize=256)
def _key(name: str) -> bytes:
    return _field(1, name.encode())


def _any(value: object) -> bytes:
    """Return an `AnyValue`; what has no place in one, such as an integer above 64 bits, as text."""
    if isinstance(value, str):
        return _field(1, value.encode("utf-8", "replace"))
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return b"\x18" + _varint(value & 0xFFFF_FFFF_FFFF_FFFF)
    if isinstance(value, float):
        return b"\x21" + _double(value)
    if isinstance(value, list | tuple):
        return _field(5, b"".join([_field(1, _any(item)) for item in value]))
    return _field(1, str(value).encode("utf-8", "replace"))


def _field(number: int, body: bytes) -> bytes:
    """Return a length-delimited field; field numbers up to 15 take one byte."""
    return _BYTES[number << 3 | 2] + _length(len(body)) + body


def _length(size: int) -> bytes:
    if size < SHORT:
        return _BYTES[size]
    return _BYTES[size & 127 | 128] + _BYTES[size >> 7] if size < 1 << 14 else _varint(size)


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:  # noqa: PLR2004
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_BYTES = [bytes((byte,)) for byte in range(256)]
