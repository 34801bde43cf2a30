"""The control API: faults, journal, metrics, reset and crash."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

import msgspec
from aiohttp import web

from mock_model.answer import JSON
from mock_model.control_guard import control_guard
from mock_model.errors import envelope
from mock_model.journal import Journal
from mock_model.metrics import CONTENT_TYPE, Metrics
from mock_model.middleware import api_errors
from mock_model.script import Script, ScriptError

MAX_BODY = 4 * 2**20

CRASH_DELAY = 0.05
"""Seconds before a crash, for the answer to `POST /crash` to reach the caller."""


def fault_routes(script: Script) -> Sequence[web.RouteDef]:
    """Return the routes by which a script is put, shown and removed."""

    async def get(_request: web.Request) -> web.Response:
        return _json(msgspec.json.encode(script.document()))

    async def put(request: web.Request) -> web.Response:
        try:
            script.replace(msgspec.json.decode(await request.read()))
        except ScriptError as error:
            return _json(envelope(400, str(error), param=error.where, code="invalid_faults"), status=400)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _json(envelope(400, f"the script is not JSON: {error}", code="invalid_json"), status=400)
        return await get(request)

    async def delete(_request: web.Request) -> web.Response:
        script.clear()
        return web.Response(status=204)

    return web.get("/faults", get), web.put("/faults", put), web.delete("/faults", delete)


class Control:
    """What a test controls; on a port of its own, so that it is never published with the API."""

    def __init__(
        self,
        *,
        script: Script,
        journal: Journal,
        metrics: Metrics,
        reset: Callable[[], Awaitable[None]],
        crash: Callable[[], None],
        hosts: Iterable[str],
    ) -> None:
        self._script = script
        self._journal = journal
        self._metrics = metrics
        self._reset = reset
        self._crash = crash
        self._hosts = hosts

    def create_app(self) -> web.Application:
        """Return the application that serves it."""
        app = web.Application(middlewares=[api_errors, control_guard(self._hosts)], client_max_size=MAX_BODY)
        app.router.add_routes(fault_routes(self._script))
        app.router.add_get("/journal", self._get_journal)
        app.router.add_delete("/journal", self._delete_journal)
        app.router.add_get("/metrics", self._get_metrics)
        app.router.add_post("/reset", self._post_reset)
        app.router.add_post("/crash", self._post_crash)
        return app

    async def _get_journal(self, _request: web.Request) -> web.Response:
        return _json(self._journal.document())

    async def _delete_journal(self, _request: web.Request) -> web.Response:
        self._journal.clear()
        return web.Response(status=204)

    async def _get_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=self._metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _post_reset(self, _request: web.Request) -> web.Response:
        await self._reset()
        return web.Response(status=204)

    async def _post_crash(self, _request: web.Request) -> web.Response:
        asyncio.get_running_loop().call_later(CRASH_DELAY, self._crash)
        return _json(b'{"status":"crashing"}', status=202)


def _json(body: bytes, *, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, content_type=JSON)
