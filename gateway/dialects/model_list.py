"""The models that a server lists, in whatever form.

Most servers have OpenAI's, with `data`: vLLM, Ollama, LiteLLM and, as far as it matters here, Anthropic. llama.cpp has
`models` beside it; Together answers with the list itself; Cohere has `models` with names in place of ids.
"""

import msgspec

from gateway.dialects.answer_fields import NULL
from gateway.dialects.json_text import BYTE_ORDER_MARK, NO_JSON, decode_with, has_values, leniently
from gateway.dialects.model_field import MAX_MODEL
from gateway.errors import InvalidResponse

MODELS = "/v1/models"
MAX_MODELS = 2_000
"""Models that are looked at in one list: the first ones."""
MAX_VALUES = 100_000
"""In a list, all levels counted: fifty for each model. Built, some more would take many times their bytes."""


class _List(msgspec.Struct):
    data: msgspec.Raw = NULL
    models: msgspec.Raw = NULL


class _Entry(msgspec.Struct):
    id: str | None = None
    name: str | None = None


_list = msgspec.json.Decoder(_List)
_entries = msgspec.json.Decoder(list[msgspec.Raw])
_entry = msgspec.json.Decoder(_Entry)


def names_in(body: bytes) -> tuple[str, ...]:
    """Return the names in a list of models, in its order, each once; within bounds, since a server may list anything.

    Raises:
        InvalidResponse: it is no list of models, or too long a one.
    """
    text = body.removeprefix(BYTE_ORDER_MARK).strip()
    if has_values(text, MAX_VALUES):
        raise InvalidResponse(f"The list of models has more than {MAX_VALUES:,} values.")
    try:
        entries = leniently(_entries_of, text)
    except NO_JSON:
        raise InvalidResponse("The answer is not a list of models in JSON.") from None
    names = dict.fromkeys(name for entry in entries[:MAX_MODELS] if (name := _name_of(entry)) is not None)
    if entries and not names:
        raise InvalidResponse("The list has no model with a name.")
    return tuple(names)


def _entries_of(text: bytes) -> list[msgspec.Raw]:
    if not text.startswith(b"["):
        document = decode_with(_list.decode, text)
        text = bytes(document.data if document.data is not NULL else document.models)
    return decode_with(_entries.decode, text)


def _name_of(entry: msgspec.Raw) -> str | None:
    """Return the name of a model; None for what cannot be asked for, such as LiteLLM's `openai/*`."""
    try:
        model = decode_with(_entry.decode, bytes(entry))
    except NO_JSON:
        return None
    name = model.id or model.name or ""
    return name if name.strip() and len(name) <= MAX_MODEL and name.isprintable() and "*" not in name else None
