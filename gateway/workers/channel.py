"""Questions and answers between the parent and a worker, over a pair of connected sockets.

A message is its length in 4 bytes, and JSON: `[number, what, data]` asks (number 0: nobody waits for an answer), and
`[-number, failure or null, data]` answers.
"""

import asyncio
import json
import logging
import math
from itertools import count
from time import monotonic
from typing import TYPE_CHECKING, Any, cast

from gateway.phase_timer import PhaseTimer
from gateway.stalls import stalls_of_loop

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    Answer = Callable[[str, Any], Awaitable[Any]]

LENGTH = 4
"""Bytes before each message."""
MOST_UNREAD = 16_777_216
"""Bytes that wait for a process that does not read; nothing more is sent to it."""

_log = logging.getLogger("gateway")


class NoAnswer(Exception):
    """The other process has ended, does not read, or failed to answer."""


class Channel(asyncio.Protocol):
    """One end.

    Args:
        answer: gives the answer to a question: what is asked for, and its data.

    Attributes:
        closed: is set when the other end is gone.
    """

    def __init__(self, answer: "Answer") -> None:
        self.closed = asyncio.Event()
        self._answer = answer
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._numbers = count(1)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._answering: set[asyncio.Task[None]] = set()

    async def open(self, end: "socket.socket") -> None:
        """Use one end of a pair of sockets; it is closed with the channel."""
        stalls_of_loop()  # time in which this process itself stood still is none that the other has taken
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=end)

    def close(self) -> None:
        """Close this end, and so the other."""
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, what: str, data: Any = None, *, timeout: float) -> Any:  # noqa: ANN401, ASYNC109 - JSON; of one answer
        """Return the answer to a question. Raises: NoAnswer, also after `timeout` seconds in which this process ran."""
        number = next(self._numbers)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._send(number, what, data)
            timer = PhaseTimer(monotonic, math.inf)
            timer.limit(timeout, lambda: NoAnswer(f"no answer within {timeout:g} s"))
            with timer:
                return await answer
        finally:
            del self._waiting[number]

    def tell(self, what: str, data: Any = None) -> None:  # noqa: ANN401 - JSON
        """Send what needs no answer, unless the other end is gone."""
        try:
            self._send(0, what, data)
        except NoAnswer:
            return

    def _send(self, number: int, what: str | None, data: Any) -> None:  # noqa: ANN401 - JSON
        transport = self._transport
        if transport is None or self.closed.is_set() or transport.get_write_buffer_size() > MOST_UNREAD:
            raise NoAnswer("the other process does not read")
        message = json.dumps([number, what, data], separators=(",", ":")).encode()
        transport.write(len(message).to_bytes(LENGTH, "big") + message)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not subclasses

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        """Called by asyncio."""
        self.closed.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(NoAnswer("the other process has ended"))
        for task in self._answering:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        """Called by asyncio."""
        received = self._received
        received += data
        while len(received) >= LENGTH and len(received) >= (end := LENGTH + int.from_bytes(received[:LENGTH], "big")):
            number, what, content = json.loads(received[LENGTH:end])
            del received[:end]
            if number < 0:
                self._answered(-number, what, content)
            else:
                task = asyncio.get_running_loop().create_task(self._give_answer(number, what, content))
                self._answering.add(task)
                task.add_done_callback(self._answering.discard)

    def _answered(self, number: int, failure: str | None, data: Any) -> None:  # noqa: ANN401 - JSON
        answer = self._waiting.get(number)  # None: it came too late
        if answer is None or answer.done():
            return
        if failure is None:
            answer.set_result(data)
        else:
            answer.set_exception(NoAnswer(failure))

    async def _give_answer(self, number: int, what: str, data: Any) -> None:  # noqa: ANN401 - JSON
        failure, answer = None, None
        try:
            answer = await self._answer(what, data)
        except Exception as error:  # noqa: BLE001 - whoever asks is told, and this process goes on
            failure = f"it failed: {type(error).__name__}"
            _log.exception("a question of another process failed: %s", what)
        if number:
            try:
                self._send(-number, failure, answer)
            except NoAnswer:
                return
