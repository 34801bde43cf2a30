"""A good answer, ready to be sent: a body, or the events of a stream."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

CREATED = 1_767_225_600
"""Unix time; fixed, so that the same request gives the same bytes."""

JSON = "application/json"
EVENT_STREAM = "text/event-stream"

Part = Literal["opening", "token", "closing", "finish", "usage", "done"]

_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event, or one piece of a sound.

    Attributes:
        data: its bytes.
        part: of a stream that it is.
        step: whether a decoding step comes before it.
    """

    data: bytes
    part: Part
    step: bool = False


DONE = Event(b"data: [DONE]\n\n", "done")


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer to a call that no fault spoils.

    Attributes:
        status: of the answer; not 200 if the request is wrong.
        body: of an unstreamed answer, else empty.
        events: those of a streamed answer, or the pieces of a sound; else empty.
        media_type: what it is sent as, if neither JSON nor a stream of events.
        steps: decoding steps, the first included; the time of an answer depends on them.
        input_tokens: tokens of the prompt.
        output_tokens: tokens of all choices.
        finish_reasons: one for each choice.
        effect: what the model remembers or forgets as this answer begins; faults that send another answer prevent it.
    """

    status: int = 200
    body: bytes = b""
    media_type: str = ""
    events: tuple[Event, ...] = ()
    steps: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    finish_reasons: tuple[str, ...] = field(default=())
    effect: Callable[[], None] | None = None

    @property
    def content_type(self) -> str:
        """The media type it is sent as."""
        return self.media_type or (EVENT_STREAM if self.events else JSON)

    @property
    def content(self) -> bytes:
        """All bytes of the answer."""
        return self.body or b"".join(event.data for event in self.events)


def data_event(payload: Mapping[str, Any], part: Part, *, step: bool = False) -> Event:
    """Return an event without a name, as chat completions and completions have it."""
    return Event(b"data: " + _encode(payload) + b"\n\n", part, step)


def named_event(payload: Mapping[str, Any], part: Part, *, step: bool = False) -> Event:
    """Return an event that carries its `type` as its name too, as responses has it."""
    return Event(b"event: " + payload["type"].encode() + b"\ndata: " + _encode(payload) + b"\n\n", part, step)


def document(payload: Mapping[str, Any] | msgspec.Struct) -> bytes:
    """Return the JSON of an unstreamed answer."""
    return _encode(payload)
