"""Responses: a message or a function call as an item, or the named events that build it up."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.answer import CREATED, Answer, Event, Part, document, named_event
from mock_model.text import Passage, Writer, count_tokens, texts_in
from mock_model.tool_choice import chosen


class TextFormat(msgspec.Struct):
    """The form a text must have."""

    type: str
    schema: dict[str, Any] | None = None


class TextOptions(msgspec.Struct):
    """What a caller wants of the text."""

    format: TextFormat | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """What the model produces: a text, or the arguments of a function."""

    id: str
    call_id: str
    passage: Passage
    function: str | None

    def value(self, status: str, text: str | None = None) -> dict[str, Any]:
        """Return the item in a response; its text is left out while it is being written (None)."""
        if self.function is not None:
            call = {"call_id": self.call_id, "name": self.function, "arguments": text or ""}
            return {"id": self.id, "type": "function_call", "status": status, **call}
        content = [] if text is None else [self.part(text)]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    @staticmethod
    def part(text: str) -> dict[str, Any]:
        """Return a text as a part of the content."""
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


@dataclass(frozen=True, slots=True)
class Response:
    """A response from its beginning to its end.

    Attributes:
        opened: as it is told at once: in progress or, in the background, queued.
        working: as it is while the model works on it.
        closed: as it is in the end.
        answer: the whole response, or its stream.
    """

    opened: dict[str, Any]
    working: dict[str, Any]
    closed: dict[str, Any]
    answer: Answer


class ResponseRequest(msgspec.Struct):
    """The body of `POST /v1/responses`; fields not named here are ignored."""

    input: str | list[Any] | None = None
    model: str | None = None
    stream: bool | None = None
    instructions: str | list[Any] | None = None
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    text: TextOptions | None = None
    metadata: dict[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = None

    background: bool | None = None
    store: bool | None = None

    def respond(self, response_id: str, model: str, fingerprint: str, writer: Writer) -> Response:
        """Return the response with this id."""
        item = self._item(fingerprint, writer)
        cut = item.function is None and item.passage.cut
        input_tokens = count_tokens(texts_in([self.instructions, self.input]))
        output_tokens = len(item.passage.tokens)
        usage = {
            "input_tokens": input_tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": input_tokens + output_tokens,
        }
        working = self._response(response_id, model)
        opened = {**working, "status": "queued"} if self.background else working
        status = "incomplete" if cut else "completed"
        closed = {
            **working,
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [item.value(status, item.passage.text)],
            "usage": usage,
        }
        answer = Answer(
            body=b"" if self.stream else document(closed),
            events=tuple(self._events(item, opened, working, closed)) if self.stream else (),
            steps=output_tokens,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            finish_reasons=("length" if cut else "tool_calls" if item.function is not None else "stop",),
        )
        return Response(opened, working, closed, answer)

    def _item(self, fingerprint: str, writer: Writer) -> Item:
        tool = self._tool()
        call_id = writer.name("call_", fingerprint)
        if tool is not None:
            passage = writer.write_json(tool.get("parameters"))
            return Item(writer.name("fc_", fingerprint), call_id, passage, str(tool.get("name")))
        form = self.text.format if self.text is not None else None
        if form is not None and form.type in {"json_object", "json_schema"}:
            passage = writer.write_json(form.schema, self.max_output_tokens)
        else:
            passage = writer.write(fingerprint, 0, self.max_output_tokens)
        return Item(writer.name("msg_", fingerprint), call_id, passage, None)

    def _tool(self) -> dict[str, Any] | None:
        """Return the function to call, if any."""
        functions = {str(tool.get("name")): tool for tool in self.tools or () if tool.get("type") == "function"}
        last = self.input[-1] if isinstance(self.input, list) and self.input else None
        answered = isinstance(last, dict) and last.get("type") == "function_call_output"
        name = chosen(self.tool_choice, list(functions), answered=answered)
        return None if name is None else functions[name]

    def _response(self, response_id: str, model: str) -> dict[str, Any]:
        return {
            "id": response_id,
            "object": "response",
            "created_at": CREATED,
            "status": "in_progress",
            "background": bool(self.background),
            "store": self.store is not False,
            "error": None,
            "incomplete_details": None,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "model": model,
            "output": [],
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def _events(
        self, item: Item, opened: dict[str, Any], working: dict[str, Any], closed: dict[str, Any]
    ) -> Iterator[Event]:
        number = 0

        def event(kind: str, stage: Part, fields: dict[str, Any]) -> Event:
            nonlocal number
            payload = {"type": kind, "sequence_number": number, **fields}
            number += 1
            return named_event(payload, stage, step=stage == "token")

        text, status = item.passage.text, closed["status"]
        place: dict[str, Any] = {"item_id": item.id, "output_index": 0}
        yield event("response.created", "opening", {"response": opened})
        if self.background:
            yield event("response.queued", "opening", {"response": opened})
        yield event("response.in_progress", "opening", {"response": working})
        added = {"output_index": 0, "item": item.value("in_progress")}
        yield event("response.output_item.added", "opening", added)
        if item.function is not None:
            for token in item.passage.tokens:
                yield event("response.function_call_arguments.delta", "token", {**place, "delta": token})
            done = {**place, "name": item.function, "arguments": text}
            yield event("response.function_call_arguments.done", "closing", done)
        else:
            place["content_index"] = 0
            yield event("response.content_part.added", "opening", {**place, "part": item.part("")})
            for token in item.passage.tokens:
                yield event("response.output_text.delta", "token", {**place, "delta": token, "logprobs": []})
            yield event("response.output_text.done", "closing", {**place, "text": text, "logprobs": []})
            yield event("response.content_part.done", "closing", {**place, "part": item.part(text)})
        yield event("response.output_item.done", "closing", {"output_index": 0, "item": item.value(status, text)})
        yield event(f"response.{status}", "finish", {"response": closed})
