"""A steady open-loop load on the gateway's published port, and what became of each request."""

import asyncio
import contextlib
import itertools
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import aiohttp

from tests.stack.engine import Stack, prompt

ERROR_KEYS = {"message", "type", "param", "code"}


@dataclass(frozen=True)
class Outcome:
    """What one caller saw. Times are `time.time()`.

    Attributes:
        status: None when not one byte of an answer came.
        code: the error's code, of an answer or of a stream's last event.
        flaw: what a caller must never see (half an answer, an error that is none of OpenAI's form), or None.
    """

    started: float
    ended: float
    status: int | None
    code: str | None = None
    flaw: str | None = None

    @property
    def seconds(self) -> float:
        return self.ended - self.started


def code_of(document: Any) -> str | None:  # noqa: ANN401
    """The code of an error document; None when it is no well-formed one."""
    error = document.get("error") if isinstance(document, dict) and len(document) == 1 else None
    return str(error["code"]) if isinstance(error, dict) and error.keys() == ERROR_KEYS else None


def judge(status: int, content_type: str, body: bytes) -> tuple[str | None, str | None]:
    """Read a whole answer: its error's code, its flaw."""
    if content_type == "text/event-stream":
        events = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ")]
        if events and events[-1] == "[DONE]":
            return None, None
        code = code_of(json.loads(events[-1])) if events else None
        return code, None if code else f"a stream that just ends: {body[-200:]!r}"
    document = json.loads(body)
    if status == 200:
        good = isinstance(document, dict) and bool(document.get("choices"))
    else:
        good = code_of(document) is not None
    return code_of(document), None if good else f"{status} with {body[:200]!r}"


async def send(session: aiohttp.ClientSession, url: str, body: dict[str, Any], deadline: float) -> Outcome:
    """Send one request on a connection of its own."""
    started = time.time()
    status: int | None = None
    try:
        async with session.post(url, json=body, headers={"x-request-timeout": str(deadline)}) as response:
            status = response.status
            received = await response.read()
            code, flaw = judge(status, response.content_type, received)
    except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
        refused = status is None and not isinstance(error, TimeoutError)
        return Outcome(started, time.time(), status, flaw=None if refused else repr(error))
    return Outcome(started, time.time(), status, code, flaw)


@contextlib.asynccontextmanager
async def load(stack: Stack, rate: float, deadline: float = 5, tokens: int = 16) -> AsyncIterator[list[Outcome]]:
    """Send `rate` requests a second, every other one streamed, until the block ends; all have ended after it."""
    outcomes: list[Outcome] = []
    url = stack.url("GATEWAY_PORT", "/v1/chat/completions")
    timeout = aiohttp.ClientTimeout(total=deadline + 5)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session, asyncio.TaskGroup() as tasks:

        async def one(number: int) -> None:
            body = prompt(f"Prompt {number}", stream=bool(number % 2), max_tokens=tokens)
            outcomes.append(await send(session, url, body, deadline))

        async def all_of_them() -> None:
            start = time.monotonic()
            for number in itertools.count():
                await asyncio.sleep(start + number / rate - time.monotonic())
                tasks.create_task(one(number))

        sending = tasks.create_task(all_of_them())
        try:
            yield outcomes
        finally:
            sending.cancel()


def summary(outcomes: list[Outcome]) -> dict[str, int]:
    """How many of each kind, for the message of a failed assertion."""
    return dict(Counter(f"{outcome.status} {outcome.code or ''}".strip() for outcome in outcomes))


def flaws(outcomes: list[Outcome]) -> list[str]:
    return [outcome.flaw for outcome in outcomes if outcome.flaw]
