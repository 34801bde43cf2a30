"""Anthropic's messages.

Sources: Anthropic's API reference ("Messages", "Streaming messages", "Errors"), and what vLLM, llama.cpp, Ollama and
LiteLLM send in its form.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import msgspec
from msgspec import Struct

from gateway.dialects.answer_fields import (
    NULL,
    abridged_event,
    count,
    event_document,
    name,
    parts_inside,
    read_whole,
)
from gateway.dialects.captured_text import MAX_TEXT, fields_of, input_messages, objects_in
from gateway.dialects.dialect import Prompt, StreamState
from gateway.dialects.error_answers import own_error, own_words
from gateway.dialects.error_words import read_words, status_of, words_of
from gateway.dialects.json_text import NO_JSON, decode_with, has_many_objects
from gateway.dialects.prompt_tokens import tokens_of
from gateway.dialects.request_fields import (
    Flag,
    ListOfMessages,
    ModelName,
    Number,
    Tokens,
    check_messages,
    read_fields,
)
from gateway.dialects.server_sent_events import DONE
from gateway.errors import ErrorWords, GatewayError, InvalidResponse
from gateway.pieces import BLOCK

MESSAGES = "/v1/messages"
TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""The `type` of an error by its HTTP status; of others `invalid_request_error` (4xx) or `api_error`."""
THINKING = ("thinking_delta", "signature_delta")
"""The types of deltas that are not yet the answer."""
INPUT = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
"""Together the tokens of a prompt: OpenTelemetry's GenAI conventions count cached ones in."""


class _MessagesRequest(Struct, kw_only=True):
    model: ModelName | None = None
    stream: Flag | None = None
    max_tokens: Tokens | None = None
    temperature: Number | None = None
    top_p: Number | None = None


class MessagesRequest(_MessagesRequest, kw_only=True):
    """`POST /v1/messages`."""

    messages: ListOfMessages


class ManyMessages(_MessagesRequest, kw_only=True):
    """The same with more small messages than are looked at."""

    messages: msgspec.Raw


_request = msgspec.json.Decoder(MessagesRequest)
_many_messages = msgspec.json.Decoder(ManyMessages)


class _Usage(Struct):
    input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    output_tokens: int | None = None


class WholeMessage(Struct):
    """What an unstreamed message says about itself, except its content."""

    error: msgspec.Raw = NULL
    id: str | None = None
    type: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: _Usage | None = None

    @property
    def is_error(self) -> bool:
        """Whether it says that it is something other than a message: `error` for the most part."""
        return self.type not in {None, "message"}

    @property
    def response_id(self) -> str | None:
        """The id of the message."""
        return self.id

    @property
    def finish_reasons(self) -> list[str] | None:
        """The stop reason."""
        return [self.stop_reason] if self.stop_reason else None

    @property
    def input_tokens(self) -> int | None:
        """Tokens of the prompt, cached ones too."""
        usage = self.usage
        return _sum_of(getattr(usage, part) for part in INPUT) if usage is not None else None

    @property
    def output_tokens(self) -> int | None:
        """Tokens of the answer."""
        return self.usage.output_tokens if self.usage is not None else None


_decode_whole = msgspec.json.Decoder(WholeMessage).decode


class _Text(Struct):
    type: Literal["text_delta"]


class _TextDelta(Struct):
    type: Literal["content_block_delta"]
    delta: _Text


class _LargeEvent(Struct):
    type: msgspec.Raw = NULL
    error: msgspec.Raw = NULL
    code: msgspec.Raw = NULL
    detail: msgspec.Raw = NULL
    message: msgspec.Raw = NULL
    delta: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL


class _LargeMessage(Struct):
    id: msgspec.Raw = NULL
    model: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL


class _LargeDelta(Struct):
    type: msgspec.Raw = NULL
    text: msgspec.Raw = NULL
    stop_reason: msgspec.Raw = NULL


_decode_large_event = msgspec.json.Decoder(_LargeEvent).decode
_decode_large_message = msgspec.json.Decoder(_LargeMessage).decode
_decode_large_delta = msgspec.json.Decoder(_LargeDelta).decode
_decode_text_delta = msgspec.json.Decoder(_TextDelta).decode


class MessageState:
    """A stream from `message_start` over the deltas of content blocks and `message_delta` to `message_stop`.

    Events are known by the `type` in their data: some servers write no `event:` line. Those of unknown types go on.
    """

    __slots__ = (
        "_stop_reason",
        "_usage",
        "answer",
        "awaits_usage",
        "content",
        "ended",
        "error",
        "finished",
        "model",
        "output_tokens",
        "response_id",
        "text",
    )

    def __init__(self, *, keep_text: bool = False, until_answer: bool = False) -> None:
        self._stop_reason: str | None = None
        self._usage: dict[str, int] = {}
        self.answer = not until_answer
        self.content = self.finished = self.ended = self.awaits_usage = False
        self.error: ErrorWords | None = None
        self.model: str | None = None
        self.response_id: str | None = None
        self.output_tokens: int | None = None
        self.text: str | None = "" if keep_text else None

    @property
    def finish_reasons(self) -> list[str]:
        """The stop reason; without one `error`, or `unknown` of a whole message."""
        return [self._stop_reason or ("unknown" if self.ended else "error")]

    @property
    def input_tokens(self) -> int | None:
        """Tokens of the prompt, cached ones too."""
        return _sum_of(self._usage.values())

    @property
    def done_event(self) -> bytes | None:
        """None: `message_stop` is the end."""
        return None

    @staticmethod
    def abridged(data: bytes) -> bytes:
        """Return an event that says the same in few bytes."""
        return abridged_event(data, _large_event)

    def feed(self, data: bytes) -> None:
        """Take in the data of one event. Raises: InvalidResponse."""
        if len(data) > BLOCK:
            data = self.abridged(data)
        if self.text is None and _is_text_delta(data):
            self.content = self.answer = True
            return
        if data.strip() == DONE:
            raise InvalidResponse("The backend's stream ended before its answer was complete.")
        event = event_document(data)
        if isinstance(event, dict):
            self._feed_event(event)
        elif not self.content:
            self.error = read_words(event)  # a text, or Gemini's list

    def _feed_event(self, event: dict[str, Any]) -> None:
        kind = event.get("type")
        if kind == "content_block_delta":
            self._feed_delta(_object(event.get("delta")))
        elif kind == "message_start":
            message = _object(event.get("message"))
            self.model = name(message.get("model"))
            self.response_id = name(message.get("id"))
            self._feed_input(_object(message.get("usage")))
        elif kind == "message_delta":
            self.content = self.answer = True
            self._stop_reason = name(_object(event.get("delta")).get("stop_reason")) or self._stop_reason
            usage = _object(event.get("usage"))
            self._feed_input(usage)
            self.output_tokens = count(usage.get("output_tokens"))
        elif kind == "message_stop":
            self.ended = True
        else:
            self.error = _error_in(event)

    def _feed_delta(self, delta: dict[str, Any]) -> None:
        kind = delta.get("type")
        self.content = True
        self.answer = self.answer or kind not in THINKING
        if self.text is not None and kind == "text_delta":
            self.text = (self.text + str(delta.get("text", "")))[:MAX_TEXT]

    def _feed_input(self, usage: dict[str, Any]) -> None:
        """Take in counts of the prompt's tokens: later ones are cumulative, but 0 where a server does not know."""
        for part in INPUT:
            tokens = count(usage.get(part))
            if tokens or (tokens is not None and part not in self._usage):
                self._usage[part] = tokens


class AnthropicMessages:
    """The dialect of `/v1/messages`."""

    passes_query = True
    stores = False
    provider = "anthropic"
    passes_through = False
    prompt_tokens = staticmethod(tokens_of)
    operations: Mapping[str, str] = {MESSAGES: "chat"}

    def read_request(self, path: str, body: bytes) -> Prompt:
        """Check the body of a request."""
        fields = _read(body)
        return Prompt(
            self,
            path,
            body,
            model=fields.model,
            stream=bool(fields.stream),
            max_tokens=fields.max_tokens,
            temperature=fields.temperature,
            top_p=fields.top_p,
        )

    def stream_state(self, prompt: Prompt, *, keep_text: bool, until_answer: bool) -> StreamState:  # noqa: ARG002
        """Return the state of a stream of a message."""
        return MessageState(keep_text=keep_text, until_answer=until_answer)

    def read_answer(self, content_type: str, body: bytes) -> WholeMessage:
        """Check a whole message."""
        return read_whole(content_type, body, _decode_whole, WholeMessage)

    def error_body(self, error: GatewayError) -> bytes:
        """Return an error in Anthropic's form."""
        return _encode_error(_inside(error))

    def error_inside(self, words: ErrorWords) -> bytes:
        """Return what a server says in an error inside a good answer, in Anthropic's form."""
        return _encode_error({"type": type_of(status_of(words))} | own_words(words))

    def error_event(self, error: GatewayError, state: StreamState | None) -> bytes:  # noqa: ARG002
        """Return an `error` event; a backend's own error answer as it says it."""
        return b"event: error\ndata: " + _encode_error(own_error(error) or _inside(error)) + b"\n\n"

    def prompt_messages(self, body: bytes) -> str:
        """Return the texts of the system prompt and of the messages."""
        fields = fields_of(body)
        system, messages = fields.get("system"), fields.get("messages")
        before = [{"role": "system", "content": system}] if system else []
        return input_messages([*before, *(messages if isinstance(messages, list) else [])])

    def answer_texts(self, body: bytes) -> list[str]:
        """Return the text of the message, as one."""
        blocks = objects_in(fields_of(body).get("content"))
        said = [block["text"] for block in blocks if isinstance(block.get("text"), str)]
        return ["".join(said)] * bool(said)


def _read(body: bytes) -> MessagesRequest | ManyMessages:
    if len(body) <= BLOCK or not has_many_objects(body):
        return read_fields(_request, body)
    fields = read_fields(_many_messages, body)
    check_messages(fields.messages)
    return fields


def type_of(status: int) -> str:
    """Return the `type` of an error with this HTTP status."""
    return TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")  # noqa: PLR2004


def _inside(error: GatewayError) -> dict[str, str]:
    """Return what an error says: Anthropic's two fields, our code, and `param` where it names something."""
    inside = {"type": type_of(error.status), "message": error.message, "code": error.code}
    return inside if error.param is None else inside | {"param": error.param}


def _encode_error(inside: dict[str, Any]) -> bytes:
    return msgspec.json.encode({"type": "error", "error": inside})


def _error_in(event: dict[str, Any]) -> ErrorWords | None:
    """Return the error in an event of no other known type; None when there is none.

    llama.cpp's has no `error` around its fields, among them `code`.
    """
    if event.get("type") == "error":
        return read_words(event) or words_of(event, {})
    is_bare = "type" not in event or "code" in event
    return read_words(event) if is_bare or event.get("error") is not None else None


def _large_event(data: bytes) -> dict[str, Any]:
    """Return what is read of a large event."""
    inside = {"message": _decode_large_message, "delta": _decode_large_delta}
    return parts_inside(decode_with(_decode_large_event, data), inside)


def _is_text_delta(data: bytes) -> bool:
    """Return whether an event is a `_TextDelta`; checked as a full decoding does except for large numbers."""
    try:
        decode_with(_decode_text_delta, data)
    except NO_JSON:
        return False
    return True


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _sum_of(counts: Iterable[int | None]) -> int | None:
    known = [tokens for tokens in counts if tokens is not None]
    return sum(known) if known else None
