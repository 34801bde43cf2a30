"""The HTTP face: parse, call, answer; and, around every call, the record of what happens."""

import asyncio
import logging
from time import monotonic
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import CIMultiDict

from gateway import __version__
from gateway.dialects.requests import PATHS, parse
from gateway.errors import (
    CallerLeft,
    DeadlineExceeded,
    ErrorAnswer,
    GatewayDraining,
    GatewayError,
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    let_go,
)
from gateway.forwarding.forwarder import Call
from gateway.record import Record
from gateway.server.request_reader import Keys, check_media_type, deadline_of, forwarded_headers, holds_back, read_body
from gateway.server.responses import WholeAnswer, error_answer, explaining, json_answer
from gateway.server.stream_writer import Outlet

if TYPE_CHECKING:
    from aiohttp.typedefs import Handler

    from gateway.forwarding.forwarder import Forwarder
    from gateway.health import Health
    from gateway.policy.admission import Admission, Memory
    from gateway.policy.pool import Pool
    from gateway.server.in_flight import Running
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry

RECORD = web.RequestKey("record", Record)
UNTRACED = frozenset({"/livez", "/readyz", "/health", "/metrics"})
KNOWN_PATHS = frozenset({"/", "/v1/models", *PATHS})
LARGE_BODY = 1 << 20
"""Bytes; to check a larger body takes so long that others get their turn meanwhile."""
NO_HEADERS: CIMultiDict[str] = CIMultiDict()
SMALL_ANSWER = 65_536
"""Bytes; a larger answer counts as held until the caller has taken it off our hands."""

_log = logging.getLogger("gateway")


class Handlers:
    """One method per call of the contract, and the middleware around them."""

    def __init__(
        self,
        settings: "Settings",
        *,
        pool: "Pool",
        admission: "Admission",
        memory: "Memory",
        forwarder: "Forwarder",
        health: "Health",
        telemetry: "Telemetry",
        running: "Running",
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._admission = admission
        self._memory = memory
        self._forwarder = forwarder
        self._health = health
        self._telemetry = telemetry
        self._running = running
        self._keys = Keys([key.get_secret_value() for key in settings.gateway_api_keys])

    async def prompt(self, request: web.Request) -> web.StreamResponse:
        """`POST /v1/...`: forwarded, streamed or not."""
        record, settings = request[RECORD], self._settings
        deadline = deadline_of(request, settings, monotonic, record.started)
        hold = holds_back(request, settings)
        self._admission.check()
        check_media_type(request)
        with self._memory.share() as share:
            body = await read_body(request, deadline, share, settings)
            small = len(body) < LARGE_BODY
            prompt = parse(request.path, body) if small else await asyncio.to_thread(parse, request.path, body)
            model = prompt.model or settings.model_name
            route = self._pool.route(model)
            if route is None:
                raise ModelNotFound(f"No route matches the model {model!r}; see GET /v1/models.", param="model")
            record.asked(prompt, model=model, route=route.model, keep_text=settings.gateway_capture_content)
            outlet = Outlet(
                request,
                record,
                heartbeat=settings.gateway_heartbeat if prompt.stream else 0,
                sequence_number=0 if prompt.path == "/v1/responses" else None,
            )
            headers = forwarded_headers(request, record)
            call = Call(prompt, deadline, record, outlet, share=share, headers=headers, hold=hold)
            try:
                async with outlet:
                    await self._forwarder.forward(call, route)
                    if call.answer is None:
                        return outlet.response
            except (asyncio.CancelledError, Exception) as error:
                if not outlet.opened:
                    raise
                return await outlet.fail(self._told(error, request))
            return await self._whole_answer(request, call, *call.answer)

    async def _whole_answer(
        self, request: web.Request, call: Call, status: int, headers: dict[str, str], body: bytes
    ) -> web.Response:
        """An unstreamed answer, as the backend gave it."""
        headers.setdefault("content-type", "application/json")  # it was; with a parameter that does not pass
        if len(body) <= SMALL_ANSWER:
            return WholeAnswer(status, headers, body)
        response = web.Response(body=body, status=status, headers={**headers, **explaining(call.record, monotonic())})
        try:
            async with asyncio.timeout(call.deadline.left()):
                await response.prepare(request)
                call.record.status = status
                await response.write_eof()
                await request.writer.drain()
        except (TimeoutError, asyncio.CancelledError) as error:
            if request.transport is not None:  # no error answer may follow the begun one
                request.transport.abort()
            if isinstance(error, asyncio.CancelledError):
                raise
            raise DeadlineExceeded("The caller did not take the answer before the deadline.") from None
        return response

    async def models(self, _request: web.Request) -> web.Response:
        """`GET /v1/models`: from memory."""
        return json_answer({"object": "list", "data": [_model(name) for name in self._pool.models]})

    async def model(self, request: web.Request) -> web.Response:
        """`GET /v1/models/{id}`."""
        name = request.match_info["id"]
        if name not in self._pool.models:
            raise ModelNotFound(f"There is no model {name[:256]!r}; see GET /v1/models.", param="model")
        return json_answer(_model(name))

    async def root(self, _request: web.Request) -> web.Response:
        """`GET /`: what this is and where to look."""
        return json_answer(
            {
                "message": "An LLM gateway: point any OpenAI client at /v1.",
                "service": "llm-gateway",
                "version": __version__,
                "app_mode": self._settings.app_mode,
                "model": self._settings.model_name,
                "links": {"health": "/health", "models": "/v1/models", "metrics": "/metrics"},
            }
        )

    async def health(self, request: web.Request) -> web.Response:
        """`GET /health`: from memory."""
        document = self._health.document(in_full=self._keys.fit(request))
        return json_answer(document, status=503 if document["status"] == "down" else 200)

    async def livez(self, _request: web.Request) -> web.Response:
        """`GET /livez`: the process serves."""
        return json_answer({"status": "ok"})

    async def readyz(self, _request: web.Request) -> web.Response:
        """`GET /readyz`: send requests here, or not."""
        if self._admission.draining:
            error = GatewayDraining("The gateway is stopping.")
            return json_answer(error.envelope(), status=503, headers={"retry-after": "1"})
        if not self._health.ready:
            return json_answer({"status": "starting"}, status=503, headers={"retry-after": "1"})
        return json_answer({"status": "ok"})

    async def metrics(self, request: web.Request) -> web.Response:
        """`GET /metrics`: Prometheus text, or OpenMetrics when `Accept` asks for it."""
        body, content_type = self._telemetry.metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"content-type": content_type})

    async def elsewhere(self, request: web.Request) -> web.Response:
        """Every other path or method; as a route of its own, so that `Expect` waits for the key here too."""
        allowed: set[str] = set()
        for resource in request.app.router.resources():
            if resource is not request.match_info.route.resource:
                allowed |= (await resource.resolve(request))[1]
        if allowed:
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        raise web.HTTPNotFound

    async def explain(self, request: web.Request, handler: "Handler") -> web.StreamResponse:
        """Around every other call: a record of what happens, an answer for every error, ids on all of them."""
        path = request.path
        known = path if path in KNOWN_PATHS else "/v1/models/{id}" if path.startswith("/v1/models/") else None
        record = self._telemetry.begin(request.method, known, request.headers)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a handler runs in a task")
        self._running.enter(task)
        try:
            request[RECORD] = record
            if path.startswith("/v1"):
                self._keys.check(request)
                self._admission.check_open()
            response = await handler(request)
            if not response.prepared:
                response.headers.update(explaining(record, monotonic()))
                record.status = response.status
        except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 - every error has an answer
            response = error_answer(self._told(error, request), record, monotonic())
            if isinstance(error, web.HTTPMethodNotAllowed):
                response.headers["allow"] = error.headers["Allow"]
        finally:
            self._running.leave(task)
            record.ended = monotonic()
            self._telemetry.finish(record)
        return self._closing(response)

    @web.middleware
    async def plain(self, request: web.Request, handler: "Handler") -> web.StreamResponse:
        """The middleware. Its first question: is this one of the calls that are not explained?"""
        if request.path not in UNTRACED:
            return await self.explain(request, handler)
        try:
            response = await handler(request)
        except web.HTTPMethodNotAllowed as error:
            told = MethodNotAllowed(f"{request.path} takes {error.headers['Allow']}.")
            response = json_answer(told.envelope(), status=told.status, headers={"allow": error.headers["Allow"]})
        return self._closing(response)

    def unserved(self, error: GatewayError, cause: BaseException | None) -> web.Response:
        """The answer to what failed outside of the middleware; called by the server's protocol."""
        record = self._telemetry.begin("_OTHER", None, NO_HEADERS)
        if isinstance(error, InternalError):
            _log.error("internal error, trace %032x", record.trace_id, exc_info=cause)
        record.failed(error, error.status)
        record.ended = monotonic()
        self._telemetry.finish(record)
        response = error_answer(error, record, record.ended)
        response.force_close()
        return response

    def _closing(self, response: web.StreamResponse) -> web.StreamResponse:
        """While draining, connections are not kept."""
        if self._admission.draining and not response.prepared:
            response.force_close()
        return response

    def _told(self, error: BaseException, request: web.Request) -> GatewayError:
        """The error a caller is told, noted in the record; the error itself is spent.

        Raises:
            CancelledError: again, when neither a caller who left nor we are its cause.
        """
        record = request[RECORD]
        told: GatewayError
        if isinstance(error, asyncio.CancelledError):
            task = asyncio.current_task()
            if task is not None and self._running.was_cut_off(task):
                told = GatewayDraining("The gateway stopped before the answer was whole.", retry_after=1.0)
            elif task is not None and request.transport is None:
                told = CallerLeft("The caller left.")
            else:
                record.status = record.status or CallerLeft.status
                record.outcome = CallerLeft.code
                raise error
            task.uncancel()
        elif isinstance(error, GatewayError):
            told = error
        elif isinstance(error, web.HTTPNotFound):
            told = NotFound("There is nothing at this path; see GET /.")
        elif isinstance(error, web.HTTPMethodNotAllowed):
            told = MethodNotAllowed(f"This path takes {error.headers['Allow']}.")
        elif isinstance(error, web.HTTPException):
            told = InvalidRequest("The request is malformed HTTP.")
        elif isinstance(error, ConnectionError):
            told = CallerLeft("The caller left.")
        else:
            _log.error("internal error, trace %032x", record.trace_id, exc_info=error)
            told = InternalError("The gateway failed; look for the trace id in its log.")
        record.failed(told, told.answer_status if isinstance(told, ErrorAnswer) else told.status)
        let_go(error)
        return told


def _model(name: str) -> dict[str, str | int]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-gateway"}
