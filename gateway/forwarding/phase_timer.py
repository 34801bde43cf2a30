"""One timer for all phases of an attempt."""

import asyncio
from typing import TYPE_CHECKING, Self

from gateway.errors import DeadlineExceeded

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from gateway.errors import GatewayError


class PhaseTimer:
    """Ends the block it surrounds when a phase takes too long, or at the hard end, with the error of that limit.

    A phase begins with `limit` and lasts until the next `limit` or `pause`. The loop's timer is set again only when it
    fires too early: a phase per event of a stream costs two assignments.

    Args:
        clock: seconds, monotonic; as the loop's.
        end: instant of `clock`: the hard end.
        end_message: of the error at the hard end.

    Raises (at the end of the block):
        DeadlineExceeded: the hard end came.
        GatewayError: what `late` returned for the phase that took too long.
    """

    __slots__ = (
        "_armed_for",
        "_cancelling",
        "_clock",
        "_due",
        "_end",
        "_end_message",
        "_handle",
        "_late",
        "_loop",
        "_ran_out",
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
        self._due = end
        self._late: Callable[[], GatewayError] | None = None
        self._ran_out = False
        self._handle: asyncio.TimerHandle | None = None
        self._armed_for = end
        self._task: asyncio.Task[object]
        self._cancelling = 0

    def limit(self, seconds: float, late: "Callable[[], GatewayError]") -> None:
        """Begin a phase of at most `seconds`; `late` makes its error."""
        due = self._clock() + seconds
        if due < self._end:
            self._due, self._late = due, late
        else:
            self._due, self._late = self._end, None
        if self._handle is None or self._armed_for > self._due:
            self._arm()

    def pause(self) -> None:
        """End the phase: only the hard end applies."""
        self._due, self._late = self._end, None

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
            self._arm()
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

    def _arm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
        self._armed_for = self._due
        self._handle = self._loop.call_later(self._due - self._clock(), self._check)

    def _check(self) -> None:
        self._handle = None
        if self._clock() < self._due:
            self._arm()
            return
        self._ran_out = True
        self._task.cancel()
