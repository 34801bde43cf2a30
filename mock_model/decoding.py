"""Reads the body of a request, or says what is wrong with it."""

import re
from typing import Any, Protocol, TypeVar

import msgspec

from mock_model.errors import InvalidRequest
from mock_model.form import read_form

Request = TypeVar("Request")
Read_co = TypeVar("Read_co", covariant=True)
_MISSING = re.compile(r"missing required field `([^`]+)`")
_PATH = re.compile(r" - at `\$\.?([A-Za-z_][A-Za-z0-9_]*)?[^`]*`$")


class StreamOptions(msgspec.Struct):
    """What a caller wants of a stream."""

    include_usage: bool | None = None


class Glance(msgspec.Struct):
    """The fields by which a call is known, of any type."""

    model: Any = None
    stream: Any = None


class Reader(Protocol[Read_co]):
    """Reads bodies of one kind: JSON or forms."""

    def read(self, body: bytes, content_type: str) -> Read_co:
        """Return the request in a body.

        Raises:
            InvalidRequest: it is of another kind, or a field has a wrong type; `param` names it.
        """

    def glance(self, body: bytes, content_type: str) -> Glance | None:
        """Return what a bad request says about itself; None when it is of another kind."""


_glance = msgspec.json.Decoder(Glance)
_NOT_JSON = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class JsonReader(Reader[Request]):
    """Reads JSON objects, whatever the content type says."""

    def __init__(self, request_type: type[Request]) -> None:
        self._decoder = msgspec.json.Decoder(request_type)

    def read(self, body: bytes, content_type: str) -> Request:  # noqa: ARG002
        """Return the request in a body."""
        return decode(self._decoder, body)

    def glance(self, body: bytes, content_type: str) -> Glance | None:  # noqa: ARG002
        """Return what a bad request says about itself."""
        try:
            return _glance.decode(body)
        except _NOT_JSON:
            return None


class FormReader(Reader[Request]):
    """Reads forms; numbers and booleans are texts there."""

    def __init__(self, request_type: type[Request]) -> None:
        self._type = request_type

    def read(self, body: bytes, content_type: str) -> Request:
        """Return the request in a body."""
        fields = read_form(body, content_type)
        try:
            return msgspec.convert(fields, self._type, strict=False)
        except msgspec.ValidationError as error:
            raise _invalid(error) from None

    def glance(self, body: bytes, content_type: str) -> Glance | None:
        """Return what a bad request says about itself."""
        try:
            fields = read_form(body, content_type)
        except InvalidRequest:
            return None
        return Glance(fields.get("model"), str(fields.get("stream")).lower() in {"true", "1"})


def decode(decoder: msgspec.json.Decoder[Request], body: bytes) -> Request:
    """Return the request in a body.

    Raises:
        InvalidRequest: it is not JSON, or a field has a wrong type; `param` names it.
    """
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from None
    except _NOT_JSON as error:
        raise InvalidRequest(f"the body is not JSON: {error}", code="invalid_json") from None


def _invalid(error: msgspec.ValidationError) -> InvalidRequest:
    text = str(error)
    found = _MISSING.search(text) or _PATH.search(text)
    return InvalidRequest(text, param=found and found[1])
