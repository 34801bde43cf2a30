"""What a store does for instances, the parent does for its workers: ledgers of shared limits, and hints."""

from collections import OrderedDict
from time import time
from typing import TYPE_CHECKING, Any, Self

import msgspec

from gateway.day_store import DayStore
from gateway.limits_store import PREFIX
from gateway.policy.ledger import Ledger, Report
from gateway.policy.limits import Limits
from gateway.store import StoreError
from gateway.workers.channel import NoAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from gateway.config import KeyConfig
    from gateway.workers.worker import Worker

HINTS, SESSIONS = KINDS = "hints", "sessions"
"""Of values."""
MOST = 10_000
"""Values of one kind that are kept, and ledgers, unless all of more count."""

_decode = msgspec.msgpack.Decoder(Report).decode
_encode = msgspec.msgpack.encode


class ParentStore:
    """The worker's side. Bytes go as text of one character a byte: the channel speaks JSON.

    Args:
        worker: which asks the parent.
        kind: of the values that are published: those of one do not push out others.
    """

    name = "the parent process"

    def __init__(self, worker: "Worker", kind: str) -> None:
        self.keeps = True
        self._worker = worker
        self._kind = kind

    async def ping(self) -> None:
        """Find out whether it answers. Raises: StoreError."""
        await self.exchange([])

    async def exchange(self, reports: "Sequence[tuple[str, bytes]]") -> list[bytes]:
        """Report to the ledgers of these keys; return the answers. Raises: StoreError."""
        asked = [[key, report.decode("latin-1")] for key, report in reports]
        answers, self.keeps = await self._ask("ledgers", asked)
        return [answer.encode("latin-1") for answer in answers]

    async def publish(self, values: "Sequence[tuple[str, bytes]]", seconds: int) -> None:
        """Set values that end after so many seconds. Raises: StoreError."""
        await self._ask("publish", [self._kind, seconds, [[key, value.decode("latin-1")] for key, value in values]])

    async def look_up(self, key: str, seconds: float) -> bytes | None:
        """Return a value; None for none, and where it does not come within so many seconds."""
        try:
            value = await self._worker.ask("look_up", [self._kind, key], timeout=seconds)
        except NoAnswer:
            return None
        return None if value is None else str(value).encode("latin-1")

    async def close(self) -> None:
        """Nothing is open."""

    async def _ask(self, what: str, data: Any) -> Any:  # noqa: ANN401 - JSON
        try:
            return await self._worker.ask(what, data)
        except NoAnswer as error:
            raise StoreError(str(error)) from None


class Ledgers:
    """The ledgers, at the parent. Those of keys of which nothing counts any more make room for others.

    Args:
        folder: in which what was used of the limits of a day is kept, while it is entered; None: it is not.
        clock: seconds since the epoch.
    """

    def __init__(self, folder: "Path | None" = None, *, clock: "Callable[[], float]" = time) -> None:
        self._clock = clock
        self._ledgers: OrderedDict[str, Ledger] = OrderedDict()
        self._days = DayStore(folder, (), clock)

    def expect(self, keys: "Iterable[KeyConfig]") -> None:
        """Have the ledgers of these keys, so that what was used of their limits of a day is there when it begins."""
        for key in keys:
            days = [window.name for window in Limits(key.limits, self._clock).of_a_day()]
            if key.name is not None and days:
                self._begin(PREFIX + key.name, days)

    async def __aenter__(self) -> Self:
        await self._days.__aenter__()
        return self

    async def __aexit__(self, *reason: object) -> None:
        await self._days.__aexit__(*reason)

    def exchange(self, sender: int, reports: "Sequence[tuple[str, str]]") -> tuple[list[str], bool]:
        """Take in a worker's reports; return the answers, and whether what was used of the limits of a day is kept."""
        answers = [
            _encode(self._ledger(key).exchange(_decode(report.encode("latin-1")), sender)).decode("latin-1")
            for key, report in reports
        ]
        return answers, not self._days.failing

    def ended(self, sender: int) -> None:
        """Take back what a worker held that has ended."""
        for ledger in self._ledgers.values():
            ledger.ended(sender)

    def used(self) -> dict[tuple[str, str], int]:
        """Return what all have used of limits, by key and limit."""
        return {
            (key.removeprefix(PREFIX), limit): used
            for key, ledger in self._ledgers.items()
            for limit, used in ledger.used().items()
        }

    def _ledger(self, key: str) -> Ledger:
        ledger = self._ledgers.get(key)
        if ledger is None:
            ledger = self._begin(key)
            self._make_room()
        else:
            self._ledgers.move_to_end(key)
        return ledger

    def _begin(self, key: str, days: "Sequence[str]" = ()) -> Ledger:
        ledger = self._ledgers[key] = Ledger(self._clock, days)
        self._days.keep(key.removeprefix(PREFIX), ledger)
        return ledger

    def _make_room(self) -> None:
        while len(self._ledgers) > MOST:
            key, oldest = next(iter(self._ledgers.items()))
            if not oldest.is_over():
                return
            del self._ledgers[key]
            self._days.drop(key.removeprefix(PREFIX))


class Values:
    """Values of one kind, each for a time.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, *, clock: "Callable[[], float]" = time) -> None:
        self._clock = clock
        self._values: OrderedDict[str, tuple[float, str]] = OrderedDict()

    def publish(self, seconds: int, values: "Sequence[tuple[str, str]]") -> None:
        """Keep values for so many seconds."""
        for key, value in values:
            self._values[key] = self._clock() + seconds, value
            self._values.move_to_end(key)
        while len(self._values) > MOST:
            self._values.popitem(last=False)

    def look_up(self, key: str) -> str | None:
        """Return a value, or None."""
        until, value = self._values.get(key, (0.0, ""))
        return value if until > self._clock() else None
