"""Reads the body of a request, or says what is wrong with it."""

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
    """The fields by which a call is known, of any type."""

    model: Any = None
    stream: Any = None


_glance = msgspec.json.Decoder(Glance)
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def glance(body: bytes) -> Glance | None:
    """Return what a bad request says about itself; None when it is not a JSON object."""
    try:
        return _glance.decode(body)
    except _NOT_JSON:
        return None


def decode(decoder: msgspec.json.Decoder[Request], body: bytes) -> Request:
    """Return the request in a body.

    Raises:
        InvalidRequest: it is not JSON, or a field has a wrong type; `param` names it.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _MISSING.search(text) or _PATH.search(text)
        raise InvalidRequest(text, param=found and found[1]) from None
    except _NOT_JSON as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None
