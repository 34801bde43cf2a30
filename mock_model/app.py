"""The API: its routes, and the way of a call: script of faults, journal, metrics, span."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from aiohttp import web
from opentelemetry.trace import Tracer

from mock_model.answer import Answer
from mock_model.call import Call
from mock_model.chat import ChatRequest
from mock_model.completions import CompletionRequest
from mock_model.decoding import FormReader, Glance, JsonReader, Reader
from mock_model.draws import fingerprint
from mock_model.embeddings import EmbeddingRequest
from mock_model.errors import MESSAGES, InvalidRequest, error_body
from mock_model.faults import RESPONSES, Fault
from mock_model.images import ImageEditRequest, ImageRequest
from mock_model.journal import Journal
from mock_model.machine import Machine, Released
from mock_model.messages import CountRequest, MessagesRequest
from mock_model.metrics import Metrics
from mock_model.middleware import Handler, api_errors
from mock_model.models import list_models, retrieve_model
from mock_model.moderations import ModerationRequest
from mock_model.order import Order
from mock_model.ranking import RerankRequest, ScoreRequest
from mock_model.responses import ResponseRequest
from mock_model.script import HEALTH, MODELS, Script
from mock_model.speech import SpeechRequest
from mock_model.stored_responses import StoredResponses, wants_stream
from mock_model.text import Writer
from mock_model.tokens import DetokenizeRequest, TokenizeRequest
from mock_model.tracing import describe, start_span
from mock_model.transcriptions import TranscriptionRequest, TranslationRequest

MAX_BODY = 256 * 2**20
OK = Answer(body=b'{"status":"ok"}')
STRAY = "/v1/*"
"""The route in spans and metrics of a call below `/v1` whose path is unknown."""

_log = logging.getLogger("mock_model")


class Asked(Protocol):
    """What all request bodies have in common."""

    model: str | None

    @property
    def stream(self) -> bool | None:
        """Whether the answer is to be streamed."""


class Request(Asked, Protocol):
    """A request that is answered by itself, whatever came before it."""

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return the model's answer."""


AnyAsked = TypeVar("AnyAsked", bound=Asked)
Understand = Callable[[web.Request, bytes, str], Order]
"""Returns what a call asks for; takes its body and fingerprint too."""

OPERATIONS: tuple[tuple[str, str | None, Reader[Request]], ...] = (
    ("/v1/chat/completions", "chat", JsonReader(ChatRequest)),
    ("/v1/completions", "text_completion", JsonReader(CompletionRequest)),
    ("/v1/embeddings", "embeddings", JsonReader(EmbeddingRequest)),
    (MESSAGES, "chat", JsonReader(MessagesRequest)),
    (f"{MESSAGES}/count_tokens", None, JsonReader(CountRequest)),
    ("/v1/audio/speech", None, JsonReader(SpeechRequest)),
    ("/v1/audio/transcriptions", None, FormReader(TranscriptionRequest)),
    ("/v1/audio/translations", None, FormReader(TranslationRequest)),
    ("/v1/images/generations", None, JsonReader(ImageRequest)),
    ("/v1/images/edits", None, FormReader(ImageEditRequest)),
    ("/v1/moderations", None, JsonReader(ModerationRequest)),
    ("/v1/rerank", None, JsonReader(RerankRequest)),
    ("/v1/score", None, JsonReader(ScoreRequest)),
    ("/tokenize", None, JsonReader(TokenizeRequest)),
    ("/detokenize", None, JsonReader(DetokenizeRequest)),
)
"""What is asked by POST, but for responses: path, name of the operation in spans, and how the body is read."""


class Api:
    """The mock model's API: OpenAI's, and Anthropic's messages.

    Args:
        models: those that are listed; the first answers requests that name none.
    """

    def __init__(
        self,
        *,
        models: Sequence[str],
        writer: Writer,
        responses: StoredResponses,
        machine: Machine,
        script: Script,
        journal: Journal,
        metrics: Metrics,
        tracer: Tracer,
    ) -> None:
        self._models = list(dict.fromkeys(models))
        self._model_name = models[0]
        self._writer = writer
        self._responses = responses
        self._machine = machine
        self._script = script
        self._journal = journal
        self._metrics = metrics
        self._tracer = tracer
        self.stopping = False

    def create_app(self) -> web.Application:
        """Return the application that serves it."""
        app = web.Application(middlewares=[api_errors, self._strays], client_max_size=MAX_BODY)
        app.router.add_get(HEALTH, self._health)
        # No HEAD: most faults write a body, which must not follow its headers.
        app.router.add_get(MODELS, self._list_models, allow_head=False)
        app.router.add_get("/v1/models/{model:.+}", self._retrieve_model, allow_head=False)
        for path, operation, reader in OPERATIONS:
            app.router.add_post(path, self._operation(path, operation, reader, self._write))
        known = f"{RESPONSES}/{{id}}"
        make = self._operation(RESPONSES, "chat", JsonReader(ResponseRequest), self._responses.create)
        app.router.add_post(RESPONSES, make)
        app.router.add_get(known, self._known(known, self._responses.retrieve), allow_head=False)
        app.router.add_delete(known, self._known(known, lambda name, _: self._responses.delete(name)))
        cancel = f"{known}/cancel"
        app.router.add_post(cancel, self._known(cancel, lambda name, _: self._responses.cancel(name)))
        return app

    def _write(self, request: Request, model: str, mark: str) -> Answer:
        return request.answer(model, mark, self._writer)

    def _known(
        self, route: str, answer: Callable[[str, Mapping[str, str]], Answer]
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        """Return the handler of calls for a response that is known, or not."""

        def understand(call: web.Request, _body: bytes, _mark: str) -> Order:
            stream = wants_stream(call.query)
            try:
                return Order(answer(call.match_info["id"], call.query), stream=stream)
            except InvalidRequest as error:
                return Order(_refusal(call.path, error), stream=stream)

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._handle(request, route, None, understand)

        return handle

    def _operation(
        self,
        path: str,
        operation: str | None,
        reader: Reader[AnyAsked],
        answer: Callable[[AnyAsked, str, str], Answer],
    ) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        def understand(call: web.Request, body: bytes, mark: str) -> Order:
            content_type = call.headers.get("content-type", "")
            try:
                request = reader.read(body, content_type)
            except InvalidRequest as error:
                return self._misfit(path, reader.glance(body, content_type), error)
            model = request.model or self._model_name
            try:
                good = answer(request, model, mark)
            except InvalidRequest as error:
                good = _refusal(path, error)
            return Order(good, request.model, model, bool(request.stream))

        async def handle(request: web.Request) -> web.StreamResponse:
            return await self._handle(request, path, operation, understand)

        return handle

    def _misfit(self, path: str, seen: Glance | None, error: InvalidRequest) -> Order:
        """Return the order of a request that is refused; the model it names is noted all the same."""
        if seen is None:
            return Order(_refusal(path, error))
        asked = seen.model if isinstance(seen.model, str) else None
        return Order(_refusal(path, error), asked, asked or self._model_name, seen.stream is True)

    async def _list_models(self, request: web.Request) -> web.StreamResponse:
        return await self._aside(request, MODELS, list_models(self._models))

    async def _retrieve_model(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["model"]
        return await self._handle(
            request, "/v1/models/{model}", None, lambda *_: Order(retrieve_model(name), name, name)
        )

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return await self._aside(request, HEALTH, OK)

    async def _aside(self, request: web.Request, path: str, answer: Answer) -> web.StreamResponse:
        """Answer what gateways ask by themselves, at any time; it is neither in the journal nor traced."""
        call = Call(request, machine=self._machine, journal=self._journal)
        mark = fingerprint(path, b"")
        call.take(Order(answer), mark, self._script.count(mark))
        return await self._answer(call, self._script.choose(call))

    @web.middleware
    async def _strays(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note calls to unknown paths below `/v1` in the journal like all others; no fault applies to them."""
        error = request.match_info.http_exception
        if error is None or not f"{request.path}/".startswith("/v1/"):
            return await handler(request)

        def refuse(_call: web.Request, _body: bytes, _mark: str) -> Order:
            raise error

        return await self._handle(request, STRAY, None, refuse)

    async def _handle(
        self, request: web.Request, route: str, operation: str | None, understand: Understand
    ) -> web.StreamResponse:
        """Answer by a fault or by the model; note it in journal, metrics and span."""
        call = Call(request, machine=self._machine, journal=self._journal)
        span = start_span(self._tracer, request, route, operation)
        self._metrics.arrive()
        try:
            fault = await self._read(call, request, understand)
            return await self._answer(call, fault)
        except (asyncio.CancelledError, ConnectionError):
            call.end("fault" if self.stopping else "caller_left")
            raise
        except web.HTTPException as error:
            call.status = error.status
            call.end("complete")
            raise
        finally:
            call.end("fault")
            self._metrics.end(call, route)
            describe(span, call)
            span.end()

    async def _read(self, call: Call, request: web.Request, understand: Understand) -> Fault | None:
        """Read the body; decide what the call asks for and which fault applies."""
        fault = None
        try:
            body = await request.read()
            mark = call.entry.fingerprint = fingerprint(request.path, body)
            call.take(understand(request, body, mark), mark, self._script.count(mark))
            fault = self._script.choose(call)
            if fault is not None:
                call.entry.fault = fault.kind
                self._metrics.begin_fault(fault.kind)
        except web.RequestPayloadError as error:
            raise web.HTTPBadRequest from error
        finally:
            # Only now: the line in the journal's file names the fault, and is written once.
            self._journal.arrive(call.entry)
        return fault

    @staticmethod
    async def _answer(call: Call, fault: Fault | None) -> web.StreamResponse:
        try:
            async with call.places:
                return await (call.serve() if fault is None else fault.apply(call))
        except Released:
            return call.hang_up()


def _refusal(path: str, error: InvalidRequest) -> Answer:
    body = error_body(path, error.status, str(error), param=error.param, code=error.code)
    return Answer(status=error.status, body=body)
