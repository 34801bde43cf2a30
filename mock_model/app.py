"""The API: routes, and the way of a call through fault, journal, metrics and span."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from time import monotonic, time
from typing import Protocol

import msgspec
from aiohttp import web
from opentelemetry.trace import Tracer

from mock_model.answer import Answer
from mock_model.call import JSON, Call
from mock_model.chat import ChatRequest
from mock_model.completions import CompletionRequest
from mock_model.decoding import decode
from mock_model.draws import fingerprint
from mock_model.embeddings import EmbeddingRequest
from mock_model.errors import InvalidRequest, envelope
from mock_model.journal import Entry, Journal, clip
from mock_model.machine import Machine
from mock_model.metrics import Metrics
from mock_model.models import list_models, retrieve_model
from mock_model.responses import ResponseRequest
from mock_model.script import HEALTH, Script
from mock_model.text import Writer
from mock_model.tracing import describe, start_span

MAX_BODY = 256 * 2**20
OK = Answer(body=b'{"status":"ok"}')

log = logging.getLogger(__name__)


class Request(Protocol):
    """What the bodies of all operations have in common."""

    model: str | None

    @property
    def stream(self) -> bool | None:
        """Whether the answer is to be streamed."""

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """What the model says to it."""


class Order:
    """What a caller wants, as far as it could be understood."""

    __slots__ = ("answer", "model", "stream")

    def __init__(self, answer: Answer, model: str | None = None, *, stream: bool = False) -> None:
        self.answer = answer
        self.model = model
        self.stream = stream


class Api:
    """The mock model's OpenAI API."""

    def __init__(
        self,
        *,
        model_name: str,
        writer: Writer,
        machine: Machine,
        script: Script,
        journal: Journal,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self._model_name = model_name
        self._writer = writer
        self._machine = machine
        self._script = script
        self._journal = journal
        self._metrics = metrics
        self._tracer = tracer
        self.stopping = False

    def create_app(self) -> web.Application:
        """The application that serves it."""
        app = web.Application(middlewares=[openai_errors], client_max_size=MAX_BODY)
        app.router.add_get(HEALTH, self._health)
        app.router.add_get("/v1/models", self._list_models)
        app.router.add_get("/v1/models/{model:.+}", self._retrieve_model)
        for path, operation, request_type in (
            ("/v1/chat/completions", "chat", ChatRequest),
            ("/v1/completions", "text_completion", CompletionRequest),
            ("/v1/embeddings", "embeddings", EmbeddingRequest),
            ("/v1/responses", "chat", ResponseRequest),
        ):
            app.router.add_post(path, self._operation(path, operation, msgspec.json.Decoder(request_type)))
        return app

    def _operation(
        self, path: str, operation: str, decoder: msgspec.json.Decoder[Request]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        def understand(body: bytes, mark: str) -> Order:
            try:
                request = decode(decoder, body)
            except InvalidRequest as exc:
                return Order(_refusal(exc))
            try:
                answer = request.answer(request.model or self._model_name, mark, self._writer)
            except InvalidRequest as exc:
                answer = _refusal(exc)
            return Order(answer, request.model, stream=bool(request.stream))

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._handle(request, path, operation, understand)

        return handle

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        return await self._handle(request, "/v1/models", None, lambda *_: Order(list_models(self._model_name)))

    async def _retrieve_model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        return await self._handle(
            request, "/v1/models/{model}", None, lambda *_: Order(retrieve_model(name), model=name)
        )

    async def _health(self, request: web.Request) -> web.StreamResponse:
        """Answer a probe; it is neither journaled nor traced, and needs no place."""
        call = self._call(request, Order(OK), fingerprint(HEALTH, b""), placed=True)
        fault = self._script.choose(call)
        return await (call.serve() if fault is None else fault.apply(call))

    async def _handle(
        self, request: web.Request, route: str, operation: str | None, understand: Callable[[bytes, str], Order]
    ) -> web.StreamResponse:
        span = start_span(self._tracer, request, route, operation)
        try:
            body = await request.read()
            mark = fingerprint(request.path, body)
            call = self._call(request, understand(body, mark), mark)
            try:
                return await self._answer(call, route)
            finally:
                describe(span, call)
        finally:
            span.end()

    async def _answer(self, call: Call, route: str) -> web.StreamResponse:
        """Let the fault or the model answer, and keep the books."""
        fault = self._script.choose(call)
        if fault is not None:
            call.entry.fault = fault.kind
        self._journal.arrive(call.entry)
        self._metrics.arrive()
        start = monotonic()
        try:
            async with call.places:
                return await (call.serve() if fault is None else fault.apply(call))
        except (asyncio.CancelledError, ConnectionError):
            call.end("fault" if self.stopping else "caller_left")
            raise
        finally:
            call.end("fault")
            self._metrics.end(call, route, monotonic() - start)

    def _call(self, request: web.Request, order: Order, mark: str, *, placed: bool = False) -> Call:
        entry = Entry(
            time=time(),
            path=request.path,
            model=clip(order.model),
            request_id=clip(request.headers.get("x-request-id")),
            traceparent=clip(request.headers.get("traceparent")),
            fingerprint=mark,
            fault=None,
        )
        return Call(
            request,
            entry=entry,
            answer=order.answer,
            stream=order.stream,
            occurrence=self._script.count(mark),
            machine=self._machine,
            journal=self._journal,
            placed=placed,
        )


def _refusal(error: InvalidRequest) -> Answer:
    return Answer(status=error.status, body=envelope(error.status, str(error), param=error.param, code=error.code))


@web.middleware
async def openai_errors(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Give aiohttp's own errors (no such path, wrong method, too large a body) OpenAI's form."""
    try:
        return await handler(request)
    except web.HTTPException as exc:
        codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
        body = envelope(exc.status, f"{exc.reason}: {request.method} {request.path}", code=codes.get(exc.status))
        headers = {name: value for name, value in exc.headers.items() if name.lower() == "allow"}
        return web.Response(status=exc.status, body=body, content_type=JSON, headers=headers)
