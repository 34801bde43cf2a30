"""Server-sent events, as the caller of a stream reads them."""

import json
from collections.abc import AsyncIterable, AsyncIterator
from typing import Any, NamedTuple

DONE = b"data: [DONE]\n\n"


class Event(NamedTuple):
    """An event of one line of data, as all events of these APIs are."""

    name: str
    data: str


async def read_events(pieces: AsyncIterable[bytes]) -> AsyncIterator[Event]:
    """Read a stream's events as its bytes come in, in pieces of any size."""
    name = ""
    async for line in _lines(pieces):
        if line.startswith(b"event: "):
            name = line[7:].decode().strip()
        elif line.startswith(b"data: "):
            yield Event(name, line[6:].decode().strip())
            name = ""


async def _lines(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
    if rest:
        yield rest


class Events:
    """The events of a whole body, in order, each with its empty line."""

    def __init__(self, body: bytes) -> None:
        assert body.endswith(b"\n\n"), f"half an event at the end: {body[-100:]!r}"
        self.all = [part + b"\n\n" for part in body.removesuffix(b"\n\n").split(b"\n\n")]

    @property
    def data(self) -> list[bytes]:
        """All but comments."""
        return [event for event in self.all if not event.startswith(b":")]

    @property
    def comments(self) -> list[bytes]:
        """The comments."""
        return [event for event in self.all if event.startswith(b":")]

    @property
    def done(self) -> int:
        """How many `[DONE]` there are."""
        return self.all.count(DONE)

    @property
    def documents(self) -> list[Any]:
        """The data of each event except `[DONE]`."""
        return [json.loads(event.partition(b"data: ")[2]) for event in self.data if event != DONE]

    @property
    def errors(self) -> list[dict[str, Any]]:
        """The value of `error` in each event that has one."""
        return [document["error"] for document in self.documents if document.get("error") is not None]

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return "".join(
            choice["delta"].get("content") or ""
            for document in self.documents
            for choice in document.get("choices", [])
            if choice["index"] == 0
        )

    def only_error(self) -> dict[str, Any]:
        """Return the error of a stream that failed: exactly one, as the last event, and no `[DONE]`."""
        assert self.done == 0, "a failed stream says [DONE]"
        assert len(self.errors) == 1, f"{len(self.errors)} error events"
        error: dict[str, Any] = self.documents[-1]["error"]
        return error
