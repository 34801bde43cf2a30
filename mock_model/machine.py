"""What every call stands on: the model's pace and load, and the switches that faults turn."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from mock_model.load import Load, Pace


class Released(Exception):
    """The call shall wait no longer: it is to be hung up on."""


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
    _waiting: set[asyncio.Future[None]] = field(default_factory=set)

    async def wait(self, seconds: float | None = None) -> None:
        """Wait so many seconds for a fault's sake, or for ever.

        Raises:
            Released: `release` was called meanwhile.
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
        """Let every call go that a fault makes wait now."""
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
