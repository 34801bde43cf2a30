"""What servers say in their errors, in whatever form, and what it means. Words are compared in lower case.

The forms and words are those of OpenAI, Azure, vLLM, SGLang, llama.cpp, Ollama, TGI, Anthropic, Gemini and OpenRouter.
"""

import re
from enum import Enum
from typing import Any

from gateway.errors import ERROR_STATUSES, ErrorWords

MAX_WORDS = 4096
"""Characters of a message that are searched."""


class Meaning(Enum):
    """What an error says about the request."""

    CONTEXT = "the prompt is too long for the model"
    QUOTA = "the account's quota is spent"
    MODEL = "the server does not know the model"
    PATH = "the server does not have the path"
    RESPONSE = "the server does not know the stored response"
    CONTENT = "the content is refused"
    RATE_LIMIT = "too many requests"
    OVERLOADED = "the server has too much to do"
    REQUEST = "the request is wrong"
    KEY = "the key is wrong"


NAMES = {
    "context_length_exceeded": Meaning.CONTEXT,
    "exceed_context_size_error": Meaning.CONTEXT,
    "request_too_large": Meaning.CONTEXT,
    "insufficient_quota": Meaning.QUOTA,
    "credit_balance_exhausted": Meaning.QUOTA,
    "billing_hard_limit_reached": Meaning.QUOTA,
    "billing_error": Meaning.QUOTA,
    "model_not_found": Meaning.MODEL,
    "deploymentnotfound": Meaning.MODEL,
    "previous_response_not_found": Meaning.RESPONSE,
    "content_filter": Meaning.CONTENT,
    "content_policy_violation": Meaning.CONTENT,
    "responsibleaipolicyviolation": Meaning.CONTENT,
}
"""What the words in `code`, `type`, `status` or `error_type` mean by themselves."""
STATUS_NAMES = {
    "rate_limit_exceeded": Meaning.RATE_LIMIT,
    "rate_limit_error": Meaning.RATE_LIMIT,
    "resource_exhausted": Meaning.RATE_LIMIT,
    "too_many_requests": Meaning.RATE_LIMIT,
    "toomanyrequests": Meaning.RATE_LIMIT,
    "overloaded": Meaning.OVERLOADED,
    "overloaded_error": Meaning.OVERLOADED,
    "unavailable": Meaning.OVERLOADED,
    "unavailable_error": Meaning.OVERLOADED,
    "service_unavailable": Meaning.OVERLOADED,
    "engine_overloaded": Meaning.OVERLOADED,
    "invalid_request_error": Meaning.REQUEST,
    "invalid_request": Meaning.REQUEST,
    "invalid_argument": Meaning.REQUEST,
    "invalid_prompt": Meaning.REQUEST,
    "badrequesterror": Meaning.REQUEST,
    "bad_request": Meaning.REQUEST,
    "validation": Meaning.REQUEST,
    "validation_error": Meaning.REQUEST,
    "authentication_error": Meaning.KEY,
    "invalid_api_key": Meaning.KEY,
    "permission_error": Meaning.KEY,
}
"""What they mean where no HTTP status says it."""
CONTEXT_PHRASES = (
    "maximum context length",
    "context length",
    "context size",
    "exceeds the context",
    "context window",
    "prompt is too long",
    "exceeds the maximum number of tokens",
)
NO_RESPONSE = re.compile(
    r"\W*(?:(?:the|previous|stored|requested) )*response\b(?: with(?: the)? id)?:? ?\S* ?(?:was |is )?"
    r"(?:not found|does not exist|doesn't exist)|\W*no response (?:was )?found"
)
"""At the beginning of a message: further on it can be about anything."""
MODEL_PHRASES = ("no such model", "unknown model", "no endpoints found", "not found, try pulling")
NO_MODEL = re.compile(
    r"\b(?:models?|deployment)\b.*?(?:does not exist|doesn't exist|not found|not available)", re.DOTALL
)
"""In this order: "not found" before "model" can be about anything."""
WRONG_MODEL_PHRASES = ("not a valid model", "invalid model name")
CONTENT_PHRASES = ("content policy", "content management policy", "moderation", "flagged", "safety system")
QUOTA_PHRASES = ("per day", "daily", "plan", "billing", "credit")
RATE_PHRASES = ("rate limit", "rate-limit", "ratelimit", "too many requests")
OVERLOADED_PHRASES = ("overloaded", "over capacity", "at capacity", "temporarily unavailable", "loading model")
REQUEST_PHRASES = ("bad request", "invalid request")
STATUS_OF = {
    Meaning.RATE_LIMIT: 429,
    Meaning.QUOTA: 429,
    Meaning.CONTEXT: 400,
    Meaning.CONTENT: 400,
    Meaning.REQUEST: 400,
    Meaning.MODEL: 404,
    Meaning.PATH: 404,
    Meaning.RESPONSE: 404,
    Meaning.OVERLOADED: 503,
    Meaning.KEY: 401,
}
TOO_LONG = frozenset({400, 413, 422})
"""Statuses under which servers say that a prompt is too long."""


def meaning_of(words: ErrorWords, status: int) -> Meaning | None:
    """Return what an error says about the request, under an HTTP status."""
    for name in words.names:
        if name in NAMES and _may_mean(NAMES[name], status):
            return NAMES[name]
    text = words.message[:MAX_WORDS].lower()
    found: Meaning | None = None
    if status == 402 or (status == 429 and "quota" in text and _any_of(QUOTA_PHRASES, text)):  # noqa: PLR2004
        found = Meaning.QUOTA
    elif status in {400, 403} and _any_of(CONTENT_PHRASES, text):
        found = Meaning.CONTENT
    elif status in TOO_LONG and (_any_of(CONTEXT_PHRASES, text) or _says_less_tokens(text)):
        found = Meaning.CONTEXT
    elif status in {400, 404} and NO_RESPONSE.match(text) is not None:
        found = Meaning.RESPONSE
    elif _says_no_model(words, status, text):
        found = Meaning.MODEL
    elif status == 404 and "not_found_error" in words.names and "response" not in text:  # noqa: PLR2004
        found = Meaning.PATH
    return found


def status_of(words: ErrorWords) -> int:
    """Return the HTTP status that an error inside a good answer has: its number, else what its words say, else 502."""
    if words.number is not None:
        return words.number
    text = words.message[:MAX_WORDS].lower()
    for name in words.names:
        meaning = NAMES.get(name) or STATUS_NAMES.get(name)
        if meaning is not None:
            return STATUS_OF[meaning]
    for phrases, meaning in (
        (RATE_PHRASES, Meaning.RATE_LIMIT),
        (CONTEXT_PHRASES, Meaning.CONTEXT),
        (CONTENT_PHRASES, Meaning.CONTENT),
        (OVERLOADED_PHRASES, Meaning.OVERLOADED),
        (REQUEST_PHRASES, Meaning.REQUEST),
    ):
        if _any_of(phrases, text):
            return STATUS_OF[meaning]
    if "not_found_error" in words.names or _any_of(MODEL_PHRASES, text) or NO_MODEL.search(text) is not None:
        return STATUS_OF[Meaning.MODEL]
    return 400 if _says_less_tokens(text) else 502


def _says_no_model(words: ErrorWords, status: int, text: str) -> bool:
    if status == 404:  # noqa: PLR2004
        if "not_found_error" in words.names and "model" in text and "response" not in text:
            return True
        return _any_of(MODEL_PHRASES, text) or NO_MODEL.search(text) is not None
    return status == 400 and _any_of(WRONG_MODEL_PHRASES, text)  # noqa: PLR2004


def _may_mean(meaning: Meaning, status: int) -> bool:
    """Return whether a name has its meaning under this status: a server that fails says nothing of the request."""
    return status < 500 and not (meaning is Meaning.MODEL and status not in {400, 404})  # noqa: PLR2004


def read_words(document: object) -> ErrorWords | None:
    """Return the error in a JSON document of any form; None when there is none."""
    if isinstance(document, list):
        document = document[0] if document else None
    if isinstance(document, str):
        return _words(document, document, ())
    if not isinstance(document, dict):
        return None
    error = document.get("error")
    if error is not None and error is not False:
        return words_of(error, document)
    if isinstance(document.get("message"), str):  # vLLM's older form, SGLang's
        return words_of(document, {})
    detail = document.get("detail")  # FastAPI's
    return _words(document, detail, ()) if isinstance(detail, str) else None


def words_of(error: object, around: dict[str, Any]) -> ErrorWords:
    """Return the words of an error, and of the document around it."""
    outer = (around.get("error_type"), around.get("code"), around.get("type"), around.get("status"))
    if not isinstance(error, dict):
        return _words(error, error, outer)
    inner = (error.get("code"), error.get("type"), error.get("status"), error.get("status_code"))
    message = error.get("message") or error.get("detail") or error.get("error")
    return _words(error, message, (*inner, *outer))


def _words(document: object, message: object, names: tuple[object, ...]) -> ErrorWords:
    numbers = [number for name in names if (number := _number(name)) is not None]
    return ErrorWords(
        document=document,
        message=message if isinstance(message, str) else "",
        names=frozenset(name[:MAX_WORDS].lower() for name in names if isinstance(name, str)),
        number=numbers[0] if numbers else None,
    )


def _number(name: object) -> int | None:
    if isinstance(name, str) and len(name) == 3 and name.isascii() and name.isdigit():  # noqa: PLR2004
        name = int(name)
    if isinstance(name, float) and name.is_integer():
        name = int(name)
    return name if isinstance(name, int) and name in ERROR_STATUSES else None


def _any_of(phrases: tuple[str, ...], text: str) -> bool:
    return any(phrase in text for phrase in phrases)


def _says_less_tokens(text: str) -> bool:
    """Return whether it is TGI's "must have less than 1000 tokens"."""
    return "must have less than" in text and "tokens" in text
