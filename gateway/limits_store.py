"""Limits that several instances share: reports to the store and its answers, in the background of all requests."""

import asyncio
import logging
from secrets import token_hex
from typing import TYPE_CHECKING, Self

import msgspec

from gateway.phase_timer import ended_within
from gateway.policy.allotment import INTERVAL, Allotment
from gateway.policy.ledger import SETTLES, Answer
from gateway.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gateway.policy.caller import Caller
    from gateway.policy.limits import Limits
    from gateway.store import Store

PREFIX = "llm-gateway:limits:"
PING = 2.0
"""Seconds between two looks at a store of which nothing is asked."""
RETRY = 0.5
"""Seconds until a store that does not answer is asked again."""
BATCH = 200
"""Keys of one exchange; the others have their turn in the next."""
WITHOUT_PAUSE = 20
"""Keys whose reports are made before anything else may run."""
AT_ONCE = 3
"""Reports of a key in one turn: to a new ledger, of what it does not know, and of what was used meanwhile."""
LAST = 1.0
"""Seconds that the last exchange may take: what is held is given back."""

_log = logging.getLogger("gateway")
_encode = msgspec.msgpack.encode
_decode = msgspec.msgpack.Decoder(Answer).decode


class LimitsStore:
    """Leases what the keys may use, while it is entered.

    A store that cannot be used is said once in the log, and asked again; meanwhile each key goes on with its share.

    Args:
        store: which all instances use.
        callers: those with keys.
        fallback_share: the part of a limit that may be used before the store has ever answered.
        clock: of the limits, seconds.
        answered: called with each answer: who waits may have what it brings.

    Attributes:
        exchanges, failures: so many there have been.
    """

    def __init__(
        self,
        store: "Store",
        callers: "Iterable[Caller]",
        fallback_share: float,
        clock: "Callable[[], float]",
        answered: "Callable[[], None]",
    ) -> None:
        self._store = store
        self._clock = clock
        self._answered = answered
        self._fallback_share = fallback_share
        self._well: bool | None = None
        self._settled_at: float | None = None
        self._keys: dict[Allotment, str] = {}
        self._gone: dict[Allotment, str] = {}
        self.follow(callers)
        self._asked: dict[Allotment, None] = {}
        self._answer: asyncio.Future[None] | None = None
        self._wake = asyncio.Event()
        self._stopping = False
        self._asked_last = 0.0
        self._task: asyncio.Task[None] | None = None
        self.exchanges = 0
        self.failures = 0

    def follow(self, callers: "Iterable[Caller]") -> None:
        """Share the limits of these callers from now on; what is held for others is given back."""
        keys = {}
        for caller in callers:
            if caller.limits is not None:  # those without a name have none
                keys[caller.limits.allotment or self._new(caller.limits)] = f"{PREFIX}{caller.name}"
        for each in keys:
            if each in self._keys:
                each.follow()
        self._gone |= {each: key for each, key in self._keys.items() if each not in keys}
        self._keys = keys

    def _new(self, limits: "Limits") -> Allotment:
        allotment = Allotment(limits, token_hex(8), self._fallback_share, self._ask)
        if self._well and self._settled_at is None:
            allotment.come_back()
        return allotment

    @property
    def status(self) -> str:
        """`off` where no key has limits, `degraded` while the store cannot be used, else `ok`."""
        if not self._keys:
            return "off"
        return "ok" if self._well and self._settled_at is None and self._store.keeps else "degraded"

    async def __aenter__(self) -> Self:
        await self._exchange()
        self._task = asyncio.create_task(self._keep())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._stopping = True
            self._wake.set()
            await ended_within(LAST, self._task)
            self._task.cancel()
        await self._store.close()

    def _ask(self, allotment: Allotment) -> "asyncio.Future[None]":
        """Have a key reported at once; requests that ask at the same time are answered together."""
        self._asked[allotment] = None
        self._wake.set()
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
        return self._answer

    async def _keep(self) -> None:
        """Exchange when a key is due or asked for, and a last time."""
        while not self._stopping:
            self._wake.clear()
            if not self._asked:
                try:
                    async with asyncio.timeout(INTERVAL if self._well else RETRY):
                        await self._wake.wait()
                except TimeoutError:
                    pass
            await self._exchange()
        if self._well:
            try:
                await self._give_back(self._gone | self._keys)
            except StoreError as error:
                _log.warning("the shared limits could not be given back to %s: %s", self._store.name, error)

    async def _exchange(self) -> None:
        """Report the keys that are due; what was asked for is answered, or will not be."""
        answer, self._answer = self._answer, None
        asked, self._asked = self._asked, {}
        gone, self._gone = self._gone, {}  # if the store cannot be used now, what is held of them ends by itself
        try:
            if not self._well or self._clock() >= self._asked_last + PING:
                await self._store.ping()
                self._asked_last = self._clock()
                self._is_well()
            await self._give_back(gone)
            now = self._clock()
            if self._settled_at is not None and now >= self._settled_at:
                self._come_back()
            due = [
                *(each for each in asked if each in self._keys),
                *(each for each in self._keys if each not in asked and each.due(now)),
            ][:BATCH]
            for _ in range(AT_ONCE):
                if due:
                    await self._report(due)
                due = [each for each in due if each.at_once]
        except StoreError as error:
            self._is_ill(error)
        except Exception as error:  # what else may be wrong with a store must not end the task  # noqa: BLE001
            _log.exception("the limits store")
            self._is_ill(error)
        finally:
            if answer is not None:
                answer.set_result(None)

    async def _report(self, due: "Sequence[Allotment]") -> None:
        """Report some keys, and take in the answers. Raises: StoreError."""
        reports, keys = [], self._keys
        for number, each in enumerate(due, 1):
            reports.append((keys[each], _encode(each.report(token_hex(8)))))
            if not number % WITHOUT_PAUSE:
                await asyncio.sleep(0)
        self._asked_last = self._clock()
        answers = [_decode(answer) for answer in await self._store.exchange(reports)]
        self.exchanges += 1
        for number, (each, answer) in enumerate(zip(due, answers, strict=True), 1):
            each.answered(answer)
            if not number % WITHOUT_PAUSE:
                await asyncio.sleep(0)
        self._answered()

    async def _give_back(self, keys: "Mapping[Allotment, str]") -> None:
        """Give back what is held of keys: other instances need not wait for its end. Raises: StoreError."""
        leaving = [(key, _encode(each.leave())) for each, key in keys.items() if each.known]
        if leaving:
            await self._store.exchange(leaving)

    def _is_well(self) -> None:
        if self._well:
            return
        first, self._well = self._well is None, True
        if first:
            self._come_back()
            return
        self._settled_at = self._clock() + SETTLES
        for each in self._keys:
            each.catch_up()

    def _come_back(self) -> None:
        """Lease: those who went on without the store have had the time to report, too."""
        if self._settled_at is not None:
            _log.info("limits are shared by %s", self._store.name)
        self._settled_at = None
        for each in self._keys:
            each.come_back()

    def _is_ill(self, error: Exception) -> None:
        self.failures += 1
        again, self._settled_at = self._settled_at is not None, None
        if (self._well or self._well is None) and not again:
            _log.warning(
                "limits cannot be shared by %s: %s; each instance goes on with its share of them meanwhile",
                self._store.name,
                error,
            )
        if self._well or self._well is None:
            for each in self._keys:
                each.go_on()
        self._well = False
