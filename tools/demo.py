"""Run the gateway and the mock model here, post one prompt, and show the answer, its headers and its trace.

Both run as processes of their own until Ctrl-C or SIGTERM. They send their spans to a receiver inside this program,
which joins them and prints each request as one tree; with `OTEL_EXPORTER_OTLP_ENDPOINT` set they go there instead.
Ports: `PORT` (the gateway's, 8000), `MOCK_PORT` (the mock model's, 8001), `MOCK_CONTROL_PORT` (one above `MOCK_PORT`).
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from tools.spans import Receiver, Trace, draw

REPOSITORY = Path(__file__).resolve().parent.parent
LOOPBACK = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 10.0
TRACE_SECONDS = 5.0
TREES_PER_SECOND = 5
PROMPT = "Why do language models fail in the middle of a sentence?"
# What a developer's environment may hold and the demo must not obey, since it would call somebody's real model.
REAL_MODELS = ("GATEWAY_CONFIG", "GATEWAY_API_KEYS", "GATEWAY_BACKEND_API_KEY")


class DemoError(Exception):
    """The demo cannot go on; the message is one line for the user, the details are a process's last output."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


# ---- terminal


def _paint(code: str, text: str) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def bold(text: str) -> str:
    """Mark a heading."""
    return _paint("1", text)


def dim(text: str) -> str:
    """Mark what is beside the point."""
    return _paint("2", text)


def red(text: str) -> str:
    """Mark a failure."""
    return _paint("31", text)


def green(text: str) -> str:
    """Mark a success."""
    return _paint("32", text)


def say(text: str = "", end: str = "\n") -> None:
    """Print at once, also into a pipe."""
    try:
        print(text, end=end, flush=True)
    except OSError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        signal.raise_signal(signal.SIGTERM)


@contextlib.contextmanager
def own_terminal() -> Iterator[None]:
    """Hold the terminal while the demo runs: Ctrl-C then reaches it alone, and make ends with its exit code."""
    try:
        terminal = os.open(os.ctermid(), os.O_RDWR)
    except OSError:  # started without one
        yield
        return
    starter = os.getpgrp()
    try:
        if starter == os.getpid() or os.tcgetpgrp(terminal) != starter:  # nobody to share it with, or in the background
            yield
            return
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        signal.signal(signal.SIGTSTP, signal.SIG_IGN)  # the shell would not see that the demo has stopped
        os.setpgid(0, 0)
        os.tcsetpgrp(terminal, os.getpgrp())
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.tcsetpgrp(terminal, starter)
    finally:
        os.close(terminal)


# ---- ports


@dataclass(frozen=True)
class Ports:
    """Where everything listens."""

    gateway: int
    mock_model: int
    mock_control: int

    @classmethod
    def from_environment(cls) -> "Ports":
        """Read the ports and check that they differ and are free."""
        gateway, mock_model = _port("PORT", 8000), _port("MOCK_PORT", 8001)
        ports = {
            "PORT": gateway,
            "MOCK_PORT": mock_model,
            "MOCK_CONTROL_PORT": _port("MOCK_CONTROL_PORT", mock_model + 1),
        }
        taken: list[socket.socket] = []
        try:
            for name, port in ports.items():
                listener = socket.socket()
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken.append(listener)
                try:
                    listener.bind((LOOPBACK, port))
                    listener.listen()
                except OSError as error:
                    raise DemoError(
                        f"port {port}: {error.strerror}; choose another one: make demo {name}=..."
                    ) from error
        finally:
            for listener in taken:
                listener.close()
        return cls(*ports.values())


def _port(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdecimal() or not 0 < int(value) < 1 << 16:
        raise DemoError(f"{name}={value} is no port: give a whole number from 1 to 65535")
    return int(value)


# ---- processes


def _end_with_parent() -> None:
    """Ask Linux to end this process should the demo be killed before it can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


@dataclass
class Child:
    """The gateway or the mock model. Its output is held back until it is healthy, then shown line by line."""

    module: str
    process: asyncio.subprocess.Process
    last_lines: deque[str] = field(default_factory=lambda: deque(maxlen=20))
    show: bool = False

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, module: str, environment: dict[str, str], at_once: asyncio.Event) -> AsyncIterator["Child"]:
        """Run `python -m module`, out of reach of the terminal's Ctrl-C; `at_once` shortens the wait for its end."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", module),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            cwd=REPOSITORY,
            process_group=0,
            preexec_fn=_end_with_parent,
        )
        child = cls(module, process)
        reading = asyncio.create_task(child._read())
        try:
            yield child
        finally:
            await child._stop(at_once)
            await asyncio.wait([reading], timeout=1)

    async def _read(self) -> None:
        stream = self.process.stdout
        if stream is None:
            return
        rest = b""
        while chunk := await stream.read(1 << 16):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                self._take(line)
        if rest:
            self._take(rest)

    def _take(self, line: bytes) -> None:
        text = line.decode(errors="replace")
        self.last_lines.append(text)
        if self.show:
            say(f"{dim(f'{self.module:>10} |')} {text}")

    async def healthy(self, session: aiohttp.ClientSession, url: str) -> None:
        """Wait until GET url answers 200."""
        started = time.monotonic()
        while time.monotonic() - started < START_SECONDS:
            if self.process.returncode is not None:
                raise await self.ended()
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(url, timeout=aiohttp.ClientTimeout(total=2)) as response:
                    if response.ok:
                        seconds = time.monotonic() - started
                        say(f"{green('healthy')}   {url}  {dim(f'{self.module}, after {seconds:.1f} s')}")
                        return
            await asyncio.sleep(0.05)
        raise DemoError(f"{self.module} is not healthy after {START_SECONDS:.0f} s: {url}", "\n".join(self.last_lines))

    async def ended(self) -> DemoError:
        """Wait for the process to end by itself, which it should not; gives what there is to say about it."""
        code = await self.process.wait()
        await asyncio.sleep(0.1)  # its last words are on their way
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return DemoError(f"{self.module} {how}", "" if self.show else "\n".join(self.last_lines))

    async def _stop(self, at_once: asyncio.Event) -> None:
        if self.process.returncode is not None:
            return
        self.process.terminate()
        ended, hurry = asyncio.create_task(self.process.wait()), asyncio.create_task(at_once.wait())
        await asyncio.wait([ended, hurry], timeout=STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not ended.done():
            say(red(f"{self.module} does not stop and is killed"))
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        code = await ended
        if code > 0:
            say(red(f"{self.module} ended with exit code {code}"))


def environments(ports: Ports, endpoint: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Make the environments of the mock model and of the gateway."""
    model = os.environ.get("MODEL_NAME") or "demo-model"
    common = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in REAL_MODELS}
    common |= {"APP_MODE": "dev", "MODEL_NAME": model, "HOST": LOOPBACK, "PYTHONUNBUFFERED": "1"}
    if endpoint:
        common |= {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        common.setdefault("OTEL_BSP_SCHEDULE_DELAY", "200")
        common["NO_PROXY"] = common["no_proxy"] = LOOPBACK
    mock_model = common | {
        "PORT": str(ports.mock_model),
        "CONTROL_HOST": LOOPBACK,
        "CONTROL_PORT": str(ports.mock_control),
    }
    mock_model.setdefault("MOCK_TTFT", "0.2")
    mock_model.setdefault("MOCK_TOKEN_INTERVAL", "0.03")
    gateway = common | {"PORT": str(ports.gateway), "GATEWAY_BACKEND_URLS": f"http://{LOOPBACK}:{ports.mock_model}"}
    gateway.setdefault("GATEWAY_SHUTDOWN_GRACE", "5")
    return mock_model, gateway


# ---- the story


async def post_prompt(session: aiohttp.ClientSession, url: str) -> str:
    """Post a prompt, streamed; show the answer as it comes, then its headers. Gives the id of its trace."""
    say(f"\n{bold('prompt')}    {PROMPT}")
    say(bold("answer"), end="    ")
    body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True}
    async with session.post(url, json=body) as response:
        if not response.ok:
            say(red(await response.text()))
        async for line in response.content:
            data = line.removeprefix(b"data: ").strip()
            if data.startswith(b"{"):
                event = json.loads(data)
                for choice in event.get("choices", []):
                    say(choice["delta"].get("content") or "", end="")
                if "error" in event:
                    say(red(json.dumps(event["error"])), end="")
        say()
        say(f"{bold('headers')}   HTTP {response.status}")
        for name, value in response.headers.items():
            if name.lower().startswith(("content-type", "x-", "server-timing")):
                say(f"          {dim(name.lower() + ':')} {value}")
        return response.headers.get("x-trace-id", "")


def show_trace(trace_id: str, trace: Trace) -> None:
    """Print one trace."""
    say(f"\n{bold('trace')}     {trace_id}")
    say(draw(trace, green, red))


async def show_traces(receiver: Receiver, own: str, own_shown: asyncio.Event) -> None:
    """Print each trace that comes in; under load some, and how many were left out."""
    second, shown, left_out = 0, 0, 0
    async for trace_id, trace in receiver.traces():
        if int(time.monotonic()) != second:
            if left_out:
                say(dim(f"... and {left_out} more traces"))
            second, shown, left_out = int(time.monotonic()), 0, 0
        if shown < TREES_PER_SECOND:
            shown += 1
            show_trace(trace_id, trace)
        else:
            left_out += 1
        if trace_id == own:
            own_shown.set()


def say_what_next(ports: Ports) -> None:
    """Print what to try next."""
    gateway, control = f"http://localhost:{ports.gateway}", f"http://localhost:{ports.mock_control}"
    fault = '[{"kind": "status", "with": {"status": 500}, "times": 1}]'
    say(f"""
{bold("Try it from another terminal")} (each trace is printed here)

{dim("# a prompt, streamed")}
curl -N {gateway}/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'

{dim("# with the OpenAI SDK, from the environment that the demo has made")}
.venv/bin/python -c 'import openai
client = openai.OpenAI(base_url="{gateway}/v1", api_key="none")
prompt = dict(role="user", content="Hello")
print(client.chat.completions.create(model="demo-model", messages=[prompt]).choices[0].message.content)'

{dim("# let the model fail once: the same curl then takes two attempts and still gets its answer")}
curl -X PUT {control}/faults -d '{fault}'

{dim("# how the gateway sees the model, and its metrics")}
curl {gateway}/health
curl {gateway}/metrics

{bold("Ctrl-C stops everything.")}""")


async def tell(ports: Ports, at_once: asyncio.Event) -> None:
    """Start everything, tell the story, and stay until cancelled; whatever happens, nothing is left running."""
    elsewhere = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
    receiver = Receiver()
    async with contextlib.AsyncExitStack() as stack:
        endpoint = None if elsewhere else await stack.enter_async_context(receiver.listening())
        session = await stack.enter_async_context(aiohttp.ClientSession())
        for_mock_model, for_gateway = environments(ports, endpoint)
        mock_model = await stack.enter_async_context(Child.running("mock_model", for_mock_model, at_once))
        await mock_model.healthy(session, f"http://{LOOPBACK}:{ports.mock_model}/health")
        gateway = await stack.enter_async_context(Child.running("gateway", for_gateway, at_once))
        await gateway.healthy(session, f"http://{LOOPBACK}:{ports.gateway}/health")

        trace_id = await post_prompt(session, f"http://{LOOPBACK}:{ports.gateway}/v1/chat/completions")
        if elsewhere:
            say(f"{bold('trace')}     {trace_id} {dim(f'goes to {elsewhere}')}")
        else:
            own_shown = asyncio.Event()
            showing = asyncio.create_task(show_traces(receiver, trace_id, own_shown))
            stack.callback(showing.cancel)
            try:
                await asyncio.wait_for(own_shown.wait(), TRACE_SECONDS)
            except TimeoutError:
                say(red(f"the trace {trace_id} has not come in after {TRACE_SECONDS:.0f} s"))
        say_what_next(ports)
        mock_model.show = gateway.show = True
        ends = [asyncio.create_task(child.ended()) for child in (mock_model, gateway)]
        (first, *_), _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        raise first.result()


async def run() -> int:
    """Run the demo; gives the exit code."""
    at_once = asyncio.Event()
    story = asyncio.create_task(tell(Ports.from_environment(), at_once))
    asked = False

    def on_signal() -> None:
        nonlocal asked
        if asked:
            at_once.set()
        else:
            asked = story.cancel()
            say(f"\n{bold('stopping')}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        await story
    except asyncio.CancelledError:
        say("stopped")
    return 0


def main() -> int:
    """Run the demo; a failure is one line, below what led to it."""
    with own_terminal():
        try:
            return asyncio.run(run())
        except DemoError as error:
            if error.details:
                say(error.details)
            print(red(f"demo: {error}"), file=sys.stderr)
            return 1


if __name__ == "__main__":
    sys.exit(main())
