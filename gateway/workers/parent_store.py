"""What a store does for instances, the parent does for its workers: ledgers of shared limits, and hints."""

from collections import OrderedDict
from time import time
from typing import TYPE_CHECKING, Any

import msgspec

from gateway.policy.ledger import Ledger, Report
from gateway.store import StoreError
from gateway.workers.channel import NoAnswer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gateway.workers.worker import Worker

HINTS, SESSIONS = KINDS = "hints", "sessions"
"""Of values."""
MOST = 10_000
"""Ledgers, and values of one kind, that are kept."""

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
        self._worker = worker
        self._kind = kind

    async def ping(self) -> None:
        """Find out whether it answers. Raises: StoreError."""
        await self.exchange([])

    async def exchange(self, reports: "Sequence[tuple[str, bytes]]") -> list[bytes]:
        """Report to the ledgers of these keys; return the answers. Raises: StoreError."""
        answers = await self._ask("ledgers", [[key, report.decode("latin-1")] for key, report in reports])
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
    """The ledgers, at the parent.

    Args:
        clock: seconds since the epoch.
    """

    def __init__(self, *, clock: "Callable[[], float]" = time) -> None:
        self._clock = clock
        self._ledgers: OrderedDict[str, Ledger] = OrderedDict()

    def exchange(self, reports: "Sequence[tuple[str, str]]") -> list[str]:
        """Take in reports, and return the answers."""
        return [
            _encode(self._ledger(key).exchange(_decode(report.encode("latin-1")))).decode("latin-1")
            for key, report in reports
        ]

    def _ledger(self, key: str) -> Ledger:
        ledger = self._ledgers.get(key)
        if ledger is None:
            ledger = self._ledgers[key] = Ledger(self._clock)
            if len(self._ledgers) > MOST:
                self._ledgers.popitem(last=False)
        else:
            self._ledgers.move_to_end(key)
        return ledger


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
