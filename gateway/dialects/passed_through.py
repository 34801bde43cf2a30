"""Calls that are passed through: of a request only the `model` is read, of a good answer at most its `usage`."""

from collections.abc import Mapping

import msgspec
from msgspec import Struct

from gateway.dialects import form_data
from gateway.dialects.dialect import Answer, Dialect, Prompt, StreamState
from gateway.dialects.request_fields import ModelName, read_fields
from gateway.errors import ErrorWords, GatewayError

OPERATIONS = {
    "/v1/audio/transcriptions": "transcription",
    "/v1/audio/translations": "translation",
    "/v1/audio/speech": "speech",
    "/v1/images/generations": "image_generation",
    "/v1/images/edits": "image_edit",
    "/v1/moderations": "moderation",
    "/v1/rerank": "rerank",
    "/v1/score": "score",
    "/tokenize": "tokenize",
    "/detokenize": "detokenize",
}
"""The paths, each with a name of our own for its operation: OpenTelemetry's conventions have none for these."""
COUNT_TOKENS = {"/v1/messages/count_tokens": "count_tokens"}
"""The one of Anthropic's API."""


class PassedRequest(Struct):
    """The part of a JSON body that is read."""

    model: ModelName | None = None


_request = msgspec.json.Decoder(PassedRequest)


class PassedThrough:
    """The dialect of calls that are passed through.

    Args:
        operations: its paths, each with its `gen_ai.operation.name`.
        family: the dialect in whose form its errors are.
    """

    passes_query = True
    stores = False
    passes_through = True

    def __init__(self, operations: Mapping[str, str], family: Dialect) -> None:
        self.operations = operations
        self.provider = family.provider
        self._family = family

    def read_request(self, path: str, body: bytes) -> Prompt:
        """Read the model of a JSON body."""
        return Prompt(self, path, body, model=read_fields(_request, body).model)

    def prompt_tokens(self, body: bytes) -> None:
        """Reserve nothing: only usage that is reported counts."""

    def stream_state(self, prompt: Prompt, *, keep_text: bool, until_answer: bool) -> StreamState:
        """Return the state of a stream of the family: one that is passed through has none."""
        return self._family.stream_state(prompt, keep_text=keep_text, until_answer=until_answer)

    def read_answer(self, content_type: str, body: bytes) -> Answer:
        """Check a whole answer of the family: one that is passed through is not checked."""
        return self._family.read_answer(content_type, body)

    def error_inside(self, words: ErrorWords) -> bytes:
        """Return an error inside a good answer in the form of the family: of one that is passed through nobody asks."""
        return self._family.error_inside(words)

    def error_body(self, error: GatewayError) -> bytes:
        """Return an error in the form of the family."""
        return self._family.error_body(error)

    def error_event(self, error: GatewayError, state: StreamState | None) -> bytes:  # noqa: ARG002
        """Return nothing: the body may be of any type, and only ends improperly."""
        return b""

    def prompt_messages(self, body: bytes) -> str:
        """Return the texts of a prompt of the family: nothing is captured of what is passed through."""
        return self._family.prompt_messages(body)

    def answer_texts(self, body: bytes) -> list[str]:
        """Return the texts of a whole answer of the family: one that is passed through is not read."""
        return self._family.answer_texts(body)


def read_form(dialect: Dialect, path: str, body: bytes, boundary: bytes) -> Prompt:
    """Read the model of a form, in the place of `read_request`. Raises: InvalidRequest."""
    return Prompt(dialect, path, body, model=form_data.model_in(body, boundary), boundary=boundary)
