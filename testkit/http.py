"""One HTTP call, and its whole answer."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from time import monotonic
from typing import Any

import aiohttp

from testkit.sse import DONE, Events

ERROR_KEYS = {"message", "type", "param", "code"}


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        status: The HTTP status.
        headers: Names in lower case.
        body: All of it.
        seconds: How long it took; 0 where that was not measured.
        cut: Whether the body did not end properly.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float = 0.0
    cut: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "headers", {name.lower(): value for name, value in self.headers.items()})

    @classmethod
    async def of(cls, response: aiohttp.ClientResponse) -> "Answer":
        """Read the rest of a response."""
        body, cut = await rest_of(response)
        return cls(response.status, dict(response.headers), body, cut=cut)

    @property
    def json(self) -> Any:  # noqa: ANN401
        """The document in the body."""
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in the body, the gateway's own or a backend's."""
        error: dict[str, Any] = self.json["error"]
        return error

    @property
    def own_error(self) -> dict[str, Any]:
        """The error of an answer that must be one of the gateway's own error documents: OpenAI's, or Anthropic's."""
        assert self.headers["content-type"].startswith("application/json"), self
        if self.json.get("type") == "error":
            assert self.json.keys() == {"type", "error"}, self
            assert self.error.keys() - {"param"} == ERROR_KEYS - {"param"}, self
            return self.error
        assert self.json.keys() == {"error"}, self
        assert self.error.keys() == ERROR_KEYS, self
        return self.error

    @property
    def events(self) -> list[Any]:
        """The data of each event of a stream: parsed, except `[DONE]`."""
        assert self.headers["content-type"].startswith("text/event-stream"), self
        data = [event.partition(b"data: ")[2] for event in Events(self.body).data]
        return ["[DONE]" if one == DONE.partition(b"data: ")[2] else json.loads(one) for one in data]

    @property
    def text(self) -> str:
        """The text of a chat completion, streamed or not."""
        if self.headers["content-type"].startswith("application/json"):
            return str(self.json["choices"][0]["message"]["content"])
        return Events(self.body).text

    @property
    def attempts(self) -> int:
        """The number in `x-gateway-attempts`."""
        return int(self.headers["x-gateway-attempts"])

    @property
    def timing(self) -> list[tuple[str, str, float]]:
        """The entries of `server-timing`, in order: name, description, milliseconds."""
        entries = []
        for entry in self.headers["server-timing"].split(", "):
            name, *parameters = entry.split(";")
            values = dict(parameter.split("=", 1) for parameter in parameters)
            entries.append((name, values.get("desc", "").strip('"'), float(values["dur"])))
        return entries

    @property
    def outcomes(self) -> list[str]:
        """For each attempt, the replica and what became of it."""
        return [text for name, text, _ in self.timing if name.startswith("attempt-")]

    @property
    def backoffs(self) -> list[float]:
        """Each sleep between attempts, in milliseconds."""
        return self.waits("backoff")

    def waits(self, kind: str) -> list[float]:
        """Each wait of that kind (`backoff`, `cooldown`, `bridging`, `full`), in milliseconds."""
        return [milliseconds for name, _, milliseconds in self.timing if name.startswith(f"{kind}-")]


class Body:
    """The rest of a body, piece by piece, as far as it comes.

    Attributes:
        cut: Whether it did not end properly; known when all pieces have come.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._content = response.content
        self.cut = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            while piece := await self._content.readany():
                yield piece
        except (aiohttp.ClientPayloadError, aiohttp.ClientOSError, ConnectionError):
            self.cut = True
            yield bytes(self._content._read_nowait(-1))  # noqa: SLF001 - what came before the cut


async def rest_of(response: aiohttp.ClientResponse) -> tuple[bytes, bool]:
    """Return the rest of a body, as far as it came, and whether it was cut: it did not end properly."""
    body = Body(response)
    return b"".join([piece async for piece in body]), body.cut


async def ask(
    url: str,
    *,
    method: str = "GET",
    body: object = None,
    headers: Mapping[str, str] | None = None,
    seconds: float = 10.0,
) -> Answer:
    """Make one call on a connection of its own.

    Args:
        url: Where to.
        method: The HTTP method.
        body: Sent as JSON, or as it is if it is bytes; None for no body.
        headers: Further request headers.
        seconds: How long the whole call may take.

    Raises:
        aiohttp.ClientError: It could not be made.
        TimeoutError: It took longer.
    """
    started = monotonic()
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {} if data is None else {"content-type": "application/json"}
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with (
        aiohttp.ClientSession(timeout=timeout) as session,
        session.request(method, url, data=data, headers={**named, **(headers or {})}) as response,
    ):
        received, cut = await rest_of(response)
        return Answer(response.status, dict(response.headers), received, monotonic() - started, cut)


async def answers(url: str, seconds: float = 2.0) -> bool:
    """Tell whether GET `url` answers 200 in that time, in seconds."""
    try:
        return (await ask(url, seconds=seconds)).status == 200
    except (aiohttp.ClientError, TimeoutError, OSError):
        return False
