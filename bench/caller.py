"""The load generator: a process of its own, on raw sockets, cheap enough to share a core with the backend.

`python -m bench.caller` is a worker (`testkit.workers`): its order is a `Spec`, its result a `Tally`. It is not the
load of `testkit.load`, which checks every answer and needs ten times as much CPU per call.
"""

import asyncio
import random
import re
from time import monotonic, monotonic_ns
from typing import Literal, cast

import msgspec
import uvloop

from testkit.quantiles import median_and_p99
from testkit.workers import ordered, report

TOKEN = b" a token @"
_STAMP = re.compile(rb"@(\d+)@")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
PROMPT = (
    "You are a helpful assistant that answers briefly and precisely. Always be kind and never make things up; say so "
    "when you do not know. Tell me about the history of the city of Vienna in three sentences, please, and about two "
    "museums that I should see when I am there for a weekend with two children of eight and eleven years. "
)
LAST_CALLS = 60.0
"""Seconds that calls under way may still take once the time is over."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What to do.

    Attributes:
        mode: `load`: `connections` callers, each with one call after the other, for `seconds`;
            `once`: each of `connections` makes one call, started over `ramp` seconds;
            `paired`: one caller, `calls` times one call to each port, in random order;
            `hold`: as `once`, then the connections stay open until the worker is to finish.
        ports: where to; all but `paired` use the first only.
        seconds: of load.
        connections: callers.
        calls: rounds of `paired`.
        ramp: seconds.
        stream: streamed answers.
        events: `max_tokens` of the request: content events of a stream, or characters of an answer.
        pause: milliseconds between two events.
        prompt: bytes of the prompt.
        headers: further ones, for each port.
    """

    mode: Literal["load", "once", "paired", "hold"]
    ports: list[int] = []
    seconds: float = 0.0
    connections: int = 1
    calls: int = 0
    ramp: float = 0.0
    stream: bool = False
    events: int | None = None
    pause: int | None = None
    prompt: int = 400
    headers: list[dict[str, str]] = []


class Tally(msgspec.Struct, kw_only=True):
    """What came of it; times in milliseconds.

    Attributes:
        calls: that ended well.
        failed: that did not: another status, too few events, a cut.
        seconds: from the first call to the end of the last that counts.
        events: content events.
        reads: socket reads with at least a part of an event.
        p50: of the time of a call; to the first token in a stream.
        p99: the same.
        lag_p50: how late an event came, from the backend's write to the caller's read.
        lag_p99: the same.
        pairs: of `paired`: for each port, the time of each call, in rounds.
        problem: what went wrong first.
    """

    calls: int = 0
    failed: int = 0
    seconds: float = 0.0
    events: int = 0
    reads: int = 0
    p50: float = 0.0
    p99: float = 0.0
    lag_p50: float = 0.0
    lag_p99: float = 0.0
    pairs: list[list[float]] = []
    problem: str = ""


class Lost(Exception):
    """A call did not end well."""


class Caller(asyncio.Protocol):
    """One connection that makes one call at a time."""

    def __init__(self, spec: Spec, request: bytes, tally: Tally, lags: list[int]) -> None:
        self._spec = spec
        self._request = request
        self._tally = tally
        self._lags = lags
        self._transport: asyncio.Transport
        self._ended: asyncio.Future[float] | None = None
        self._head: bytes | None = b""
        self._left = 0
        self._tail = b""
        self._last = b""
        self._events = 0
        self._started = 0.0
        self._first = 0.0

    async def call(self) -> float:
        """Make a call; return the seconds it took, or those to the first token of a stream.

        Raises:
            Lost: it did not end well.
        """
        self._head, self._tail, self._last, self._left, self._events, self._first = b"", b"", b"", -1, 0, 0.0
        self._ended = asyncio.get_running_loop().create_future()
        self._started = monotonic()
        self._transport.write(self._request)
        return await self._ended

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give up the call under way."""
        self._lose(f"the connection was lost: {exc}")

    def data_received(self, data: bytes) -> None:
        """Take a part of the answer."""
        if self._head is not None:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            head, data = self._head[: end + 4], self._head[end + 4 :]
            self._head = None
            if not head.startswith(b"HTTP/1.1 200"):
                self._lose(head.decode(errors="replace") + data.decode(errors="replace"))
                self._transport.abort()
                return
            length = _LENGTH.search(head)
            self._left = int(length[1]) if length else -1
        if self._spec.stream:
            self._look_at_events(data)
        if self._left >= 0:
            self._left -= len(data)
            if self._left <= 0:
                self._end()
        else:
            self._last = (self._last + data)[-7:] if len(data) < 7 else data[-7:]
            if self._last == b"\r\n0\r\n\r\n":
                self._end()

    def _look_at_events(self, data: bytes) -> None:
        """Count content events, even one that two reads cut apart."""
        joined = self._tail + data
        count = joined.count(TOKEN)
        self._tail = joined[1 - len(TOKEN) :]
        if count:
            if not self._events:
                self._first = monotonic()
            self._events += count
            self._tally.reads += 1
            if self._spec.pause:
                now = monotonic_ns()
                self._lags.extend([now - int(stamp) for stamp in _STAMP.findall(data)])

    def _end(self) -> None:
        now = monotonic()
        if self._ended is None or self._ended.done():
            return
        if self._spec.stream:
            self._tally.events += self._events
            if self._events != self._spec.events:
                self._lose(f"{self._events} of {self._spec.events} events came")
                return
        self._ended.set_result((self._first or now) - self._started)

    def _lose(self, why: str) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(Lost(why))


class Callers:
    """All connections of a process."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.tally = Tally()
        self.times: list[float] = []
        self._lags: list[int] = []

    async def connect(self, port: int) -> Caller:
        """Open a new connection."""
        headers = dict(zip(self.spec.ports, self.spec.headers, strict=False)).get(port, {})
        content = request(self.spec, headers)
        _, caller = await asyncio.get_running_loop().create_connection(
            lambda: Caller(self.spec, content, self.tally, self._lags), "127.0.0.1", port
        )
        return caller

    async def load(self) -> None:
        """Make one call after the other on each connection until the time is over."""
        callers = [await self.connect(self.spec.ports[0]) for _ in range(self.spec.connections)]
        start = monotonic()
        end = start + self.spec.seconds

        async def loop(caller: Caller) -> None:
            while monotonic() < end:
                took = await self._one(caller)
                if took is None:
                    caller = await self.connect(self.spec.ports[0])
                elif monotonic() <= end:
                    self.times.append(took)
                    self.tally.calls += 1

        await asyncio.wait_for(asyncio.gather(*map(loop, callers)), self.spec.seconds + LAST_CALLS)
        self.tally.seconds = self.spec.seconds

    async def once(self) -> None:
        """Make one call on each connection, and leave it open."""
        start = monotonic()
        spec = self.spec

        async def one(number: int) -> None:
            await asyncio.sleep(spec.ramp * number / spec.connections)
            caller = await self.connect(spec.ports[0])
            took = await self._one(caller)
            if took is not None:
                self.times.append(took)
                self.tally.calls += 1

        await asyncio.wait_for(asyncio.gather(*map(one, range(spec.connections))), LAST_CALLS + spec.ramp)
        self.tally.seconds = monotonic() - start

    async def paired(self) -> None:
        """Make one call to each port in each round: what moves all of them cancels out."""
        callers = [await self.connect(port) for port in self.spec.ports]
        for caller in callers:
            for _ in range(20):
                await caller.call()
        rounds = []
        start = monotonic()
        for _ in range(self.spec.calls):
            order = random.sample(range(len(callers)), len(callers))
            times = {number: await callers[number].call() * 1000 for number in order}
            rounds.append([times[number] for number in range(len(callers))])
        self.tally.calls = self.spec.calls * len(callers)
        self.tally.seconds = monotonic() - start
        self.tally.pairs = [list(times) for times in zip(*rounds, strict=True)]

    async def _one(self, caller: Caller) -> float | None:
        try:
            return await caller.call()
        except Lost as error:
            self.tally.failed += 1
            self.tally.problem = self.tally.problem or str(error)
            return None

    def finish(self) -> Tally:
        """Return the tally, with its percentiles."""
        self.tally.p50, self.tally.p99 = median_and_p99([took * 1000 for took in self.times])
        self.tally.lag_p50, self.tally.lag_p99 = median_and_p99([lag / 1e6 for lag in self._lags])
        return self.tally


def body(spec: Spec) -> bytes:
    """Return the body of a call."""
    document: dict[str, object] = {"model": "demo-model", "temperature": 0.5}
    if spec.stream:
        document["stream"] = True
    if spec.events is not None:
        document["max_tokens"] = spec.events
    if spec.pause is not None:
        document["seed"] = spec.pause
    text = (PROMPT * (spec.prompt // len(PROMPT) + 1))[: spec.prompt]
    document["messages"] = [{"role": "user", "content": text}]
    return msgspec.json.encode(document)


def request(spec: Spec, headers: dict[str, str]) -> bytes:
    """Return the bytes of a call."""
    content = body(spec)
    lines = {"host": "127.0.0.1", "content-type": "application/json", "content-length": str(len(content))} | headers
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"POST /v1/chat/completions HTTP/1.1\r\n{head}\r\n".encode() + content


async def main() -> None:
    """Do what the order says, and report what came of it."""
    async with ordered() as (order, finish):
        callers = Callers(msgspec.json.decode(order, type=Spec))
        if callers.spec.mode == "hold":
            await callers.once()
            report()
            await finish.wait()
        else:
            report()
            await {"load": callers.load, "once": callers.once, "paired": callers.paired}[callers.spec.mode]()
        report(msgspec.json.encode(callers.finish()))


if __name__ == "__main__":
    uvloop.run(main())
