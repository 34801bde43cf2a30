"""A proxy before a model server that fails on command: the network between gateway and backend.

`FaultProxy.be` changes the network for all connections. The control API, in the mock model's form, scripts faults for
single calls: `latency`, `stall`, `cut`, `reset` and `refuse`. They mean what they mean at the mock model, except that
the proxy does not know an answer before it comes: a fault is used up by the call that it was chosen for, even if the
answer turns out to be too short for it.
"""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Self, cast

import msgspec
from aiohttp import web

from mock_model.answer import Answer
from mock_model.call import SETTLE, Call
from mock_model.control import MAX_BODY, fault_routes
from mock_model.control_guard import control_guard
from mock_model.draws import draw, fingerprint
from mock_model.faults import Count, Fault, Latency, Refuse, Reset, Stall
from mock_model.middleware import api_errors
from mock_model.script import Script
from testkit.http_messages import MAX_HEAD, PIECE, Head, NotHttp, read_head
from testkit.ports import LOOPBACK, free_port

SEED = 0
HELD = 1 << 23
"""Bytes of a request that are held back until its fault is chosen."""
LINE = 8
"""Bytes of a line of an event that tell whether it is empty, or data."""
RETRY = 0.05
"""Seconds until a port that is not free yet is tried again."""


class Network(Enum):
    """What the network does."""

    GOOD = "good"
    REFUSES = "refuses"
    """Nobody listens."""
    SWALLOWS = "swallows"
    """Connections are made, every byte on them is lost, in both directions; such a connection stays lost."""
    NO_CONNECT = "no connect"
    """Nothing answers a connect: the queue of connections is full and the kernel drops what comes."""


class Cut(Fault):
    """An answer that ends too early: after the first event, unless something else is said.

    Attributes:
        after_events: How many whole events are passed on; of an unstreamed answer half of the body.
        after_bytes: In place of it: how many bytes of the body are passed on.
        how: `end`: the HTTP answer ends properly, and only its content is cut; `reset`: by TCP RST.
    """

    kind = "cut"
    after_events: Count | None = None
    after_bytes: Count | None = None
    how: Literal["end", "reset"] = "end"

    def wrong(self) -> tuple[str, str] | None:
        """Return the one that is too much."""
        both = self.after_events is not None and self.after_bytes is not None
        return ("after_bytes", "give after_events or after_bytes, not both") if both else None


KINDS: dict[str, type[Fault]] = {fault.kind: fault for fault in (Latency, Stall, Cut, Reset, Refuse)}


class FaultProxy:
    """Passes connections on to `target` (host, port) as the network and the script of faults permit.

    Args:
        target: Host and port of the server.
        port: Where it listens; None for a free one.
        control_port: Of its control API, which is there while the proxy is entered; None for none.
        control_hosts: Further names of hosts under which the control API may be asked.

    Attributes:
        script: The faults.
        url: Where it listens.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        port: int | None = None,
        control_port: int | None = None,
        control_hosts: Iterable[str] = (),
    ) -> None:
        self.port = port or free_port()
        self.control_port = control_port
        self.url = f"http://{LOOPBACK}:{self.port}"
        self.script = Script(SEED, KINDS)
        self._target = target
        self._control_hosts = control_hosts
        self._control: web.AppRunner | None = None
        self._server: asyncio.Server | None = None
        self._lost = asyncio.Event()
        self._fillers: list[socket.socket] = []
        self._network = Network.REFUSES
        self._passing: dict[asyncio.Task[None], _Connection | None] = {}
        self._reopening: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        try:
            if self.control_port is not None:
                await self._open_control(self.control_port)
            await self.be(Network.GOOD)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def be(self, network: Network) -> None:
        """Change the network from now on."""
        if self._reopening is not None and self._reopening is not asyncio.current_task():
            self._reopening.cancel()
            self._reopening = None
        self._unblock()
        listening = network in {Network.GOOD, Network.SWALLOWS}
        if not listening:
            self._close_port()
        self._network = network
        if network is Network.SWALLOWS:
            self._lost.set()
            self._lost = asyncio.Event()
        if network is Network.NO_CONNECT:
            self._block()
        if listening and self._server is None:
            self._server = await asyncio.start_server(self._pass_on, LOOPBACK, self.port, backlog=1024, limit=MAX_HEAD)

    async def refuse(self, seconds: float) -> None:
        """Refuse connections for so long; idle ones close, calls under way go on."""
        await self.be(Network.REFUSES)
        for connection in self._passing.values():
            if connection is not None and connection.is_idle:
                connection.close()
        self._reopening = asyncio.create_task(self._reopen(seconds))

    async def close(self) -> None:
        """End everything."""
        await self.be(Network.REFUSES)
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)
        if self._control is not None:
            await self._control.cleanup()
            self._control = None

    async def _open_control(self, port: int) -> None:
        app = web.Application(middlewares=[api_errors, control_guard(self._control_hosts)], client_max_size=MAX_BODY)
        app.router.add_routes(fault_routes(self.script))
        self._control = web.AppRunner(app, access_log=None, shutdown_timeout=0.2)
        await self._control.setup()
        await web.TCPSite(self._control, LOOPBACK, port).start()

    def _close_port(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

    async def _reopen(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while True:
            with contextlib.suppress(OSError):
                return await self.be(Network.GOOD)
            await asyncio.sleep(RETRY)

    def _block(self) -> None:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, self.port))
        listener.listen(0)
        self._fillers.append(listener)
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((LOOPBACK, self.port))
            self._fillers.append(filler)

    def _unblock(self) -> None:
        for one in self._fillers:
            one.close()
        self._fillers.clear()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass on one connection, until either side closes it, a fault breaks it or the network loses it."""
        task = asyncio.current_task()
        if task is not None:
            self._passing[task] = None
            task.add_done_callback(self._passing.pop)
        lost = self._lost
        if self._network is Network.SWALLOWS:
            lost = asyncio.Event()
            lost.set()
        try:
            there = await asyncio.open_connection(*self._target, limit=MAX_HEAD)
        except OSError:
            writer.transport.abort()
            return
        connection = _Connection(self, (reader, writer), there, lost)
        if task is not None:
            self._passing[task] = connection
        with contextlib.suppress(asyncio.CancelledError):  # by `close`, which waits for it
            await connection.run()


class _Broken(Exception):
    """The connection ends with a TCP RST."""


@dataclass(frozen=True)
class _Asked:
    """What a script looks at in a call."""

    path: str
    model: str | None
    stream: bool
    fingerprint: str
    occurrence: int
    answer: Answer = field(default_factory=Answer)  # nothing is known of it: every fault suits it


class _Connection:
    """A caller's connection, and the one to the server that was made for it."""

    def __init__(
        self,
        proxy: FaultProxy,
        here: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        there: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        lost: asyncio.Event,
    ) -> None:
        self._proxy = proxy
        self._from_caller, self._to_caller = here
        self._from_server, self._to_server = there
        self._lost = lost
        self._faults: deque[tuple[bytes, Fault | None]] = deque()  # of calls that wait for their answer
        self._under_way = 0

    @property
    def is_idle(self) -> bool:
        """Whether no call is under way."""
        return not self._under_way

    def close(self) -> None:
        """Close both connections after what was sent."""
        self._to_caller.close()
        self._to_server.close()

    async def run(self) -> None:
        """Pass on calls and answers until one side ends."""
        ways = [
            asyncio.create_task(self._pass(self._calls(), self._from_caller, self._to_server)),
            asyncio.create_task(self._pass(self._answers(), self._from_server, self._to_caller)),
        ]
        try:
            done, others = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if self._lost.is_set() and others:  # neither side learns of the other's end
                await asyncio.wait(others)
            error = next((error for way in done if (error := way.exception()) is not None), None)
            if isinstance(error, _Broken):
                _reset(self._to_caller)
            elif error is None or isinstance(error, EOFError):
                self.close()
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            for writer in (self._to_caller, self._to_server):
                if not writer.is_closing():
                    writer.transport.abort()

    async def _pass(
        self, messages: Coroutine[None, None, None], source: asyncio.StreamReader, sink: asyncio.StreamWriter
    ) -> None:
        """Pass on messages; what is not HTTP goes on as it is."""
        try:
            await messages
        except NotHttp as error:
            await self._send(sink, error.data)
            while data := await source.read(PIECE):
                await self._send(sink, data)

    async def _send(self, sink: asyncio.StreamWriter, data: bytes) -> None:
        """Send; a lost connection reads on, so that the kernel sees its end, and passes on nothing."""
        if data and not self._lost.is_set():
            sink.write(data)
            await sink.drain()

    async def _calls(self) -> None:
        """Pass on calls, each as soon as it is whole, so that its fault can be chosen.

        Raises:
            _Broken: A fault breaks the connection.
        """
        while (head := await read_head(self._from_caller)) is not None:
            self._under_way += 1
            pieces = head.request_body(self._from_caller)
            body = bytearray()
            async for piece in pieces:
                body += piece
                if len(body) > HELD:
                    break
            asked = _asked(head, bytes(body), self._proxy.script)
            fault = self._proxy.script.choose(cast("Call", asked))  # a script looks at nothing else of a call
            if isinstance(fault, Refuse):
                await self._proxy.refuse(fault.seconds)
            if isinstance(fault, Refuse | Reset):
                raise _Broken
            if isinstance(fault, Latency):
                part = draw(SEED, fault.kind, asked.fingerprint, asked.occurrence)
                await asyncio.sleep(max(0.0, fault.delay + fault.jitter * (2 * part - 1)))
            self._faults.append((head.words[0], fault))
            await self._send(self._to_server, head.raw + head.frame(bytes(body)))
            async for piece in pieces:
                await self._send(self._to_server, head.frame(piece))
            await self._send(self._to_server, head.end)

    async def _answers(self) -> None:
        """Pass on answers, as far as the faults of their calls permit.

        Raises:
            _Broken: A fault breaks the connection.
            EOFError: The connection ends in the middle of an answer, the server's or the caller's by a fault.
        """
        while (head := await read_head(self._from_server)) is not None:
            if head.is_interim or not self._faults:
                await self._send(self._to_caller, head.raw)
                continue
            method, fault = self._faults.popleft()
            pieces = head.answer_body(self._from_server, method)
            if isinstance(fault, Cut | Stall):
                await self._spoil(head, pieces, fault)
            else:
                await self._send(self._to_caller, head.raw)
                async for piece in pieces:
                    await self._send(self._to_caller, head.frame(piece))
            await self._send(self._to_caller, head.end)
            self._under_way -= 1

    async def _spoil(self, head: Head, pieces: AsyncIterator[bytes], fault: Cut | Stall) -> None:
        """Pass on the beginning of an answer, and then what the fault says; or the whole, if it is too short for it."""
        place = _place(head, fault)
        ends_well = isinstance(fault, Cut) and fault.how == "end"
        await self._send(self._to_caller, _closing(head, place) if ends_well else head.raw)
        reached = place.within(b"")
        while reached is None:
            piece = await anext(pieces, None)
            if piece is None:
                return
            reached = place.within(piece)
            await self._send(self._to_caller, head.frame(piece[:reached]))
        if isinstance(fault, Stall):
            await asyncio.Event().wait()  # until the caller leaves
        if ends_well:
            await self._send(self._to_caller, head.end)
            raise EOFError
        await asyncio.sleep(SETTLE)
        raise _Broken


class _AfterBytes:
    """A place in a body, so many bytes after its beginning."""

    def __init__(self, count: int) -> None:
        self.left = count

    def within(self, piece: bytes) -> int | None:
        """Return where in the next piece it is; None: further on."""
        if self.left <= len(piece):
            return self.left
        self.left -= len(piece)
        return None


class _AfterEvents:
    """A place in an event stream, after so many events; comments are none."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._line = b""
        self._has_data = False

    def within(self, piece: bytes) -> int | None:
        """Return where in the next piece it is; None: further on."""
        position = 0
        while self._left and (end := piece.find(b"\n", position)) >= 0:
            line = (self._line + piece[position : min(end, position + LINE)]).rstrip(b"\r")
            self._line, position = b"", end + 1
            if line:
                self._has_data |= line.startswith(b"data")
            elif self._has_data:
                self._left -= 1
                self._has_data = False
        if not self._left:
            return position
        self._line = (self._line + piece[position : position + LINE])[:LINE]
        return None


def _place(head: Head, fault: Cut | Stall) -> _AfterBytes | _AfterEvents:
    """Return where in the body of an answer the fault begins."""
    if isinstance(fault, Cut) and fault.after_bytes is not None:
        return _AfterBytes(fault.after_bytes)
    if head.is_event_stream:
        return _AfterEvents(1 if fault.after_events is None else fault.after_events)
    return _AfterBytes(1 if head.length is None else head.length // 2)  # the first byte where half is not known


def _closing(head: Head, place: _AfterBytes | _AfterEvents) -> bytes:
    """Return the head of an answer that ends properly at that place."""
    if head.length is None or not isinstance(place, _AfterBytes):
        return head.closing(None)
    return head.closing(min(place.left, head.length))


def _asked(head: Head, body: bytes, script: Script) -> _Asked:
    """Read what a call asks for, and count it."""
    fields: dict[str, object] = {}
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        fields = msgspec.json.decode(body, type=dict[str, object])
    model, mark = fields.get("model"), fingerprint(head.path, body)
    named = model if isinstance(model, str) else None
    return _Asked(head.path, named, fields.get("stream") is True, mark, script.count(mark))


def _reset(writer: asyncio.StreamWriter) -> None:
    """Break a connection with a TCP RST."""
    connection: socket.socket | None = writer.get_extra_info("socket")
    if connection is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
