"""What all calls share: the model's pace and load, and what faults switch."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mock_model.load import Load, Pace


class Released(Exception):
    """The call must not wait any longer: its connection is closed."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine the model runs on.

    Attributes:
        seed: decides every draw.
        pace: the time of each decoding step.
        load: the calls that are being answered.
        refuse: stops listening for some seconds.
        crash: ends the process; a test may replace it.
    """

    seed: int
    pace: Pace
    load: Load
    refuse: Callable[[float], Awaitable[None]]
    crash: Callable[[], None]
    _waiting: set[asyncio.Future[None]] = field(default_factory=set)

    async def wait(self, seconds: float | None = None) -> None:
        """Wait `seconds`, or for ever, because a fault says so.

        Raises:
            Released: `release` was called.
        """
        future = asyncio.get_running_loop().create_future()
        self._waiting.add(future)
        try:
            released, _ = await asyncio.wait((future,), timeout=seconds)
        finally:
            self._waiting.discard(future)
        if released:
            raise Released

    def release(self) -> None:
        """Let go of every call that a fault makes wait."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
