"""What every call stands on: the model's pace and load, and the switches that faults turn."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mock_model.load import Load, Pace


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine the model runs on.

    Attributes:
        seed: Decides every draw.
        pace: The time of each decoding step.
        load: The calls that are being answered.
        refuse: Stops listening for so many seconds.
        crash: Ends the process, or what stands for it in a test.
    """

    seed: int
    pace: Pace
    load: Load
    refuse: Callable[[float], Awaitable[None]]
    crash: Callable[[], None]
    _hanging: set[asyncio.Future[None]] = field(default_factory=set)

    async def hang(self) -> None:
        """Wait until `release`, or for ever."""
        future = asyncio.get_running_loop().create_future()
        self._hanging.add(future)
        try:
            await future
        finally:
            self._hanging.discard(future)

    def release(self) -> None:
        """Let every call go that hangs now."""
        for future in self._hanging:
            if not future.done():
                future.set_result(None)
