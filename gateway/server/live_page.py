"""The live page: its document, its stream of snapshots, and the buttons that break a mock model."""

import asyncio
from contextlib import suppress
from math import inf
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from gateway.backend.mock_control import ACTIONS, BY_NAME, Action, MockControl
from gateway.errors import GatewayDraining, GatewayOverloaded, NotFound
from gateway.server.admin import PROTECTED
from gateway.server.responses import SERVER, json_response
from gateway.server.stream_writer import EVENT_STREAM, UNBUFFERED
from gateway.ui.document import Document

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.policy.admission import Admission
    from gateway.ui.snapshot import Snapshot
    from gateway.workers.worker import Worker

INTERVAL = 1.0
"""Seconds between two snapshots."""
LEAST_WAIT = 0.01
"""Seconds between two looks at least: a timer may be early."""
MAX_VIEWERS = 8
"""Pages that are open at once."""
SLOW = 10.0
"""Seconds that a viewer may take for one snapshot; then its connection is aborted."""

_encode = msgspec.json.encode


class LivePage:
    """Answers the calls of the page.

    A snapshot is taken once a second for all viewers together, and none while nobody looks. The streams are no requests
    in flight: a stop does not wait for them.

    Args:
        snapshot: what is shown.
        admission: knows whether the gateway is stopping.
        admits: whether who has opened a stream may still look.
        mock_control: url of a mock model's control API, or None.
        clock: seconds, monotonic.
        siblings: the other workers, or None.

    Attributes:
        snapshot: of this process.
    """

    def __init__(
        self,
        snapshot: "Snapshot",
        *,
        admission: "Admission",
        admits: "Callable[[web.Request], Awaitable[bool]]",
        mock_control: str | None,
        clock: "Callable[[], float]",
        siblings: "Worker | None" = None,
    ) -> None:
        self.snapshot = snapshot
        self._siblings = siblings
        self._taking = asyncio.Lock()
        self._admission = admission
        self._admits = admits
        self._mock = MockControl(mock_control) if mock_control is not None else None
        self._clock = clock
        self._document = Document()
        self._closing = asyncio.Event()
        self._taken_at = -inf
        self._latest = b""
        self.viewers = 0

    async def page(self, _request: web.Request) -> web.Response:
        """Answer `GET /ui`: the document, which holds nothing of this gateway."""
        headers = {
            "content-type": "text/html; charset=utf-8",
            "content-security-policy": self._document.policy,
            "cross-origin-opener-policy": "same-origin",
            "referrer-policy": "no-referrer",
        }
        return web.Response(body=self._document.body, headers=headers)

    async def live(self, request: web.Request) -> web.StreamResponse:
        """Answer `GET /ui/live`: an event `hello`, then a snapshot each second; `bye` when the gateway stops.

        Raises:
            GatewayDraining: the gateway is stopping.
            GatewayOverloaded: as many pages are open as may be.
        """
        if self._admission.draining:
            raise GatewayDraining
        if self.viewers >= MAX_VIEWERS:
            raise GatewayOverloaded(
                f"{MAX_VIEWERS} live pages are open, and there are no more; close one of them.", reason="viewers"
            )
        self.viewers += 1
        try:
            headers = {"content-type": EVENT_STREAM, "server": SERVER, **UNBUFFERED, **PROTECTED}
            response = web.StreamResponse(headers=headers)
            await response.prepare(request)
            await self._send_all(request, response)
        except ConnectionError:  # the viewer has left
            response.force_close()
        finally:
            self.viewers -= 1
        return response

    async def _send_all(self, request: web.Request, response: web.StreamResponse) -> None:
        """Send snapshots until the gateway stops, the viewer is too slow, or may look no more."""
        hello = {"interval": INTERVAL, "mock": [_shown(action) for action in ACTIONS] if self._mock else []}
        taken = await _taken(request, response, _event("hello", _encode(hello)))
        sent = None
        while taken and not (self._closing.is_set() or self._admission.draining):
            if not await self._admits(request):
                return
            event = await self._next()
            if event is not sent:
                taken, sent = await _taken(request, response, event), event
            with suppress(TimeoutError):
                async with asyncio.timeout(max(LEAST_WAIT, self._taken_at + INTERVAL - self._clock())):
                    await self._closing.wait()
        if taken:
            await _taken(request, response, _event("bye", b"{}"))
            response.force_close()

    async def _next(self) -> bytes:
        """Return the event of the latest snapshot, which is less than a second old."""
        async with self._taking:
            now = self._clock()
            if now - self._taken_at >= INTERVAL:
                self._taken_at = now
                own = self.snapshot.document
                self._latest = _event("now", _encode(await self._siblings.snapshot(own) if self._siblings else own()))
        return self._latest

    def close(self) -> None:
        """End all streams: the gateway stops."""
        self._closing.set()

    async def mock(self, _request: web.Request) -> web.Response:
        """Answer `GET /ui/mock`: the faults that are in force. Raises: NotFound, ConnectionFailed, InvalidResponse."""
        return json_response({"faults": await self._control().faults()})

    async def break_mock(self, request: web.Request) -> web.Response:
        """Answer `POST /ui/mock/{action}`. Raises: NotFound, ConnectionFailed, InvalidResponse."""
        action = BY_NAME.get(request.match_info["action"])
        if action is None:
            raise NotFound(f"There is no such action; there are {', '.join(BY_NAME)}.")
        return json_response({"faults": await self._control().do(action)})

    def _control(self) -> MockControl:
        if self._mock is None:
            raise NotFound("No mock model is known: GATEWAY_UI_MOCK_CONTROL is not set.")
        return self._mock


def _shown(action: Action) -> dict[str, str]:
    return {"name": action.name, "label": action.label, "about": action.about}


def _event(name: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)


async def _taken(request: web.Request, response: web.StreamResponse, event: bytes) -> bool:
    """Send an event; return whether the viewer took it in time. The connection of one that did not is aborted."""
    try:
        async with asyncio.timeout(SLOW):
            await response.write(event)
            await request.writer.drain()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        return False
    return True
