"""Tokens for a text and back, as vLLM answers at its root: here each character is a token, known by its number."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.answer import Answer, document
from mock_model.errors import InvalidRequest
from mock_model.text import Writer, texts_in

MAX_MODEL_LEN = 131_072
_SURROGATES = range(0xD800, 0xE000)


class TokenizeRequest(msgspec.Struct):
    """The body of `POST /tokenize`; fields not named here are ignored."""

    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    model: str | None = None
    return_token_strs: bool | None = None

    @property
    def stream(self) -> bool:
        """Tokens are never streamed."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return the tokens of a prompt, or of what messages say."""
        if self.prompt is None and self.messages is None:
            raise InvalidRequest("prompt or messages must be given", param="prompt")
        text = "".join(texts_in(self.messages)) if self.prompt is None else self.prompt
        tokens = [ord(character) for character in text]
        head = {"count": len(tokens), "max_model_len": MAX_MODEL_LEN, "tokens": tokens}
        return Answer(body=document({**head, "token_strs": list(text) if self.return_token_strs else None}))


class DetokenizeRequest(msgspec.Struct):
    """The body of `POST /detokenize`; fields not named here are ignored."""

    tokens: list[Annotated[int, Meta(ge=0, le=0x10FFFF)]]
    model: str | None = None

    @property
    def stream(self) -> bool:
        """Texts of tokens are never streamed."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return the text."""
        if any(token in _SURROGATES for token in self.tokens):
            raise InvalidRequest("tokens: there is no such token", param="tokens")
        return Answer(body=document({"prompt": "".join(map(chr, self.tokens))}))
