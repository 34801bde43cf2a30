"""A steady open-loop load from a process of its own, and what became of each call."""

import asyncio
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Self

import msgspec

from chaos import REPOSITORY

if TYPE_CHECKING:
    from types import TracebackType

PROMISED = 0.1
"""Seconds after its deadline by which a call must have ended."""
START_SECONDS = 30.0


class Plan(msgspec.Struct, kw_only=True):
    """What the load sends.

    Attributes:
        urls: of the gateways; calls go to them in turn, and to the next one when one cannot be reached or drains.
        rate: calls per second, whatever becomes of them.
        seed: of prompts and ids; prefix: of ids and prompts, where several loads follow one another.
        deadline: seconds; sent as `x-request-timeout`.
        path: the API that is called: chat completions, completions or responses.
        kinds: `answer` or `stream`, in turn.
        total: calls in all; None: until it is stopped.
        burst: so many calls at a time.
        leave_after: callers of streams leave after so many events, or None.
        leave_before: callers leave after so many seconds without an answer, or None.
        max_tokens: asked for.
        model: asked for.
        key: a gateway key.
        mock_seed, mock_tokens: of the mock model, to check each answer's text; None where the model is another.
        sdk_retries: retries of the caller, as the OpenAI SDKs do them.
        headers: further ones.
        pids: of the gateways, to know how long the machine kept each from running.
    """

    urls: list[str]
    rate: float
    seed: int
    prefix: str = "chaos"
    deadline: float = 3.0
    path: str = "/v1/chat/completions"
    kinds: tuple[str, ...] = ("answer", "stream")
    total: int | None = None
    burst: int = 1
    leave_after: int | None = None
    leave_before: float | None = None
    max_tokens: int | None = None
    model: str = "demo-model"
    key: str | None = None
    mock_seed: int | None = None
    mock_tokens: int = 16
    sdk_retries: int = 0
    headers: dict[str, str] = {}
    pids: list[int] = []


class Try(msgspec.Struct, kw_only=True):
    """One attempt of the gateway, as `server-timing` tells it."""

    backend: str
    outcome: str


class Call(msgspec.Struct, kw_only=True):
    """What one caller saw. Instants are seconds of `time.monotonic`, which all processes of a machine share.

    Attributes:
        id: its `x-request-id`.
        kind: `answer` or `stream`.
        late: seconds between when it was due and when it was sent.
        started, ended: sent; last byte.
        first: when the first event of a stream came, or None.
        lag: seconds for which the machine kept the load, or the gateway at the call's beginning and end, from running.
        deadline: seconds.
        gateway: which of the urls answered, or None.
        status: None when not one byte of an answer came.
        outcome: `ok`, `left`, `refused` (no gateway took it), an error's code, or `backend_error` for one passed on.
        param: the error's.
        tries: the gateway's attempts; the last one of a stream is told by its end.
        events: of a stream, error events not included.
        error_events: of a stream.
        retry_after, should_retry: headers, or None.
        flaw: what a caller must never see: a hang, a reset, half an answer, another caller's text, ...; or None.
        drained: gateways that said they were draining before another one took it.
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
    """The load while it is entered: it sends when the block begins; every call has ended when the block has."""

    def __init__(self, plan: Plan, *, on_call: Callable[[Call], None] | None = None) -> None:
        self.plan = plan
        self.calls: list[Call] = []
        self._on_call = on_call
        self._process: asyncio.subprocess.Process
        self._reading: asyncio.Task[None]
        self._news = asyncio.Event()
        self._sending = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "chaos.caller"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=REPOSITORY,
            process_group=0,
            limit=1 << 20,
        )
        self._reading = asyncio.create_task(self._read())
        self._write(msgspec.json.encode(self.plan) + b"\n")
        try:
            async with asyncio.timeout(START_SECONDS):
                await self._sending.wait()
        except TimeoutError:
            self._process.kill()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _trace: "TracebackType | None"
    ) -> None:
        if kind is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
        with contextlib.suppress(ConnectionError):
            self._write(b"stop\n")
        await asyncio.gather(self._reading, return_exceptions=kind is not None)
        code = await self._process.wait()
        if kind is None and code:
            raise RuntimeError(f"the load ended with exit code {code}")

    async def until(self, true: Callable[[Sequence[Call]], bool], seconds: float) -> None:
        """Wait until something is true of the calls so far. Raises: TimeoutError."""
        async with asyncio.timeout(seconds):
            while not true(self.calls):
                self._news.clear()
                await self._news.wait()

    async def all_sent(self, seconds: float) -> None:
        """Wait until all of `plan.total` calls have ended. Raises: TimeoutError."""
        async with asyncio.timeout(seconds):
            await asyncio.shield(self._reading)

    def _write(self, line: bytes) -> None:
        if self._process.stdin is not None:
            self._process.stdin.write(line)

    async def _read(self) -> None:
        decode = msgspec.json.Decoder(Call).decode
        if self._process.stdout is None:
            return
        async for line in self._process.stdout:
            self._sending.set()
            if line == b"\n":
                continue
            call = decode(line)
            self.calls.append(call)
            if self._on_call is not None:
                self._on_call(call)
            self._news.set()


def good(calls: Sequence[Call], *, since: float = 0.0) -> list[Call]:
    """Those that were answered, ended after `since`."""
    return [call for call in calls if call.outcome == "ok" and call.ended >= since]


def sent_between(calls: Sequence[Call], start: float, end: float) -> list[Call]:
    """Those that were sent in that time."""
    return [call for call in calls if start <= call.started < end]


def summary(calls: Sequence[Call]) -> dict[str, int]:
    """How many of each status and outcome."""
    return dict(Counter(f"{call.status} {call.outcome}" for call in calls).most_common())


def now() -> float:
    """The clock of every instant here."""
    return time.monotonic()
