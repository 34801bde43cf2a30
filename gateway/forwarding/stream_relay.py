"""A backend's stream on its way to the caller: events in, checked, out. Here a stream is found cut."""

import asyncio
from typing import TYPE_CHECKING

from gateway.dialects.server_sent_events import EventSplitter, data_of, line_of
from gateway.errors import AnswerTooLarge, BackendError, ErrorEvent, InvalidResponse, Silent, Stalled, drop_frames

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from gateway.backend.client import Exchange
    from gateway.dialects.dialect import StreamState
    from gateway.forwarding.phase_timer import PhaseTimer
    from gateway.policy.byte_budget import Share

LINGER = 1.0
"""Seconds after the last finish reason for what may still come: a usage chunk, `[DONE]`, the end."""
AFTER_DONE = 0.05
"""Seconds after `[DONE]` for the end of the body, so that the connection to the backend can be kept."""


class StreamRelay:
    """Checks every event of a stream before it goes on.

    Args:
        exchange: the answer, its headers checked.
        state: how far the stream has come.
        timer: of the attempt.
        idle: seconds between two reads.
        share: holds the bytes that wait for commit.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        exchange: "Exchange",
        state: "StreamState",
        timer: "PhaseTimer",
        *,
        idle: float,
        share: "Share",
        clock: "Callable[[], float]",
    ) -> None:
        self._exchange = exchange
        self._state = state
        self._timer = timer
        self._idle = idle
        self._share = share
        self._clock = clock
        self._splitter = EventSplitter()
        self._failure: BackendError | None = None
        self._half = 0  # bytes of an event that has not ended

    async def until_first_content(self, due: float, seconds: float, limit: int) -> bytes:
        """Return the events up to the first content event and all that arrived with it.

        Args:
            due: instant of the clock by which content must come.
            seconds: the timeout behind `due`, for the message.
            limit: bytes that are held at most.

        Raises:
            Silent: no content event by then.
            Stalled: nothing at all came for the idle timeout.
            InvalidResponse: cut, or unreadable; AnswerTooLarge.
        """
        held: list[bytes] = []
        size = 0
        while not self._state.content:
            left = due - self._clock()
            if left < self._idle:
                self._timer.limit(left, lambda: no_first_token(seconds))
            else:
                self._timer.limit(self._idle, self._stalled)
            events = self._checked_read(await self._exchange.read())
            size += len(events)
            if size > limit:
                raise AnswerTooLarge(f"The backend sent {limit} bytes without any content.")
            self._share.hold(len(events))
            held.append(events)
            self._raise_failure()
            if self._state.ended and not self._state.content:
                raise InvalidResponse("The backend's stream ended without content.")
        return b"".join(held)

    async def until_complete(self, limit: int) -> bytes:
        """Return the rest of the answer, at most `limit` bytes. Raises: as `until_first_content`, AnswerTooLarge."""
        held: list[bytes] = []
        size = 0

        async def hold(events: bytes) -> None:
            nonlocal size
            size += len(events)
            if size > limit:
                raise AnswerTooLarge(f"The backend's answer is larger than {limit} bytes.")
            self._share.hold(len(events))
            held.append(events)

        await self.pass_on(hold)
        return b"".join(held)

    async def pass_on(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """Pass events on as they arrive, to the end of a complete stream.

        While `write` waits for a slow caller, the idle timer is paused.

        Raises:
            Stalled: nothing came for the idle timeout.
            InvalidResponse: cut, or unreadable; ErrorEvent: the backend sent an error.
        """
        while not self._state.complete and not self._state.ended:
            self._timer.limit(self._idle, self._stalled)
            events = self._checked_read(await self._exchange.read())
            self._timer.pause()
            if events:
                await write(events)
            self._raise_failure()
        if not self._state.complete:
            raise InvalidResponse("The backend's stream ended before its answer was complete.")
        self._timer.pause()
        await self._pass_on_rest(write)

    async def _pass_on_rest(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """Pass on what follows a complete answer within `LINGER`, then make sure that it ends with `[DONE]`."""
        end = self._clock() + (AFTER_DONE if self._state.ended else LINGER)
        while self._failure is None and not self._exchange.at_end:
            try:
                async with asyncio.timeout(end - self._clock()):
                    events = self._checked_read(await self._exchange.read(), may_end=True)
            except TimeoutError:
                break
            except InvalidResponse as cut:
                drop_frames(cut)
                break
            if events:
                await write(events)
            if self._state.ended:
                end = min(end, self._clock() + AFTER_DONE)
        if events := self._checked(self._splitter.end()):
            await write(events)
        done = self._state.done_event
        if not self._state.ended and done is not None:
            await write(done)

    def _checked_read(self, data: bytes, *, may_end: bool = False) -> bytes:
        """Return the events that a read completes, up to the first bad one, which sets `_failure`."""
        line = line_of(data) if not self._splitter.waiting else None
        if line is not None:
            return data if not self._state.ended and self._is_good(data, line) else b""
        try:
            events = self._splitter.feed(data) if data else self._splitter.end()
        except InvalidResponse as failure:
            self._failure = failure
            drop_frames(failure)
            return b""
        if self._splitter.waiting != self._half:
            self._hold_half(self._splitter.waiting)
        if not data and not events and not may_end:
            raise InvalidResponse("The backend's stream was cut off.")
        return self._checked(events)

    def _hold_half(self, size: int) -> None:
        """Count an unfinished event as held. Raises: GatewayOverloaded."""
        more, self._half = size - self._half, size
        if more > 0:
            self._share.hold(more)
        else:
            self._share.give_back(-more)

    def _checked(self, events: list[bytes]) -> bytes:
        """Return those of `events` that may go on: up to the first bad one, or the end."""
        good: list[bytes] = []
        for event in events:
            if self._failure is not None or self._state.ended or not self._is_good(event, data_of(event)):
                break
            good.append(event)
        return b"".join(good)

    def _is_good(self, event: bytes, data: bytes | None) -> bool:
        if not data:  # a comment, or nothing that a reader would see
            return True
        try:
            self._state.feed(data)
        except InvalidResponse as failure:
            self._failure = failure
            drop_frames(failure)
            return False
        if self._state.error is not None:
            self._failure = ErrorEvent(event)
            return False
        return self._state.complete or not self._state.ended

    def _raise_failure(self) -> None:
        """Raise the failure found, unless the answer was already complete."""
        if self._failure is not None and not self._state.complete:
            raise self._failure

    def _stalled(self) -> Stalled:
        return stalled(self._idle)


def stalled(seconds: float) -> Stalled:
    """Return the failure of a body that stopped."""
    return Stalled(f"The backend stopped in the middle of its answer for {seconds:g} s.")


def no_first_token(seconds: float) -> Silent:
    """Return the failure of a stream without content."""
    return Silent(f"The backend sent no content within {seconds:g} s.", timer="first_token")
