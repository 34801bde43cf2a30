"""The server: malformed HTTP in our envelope, and a stop that loses nothing."""

import asyncio
import gc
import logging
import resource
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler, _ErrInfo

from gateway import __version__
from gateway.app import PARTS
from gateway.dialects.requests import PATHS
from gateway.errors import HeadersTooLarge, InternalError, InvalidRequest, let_go

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.app import Parts
    from gateway.errors import GatewayError
    from gateway.server.in_flight import Running
    from gateway.settings import Settings

    Unserved = Callable[[GatewayError, BaseException | None], web.Response]

LAST_WORDS = 1.0
"""Seconds that requests cut off at the end of the grace get for their typed error."""
FIRST_REQUEST = 30.0
"""Seconds a new connection may take until its first request line and headers are there."""
GC_THRESHOLD = 50_000
"""Allocations between two looks of the youngest generation; the default of 700 costs more than it frees here."""

_log = logging.getLogger("gateway")


class Protocol(RequestHandler):
    """One connection. aiohttp answers what its parser refuses below the middlewares, in text, quoting the caller."""

    def __init__(self, *args: Any, unserved: "Unserved", running: "Running", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(*args, **kwargs)
        self._unserved = unserved
        self._running = running
        self._impatience: asyncio.TimerHandle | None = None
        self._connection: asyncio.Transport | None = None  # as `transport`, which aiohttp forgets when it closes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A connection that never sends a whole request is closed."""
        super().connection_made(transport)
        self._connection = self.transport
        if self._connection is not None:
            self._running.connected(self._connection)
        self._impatience = asyncio.get_running_loop().call_later(FIRST_REQUEST, self._close_if_silent)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Also ends its timer."""
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None
        if self._connection is not None:
            self._running.disconnected(self._connection)
            self._connection = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Also tells whoever waits for a body that its chunks turned malformed; aiohttp would let it wait on."""
        super().data_received(data)
        messages, request = self._messages, self._current_request
        if not messages or request is None or request.content.is_eof():
            return
        malformed = messages[-1][0]
        if isinstance(malformed, _ErrInfo):
            messages.pop()
            let_go(malformed.exc)
            request.content.set_exception(web.RequestPayloadError("malformed"))
            request.content.feed_eof()
            self.close()

    async def _drain_helper(self) -> None:
        """Of a writer who was cancelled aiohttp keeps what it waited for: whoever waits next would be cancelled too."""
        if self._drain_waiter is not None and self._drain_waiter.cancelled():
            self._drain_waiter = None
        await super()._drain_helper()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Our envelope for what is no HTTP; the parameters are aiohttp's, `message` quotes the caller's bytes."""
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is on its way already")
        error: GatewayError = InvalidRequest("The request is malformed HTTP.")
        if status >= 500:  # noqa: PLR2004
            error = InternalError("The gateway failed; look for the trace id in its log.")
        elif isinstance(exc, LineTooLong) or (message or "").startswith("Too many "):
            error = HeadersTooLarge("The request line or the headers are too large.")
        answer = self._unserved(error, exc)
        if exc is not None:
            let_go(exc)
        return answer

    def _close_if_silent(self) -> None:
        if self._request_count == 0 and self.transport is not None:
            self.transport.close()


class Server(web.Server):
    """Makes one `Protocol` per connection."""

    def __init__(self, handler: Any, *, unserved: "Unserved", running: "Running", **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(handler, **kwargs)
        self._unserved = unserved
        self._running = running

    def __call__(self) -> Protocol:
        """The protocol of a new connection."""
        return Protocol(self, loop=self._loop, unserved=self._unserved, running=self._running, **self._kwargs)


class Runner(web.AppRunner):
    """aiohttp's runner with our protocol: a caller who leaves cancels its request, no access log of aiohttp's."""

    def __init__(self, app: web.Application) -> None:
        super().__init__(
            app,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            shutdown_timeout=LAST_WORDS,
            lingering_time=1.0,
        )

    async def _make_server(self) -> web.Server:
        server = await super()._make_server()
        face, by_router = self.app[PARTS].handlers, server.request_handler

        def handle(request: web.BaseRequest) -> "Awaitable[web.StreamResponse]":
            """Prompts past aiohttp's router and middlewares, which would find the same 6 us later (bench/README.md)."""
            if isinstance(request, web.Request) and request.method == "POST" and request.rel_url.path_safe in PATHS:
                return face.explain(request, face.prompt)
            return by_router(request)

        return Server(
            handle,
            request_factory=server.request_factory,
            unserved=face.unserved,
            running=self.app[PARTS].running,
            handler_cancellation=server.handler_cancellation,
            loop=asyncio.get_running_loop(),
            **server._kwargs,  # noqa: SLF001 - aiohttp offers no other way to a protocol of one's own
        )


async def serve(app: web.Application, settings: "Settings") -> None:
    """Serve until SIGTERM or SIGINT, then drain.

    Raises:
        OSError: the port cannot be had.
    """
    raise_open_files()
    parts = app[PARTS]
    stop = asyncio.Event()
    second = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: second.set() if stop.is_set() else stop.set())
    runner = Runner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, settings.host, settings.port, backlog=1024)
        await site.start()
        asks = "gateway keys asked for" if settings.gateway_api_keys else "open to everybody: no gateway keys"
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, 20, 20)
        _log.info("gateway %s listens on %s, %d backend(s), %s", __version__, site.name, len(parts.pool.replicas), asks)
        await stop.wait()
        await drain(parts, settings.gateway_shutdown_grace, second)
    finally:
        await runner.cleanup()
    _log.info("stopped")


async def drain(parts: "Parts", grace: float, hurry: asyncio.Event) -> None:
    """Let the requests under way finish while the listener stays open; what is left after `grace` seconds is cut off.

    Args:
        parts: of the application that stops.
        grace: seconds.
        hurry: set by a second signal: ends the grace at once.
    """
    parts.admission.drain()
    _log.info("stopping: %d request(s) under way, at most %g s", len(parts.running), grace)
    waiting = asyncio.create_task(parts.running.wait(grace))
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait({waiting, hurrying}, return_when=asyncio.FIRST_COMPLETED)
    for task in (waiting, hurrying):
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
    if len(parts.running):
        _log.warning("%d request(s) cut off at the end of the grace", len(parts.running))
        parts.running.cut_off()
        await parts.running.wait(LAST_WORDS)


def raise_open_files() -> None:
    """Each request takes two sockets: raise the soft limit of open files to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
