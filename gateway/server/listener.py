"""Listening, and a stop that loses nothing."""

import asyncio
import gc
import logging
import resource
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from aiohttp import web

from gateway import __version__
from gateway.server.aiohttp_protocol import LAST_ANSWERS, Runner

if TYPE_CHECKING:
    from gateway.policy.admission import Admission
    from gateway.server.in_flight import InFlight
    from gateway.settings import Settings

BACKLOG = 1024
"""Connections that the system holds until they are accepted."""
EVERYWHERE = "::"
"""The address that stands for all of both families."""
GC_THRESHOLD = 50_000
"""Allocations between two collections of the youngest generation; the default of 700 costs more than it frees here."""

_log = logging.getLogger("gateway")


async def listen(
    runner: Runner, settings: "Settings", *, admission: "Admission", in_flight: "InFlight", replicas: int
) -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Args:
        runner: of the app.
        settings: host, port and grace.
        admission: refuses new requests while draining.
        in_flight: the requests to wait for.
        replicas: how many there are, for the log.

    Raises:
        OSError: the port is not available.
    """
    raise_open_files()
    stop = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurry.set() if stop.is_set() else stop.set())
    loop.add_signal_handler(
        signal.SIGHUP, _log.warning, "SIGHUP is ignored: settings are read at the start only; restart to change them"
    )
    await runner.setup()
    try:
        site = site_of(runner, settings.host, settings.port)
        await site.start()
        keys = "gateway keys are required" if settings.gateway_api_keys else "no gateway keys: open to everybody"
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 20, 20)
        _log.info("gateway %s listens on %s, %d backend replica(s), %s", __version__, site.name, replicas, keys)
        await stop.wait()
        await drain(admission, in_flight, settings.gateway_shutdown_grace, hurry)
    finally:
        await runner.cleanup()
    _log.info("stopped")


def site_of(runner: web.BaseRunner, host: str, port: int) -> web.BaseSite:
    """Return where to listen; at `::` for IPv4 too, which asyncio would refuse.

    Raises:
        OSError: `::` is not available.
    """
    if host != EVERYWHERE:
        return web.TCPSite(runner, host, port, backlog=BACKLOG)
    listening = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listening.bind((host, port))
    except OSError:
        listening.close()
        raise
    return web.SockSite(runner, listening, backlog=BACKLOG)


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


def raise_open_files() -> None:
    """Raise the soft limit of open files to the hard one: each request takes two sockets."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
