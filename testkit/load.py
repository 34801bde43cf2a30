"""A load on gateways from a process of its own, and what became of each call."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import AsyncExitStack
from typing import Self

import msgspec

from testkit.completions import CHAT_PATH, MODEL
from testkit.workers import Worker


class Plan(msgspec.Struct, kw_only=True):
    """What a load sends: `rate` calls a second whatever becomes of them, or `callers` with one call after the other.

    Attributes:
        urls: Of the gateways. Calls go to them in turn, and to the next one when one cannot be reached or drains.
        rate: Calls per second; 0 with `callers`.
        callers: Callers; 0 with `rate`.
        seed: Of prompts and ids.
        prefix: Of prompts and ids, to tell several loads apart.
        deadline: Seconds; sent as `x-request-timeout`.
        path: The API that is called.
        kinds: `answer` or `stream`, in turn.
        total: Calls in all; None until the load is finished.
        burst: Calls at a time.
        leave_after: Events after which the caller of a stream leaves, or None.
        leave_before: Seconds after which a caller without an answer leaves, or None.
        max_tokens: Asked for.
        model: Asked for.
        key: A gateway key.
        characters: Of each prompt, at least.
        sdk_retries: Retries of the caller, as the OpenAI SDKs make them.
        headers: Further ones.
        keep_alive: Whether connections are used again.
        authority: The file of the authority that signed the gateways' certificate; None: one that the system knows.
        pids: Of the gateways, to measure for how long the machine kept each from running.
    """

    urls: list[str]
    rate: float = 0.0
    callers: int = 0
    seed: int
    prefix: str = "chaos"
    deadline: float = 3.0
    path: str = CHAT_PATH
    kinds: tuple[str, ...] = ("answer", "stream")
    total: int | None = None
    burst: int = 1
    leave_after: int | None = None
    leave_before: float | None = None
    max_tokens: int | None = None
    model: str = MODEL
    key: str | None = None
    characters: int = 0
    sdk_retries: int = 0
    headers: dict[str, str] = {}
    keep_alive: bool = False
    authority: str | None = None
    pids: list[int] = []

    def __post_init__(self) -> None:
        if bool(self.rate) == bool(self.callers):
            raise ValueError("a plan has either a rate or callers")


class Try(msgspec.Struct, kw_only=True):
    """One attempt of the gateway, as `server-timing` has it."""

    backend: str
    outcome: str


class Call(msgspec.Struct, kw_only=True):
    """What one caller saw. Instants are seconds of `time.monotonic`, which all processes of a machine share.

    Attributes:
        id: Its `x-request-id`.
        kind: `answer` or `stream`.
        late: Seconds between when it was due and when it was sent.
        started: When it was sent.
        ended: When its last byte came.
        first: When the first event of a stream came, or None.
        lag: Seconds for which the machine kept the load, or the gateway at the call's beginning and end, from running.
        deadline: Seconds.
        gateway: Which of the urls answered, or None.
        status: None when not one byte of an answer came.
        outcome: `ok`, `left`, `refused` (no gateway took it), an error's code, or `backend_error` for one passed on.
        param: The error's.
        tries: The gateway's attempts; how the last one of a stream went is known by its end.
        events: Of a stream, without error events.
        error_events: Of a stream.
        retry_after: The header, or None.
        should_retry: The header, or None.
        flaw: What a caller must never see: a hang, a reset, half an answer, another caller's text, ...; or None.
        drained: Gateways that said they were draining before another one took it.
    """

    id: str
    kind: str
    late: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    first: float | None = None
    lag: float = 0.0
    deadline: float = 0.0
    gateway: int | None = None
    status: int | None = None
    outcome: str = ""
    param: str | None = None
    tries: list[Try] = []
    events: int = 0
    error_events: int = 0
    retry_after: str | None = None
    should_retry: str | None = None
    flaw: str | None = None
    drained: int = 0

    @property
    def seconds(self) -> float:
        """How long the caller waited."""
        return self.ended - self.started

    @property
    def over(self) -> float:
        """Seconds after its deadline, `lag` not counted; negative for a call that ended before."""
        return self.seconds - self.deadline - self.lag


class Load:
    """The load while it is entered: it sends when the block begins; every call has ended when the block has.

    Args:
        plans: What is sent, side by side.
        on_call: Called with each call when it has ended.
        keep: Whether `calls` are kept; a long run has too many.
        caller: The module that sends.
        cores: The cores it may run on; None for all.

    Attributes:
        plans: What is sent.
        calls: Those that have ended.
    """

    def __init__(
        self,
        *plans: Plan,
        on_call: Callable[[Call], None] | None = None,
        keep: bool = True,
        caller: str = "testkit.caller",
        cores: Collection[int] | None = None,
    ) -> None:
        self.plans = plans
        self.calls: list[Call] = []
        self._worker = Worker(caller, msgspec.json.encode(plans), cores=cores)
        self._on_call = on_call
        self._keep = keep
        self._stack = AsyncExitStack()
        self._reading: asyncio.Task[None]
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self._stack.enter_async_context(self._worker)
        self._reading = asyncio.create_task(self._read())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        async with self._stack:
            if kind is None:
                self._worker.finish()
                await self._reading
            else:
                self._reading.cancel()

    @property
    def pid(self) -> int:
        """Of the process that sends; 0 before it has begun."""
        return self._worker.pid

    @property
    def ended(self) -> bool:
        """Whether nothing more is sent and every call has ended."""
        return self._reading.done()

    async def until(self, true: Callable[[Sequence[Call]], bool], seconds: float) -> None:
        """Wait until something is true of the calls so far.

        Raises:
            TimeoutError: It was not, within `seconds`.
        """
        async with asyncio.timeout(seconds):
            while not true(self.calls):
                self._news.clear()
                await self._news.wait()

    async def all_sent(self, seconds: float) -> None:
        """Wait until all of `Plan.total` calls have ended.

        Raises:
            TimeoutError: They had not, within `seconds`.
        """
        async with asyncio.timeout(seconds):
            await asyncio.shield(self._reading)

    async def _read(self) -> None:
        decode = msgspec.json.Decoder(Call).decode
        async for line in self._worker.results():
            call = decode(line)
            if self._keep:
                self.calls.append(call)
            if self._on_call is not None:
                self._on_call(call)
            self._news.set()


def good(calls: Sequence[Call], *, since: float = 0.0) -> list[Call]:
    """Return those that were answered and ended after `since`."""
    return [call for call in calls if call.outcome == "ok" and call.ended >= since]


def sent_between(calls: Sequence[Call], start: float, end: float) -> list[Call]:
    """Return those that were sent in that time."""
    return [call for call in calls if start <= call.started < end]


def summary(calls: Sequence[Call]) -> dict[str, int]:
    """Count the calls of each status and outcome."""
    return dict(Counter(f"{call.status} {call.outcome}" for call in calls).most_common())


def now() -> float:
    """Return the present instant by the clock of every instant here."""
    return time.monotonic()
