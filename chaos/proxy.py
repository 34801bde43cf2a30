"""A TCP proxy before a backend: the network between gateway and backend, and how it fails."""

import asyncio
import socket
from enum import Enum

from testkit.ports import LOOPBACK, free_port


class Network(Enum):
    """What the network does."""

    GOOD = "good"
    REFUSES = "refuses"
    """Nobody listens."""
    SWALLOWS = "swallows"
    """Connections are made, every byte on them is lost, in both directions; such a connection stays lost."""
    NO_CONNECT = "no connect"
    """Nothing answers a connect: the queue of connections is full and the kernel drops what comes."""


class Proxy:
    """Passes connections on to `target` (host, port) as the network permits."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.port = free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        self._target = target
        self._server: asyncio.Server | None = None
        self._lost = asyncio.Event()
        self._fillers: list[socket.socket] = []
        self._network = Network.REFUSES
        self._passing: set[asyncio.Task[None]] = set()

    async def be(self, network: Network) -> None:
        """Change the network from now on."""
        self._unblock()
        listening = network in {Network.GOOD, Network.SWALLOWS}
        if not listening:
            await self._close()
        self._network = network
        if network is Network.SWALLOWS:
            self._lost.set()
            self._lost = asyncio.Event()
        if network is Network.NO_CONNECT:
            self._block()
        if listening and self._server is None:
            self._server = await asyncio.start_server(self._pass_on, LOOPBACK, self.port, backlog=1024)

    async def close(self) -> None:
        """End everything."""
        await self.be(Network.REFUSES)
        for task in self._passing:
            task.cancel()
        await asyncio.gather(*self._passing, return_exceptions=True)

    async def _close(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()

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
        """Pass on one connection, until either side closes it or the network loses it."""
        task = asyncio.current_task()
        if task is not None:
            self._passing.add(task)
            task.add_done_callback(self._passing.discard)
        lost = self._lost
        if self._network is Network.SWALLOWS:
            lost = asyncio.Event()
            lost.set()
        try:
            there_reader, there_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        try:
            pumps = [
                asyncio.create_task(_pump(reader, there_writer, lost)),
                asyncio.create_task(_pump(there_reader, writer, lost)),
            ]
            await asyncio.wait(pumps)
        except asyncio.CancelledError:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            writer.transport.abort()
            there_writer.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, lost: asyncio.Event) -> None:
    """Pass on one direction. A lost connection reads on, so that the kernel sees its end, and passes on nothing."""
    try:
        while data := await source.read(65_536):
            if not lost.is_set():
                sink.write(data)
                await sink.drain()
    except OSError:
        if not lost.is_set():
            sink.transport.abort()
    else:
        if not lost.is_set():
            sink.close()
