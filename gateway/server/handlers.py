"""One handler for each call of the contract: read the request, do what it asks, answer."""

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from gateway import __version__
from gateway.config_document import document
from gateway.dialects.openai.stored_responses import CANCEL, RESPONSE, StoredResponses
from gateway.dialects.table import BY_PATH
from gateway.errors import DeadlineExceeded, GatewayDraining, ModelNotAllowed, ModelNotFound, NotFound
from gateway.forwarding.attempt import NO_CONTENT
from gateway.forwarding.call import Call
from gateway.phase_timer import PhaseTimer
from gateway.server.aiohttp_protocol import Answer, OpenAnswer
from gateway.server.middleware import RECORD, STREAM
from gateway.server.paths import CANONICAL, near_path, right_path, worded_by
from gateway.server.request_reader import form_boundary, forwarded_headers
from gateway.server.responses import SERVER, explaining, json_response, unrecorded_error
from gateway.server.stream_writer import StreamWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.dialects.dialect import Prompt
    from gateway.forwarding.call import Remember
    from gateway.forwarding.charge import Charges
    from gateway.forwarding.forwarder import Forwarder
    from gateway.generation import Generation, Generations
    from gateway.health import Health
    from gateway.policy.admission import Admission
    from gateway.policy.byte_budget import ByteBudget, Share
    from gateway.policy.caller import Caller
    from gateway.policy.deadline import Deadline
    from gateway.policy.pool import Route, Target
    from gateway.policy.response_homes import Home
    from gateway.record import Record
    from gateway.response_hints import ResponseHints
    from gateway.server.request_reader import RequestReader
    from gateway.settings import Commit, Settings
    from gateway.telemetry import Telemetry
    from gateway.workers.worker import Worker

STORED_RESPONSES = StoredResponses()
SMALL_ANSWER = 65_536
"""Bytes; a larger answer counts as held until the caller has taken it."""


class Handlers:
    """The handlers of the routes in `app.py`."""

    def __init__(
        self,
        settings: "Settings",
        *,
        generations: "Generations",
        reader: "RequestReader",
        admission: "Admission",
        byte_budget: "ByteBudget",
        charges: "Charges",
        forwarder: "Forwarder",
        hints: "ResponseHints | None",
        health: "Health",
        telemetry: "Telemetry",
        clock: "Callable[[], float]",
        siblings: "Worker | None",
    ) -> None:
        self._siblings = siblings
        self._settings = settings
        self._generations = generations
        self._reader = reader
        self._admission = admission
        self._byte_budget = byte_budget
        self._charges = charges
        self._forwarder = forwarder
        self._hints = hints
        self._health = health
        self._telemetry = telemetry
        self._clock = clock

    async def prompt(self, request: web.Request) -> Answer | OpenAnswer:
        """Forward a prompt: `POST` to a path of a dialect, with or without `/v1`."""
        generation = self._generations.current
        record = request[RECORD]
        path = CANONICAL[request.path]
        dialect = BY_PATH[path]
        deadline = self._reader.deadline(request, record.started)
        commit = self._reader.commit(request)
        caller = record.caller
        self._admission.check(caller.id)
        boundary = form_boundary(request, dialect)
        with self._byte_budget.share(caller.id) as share:
            prompt = await self._reader.prompt(request, path, dialect, deadline, share, boundary=boundary)
            model = prompt.model or generation.pool.default_model
            route = self._route(generation, caller, model, named=prompt.model is not None)
            prompt.describe_in(record, model=model, route=route.model)
            if self._settings.gateway_capture_content and not dialect.passes_through:
                record.input_text = await self._reader.text_of(prompt)
            if prompt.previous_response_id is not None and self._hints is not None:
                await self._hints.learn(prompt.previous_response_id)
            targets = self._targets(generation, route, model, prompt, record)
            remember = partial(self._made, generation, owner=_owner(generation, record)) if dialect.stores else None
            headers = forwarded_headers(request, record)
            return await self._forward(
                request,
                prompt,
                deadline,
                share,
                commit=commit,
                model=model,
                route=route.model,
                targets=targets,
                headers=headers,
                remember=remember,
            )

    def _route(self, generation: "Generation", caller: "Caller", model: str, *, named: bool) -> "Route":
        """Return the route of a model, which the request names or not. Raises: ModelNotAllowed, ModelNotFound."""
        if not caller.may_use(model):
            raise ModelNotAllowed(f"This key may not use the model {model!r}; see GET /v1/models.", param="model")
        route = generation.pool.route(model)
        if route is None:
            what = "model" if named else "default model, since the request names none:"
            raise ModelNotFound(f"No route matches the {what} {model!r}; see GET /v1/models.", param="model")
        return route

    async def response(self, request: web.Request) -> Answer | OpenAnswer:
        """Read or delete a stored response: `GET` or `DELETE` of its id."""
        answer = await self._ask_home(request, RESPONSE)
        if request.method == "DELETE":
            self._generations.current.pool.responses.forget(request.match_info["id"])
        return answer

    async def cancel_response(self, request: web.Request) -> Answer | OpenAnswer:
        """Cancel a response that is made in the background."""
        return await self._ask_home(request, CANCEL)

    async def _ask_home(self, request: web.Request, path: str) -> Answer | OpenAnswer:
        """Forward a call for a stored response to the replica that made it or, if it is not known, to all in turn."""
        generation = self._generations.current
        record, pool = request[RECORD], generation.pool
        response_id, query = request.match_info["id"], request.rel_url.raw_query_string
        deadline = self._reader.deadline(request, record.started)
        commit = self._reader.commit(request)
        self._admission.check(record.caller.id)
        prompt = STORED_RESPONSES.read_call(request.method, path, response_id, query)
        record.stream = prompt.stream
        if self._hints is not None:
            await self._hints.learn(response_id)
        home = _home_of(generation, response_id, record, param="id")
        pinned = pool.home_target(home, home.model, None) if home is not None else None
        targets = pool.backends_for(record.caller.models)
        if pinned is not None and (  # one that was found by trying opens no backend to a key that may not use it
            (home is not None and home.owner is not None) or pinned.backend in {target.backend for target in targets}
        ):
            targets = (pinned,)
        if not targets:
            raise NotFound("No backend of a model that this key may use can have this response.", param="id")
        headers = [header for header in forwarded_headers(request, record) if header[0] != "content-type"]  # no body
        with self._byte_budget.share(record.caller.id) as share:
            return await self._forward(
                request,
                prompt,
                deadline,
                share,
                commit=commit,
                model="",  # no model is asked: cooldowns of models are others'
                route="",
                targets=targets,
                headers=headers,
                remember=lambda _id, replica, _model: pool.responses.found(response_id, replica),
            )

    async def _forward(
        self,
        request: web.Request,
        prompt: "Prompt",
        deadline: "Deadline",
        share: "Share",
        *,
        commit: "Commit",
        model: str,
        route: str,
        targets: "tuple[Target, ...]",
        headers: list[tuple[str, str]],
        remember: "Remember | None",
    ) -> Answer | OpenAnswer:
        """Get a checked request answered."""
        record, dialect = request[RECORD], prompt.dialect
        record.candidates = tuple([target.candidate for target in targets])
        caller, charge = record.caller, None
        if (limits := caller.limits) is not None:
            charge = self._charges.begin(limits, prompt, route, record.operation)
            if charge is None:
                tokens = await self._charges.prompt_tokens(prompt, deadline)
                charge = self._charges.begin(limits, prompt, route, record.operation, tokens)
        writer = None
        if prompt.stream or dialect.passes_through:
            heartbeat = self._settings.gateway_heartbeat if prompt.stream else 0.0
            writer = request[STREAM] = StreamWriter(
                request, record, dialect, admission=self._admission, heartbeat=heartbeat, clock=self._clock
            )
        call = Call(
            prompt,
            deadline,
            record,
            writer,
            model=model,
            targets=targets,
            target=targets[0],
            caller=caller.id,
            share=share,
            headers=headers,
            commit=commit,
            query=request.rel_url.raw_query_string if dialect.passes_query else "",
            remember=remember,
            charge=charge,
        )
        if writer is None:
            await self._forwarder.forward(call)
            return await self._send_whole(request, call)
        async with writer:
            await self._forwarder.forward(call)
        del request[STREAM]
        return writer.response

    def _targets(
        self, generation: "Generation", route: "Route", model: str, prompt: "Prompt", record: "Record"
    ) -> "tuple[Target, ...]":
        """Return the targets in the order in which the request may go to them.

        What goes on from a stored response goes to its home; else the order is the one that the route draws, and the
        record notes which target comes first.
        """
        if prompt.previous_response_id is not None:
            home = _home_of(generation, prompt.previous_response_id, record, param="previous_response_id")
            pinned = generation.pool.home_target(home, model, route) if home is not None else None
            if pinned is not None:
                return (pinned,)
        if not route.weighted:
            return route.targets
        targets = route.order()
        first, tripped = targets[0], route.guard.lost if route.guard is not None else None
        record.draw_target(first.backend, first.model or model, first.weight, self._clock(), tripped=tripped)
        return targets

    def _made(
        self, generation: "Generation", response_id: str | None, replica: str, model: str, owner: str | None
    ) -> None:
        """Note, and tell other instances, that a replica has made a response."""
        generation.pool.responses.made(response_id, replica, model, owner)
        if self._hints is not None:
            self._hints.made(response_id, replica, model, owner)

    async def _send_whole(self, request: web.Request, call: Call) -> Answer:
        """Send an unstreamed answer as the backend gave it."""
        answer = call.answer
        if answer is None:
            raise RuntimeError("forwarded without an answer")
        headers = answer.headers
        if answer.status != NO_CONTENT:
            headers.setdefault("content-type", "application/json")  # it had parameters that do not pass
        headers["server"] = SERVER
        response = Answer(body=answer.body, status=answer.status, headers=headers)
        if len(answer.body) <= SMALL_ANSWER:
            return response
        response.lines = explaining(call.record, self._clock())
        if self._admission.stopping:
            response.force_close()
        try:
            with PhaseTimer(self._clock, call.deadline.end, "The caller did not take the answer before the deadline."):
                await response.prepare(request)
                call.record.status = answer.status
                request.writer.send_headers()  # together with them, the body would be copied
                await response.write_eof()
                await request.writer.drain()
        except (DeadlineExceeded, asyncio.CancelledError):
            if request.transport is not None:  # no error may follow the answer that has begun
                request.transport.abort()
            raise
        return response

    async def models(self, request: web.Request) -> Answer:
        """Answer `GET /v1/models` from memory: the models that the caller may use."""
        return json_response({"object": "list", "data": [_model(name) for name in self._models_of(request)]})

    async def model(self, request: web.Request) -> Answer:
        """Answer `GET /v1/models/{id}`."""
        name = request.match_info["id"]
        if name not in self._models_of(request):
            raise ModelNotFound(f"There is no model {name[:256]!r}; see GET /v1/models.", param="model")
        return json_response(_model(name))

    def _models_of(self, request: web.Request) -> list[str]:
        caller = request[RECORD].caller
        return [name for name in self._generations.current.pool.models if caller.may_use(name)]

    async def root(self, _request: web.Request) -> Answer:
        """Answer `GET /`: what this is and where to look."""
        return json_response(
            {
                "message": "An LLM gateway: point any OpenAI client at /v1.",
                "service": "llm-gateway",
                "version": __version__,
                "app_mode": self._settings.app_mode,
                "model": self._generations.current.pool.default_model,
                "links": {"health": "/health", "models": "/v1/models", "metrics": "/metrics", "page": "/ui"},
            }
        )

    async def health(self, request: web.Request) -> Answer:
        """Answer `GET /health` from memory."""
        in_full = self._generations.current.keys.fit(request)
        own = partial(self._health.document, in_full=in_full)
        document = await self._siblings.health(own, in_full=in_full) if self._siblings else own()
        return json_response(document, status=503 if document["status"] == "down" else 200)

    async def config(self, _request: web.Request) -> Answer:
        """Answer `GET /config`, an admin call: the configuration in force, without secrets."""
        generation = self._generations.current
        return json_response(
            {
                "generation": generation.number,
                "loaded_seconds_ago": round(self._clock() - generation.loaded_at, 3),
                "error": self._generations.error,
                **document(generation.routing),
            }
        )

    async def livez(self, _request: web.Request) -> Answer:
        """Answer `GET /livez`: the process serves."""
        return json_response({"status": "ok"})

    async def readyz(self, request: web.Request) -> Answer:
        """Answer `GET /readyz`: whether requests should be sent here."""
        headers = {"retry-after": "1"}
        if self._admission.stopping:
            return unrecorded_error(GatewayDraining(), worded_by(request.path), headers)
        if not self._health.ready:
            return json_response({"status": "starting"}, status=503, headers=headers)
        return json_response({"status": "ok"})

    async def metrics(self, request: web.Request) -> Answer:
        """Answer `GET /metrics`: Prometheus text, or OpenMetrics when `Accept` asks for it.

        What one worker has counted is less than what all have: where these cannot be asked, it would be a fall.
        """
        accept = request.headers.get("Accept", "")
        found: tuple[bytes, str] | None
        if self._siblings is None:
            found = self._telemetry.metrics.exposition(accept)
        else:
            found = await self._siblings.metrics(accept)
        if found is None:
            return Answer(status=503, text="The workers' parent process does not answer. Ask again.\n")
        body, content_type = found
        return Answer(body=body, headers={"content-type": content_type})

    async def not_found(self, request: web.Request) -> Answer:
        """Answer every other path or method; a route of its own, so that `Expect` waits for the key here too."""
        allowed: set[str] = set()
        for resource in request.app.router.resources():
            allowed |= (await resource.resolve(request))[1]
        allowed.discard("*")  # of the routes that lead here
        if allowed:
            raise web.HTTPMethodNotAllowed(request.method, allowed)
        raise _nothing_at(request.path)

    async def hidden(self, request: web.Request) -> Answer:
        """Answer an admin call of somebody who may not know of it, as a path at which there is nothing is answered."""
        raise _nothing_at(request.path)


def _nothing_at(path: str) -> NotFound:
    right = right_path(path)
    if right is not None:
        return NotFound(f"There is nothing at this path; the right one is {right}.")
    near = near_path(path)
    if near is not None:
        return NotFound(f"There is nothing at this path. Is {near} meant? GET / says where to look.")
    return NotFound()


def _home_of(generation: "Generation", response_id: str, record: "Record", *, param: str) -> "Home | None":
    """Return the home of a stored response, None for one that is not known. Raises: NotFound, for another key's."""
    home = generation.pool.responses.of(response_id)
    if home is not None and home.owner not in {None, _owner(generation, record)}:
        raise NotFound("There is no response with this id.", param=param)
    return home


def _owner(generation: "Generation", record: "Record") -> str | None:
    """Return whose the responses of a request are: its key's; None where callers are not known by keys."""
    return record.caller.id if generation.keys.needed else None


def _model(name: str) -> dict[str, str | int]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "llm-gateway"}
