"""OpenAI's responses."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from gateway.dialects.answer_fields import (
    NULL,
    abridged_event,
    count,
    event_document,
    identifier,
    name,
    parts_inside,
    read_whole,
)
from gateway.dialects.captured_text import MAX_TEXT, fields_of, input_messages, objects_in
from gateway.dialects.dialect import Prompt, StreamState
from gateway.dialects.error_words import read_words, words_of
from gateway.dialects.json_text import NO_JSON, decode_with
from gateway.dialects.openai import errors
from gateway.dialects.prompt_tokens import tokens_of
from gateway.dialects.request_fields import Flag, ModelName, Number, Tokens, check_text_or_list, read_fields
from gateway.dialects.server_sent_events import DONE
from gateway.errors import ErrorWords, GatewayError, InvalidResponse
from gateway.pieces import BLOCK

RESPONSES = "/v1/responses"
TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})


class ResponsesRequest(Struct):
    """`POST /v1/responses`: an input, a stored prompt or a conversation; the backend checks which."""

    input: msgspec.Raw = NULL
    model: ModelName | None = None
    previous_response_id: Annotated[str, Meta(description="a text")] | None = None
    stream: Flag | None = None
    max_output_tokens: Tokens | None = None
    temperature: Number | None = None
    top_p: Number | None = None


_request = msgspec.json.Decoder(ResponsesRequest)


class _Usage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None


class WholeResponse(Struct):
    """What an unstreamed response says about itself."""

    error: msgspec.Raw = NULL
    id: str | None = None
    object: str | None = None
    model: str | None = None
    status: str | None = None
    usage: _Usage | None = None

    @property
    def is_error(self) -> bool:
        """Whether it says so."""
        return self.object == "error"

    @property
    def response_id(self) -> str | None:
        """The id of the response."""
        return self.id

    @property
    def finish_reasons(self) -> list[str] | None:
        """The status of the response."""
        return [self.status] if self.status else None

    @property
    def input_tokens(self) -> int | None:
        """Tokens of the input."""
        return self.usage.input_tokens if self.usage is not None else None

    @property
    def output_tokens(self) -> int | None:
        """Tokens of the output."""
        return self.usage.output_tokens if self.usage is not None else None


_decode_whole = msgspec.json.Decoder(WholeResponse).decode


class _Delta(Struct):
    type: Literal["response.output_text.delta"]
    sequence_number: int


class _LargeEvent(Struct):
    type: msgspec.Raw = NULL
    sequence_number: msgspec.Raw = NULL
    object: msgspec.Raw = NULL
    error: msgspec.Raw = NULL
    code: msgspec.Raw = NULL
    message: msgspec.Raw = NULL
    param: msgspec.Raw = NULL
    delta: msgspec.Raw = NULL
    item: msgspec.Raw = NULL
    response: msgspec.Raw = NULL


class _LargeResponse(Struct):
    id: msgspec.Raw = NULL
    model: msgspec.Raw = NULL
    error: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL


class _LargeItem(Struct):
    type: msgspec.Raw = NULL


_decode_large_event = msgspec.json.Decoder(_LargeEvent).decode
_decode_large_response = msgspec.json.Decoder(_LargeResponse).decode
_decode_large_item = msgspec.json.Decoder(_LargeItem).decode
_decode_delta = msgspec.json.Decoder(_Delta).decode


class ResponseState:
    """A stream of numbered events up to `response.completed`, `.incomplete` or `.failed`; no `[DONE]`.

    Attributes:
        sequence_number: the number that the next event would have.
    """

    __slots__ = (
        "_status",
        "answer",
        "awaits_usage",
        "content",
        "ended",
        "error",
        "finished",
        "input_tokens",
        "model",
        "output_tokens",
        "response_id",
        "sequence_number",
        "text",
    )

    def __init__(self, *, keep_text: bool = False, until_answer: bool = False) -> None:
        self._status = "error"
        self.answer = not until_answer
        self.content = self.finished = self.ended = self.awaits_usage = False
        self.error: ErrorWords | None = None
        self.sequence_number = 0
        self.model: str | None = None
        self.response_id: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.text: str | None = "" if keep_text else None

    @property
    def finish_reasons(self) -> list[str]:
        """The status of the response."""
        return [self._status]

    @property
    def done_event(self) -> bytes | None:
        """None: the terminal event is the end."""
        return None

    @staticmethod
    def abridged(data: bytes) -> bytes:
        """Return an event that says the same in few bytes."""
        return abridged_event(data, _large_event)

    def feed(self, data: bytes) -> None:
        """Take in the data of one event. Raises: InvalidResponse."""
        if len(data) > BLOCK:
            data = self.abridged(data)
        if self.text is None and (number := _number_of_delta(data)) is not None:
            self.sequence_number = number + 1
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
        number = event.get("sequence_number")
        if isinstance(number, int):
            self.sequence_number = number + 1
        kind = event.get("type")
        if event.get("object") == "error" or not isinstance(kind, str):
            self.error = read_words(event)
            return
        if kind.endswith(".delta") or kind == "response.output_item.done":
            self.content = True
            self.answer = self.answer or not _is_reasoning(kind, event)
            if self.text is not None and kind == "response.output_text.delta":
                self.text = (self.text + str(event.get("delta", "")))[:MAX_TEXT]
        elif kind == "error":
            own = event.get("error") or {key: event.get(key) for key in ("code", "message", "param")}
            self.error = words_of(own, {})
        elif kind in TERMINAL:
            self._end(kind, event.get("response"))
        elif self.response_id is None and isinstance(response := event.get("response"), dict):
            self.response_id = identifier(response.get("id"))  # from the first event: also of a stream cut off later

    def _end(self, kind: str, response: object) -> None:
        """Take in the terminal event; a failure before any content is an error inside a good answer."""
        error = response.get("error") if isinstance(response, dict) else None
        if kind == "response.failed" and not self.content and error is not None:
            self.error = words_of(error, {})
            return
        self.content = self.answer = self.finished = self.ended = True
        self._feed_response(kind, response)

    def _feed_response(self, kind: str, response: object) -> None:
        self._status = kind.removeprefix("response.")
        if not isinstance(response, dict):
            return
        self.model = name(response.get("model"))
        self.response_id = identifier(response.get("id"))
        usage = response.get("usage")
        if isinstance(usage, dict):
            self.input_tokens = count(usage.get("input_tokens"))
            self.output_tokens = count(usage.get("output_tokens"))


class OpenAIResponses:
    """The dialect of `/v1/responses`."""

    passes_query = True
    stores = True
    provider = "openai"
    passes_through = False
    prompt_tokens = staticmethod(tokens_of)
    operations: Mapping[str, str] = {RESPONSES: "chat"}

    def read_request(self, path: str, body: bytes) -> Prompt:
        """Check the body of a request."""
        fields = read_fields(_request, body)
        check_text_or_list("input", fields.input, may_be_null=True)
        return Prompt(
            self,
            path,
            body,
            model=fields.model,
            stream=bool(fields.stream),
            previous_response_id=fields.previous_response_id,
            max_tokens=fields.max_output_tokens,
            temperature=fields.temperature,
            top_p=fields.top_p,
        )

    def stream_state(self, prompt: Prompt, *, keep_text: bool, until_answer: bool) -> StreamState:  # noqa: ARG002
        """Return the state of a stream of numbered events."""
        return ResponseState(keep_text=keep_text, until_answer=until_answer)

    def read_answer(self, content_type: str, body: bytes) -> WholeResponse:
        """Check a whole response."""
        return read_whole(content_type, body, _decode_whole, WholeResponse)

    def error_body(self, error: GatewayError) -> bytes:
        """Return OpenAI's envelope."""
        return errors.error_body(error)

    def error_inside(self, words: ErrorWords) -> bytes:
        """Return what a server says in an error inside a good answer, in the envelope."""
        return errors.error_inside(words)

    def error_event(self, error: GatewayError, state: StreamState | None) -> bytes:
        """Return an `error` event, numbered after the events that have gone out."""
        inside = errors.envelope_with_own_words(error)
        event = {
            "type": "error",
            "sequence_number": state.sequence_number if isinstance(state, ResponseState) else 0,
            "code": inside["code"],
            "message": inside["message"],
            "param": inside["param"],
            "error": inside,
        }
        return b"event: error\ndata: " + errors.encode(event) + b"\n\n"

    def prompt_messages(self, body: bytes) -> str:
        """Return the texts of the input."""
        return input_messages(fields_of(body).get("input") or [])

    def answer_texts(self, body: bytes) -> list[str]:
        """Return the text of the response, as one."""
        said = [
            part["text"]
            for item in objects_in(fields_of(body).get("output"))
            for part in objects_in(item.get("content"))
            if isinstance(part.get("text"), str)
        ]
        return ["".join(said)] * bool(said)


def _large_event(data: bytes) -> dict[str, Any]:
    """Return what is read of a large event."""
    inside = {"response": _decode_large_response, "item": _decode_large_item}
    return parts_inside(decode_with(_decode_large_event, data), inside)


def _number_of_delta(data: bytes) -> int | None:
    """Return the number of a `_Delta` event, or None; checked as a full decoding does except for large numbers."""
    try:
        return decode_with(_decode_delta, data).sequence_number
    except NO_JSON:
        return None


def _is_reasoning(kind: str, event: dict[str, Any]) -> bool:
    """Return whether a content event is not yet of the answer."""
    item = event.get("item")
    return kind.startswith("response.reasoning") or (isinstance(item, dict) and item.get("type") == "reasoning")
