"""OpenAI's stored responses: to read, stream again, delete or cancel one by its id."""

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl, quote

import msgspec

from gateway.dialects.answer_fields import NULL, read_whole
from gateway.dialects.dialect import Prompt, StreamState
from gateway.dialects.openai.responses import RESPONSES, OpenAIResponses, ResponseState, WholeResponse
from gateway.errors import InvalidRequest
from gateway.policy.response_homes import MAX_ID

RESPONSE = RESPONSES + "/{id}"
CANCEL = RESPONSE + "/cancel"
TRUE = frozenset({"true", "1", "yes", "on", "t", "y"})
"""What servers take for true in a query (pydantic's words, in lower case)."""
IN_A_SEGMENT = "!$&'()*+,;=:@~"
"""Characters that may stand for themselves in a segment of a path, beside letters, digits and `-._` (RFC 3986, 3.3)."""

_ID = re.compile(rf"(?!\.+\Z)[!-~]{{1,{MAX_ID}}}")
_OF_URLS = frozenset("/\\%?#")


class _Stored(WholeResponse):
    """A response that is read, deleted or cancelled: its tokens were counted when it was made."""

    @property
    def is_response(self) -> bool:
        """Whether it is one; that may have failed, and then says why."""
        return self.object == "response"

    @property
    def input_tokens(self) -> None:
        """None."""

    @property
    def output_tokens(self) -> None:
        """None."""


_decode_stored = msgspec.json.Decoder(_Stored).decode


class _StoredState(ResponseState):
    """The stream of a stored response, from wherever it goes on: its tokens were counted when it was made."""

    __slots__ = ()

    def __init__(self, after: int, *, keep_text: bool, until_answer: bool) -> None:
        super().__init__(keep_text=keep_text, until_answer=until_answer)
        self.sequence_number = after + 1
        self.finished = after >= 0  # nothing need be left of it

    def feed(self, data: bytes) -> None:
        """Take in the data of one event. Raises: InvalidResponse."""
        self.finished = False
        super().feed(data)
        self.input_tokens = self.output_tokens = None

    def _end(self, kind: str, response: object) -> None:
        """Take in the terminal event: that the response failed once is no failure of reading it."""
        self.content = self.answer = self.finished = self.ended = True
        self._feed_response(kind, response)


class StoredPrompt(Prompt, eq=False):
    """A call for a stored response.

    Attributes:
        after: the number of the last event that the caller has; -1 for none.
    """

    is_about_response = True

    after: int = -1


class StoredResponses(OpenAIResponses):
    """The dialect of `/v1/responses/{id}` and what is below it."""

    operations: Mapping[str, str] = {}

    def read_call(self, method: str, template: str, response_id: str, query: str) -> Prompt:
        """Check a call for a stored response.

        Args:
            method: of HTTP.
            template: its path, `RESPONSE` or `CANCEL`.
            response_id: decoded.
            query: of the caller's url, encoded.

        Raises:
            InvalidRequest: the id could lead to another path of a backend, or `stream` is there twice.
        """
        if _ID.fullmatch(response_id) is None or not _OF_URLS.isdisjoint(response_id):
            raise InvalidRequest(
                f"The id of a response has 1 to {MAX_ID} visible ASCII characters, without / \\ % ? #.", param="id"
            )
        pairs = parse_qsl(query, keep_blank_values=True) if query and method == "GET" else []
        streams = [value for name, value in pairs if name == "stream"]
        if len(streams) > 1:
            raise InvalidRequest("`stream` is there more than once. Send it once.", param="stream")
        after = next((value for name, value in pairs if name == "starting_after"), "")
        return StoredPrompt(
            self,
            template.replace("{id}", quote(response_id, safe=IN_A_SEGMENT)),
            b"",
            None,
            method,
            stream=bool(streams) and streams[0].lower() in TRUE,
            after=int(after[:18]) if after.isascii() and after.isdecimal() else -1,
        )

    def stream_state(self, prompt: Prompt, *, keep_text: bool, until_answer: bool) -> StreamState:
        """Return the state of a stream of numbered events, which may begin in the middle."""
        after = prompt.after if isinstance(prompt, StoredPrompt) else -1
        return _StoredState(after, keep_text=keep_text, until_answer=until_answer)

    def read_answer(self, content_type: str, body: bytes) -> WholeResponse:
        """Check a whole response; the error of one that failed is part of it."""
        return read_whole(content_type, body, _decode_of_any_end, _Stored)


def template_of(below: str) -> str | None:
    """Return the template of the call that a path stands for, by what follows `/v1/responses/`; None for no call."""
    response_id, _, action = below.partition("/")
    return {"": RESPONSE, "cancel": CANCEL}.get(action) if response_id and below[-1] != "/" else None


def _decode_of_any_end(body: bytes) -> _Stored:
    stored = _decode_stored(body)
    if stored.is_response:
        stored.error = NULL
    return stored
