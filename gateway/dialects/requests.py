"""What a caller may send: the fields we read are typed and checked, all others stay as they came."""

import re
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from gateway.dialects.json_text import check, decode, decode_with
from gateway.errors import InvalidJson, InvalidRequest

ModelName = Annotated[str, Meta(min_length=1, max_length=512)]


class StreamOptions(Struct):
    """The part of `stream_options` we look at."""

    include_usage: bool | None = None


class Message(Struct):
    """One message of a chat; its content is the backend's business."""

    role: str


class ChatRequest(Struct):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: int | float | None = None
    max_completion_tokens: int | float | None = None
    temperature: float | None = None
    top_p: float | None = None


class CompletionsRequest(Struct):
    """`POST /v1/completions`."""

    prompt: msgspec.Raw
    model: ModelName | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: int | float | None = None
    temperature: float | None = None
    top_p: float | None = None


class EmbeddingsRequest(Struct):
    """`POST /v1/embeddings`."""

    input: msgspec.Raw
    model: ModelName | None = None


class ResponsesRequest(Struct):
    """`POST /v1/responses`: an input, a stored prompt or a conversation; which, the backend checks."""

    input: msgspec.Raw = msgspec.Raw(b"null")
    model: ModelName | None = None
    stream: bool | None = None
    max_output_tokens: int | float | None = None
    temperature: float | None = None
    top_p: float | None = None


AnyRequest = ChatRequest | CompletionsRequest | EmbeddingsRequest | ResponsesRequest

_DECODERS: dict[str, msgspec.json.Decoder[AnyRequest]] = {
    "/v1/chat/completions": msgspec.json.Decoder(ChatRequest),
    "/v1/completions": msgspec.json.Decoder(CompletionsRequest),
    "/v1/embeddings": msgspec.json.Decoder(EmbeddingsRequest),
    "/v1/responses": msgspec.json.Decoder(ResponsesRequest),
}
PATHS = tuple(_DECODERS)

_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_SEVERAL = re.compile(rb'\s*\[\s*["\[{]')
"""The beginning of a list of prompts; numbers would be the tokens of one."""
_PATH_IN_MESSAGE = re.compile(r" - at `\$\.?(.+)`$")
_MISSING = re.compile(r"missing required field `(\w+)`")


class Prompt:
    """A checked request. Only those fields are kept that somebody reads: all of them take many times the body's bytes.

    Attributes:
        path: the path it was posted to, one of `PATHS`.
        body: its bytes as they came.
        model: the model it names, or None.
        stream: whether the answer is a stream.
        choices: how many choices the answer has (`n` for each prompt).
        max_tokens, temperature, top_p: as asked, or None.
    """

    __slots__ = ("body", "choices", "max_tokens", "model", "path", "stream", "temperature", "top_p")

    def __init__(self, path: str, body: bytes, fields: AnyRequest) -> None:
        self.path = path
        self.body = body
        self.model = fields.model
        self.stream = bool(getattr(fields, "stream", None))
        self.choices = _choices(fields)
        self.max_tokens: float | None = (
            getattr(fields, "max_tokens", None)
            or getattr(fields, "max_completion_tokens", None)
            or getattr(fields, "max_output_tokens", None)
        )
        self.temperature: float | None = getattr(fields, "temperature", None)
        self.top_p: float | None = getattr(fields, "top_p", None)


def parse(path: str, body: bytes) -> Prompt:
    """Check the body of a request to `path`, once.

    Raises:
        InvalidJson: empty, no JSON in UTF-8, nested too deep.
        InvalidRequest: no object, or a field is wrong; `param` names it.
    """
    if not body.strip():
        raise InvalidJson("The body is empty; send a JSON object.")
    try:
        fields = decode_with(_DECODERS[path].decode, body)
    except msgspec.ValidationError as error:
        raise _invalid(body, str(error)) from None
    except msgspec.DecodeError as error:
        raise InvalidJson(f"The body is not JSON: {error}.") from None
    except UnicodeDecodeError as error:
        raise InvalidJson(f"The body is not UTF-8 (byte {error.start}).") from None
    except RecursionError:
        raise InvalidJson("The body is nested too deep.") from None
    _check_texts(fields)
    return Prompt(path, body, fields)


def _check_texts(fields: AnyRequest) -> None:
    """A prompt or an input is a text or a list, which the backend looks into. Raises: InvalidRequest."""
    name = "prompt" if isinstance(fields, CompletionsRequest) else "input"
    raw = bytes(getattr(fields, name, None) or b'""')
    if raw[:1] not in b'"[' and not (raw == b"null" and not isinstance(fields, EmbeddingsRequest)):
        raise InvalidRequest(f"Expected a text or a list (`{name}`).", param=name)


def _invalid(body: bytes, message: str) -> InvalidJson | InvalidRequest:
    """Msgspec's message, which quotes types and names but no values, with the field it is about."""
    try:
        check(body)
    except msgspec.DecodeError as error:
        return InvalidJson(f"The body is not JSON: {error}.")
    except RecursionError:
        return InvalidJson("The body is nested too deep.")
    where = _PATH_IN_MESSAGE.search(message)
    text = message[: where.start()] if where else message
    missing = _MISSING.search(text)
    parts = [where.group(1)] if where else []
    if missing:
        parts.append(missing.group(1))
    param = ".".join(parts).replace("[...]", "[]") or None
    about = f" (`{param}`)" if param and not missing else ""
    return InvalidRequest(f"{text}{about}.", param=param)


def _choices(fields: AnyRequest) -> int:
    n = getattr(fields, "n", None) or 1
    if isinstance(fields, CompletionsRequest) and _SEVERAL.match(fields.prompt):
        return n * len(decode_with(_items, bytes(fields.prompt)))
    return n


# Atomic groups: a long text is passed in one go, and nothing is kept for going back into it.
_TOKEN = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[{}\[\]]', re.DOTALL)
_AFTER_KEY = re.compile(rb"\s*:\s*")
_VALUE = re.compile(rb'(?>"[^"\\]*+(?:\\.[^"\\]*+)*+")|[^\s,}\]]++', re.DOTALL)


def with_model(body: bytes, model: str) -> bytes:
    """The same JSON object, only the top-level `model` replaced or, where there is none, added in front.

    `body` must have passed `parse`. Every other byte stays: spaces, number forms, order, unknown fields.
    """
    value = msgspec.json.encode(model)
    if b'"model"' not in body and b"\\u" not in body:  # no key can be it, not even in disguise
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
            if decode(token.group()) == "model":
                old = _VALUE.match(body, position)
                if old is None:  # pragma: no cover - parse has checked the body
                    raise InvalidJson("The body is not JSON.")
                pieces += [body[kept : old.start()], value]
                kept = position = old.end()
    if pieces:
        return b"".join([*pieces, body[kept:]])
    return _added(body, value)


def _added(body: bytes, value: bytes) -> bytes:
    """The object with the model in front."""
    start = body.index(b"{") + 1
    comma = b"" if body[start:].lstrip().startswith(b"}") else b","
    return b"".join([body[:start], b'"model":', value, comma, body[start:]])
