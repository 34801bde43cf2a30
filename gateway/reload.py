"""Reads the configuration anew: on SIGHUP, and when one of its files has changed and been still for a moment."""

import asyncio
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Self

from watchfiles import awatch

from gateway.files import Files, inode_of, places_of, stamp_of
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable
    from pathlib import Path

    from gateway.config import Routing
    from gateway.files import Stamp
    from gateway.generation import Generation, Generations
    from gateway.policy.pool import Pool

    Read = Callable[[Files], Routing]

STILL = 0.3
"""Seconds for which the files must not have changed before they are read: who writes them may not be done."""
STEP = 50
"""Milliseconds within which changes are reported together."""
LOOK = 5000
"""Milliseconds after which the files are looked at without a report: not every file system sends one."""

_log = logging.getLogger("gateway")


class Reload:
    """Watches the files of the configuration while it is entered, and puts in force what they say.

    Args:
        read: reads the whole configuration, off the event loop.
        files: those that the configuration in force was read from.
        generations: what is in force.
        changed: called with each new generation, when it is in force.
    """

    def __init__(
        self,
        read: "Read",
        *,
        files: Files,
        generations: "Generations",
        changed: "Callable[[Generation], None]",
    ) -> None:
        self._read = read
        self._stamps = self._in_force = files.stamps
        self._generations = generations
        self._changed = changed
        self._asked = asyncio.Event()
        self._reading = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._read_when_asked()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def ask(self) -> None:
        """Read the configuration anew, whether its files have changed or not: somebody sent SIGHUP."""
        self._asked.set()

    async def _read_when_asked(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self._load(asked=True)

    async def _watch(self) -> None:
        """Look at the files whenever something happens where they are, and every few seconds."""
        told = False
        while self._stamps:
            try:
                places = await asyncio.to_thread(_places, self._stamps)
                async with aclosing(_reports(places)) as reports:
                    async for _ in reports:
                        await self._look()
                        if await asyncio.to_thread(_places, self._stamps) != places:
                            break
            except Exception as error:  # noqa: BLE001 - no watch is left, a folder may not be read, whatever it is
                vanished = isinstance(error, FileNotFoundError)  # a folder that was there a moment ago
                if not told and not vanished:
                    _log.warning("the configuration is looked at every %d s, not watched: %s", LOOK // 1000, error)
                    told = True
                await asyncio.sleep(STILL if vanished else LOOK / 1000)
                await self._look()

    async def _look(self) -> None:
        """Read the files if one of them has changed and all of them are still."""
        stamps = await asyncio.to_thread(_now, self._stamps)
        while stamps != self._stamps:
            before = stamps
            await asyncio.sleep(STILL)
            stamps = await asyncio.to_thread(_now, self._stamps)
            if stamps == before != self._stamps:
                await self._load(asked=False)
                return

    async def _load(self, *, asked: bool) -> None:
        """Read the files, and put in force what they say, whole or not at all.

        Args:
            asked: somebody waits for a word about it, even where nothing is new.
        """
        async with self._reading:
            files = Files(again=True)
            if await self._follow(files, asked=asked):
                self._stamps = self._in_force = files.stamps
            else:  # what it named before it went wrong may become right, too
                self._stamps = await asyncio.to_thread(_now, self._in_force) | files.stamps

    async def _follow(self, files: Files, *, asked: bool) -> bool:
        """Do that with these files; return whether they are right."""
        try:
            routing, pool = await asyncio.to_thread(self._prepare, files)
            generation = self._generations.follow(routing, pool)
        except SettingsError as wrong:
            self._refuse(str(wrong), asked=asked)
        except Exception as defect:  # noqa: BLE001 - what is in force stays
            _log.exception("the configuration could not be read")
            self._refuse(f"{type(defect).__name__}, see the log", asked=False)
        else:
            if generation is not None:
                self._changed(generation)
                _log.info(
                    "configuration generation %d is in force: %d backend replica(s), %d gateway key(s)",
                    generation.number,
                    len(generation.pool.replicas),
                    len(generation.keys.callers),
                )
            elif asked:
                _log.info("configuration generation %d stays: nothing has changed", self._generations.current.number)
            return True
        return False

    def _prepare(self, files: Files) -> "tuple[Routing, Pool | None]":
        """Read the files, and make of them what takes time: it happens off the event loop. Raises: SettingsError."""
        routing = self._read(files)
        return routing, self._generations.next_pool(routing)

    def _refuse(self, error: str, *, asked: bool) -> None:
        """Say what is wrong, once."""
        if error == self._generations.error and not asked:
            return
        self._generations.refuse(error)
        _log.error(
            "the new configuration is not in force, generation %d stays: %s", self._generations.current.number, error
        )


async def _reports(places: "Iterable[Path]") -> "AsyncGenerator[None]":
    """Yield when the watch has begun, when something has happened at these places, and every few seconds."""
    changes = awatch(
        *places,
        watch_filter=None,
        debounce=STEP,
        step=STEP,
        rust_timeout=LOOK,
        yield_on_timeout=True,
        recursive=False,
    )
    first = asyncio.ensure_future(anext(changes))
    try:
        await asyncio.sleep(0)  # it begins
        yield
        await first
        yield
        async for _ in changes:
            yield
    finally:
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await changes.aclose()


def _now(files: "Iterable[Path]") -> "dict[Path, Stamp]":
    """Return the stamps that files have now."""
    return {file: stamp_of(file) for file in files}


def _places(files: "Iterable[Path]") -> "dict[Path, tuple[int, int] | None]":
    """Return what must be watched to notice each change of these files, each with what is there."""
    return {place: inode_of(place) for file in files for place in places_of(file)}
