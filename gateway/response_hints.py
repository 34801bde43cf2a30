"""Where stored responses live, told to other instances through the store: hints, which nobody waits for long."""

import asyncio
import logging
from collections import deque
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Self

import msgspec

from gateway.policy.response_homes import MAX_HOMES, MAX_ID
from gateway.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.policy.response_homes import ResponseHomes
    from gateway.store import Store

PREFIX = "llm-gateway:responses:"
KEPT = 3600
"""Seconds for which the store keeps a hint; this instance tells at most `MAX_HOMES` in so long."""
INTERVAL = 0.2
"""Seconds for which hints are collected."""
MOST_WAITING = 1000
"""Hints that wait to be told."""
PATIENCE = 0.1
"""Seconds that a request waits for a hint."""

_log = logging.getLogger("gateway")
_encode = msgspec.msgpack.encode


class _Hint(msgspec.Struct, array_like=True, frozen=True):
    replica: str
    model: str
    owner: str | None


_decode = msgspec.msgpack.Decoder(_Hint).decode


class ResponseHints:
    """Tells the store where responses live, in the background while it is entered, and asks it for those of others.

    Args:
        store: which all instances use; ids are in it by their digests.
        homes: those that are known here.
        clock: seconds, monotonic.
    """

    def __init__(self, store: "Store", homes: "ResponseHomes", clock: "Callable[[], float]") -> None:
        self._store = store
        self._homes = homes
        self._clock = clock
        self._waiting: dict[str, bytes] = {}
        self._told: deque[float] = deque(maxlen=MAX_HOMES)
        self._noted = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._tell())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    def made(self, response_id: str | None, replica: str, model: str, owner: str | None) -> None:
        """Note that a replica has made a response."""
        if response_id and len(response_id) <= MAX_ID and len(self._waiting) < MOST_WAITING:
            self._waiting[_key(response_id)] = _encode(_Hint(replica, model, owner))
            self._noted.set()

    async def learn(self, response_id: str) -> None:
        """Learn where a response lives that is not known here, if the store tells at once."""
        if self._homes.of(response_id) is not None or len(response_id) > MAX_ID:
            return
        value = await self._store.look_up(_key(response_id), PATIENCE)
        if value is not None:
            with suppress(msgspec.DecodeError, msgspec.ValidationError):
                hint = _decode(value)
                self._homes.made(response_id, hint.replica, hint.model, hint.owner)

    async def _tell(self) -> None:
        while True:
            await self._noted.wait()
            self._noted.clear()
            await asyncio.sleep(INTERVAL)
            hints, self._waiting = self._waiting, {}
            now = self._clock()
            room = MAX_HOMES - sum(at > now - KEPT for at in self._told)
            chosen = list(hints.items())[: max(0, room)]
            self._told.extend([now] * len(chosen))
            try:
                if chosen:
                    await self._store.publish(chosen, KEPT)
            except StoreError as error:
                _log.debug("%d hints about responses were not told: %s", len(chosen), error)


def _key(response_id: str) -> str:
    return PREFIX + sha256(response_id.encode("utf-8", "surrogatepass")).hexdigest()
