"""The application: its routes, and the order in which its parts start and stop."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial
from random import Random
from time import monotonic, time
from typing import TYPE_CHECKING

from aiohttp import web

from gateway.backend.client import HttpClient
from gateway.config import load_routing
from gateway.dialects.model_list import MODELS
from gateway.dialects.openai.stored_responses import CANCEL, RESPONSE
from gateway.dialects.table import BY_PATH
from gateway.files import Files
from gateway.parts import Parts
from gateway.server.aiohttp_protocol import Runner
from gateway.server.paths import forms_of
from gateway.workers.answers import Answers

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from gateway.config import Routing
    from gateway.reload import Read
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry
    from gateway.workers.worker import Worker


PARTS = web.AppKey("parts", Parts)


def create_app(
    settings: "Settings",
    routing: "Routing",
    telemetry: "Telemetry",
    *,
    read: "Read | None" = None,
    files: Files | None = None,
    client: HttpClient | None = None,
    clock: "Callable[[], float]" = monotonic,
    wall_clock: "Callable[[], float]" = time,
    rng: Random | None = None,
    worker: "Worker | None" = None,
) -> web.Application:
    """Return the gateway as an aiohttp application; `runner_of` runs it.

    Args:
        settings: of the gateway.
        routing: backends and routes.
        telemetry: traces, metrics, logs.
        read: reads backends and routes anew; None: of the same settings.
        files: those that they were read from, which are watched; None: none is.
        client: sends calls to backends.
        clock: seconds, monotonic.
        wall_clock: seconds since the epoch, read once.
        rng: draws replicas and backoffs.
        worker: what this process is among others, or None.
    """
    client = client or HttpClient()
    parts = Parts(
        settings,
        routing,
        telemetry,
        client,
        read=read or partial(load_routing, settings),
        files=files or Files(),
        clock=clock,
        wall_clock=wall_clock,
        rng=rng or Random(),
        worker=worker,
    )
    if worker is not None:
        answers = Answers(parts)
        worker.answer_with(answers.to, begin=answers.begin)
    handlers, recorded, unrecorded = parts.handlers, parts.middleware.recorded, parts.middleware.unrecorded

    def admin(handler: "Handler") -> "Handler":
        return unrecorded(parts.admin.guarded(handler))

    app = web.Application(client_max_size=settings.gateway_max_body_bytes)
    app[PARTS] = parts
    routes = [
        web.post(form, recorded(handlers.prompt), expect_handler=_expect) for path in BY_PATH for form in forms_of(path)
    ]
    for method, path, about_response in (
        ("GET", RESPONSE, handlers.response),
        ("DELETE", RESPONSE, handlers.response),
        ("POST", CANCEL, handlers.cancel_response),
    ):
        handler = recorded(about_response)
        get = {"allow_head": False} if method == "GET" else {}  # it is forwarded, and its answer would have no body
        routes += [web.route(method, form, handler, expect_handler=_expect, **get) for form in forms_of(path)]
    for path, answer in (
        *((form, handlers.models) for form in forms_of(MODELS)),
        *((form + "/{id:.+}", handlers.model) for form in forms_of(MODELS)),
        ("/", handlers.root),
    ):
        routes.append(web.get(path, recorded(answer), expect_handler=_expect))
    for path, service in (
        ("/health", handlers.health),
        ("/livez", handlers.livez),
        ("/readyz", handlers.readyz),
        ("/metrics", handlers.metrics),
    ):
        routes.append(web.get(path, unrecorded(service), expect_handler=_expect))
        routes.append(web.route("*", path, unrecorded(handlers.not_found), expect_handler=_expect))
    for path, asked in (
        ("/config", handlers.config),
        ("/requests", parts.request_calls.requests),
        ("/requests/{id:.+}", parts.request_calls.request),
    ):
        routes.append(web.get(path, admin(asked), expect_handler=_expect))
        routes.append(web.route("*", path, admin(handlers.not_found), expect_handler=_expect))
    page = parts.live_page
    routes.append(web.get("/ui", unrecorded(parts.admin.guarded(page.page, signs_in=True)), expect_handler=_expect))
    routes.append(web.route("*", "/ui", admin(handlers.not_found), expect_handler=_expect))
    for method, path, of_page in (
        ("GET", "/ui/live", page.live),
        ("GET", "/ui/mock", page.mock),
        ("POST", "/ui/mock/{action}", page.break_mock),
    ):
        get = {"allow_head": False} if path == "/ui/live" else {}  # a stream, which has no end
        routes.append(web.route(method, path, admin(of_page), expect_handler=_expect, **get))
        routes.append(web.route("*", path, admin(handlers.not_found), expect_handler=_expect))
    login = unrecorded(parts.admin.guarded(parts.admin.login, signs_in=True))
    routes.append(web.post("/ui/login", login, expect_handler=_expect))
    routes.append(web.route("*", "/ui/login", admin(handlers.not_found), expect_handler=_expect))
    routes.append(web.route("*", "/{path:(?s:.*)}", recorded(handlers.not_found), expect_handler=_expect))
    app.add_routes(routes)
    app.on_shutdown.append(_close_live_page)
    app.cleanup_ctx.append(_running_parts)
    return app


def runner_of(app: web.Application) -> Runner:
    """Return the runner of an application."""
    parts = app[PARTS]
    return Runner(
        app,
        answer_unhandled=parts.middleware.answer_unhandled,
        connections=parts.connections,
        keepalive_timeout=parts.keepalive_timeout,
        write_timeout=parts.write_timeout,
    )


async def _close_live_page(app: web.Application) -> None:
    app[PARTS].live_page.close()


async def _running_parts(app: web.Application) -> AsyncIterator[None]:
    """Start telemetry, client, probes, model lists, reloads; stop in reverse: what happens until then is reported."""
    parts = app[PARTS]
    async with AsyncExitStack() as stack:
        stack.callback(parts.executor.close)
        await stack.enter_async_context(parts.telemetry)
        await stack.enter_async_context(parts.limits)
        if parts.hints is not None:
            await stack.enter_async_context(parts.hints)
        await stack.enter_async_context(parts.client)
        await stack.enter_async_context(parts.health)
        await stack.enter_async_context(parts.model_lists)
        await stack.enter_async_context(parts.reload)
        yield


async def _expect(_request: web.Request) -> None:
    """Do not answer `Expect: 100-continue` here, but when the body is read: after key, limits and media type."""
