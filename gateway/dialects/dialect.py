"""What the gateway needs to know of an API family: the protocol that each dialect implements."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, ClassVar, Protocol

from msgspec import Struct

from gateway.dialects import form_data, model_field
from gateway.errors import ErrorWords, GatewayError

if TYPE_CHECKING:
    from gateway.record import Record


class Prompt(Struct, eq=False):
    """A checked request. Only fields that something reads are kept: all of them take many times the body's bytes.

    Attributes:
        dialect: the one that read it.
        method: of HTTP.
        path: of the call, with its `/v1`.
        body: its bytes, unchanged.
        boundary: of a form; None for JSON.
        model: the model it names, or None.
        stream: whether it asks for a stream.
        choices: how many choices its answer has.
        asks_usage: whether its stream is asked to end with the usage.
        previous_response_id: of the stored response that it goes on from, or None.
        max_tokens, temperature, top_p: as asked for, or None.
        is_about_response: whether all that it asks for is a stored response: whoever does not know that has no answer.
    """

    is_about_response: ClassVar[bool] = False

    dialect: "Dialect"
    path: str
    body: bytes
    model: str | None
    method: str = "POST"
    boundary: bytes | None = None
    stream: bool = False
    choices: int = 1
    asks_usage: bool = False
    previous_response_id: str | None = None
    max_tokens: float | None = None
    temperature: float | None = None
    top_p: float | None = None

    @property
    def operation(self) -> str | None:
        """The `gen_ai.operation.name` of its span; None where nothing is generated."""
        return self.dialect.operations.get(self.path)

    @property
    def needs_response(self) -> bool:
        """Whether only a replica that knows a stored response can answer it."""
        return self.is_about_response or self.previous_response_id is not None

    def with_model(self, model: str) -> bytes:
        """Return its body with another model, or with one where it names none; every other byte stays."""
        if self.boundary is not None:
            return form_data.with_model(self.body, self.boundary, model)
        return model_field.with_model(self.body, model)

    def content(self) -> Iterable[bytes | memoryview]:
        """Return what stands for it among other requests: its body; of a form all but the boundary."""
        if self.boundary is not None:
            return form_data.without_boundaries(self.body, self.boundary)
        return [self.body]

    def describe_in(self, record: "Record", *, model: str, route: str) -> None:
        """Note what is asked for, except its text: for which model, by which route."""
        record.describe_request(
            operation=self.operation,
            provider=self.dialect.provider,
            model=model,
            route=route,
            stream=self.stream,
            choices=self.choices,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
        )


class Answer(Protocol):
    """What an answer says about itself.

    Attributes:
        response_id, model: as the backend names them, or None.
        input_tokens, output_tokens: as the backend counted them, or None.
    """

    @property
    def response_id(self) -> str | None: ...  # noqa: D102 - see the class

    @property
    def model(self) -> str | None: ...  # noqa: D102

    @property
    def input_tokens(self) -> int | None: ...  # noqa: D102

    @property
    def output_tokens(self) -> int | None: ...  # noqa: D102

    @property
    def finish_reasons(self) -> list[str] | None:
        """Why the answer ended, one for each choice; None where there are no choices."""


class StreamState(Answer, Protocol):
    """How far a stream has come. It is fed the data of each event.

    Attributes:
        content: the first content event has come.
        answer: an event of the answer has come, after any reasoning; True from the start where nobody asks.
        finished: every choice asked for has a finish reason; the answer is whole once the stream has ended.
        ended: the last event of the stream has come: a whole answer, if there was content.
        awaits_usage: the usage was asked for, and has not come.
        error: the backend's error, when an event held one.
        text: the first words, kept only on request.
    """

    content: bool
    answer: bool
    finished: bool
    ended: bool
    error: ErrorWords | None
    text: str | None

    @property
    def awaits_usage(self) -> bool: ...  # noqa: D102 - see the class

    @property
    def done_event(self) -> bytes | None:
        """The event that a complete stream must end with, or None."""

    def abridged(self, data: bytes) -> bytes:
        """Return the data of a large event as far as it is read, in few bytes; nothing of the state is needed for it.

        Raises:
            InvalidResponse: it is not JSON.
        """

    def feed(self, data: bytes) -> None:
        """Take in the data of one event, abridged or not.

        Raises:
            InvalidResponse: it is not JSON.
        """


class Dialect(Protocol):
    """An API family. Nothing outside its file knows a path or a field of it.

    Attributes:
        passes_query: the query of a caller's url goes on to the backend.
        stores: backends may store what they answer, so that further calls name it by its id.
        provider: `gen_ai.provider.name` of its spans, which by the conventions names the API, whoever serves it.
        passes_through: requests may be forms, and good answers pass on as they come, whatever they are.
    """

    passes_query: bool
    stores: bool
    provider: str
    passes_through: bool

    @property
    def operations(self) -> Mapping[str, str]:
        """The paths of the dialect, each with its `gen_ai.operation.name`."""

    def read_request(self, path: str, body: bytes) -> Prompt:
        """Check the body of a request to `path`.

        Raises:
            InvalidJson: it is empty, not JSON in UTF-8, or nested too deep.
            InvalidRequest: it is no object, or a field is wrong; `param` names it.
        """

    def prompt_tokens(self, body: bytes) -> int | None:
        """Return about how many tokens a prompt has, for the limits of a key; None: only what is reported counts."""

    def stream_state(self, prompt: Prompt, *, keep_text: bool, until_answer: bool) -> StreamState:
        """Return the state of the stream that answers `prompt`; `until_answer`: reasoning is told from the answer."""

    def read_answer(self, content_type: str, body: bytes) -> Answer:
        """Check a whole answer.

        Raises:
            InvalidResponse: it is not a good one.
        """

    def error_body(self, error: GatewayError) -> bytes:
        """Return an error of the gateway as JSON."""

    def error_inside(self, words: ErrorWords) -> bytes:
        """Return what a server says in an error inside a good answer as the body of an error answer, in JSON."""

    def error_event(self, error: GatewayError, state: StreamState | None) -> bytes:
        """Return an error after the status went out, as the last event of a stream; `state` as far as it has come."""

    def prompt_messages(self, body: bytes) -> str:
        """Return the texts of a prompt in the form of `gen_ai.input.messages`."""

    def answer_texts(self, body: bytes) -> list[str]:
        """Return the texts of a whole answer, one for each choice."""
