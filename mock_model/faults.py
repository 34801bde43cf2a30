"""Every way in which the mock model can fail, one class each.

A fault decides which calls it can apply to, and how they are answered, if at all. Durations are float seconds.
"""

import asyncio
import re
from collections.abc import Iterable
from dataclasses import replace
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal

import msgspec
from aiohttp import web
from msgspec import UNSET, Meta, UnsetType

from mock_model.answer import EVENT_STREAM, JSON, Answer, Event, data_event, named_event
from mock_model.call import Call
from mock_model.draws import draw
from mock_model.errors import OVERLOADED, anthropic_error, envelope, error_body, is_anthropic

Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Count = Annotated[int, Meta(ge=0, le=1_000_000_000)]

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
HEADER_VALUE = re.compile(r"(?!\t)[^\x00-\x08\x0a-\x1f\x7f-\x9f]*(?<!\t)")
"""No control characters, except tabs inside."""
FRAMING = frozenset({"connection", "content-length", "transfer-encoding"})
"""These say where an answer ends."""

PAGE = (
    b"<!DOCTYPE html>\n<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"
)
GARBAGE = b"this is no JSON {"
MALFORMED = b'data: {"id": "chatcmpl-broken", "choices": [{"index": 0, "delta": {"content": \n\n'
RESPONSES = "/v1/responses"
ELLIPSIS = "…".encode()
COMMENT = b": ping\n\n"
PING = b'event: ping\ndata: {"type":"ping"}\n\n'
TEXTS = (b'"content":"', b'"arguments":"', b'"text":"', b'"thinking":"', b'"partial_json":"', b'"delta":"')
"""What stands before the words of an event."""


class Fault(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the faults have in common."""

    kind: ClassVar[str]

    def suits(self, call: Call) -> bool:  # noqa: ARG002
        """Return whether the fault would show in the call; a call in which it would not does not use it up."""
        return True

    def wrong(self) -> tuple[str, str] | None:
        """Return a parameter that cannot be used and the reason, or None."""
        return None

    async def apply(self, call: Call) -> web.StreamResponse:
        """Answer the call in the fault's way."""
        raise NotImplementedError


def _streamed(call: Call) -> bool:
    return bool(call.answer.events)


def _phrase(status: int) -> str:
    if status == OVERLOADED:
        return "Overloaded"
    return HTTPStatus(status).phrase if status in list(HTTPStatus) else "unknown status"


def _of_events(call: Call) -> bool:
    return call.answer.content_type == EVENT_STREAM


def _opening(events: tuple[Event, ...]) -> int:
    """Return how many events come before the first token."""
    return next((number for number, event in enumerate(events) if event.step), len(events))


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


class Status(Fault):
    """An error status (or any other).

    Attributes:
        status: 200 to 599.
        body: JSON; a text is sent as it stands, as text/plain. Without it: an error in the form of the path's API.
        headers: further headers, such as `retry-after`; not those that say where the answer ends.
    """

    kind = "status"
    status: Annotated[int, Meta(ge=200, le=599)]
    body: Any | UnsetType = UNSET
    headers: dict[str, str | int | float] = {}

    def wrong(self) -> tuple[str, str] | None:
        """Return a header that cannot be sent, or would break the framing of the answer."""
        for name, value in self.headers.items():
            if not HEADER_NAME.fullmatch(name):
                return "headers", f"{name!r} is not a header name"
            if name.lower() in FRAMING:
                return "headers", f"{name} would break the framing of the answer; use short_body for that"
            if not HEADER_VALUE.fullmatch(str(value)):
                return "headers", f"the value of {name} holds control characters"
        return None

    async def apply(self, call: Call) -> web.StreamResponse:
        """Answer with it."""
        content_type = JSON
        if self.body is UNSET:
            message = f"{_phrase(self.status)} (a fault of the mock model)"
            body = error_body(call.path, self.status, message, code=f"mock_{self.status}")
        elif isinstance(self.body, str):
            body, content_type = self.body.encode(), "text/plain; charset=utf-8"
        else:
            body = msgspec.json.encode(self.body)
        call.end("fault")
        headers = {name: str(value) for name, value in self.headers.items()}
        return call.reply(self.status, body, content_type=content_type, headers=headers)


class Latency(Fault):
    """A good answer that comes late.

    Attributes:
        delay: before anything is sent.
        jitter: the delay is drawn between `delay - jitter` and `delay + jitter`.
    """

    kind = "latency"
    delay: Seconds
    jitter: Seconds = 0.0

    async def apply(self, call: Call) -> web.StreamResponse:
        """Wait, then serve."""
        part = draw(call.machine.seed, self.kind, call.fingerprint, call.occurrence)
        await call.machine.wait(max(0.0, self.delay + self.jitter * (2 * part - 1)))
        return await call.serve()


class HangBeforeHeaders(Fault):
    """Nothing is ever sent."""

    kind = "hang_before_headers"

    async def apply(self, call: Call) -> web.StreamResponse:
        """Hang."""
        return await call.hang()


class HangAfterHeaders(Fault):
    """The headers of a 200, then nothing."""

    kind = "hang_after_headers"

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send the headers and hang."""
        await call.begin()
        return await call.hang()


class SlowFirstToken(Fault):
    """A good answer whose first token comes late: a stream's headers and opening events are in time.

    Attributes:
        delay: before the first token; of an unstreamed answer, before the body.
    """

    kind = "slow_first_token"
    delay: Seconds

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send the headers, wait, then go on as usual."""
        if not _streamed(call):
            response = await call.begin(length=len(call.answer.body))
            await call.machine.wait(self.delay)
            await call.think()
            await response.write(call.answer.body)
            return await call.finish(response, "complete")
        events = call.answer.events
        opening = _opening(events)
        response = await call.begin()
        await call.play(response, events[:opening])
        await call.machine.wait(self.delay)
        await call.play(response, events[opening:])
        return await call.finish(response, "complete")


class Pings(Fault):
    """A good answer after signs of life: comments, in messages `ping` events, of an unstreamed answer blank lines.

    Attributes:
        count: how many.
        interval: before each, and before the answer goes on.
        after_events: how many events come before them; by default all that come before the first token.
    """

    kind = "pings"
    count: Annotated[int, Meta(ge=1, le=1_000_000)] = 3
    interval: Seconds = 1.0
    after_events: Count | None = None

    def suits(self, call: Call) -> bool:
        """Return whether such signs can stand in the answer."""
        return call.answer.content_type in {EVENT_STREAM, JSON}

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send the beginning and the signs, then go on as usual."""
        answer = call.answer
        response = await call.begin()
        if not _streamed(call):
            await self._live(call, response, b"\n")
            await call.think()
            await response.write(answer.body)
            return await call.finish(response, "complete")
        place = _opening(answer.events) if self.after_events is None else self.after_events
        await call.play(response, answer.events[:place])
        await self._live(call, response, PING if is_anthropic(call.path) else COMMENT)
        await call.play(response, answer.events[place:])
        return await call.finish(response, "complete")

    async def _live(self, call: Call, response: web.StreamResponse, sign: bytes) -> None:
        for _ in range(self.count):
            await call.machine.wait(self.interval)
            await response.write(sign)
        await call.machine.wait(self.interval)


class OneSlot(Fault, dict=True):
    """A server that answers one stream at a time: a newer one ends the one before it, as if that were complete."""

    kind = "one_slot"

    def __post_init__(self) -> None:
        self._turn: asyncio.Future[None] | None = None

    def suits(self, call: Call) -> bool:
        """Return whether it is a stream of events."""
        return _of_events(call)

    async def apply(self, call: Call) -> web.StreamResponse:
        """Serve until another one comes."""
        if self._turn is not None and not self._turn.done():
            self._turn.set_result(None)
        turn = self._turn = asyncio.get_running_loop().create_future()
        response = await call.begin()
        playing = asyncio.ensure_future(call.play(response, call.answer.events))
        try:
            await asyncio.wait((playing, turn), return_when=asyncio.FIRST_COMPLETED)
            displaced = playing.cancel()
            await asyncio.wait((playing,))
            if not displaced:
                playing.result()
            return await call.finish(response, "fault" if displaced else "complete")
        finally:
            playing.cancel()


class Stall(Fault):
    """A stream that stops and stays open; of an unstreamed answer half of the body is sent.

    Attributes:
        after_events: how many events are sent; does not apply to a stream that has fewer.
    """

    kind = "stall"
    after_events: Count = 1

    def suits(self, call: Call) -> bool:
        """Return whether the answer is long enough."""
        return not _streamed(call) or self.after_events <= len(call.answer.events)

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send the beginning and hang."""
        if _streamed(call):
            response = await call.begin()
            await call.play(response, call.answer.events[: self.after_events])
        else:
            await call.think()
            response = await call.begin(length=len(call.answer.body))
            await response.write(_half(call.answer.body))
        return await call.hang()


class Cut(Fault):
    """A stream that ends too early; of an unstreamed answer half of the body is sent.

    Attributes:
        after_events: how many whole events are sent; does not apply to a stream in which nothing would be missing.
        how: `end`: the HTTP answer ends properly, and only its content is cut; `reset`: by TCP RST.
        where: `between` two events, `inside_event` (half of the next one comes too) or `inside_character` (the next one
            comes up to the middle of a UTF-8 sequence in its text).
    """

    kind = "cut"
    after_events: Count = 1
    how: Literal["end", "reset"] = "end"
    where: Literal["between", "inside_event", "inside_character"] = "between"

    def suits(self, call: Call) -> bool:
        """Return whether something would be missing; a reset shows after the last event too."""
        if _streamed(call) and not _of_events(call) and self.where == "inside_character":
            return False
        whole = len(call.answer.events)
        shows_at_the_end = self.how == "reset" and self.where == "between"
        return not _streamed(call) or self.after_events < whole or (shows_at_the_end and self.after_events == whole)

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send the beginning and end."""
        if _streamed(call):
            response = await call.begin(keep_alive=False)
            await call.play(response, call.answer.events[: self.after_events])
            rest = self._piece(call.answer.events[self.after_events :])
        else:
            await call.think()
            response = await call.begin(keep_alive=False)
            rest = _half(call.answer.body)
        if rest:
            await response.write(rest)
        return await (call.finish(response, "fault") if self.how == "end" else call.reset())

    def _piece(self, rest: tuple[Event, ...]) -> bytes:
        if not rest or self.where == "between":
            return b""
        data = rest[0].data
        if self.where == "inside_event":
            return _half(data)
        for key in TEXTS:
            if key in data:
                return data[: data.index(key) + len(key)] + ELLIPSIS[:2]
        return b'data: {"id":"' + ELLIPSIS[:2]


class _Edited(Fault):
    """A stream with events left out or added."""

    def edit(self, events: tuple[Event, ...]) -> Iterable[Event]:
        """Return the events that are sent."""
        raise NotImplementedError

    def suits(self, call: Call) -> bool:
        """Return whether it is a stream that would change."""
        return _of_events(call) and tuple(self.edit(call.answer.events)) != call.answer.events

    async def apply(self, call: Call) -> web.StreamResponse:
        """Serve the edited events."""
        return await call.serve(replace(call.answer, events=tuple(self.edit(call.answer.events))))


class NoDone(_Edited):
    """A stream without `[DONE]`, or, in messages, without `message_stop`; not for responses, which has neither."""

    kind = "no_done"

    def edit(self, events: tuple[Event, ...]) -> Iterable[Event]:
        """Return all but the last event."""
        return (event for event in events if event.part != "done")


class NoFinish(_Edited):
    """A stream with neither finish reasons nor `[DONE]`.

    In messages it has neither `message_delta` nor `message_stop`, in responses no last event.

    Attributes:
        done: whether `[DONE]` (`message_stop`) comes all the same.
    """

    kind = "no_finish"
    done: bool = False

    def edit(self, events: tuple[Event, ...]) -> Iterable[Event]:
        """Return all but the finish and, mostly, `[DONE]`."""
        without = {"finish"} if self.done else {"finish", "done"}
        return (event for event in events if event.part not in without)


class MalformedEvent(_Edited):
    """A stream with one more event, whose data is not JSON; the rest is sent as usual.

    Where events have names, its name is that of the next one.

    Attributes:
        after_events: how many good events come before it; at the latest it is the last but one.
    """

    kind = "malformed_event"
    after_events: Count = 1

    def edit(self, events: tuple[Event, ...]) -> Iterable[Event]:
        """Return the events with the bad one between."""
        place = min(self.after_events, len(events) - 1)
        first = events[place].data.partition(b"\n")[0]
        name = first + b"\n" if first.startswith(b"event: ") else b""
        return (*events[:place], Event(name + MALFORMED, "closing"), *events[place:])


class ErrorEvent(Fault):
    """A stream that ends properly with an error as its last event.

    Attributes:
        after_events: how many good events come before it; at the latest it takes the place of the last one.
        error: what stands in `error`, any JSON; by default the server's own trouble, in the form of the API.
    """

    kind = "error_event"
    after_events: Count = 1
    error: Any | UnsetType = UNSET

    def suits(self, call: Call) -> bool:
        """Return whether it is a stream of events."""
        return _of_events(call)

    async def apply(self, call: Call) -> web.StreamResponse:
        """Serve the beginning and the error."""
        events = call.answer.events
        place = min(self.after_events, len(events) - 1)
        error = self._event(call.path, events[place])
        return await call.serve(replace(call.answer, events=(*events[:place], error)))

    def _event(self, path: str, place: Event) -> Event:
        """Return the error that takes the place of an event."""
        message = "the model failed (a fault of the mock model)"
        if is_anthropic(path):
            error = anthropic_error(OVERLOADED, message)
            return named_event(error if self.error is UNSET else {**error, "error": self.error}, "finish")
        error = msgspec.json.decode(envelope(500, message, code="mock_error"))
        if self.error is not UNSET:
            error = {"error": self.error}
        if path.startswith(RESPONSES):
            number = msgspec.json.decode(place.data.partition(b"data: ")[2])["sequence_number"]
            detail = error["error"]
            fields = {"code": None, "message": detail, "param": None}
            if isinstance(detail, dict):
                fields = {name: detail.get(name) for name in fields}
            return named_event({"type": "error", "sequence_number": number, **fields, **error}, "finish")
        return data_event(error, "finish")


class ContentType(Fault):
    """A good answer with a wrong `Content-Type`.

    Attributes:
        value: what is sent; does not apply to an answer that has this type anyway.
    """

    kind = "content_type"
    value: Annotated[str, Meta(pattern=r"\A[\x20-\x7e]+\Z")]

    def suits(self, call: Call) -> bool:
        """Return whether the type is wrong for the answer."""
        return self.value != call.answer.content_type

    async def apply(self, call: Call) -> web.StreamResponse:
        """Serve it with that type."""
        return await call.serve(replace(call.answer), content_type=self.value)


class Html(Fault):
    """A 200 with an HTML page, as proxies send it."""

    kind = "html"

    async def apply(self, call: Call) -> web.StreamResponse:
        """Answer with the page."""
        await call.think()
        call.end("fault")
        return call.reply(200, PAGE, content_type="text/html; charset=utf-8")


class NotJson(Fault):
    """A 200 whose type says JSON and whose body is not, streamed or not."""

    kind = "not_json"

    async def apply(self, call: Call) -> web.StreamResponse:
        """Answer with something else."""
        await call.think()
        call.end("fault")
        return call.reply(200, GARBAGE)


class ShortBody(Fault):
    """A `Content-Length` that promises the whole answer, and a connection that closes before it has been sent.

    Attributes:
        bytes: how many bytes of the body are sent; by default half of it; at least one is always missing.
    """

    kind = "short_body"
    bytes: Count | None = None

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send the beginning and close."""
        content = call.answer.content
        sent = len(content) // 2 if self.bytes is None else self.bytes
        await call.think()
        response = await call.begin(length=len(content), keep_alive=False)
        await response.write(content[: min(sent, len(content) - 1)])
        return call.hang_up()


class Drip(Fault):
    """A good answer, a few bytes at a time.

    Attributes:
        bytes: in each piece.
        interval: between two pieces.
    """

    kind = "drip"
    bytes: Annotated[int, Meta(ge=1, le=1_000_000_000)] = 1
    interval: Seconds = 0.01

    async def apply(self, call: Call) -> web.StreamResponse:
        """Send it piece by piece."""
        answer = call.answer
        response = await call.begin(length=None if answer.events else len(answer.body))
        ends = self._ends(answer)
        content = answer.content
        for start in range(0, len(content), self.bytes):
            if start:
                await call.machine.wait(self.interval)
            await response.write(content[start : start + self.bytes])
            while ends and ends[-1] <= start + self.bytes:
                ends.pop()
                call.entry.events_sent += 1
        return await call.finish(response, "complete")

    @staticmethod
    def _ends(answer: Answer) -> list[int]:
        """Return where each event ends in the content, the first at the end of the list."""
        ends, position = [], 0
        for event in answer.events:
            position += len(event.data)
            ends.append(position)
        return ends[::-1]


class Reset(Fault):
    """A TCP RST before the headers."""

    kind = "reset"

    async def apply(self, call: Call) -> web.StreamResponse:
        """Break the connection."""
        return await call.reset()


class Refuse(Fault):
    """The call is reset, and for a while nobody listens on the port: further connections are refused.

    Attributes:
        seconds: until the port is open again.
    """

    kind = "refuse"
    seconds: Seconds = 1.0

    async def apply(self, call: Call) -> web.StreamResponse:
        """Stop listening and break the connection."""
        await call.machine.refuse(self.seconds)
        return await call.reset()


class Overload(Fault, dict=True):
    """A model that turns calls away when it is full: those that find a place are answered as usual.

    Attributes:
        capacity: calls that are answered at a time.
        queue: further calls that wait for a place.
        retry_after: what the others are told, in seconds; None: nothing.
        status: 503, 429 or 529.
    """

    kind = "overload"
    capacity: Annotated[int, Meta(ge=0, le=1_000_000)]
    queue: Count = 0
    retry_after: Seconds | None = None
    status: Literal[429, 503, 529] = 503

    def __post_init__(self) -> None:
        self._present = 0
        self._places = asyncio.Semaphore(self.capacity)

    async def apply(self, call: Call) -> web.StreamResponse:
        """Serve, wait and serve, or turn away."""
        if self._present >= self.capacity + (self.queue if self.capacity else 0):
            code = "rate_limit_exceeded" if self.status == 429 else "server_is_overloaded"  # noqa: PLR2004
            headers = {} if self.retry_after is None else {"Retry-After": f"{self.retry_after:g}"}
            call.end("fault")
            return call.reply_error(self.status, "the mock model is overloaded", code=code, headers=headers)
        self._present += 1
        try:
            async with self._places:
                return await call.serve()
        finally:
            self._present -= 1


class Crash(Fault):
    """The process ends at once."""

    kind = "crash"

    async def apply(self, call: Call) -> web.StreamResponse:
        """End it; in a test that replaces the crash, the connection is closed."""
        call.end("fault")
        call.machine.crash()
        return call.hang_up()


KINDS: dict[str, type[Fault]] = {
    fault.kind: fault
    for fault in (
        Status,
        Latency,
        HangBeforeHeaders,
        HangAfterHeaders,
        SlowFirstToken,
        Pings,
        OneSlot,
        Stall,
        Cut,
        NoDone,
        NoFinish,
        MalformedEvent,
        ErrorEvent,
        ContentType,
        Html,
        ShortBody,
        NotJson,
        Drip,
        Reset,
        Refuse,
        Overload,
        Crash,
    )
}
