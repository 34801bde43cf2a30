"""From the bytes of a body to a typed request, or to an error that says what is wrong with it."""

import re
from typing import Any, TypeVar

import msgspec

from mock_model.errors import InvalidRequest

Request = TypeVar("Request")
_MISSING = re.compile(r"missing required field `([^`]+)`")
_PATH = re.compile(r" - at `\$\.?([A-Za-z_][A-Za-z0-9_]*)?[^`]*`$")


class StreamOptions(msgspec.Struct):
    """What a caller wants of a stream."""

    include_usage: bool | None = None


class Glance(msgspec.Struct):
    """The fields that say which call this is, whatever they hold."""

    model: Any = None
    stream: Any = None


_glance = msgspec.json.Decoder(Glance)
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def glance(body: bytes) -> Glance | None:
    """What a body that is no good request says of itself, or None if it is no JSON object."""
    try:
        return _glance.decode(body)
    except _NOT_JSON:
        return None


def decode(decoder: msgspec.json.Decoder[Request], body: bytes) -> Request:
    """The request in a body.

    Raises:
        InvalidRequest: It is not JSON, or a field has a wrong type; `param` names it.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        text = str(exc)
        found = _MISSING.search(text) or _PATH.search(text)
        raise InvalidRequest(text, param=found and found[1]) from None
    except _NOT_JSON as exc:
        raise InvalidRequest(f"the body is not JSON: {exc}", code="invalid_json") from None
