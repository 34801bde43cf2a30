"""Listening, and a stop that loses nothing."""

import asyncio
import gc
import logging
import select
import signal
import socket
from contextlib import suppress
from errno import EADDRNOTAVAIL, EAFNOSUPPORT
from typing import TYPE_CHECKING

from gateway import __version__
from gateway.server.aiohttp_protocol import LAST_ANSWERS, Protocol, Runner

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.policy.admission import Admission
    from gateway.server.connections import Connections
    from gateway.server.in_flight import InFlight
    from gateway.settings import Settings
    from gateway.workers.worker import Worker

BACKLOG = 1024
"""Connections that the system holds until they are accepted."""
AT_ONCE = 128
"""Connections accepted in one turn of the event loop; the next ones follow in the next turn."""
PAUSE = 0.05
"""Seconds until connections are accepted again where there is neither a place nor a descriptor for them."""
QUIET = 60.0
"""Seconds between two warnings that there is no descriptor."""
EVERYWHERE = "::"
"""The address that stands for all of both families."""
GC_THRESHOLD = 50_000
"""Allocations between two collections of the youngest generation; the default of 700 costs more than it frees here."""

_log = logging.getLogger("gateway")


class Listener:
    """Accepts the connections of callers, all that wait in each turn of the event loop.

    libuv, under uvloop, accepts one in a turn (https://github.com/libuv/libuv/pull/3696): with busy turns of 50 ms the
    last of a hundred new callers would wait for 5 s. And where it runs out of descriptors it drops all that wait.

    Args:
        runner: of the app; makes the protocol of a connection.
        connections: says whether there is a place for one.
    """

    def __init__(self, runner: Runner, connections: "Connections") -> None:
        self._runner = runner
        self._connections = connections
        self._sockets: list[socket.socket] = []
        self._opening: set[asyncio.Task[None]] = set()
        self._pausing: dict[socket.socket, asyncio.TimerHandle] = {}
        self._quiet_until = 0.0

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self._sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self, sockets: list[socket.socket]) -> None:
        """Accept from sockets that listen, and close them in the end."""
        self._sockets = sockets
        for listening in self._sockets:
            self._accept_from(listening)

    async def step_aside(self) -> None:
        """Accept those who wait, and no more: others have the port from now on."""
        for listening in self._sockets:
            self._accept(listening)
        await self.close()

    async def close(self) -> None:
        """Accept no more; what has been accepted is served."""
        loop = asyncio.get_running_loop()
        for timer in self._pausing.values():
            timer.cancel()
        for listening in self._sockets:
            loop.remove_reader(listening)
            listening.close()
        self._sockets = []
        if self._opening:
            await asyncio.wait(self._opening)

    def _accept_from(self, listening: socket.socket) -> None:
        self._pausing.pop(listening, None)
        asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(AT_ONCE):
            if not somebody_waits(listening):
                return
            if not self._connections.make_room():
                self._pause(listening)
                return
            try:
                connection, _address = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):  # the caller has left
                continue
            except OSError as error:  # no descriptor, or no memory
                self._pause(listening)
                self._connections.close_idlest()
                self._warn(error)
                return
            connection.setblocking(False)
            self._open(connection)

    def _open(self, connection: socket.socket) -> None:
        """Hand an accepted connection to the event loop."""
        protocol = self._runner.new_protocol()
        self._connections.add(protocol)
        opening = asyncio.get_running_loop().create_task(self._serve(connection, protocol))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _serve(self, connection: socket.socket, protocol: Protocol) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: protocol, connection)
        except OSError:  # the caller has left
            self._connections.remove(protocol)
            connection.close()

    def _pause(self, listening: socket.socket) -> None:
        """Let callers wait for a moment; to ask again at once would only keep the event loop busy."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        self._pausing[listening] = loop.call_later(PAUSE, self._accept_from, listening)

    def _warn(self, error: OSError) -> None:
        now = asyncio.get_running_loop().time()
        if now >= self._quiet_until:
            self._quiet_until = now + QUIET
            _log.warning("a new connection could not be accepted: %s", error.strerror)


def somebody_waits(listening: socket.socket) -> bool:
    """Return whether a connection can be accepted."""
    poll = select.poll()
    poll.register(listening, select.POLLIN)
    return bool(poll.poll(0))


def listening_sockets(host: str, port: int, *, shared: bool = False) -> list[socket.socket]:
    """Return a socket that listens on each address of a host; at `::` one for IPv4 too.

    An address of a name that this machine does not have, as `localhost` in IPv6, is left out if there is another.

    Args:
        host: an address, or a name.
        port: 0 for any that is free.
        shared: whether others like these may listen there too; the system spreads new connections over them.

    Raises:
        OSError: the host is unknown, or the port is not available on one of its addresses.
    """
    if host == EVERYWHERE:
        return [listening_socket((host, port), socket.AF_INET6, shared=shared, dualstack_ipv6=True)]
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    for family, address in dict.fromkeys((family, address) for family, _, _, _, address in found):
        try:
            sockets.append(listening_socket(address, family, shared=shared))
        except OSError as error:
            if error.errno in {EADDRNOTAVAIL, EAFNOSUPPORT}:
                absent = error
                continue
            for listening in sockets:
                listening.close()
            raise
    if absent is not None and not sockets:
        raise absent
    return sockets


def held_sockets(host: str, port: int) -> list[socket.socket]:
    """Return sockets that listen no more, but hold a port: `listening_sockets` that are shared may listen there.

    Nobody else can have the port while they are open, and no connection comes to them.

    Args:
        host: an address, or a name.
        port: 0 for any that is free.

    Raises:
        OSError: the host is unknown, or the port is not available on one of its addresses.
    """
    if not port:
        with listening_sockets(host, port)[0] as found:  # one that the system has chosen is not held after `shutdown`
            port = found.getsockname()[1]
    holding = listening_sockets(host, port)
    for each in holding:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
        each.shutdown(socket.SHUT_RD)
    return holding


def listening_socket(
    address: "tuple[object, ...]", family: int, *, shared: bool, dualstack_ipv6: bool = False
) -> socket.socket:
    """Return a socket that listens on an address. Raises: OSError."""
    listening = socket.create_server(
        address, family=family, backlog=BACKLOG, reuse_port=shared, dualstack_ipv6=dualstack_ipv6
    )
    listening.setblocking(False)
    return listening


async def listen(
    runner: Runner,
    settings: "Settings",
    *,
    admission: "Admission",
    connections: "Connections",
    in_flight: "InFlight",
    replicas: int,
    needs_keys: bool,
    reload: "Callable[[], None]",
    worker: "Worker | None" = None,
) -> None:
    """Serve until SIGTERM or SIGINT and the delay after it, then drain.

    Args:
        runner: of the app.
        settings: host, port, delay and grace.
        admission: refuses new requests while draining.
        connections: of callers.
        in_flight: the requests to wait for.
        replicas: how many there are, for the log.
        needs_keys: whether the gateway asks for keys, for the log.
        reload: called on SIGHUP.
        worker: gives the sockets that listen, none where all stop already; None: they are opened here.

    Raises:
        OSError: the port is not available.
    """
    stop = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())
    loop.add_signal_handler(signal.SIGHUP, reload)
    await runner.setup()
    listener = Listener(runner, connections)
    try:
        sockets = await worker.take_sockets() if worker else listening_sockets(settings.host, settings.port)
        if not sockets:
            return
        listener.start(sockets)
        keys = "gateway keys are required" if needs_keys else "no gateway keys: open to everybody"
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 20, 20)
        _log.info("gateway %s listens on %s, %d backend replica(s), %s", __version__, listener.url, replicas, keys)
        wanted = settings.gateway_max_connections
        if wanted is not None and wanted > connections.limit:
            _log.warning(
                "GATEWAY_MAX_CONNECTIONS is %d; the limit of open files allows %d: raise it (ulimit -n)",
                wanted,
                connections.limit,
            )
        await stop.wait()
        if worker is not None and await worker.leave():
            await listener.step_aside()
        await step_back(admission, settings.gateway_shutdown_delay, hurry)
        await drain(admission, in_flight, settings.gateway_shutdown_grace, hurry)
        connections.abort_untaken()
    finally:
        await listener.close()
        await runner.cleanup()
    _log.info("stopped")


async def step_back(admission: "Admission", delay: float, hurry: asyncio.Event) -> None:
    """Serve on for a while, not ready for more: whoever sends requests here goes elsewhere before any is refused.

    Args:
        admission: told that the gateway will stop.
        delay: seconds.
        hurry: ends the delay at once when set.
    """
    admission.announce_stop()
    if delay:
        _log.info("stopping in %g s: /readyz says so, requests are still taken", delay)
        with suppress(TimeoutError):
            async with asyncio.timeout(delay):
                await hurry.wait()


async def drain(admission: "Admission", in_flight: "InFlight", grace: float, hurry: asyncio.Event) -> None:
    """Let the requests in flight finish while the listener stays open; cut off what is left after `grace`.

    Args:
        admission: refuses new requests from now on.
        in_flight: the requests.
        grace: seconds.
        hurry: ends the grace at once when set (by a second signal).
    """
    admission.drain()
    _log.info("stopping: %d request(s) in flight, at most %g s", len(in_flight), grace)
    waiting = asyncio.create_task(in_flight.wait(grace))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait({waiting, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    for task in (waiting, hurrying):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    if len(in_flight):
        _log.warning("%d request(s) cut off at the end of the grace", len(in_flight))
        in_flight.cut_off()
        await in_flight.wait(LAST_ANSWERS)
