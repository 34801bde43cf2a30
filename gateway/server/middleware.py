"""The middleware around the handlers: a record of what happens, the key, and an answer to every error."""

import asyncio
import logging
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web
from multidict import CIMultiDict

from gateway.errors import (
    CallerLeft,
    GatewayDraining,
    GatewayError,
    InternalError,
    InvalidApiKey,
    InvalidRequest,
    MethodNotAllowed,
    drop_frames,
)
from gateway.record import Record
from gateway.server.aiohttp_protocol import Answer, OpenAnswer
from gateway.server.paths import known_path, needs_key, worded_by
from gateway.server.responses import SERVER, error_response, explaining, unrecorded_error
from gateway.server.stream_writer import StreamWriter

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiohttp.typedefs import Handler

    from gateway.generation import Generations
    from gateway.kept_requests import KeptRequests
    from gateway.policy.admission import Admission
    from gateway.server.in_flight import InFlight
    from gateway.telemetry import Telemetry

    ExplainedHandler = Callable[[web.Request], Awaitable[Answer | OpenAnswer]]

RECORD = web.RequestKey("record", Record)
STREAM = web.RequestKey("stream", StreamWriter)
NO_HEADERS: CIMultiDict[str] = CIMultiDict()

_log = logging.getLogger("gateway")


class Middleware:
    """Wraps the handlers of the routes."""

    def __init__(
        self,
        *,
        generations: "Generations",
        admission: "Admission",
        in_flight: "InFlight",
        kept: "KeptRequests",
        telemetry: "Telemetry",
        clock: "Callable[[], float]",
    ) -> None:
        self._generations = generations
        self._admission = admission
        self._in_flight = in_flight
        self._kept = kept
        self._telemetry = telemetry
        self._clock = clock

    def unrecorded(self, handler: "Handler") -> "Handler":
        """Wrap the handler of a call that asks how the gateway is: it leaves no record and needs no key."""
        return partial(self._answer, handler=handler)

    def recorded(self, handler: "ExplainedHandler") -> "Handler":
        """Wrap the handler of every other call: what happens is recorded, and every error has an answer."""
        return partial(self._answer_and_record, handler=handler)

    async def _answer(self, request: web.Request, *, handler: "Handler") -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPMethodNotAllowed as error:
            allowed = error.headers["Allow"]
            failure = MethodNotAllowed(f"{request.path} allows {allowed}.")
            response = unrecorded_error(failure, worded_by(request.path), {"allow": allowed})
        response.headers.setdefault("server", SERVER)
        return self._closed_while_stopping(response)

    async def _answer_and_record(self, request: web.Request, *, handler: "ExplainedHandler") -> web.StreamResponse:
        path = request.path
        known = known_path(path)
        record = self._telemetry.begin(request.method, known, request.headers)
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a handler runs in a task")
        self._in_flight.add(task, record)
        try:
            request[RECORD] = record
            generation = self._generations.current  # the handler, which begins at once, takes the same
            record.generation = generation.number
            if needs_key(path, known):
                record.caller = generation.keys.check(request)
                self._admission.check_open()
            response: Answer | OpenAnswer = await handler(request)
            if not response.prepared:
                response.lines = explaining(record, self._clock())
                record.status = response.status
        except (asyncio.CancelledError, Exception) as error:  # noqa: BLE001 - every error has an answer
            response = await self._answer_error(error, request, record)
        finally:
            self._in_flight.remove(task)
            record.ended = self._clock()
            self._kept.add(record)
            self._telemetry.finish(record)
        return self._closed_while_stopping(response)

    def _closed_while_stopping(self, response: web.StreamResponse) -> web.StreamResponse:
        """Do not keep the caller's connection while the gateway is stopping.

        Where headers went out before the stop, the connection serves on while requests are taken, and is closed then.
        """
        if self._admission.draining or (self._admission.stopping and not response.prepared):
            response.force_close()
        return response

    def answer_unhandled(
        self, error: GatewayError, cause: BaseException | None, request: web.BaseRequest | None
    ) -> Answer:
        """Return the answer to what failed outside of the app: malformed HTTP, a defect of the server, no place."""
        if request is None:
            record = self._telemetry.begin("_OTHER", None, NO_HEADERS)
        else:
            record = self._telemetry.begin(request.method, known_path(request.path), request.headers)
        if isinstance(error, InternalError):
            _log.error("internal error, trace %032x", record.trace_id, exc_info=cause)
        record.generation = self._generations.current.number
        record.end_with(error)
        record.ended = self._clock()
        self._kept.add(record)
        self._telemetry.finish(record)
        response = error_response(error, worded_by(request.path if request is not None else ""), record, record.ended)
        response.force_close()
        return response

    async def _answer_error(self, error: BaseException, request: web.Request, record: Record) -> Answer | OpenAnswer:
        """Answer with an error, as the last event where a stream is open.

        Raises:
            CancelledError: neither a caller who left nor a stop is its cause.
        """
        stream: StreamWriter | None = request.get(STREAM)
        if stream is not None:
            del request[STREAM]  # it refers to the request: a cycle
        failure = self._failure(error, request, record)
        record.end_with(failure)
        if isinstance(failure, InvalidApiKey):
            self._telemetry.turn_away(record)
        drop_frames(error)
        if stream is not None and stream.opened:
            return await stream.end_with_error(failure)
        response = error_response(failure, worded_by(request.path), record, self._clock())
        if isinstance(error, web.HTTPMethodNotAllowed):
            response.headers["allow"] = error.headers["Allow"]
        return response

    def _failure(self, error: BaseException, request: web.Request, record: Record) -> GatewayError:
        """Return the error that the caller is told."""
        if isinstance(error, GatewayError):
            return error
        if isinstance(error, asyncio.CancelledError):
            return self._cancellation(error, request, record)
        if isinstance(error, web.HTTPException):
            return _http_failure(error)
        if isinstance(error, ConnectionError):
            return CallerLeft()
        _log.error("internal error, trace %032x", record.trace_id, exc_info=error)
        return InternalError()

    def _cancellation(self, error: asyncio.CancelledError, request: web.Request, record: Record) -> GatewayError:
        """Return why the request was cancelled: by a stop, or because the caller left."""
        task = asyncio.current_task()
        failure: GatewayError
        if task is not None and self._in_flight.was_cut_off(task):
            failure = GatewayDraining("The gateway stopped before the answer was complete. Send the request again.")
        elif task is not None and request.transport is None:
            failure = CallerLeft()
        else:
            record.status = record.status or CallerLeft.status
            record.outcome = CallerLeft.code
            raise error
        task.uncancel()
        return failure


def _http_failure(error: web.HTTPException) -> GatewayError:
    """Return our error for one of aiohttp's."""
    if isinstance(error, web.HTTPMethodNotAllowed):
        return MethodNotAllowed(f"This path allows {error.headers['Allow']}.")
    return InvalidRequest("The request is malformed HTTP.")
