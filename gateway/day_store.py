"""What is used of the limits of a day, kept over restarts: a file of SQLite. Nothing of it touches a request."""

import asyncio
import logging
import sqlite3
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Protocol, Self

from gateway.phase_timer import ended_within
from gateway.policy.window import DAY, SLOTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from gateway.policy.caller import Caller

    Slots = dict[int, int]
    Change = tuple[str, str, int, int]

FILE = "limits.sqlite"
INTERVAL = 1.0
"""Seconds between two looks at what has changed; a process that is killed loses so much."""
BUSY = 1.0
"""Seconds that the file may be locked by somebody else."""
LAST_SAVE = 3.0
"""Seconds that the last one may take."""
REMEDY = "GATEWAY_STATE_DIR must be a folder that the gateway may write to; a file that is spoilt can be moved away"
TABLE = (
    "CREATE TABLE IF NOT EXISTS used (key TEXT, name TEXT, slot INTEGER, amount INTEGER, PRIMARY KEY (key, name, slot))"
)
ALL = (
    "SELECT key, name, slot, amount FROM used"
    " WHERE typeof(slot) = 'integer' AND typeof(amount) = 'integer' AND amount > 0"
)
ADD = (
    "INSERT INTO used VALUES (?, ?, ?, ?) ON CONFLICT (key, name, slot) DO UPDATE SET amount = amount + excluded.amount"
)
"""Amounts are added: two processes may share the file for a while, as one that stops and its successor do."""

_log = logging.getLogger("gateway")


class Used(Protocol):
    """What was used of one limit."""

    name: str

    def slots(self) -> "Slots":
        """Return what was used in each slot, by its number since the epoch."""

    def restore(self, slots: "Mapping[int, int]", now: float) -> None:
        """Add what was used before the process began."""


class Limited(Protocol):
    """The limits of a key, or, where several processes share them, its ledger.

    Attributes:
        touched: something was used since somebody last set this to False.
    """

    touched: bool

    def of_a_day(self) -> "Sequence[Used]":
        """Return what was used of its limits of a day."""


class DayStore:
    """Restores what was used of the limits of a day when it is entered, and saves it from then on.

    A folder that cannot be used is said once in the log, and tried again; meanwhile the limits hold until a restart.

    Args:
        folder: of the file; None: nothing is kept.
        callers: those with keys.
        clock: of their limits.

    Attributes:
        failing: those of a day cannot be kept at the moment.
    """

    def __init__(self, folder: "Path | None", callers: "Iterable[Caller]", clock: "Callable[[], float]") -> None:
        self._file = folder / FILE if folder is not None else None
        self._clock = clock
        self._limits: dict[str, Limited] = {}
        self._gone: dict[str, Limited] = {}
        self._saved: dict[tuple[str, str], Slots] = {}
        self._restored: dict[tuple[str, str], Used] = {}
        self._is_off = True
        self.follow(callers)
        self.failing = False
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def follow(self, callers: "Iterable[Caller]") -> None:
        """Keep the limits of these callers from now on; what others have used until now is saved once more."""
        limited = {str(caller.name): caller.limits for caller in callers if caller.limits is not None}
        self._is_off = not limited
        before = self._gone | self._limits
        self._limits = {name: limits for name, limits in limited.items() if limits.of_a_day()}
        if self._file is not None:
            self._gone = {name: limits for name, limits in before.items() if name not in self._limits}

    def keep(self, name: str, limited: Limited) -> None:
        """Keep those of one more key."""
        self._limits[name] = limited
        self._gone.pop(name, None)

    def drop(self, name: str) -> None:
        """Keep those of a key no more."""
        gone = self._limits.pop(name)
        if self._file is not None:
            self._gone[name] = gone

    @property
    def status(self) -> str:
        """`off` where no key has limits, `degraded` while those of a day cannot be kept, else `ok`."""
        if self._is_off:
            return "off"
        return "degraded" if self.failing else "ok"

    async def __aenter__(self) -> Self:
        if self._file is not None:
            if self._limits:
                await self._save()
            self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is None:
            return
        self._stopping.set()
        await ended_within(LAST_SAVE, self._task)

    async def _keep(self) -> None:
        """Save once a second, and a last time."""
        stops = False
        while not stops:
            with suppress(TimeoutError):
                async with asyncio.timeout(INTERVAL):
                    stops = await self._stopping.wait()
            await self._save()

    async def _save(self) -> None:
        """Save what has changed, after restoring what was saved before, once."""
        try:
            if self._unrestored():
                self._restore(await asyncio.to_thread(self._read))
            gone = self._gone
            touched = {key: limits for key, limits in (gone | self._limits).items() if limits.touched}
            if touched or self.failing:
                await self._save_those(touched)
            if gone:
                self._forget(gone)
        except Exception as error:  # what else may be wrong with it must not end the task  # noqa: BLE001
            if not isinstance(error, (sqlite3.Error, OSError)):
                _log.exception("the limits of a day")
            if not self.failing:
                _log.warning(
                    "the limits of a day cannot be kept in %s: %s; until they can, a restart forgets what was used. %s",
                    self._file,
                    error.strerror if isinstance(error, OSError) else error,
                    REMEDY,
                )
            self.failing = True
        else:
            if self.failing:
                _log.info("the limits of a day are kept again in %s", self._file)
            self.failing = False

    async def _save_those(self, touched: "dict[str, Limited]") -> None:
        """Save the changes of some keys. Raises: sqlite3.Error, OSError; then they are saved the next time."""
        changes: list[Change] = []
        now = {(key, window.name): window.slots() for key, limits in touched.items() for window in limits.of_a_day()}
        for (key, name), slots in now.items():
            before = self._saved.get((key, name), {})
            for slot in slots.keys() | before.keys():
                more = slots.get(slot, 0) - before.get(slot, 0)
                if more:
                    changes.append((key, name, slot, more))
        for limits in touched.values():
            limits.touched = False
        try:
            await asyncio.to_thread(self._write, changes, int(self._clock() * SLOTS // DAY) - SLOTS)
        except BaseException:
            for limits in touched.values():
                limits.touched = True
            raise
        self._saved |= now

    def _unrestored(self) -> "dict[tuple[str, str], Used]":
        """Return the windows to which what was used before has not been added yet."""
        return {
            (key, window.name): window
            for key, limits in self._limits.items()
            for window in limits.of_a_day()
            if self._restored.get((key, window.name)) is not window
        }

    def _restore(self, used: "dict[tuple[str, str], Slots]") -> None:
        for place, window in self._unrestored().items():
            self._saved[place] = used.get(place, {})
            window.restore(self._saved[place], self._clock())
            self._restored[place] = window

    def _forget(self, gone: "dict[str, Limited]") -> None:
        """Forget keys that are gone: if they come back, what is saved is read anew."""
        self._gone = {name: limits for name, limits in self._gone.items() if name not in gone}
        there = {(key, window.name) for key, limits in self._limits.items() for window in limits.of_a_day()}
        self._restored = {place: window for place, window in self._restored.items() if place in there}
        self._saved = {place: slots for place, slots in self._saved.items() if place in there}

    def _read(self) -> "dict[tuple[str, str], Slots]":
        """Return what was used of each limit of each key, by slot. Raises: sqlite3.Error, OSError."""
        used: dict[tuple[str, str], Slots] = {}
        with closing(self._open()) as database:
            for key, name, slot, amount in database.execute(ALL):
                used.setdefault((key, name), {})[slot] = amount
        return used

    def _write(self, changes: "list[Change]", oldest: int) -> None:
        """Add changes, and drop what is older than a day. Raises: sqlite3.Error, OSError."""
        with closing(self._open()) as database, database:
            database.executemany(ADD, changes)
            database.execute("DELETE FROM used WHERE slot < ? OR amount <= 0", (oldest,))

    def _open(self) -> sqlite3.Connection:
        if self._file is None:
            raise RuntimeError("there is no file")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self._file, timeout=BUSY)
        try:
            database.execute(TABLE)
        except BaseException:
            database.close()
            raise
        return database
