"""The stream: server-sent events in, checked, out."""

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

from gateway.dialects.server_sent_events import EventSplitter, data_of, line_of
from gateway.errors import AnswerTooLarge, BackendError, ErrorEvent, InvalidResponse, Silent, Stalled, let_go

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.backend.client import Exchange
    from gateway.dialects.stream_state import Progress
    from gateway.forwarding.phase_timer import Watch
    from gateway.policy.admission import Share

LINGER = 1.0
"""Seconds after the last finish reason for what may still come: a usage chunk, `[DONE]`, the end."""
AFTER_DONE = 0.05
"""Seconds after `[DONE]` for the end of the body, so that the connection to the backend can be kept."""


class Relay:
    """One backend's stream on its way to the caller. Every event is checked before it goes on.

    Args:
        exchange: the answer, its headers checked.
        progress: what the stream has said so far.
        watch: the attempt's alarm clock.
        idle: seconds between two reads.
        share: holds the bytes that wait for commit.
    """

    def __init__(
        self, exchange: "Exchange", progress: "Progress", watch: "Watch", *, idle: float, share: "Share"
    ) -> None:
        self._exchange = exchange
        self._progress = progress
        self._watch = watch
        self._idle = idle
        self._share = share
        self._splitter = EventSplitter()
        self._failure: BackendError | None = None
        self._half = 0  # bytes of an event that has not ended

    async def until_first_token(self, first_token_due: float, seconds: float, limit: int) -> bytes:
        """Hold what comes up to the first content event and all that arrived with it.

        Args:
            first_token_due: instant of the monotonic clock.
            seconds: the timeout that instant stems from, for the message.
            limit: bytes that are held at most.

        Raises:
            Silent: no content event by then.
            Stalled: nothing at all came for the idle timeout.
            InvalidResponse: cut, or unreadable; AnswerTooLarge.
        """
        held: list[bytes] = []
        size = 0
        while not self._progress.content:
            left = first_token_due - monotonic()
            if left < self._idle:
                self._watch.limit(left, lambda: no_first_token(seconds))
            else:
                self._watch.limit(self._idle, self._stalled)
            events = self._taken(await self._exchange.read())
            size += len(events)
            if size > limit:
                raise AnswerTooLarge(f"The backend sent {limit} bytes without a word of an answer.")
            self._share.take(len(events))
            held.append(events)
            self._check_failure()
            if self._progress.ended and not self._progress.content:
                raise InvalidResponse("The backend's stream ended without an answer.")
        return b"".join(held)

    async def until_complete(self, limit: int) -> bytes:
        """Hold the rest of the answer, `limit` bytes at most. Raises: as `until_first_token`, AnswerTooLarge."""
        held: list[bytes] = []
        size = 0

        async def hold(events: bytes) -> None:
            nonlocal size
            size += len(events)
            if size > limit:
                raise AnswerTooLarge(f"The backend's answer is larger than {limit} bytes.")
            self._share.take(len(events))
            held.append(events)

        await self.pass_on(hold)
        return b"".join(held)

    async def pass_on(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """Pass events on as they arrive, to the end of a complete stream.

        While `write` waits for a slow caller, the idle timer stands still.

        Raises:
            Stalled: nothing came for the idle timeout.
            InvalidResponse: cut, or unreadable; ErrorEvent: ended by the backend's own error.
        """
        while not self._progress.complete and not self._progress.ended:
            self._watch.limit(self._idle, self._stalled)
            events = self._taken(await self._exchange.read())
            self._watch.pause()
            if events:
                await write(events)
            self._check_failure()
        if not self._progress.complete:
            raise InvalidResponse("The backend's stream ended before its answer was whole.")
        self._watch.pause()
        await self._see_out(write)

    async def _see_out(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """The answer is whole: pass on what still comes within `LINGER`, then make sure it has its `[DONE]`."""
        end = monotonic() + (AFTER_DONE if self._progress.ended else LINGER)
        while self._failure is None and not self._exchange.at_end:
            try:
                async with asyncio.timeout(end - monotonic()):
                    events = self._taken(await self._exchange.read(), may_end=True)
            except TimeoutError:
                break
            except InvalidResponse as cut:
                let_go(cut)
                break
            if events:
                await write(events)
            if self._progress.ended:
                end = min(end, monotonic() + AFTER_DONE)
        if events := self._checked(self._splitter.end()):
            await write(events)
        done = self._progress.done_event
        if not self._progress.ended and done is not None:
            await write(done)

    def _taken(self, data: bytes, *, may_end: bool = False) -> bytes:
        """The events that a read completes, as far as they may go on; `_failure` is set when a bad one follows them."""
        line = line_of(data) if not self._splitter.waiting else None
        if line is not None:
            return data if not self._progress.ended and self._good(data, line) else b""
        try:
            events = self._splitter.feed(data) if data else self._splitter.end()
        except InvalidResponse as failure:
            self._failure = failure
            let_go(failure)
            return b""
        if self._splitter.waiting != self._half:
            self._hold_half(self._splitter.waiting)
        if not data and not events and not may_end:
            raise InvalidResponse("The backend's stream was cut.")
        return self._checked(events)

    def _hold_half(self, size: int) -> None:
        """Half an event is held, too. Raises: GatewayOverloaded."""
        more, self._half = size - self._half, size
        if more > 0:
            self._share.take(more)
        else:
            self._share.give_back(-more)

    def _checked(self, events: list[bytes]) -> bytes:
        """Those of `events` that may go on, up to the first bad one or the end."""
        good: list[bytes] = []
        for event in events:
            if self._failure is not None or self._progress.ended or not self._good(event, data_of(event)):
                break
            good.append(event)
        return b"".join(good)

    def _good(self, event: bytes, data: bytes | None) -> bool:
        if not data:  # a comment, or nothing that a reader would be told of
            return True
        try:
            self._progress.see(data)
        except InvalidResponse as failure:
            self._failure = failure
            let_go(failure)
            return False
        if self._progress.error is not None:
            self._failure = ErrorEvent(event)
            return False
        return self._progress.complete or not self._progress.ended

    def _check_failure(self) -> None:
        """What comes after the last finish reason cannot spoil a whole answer."""
        if self._failure is not None and not self._progress.complete:
            raise self._failure

    def _stalled(self) -> Stalled:
        return Stalled(f"The backend's answer stood still for {self._idle:g} s.")


def no_first_token(seconds: float) -> Silent:
    """The failure of a stream without content."""
    return Silent(f"The backend sent no content within {seconds:g} s.", timer="first_token")
