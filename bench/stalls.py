"""How long others wait while absurd JSON is looked into: `python -m bench.stalls [--rounds 3] [SHAPE...]`.

For each shape of body, answer and streamed event, two callers send or are sent JSON as large as the limits allow, both
at once, while a process of its own asks for `/livez` every 10 ms. Printed are the p99 and the longest of these calls,
the gateway's CPU time for each MB that came (of an answer that is fetched again, each time), how far its memory rises
for each byte that the two hold (the processes that it starts included), how often each was fetched, and the status.

Each round has a gateway of its own, whose side process runs already: what an earlier shape has left, in its memory or
in a breaker, says nothing about this one. Of several rounds the least counts: the rest is the machine's.
"""

import argparse
import asyncio
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import ClassVar, cast

import uvloop

from bench.backend import DEFAULT_ANSWER, HEALTHY
from testkit import usage
from testkit.http import ask
from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process, ProcessError, clean_environment, python, spawn
from testkit.quantiles import median_and_p99
from testkit.servers import Gateway

BODY, ANSWER = 30_000_000, 60_000_000
"""Bytes, a little below the limits."""
CALLERS = 2
INTERVAL = 0.01
MB = 1e6
WARM_UP = 5_000_000
"""Bytes of a body that starts the side process."""
A_MESSAGE = b'"messages":[{"role":"user","content":"hi"}]'
GOALS = "goals: p99 50 ms, longest 250 ms, CPU 30 ms/MB, memory 3 bytes/byte"

Shape = Callable[[int], bytes]


def filled(start: bytes, unit: bytes, end: bytes, between: bytes = b",") -> Shape:
    """Return what makes JSON of a size: a beginning, many times the same, and an end."""
    return lambda size: start + between.join([unit] * ((size - len(start)) // len(unit + between))) + end


def text(unit: bytes) -> Shape:
    """Return what makes a prompt of one text."""
    return filled(b'{"messages":[{"role":"user","content":"', unit, b'"}]}', b"")


BODIES = {
    "one text": text(b"a"),
    "no ascii": text("é".encode()),
    "line ends": text(rb"\n"),
    "backslashes": text(rb"\\"),
    "escaped letters": text(rb"\u0061"),
    "other escapes": text(rb"\u0041\u4e2d"),
    "half surrogates": text(rb"\ud800"),
    "words": filled(b'{"messages":[{"role":"user","content":"', b"some words", b'"}]}'),
    "lists": filled(b"{" + A_MESSAGE + b',"tools":[', b"[]", b"]}"),
    "objects": filled(b"{" + A_MESSAGE + b',"tools":[', b"{}", b"]}"),
    "numbers": filled(b"{" + A_MESSAGE + b',"tools":[', b"1", b"]}"),
    "texts": filled(b"{" + A_MESSAGE + b',"tools":[', b'""', b"]}"),
    "depth": filled(b"{" + A_MESSAGE + b',"tools":[', b"[" * 490 + b"]" * 490, b"]}"),
    "messages": filled(b'{"messages":[', b'{"role":"user","content":"hi"}', b"]}"),
    "escaped names": filled(b"{", rb'"\u0061":0', b"," + A_MESSAGE + b"}"),
    "names inside": filled(b"{" + A_MESSAGE + b',"tools":[', b'{"n":0}', b"]}"),
    "spaces": filled(b"{" + A_MESSAGE, b" ", b"}", b""),
    "no end": filled(b"{" + A_MESSAGE + b',"tools":[', b"[]", b""),
}
ANSWERS = {
    "one text": filled(b'{"choices":[{"message":{"content":"', b"a", b'"}}]}', b""),
    "surrogates": filled(b'{"choices":[{"message":{"content":"', rb"\ud800", b'"}}]}', b""),
    "choices": filled(b'{"choices":[', b"{}", b"]}"),
    "reasons": filled(b'{"choices":[', b'{"index":0,"finish_reason":"stop","message":{"role":"","content":""}}', b"]}"),
    "lists": filled(b'{"choices":[],"x":[', b"[]", b"]}"),
    "not finite": filled(b'{"data":[{"embedding":[', b"NaN", b"]}]}"),
    "an error": filled(b'{"error":[', b"{}", b"]}"),
    "an id": filled(b'{"choices":[],"id":"', b"a", b'"}', b""),
    "no JSON": filled(b'{"choices":[],"x":[', b"[]", b""),
}
EVENTS = {
    "one text": filled(b'{"choices":[{"index":0,"delta":{"content":"', b"a", b'"},"finish_reason":"stop"}]}', b""),
    "lists": filled(b'{"choices":[{"index":0,"delta":{"content":[', b"[]", b']},"finish_reason":"stop"}]}'),
    "objects": filled(b'{"choices":[{"index":0,"delta":{"content":[', b"{}", b']},"finish_reason":"stop"}]}'),
    "lines": filled(b'{"choices":[{"index":0,"finish_reason":"stop"}]}\n', b"x", b"", b"\n"),
    "carriage returns": filled(b'{"choices":[{"index":0,"finish_reason":"stop"}]}\r', b"x", b"", b"\r"),
    "comments": filled(b'{"choices":[{"index":0,"finish_reason":"stop"}]}\n', b":", b"", b"\n"),
}
KINDS = {"body": BODIES, "answer": ANSWERS, "event": EVENTS}
_WANTED = re.compile(rb'"user": ?"(answer|event) ([^"]*)"')


class Backend(asyncio.Protocol):
    """One connection of the gateway: answers what the request wants, and a request that wants nothing with little."""

    made: ClassVar[dict[tuple[str, str], bytes]] = {}
    sent: ClassVar[int] = 0
    """Bytes that the gateway has taken, over all connections that have ended or are idle."""

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, _error: Exception | None) -> None:
        """Take back what was not taken."""
        Backend.sent -= self._transport.get_write_buffer_size()

    def data_received(self, data: bytes) -> None:
        """Answer a request once it is whole; a large one is not kept."""
        if not self._left:
            self._head += data
            end = self._head.find(b"\r\n\r\n") + 4
            if end < 4:
                return
            length = re.search(rb"\r\ncontent-length: *(\d+)", self._head[:end], re.IGNORECASE)
            self._left = end + (int(length[1]) if length else 0)
            data = self._head
        elif len(self._head) < 1 << 16:
            self._head += data
        self._left -= len(data)
        if self._left:
            return
        wanted = _WANTED.search(self._head)
        if wanted is not None:
            self._send(wanted[1].decode(), wanted[2].decode())
        elif self._head.startswith(b"GET /sent "):
            number = b"%d" % self.sent
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(number), number))
        else:
            self._transport.write(HEALTHY if self._head.startswith(b"GET") else DEFAULT_ANSWER)
        self._head = b""

    def _send(self, kind: str, shape: str) -> None:
        if (kind, shape) not in self.made:
            self.made.clear()
            self.made[kind, shape] = KINDS[kind][shape](ANSWER)
        before, after = (b"data: ", b"\n\ndata: [DONE]\n\n") if kind == "event" else (b"", b"")
        body = self.made[kind, shape]
        what = b"text/event-stream" if kind == "event" else b"application/json"
        size = len(before) + len(body) + len(after)
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n" % (what, size)
        Backend.sent += size
        self._transport.writelines([head, before, body, after])


async def serve(port: int) -> None:
    """Be the backend, forever."""
    await asyncio.get_running_loop().create_server(Backend, LOOPBACK, port)
    await asyncio.Event().wait()


async def ping(port: int) -> None:
    """Ask for `/livez` until our input ends; print how long each call took, in ms."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    end = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
    print("ready", flush=True)
    while not end.done():
        began = perf_counter()
        writer.write(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length[1]) if length else 0)
        print(1000 * (perf_counter() - began), flush=True)
        await asyncio.sleep(INTERVAL)


async def call(port: int, body: bytes) -> int:
    """Send a prompt, read the answer without keeping it, and return its status."""
    reader, writer = await asyncio.open_connection(LOOPBACK, port, limit=1 << 20)
    try:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(head + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body))
        for at in range(0, len(body), 1 << 20):
            writer.write(body[at : at + (1 << 20)])
            await writer.drain()
        status = int((await reader.readline()).split()[1])
        with suppress(ConnectionError):
            while await reader.read(1 << 20):
                pass
        return status
    finally:
        writer.close()


async def watch(pid: int, peak: list[int]) -> None:
    """Keep the most memory of a process and of those it started."""
    while True:
        peak[0] = max(peak[0], usage.resident_bytes(pid))
        await asyncio.sleep(INTERVAL)


async def sent(backend_url: str) -> int:
    """Return how many bytes of answers the gateway has taken."""
    return int((await ask(f"{backend_url}/sent")).body)


async def measure(gateway: Gateway, backend_url: str, kind: str, shape: str) -> list[float]:
    """Return p99 and longest in ms, CPU in ms for each MB, bytes for each byte held, fetches, and the status."""
    size = BODY if kind == "body" else ANSWER
    stream = b"true" if kind == "event" else b"false"
    small = b'{"user":"%b %b","stream":%b,%b}' % (kind.encode(), shape.encode(), stream, A_MESSAGE)
    body = BODIES[shape](BODY) if kind == "body" else small
    await call(gateway.port, text(b"a")(WARM_UP))
    pipe = asyncio.subprocess.PIPE
    pinger = await spawn(
        python("bench.stalls", "--ping", str(gateway.port)), env=clean_environment({}), stdin=pipe, stdout=pipe
    )
    if pinger.stdout is None or pinger.stdin is None:
        raise RuntimeError("the pings have no pipes")
    await pinger.stdout.readline()
    before, cpu = usage.resident_bytes(gateway.pid), usage.cpu_seconds(gateway.pid)
    peak, sent_before = [before], await sent(backend_url)
    watching = asyncio.create_task(watch(gateway.pid, peak))
    statuses = await asyncio.gather(*[call(gateway.port, body) for _ in range(CALLERS)])
    watching.cancel()
    cpu = usage.cpu_seconds(gateway.pid) - cpu
    pinger.stdin.close()
    waits = [float(line) for line in (await pinger.stdout.read()).split()]
    await pinger.wait()
    if len(set(statuses)) > 1:
        print(f"{kind} {shape}: the callers got {statuses}", file=sys.stderr)
    held = CALLERS * size
    came = held if kind == "body" else await sent(backend_url) - sent_before
    memory = (peak[0] - before) / held
    return [median_and_p99(waits)[1], max(waits), cpu * 1000 / (came / MB), memory, came / held, statuses[0]]


async def run(wanted: list[str], rounds: int) -> None:
    """Measure each shape in each round, and print the least of each."""
    shapes = [(kind, shape) for kind, those in KINDS.items() for shape in those]
    shapes = [each for each in shapes if not wanted or " ".join(each) in wanted or each[0] in wanted]
    with tempfile.TemporaryDirectory(prefix="stalls-") as name:
        folder, port = Path(name), free_port()
        url = f"http://{LOOPBACK}:{port}"
        backend = Process(
            "backend", python("bench.stalls", "--backend", str(port)), env={}, folder=folder, ready_url=url
        )
        env = {"GATEWAY_BACKEND_URLS": url, "LOG_LEVEL": "ERROR", "OTEL_TRACES_EXPORTER": "none"}
        async with backend:
            print(GOALS)
            print(f"{'':26} {'p99 ms':>7} {'longest':>7} {'ms/MB':>7} {'bytes':>7} {'fetched':>7}  status")
            for kind, shape in shapes:
                least = [float("inf")] * 6
                for _ in range(rounds):
                    async with Gateway("gateway", folder, env) as gateway:
                        least = list(map(min, least, await measure(gateway, url, kind, shape)))
                p99, longest, cpu, memory, fetched, status = least
                figures = f"{p99:7.1f} {longest:7.1f} {cpu:7.1f} {memory:7.2f} {fetched:7.1f}"
                print(f"{kind + ': ' + shape:26} {figures}  {status:.0f}", flush=True)


def main() -> int:
    """Measure, or be one of the processes that take part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help="such as body, or 'answer lists'")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backend", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--ping", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.backend:
        uvloop.run(serve(options.backend))
    if options.ping:
        uvloop.run(ping(options.ping))
        return 0
    try:
        asyncio.run(run(options.shapes, options.rounds))
    except ProcessError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
