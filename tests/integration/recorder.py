"""A backend that keeps what it received byte for byte and answers what it is told to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from aiohttp.test_utils import TestServer

STREAM = b'data: {"id": "1", "choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n'
ANSWER = b'{"id": "chatcmpl-1", "object": "chat.completion", "choices": []}'


class Seen:
    """One prompt, as it came. `headers`: names in lower case, in order, as often as they came."""

    def __init__(self, path: str, headers: list[tuple[str, str]], body: bytes) -> None:
        self.path = path
        self.headers = headers
        self.body = body

    def header(self, name: str) -> str | None:
        """The one value of a header, None without it."""
        values = [value for known, value in self.headers if known == name]
        assert len(values) < 2
        return values[0] if values else None


class Recorder:
    """Answers every prompt alike; `seen` are the prompts, `probed` the probes, `listed` the questions for models.

    Attributes:
        status, headers: of the answers.
        pieces: their bodies; a list of one is sent with its length, a longer one in chunks.
        written: bytes of the answer at hand that went into the socket.
    """

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.status = 200
        self.headers: list[tuple[str, str]] = [("content-type", "application/json")]
        self.pieces = [ANSWER]
        self.written = 0
        self.probed: list[Seen] = []
        self.listed: list[Seen] = []
        self.url = ""

    @property
    def probes(self) -> int:
        """How many health checks came."""
        return len(self.probed)

    async def probe(self, request: web.Request) -> web.Response:
        """404 is good enough, also where models are asked for."""
        (self.listed if request.path.endswith("/models") else self.probed).append(await _seen(request))
        return web.Response(status=404)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Any path."""
        self.seen.append(await _seen(request))
        response = web.StreamResponse(status=self.status)
        for name, value in self.headers:
            response.headers.add(name, value)
        if len(self.pieces) == 1:
            response.content_length = len(self.pieces[0])
        self.written = 0
        await response.prepare(request)
        for piece in self.pieces:
            await response.write(piece)
            self.written += len(piece)
            await asyncio.sleep(0)
        await response.write_eof()
        return response


async def _seen(request: web.Request) -> Seen:
    headers = [(name.decode().lower(), value.decode("utf-8", "surrogateescape")) for name, value in request.raw_headers]
    return Seen(request.path_qs, headers, await request.read())


@asynccontextmanager
async def recording() -> AsyncIterator[Recorder]:
    """A recorder on a port of its own."""
    recorder = Recorder()
    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/{path:.*}", recorder.answer)
    app.router.add_get("/{path:.*}", recorder.probe)
    async with TestServer(app, host="127.0.0.1") as server:
        recorder.url = str(server.make_url("")).rstrip("/")
        yield recorder
