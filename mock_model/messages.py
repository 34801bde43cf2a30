"""Anthropic's messages: blocks of thinking, text and tool use, whole or built up by named events."""

from base64 import b64encode
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.answer import Answer, Event, Part, document, named_event
from mock_model.draws import stream
from mock_model.errors import InvalidRequest
from mock_model.text import Passage, Writer, count_tokens, texts_in
from mock_model.tool_choice import chosen

Count = Annotated[int, Meta(ge=1)]
SIGNATURE = 48
"""Bytes."""


class Message(msgspec.Struct):
    """One message of the conversation."""

    role: str
    content: str | list[Any] = ""


class Tool(msgspec.Struct):
    """A tool: the caller's own, or one of the server's, which the mock model does not have."""

    name: str
    type: str | None = None
    input_schema: dict[str, Any] | None = None


class Thinking(msgspec.Struct):
    """Whether the model thinks before it answers, and for how many tokens at most."""

    type: str
    budget_tokens: Count | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """One block of an answer.

    Attributes:
        passage: what is written.
        whole: the block in an unstreamed answer.
        empty: the block in the event that begins it.
        delta: the type of the deltas, and the name of their text.
        last: a delta without a token that ends it, or None.
    """

    passage: Passage
    whole: dict[str, Any]
    empty: dict[str, Any]
    delta: tuple[str, str]
    last: dict[str, Any] | None = None

    @property
    def stop_reason(self) -> str:
        """Why the model stops where this is the last block; after a thought only a limit can end an answer."""
        if self.whole["type"] == "tool_use":
            return "tool_use"
        return "max_tokens" if self.passage.cut or self.whole["type"] == "thinking" else "end_turn"

    def deltas(self) -> Iterator[tuple[dict[str, Any], bool]]:
        """Return the deltas, and whether a decoding step comes before each."""
        kind, name = self.delta
        tokens = iter(self.passage.tokens)
        if kind == "input_json_delta":  # begins with an empty one, for which the first token must be known
            yield {"type": kind, name: ""}, True
            yield {"type": kind, name: next(tokens)}, False
        for token in tokens:
            yield {"type": kind, name: token}, True
        if self.last is not None:
            yield self.last, False


class CountRequest(msgspec.Struct):
    """The body of `POST /v1/messages/count_tokens`; fields not named here are ignored."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    system: str | list[Any] | None = None

    @property
    def stream(self) -> bool:
        """A count is never streamed."""
        return False

    @property
    def input_tokens(self) -> int:
        """The tokens of the prompt, counted as those of a chat."""
        return count_tokens(_texts(self.system, self.messages))

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return the count."""
        return Answer(body=document({"input_tokens": self.input_tokens}))


class MessagesRequest(msgspec.Struct):
    """The body of `POST /v1/messages`; fields not named here are ignored, and `max_tokens` may be missing."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    model: str | None = None
    stream: bool | None = None
    system: str | list[Any] | None = None
    max_tokens: Count | None = None
    tools: list[Tool] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return the model's answer."""
        blocks = list(self._blocks(fingerprint, writer))
        reason = blocks[-1].stop_reason
        input_tokens = count_tokens(_texts(self.system, self.messages))
        output_tokens = sum(len(block.passage.tokens) for block in blocks)
        prompt = {"input_tokens": input_tokens, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0}
        head = {"id": "msg_" + fingerprint, "type": "message", "role": "assistant", "model": model}
        end = {"stop_reason": reason, "stop_sequence": None}
        usage = {**prompt, "output_tokens": output_tokens}
        body, events = b"", tuple[Event, ...]()
        if self.stream:
            opened = {"stop_reason": None, "stop_sequence": None, "usage": {**prompt, "output_tokens": 1}}
            start = {"type": "message_start", "message": {**head, "content": [], **opened}}
            finish = {"type": "message_delta", "delta": end, "usage": usage}
            events = tuple(_events(start, blocks, finish))
        else:
            body = document({**head, "content": [block.whole for block in blocks], **end, "usage": usage})
        return Answer(
            body=body,
            events=events,
            steps=output_tokens,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            finish_reasons=(reason,),
        )

    def _blocks(self, fingerprint: str, writer: Writer) -> Iterator[Block]:
        """Return the blocks of the answer: at least one; a thought may leave no tokens for another."""
        tool = self._tool()
        limit = self.max_tokens
        if self.thinking is not None and self.thinking.type != "disabled":
            budget = [count for count in (self.thinking.budget_tokens, limit) if count is not None]
            thought = writer.write(fingerprint, 1, min(budget, default=None))
            yield _thinking(
                thought, b64encode(stream(writer.seed, "signature", fingerprint, length=SIGNATURE)).decode()
            )
            if limit is not None:
                limit -= len(thought.tokens)
                if limit <= 0:
                    return
        if tool is not None:
            yield _tool_use(tool, writer.name("toolu_", fingerprint), writer.write_json(tool.input_schema))
        else:
            passage = writer.write(fingerprint, 0, limit)
            text = {"type": "text", "text": passage.text}
            yield Block(passage, text, {"type": "text", "text": ""}, ("text_delta", "text"))

    def _tool(self) -> Tool | None:
        """Return the tool to call, if any."""
        tools = {tool.name: tool for tool in self.tools or () if tool.type in {None, "custom"}}
        last = self.messages[-1].content
        answered = isinstance(last, list) and any(
            isinstance(block, dict) and block.get("type") == "tool_result" for block in last
        )
        name = chosen(_choice(self.tool_choice), list(tools), answered=answered)
        return None if name is None else tools[name]


def _choice(choice: dict[str, Any] | None) -> str | dict[str, Any] | None:
    """Return a `tool_choice` in OpenAI's words."""
    match choice:
        case None:
            return None
        case {"type": "auto" | "any" | "none" as kind}:
            return str(kind)
        case {"type": "tool", "name": name}:
            return {"type": "function", "name": name}
    raise InvalidRequest("tool_choice.type must be auto, any, tool (with a name) or none", param="tool_choice")


def _thinking(passage: Passage, signature: str) -> Block:
    return Block(
        passage,
        {"type": "thinking", "thinking": passage.text, "signature": signature},
        {"type": "thinking", "thinking": "", "signature": ""},
        ("thinking_delta", "thinking"),
        {"type": "signature_delta", "signature": signature},
    )


def _tool_use(tool: Tool, use_id: str, passage: Passage) -> Block:
    use = {"type": "tool_use", "id": use_id, "name": tool.name}
    given = msgspec.json.decode(passage.text)
    return Block(passage, {**use, "input": given}, {**use, "input": {}}, ("input_json_delta", "partial_json"))


def _events(start: dict[str, Any], blocks: list[Block], finish: dict[str, Any]) -> Iterator[Event]:
    yield named_event(start, "opening")
    for index, block in enumerate(blocks):
        begun: Part = "closing" if index else "opening"
        yield named_event({"type": "content_block_start", "index": index, "content_block": block.empty}, begun)
        if not index:
            yield named_event({"type": "ping"}, "opening")
        for delta, step in block.deltas():
            yield named_event({"type": "content_block_delta", "index": index, "delta": delta}, "token", step=step)
        yield named_event({"type": "content_block_stop", "index": index}, "closing")
    yield named_event(finish, "finish")
    yield named_event({"type": "message_stop"}, "done")


def _texts(system: str | list[Any] | None, messages: list[Message]) -> Iterable[str]:
    return texts_in([system, *(message.content for message in messages)])
