"""`python -m chaos.caller`: the load. A plan on stdin; on stdout an empty line, then one line per call."""

import asyncio
import json
import re
import sys
from collections import deque
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any

import aiohttp
import msgspec
import uvloop

from chaos.load import Call, Plan, Try
from mock_model.draws import fingerprint
from mock_model.text import Writer

COMPLETIONS, RESPONSES = "/v1/completions", "/v1/responses"
LAST_RESPONSES = frozenset({"response.completed", "response.incomplete"})
"""The ends of a whole stream of responses, which has no `[DONE]`."""
PATIENCE = 10.0
"""Seconds after its deadline at which a call counts as hung."""
TICK = 0.01
KEPT = 30.0
"""Seconds for which lag is remembered."""
EDGE = 0.3
"""Seconds after a call's beginning and before its deadline in which the gateway must run for the deadline's sake."""
ERROR_KEYS = {"message", "type", "param", "code"}
OWN_CODES = frozenset(
    """
    invalid_json invalid_request invalid_api_key not_found model_not_found method_not_allowed request_timeout
    request_too_large unsupported_media_type headers_too_large internal_error backend_connection_error
    backend_invalid_response backend_auth_error backend_unavailable gateway_overloaded gateway_draining backend_timeout
    deadline_exceeded
    """.split()  # noqa: SIM905
)
TRY = re.compile(r'attempt-\d+;desc="(\S+) (\S+)"')
SDK_STATUSES = frozenset({408, 409, 429})
SDK_PATIENCE = 60.0
"""Seconds; a longer Retry-After the OpenAI SDKs do not obey."""


class Lag:
    """How long the machine kept this process and the gateways from running, measured all the time.

    This process: how late its timers are. A gateway: the run delay of its main thread, from Linux's schedstat.
    """

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids
        self._late: deque[tuple[float, float]] = deque()
        self._delays: deque[tuple[float, list[float]]] = deque()

    async def watch(self) -> None:
        """Measure until cancelled."""
        while True:
            due = monotonic() + TICK
            await asyncio.sleep(TICK)
            now = monotonic()
            self._late.append((now, now - due))
            self._delays.append((now, [_run_delay(pid) for pid in self._pids]))
            while self._late[0][0] < now - KEPT:
                self._late.popleft()
                self._delays.popleft()

    def of(self, call: Call) -> float:
        """What of it touches a call: ours at worst, and the gateway's at the call's beginning and end."""
        own = max((late for at, late in self._late if at >= call.started), default=0.0)
        if call.gateway is None or call.gateway >= len(self._pids):
            return own
        begun = min(call.started + EDGE, call.ended)
        nearly = max(call.started + call.deadline - EDGE, begun)
        return own + self._delay(call.gateway, call.started, begun) + self._delay(call.gateway, nearly, call.ended)

    def _delay(self, gateway: int, start: float, end: float) -> float:
        values = [delays[gateway] for at, delays in self._delays if start - 2 * TICK <= at <= end + 2 * TICK]
        return max(values) - min(values) if values else 0.0


def _run_delay(pid: int) -> float:
    """Seconds the main thread of a process was ready to run and did not; 0 where that cannot be known."""
    try:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:  # noqa: PTH123 - a hundred times a second
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


@dataclass
class Error:
    """What an error document says."""

    code: str
    param: str | None


def error_in(document: Any) -> Error | None:  # noqa: ANN401
    """The error of a document in OpenAI's form; None when it is none."""
    error = document.get("error") if isinstance(document, dict) else None
    if isinstance(error, dict) and error.keys() == ERROR_KEYS and error["code"] and error["message"]:
        return Error(str(error["code"]), error["param"])
    return None


class Caller:
    """Sends the calls of a plan."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lag = Lag(plan.pids)
        self._writer = None if plan.mock_seed is None else Writer(plan.mock_seed, plan.mock_tokens)
        self._session: aiohttp.ClientSession

    async def run(self, stop: asyncio.Event) -> None:
        """Send until told to stop, then wait for every answer."""
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        async with aiohttp.ClientSession(connector=connector) as self._session:
            watching = asyncio.create_task(self._lag.watch())
            sys.stdout.buffer.write(b"\n")
            sys.stdout.buffer.flush()
            async with asyncio.TaskGroup() as tasks:
                await self._send_all(tasks, stop)
            watching.cancel()

    async def _send_all(self, tasks: asyncio.TaskGroup, stop: asyncio.Event) -> None:
        plan = self._plan
        start = monotonic()
        for tick in count():
            due = start + tick * plan.burst / plan.rate
            wait = due - monotonic()
            if wait > 0:
                try:
                    async with asyncio.timeout(wait):
                        await stop.wait()
                except TimeoutError:
                    pass
            if stop.is_set():
                return
            for number in range(tick * plan.burst, (tick + 1) * plan.burst):
                if plan.total is not None and number >= plan.total:
                    return
                tasks.create_task(self._send(number, due))

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
            call.lag = self._lag.of(call) if call.seconds > call.deadline else 0.0
            sys.stdout.buffer.write(msgspec.json.encode(call) + b"\n")
            sys.stdout.buffer.flush()
            wait = _sdk_waits(call, again)
            if wait is None or again == self._plan.sdk_retries:
                return
            await asyncio.sleep(wait)

    async def _one(self, call: Call, number: int) -> None:
        """To one gateway after the other, until one takes it."""
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
                expected = self._expected(body)
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
        document = {"model": plan.model} | _prompt(
            plan.path, f"Prompt {plan.prefix}-{plan.seed}-{number}: say something.", plan.max_tokens
        )
        if call.kind == "stream":
            document["stream"] = True
        return json.dumps(document).encode()

    def _headers(self, call: Call) -> dict[str, str]:
        headers = {"content-type": "application/json", "x-request-id": call.id, "x-request-timeout": f"{call.deadline}"}
        if self._plan.key:
            headers["authorization"] = f"Bearer {self._plan.key}"
        return headers | self._plan.headers

    def _expected(self, body: bytes) -> str | None:
        """What the mock model says to it."""
        if self._writer is None:
            return None
        return self._writer.write(fingerprint(self._plan.path, body), 0, self._plan.max_tokens).text


def _prompt(path: str, text: str, limit: int | None) -> dict[str, Any]:
    """The fields that carry it, and the limit of the answer, in the API of that path."""
    asked: dict[str, Any]
    if path == RESPONSES:
        asked, name = {"input": text}, "max_output_tokens"
    elif path == COMPLETIONS:
        asked, name = {"prompt": text}, "max_tokens"
    else:
        asked, name = {"messages": [{"role": "user", "content": text}]}, "max_tokens"
    return asked if limit is None else asked | {name: limit}


def _text(document: Any) -> str | None:  # noqa: ANN401
    """What a whole answer says; None when it says nothing."""
    if document.get("object") == "response":
        return "".join(part["text"] for item in document["output"] for part in item["content"])
    for choice in document.get("choices") or ():
        text: str = choice["text"] if "text" in choice else choice["message"]["content"]
        return text
    return None


def _piece(document: Any) -> str:  # noqa: ANN401
    """What an event of a stream adds to the text."""
    if document.get("type") == "response.output_text.delta":
        return str(document["delta"])
    choices = document.get("choices") or ()
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


def _read_headers(call: Call, response: aiohttp.ClientResponse) -> None:
    """What the gateway tells about the call before its body."""
    headers = response.headers
    call.status = response.status
    call.tries = [Try(backend=b, outcome=o) for b, o in TRY.findall(headers.get("server-timing", ""))]
    call.retry_after, call.should_retry = headers.get("retry-after"), headers.get("x-should-retry")
    if len(call.tries) != int(headers.get("x-gateway-attempts", "-1")):
        call.flaw = "x-gateway-attempts and server-timing differ"
    if headers.get("x-request-id") != call.id:
        call.flaw = "another call's x-request-id"


def _judge(call: Call, body: bytes, expected: str | None) -> None:
    """A whole answer."""
    document = json.loads(body)
    if call.status == 200:
        call.outcome = "ok"
        text = _text(document)
        if text is None or (expected is not None and text != expected):
            call.flaw = f"a wrong answer: {body[:200]!r}"
        return
    error = error_in(document)
    if error is None:
        call.outcome, call.flaw = "broken", f"{call.status} without an error document: {body[:200]!r}"
        return
    call.outcome, call.param = error.code, error.param
    answered = bool(call.tries) and call.tries[-1].outcome.startswith("status_")
    if error.code not in OWN_CODES or (error.code == "backend_invalid_response" and answered):
        call.outcome = "backend_error"


class Reading:
    """A stream, event by event: the text so far is the beginning of the right one, the end says how it ended."""

    def __init__(self, call: Call, plan: Plan, expected: str | None) -> None:
        self._call = call
        self._expected = expected
        self._leave_after = plan.leave_after
        self._error_name = "error" if plan.path == RESPONSES else ""
        self._text = ""
        self._last = ""
        self._whole = False
        self._error: Error | None = None

    async def read(self, response: aiohttp.ClientResponse) -> None:
        """To its end, or until the caller leaves."""
        call, name = self._call, ""
        try:
            async for line in response.content:
                if line.startswith(b"event: "):
                    name = line[7:].decode().strip()
                elif line.startswith(b"data: "):
                    self._see(name, line[6:].decode().strip())
                    name = ""
                if self._leave_after is not None and call.events >= self._leave_after:
                    call.outcome = "left"
                    response.close()
                    break
        except aiohttp.ClientPayloadError as broken:
            call.outcome, call.flaw = "broken", f"the connection broke: {broken!r}"
            return
        if self._expected is not None and not self._expected.startswith(self._text):
            call.flaw = f"a wrong text: {self._text!r}"
        if call.outcome != "left":
            self._judge()

    def _see(self, name: str, data: str) -> None:
        call = self._call
        if call.first is None:
            call.first = monotonic()
        if call.error_events:
            call.flaw = "an event after the error"
        self._last, self._whole = data, data == "[DONE]"
        if self._whole:
            call.events += 1
            return
        document = json.loads(data)
        if "error" in document:
            self._error = error_in(document)
            call.error_events += 1
            if not name == document.get("type", "") == self._error_name:
                call.flaw = f"an error event of another API: {name} {data[:200]}"
            return
        call.events += 1
        self._whole = document.get("type") in LAST_RESPONSES
        self._text += _piece(document)

    def _judge(self) -> None:
        call, error = self._call, self._error
        if error is not None:
            call.outcome, call.param = error.code, error.param
        elif self._whole:
            call.outcome = "ok"
            if self._expected is not None and self._text != self._expected:
                call.flaw = f"a text that is not whole: {self._text!r}"
        else:
            call.outcome, call.flaw = "broken", f"a stream that just ends: {self._last[:200]}"
        if call.tries:  # the headers went out before the last attempt had ended
            call.tries[-1].outcome = "ok" if error is None else _word(error)


def _word(error: Error) -> str:
    """The outcome of the attempt that an error event is about."""
    if error.code == "backend_timeout":
        return f"{error.param}_timeout"
    return {"backend_invalid_response": "invalid_response", "gateway_draining": "cancelled"}.get(error.code, error.code)


def _sdk_waits(call: Call, again: int) -> float | None:
    """Seconds until an OpenAI SDK would send the call again; None: it would not."""
    if call.status is None or call.status < 400 or call.should_retry == "false":
        return None
    if call.status not in SDK_STATUSES and call.status < 500:
        return None
    asked = float(call.retry_after or 0)
    return asked if 0 < asked <= SDK_PATIENCE else 0.5 * 2**again


async def main() -> None:
    """Read the plan, send, stop when stdin says so or ends."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    plan = msgspec.json.decode(await reader.readline(), type=Plan)
    stop = asyncio.Event()

    async def listen() -> None:
        await reader.readline()
        stop.set()

    listening = asyncio.create_task(listen())
    await Caller(plan).run(stop)
    listening.cancel()


if __name__ == "__main__":
    uvloop.run(main())
