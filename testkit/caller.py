"""`python -m testkit.caller`: the worker behind `testkit.load`. Its order is a list of plans, each result a call."""

import asyncio
import json
import re
import ssl
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any, TypeVar

import aiohttp
import msgspec
import uvloop

from testkit.completions import LAST_EVENTS, TYPED_ERRORS, prompt, text_in, text_of
from testkit.http import ERROR_KEYS, Body
from testkit.load import Call, Plan, Try
from testkit.sse import Event, read_events
from testkit.usage import run_delay
from testkit.workers import ordered, report

PATIENCE = 10.0
"""Seconds after its deadline at which a call counts as hung."""
TICK = 0.01
"""Seconds between two measurements of lag."""
KEPT = 30.0
"""Seconds for which lag is remembered."""
EDGE = 0.3
"""Seconds after a call's beginning and before its deadline in which the gateway must run for the deadline's sake."""
OWN_CODES = frozenset(
    """
    invalid_json invalid_request invalid_api_key not_found model_not_found method_not_allowed request_timeout
    request_too_large unsupported_media_type headers_too_large internal_error backend_connection_error
    backend_invalid_response backend_auth_error backend_unavailable gateway_overloaded gateway_draining backend_timeout
    deadline_exceeded backend_rate_limited rate_limit_exceeded model_not_allowed
    """.split()  # noqa: SIM905
)
EITHERS_CODES = frozenset({"backend_invalid_response", "model_not_found", "rate_limit_exceeded"})
"""Codes of the gateway that a backend's own answer can have too."""
TRY = re.compile(r'attempt-\d+;desc="(\S+) (\S+)"')
SDK_STATUSES = frozenset({408, 409, 429})
SDK_PATIENCE = 60.0
"""Seconds; the OpenAI SDKs do not obey a longer Retry-After."""

AnyPlan = TypeVar("AnyPlan", bound=Plan)
Expect = Callable[[bytes], str | None]
"""Returns the text that must answer a request with this body; None: any text is right."""


class Lag:
    """For how long the machine kept this process and the gateways from running, measured all the time.

    This process: how late its timers are. A gateway: the run delay of its main thread.
    """

    def __init__(self) -> None:
        self._late: deque[tuple[float, float]] = deque()
        self._delays: deque[tuple[float, dict[int, float]]] = deque()
        self._due = monotonic() + TICK
        self._pids: set[int] = set()

    async def watch(self, pids: set[int]) -> None:
        """Measure until cancelled."""
        self._pids = pids
        while True:
            self._due = monotonic() + TICK
            await asyncio.sleep(TICK)
            self._measure()

    def _measure(self) -> None:
        now = monotonic()
        self._late.append((now, now - self._due))
        self._delays.append((now, {pid: run_delay(pid) for pid in self._pids}))
        while self._late[0][0] < now - KEPT:
            self._late.popleft()
            self._delays.popleft()

    def of(self, call: Call, pids: list[int]) -> float:
        """Return what of it affects a call: ours at worst, and the gateway's at the call's beginning and end."""
        self._measure()  # what has just kept us from running may have kept this timer from it, too
        own = max((late for at, late in self._late if at >= call.started), default=0.0)
        if call.gateway is None or call.gateway >= len(pids):
            return own
        pid = pids[call.gateway]
        begun = min(call.started + EDGE, call.ended)
        nearly = max(call.started + call.deadline - EDGE, begun)
        return own + self._delay(pid, call.started, begun) + self._delay(pid, nearly, call.ended)

    def _delay(self, pid: int, start: float, end: float) -> float:
        values = [
            delays[pid]
            for at, delays in self._delays
            if start - 2 * TICK <= at <= end + 2 * TICK and delays[pid]  # 0: it has ended
        ]
        return max(values) - min(values) if values else 0.0


@dataclass
class Error:
    """What an error document says."""

    code: str
    param: str | None


def error_in(document: Any) -> Error | None:  # noqa: ANN401 - any JSON
    """Return the error of a document in OpenAI's form or Anthropic's; None when it is none."""
    error = document.get("error") if isinstance(document, dict) else None
    if not isinstance(error, dict) or not error.get("message"):
        return None
    if error.keys() == ERROR_KEYS and error["code"]:
        return Error(str(error["code"]), error["param"])
    if document.keys() == {"type", "error"} and document["type"] == "error" and error.get("type"):
        return Error(str(error.get("code", error["type"])), error.get("param"))
    return None


class Caller:
    """Sends the calls of a plan."""

    def __init__(self, plan: Plan, expect: Expect, lag: Lag) -> None:
        self._plan = plan
        self._expect = expect
        self._lag = lag
        self._session: aiohttp.ClientSession

    async def run(self, finish: asyncio.Event) -> None:
        """Send until it is time to finish, then wait for every answer."""
        plan = self._plan
        tls = ssl.create_default_context(cafile=plan.authority) if plan.authority else True
        connector = aiohttp.TCPConnector(limit=0, force_close=not plan.keep_alive, ssl=tls)
        async with aiohttp.ClientSession(connector=connector) as self._session, asyncio.TaskGroup() as tasks:
            if plan.rate:
                async for number, due in _ticks(plan, finish):
                    tasks.create_task(self._send(number, due))
            numbers = count()
            for _ in range(plan.callers):
                tasks.create_task(self._loop(numbers, finish))

    async def _loop(self, numbers: "count[int]", finish: asyncio.Event) -> None:
        """One call after the other."""
        while not finish.is_set():
            number = next(numbers)
            if self._plan.total is not None and number >= self._plan.total:
                return
            await self._send(number, monotonic())

    async def _send(self, number: int, due: float) -> None:
        kind = self._plan.kinds[number % len(self._plan.kinds)]
        for again in range(self._plan.sdk_retries + 1):
            suffix = f"-again-{again}" if again else ""
            name = f"{self._plan.prefix}-{self._plan.seed}-{number}{suffix}"
            call = Call(id=name, kind=kind, deadline=self._plan.deadline)
            call.started = monotonic()
            call.late = call.started - due
            await self._one(call, number)
            call.ended = monotonic()
            call.lag = self._lag.of(call, self._plan.pids) if call.seconds > call.deadline else 0.0
            report(msgspec.json.encode(call))
            wait = _sdk_waits(call, again)
            if wait is None or again == self._plan.sdk_retries:
                return
            await asyncio.sleep(wait)

    async def _one(self, call: Call, number: int) -> None:
        """Try one gateway after the other, until one takes it."""
        urls = self._plan.urls
        try:
            async with asyncio.timeout(call.deadline + PATIENCE):
                for step in range(len(urls)):
                    call.gateway = (number + step) % len(urls)
                    await self._post(call, urls[call.gateway], number)
                    if call.outcome not in {"refused", "reset", "gateway_draining"}:
                        return
                    if call.outcome == "gateway_draining" and step < len(urls) - 1:
                        call.drained += 1
        except TimeoutError:
            call.outcome, call.flaw = "hung", f"nothing for {PATIENCE:g} s after the deadline"

    async def _post(self, call: Call, url: str, number: int) -> None:
        plan = self._plan
        body = self._body(call, number)
        call.status, call.outcome, call.flaw, call.tries = None, "", None, []
        try:
            async with (
                asyncio.timeout(plan.leave_before),
                self._session.post(url + plan.path, data=body, headers=self._headers(call)) as response,
            ):
                _read_headers(call, response)
                expected = self._expect(body)
                if response.content_type == "text/event-stream":
                    await Reading(call, plan, expected).read(response)
                else:
                    _judge(call, await response.read(), expected)
        except aiohttp.ClientConnectorError:
            call.outcome = "refused"
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
            call.outcome, call.flaw = "reset", repr(error)
        except TimeoutError:
            if plan.leave_before is None:
                raise
            call.outcome = "left"
        except (aiohttp.ClientError, ValueError, OSError) as error:
            call.outcome, call.flaw = "broken", repr(error)

    def _body(self, call: Call, number: int) -> bytes:
        plan = self._plan
        text = f"Prompt {plan.prefix}-{plan.seed}-{number}: say something.".ljust(plan.characters, ".")
        stream = {"stream": True} if call.kind == "stream" else {}
        return json.dumps(prompt(plan.path, text, model=plan.model, limit=plan.max_tokens, **stream)).encode()

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {"content-type": "application/json", "x-request-id": call.id, "x-request-timeout": f"{call.deadline}"}
        if self._plan.key:
            headers["authorization"] = f"Bearer {self._plan.key}"
        return headers | self._plan.headers


async def _ticks(plan: Plan, finish: asyncio.Event) -> AsyncIterator[tuple[int, float]]:
    """Yield the number of each call when it is due, and the instant at which it was; until it is time to finish."""
    start = monotonic()
    for tick in count():
        due = start + tick * plan.burst / plan.rate
        wait = due - monotonic()
        if wait > 0:
            try:
                async with asyncio.timeout(wait):
                    await finish.wait()
            except TimeoutError:
                pass
        if finish.is_set():
            return
        for number in range(tick * plan.burst, (tick + 1) * plan.burst):
            if plan.total is not None and number >= plan.total:
                return
            yield number, due


def _read_headers(call: Call, response: aiohttp.ClientResponse) -> None:
    """Read what the gateway says about the call before its body."""
    headers = response.headers
    call.status = response.status
    call.tries = [Try(backend=b, outcome=o) for b, o in TRY.findall(headers.get("server-timing", ""))]
    call.retry_after, call.should_retry = headers.get("retry-after"), headers.get("x-should-retry")
    if len(call.tries) != int(headers.get("x-gateway-attempts", "-1")):
        call.flaw = "x-gateway-attempts and server-timing differ"
    if headers.get("x-request-id") != call.id:
        call.flaw = "another call's x-request-id"


def _judge(call: Call, body: bytes, expected: str | None) -> None:
    """Judge a whole answer."""
    document = json.loads(body)
    if call.status == 200:
        call.outcome = "ok"
        text = text_of(document)
        if text is None or (expected is not None and text != expected):
            call.flaw = f"a wrong answer: {body[:200]!r}"
        return
    error = error_in(document)
    if error is None:
        call.outcome, call.flaw = "broken", f"{call.status} without an error document: {body[:200]!r}"
        return
    call.outcome, call.param = error.code, error.param
    answered = bool(call.tries) and call.tries[-1].outcome.startswith("status_")
    if error.code not in OWN_CODES or (error.code in EITHERS_CODES and answered):
        call.outcome = "backend_error"


class Reading:
    """A stream, event by event: the text so far is the beginning of the right one, the end says how it ended."""

    def __init__(self, call: Call, plan: Plan, expected: str | None) -> None:
        self._call = call
        self._expected = expected
        self._leave_after = plan.leave_after
        self._error_name = "error" if plan.path in TYPED_ERRORS else ""
        self._text = ""
        self._last = ""
        self._whole = False
        self._error: Error | None = None

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """Read it to its end, or until the caller leaves."""
        call = self._call
        body = Body(response)
        async for event in read_events(body):
            self._see(event)
            if self._leave_after is not None and call.events >= self._leave_after:
                call.outcome = "left"
                response.close()
                break
        if self._expected is not None and not self._expected.startswith(self._text):
            call.flaw = f"a wrong text: {self._text!r}"
        if call.outcome != "left":
            self._judge(cut=body.cut)

    def _see(self, event: Event) -> None:
        call = self._call
        if call.first is None:
            call.first = monotonic()
        if call.error_events:
            call.flaw = "an event after the error"
        self._last, self._whole = event.data, event.data == "[DONE]"
        if self._whole:
            call.events += 1
            return
        document = json.loads(event.data)
        if "error" in document:
            self._error = error_in(document)
            call.error_events += 1
            if not event.name == document.get("type", "") == self._error_name:
                call.flaw = f"an error event of another API: {event.name} {event.data[:200]}"
            return
        call.events += 1
        self._whole = document.get("type") in LAST_EVENTS
        self._text += text_in(document)

    def _judge(self, *, cut: bool) -> None:
        """Judge the end: a failed stream has an error event and no proper end, every other one both the other way."""
        call, error = self._call, self._error
        if error is not None:
            call.outcome, call.param = error.code, error.param
            if not cut:
                call.flaw = call.flaw or "a proper end after an error event"
        elif cut:
            call.outcome, call.flaw = "broken", f"the connection broke: {self._last[:200]}"
            return
        elif self._whole:
            call.outcome = "ok"
            if self._expected is not None and self._text != self._expected:
                call.flaw = f"a text that is not whole: {self._text!r}"
        else:
            call.outcome, call.flaw = "broken", f"a stream that just ends: {self._last[:200]}"
        if call.tries:  # the headers went out before the last attempt had ended
            call.tries[-1].outcome = "ok" if error is None else _word(error)


def _word(error: Error) -> str:
    """Return the outcome of the attempt that an error event is about."""
    if error.code == "backend_timeout":
        return f"{error.param}_timeout"
    return {"backend_invalid_response": "invalid_response", "gateway_draining": "cancelled"}.get(error.code, error.code)


def _sdk_waits(call: Call, again: int) -> float | None:
    """Return the seconds until an OpenAI SDK would send the call again; None: it would not."""
    if call.status is None or call.status < 400 or call.should_retry == "false":
        return None
    if call.status not in SDK_STATUSES and call.status < 500:
        return None
    asked = float(call.retry_after or 0)
    return asked if 0 < asked <= SDK_PATIENCE else 0.5 * 2**again


async def serve(kind: type[AnyPlan], expecting: Callable[[AnyPlan], Expect]) -> None:
    """Take plans of this kind, and send what they say.

    Args:
        kind: How plans are read.
        expecting: Returns, for a plan, what knows the right text of each answer.
    """
    async with ordered() as (order, finish):
        plans: list[AnyPlan] = msgspec.json.decode(order, type=list[kind])  # type: ignore[valid-type]
        lag = Lag()
        watching = asyncio.create_task(lag.watch({pid for plan in plans for pid in plan.pids}))
        report()
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                tasks.create_task(Caller(plan, expecting(plan), lag).run(finish))
        watching.cancel()


def main() -> None:
    """Send; any text is a right answer."""
    uvloop.run(serve(Plan, lambda _plan: lambda _body: None))


if __name__ == "__main__":
    main()
