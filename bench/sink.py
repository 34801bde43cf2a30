"""An OTLP/HTTP collector that only counts spans, per name: `POST /NAME/v1/traces`; `GET /` tells the counts as JSON.

`python -m bench.sink PORT`
"""

import asyncio
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import cast

import uvloop

from bench.http import Incoming

RESOURCE_SPANS, SCOPE_SPANS, SPANS = 1, 2, 2
"""Field numbers of OTLP: ExportTraceServiceRequest > ResourceSpans > ScopeSpans > Span."""

_GZIP = re.compile(rb"\r\ncontent-encoding: *gzip", re.IGNORECASE)
spans: Counter[str] = Counter()


def fields(message: memoryview, number: int) -> Iterator[memoryview]:
    """The sub-messages in one field of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(message, at)
            if tag >> 3 == number:
                yield message[at : at + size]
            at += size
        elif kind == 0:
            _, at = _varint(message, at)
        else:
            at += 8 if kind == 1 else 4


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def count(body: bytes) -> int:
    """The number of spans in an export."""
    return sum(
        1
        for resource in fields(memoryview(body), RESOURCE_SPANS)
        for scope in fields(resource, SCOPE_SPANS)
        for _ in fields(scope, SPANS)
    )


class Connection(asyncio.Protocol):
    """One connection of an exporter."""

    def __init__(self) -> None:
        self._incoming = Incoming()
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Count the spans of an export."""
        request = self._incoming.take(data)
        if request is None:
            return
        head, body = request
        if head.startswith(b"GET"):
            text, media_type = json.dumps(spans).encode(), b"application/json"
        else:
            name = head.split(b"/", 2)[1].decode()
            spans[name] += count(gzip.decompress(body) if _GZIP.search(head) else body)
            text, media_type = b"", b"application/x-protobuf"
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n%s" % (media_type, len(text), text)
        )


async def main(port: int) -> None:
    """Serve for ever."""
    await asyncio.get_running_loop().create_server(Connection, "127.0.0.1", port)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
