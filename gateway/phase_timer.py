"""One timer for all phases of an attempt, or of any other wait."""

import asyncio
import math
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Self

from gateway.errors import DeadlineExceeded
from gateway.stalls import stalled_since

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

LAST_LOOK = 0.005
"""Seconds after a timer has come due in which the loop reads what has arrived: a phase that it ends is in time."""


class PhaseTimer:
    """Ends the block it surrounds when a phase takes too long, or at the hard end, with the error of that limit.

    A phase begins with `limit` and lasts until the next `limit` or `pause`. The loop's timer is set again only when it
    fires too early: a phase per event of a stream costs a few assignments.

    Time in which the loop stood still does not count against a phase, only against the hard end, which is a promise to
    the caller. And nothing is late before the loop has read once more: what had to come may wait in a socket, where a
    gateway that was itself kept from running has left it.

    Args:
        clock: seconds, monotonic; as the loop's.
        end: instant of `clock`: the hard end.
        end_message: of the error at the hard end.

    Raises (at the end of the block):
        DeadlineExceeded: the hard end came.
        Exception: what `late` returned for the phase that took too long.
    """

    __slots__ = (
        "_armed_for",
        "_began",
        "_cancelling",
        "_clock",
        "_end",
        "_end_message",
        "_handle",
        "_late",
        "_loop",
        "_ran_out",
        "_seconds",
        "_task",
    )

    def __init__(
        self,
        clock: "Callable[[], float]",
        end: float,
        end_message: str = "The deadline passed before the answer was complete.",
    ) -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._end = end
        self._end_message = end_message
        self._began = self._seconds = 0.0
        self._late: Callable[[], Exception] | None = None
        self._ran_out = False
        self._handle: asyncio.Handle | None = None
        self._armed_for = math.inf
        self._task: asyncio.Task[object]
        self._cancelling = 0

    def limit(self, seconds: float, late: "Callable[[], Exception]", *, began: float | None = None) -> None:
        """Begin a phase, or set the limit of the one that goes on.

        Args:
            seconds: it may take at most.
            late: makes its error.
            began: instant of the clock, of a phase that goes on; None: now.
        """
        self._began = self._clock() if began is None else began
        self._seconds = seconds
        self._late = late
        if self._armed_for > self._began + seconds:
            self._arm(self._due)

    def pause(self) -> None:
        """End the phase: only the hard end applies."""
        self._late = None

    def end_at(self, end: float) -> None:
        """Move the hard end; ends the phase."""
        self._end = end
        self.pause()

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a phase timer surrounds a block of a task")
        self._task = task
        self._cancelling = task.cancelling()
        if self._handle is None:
            self._arm(self._due)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: "TracebackType | None"
    ) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        late, self._late = self._late, None  # it may refer to what refers to this timer
        if not self._ran_out:
            return
        # As in asyncio.timeout: a cancellation by somebody else goes on.
        if self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise (late() if late is not None else DeadlineExceeded(self._end_message)) from None

    @property
    def _due(self) -> float:
        """The instant at which the phase is late, or the hard end, if that comes first."""
        return self._end if self._late is None else min(self._began + self._seconds, self._end)

    def _arm(self, due: float) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._armed_for = due
        self._handle = self._loop.call_later(due - self._clock(), self._check)

    def _check(self, looked_for: float | None = None) -> None:
        """Decide whether the phase is late; `looked_for`: the instant due for which the last look has been taken."""
        self._handle = None
        now, due = self._clock(), self._due
        if now >= due and self._late is not None:
            due += stalled_since(self._began)
            if due >= self._end:
                self.pause()
                due = self._end
        if now < due:
            self._arm(due)
        elif looked_for != self._due:
            self._handle = self._loop.call_later(LAST_LOOK, self._check_after_readers, self._due)
        else:
            self._ran_out = True
            self._task.cancel()

    def _check_after_readers(self, looked_for: float) -> None:
        """Check when those have run who wait for what the loop has just read."""
        self._handle = self._loop.call_soon(self._check, looked_for)


async def ended_within(seconds: float, task: "asyncio.Task[None]") -> None:
    """Wait for the end of a task, at most for so many seconds in which the loop ran; after them it goes on."""
    timer = PhaseTimer(monotonic, math.inf)
    timer.limit(seconds, TimeoutError)
    with suppress(TimeoutError), timer:
        await asyncio.wait([task])
