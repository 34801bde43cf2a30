"""One call: what it asks for, its good answer, and how that is sent, or not."""

import asyncio
import socket
import struct
from collections.abc import Iterable, Mapping
from contextlib import AsyncExitStack, suppress
from time import monotonic, time

from aiohttp import web
from multidict import CIMultiDict

from mock_model.answer import EVENT_STREAM, JSON, Answer, Event
from mock_model.errors import error_body, is_anthropic
from mock_model.journal import Ended, Entry, Journal, clip
from mock_model.machine import Machine, Released
from mock_model.order import Order

SETTLE = 0.02
"""Seconds before a reset, for the caller to read what was sent: its kernel may throw unread bytes away."""


class Call:
    """A call under way; until its body has been read, it asks for nothing.

    Attributes:
        path: of the URL.
        model: the one that answers, or None.
        stream: whether the answer is streamed.
        fingerprint: equal for calls with the same path and body.
        occurrence: how many calls with this fingerprint came before it.
        answer: the good one.
        entry: its place in the journal.
        machine: the one it runs on.
        start: instant of the monotonic clock, seconds: when its body had been read; until then, when it came.
        status: of the answer, as soon as there is one.
    """

    def __init__(self, request: web.BaseRequest, *, machine: Machine, journal: Journal) -> None:
        self.path = request.path
        self.model: str | None = None
        self.stream = False
        self.fingerprint = ""
        self.occurrence = 0
        self.answer = Answer()
        self.entry = Entry(
            time=time(),
            method=clip(request.method),
            path=clip(request.path),
            query=clip(request.query_string),
            request_id=_header(request, "x-request-id"),
            traceparent=_header(request, "traceparent"),
        )
        self.machine = machine
        self.start = monotonic()
        self.status: int | None = None
        self.places = AsyncExitStack()
        self._request = request
        self._journal = journal
        self._placed = False
        self._written = 0

    def take(self, order: Order, fingerprint: str, occurrence: int) -> None:
        """Set what the call asks for."""
        self.model = order.model
        self.stream = order.stream
        self.answer = order.answer
        self.fingerprint = self.entry.fingerprint = fingerprint
        self.occurrence = occurrence
        self.entry.model = None if order.asked is None else clip(order.asked)
        self.start = monotonic()

    async def serve(self, answer: Answer | None = None, *, content_type: str | None = None) -> web.StreamResponse:
        """Send the good answer, or another one in its place, at the model's pace."""
        answer = self.answer if answer is None else answer
        if answer.events:
            response = await self.begin(content_type)
            await self.play(response, answer.events)
            return await self.finish(response, "complete" if answer is self.answer else "fault")
        await self.think()
        self._take_effect()
        self.end("complete" if answer is self.answer else "fault")
        return self.reply(answer.status, answer.body, content_type=content_type or answer.content_type)

    async def take_place(self) -> None:
        """Wait for a place among the calls being answered; it is kept until the call ends.

        Where there is nothing to decode (a list of models, an error), no place is needed.
        """
        if self.answer.steps and not self._placed:
            self._placed = True
            await self.places.enter_async_context(self.machine.load.place())

    async def think(self) -> None:
        """Take the time of an unstreamed answer."""
        await self.take_place()
        await self.machine.load.work(self.machine.pace.total(self.fingerprint, self.occurrence, self.answer.steps))

    async def begin(
        self, content_type: str | None = None, *, length: int | None = None, keep_alive: bool = True
    ) -> web.StreamResponse:
        """Send the headers of the good answer, chunked unless a length is given."""
        await self.take_place()
        self._take_effect()
        response = web.StreamResponse(status=self.answer.status, headers=self._headers())
        response.content_type = content_type or self.answer.content_type
        if self.answer.content_type == EVENT_STREAM:
            response.headers["Cache-Control"] = "no-cache"
        if length is not None:
            response.content_length = length
        if not keep_alive:
            response.force_close()
        await response.prepare(self._request)
        self.status = response.status
        return response

    async def play(self, response: web.StreamResponse, events: Iterable[Event]) -> None:
        """Send events, each token at its time."""
        pace, load = self.machine.pace, self.machine.load
        for event in events:
            if event.step:
                await load.work(pace.wait(self.fingerprint, self.occurrence, self._written))
                self._written += 1
            await response.write(event.data)
            self.entry.events_sent += 1

    async def finish(self, response: web.StreamResponse, ended: Ended) -> web.StreamResponse:
        """End an answer properly."""
        self.end(ended)
        await response.write_eof()
        return response

    def reply(
        self,
        status: int,
        body: bytes,
        *,
        content_type: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response:
        """Return a whole answer."""
        self.status = status
        merged = self._headers()
        merged["Content-Type"] = content_type or JSON
        merged.update(headers or {})
        return web.Response(status=status, body=body, headers=merged)

    def reply_error(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> web.Response:
        """Return an error in the form of the API that is called."""
        body = error_body(self.path, status, message, param=param, code=code)
        return self.reply(status, body, headers=headers)

    async def hang(self) -> web.StreamResponse:
        """Send nothing more until the caller leaves, or the mock model stops or is reset."""
        with suppress(Released):
            await self.machine.wait()
        return self.hang_up()

    def hang_up(self) -> web.StreamResponse:
        """Close the connection after what was sent, whatever the headers promised."""
        self.end("fault")
        if self._request.transport is not None:
            self._request.transport.close()
        return web.Response()

    async def reset(self) -> web.StreamResponse:
        """Break the connection with a TCP RST."""
        if self.status is not None:
            await asyncio.sleep(SETTLE)
        self.end("fault")
        transport = self._request.transport
        if transport is not None:
            connection: socket.socket | None = transport.get_extra_info("socket")
            if connection is not None:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        return web.Response()

    def end(self, ended: Ended) -> None:
        """Note in the journal how the call ended, before the caller can see it."""
        self._journal.end(self.entry, ended)

    def _take_effect(self) -> None:
        if self.answer.effect is not None:
            self.answer.effect()

    def _headers(self) -> CIMultiDict[str]:
        request_id = self.entry.request_id or f"req_{self.fingerprint}{self.occurrence}"
        if is_anthropic(self.path):
            return CIMultiDict({"request-id": request_id, "anthropic-organization-id": "mock-model"})
        head = {
            "x-request-id": request_id,
            "openai-version": "2020-10-01",
            "openai-processing-ms": str(int((monotonic() - self.start) * 1000)),
        }
        return CIMultiDict(head)


def _header(request: web.BaseRequest, name: str) -> str | None:
    value = request.headers.get(name)
    return None if value is None else clip(value)
