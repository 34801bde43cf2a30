"""What is kept of prompts and answers where `GATEWAY_CAPTURE_CONTENT` is on.

In the form of OpenTelemetry's GenAI conventions (`gen_ai.input.messages`, `gen_ai.output.messages`): a JSON list of
`{"role", "parts": [{"type": "text", "content"}]}`, for answers with `finish_reason`. Of parts that are not text only
the type is kept.
"""

from typing import TYPE_CHECKING, Any

import msgspec

from gateway.dialects.json_text import BYTE_ORDER_MARK, NO_JSON, decode, has_many_values
from gateway.pieces import BLOCK

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gateway.dialects.dialect import Dialect

MAX_TEXT = 16_384
"""Characters kept of the texts of a prompt, and of those of an answer."""
MAX_MESSAGES = 256
MAX_WORD = 64
"""Characters kept of a role or a type."""


class _Room:
    """How many characters, and how many parts, may still be kept."""

    def __init__(self) -> None:
        self.left = MAX_TEXT
        self.parts_left = MAX_MESSAGES

    def part(self, text: str) -> dict[str, str]:
        kept = text[: self.left]
        self.left -= len(kept)
        return {"type": "text", "content": kept}


def input_messages(source: object) -> str:
    """Return the messages of a prompt: a list of messages or texts, or one text."""
    messages = source if isinstance(source, list) and any(isinstance(item, dict | str) for item in source) else [source]
    room = _Room()
    kept = [_message(item, room) for item in messages[:MAX_MESSAGES] if room.left > 0]
    return msgspec.json.encode(kept).decode()


def output_messages(texts: "Iterable[str]", finish_reasons: "Sequence[str] | None") -> str:
    """Return the choices of an answer."""
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


def texts_of(dialect: "Dialect", body: bytes) -> list[str]:
    """Return the texts of a whole answer of any size, as far as they are kept."""
    return [text[:MAX_TEXT] for text in dialect.answer_texts(body)[:MAX_MESSAGES]]


def fields_of(body: bytes) -> dict[str, Any]:
    """Return a JSON object; empty for what is not kept.

    That is what a full decoding rejects, such as an integer of a thousand digits, and a large body of many small
    values: they would take many times its bytes, and people write texts.
    """
    if len(body) > BLOCK and has_many_values(body):
        return {}
    try:
        document = decode(body.removeprefix(BYTE_ORDER_MARK))
    except NO_JSON:
        return {}
    return document if isinstance(document, dict) else {}


def objects_in(value: object) -> list[dict[str, Any]]:
    """Return the objects in a list; none for anything else."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


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
    for item in content:
        if room.left <= 0 or room.parts_left <= 0:
            break
        room.parts_left -= 1
        text = item.get("text") if isinstance(item, dict) else item
        if isinstance(text, str):
            parts.append(room.part(text))
        elif isinstance(item, dict):
            kind = item.get("type")
            parts.append({"type": kind[:MAX_WORD] if isinstance(kind, str) else "unknown"})
    return parts
