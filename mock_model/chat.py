"""Chat completions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.answer import CREATED, DONE, Answer, Event, data_event, document
from mock_model.decoding import StreamOptions
from mock_model.text import Passage, Writer, count_tokens, texts_in
from mock_model.tool_choice import chosen

Count = Annotated[int, Meta(ge=1)]


class Message(msgspec.Struct):
    """One message of the conversation."""

    role: str
    content: str | list[Any] | None = None


class Function(msgspec.Struct):
    """A function the model may call."""

    name: str
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """A tool the model may call."""

    type: str
    function: Function | None = None


class ResponseFormat(msgspec.Struct):
    """The form an answer must have."""

    type: str
    json_schema: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """One of the `n` answers: a text, or the arguments for a tool."""

    index: int
    passage: Passage
    tool: Function | None
    call_id: str

    @property
    def finish_reason(self) -> str:
        """Why the model stopped."""
        if self.tool is not None:
            return "tool_calls"
        return "length" if self.passage.cut else "stop"

    def message(self) -> dict[str, Any]:
        """Return the choice in an unstreamed answer."""
        message: dict[str, Any] = {"role": "assistant", "content": self.passage.text, "refusal": None}
        if self.tool is not None:
            function = {"name": self.tool.name, "arguments": self.passage.text}
            message["content"] = None
            message["tool_calls"] = [{"id": self.call_id, "type": "function", "function": function}]
        return {"index": self.index, "message": message, "logprobs": None, "finish_reason": self.finish_reason}

    def opening(self) -> dict[str, Any]:
        """Return the delta that comes before any token."""
        if self.tool is None:
            return {"role": "assistant", "content": "", "refusal": None}
        return {"role": "assistant", "content": None, "refusal": None}

    def deltas(self) -> Iterator[dict[str, Any]]:
        """Return one delta for each token."""
        if self.tool is None:
            for token in self.passage.tokens:
                yield {"content": token}
            return
        head = {"id": self.call_id, "type": "function", "function": {"name": self.tool.name, "arguments": ""}}
        yield {"tool_calls": [{"index": 0, **head}]}
        for token in self.passage.tokens:
            yield {"tool_calls": [{"index": 0, "function": {"arguments": token}}]}


class ChatRequest(msgspec.Struct):
    """The body of `POST /v1/chat/completions`; fields not named here are ignored."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_completion_tokens: Count | None = None
    max_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return the model's answer."""
        choices = [self._choice(index, fingerprint, writer) for index in range(self.n or 1)]
        output_tokens = sum(len(choice.passage.tokens) for choice in choices)
        input_tokens = count_tokens(text for message in self.messages for text in texts_in(message.content))
        usage = {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
        }
        head = {"id": "chatcmpl-" + fingerprint, "created": CREATED, "model": model}
        tail = {"service_tier": "default", "system_fingerprint": "fp_mock"}
        body, events = b"", tuple[Event, ...]()
        if self.stream:
            events = tuple(self._events(choices, {**head, "object": "chat.completion.chunk", **tail}, usage))
        else:
            messages = [choice.message() for choice in choices]
            body = document({**head, "object": "chat.completion", "choices": messages, "usage": usage, **tail})
        return Answer(
            body=body,
            events=events,
            steps=max(len(choice.passage.tokens) for choice in choices),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            finish_reasons=tuple(choice.finish_reason for choice in choices),
        )

    def _choice(self, index: int, fingerprint: str, writer: Writer) -> Choice:
        limit = self.max_completion_tokens or self.max_tokens
        tool = self._tool()
        if tool is not None:
            passage = writer.write_json(tool.parameters)
        elif self.response_format is not None and self.response_format.type in {"json_object", "json_schema"}:
            passage = writer.write_json((self.response_format.json_schema or {}).get("schema"), limit)
        else:
            passage = writer.write(fingerprint, index, limit)
        return Choice(index, passage, tool, writer.name("call_", fingerprint, index))

    def _tool(self) -> Function | None:
        """Return the tool to call, if any."""
        functions = {tool.function.name: tool.function for tool in self.tools or () if tool.function is not None}
        name = chosen(self.tool_choice, list(functions), answered=self.messages[-1].role == "tool")
        return None if name is None else functions[name]

    def _events(self, choices: list[Choice], head: Mapping[str, Any], usage: Mapping[str, Any]) -> Iterator[Event]:
        counted = self.stream_options is not None and bool(self.stream_options.include_usage)
        extra = {"usage": None} if counted else {}

        def chunk(choice: Choice, delta: Mapping[str, Any], reason: str | None = None) -> dict[str, Any]:
            piece = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": reason}
            return {**head, "choices": [piece], **extra}

        for choice in choices:
            yield data_event(chunk(choice, choice.opening()), "opening")
        for deltas in zip_longest(*(choice.deltas() for choice in choices)):
            step = True
            for choice, delta in zip(choices, deltas, strict=True):
                if delta is not None:
                    yield data_event(chunk(choice, delta), "token", step=step)
                    step = False
        for choice in choices:
            yield data_event(chunk(choice, {}, choice.finish_reason), "finish")
        if counted:
            yield data_event({**head, "choices": [], "usage": usage}, "usage")
        yield DONE
