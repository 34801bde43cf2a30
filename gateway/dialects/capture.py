"""What is kept of prompts and answers where `GATEWAY_CAPTURE_CONTENT` is on.

In the form of OpenTelemetry's GenAI conventions (`gen_ai.input.messages`, `gen_ai.output.messages`): a JSON list of
`{"role", "parts": [{"type": "text", "content"}]}`, an answer's with its `finish_reason`. What is no text is told by its
type alone.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from gateway.dialects.json_text import NO_JSON, decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

MAX_TEXT = 16_384
"""Characters kept of the texts of a prompt, and of those of an answer."""
MAX_MESSAGES = 256
MAX_WORD = 64
"""Characters kept of a role or a type."""


class _Room:
    """How many characters may still be kept."""

    def __init__(self) -> None:
        self.left = MAX_TEXT

    def part(self, text: str) -> dict[str, str]:
        kept = text[: self.left]
        self.left -= len(kept)
        return {"type": "text", "content": kept}


def prompt_messages(body: bytes) -> str:
    """The messages of a checked request: of a chat, a completion's prompts, an embedding's or a response's input."""
    fields = _fields(body)
    source = fields.get("messages") or fields.get("prompt") or fields.get("input") or []
    messages = source if isinstance(source, list) and any(isinstance(item, dict | str) for item in source) else [source]
    room = _Room()
    kept = [_message(item, room) for item in messages[:MAX_MESSAGES] if room.left > 0]
    return msgspec.json.encode(kept).decode()


def answer_messages(texts: "Iterable[str]", finish_reasons: "Sequence[str] | None") -> str:
    """The choices of an answer."""
    room = _Room()
    reasons = list(finish_reasons or ())
    kept = []
    for number, text in enumerate(texts):
        if number >= MAX_MESSAGES or room.left <= 0:
            break
        message = {"role": "assistant", "parts": [room.part(text)]}
        if number < len(reasons):
            message["finish_reason"] = reasons[number][:MAX_WORD]
        kept.append(message)
    return msgspec.json.encode(kept).decode()


def answer_texts(body: bytes) -> list[str]:
    """The texts of an unstreamed answer, one for each choice; a response's as one."""
    fields = _fields(body)
    texts = []
    for choice in _dicts(fields.get("choices")):
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        texts.append(text if isinstance(text, str) else "")
    said = [
        part["text"]
        for item in _dicts(fields.get("output"))
        for part in _dicts(item.get("content"))
        if isinstance(part.get("text"), str)
    ]
    return texts or ["".join(said)] * bool(said)


def _fields(body: bytes) -> dict[str, Any]:
    """Empty for what a full decoding does not take, such as an integer of a thousand digits that nobody reads."""
    try:
        document = decode(body)
    except NO_JSON:
        return {}
    return document if isinstance(document, dict) else {}


def _message(item: object, room: _Room) -> dict[str, Any]:
    if not isinstance(item, dict):
        return {"role": "user", "parts": _parts(item, room)}
    role = item.get("role")
    return {"role": role[:MAX_WORD] if isinstance(role, str) else "user", "parts": _parts(item.get("content"), room)}


def _parts(content: object, room: _Room) -> list[dict[str, str]]:
    if isinstance(content, str):
        return [room.part(content)]
    if not isinstance(content, list):
        return []
    parts = []
    for item in content[:MAX_MESSAGES]:
        if room.left <= 0:
            break
        text = item.get("text") if isinstance(item, dict) else item
        if isinstance(text, str):
            parts.append(room.part(text))
        elif isinstance(item, dict):
            kind = item.get("type")
            parts.append({"type": kind[:MAX_WORD] if isinstance(kind, str) else "unknown"})
    return parts


def _dicts(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
