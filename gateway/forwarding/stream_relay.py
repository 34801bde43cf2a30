"""A backend's stream on its way to the caller: events in, checked, out. Here a stream is found cut."""

import asyncio
import math
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from gateway.dialects.answer_fields import outer_words
from gateway.dialects.error_words import MAX_WORDS, words_of
from gateway.dialects.json_text import NO_JSON
from gateway.dialects.server_sent_events import EventSplitter, data_of, error_of, line_of, view_of_data
from gateway.errors import AnswerTooLarge, BackendError, ErrorInside, InvalidResponse, Silent, Stalled, drop_frames
from gateway.executor import LARGE
from gateway.phase_timer import PhaseTimer
from gateway.pieces import joined

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from gateway.backend.client import Exchange
    from gateway.dialects.dialect import StreamState
    from gateway.executor import Executor
    from gateway.policy.byte_budget import Share

AFTER_FINISH = 5.0
"""Seconds without an event after the last finish reason that end a stream; each further event starts them anew."""
SLICE = 16_384
"""Bytes of a read that are looked into in one go: some milliseconds, whatever they are."""
AFTER_LAST = 0.05
"""Seconds after the last event for the end of the body, so that the connection to the backend can be kept."""


class StreamRelay:
    """Checks every event of a stream before it goes on.

    Args:
        exchange: the answer, its headers checked.
        state: how far the stream has come.
        timer: of the attempt.
        idle: seconds between two reads.
        max_event: bytes.
        share: holds the bytes that wait for commit.
        executor: looks into large events.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        exchange: "Exchange",
        state: "StreamState",
        timer: "PhaseTimer",
        *,
        idle: float,
        max_event: int,
        share: "Share",
        executor: "Executor",
        clock: "Callable[[], float]",
    ) -> None:
        self._exchange = exchange
        self._state = state
        self._timer = timer
        self._idle = idle
        self._share = share
        self._executor = executor
        self._clock = clock
        self._splitter = EventSplitter(max_event)
        self._failure: BackendError | None = None
        self._half = 0  # bytes of an event that has not ended
        self._at_end = False

    async def until_first_content(
        self, due: float, seconds: float, limit: int, may_go_elsewhere: "Callable[[], bool]"
    ) -> bytes:
        """Return the events up to the first content event and all that arrived with it.

        Args:
            due: instant of the clock by which content must come.
            seconds: the timeout behind `due`. Where nobody else can be asked, signs of life start it anew.
            limit: bytes that are held at most.
            may_go_elsewhere: whether somebody else can be asked.

        Raises:
            Silent: no content event by then.
            Stalled: nothing at all came for the idle timeout.
            InvalidResponse: cut, or unreadable; AnswerTooLarge; ErrorInside.
        """
        held = Held(self._share, limit, f"The backend sent {limit} bytes without any content.")
        alive = False
        while not self._state.content:
            left = due - self._clock()
            if left <= 0 and alive and not may_go_elsewhere():
                due, left = self._clock() + seconds, seconds
            if left < self._idle:
                late = partial(no_first_token, seconds, alive=alive)
                self._timer.limit(seconds, late, began=due - seconds)
            else:
                self._timer.limit(self._idle, self._stalled)
            data = await self._exchange.read()
            alive = alive or bool(data)
            if data and not may_go_elsewhere():
                due = self._clock() + seconds
            await held.add(await self._checked_slowly(data))
            self._raise_failure()
            if (self._state.ended or self._at_end) and not self._state.content:
                if self._state.finished:
                    break
                raise InvalidResponse("The backend's stream ended without content.")
        return held.joined()

    async def until_answer(self, limit: int) -> bytes:
        """Return the events up to the first one of the answer, after any reasoning. Raises: as `until_complete`."""
        held = Held(self._share, limit, f"The backend sent {limit} bytes of reasoning without an answer.")
        while not (self._state.answer or self._state.ended or self._at_end):
            self._timer.limit(self._idle, self._stalled)
            await held.add(await self._checked_slowly(await self._exchange.read()))
            self._raise_failure()
        return held.joined()

    async def until_complete(self, limit: int) -> bytes:
        """Return the rest of the answer, at most `limit` bytes. Raises: as `until_first_content`, AnswerTooLarge."""
        held = Held(self._share, limit, f"The backend's answer is larger than {limit} bytes.")
        await self.pass_on(held.add)
        return held.joined()

    async def pass_on(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """Pass events on as they arrive, to the end of a complete stream.

        While `write` waits for a slow caller, the idle timer is paused.

        Raises:
            Stalled: nothing came for the idle timeout.
            InvalidResponse: cut, or unreadable; ErrorInside: the backend sent an error.
        """
        state, timer, read, splitter = self._state, self._timer, self._exchange.read, self._splitter
        idle, late = self._idle, self._stalled
        while not (state.ended or state.finished or self._at_end):
            timer.limit(idle, late)
            data = await read()
            timer.pause()
            if len(data) <= SLICE and splitter.waiting <= LARGE:
                events = self._checked_read(data)
            else:
                events = await self._checked_slowly(data)
            if events:
                await write(events)
            if self._failure is not None:
                self._raise_failure()
        timer.pause()
        if not (state.ended or self._at_end):
            await self._pass_on_after_finish(write)
        self._raise_failure()
        if not (state.ended or state.finished):
            raise InvalidResponse("The backend's stream ended before its answer was complete.")
        done = state.done_event
        if not state.ended and done is not None:
            await write(done)

    async def _pass_on_after_finish(self, write: "Callable[[bytes], Awaitable[None]]") -> None:
        """Pass on what follows the last finish reason, until the stream ends in any way.

        Usage that was asked for is waited for as long as for any other event.
        """
        last = self._clock()
        while not (self._state.ended or self._at_end or self._failure is not None):
            patience = self._idle if self._state.awaits_usage else AFTER_FINISH
            try:
                with PhaseTimer(self._clock, math.inf) as timer:
                    timer.limit(patience, self._stalled, began=last)
                    data = await self._exchange.read()
                events = await self._checked_slowly(data)
            except (Stalled, InvalidResponse) as end:
                drop_frames(end)
                events = self._checked(self._splitter.end(proper=False))
                self._at_end = True
            if events:
                last = self._clock() if b"data:" in events else last  # a comment is no event
                await write(events)

    async def read_end(self) -> None:
        """Read the end of the body after the last event, so that the connection to the backend can be kept.

        The caller has the whole answer: that it leaves now says nothing.
        """
        if not self._state.ended:
            return
        try:
            await self._read_end()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()

    async def _read_end(self) -> None:
        end = self._clock() + AFTER_LAST
        while not (self._exchange.at_end or self._at_end):
            try:
                async with asyncio.timeout(end - self._clock()):
                    if not await self._exchange.read():
                        return
            except (TimeoutError, InvalidResponse):
                return

    def _checked_read(self, data: bytes) -> bytes:
        """Return the events that a read completes, up to the first bad one, which sets `_failure`."""
        if not self._splitter.waiting and (line := line_of(data)) is not None:
            return data if self._is_good(data, line) else b""
        self._exchange.read_less(len(data))
        events = self._look_into(data)
        self._hold_half()
        return events

    async def _checked_slowly(self, data: bytes) -> bytes:
        """Return the same, looking into a long read slice by slice, so that others get their turn."""
        self._timer.pause()
        if len(data) <= SLICE and self._splitter.waiting <= LARGE:
            return self._checked_read(data)
        self._exchange.read_less(len(data))
        self._exchange.hold_back()  # or what others' turns bring would wait here as well
        good = []
        width = SLICE if self._splitter.waiting <= LARGE else len(data)
        try:
            for at in range(0, len(data) or 1, width or 1):
                piece = data[at : at + width]
                size = self._splitter.waiting + len(piece)
                good.append(await self._checked_piece(size, piece))
                self._hold_half()
                if self._failure is not None or self._state.ended:
                    break
                await asyncio.sleep(0)
        finally:
            self._exchange.go_on()
        return b"".join(good)

    async def _checked_piece(self, size: int, piece: bytes) -> bytes:
        """Return the events that a piece of a read completes, up to the first bad one; `size`: of what is looked into.

        Of large events others see only what is read of them; it is found out where it holds up nobody.
        """
        if size <= LARGE:
            return self._look_into(piece)
        good: list[bytes] = []
        for event in await self._executor.run(size, self._split, piece):
            if self._failure is not None or self._state.ended:
                break
            if len(event) <= LARGE:
                data = data_of(event)
            else:
                try:
                    data = await self._abridged(event)
                except InvalidResponse as failure:
                    self._fail(failure)
                    break
            if not await self._executor.run(size, self._is_good, event, data):
                break
            good.append(event)
        return good[0] if len(good) == 1 else await self._executor.run(size, joined, good)

    async def _abridged(self, event: bytes) -> bytes | None:
        """Return the data of a large event as far as it is read, None when it has none. Raises: InvalidResponse."""
        data = await self._executor.run(len(event), view_of_data, event)
        return await self._executor.read(len(data), _abridged, self._state.abridged, data) if data else None

    def _look_into(self, data: bytes) -> bytes:
        return self._checked(self._split(data))

    def _split(self, data: bytes) -> list[bytes]:
        """Return the events that a read completes; none when it is bad, which sets `_failure`."""
        if not data:
            self._at_end = True
        try:
            events = self._splitter.feed(data) if data else self._splitter.end(proper=True)
        except InvalidResponse as failure:
            self._fail(failure)
            return []
        if self._at_end and not events and not (self._state.finished or self._state.ended):
            raise InvalidResponse("The backend's stream was cut off.")
        return events

    def _hold_half(self) -> None:
        """Count an unfinished event as held. Raises: GatewayOverloaded."""
        more = self._splitter.waiting - self._half
        self._half += more
        if more > 0:
            self._share.hold(more)
        elif more:
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
            return self._is_no_error(event)
        state = self._state
        try:
            state.feed(data)
        except InvalidResponse as failure:
            self._fail(failure)
            return False
        if state.error is not None:
            self._fail(ErrorInside(state.error, event))
            return False
        return state.content or not state.ended

    def _is_no_error(self, event: bytes) -> bool:
        """Return whether an event without data has no `error:` field either."""
        error = error_of(event)
        if error is None:
            return True
        try:
            document = outer_words(error)
        except NO_JSON:
            document = error[:MAX_WORDS].decode(errors="replace")  # a text in place of an object
        self._fail(ErrorInside(words_of(document, {})))
        return False

    def _fail(self, failure: InvalidResponse) -> None:
        self._failure = failure
        drop_frames(failure)

    def _raise_failure(self) -> None:
        """Raise the failure found, unless it only ends an answer that is whole already."""
        if self._failure is not None and not (self._state.finished and not isinstance(self._failure, ErrorInside)):
            raise self._failure

    def _stalled(self) -> Stalled:
        return stalled(self._idle)


def _abridged(abridge: "Callable[[bytes], bytes]", data: bytes | memoryview) -> bytes:
    return abridge(data if isinstance(data, bytes) else joined([data]))


@contextmanager
def held_up(exchange: "Exchange", share: "Share", size: int) -> "Iterator[None]":
    """Read nothing more while the caller has yet to take `size` bytes, and count what waits as held."""
    exchange.hold_back()
    size += exchange.waiting
    share.count(size)
    try:
        yield
    finally:
        share.give_back(size)
        exchange.go_on()


class Held:
    """Bytes that wait for commit, held by a share; beyond the limit in bytes they are too many: `message`."""

    def __init__(self, share: "Share", limit: int, message: str) -> None:
        self._share = share
        self._limit = limit
        self._message = message
        self._events: list[bytes] = []
        self._size = 0

    async def add(self, events: bytes) -> None:
        """Hold further bytes, as `StreamSink.write` sends them. Raises: AnswerTooLarge, GatewayOverloaded."""
        self._size += len(events)
        if self._size > self._limit:
            raise AnswerTooLarge(self._message)
        self._share.hold(len(events))
        if events:
            self._events.append(events)

    def joined(self) -> bytes:
        """Return all of them."""
        return b"".join(self._events)


def stalled(seconds: float) -> Stalled:
    """Return the failure of a body that stopped."""
    return Stalled(f"The backend stopped in the middle of its answer for {seconds:g} s.")


def no_first_token(seconds: float, *, alive: bool = False) -> Silent:
    """Return the failure of a stream without content; `alive`: there were signs of life."""
    return Silent(f"The backend sent no content within {seconds:g} s.", timer="first_token", alive=alive)
