"""OpenAI's chat completions, completions and embeddings."""

import re
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from gateway.dialects.answer_fields import read_whole
from gateway.dialects.captured_text import fields_of, input_messages, objects_in
from gateway.dialects.dialect import Prompt, StreamState
from gateway.dialects.json_text import has_many_objects, without_escapes
from gateway.dialects.openai import errors
from gateway.dialects.openai.choices import AnswerFields, ChoicesState, WholeAnswer, decode_whole_answer
from gateway.dialects.prompt_tokens import tokens_of
from gateway.dialects.request_fields import (
    Count,
    Flag,
    ListOfMessages,
    ModelName,
    Number,
    Tokens,
    check_messages,
    check_text_or_list,
    read_fields,
)
from gateway.errors import ErrorWords, GatewayError
from gateway.pieces import BLOCK

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"


class StreamOptions(Struct):
    """The part of `stream_options` that is read."""

    include_usage: Flag | None = None


class _GenerationRequest(Struct, kw_only=True):
    model: ModelName | None = None
    stream: Flag | None = None
    stream_options: StreamOptions | None = None
    n: Count | None = None
    max_tokens: Tokens | None = None
    temperature: Number | None = None
    top_p: Number | None = None


class ChatRequest(_GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: ListOfMessages
    max_completion_tokens: Tokens | None = None


class ManyMessages(_GenerationRequest, kw_only=True):
    """The same with more small messages than are looked at."""

    messages: msgspec.Raw
    max_completion_tokens: Tokens | None = None


class CompletionsRequest(_GenerationRequest, kw_only=True):
    """`POST /v1/completions`."""

    prompt: msgspec.Raw


class EmbeddingsRequest(Struct):
    """`POST /v1/embeddings`."""

    input: msgspec.Raw
    model: ModelName | None = None


_chat = msgspec.json.Decoder(ChatRequest)
_many_messages = msgspec.json.Decoder(ManyMessages)
_completions = msgspec.json.Decoder(CompletionsRequest)
_embeddings = msgspec.json.Decoder(EmbeddingsRequest)
_SEVERAL = re.compile(rb'\s*\[\s*(["\[{])')
"""The beginning of a list of prompts; a list of numbers would be the tokens of one prompt."""


class OpenAIChat:
    """The dialect of `/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`."""

    passes_query = False
    stores = False
    provider = "openai"
    passes_through = False
    prompt_tokens = staticmethod(tokens_of)
    operations: Mapping[str, str] = {CHAT: "chat", COMPLETIONS: "text_completion", EMBEDDINGS: "embeddings"}

    def read_request(self, path: str, body: bytes) -> Prompt:
        """Check the body of a request."""
        if path == EMBEDDINGS:
            embeddings = read_fields(_embeddings, body)
            check_text_or_list("input", embeddings.input, may_be_null=False)
            return Prompt(self, path, body, model=embeddings.model)
        fields: ChatRequest | ManyMessages | CompletionsRequest
        if path == CHAT:
            fields = _read_chat(body)
            choices, max_tokens = int(fields.n or 1), fields.max_tokens or fields.max_completion_tokens
        else:
            fields = read_fields(_completions, body)
            choices, max_tokens = _choices(fields), fields.max_tokens
        return Prompt(
            self,
            path,
            body,
            model=fields.model,
            stream=bool(fields.stream),
            choices=choices,
            asks_usage=bool(fields.stream_options and fields.stream_options.include_usage),
            max_tokens=max_tokens,
            temperature=fields.temperature,
            top_p=fields.top_p,
        )

    def stream_state(self, prompt: Prompt, *, keep_text: bool, until_answer: bool) -> StreamState:
        """Return the state of a stream of choices."""
        return ChoicesState(
            prompt.choices, asks_usage=prompt.asks_usage, keep_text=keep_text, until_answer=until_answer
        )

    def read_answer(self, content_type: str, body: bytes) -> AnswerFields:
        """Check a whole answer."""
        return read_whole(content_type, body, decode_whole_answer, WholeAnswer)

    def error_body(self, error: GatewayError) -> bytes:
        """Return OpenAI's envelope."""
        return errors.error_body(error)

    def error_inside(self, words: ErrorWords) -> bytes:
        """Return what a server says in an error inside a good answer, in the envelope."""
        return errors.error_inside(words)

    def error_event(self, error: GatewayError, state: StreamState | None) -> bytes:  # noqa: ARG002
        """Return an event with the envelope."""
        return b"data: " + errors.encode({"error": errors.envelope_with_own_words(error)}) + b"\n\n"

    def prompt_messages(self, body: bytes) -> str:
        """Return the texts of messages, prompts or inputs."""
        fields = fields_of(body)
        return input_messages(fields.get("messages") or fields.get("prompt") or fields.get("input") or [])

    def answer_texts(self, body: bytes) -> list[str]:
        """Return the text of each choice."""
        texts = []
        for choice in objects_in(fields_of(body).get("choices")):
            message = choice.get("message")
            text = message.get("content") if isinstance(message, dict) else choice.get("text")
            texts.append(text if isinstance(text, str) else "")
        return texts


def _read_chat(body: bytes) -> ChatRequest | ManyMessages:
    if len(body) <= BLOCK or not has_many_objects(body):
        return read_fields(_chat, body)
    fields = read_fields(_many_messages, body)
    check_messages(fields.messages)
    return fields


def _choices(fields: CompletionsRequest) -> int:
    """Return the number of choices: `n` for each prompt."""
    check_text_or_list("prompt", fields.prompt, may_be_null=True)
    several = _SEVERAL.match(fields.prompt)
    return int(fields.n or 1) * (_prompts(bytes(fields.prompt), several[1]) if several else 1)


def _prompts(prompts: bytes, first: bytes) -> int:
    """Return the number of prompts in a list, of which the first one begins with `first`; nothing is built for it."""
    if first == b'"':
        return without_escapes(prompts).count(b'"') // 2
    return prompts.count(first) - (first == b"[")  # lists of tokens, in a list
