"""The prompts that are sent, and the texts in what comes back."""

from typing import Any

MODEL = "demo-model"
TEXT = "Say something."
CHAT_PATH, COMPLETIONS_PATH = "/v1/chat/completions", "/v1/completions"
RESPONSES_PATH, EMBEDDINGS_PATH, MESSAGES_PATH = "/v1/responses", "/v1/embeddings", "/v1/messages"
LAST_EVENTS = frozenset({"response.completed", "response.incomplete", "message_stop"})
"""The types of the last event of a whole stream of an API without `[DONE]`."""
TYPED_ERRORS = frozenset({RESPONSES_PATH, MESSAGES_PATH})
"""The APIs whose error events have a name and a type."""


def prompt(
    path: str = CHAT_PATH, text: str = TEXT, *, model: str = MODEL, limit: int | None = None, **more: object
) -> dict[str, Any]:
    """Return the body of a request.

    Args:
        path: The API that it is for.
        text: What is asked.
        model: The model that is asked for.
        limit: The most tokens of the answer; None for no limit.
        more: Further fields.
    """
    fields: dict[str, object]
    name = "max_tokens"
    if path == RESPONSES_PATH:
        fields, name = {"input": text}, "max_output_tokens"
    elif path == COMPLETIONS_PATH:
        fields = {"prompt": text}
    elif path == EMBEDDINGS_PATH:
        fields = {"input": text}
    else:
        fields = {"messages": [{"role": "user", "content": text}]}
        if path == MESSAGES_PATH:  # Anthropic's API asks for a limit
            limit = limit or 1024
    limits = {} if limit is None else {name: limit}
    return {"model": model, **fields, **limits, **more}


CHAT = prompt()


def text_of(document: Any) -> str | None:  # noqa: ANN401 - any JSON
    """Return the text of a whole answer, empty for embeddings; None when it is no answer."""
    if document.get("object") == "list" and document.get("data"):
        return ""
    if document.get("type") == "message":
        return "".join(block["text"] for block in document["content"])
    if document.get("object") == "response":
        return "".join(part["text"] for item in document["output"] for part in item["content"])
    for choice in document.get("choices") or ():
        text: str = choice["text"] if "text" in choice else choice["message"]["content"]
        return text
    return None


def text_in(event: Any) -> str:  # noqa: ANN401 - any JSON
    """Return what the document of a stream's event adds to the text."""
    if event.get("type") == "response.output_text.delta":
        return str(event["delta"])
    if event.get("type") == "content_block_delta":
        return str(event["delta"].get("text", ""))
    choices = event.get("choices") or ()
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
