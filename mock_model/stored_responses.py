"""The responses that the mock model made and still knows, and those that it makes in the background."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from time import monotonic

import msgspec

from mock_model.answer import Answer, Event, document
from mock_model.errors import InvalidRequest
from mock_model.load import Pace
from mock_model.responses import ResponseRequest
from mock_model.text import Writer

CAPACITY = 1000
MAX_BYTES = 64 * 2**20
"""Of all responses and their events."""
EARLY = 0.05
"""Seconds by which a background response is complete before its time: the timers of its stream may be early too.

It is told as complete no later than its stream ends, jitter included.
"""


@dataclass(slots=True)
class Stored:
    """One response.

    Attributes:
        opened: as it is while the model works on it.
        closed: as it is in the end.
        events: of its stream; empty if it was not created with `stream`.
        due: of a background response, instant of the clock at which each event is due; else empty.
        finish: of a background response, instant at which it is complete; else None.
        cancelled_at: instant, or None.
        size: bytes.
    """

    opened: bytes
    closed: bytes
    events: tuple[Event, ...] = ()
    due: tuple[float, ...] = ()
    finish: float | None = None
    cancelled_at: float | None = None
    size: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = len(self.opened) + len(self.closed) + sum(len(event.data) for event in self.events)

    def runs(self, now: float) -> bool:
        """Return whether the model still works on it."""
        return self.finish is not None and self.cancelled_at is None and now < self.finish

    def body(self, now: float) -> bytes:
        """Return it as it is now."""
        return self.opened if self.cancelled_at is not None or self.runs(now) else self.closed

    def rest(self, now: float, after: int) -> Iterator[Event]:
        """Return the events after number `after`: what is due without a wait, the others at the model's pace."""
        until = self.cancelled_at
        for number, event in enumerate(self.events):
            due = self.due[number] if self.due else now
            if until is not None and due > until:
                return
            if number > after:
                yield event if due > now else replace(event, step=False)


class StoredResponses:
    """Answers what is asked of responses: to make one, to show, stream, delete or cancel one that is known.

    An id is the same for the same seed, place and request, and different at any two places: whoever asks for the same
    again gets the same response, made anew. A response is known as soon as its answer begins, whatever spoils the rest
    of it; the oldest is forgotten first.
    """

    def __init__(
        self, *, writer: Writer, pace: Pace, place: Callable[[], str], clock: Callable[[], float] = monotonic
    ) -> None:
        self._writer = writer
        self._pace = pace
        self._place = place
        self._clock = clock
        self._stored: OrderedDict[str, Stored] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._stored)

    def create(self, request: ResponseRequest, model: str, fingerprint: str) -> Answer:
        """Return a new response, or what is known of it if it is made in the background.

        Raises:
            InvalidRequest: the response before it is unknown, or a field is wrong.
        """
        previous = request.previous_response_id
        if previous is not None and previous not in self._stored:
            raise InvalidRequest(
                f"Previous response with id '{previous}' not found.",
                param="previous_response_id",
                code="previous_response_not_found",
                status=404,
            )
        if request.background and request.store is False:
            raise InvalidRequest("background responses must be stored: set store to true", param="store")
        response_id = self._writer.name("resp_", self._place(), fingerprint)
        made = request.respond(response_id, model, fingerprint, self._writer)

        def keep() -> None:
            stored = Stored(document(made.working), document(made.closed), made.answer.events)
            if request.background:
                now = self._clock()
                stored.due = tuple(now + self._wait(steps) for steps in _steps(made.answer.events))
                stored.finish = now + self._wait(made.answer.steps) - EARLY
            self._keep(response_id, stored)

        effect = None if request.store is False else keep
        if request.background and not request.stream:
            return Answer(body=document(made.opened), effect=effect)
        return replace(made.answer, effect=effect)

    def retrieve(self, response_id: str, query: Mapping[str, str]) -> Answer:
        """Return a response as it is now or, with `stream=true`, its events after number `starting_after`.

        Raises:
            InvalidRequest: it is unknown, or has no stream.
        """
        stored, now = self._find(response_id), self._clock()
        if not wants_stream(query):
            return Answer(body=stored.body(now))
        if not stored.events:
            raise InvalidRequest("the response was not created with stream=true: it cannot be streamed", param="stream")
        after = query.get("starting_after", "-1")
        if not after.removeprefix("-").isdecimal():
            raise InvalidRequest("starting_after must be a whole number", param="starting_after")
        events = tuple(stored.rest(now, int(after[:20])))
        return Answer(events=events, media_type="text/event-stream")

    def delete(self, response_id: str) -> Answer:
        """Forget a response.

        Raises:
            InvalidRequest: it is unknown.
        """
        self._find(response_id)
        body = document({"id": response_id, "object": "response", "deleted": True})
        return Answer(body=body, effect=lambda: self._forget(response_id))

    def cancel(self, response_id: str) -> Answer:
        """End a response that is made in the background; once more changes nothing.

        Raises:
            InvalidRequest: it is unknown, complete, or not made in the background.
        """
        stored, now = self._find(response_id), self._clock()
        if stored.finish is None:
            raise InvalidRequest("Cannot cancel a synchronous response.", code=None)
        if stored.cancelled_at is not None:
            return Answer(body=stored.opened)
        if not stored.runs(now):
            raise InvalidRequest("Cannot cancel a completed response.", code=None)
        body = document({**msgspec.json.decode(stored.opened), "status": "cancelled"})

        def end() -> None:
            stored.opened, stored.cancelled_at = body, now

        return Answer(body=body, effect=end)

    def clear(self) -> None:
        """Forget all."""
        self._stored.clear()
        self._bytes = 0

    def _find(self, response_id: str) -> Stored:
        stored = self._stored.get(response_id)
        if stored is None:
            raise InvalidRequest(f"Response with id '{response_id}' not found.", code=None, status=404)
        return stored

    def _keep(self, response_id: str, stored: Stored) -> None:
        self._forget(response_id)
        self._stored[response_id] = stored
        self._bytes += stored.size
        while len(self._stored) > CAPACITY or self._bytes > MAX_BYTES:
            self._forget(next(iter(self._stored)))

    def _forget(self, response_id: str) -> None:
        stored = self._stored.pop(response_id, None)
        if stored is not None:
            self._bytes -= stored.size

    def _wait(self, steps: int) -> float:
        """Return how many seconds so many tokens take at least."""
        pace = self._pace
        return (1 - pace.jitter) * (pace.first_token + (steps - 1) * pace.interval) if steps else 0.0


def _steps(events: tuple[Event, ...]) -> Iterator[int]:
    """Return how many tokens there are up to each event, its own included."""
    steps = 0
    for event in events:
        steps += event.step
        yield steps


def wants_stream(query: Mapping[str, str]) -> bool:
    """Return whether a response that is known is to be streamed."""
    return query.get("stream", "").lower() in {"true", "1"}
