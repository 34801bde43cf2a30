"""How far a stream has come: first content, finish of each choice, the end; with what it says about itself."""

from typing import Any, Literal, Protocol

import msgspec

from gateway.dialects.capture import MAX_TEXT
from gateway.dialects.json_text import NO_JSON, decode, decode_with
from gateway.dialects.server_sent_events import DONE
from gateway.errors import InvalidResponse


class _NoEnd(msgspec.Struct):
    finish_reason: None = None


class _Words(msgspec.Struct):
    """An event after the first with nothing to note in it: words of choices that go on."""

    error: None = None
    usage: None = None
    choices: list[_NoEnd] | None = None


class _Delta(msgspec.Struct):
    type: Literal["response.output_text.delta"]
    sequence_number: int


_decode_words = msgspec.json.Decoder(_Words).decode
_decode_delta = msgspec.json.Decoder(_Delta).decode

TERMINAL = frozenset({"response.completed", "response.incomplete", "response.failed"})


class Progress(Protocol):
    """What the relay asks about a stream.

    Attributes:
        content: the first content event has been seen.
        complete: whatever ends now, the answer is whole.
        ended: the last event there can be has been seen.
        error: the backend's own error, sent as an event.
        sequence_number: the number for an error event of ours (`/v1/responses` alone numbers its events).
        model, response_id, input_tokens, output_tokens, finish_reasons: what the answer says about itself.
        text: the first words, kept only when asked for.
    """

    content: bool
    complete: bool
    ended: bool
    error: object | None
    sequence_number: int | None
    model: str | None
    response_id: str | None
    input_tokens: int | None
    output_tokens: int | None
    text: str | None

    @property
    def finish_reasons(self) -> list[str]:
        """Why the answer ended, per choice."""

    @property
    def done_event(self) -> bytes | None:
        """What a complete stream lacks when its backend just ends it."""

    def see(self, data: bytes) -> None:
        """Take in the data of one event. Raises: InvalidResponse when it is not JSON."""


class ChoicesProgress:
    """Chat and completions: choices 0..n-1, each with a finish reason, then `[DONE]`."""

    __slots__ = (
        "_finished",
        "_n",
        "complete",
        "content",
        "ended",
        "error",
        "input_tokens",
        "model",
        "output_tokens",
        "response_id",
        "sequence_number",
        "text",
    )

    def __init__(self, choices: int, *, keep_text: bool = False) -> None:
        self._n = choices
        self._finished: dict[int, str] = {}
        self.content = self.complete = self.ended = False
        self.error: object | None = None
        self.sequence_number: int | None = None
        self.model: str | None = None
        self.response_id: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.text: str | None = "" if keep_text else None

    @property
    def finish_reasons(self) -> list[str]:
        """In the order of the choices; `error` for a choice that got none."""
        return [self._finished.get(index, "error") for index in range(min(self._n, 16))]

    @property
    def done_event(self) -> bytes | None:
        """`[DONE]`."""
        return b"data: [DONE]\n\n"

    def see(self, data: bytes) -> None:
        """One event's data."""
        if self.content and self.model is not None and self.text is None and _only_words(data):
            return
        if data.strip() == DONE:
            self.ended = True
            return
        chunk = _json(data)
        if not isinstance(chunk, dict):
            return
        if chunk.get("error") is not None:
            self.error = chunk["error"]
            return
        if self.model is None:
            self.model = _text(chunk.get("model"))
            self.response_id = _text(chunk.get("id"))
        usage = chunk.get("usage")
        if usage is not None and isinstance(usage, dict):
            self.input_tokens = _count(usage.get("prompt_tokens"))
            self.output_tokens = _count(usage.get("completion_tokens"))
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            return
        for choice in choices:
            if isinstance(choice, dict):
                self._see_choice(choice)

    def _see_choice(self, choice: dict[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if reason:  # "" stands for none at some servers
            index = choice.get("index", 0)
            self.content = True
            if isinstance(index, int) and 0 <= index < self._n:
                self._finished[index] = str(reason)
                self.complete = len(self._finished) == self._n
        if not self.content or self.text is not None:
            delta = choice.get("delta")
            if choice.get("text") or (
                isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")
            ):
                self.content = True
            if self.text is not None:
                words = choice.get("text") or (delta.get("content") if isinstance(delta, dict) else None)
                if isinstance(words, str):
                    self.text = (self.text + words)[:MAX_TEXT]


class ResponsesProgress:
    """`/v1/responses`: numbered events up to `response.completed`, `.incomplete` or `.failed`; no `[DONE]`."""

    __slots__ = (
        "_status",
        "complete",
        "content",
        "ended",
        "error",
        "input_tokens",
        "model",
        "output_tokens",
        "response_id",
        "sequence_number",
        "text",
    )

    def __init__(self, *, keep_text: bool = False) -> None:
        self._status = "error"
        self.content = self.complete = self.ended = False
        self.error: object | None = None
        self.sequence_number: int | None = 0
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
        """Nothing: the terminal event is the end."""
        return None

    def see(self, data: bytes) -> None:
        """One event's data."""
        if self.text is None and (number := _number_of_delta(data)) is not None:
            self.sequence_number = number + 1
            self.content = True
            return
        if data.strip() == DONE:
            self.ended = True
            return
        event = _json(data)
        if isinstance(event, dict):
            self._see_event(event)

    def _see_event(self, event: dict[str, Any]) -> None:
        number = event.get("sequence_number")
        if isinstance(number, int):
            self.sequence_number = number + 1
        kind = event.get("type")
        if not isinstance(kind, str):
            if event.get("error") is not None:
                self.error = event["error"]
            return
        if kind.endswith(".delta") or kind == "response.output_item.done":
            self.content = True
            if self.text is not None and kind == "response.output_text.delta":
                self.text = (self.text + str(event.get("delta", "")))[:MAX_TEXT]
        elif kind == "error":
            self.error = event.get("error") or {key: event.get(key) for key in ("code", "message", "param")}
        elif kind in TERMINAL:
            self.content = self.complete = True
            self._see_response(kind, event.get("response"))

    def _see_response(self, kind: str, response: object) -> None:
        self._status = kind.removeprefix("response.")
        if not isinstance(response, dict):
            return
        self.model = _text(response.get("model"))
        self.response_id = _text(response.get("id"))
        usage = response.get("usage")
        if isinstance(usage, dict):
            self.input_tokens = _count(usage.get("input_tokens"))
            self.output_tokens = _count(usage.get("output_tokens"))


def _only_words(data: bytes) -> bool:
    """Whether it is an event as `_Words` has it: JSON, checked as `_json` does but for the size of numbers."""
    try:
        decode_with(_decode_words, data)
    except NO_JSON:
        return False
    return True


def _number_of_delta(data: bytes) -> int | None:
    """The number of an event as `_Delta` has it, checked as `_only_words` does."""
    try:
        return decode_with(_decode_delta, data).sequence_number
    except NO_JSON:
        return None


def _json(data: bytes) -> object:
    try:
        return decode(data)
    except NO_JSON:
        raise InvalidResponse("The backend sent an event whose data is not JSON.") from None


def _text(value: object) -> str | None:
    return value[:256] if isinstance(value, str) else None


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
