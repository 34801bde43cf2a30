from collections.abc import Sequence
from time import time

from gateway.config import LimitsConfig
from gateway.limits_store import LimitsStore
from gateway.policy.caller import Caller
from gateway.policy.limits import Limits, Reservation
from gateway.workers.parent_store import Ledgers


class OneLedger:
    """A store that answers at once."""

    name = "here"
    keeps = True

    def __init__(self) -> None:
        self._ledgers = Ledgers()

    async def ping(self) -> None:
        """It is there."""

    async def exchange(self, reports: Sequence[tuple[str, bytes]]) -> list[bytes]:
        answers, _ = self._ledgers.exchange(1, [(key, report.decode("latin-1")) for key, report in reports])
        return [answer.encode("latin-1") for answer in answers]

    async def publish(self, values: Sequence[tuple[str, bytes]], seconds: int) -> None:
        """Nobody does."""

    async def look_up(self, key: str, seconds: float) -> None:
        """Return nothing."""

    async def close(self) -> None:
        """Nothing is open."""


async def test_who_waits_is_told_with_each_answer_when_it_has_been_taken_in() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=5), time)
    held: list[int] = []
    caller = Caller("key a", "a", None, limits)
    async with LimitsStore(
        OneLedger(), [caller], 0.25, time, lambda: held.append(limits.requests.windows[0].most)
    ) as store:
        reservation = Reservation(limits, 0)
        assert reservation.take()
        answer = reservation.ask()
        assert answer is not None
        await answer
        assert max(held) >= 1
        assert len(held) == store.exchanges
        assert reservation.take() is None
