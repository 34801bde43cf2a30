"""The static backend: canned answers, unstreamed or streamed, on raw sockets, whatever the prompt.

`python -m bench.backend PORT...`

A request says what it wants in two ordinary fields that every gateway passes on. `max_tokens`: the number of events of
a stream, or the bytes of an unstreamed answer's text. `seed`: milliseconds between two events, or before an unstreamed
answer. Each event carries the time at which it was sent (`@` nanoseconds `@`), so that the caller knows how late it is.
"""

import asyncio
import re
import sys
from functools import lru_cache
from time import monotonic_ns
from typing import cast

import uvloop

from bench.http import Incoming

TEXT = "Vienna grew from a Roman camp to the seat of an empire, and is a city of music, coffee and long walks. " * 4
DEFAULT_EVENTS = 50

_TOKENS = re.compile(rb'"max_tokens": ?(\d+)')
_SEED = re.compile(rb'"seed": ?(\d+)')
_STREAM = re.compile(rb'"stream": ?true')

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
CHUNK = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"demo-model","choices":'
    b'[{"index":0,"delta":%s,"logprobs":null,"finish_reason":%s}]}\n\n'
)


@lru_cache(maxsize=64)
def answer(size: int) -> bytes:
    """Return an unstreamed answer whose text has `size` characters."""
    text = (TEXT * (size // len(TEXT) + 1))[:size]
    body = (
        '{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"demo-model","choices":[{"index":0,'
        f'"message":{{"role":"assistant","content":"{text}"}},"logprobs":null,"finish_reason":"stop"}}],'
        '"usage":{"prompt_tokens":20,"completion_tokens":60,"total_tokens":80}}'
    )
    return f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def chunk(data: bytes) -> bytes:
    """Encode one chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def content_event() -> bytes:
    """Return an event with a token, as a chunk of its own."""
    return chunk(CHUNK % (b'{"content":" a token @%d@"}' % monotonic_ns(), b"null"))


ROLE = chunk(CHUNK % (b'{"role":"assistant","content":""}', b"null"))
LAST = chunk(CHUNK % (b"{}", b'"stop"')) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"
DEFAULT_ANSWER = answer(len(TEXT))
HEALTHY = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok"


class Connection(asyncio.Protocol):
    """One connection of a gateway."""

    def __init__(self) -> None:
        self._incoming = Incoming()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole."""
        request = self._incoming.take(data)
        if request is None:
            return
        head, body = request
        if head.startswith(b"GET"):
            self._transport.write(HEALTHY)
            return
        tokens, seed = _TOKENS.search(body[:1024]), _SEED.search(body[:1024])
        pause = int(seed[1]) / 1000 if seed else 0.0
        if _STREAM.search(body[:1024]):
            self._stream(int(tokens[1]) if tokens else DEFAULT_EVENTS, pause)
        else:
            whole = answer(int(tokens[1])) if tokens else DEFAULT_ANSWER
            if pause:
                asyncio.get_running_loop().call_later(pause, self._transport.write, whole)
            else:
                self._transport.write(whole)

    def _stream(self, events: int, pause: float) -> None:
        """Send the head, the role and the first token at once, then a token after each pause."""
        self._transport.write(HEAD + ROLE + content_event())
        if not pause:
            for _ in range(events - 1):
                self._transport.write(content_event())
            self._transport.write(LAST)
            return
        loop = asyncio.get_running_loop()
        start = loop.time()
        sent = 1

        def go_on() -> None:
            nonlocal sent
            if self._transport.is_closing():
                return
            if sent == events:
                self._transport.write(LAST)
                return
            self._transport.write(content_event())
            sent += 1
            loop.call_at(start + sent * pause, go_on)

        loop.call_at(start + pause, go_on)


async def main(ports: list[int]) -> None:
    """Serve forever."""
    for port in ports:
        await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port, backlog=4096)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main([int(port) for port in sys.argv[1:]]))
