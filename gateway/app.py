"""The application: what there is, how it hangs together, and in which order it starts and stops."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.backend.client import HttpClient
from gateway.dialects.requests import PATHS
from gateway.forwarding.forwarder import Forwarder
from gateway.health import Health
from gateway.policy.admission import Admission, Memory
from gateway.policy.pool import Pool
from gateway.server.handlers import Handlers
from gateway.server.in_flight import Running

if TYPE_CHECKING:
    from gateway.config import Routing
    from gateway.policy.breaker import State
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry


class Parts:
    """The parts that a server needs of a running application.

    Attributes:
        admission: told to drain when the server stops.
        memory: the bytes held for all requests.
        running: the requests under way.
        handlers: the HTTP face.
        pool: the replicas and routes.
        telemetry: traces, metrics, logs.
    """

    def __init__(self, settings: "Settings", routing: "Routing", telemetry: "Telemetry") -> None:
        self.settings = settings
        self.telemetry = telemetry
        metrics = telemetry.metrics
        self.running = Running()
        self.admission = Admission(
            max_in_flight=settings.gateway_max_in_flight,
            max_queue=settings.gateway_max_queue,
            queue_timeout=settings.gateway_queue_timeout,
        )
        self.memory = Memory(settings.gateway_max_buffered_bytes)
        self.pool = Pool(routing, settings, monotonic, self._breaker_changed)
        self.client = HttpClient(connect_timeout=settings.gateway_connect_timeout)
        forwarder = Forwarder(
            settings,
            client=self.client,
            admission=self.admission,
            clock=monotonic,
            retries_allowed=metrics.retry_allowed,
            retries_refused=metrics.retry_refused,
        )
        self.health = Health(
            settings, pool=self.pool, client=self.client, admission=self.admission, telemetry=telemetry
        )
        self.handlers = Handlers(
            settings,
            pool=self.pool,
            admission=self.admission,
            memory=self.memory,
            forwarder=forwarder,
            health=self.health,
            telemetry=telemetry,
            running=self.running,
        )
        metrics.watch(self.pool, self.admission, self.memory)

    def _breaker_changed(self, backend: str, old: "State", new: "State") -> None:
        self.telemetry.breaker_changed(backend, old, new)
        self.health.breaker_changed(backend, new)


PARTS = web.AppKey("parts", Parts)


def create_app(settings: "Settings", routing: "Routing", telemetry: "Telemetry") -> web.Application:
    """The gateway as an aiohttp application; run it with `gateway.server.listener.Runner`."""
    parts = Parts(settings, routing, telemetry)
    face = parts.handlers
    app = web.Application(middlewares=[face.plain], client_max_size=settings.gateway_max_body_bytes)
    app[PARTS] = parts
    for path in PATHS:
        app.router.add_post(path, face.prompt, expect_handler=_expect)
    for path, handler in (
        ("/v1/models", face.models),
        ("/v1/models/{id:.+}", face.model),
        ("/", face.root),
        ("/health", face.health),
        ("/livez", face.livez),
        ("/readyz", face.readyz),
        ("/metrics", face.metrics),
    ):
        app.router.add_get(path, handler, expect_handler=_expect)
    app.router.add_route("*", "/{path:.*}", face.elsewhere, expect_handler=_expect)
    app.cleanup_ctx.append(_running_parts)
    return app


async def _running_parts(app: web.Application) -> AsyncIterator[None]:
    """Start: telemetry, client, probes. Stop: the reverse; telemetry last, so that nothing it should tell is lost."""
    parts = app[PARTS]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(parts.telemetry)
        await stack.enter_async_context(parts.client)
        await stack.enter_async_context(parts.health)
        yield


async def _expect(_request: web.Request) -> None:
    """`Expect: 100-continue` is answered when the body is read: after the key, the limits and the media type."""
