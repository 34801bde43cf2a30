"""Answers made of choices: whole ones, and streams that end with `[DONE]`."""

from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from gateway.dialects.answer_fields import NULL, abridged_event, count, event_document, is_object, name, small_parts
from gateway.dialects.captured_text import MAX_TEXT, objects_in
from gateway.dialects.error_words import read_words
from gateway.dialects.json_text import NO_JSON, SHALLOW, decode_with, has_many_objects
from gateway.dialects.server_sent_events import DONE
from gateway.pieces import BLOCK

if TYPE_CHECKING:
    from gateway.errors import ErrorWords

MAX_CHOICES_SHOWN = 16
MAX_CHOICES_READ = 128
"""Of a large event: as many as OpenAI lets a request ask for."""
REASONING = frozenset({"role", "reasoning", "reasoning_content", "reasoning_details", "thinking", "thinking_blocks"})
"""The fields of a delta that are not yet the answer, whoever writes them."""


class _Choice(Struct):
    index: int = 0
    finish_reason: str | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class AnswerFields(Struct):
    """What an unstreamed answer says about itself, except its choices."""

    error: msgspec.Raw = NULL
    id: str | None = None
    object: str | None = None
    model: str | None = None
    usage: _Usage | None = None

    @property
    def is_error(self) -> bool:
        """Whether it says so: vLLM's older form of an error."""
        return self.object == "error"

    @property
    def response_id(self) -> str | None:
        """The id of the answer."""
        return self.id

    @property
    def finish_reasons(self) -> list[str] | None:
        """None: they are not looked at."""
        return None

    @property
    def input_tokens(self) -> int | None:
        """Tokens of the prompt."""
        return self.usage.prompt_tokens if self.usage is not None else None

    @property
    def output_tokens(self) -> int | None:
        """Tokens of the answer."""
        return self.usage.completion_tokens if self.usage is not None else None


class WholeAnswer(AnswerFields):
    """What an unstreamed answer says about itself."""

    choices: list[_Choice] | None = None

    @property
    def finish_reasons(self) -> list[str] | None:
        """Of each choice; `error` for a choice without one."""
        return None if self.choices is None else [choice.finish_reason or "error" for choice in self.choices]


_decode_whole_answer = msgspec.json.Decoder(WholeAnswer).decode
_decode_answer_fields = msgspec.json.Decoder(AnswerFields).decode


def decode_whole_answer(body: bytes) -> AnswerFields:
    """Return what an answer says about itself; of one with more choices than are looked at, without them.

    Raises:
        msgspec.DecodeError: it is not JSON, or its fields have other types.
    """
    many = len(body) > BLOCK and has_many_objects(body)
    return _decode_answer_fields(body) if many else _decode_whole_answer(body)


class _Unfinished(Struct):
    finish_reason: None = None


class _Words(Struct):
    """An event after the first that has nothing to note: more words of choices that go on."""

    error: None = None
    usage: None = None
    choices: list[_Unfinished] | None = None


class _LargeChunk(Struct):
    error: msgspec.Raw = NULL
    object: msgspec.Raw = NULL
    id: msgspec.Raw = NULL
    model: msgspec.Raw = NULL
    usage: msgspec.Raw = NULL
    choices: msgspec.Raw = NULL


class _LargeChoice(Struct):
    index: msgspec.Raw = NULL
    finish_reason: msgspec.Raw = NULL
    text: msgspec.Raw = NULL
    delta: msgspec.Raw = NULL


class _LargeDelta(Struct):
    content: msgspec.Raw = NULL
    tool_calls: msgspec.Raw = NULL
    reasoning: msgspec.Raw = NULL
    reasoning_content: msgspec.Raw = NULL
    reasoning_details: msgspec.Raw = NULL
    thinking: msgspec.Raw = NULL
    thinking_blocks: msgspec.Raw = NULL


_decode_large_chunk = msgspec.json.Decoder(_LargeChunk).decode
_FirstChoices = msgspec.defstruct(
    "_FirstChoices",
    [(f"choice_{number}", _LargeChoice | None, None) for number in range(MAX_CHOICES_READ)],
    array_like=True,
)
"""A list of choices; those after the first ones are passed over, and nothing is built of them."""
_first_choices = msgspec.json.Decoder(_FirstChoices).decode
_large_delta = msgspec.json.Decoder(_LargeDelta).decode
_decode_words = msgspec.json.Decoder(_Words).decode


class ChoicesState:
    """A stream of choices 0..n-1, each with a finish reason, then `[DONE]`.

    Some servers write a finish reason into every chunk, some none at all, and some ignore how many choices were asked
    for: `[DONE]` is trusted.
    """

    __slots__ = (
        "_asks_usage",
        "_choices",
        "_reasons",
        "answer",
        "content",
        "ended",
        "error",
        "finished",
        "input_tokens",
        "model",
        "output_tokens",
        "response_id",
        "text",
    )

    def __init__(
        self, choices: int, *, asks_usage: bool = False, keep_text: bool = False, until_answer: bool = False
    ) -> None:
        self._choices = choices
        self._asks_usage = asks_usage
        self._reasons: dict[int, str] = {}
        self.content = self.finished = self.ended = False
        self.answer = not until_answer
        self.error: ErrorWords | None = None
        self.model: str | None = None
        self.response_id: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.text: str | None = "" if keep_text else None

    @property
    def finish_reasons(self) -> list[str]:
        """In the order of the choices; for a choice without one `error`, or `unknown` after `[DONE]`."""
        missing = "unknown" if self.ended else "error"
        return [self._reasons.get(index, missing) for index in range(min(self._choices, MAX_CHOICES_SHOWN))]

    @property
    def awaits_usage(self) -> bool:
        """Whether the usage was asked for, and has not come."""
        return self._asks_usage and self.output_tokens is None and self.input_tokens is None

    @property
    def done_event(self) -> bytes:
        """`[DONE]`."""
        return b"data: [DONE]\n\n"

    @staticmethod
    def abridged(data: bytes) -> bytes:
        """Return an event that says the same in few bytes."""
        return abridged_event(data, _large_chunk)

    def feed(self, data: bytes) -> None:
        """Take in the data of one event. Raises: InvalidResponse."""
        if len(data) > BLOCK:
            data = self.abridged(data)
        if self.content and self.answer and self.model is not None and self.text is None and _is_only_words(data):
            return
        if data.strip() == DONE:
            self.ended = True
            return
        chunk = event_document(data)
        if not isinstance(chunk, dict):
            self.error = read_words(chunk) if not self.content else None  # a text, or Gemini's list
            return
        error = chunk.get("error")
        if (error is not None and error is not False) or (chunk.get("object") == "error" and "choices" not in chunk):
            self.error = read_words(chunk)
            return
        if self.model is None:
            self.model = name(chunk.get("model"))
            self.response_id = name(chunk.get("id"))
        usage = chunk.get("usage")
        if usage is not None and isinstance(usage, dict):
            self.input_tokens = count(usage.get("prompt_tokens"))
            self.output_tokens = count(usage.get("completion_tokens"))
        for choice in objects_in(chunk.get("choices")):
            self._feed_choice(choice)

    def _feed_choice(self, choice: dict[str, Any]) -> None:
        reason = choice.get("finish_reason")
        if reason:  # some servers write "" for none
            index = choice.get("index", 0)
            self.content = self.answer = True
            if isinstance(index, int) and 0 <= index < self._choices:
                self._reasons[index] = str(reason)
                self.finished = len(self._reasons) == self._choices
        if not self.content or not self.answer or self.text is not None:
            delta = choice.get("delta")
            if choice.get("text") or (
                isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")
            ):
                self.content = True
                self.answer = self.answer or not isinstance(delta, dict) or not _is_only_reasoning(delta)
            if self.text is not None:
                words = choice.get("text") or (delta.get("content") if isinstance(delta, dict) else None)
                if isinstance(words, str):
                    self.text = (self.text + words)[:MAX_TEXT]


def _large_chunk(data: bytes) -> dict[str, Any]:
    """Return what is read of a large chunk."""
    chunk = small_parts(decode_with(_decode_large_chunk, data), "choices")
    choices = chunk.get("choices")
    if isinstance(choices, msgspec.Raw):
        chunk["choices"] = _large_choices(choices)
    return chunk


def _large_choices(choices: msgspec.Raw) -> list[dict[str, Any]]:
    """Return the first choices of a large chunk, as far as they are read; none when they are no objects."""
    try:
        read = msgspec.structs.astuple(_first_choices(choices))
    except msgspec.ValidationError:
        read = ()
    return [_large_choice(choice) for choice in read if choice is not None]


def _large_choice(choice: "_LargeChoice") -> dict[str, Any]:
    fields = small_parts(choice, "delta")
    delta = fields.get("delta")
    if isinstance(delta, msgspec.Raw):  # it has words, whatever they are
        words = small_parts(_large_delta(delta)) if is_object(delta) else {}
        fields["delta"] = words if any(words.values()) else {"": True}
    return fields


def _is_only_words(data: bytes) -> bool:
    """Return whether an event is one of `_Words`: JSON, checked as a full decoding does except for large numbers."""
    try:
        if len(data) <= SHALLOW and data.isascii():
            _decode_words(data)
        else:
            decode_with(_decode_words, data)
    except NO_JSON:
        return False
    return True


def _is_only_reasoning(delta: dict[str, Any]) -> bool:
    return not any(value for key, value in delta.items() if key not in REASONING)
