"""What a request costs inside the process: the whole way through Python without sockets, precise to about 2 %.

`python -m bench.inside [--rounds 12] [--traced] [--events N] [--key named|limited] FOLDER...`: each FOLDER holds a
`gateway/` to be measured, such as `.` and a copy with one thing changed; `bare` is the bare pass-through. All run side
by side, one slice of requests after the other; ratios are to the first. With `--events` the answers are streams of so
many events, each read by itself, and the figures are per event. With `--key` each request shows a gateway key: one that
has a name alone, or limits of every kind as well. With `--count` instructions are counted instead of time, by valgrind:
to 1 %, whatever else the machine does. That is fifty times as slow, so the gateway's clock goes on when it is asked:
else what is done once a second would be counted fifty times as often as it happens.
"""

import argparse
import asyncio
import gc
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO, cast

import aiohttp
import uvloop

from bench import bare
from bench.backend import DEFAULT_ANSWER, HEAD, LAST, ROLE, content_event
from bench.caller import Spec, body
from bench.machine import BenchError, Cores, tool
from testkit.processes import python

SLICE = 4000
"""Requests between two looks at the clock; a stream counts as many as it has events, by twenties."""
SHORT = 20
"""So much shorter is a slice whose instructions are counted: that takes fifty times as long."""
ASKED = 1e-4
"""Seconds by which the clock of a counted gateway goes on when it is asked: so a request takes as long as it should."""
CALLERS = 32
REST = 0.7
"""Seconds for what was put off: exports and logs; their CPU time counts."""
SELDOM = 3600.0
"""Seconds between exports of metrics, which are not measured."""
BARE = "bare"
NOWHERE = "http://127.0.0.1:9"

KEY = "measured"
LIMITS = (
    "{requests_per_minute: 1000000, requests_per_day: 100000000, tokens_per_minute: 100000000, "
    "tokens_per_day: 1000000000, max_in_flight: 1000}"
)
"""None of them refuses a request."""

Peer = Callable[["Wire", bytes], None]


class Wire(asyncio.Transport):
    """A connection whose other end is a function."""

    def __init__(self, peer: Peer) -> None:
        super().__init__()
        self._peer = peer
        self._closed = False
        self.protocol: Any = None

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401 - asyncio's signature
        """An address."""
        return ("127.0.0.1", 1) if name in {"peername", "sockname"} else default

    def is_closing(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """No more."""
        self._closed = True

    abort = close

    def write(self, data: Any) -> None:  # noqa: ANN401 - any buffer
        """To the other end."""
        self._peer(self, bytes(data))

    def get_write_buffer_size(self) -> int:
        """Nothing waits."""
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits."""

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        """Nothing is read."""


def connected(protocol: Any, peer: Peer) -> Wire:  # noqa: ANN401 - aiohttp's, of either side
    """A connection of a protocol."""
    wire = Wire(peer)
    wire.protocol = protocol
    protocol.connection_made(wire)
    return wire


class Backend:
    """One canned answer, or a stream of `events` events, one in each turn of the loop."""

    def __init__(self, events: int) -> None:
        self._events = events

    def __call__(self, wire: Wire, _request: bytes) -> None:
        """Answer a request."""
        loop = asyncio.get_running_loop()
        if self._events:
            loop.call_soon(wire.protocol.data_received, HEAD + ROLE)
            loop.call_soon(self._send, wire, self._events)
        else:
            loop.call_soon(wire.protocol.data_received, DEFAULT_ANSWER)

    def _send(self, wire: Wire, left: int) -> None:
        wire.protocol.data_received(content_event() if left else LAST)
        if left:
            asyncio.get_running_loop().call_soon(self._send, wire, left - 1)


def connect_to(backend: Backend, told: Callable[[], None]) -> None:
    """All connections that aiohttp makes end at the backend; `told` of each."""

    async def connect(connector: Any, *_: object) -> Any:  # noqa: ANN401
        protocol = connector._factory()  # noqa: SLF001 - aiohttp offers no other way in
        connected(protocol, backend)
        told()
        return protocol

    aiohttp.TCPConnector._create_connection = connect  # type: ignore[assignment, method-assign]  # noqa: SLF001


async def bare_server(events: int) -> Any:  # noqa: ANN401 - aiohttp's server
    """The server of the bare pass-through."""
    connect_to(Backend(events), lambda: None)
    runner = aiohttp.web.AppRunner(bare.application(NOWHERE), access_log=None)
    await runner.setup()
    return runner.server


def configured(key: str | None) -> tuple[Any, Any]:
    """Settings and routing of a gateway: open, or with a key that is only `named`, or `limited` as well."""
    from gateway.config import load_routing
    from gateway.settings import load

    os.environ |= {"APP_MODE": "prod", "MEASURED_KEY": KEY}
    if key is None:
        os.environ["GATEWAY_BACKEND_URLS"] = NOWHERE
        settings = load()
        return settings, load_routing(settings)
    limits = f", limits: {LIMITS}" if key == "limited" else ""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "gateway.yaml")
        file.write_text(
            f"backends: {{backend-1: {{url: {NOWHERE!r}}}}}\n"
            'routes: [{model: "*", targets: [{backend: backend-1}]}]\n'
            f"keys: [{{name: team, key_env: MEASURED_KEY{limits}}}]\n",
            encoding="utf-8",
        )
        os.environ["GATEWAY_CONFIG"] = str(file)
        settings = load()
        return settings, load_routing(settings)


async def gateway_of(folder: str, options: argparse.Namespace) -> Any:  # noqa: ANN401 - aiohttp's server
    """The server of the gateway in a folder: a call makes the protocol of a new connection."""
    sys.path.insert(0, folder)
    # ruff: noqa: PLC0415 - of the folder, not ours
    from gateway.app import PARTS, create_app, runner_of
    from gateway.backend import aiohttp_connection
    from gateway.server.listener import GC_THRESHOLD
    from gateway.telemetry import Telemetry
    from gateway.telemetry.logs import RequestLog
    from gateway.telemetry.otlp_exporter import OtlpHttpExporter
    from gateway.telemetry.output import Output
    from gateway.telemetry.tracing import Tracer

    class Nobody(OtlpHttpExporter):
        def send(self, body: bytes) -> bool:
            return len(body) > 0

    # An older checkout takes a connection for new only if it is told.
    connect_to(Backend(options.events), getattr(aiohttp_connection, "note_new_connection", lambda: None))
    settings, routing = configured(options.key)
    nowhere = Path(os.devnull).open("w", encoding="utf-8")  # noqa: ASYNC230, SIM115 - as long as the process lives
    output = Output("stdout", nowhere)
    output.start()
    log = RequestLog(level="INFO", as_json=True, stream=cast("TextIO", output))
    tracer = Tracer(Nobody(endpoint=NOWHERE) if options.traced else None)
    telemetry = Telemetry(
        settings, tracer=tracer, log=log, **(_metric_export(tracer.resource) if options.traced else {})
    )
    clock = partial(next, itertools.count(time.monotonic(), ASKED)) if options.count else time.monotonic
    app = create_app(settings, routing, telemetry, clock=clock)
    runner = runner_of(app)
    await runner.setup()
    for watcher in ("health", "model_lists"):  # no probes; an older checkout asks for no lists
        if (watching := getattr(app[PARTS], watcher, None)) is not None:
            await watching.__aexit__()
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    return runner.server


def _metric_export(resource: Any) -> dict[str, Any]:  # noqa: ANN401
    """Have GenAI's metrics counted, as they are where a collector is set; an older checkout has none."""
    try:
        from gateway.telemetry.metric_export import MetricExport
        from gateway.telemetry.otlp_exporter import OtlpHttpMetricExporter
    except ImportError:
        return {}
    return {"metric_export": MetricExport(OtlpHttpMetricExporter(NOWHERE), resource=resource, interval=SELDOM)}


async def measured(options: argparse.Namespace) -> None:
    """Run a slice of so many calls per line of our input, and print the CPU time per request or event, us."""
    folder, events, calls = options.folders[0], options.events, options.calls
    server = await (bare_server(events) if folder == BARE else gateway_of(folder, options))
    prompt = body(Spec(mode="load", stream=events > 0))
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"%scontent-length: %d\r\n\r\n%s"
        % (b"authorization: Bearer %s\r\n" % KEY.encode() if options.key is not None else b"", len(prompt), prompt)
    )
    loop = asyncio.get_running_loop()
    left = 0
    done = loop.create_future()

    def call(wire: Wire, data: bytes) -> None:
        nonlocal left
        if b'"error"' in data or (data.startswith(b"HTTP/1.1") and not data.startswith(b"HTTP/1.1 200 ")):
            if not done.done():
                done.set_exception(RuntimeError(f"a call failed: {data[:300]!r}"))
            return
        if events and not data.endswith(b"0\r\n\r\n"):
            return
        left -= 1
        if left > 0:
            loop.call_soon(wire.protocol.data_received, request)
        elif left == 1 - CALLERS:
            done.set_result(None)

    wires = [connected(server(), call) for _ in range(CALLERS)]
    while await asyncio.to_thread(sys.stdin.readline):
        left, done = calls - CALLERS + 1, loop.create_future()
        before = time.process_time()
        for wire in wires:
            wire.protocol.data_received(request)
        await done
        await asyncio.sleep(REST)
        print((time.process_time() - before) / calls / (events or 1) * 1e6, flush=True)
    os._exit(0)


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--traced", action="store_true", help="make spans and count GenAI's metrics, send nothing")
    parser.add_argument("--events", type=int, default=0, help="of each answer; 0: it is no stream")
    parser.add_argument("--key", choices=["named", "limited"], help="each request shows a key: a name, or limits too")
    parser.add_argument("--count", action="store_true", help="instructions, not time (needs valgrind)")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--calls", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def child_of(folder: str, options: argparse.Namespace, calls: int) -> list[str]:
    """The command that measures one folder."""
    path = folder if folder == BARE else str(Path(folder).resolve())
    more = [f"--{name}" for name in ("traced", "count") if getattr(options, name)]
    more += ["--key", options.key] if options.key else []
    return python("bench.inside", "--child", "--calls", str(calls), "--events", str(options.events), *more, path)


def times(options: argparse.Namespace, calls: int) -> list[list[float]]:
    """CPU time per request or event, us, of each folder in each round.

    Raises:
        BenchError: a child failed.
    """
    children = [
        subprocess.Popen(child_of(folder, options, calls), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for folder in options.folders
    ]
    costs: list[list[float]] = [[] for _ in children]
    try:
        for number in range(-1, options.rounds):
            for child, cost in list(zip(children, costs, strict=True))[:: 1 if number % 2 else -1]:
                if child.stdin is None or child.stdout is None:
                    raise RuntimeError("a child has no pipes")
                child.stdin.write("\n")
                child.stdin.flush()
                line = child.stdout.readline()
                if not line:
                    raise BenchError("a child failed")
                if number >= 0:
                    cost.append(float(line))
    finally:
        for child in children:
            child.kill()
            child.wait()
    return costs


def instructions(folder: str, options: argparse.Namespace, calls: int) -> float:
    """Per request or event: what two further slices take.

    Raises:
        Missing: valgrind is not installed.
        BenchError: the child failed.
    """
    valgrind = [tool("valgrind", "apt install valgrind"), "--tool=cachegrind", "--cache-sim=no"]
    totals = []
    for slices in (1, 3):
        run = subprocess.run(
            [*valgrind, "--cachegrind-out-file=/dev/null", *child_of(folder, options, calls)],
            input="\n" * slices,
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"PYTHONHASHSEED": "0"},
        )
        found = re.search(r"I\s+refs:\s+([\d,]+)", run.stderr)
        if run.returncode or found is None:
            raise BenchError(f"the child failed:\n{run.stderr[-2000:]}")
        totals.append(int(found[1].replace(",", "")))
    return (totals[1] - totals[0]) / 2 / calls / (options.events or 1)


def main() -> int:
    """Measure all folders against the first."""
    options = arguments()
    calls = max(SLICE * 20 // options.events, 2 * CALLERS) if options.events else SLICE
    if options.child:
        uvloop.run(measured(options))
    try:
        if options.count:
            first = 0.0
            for folder in options.folders:
                count = instructions(folder, options, max(calls // SHORT, 2 * CALLERS))
                first = first or count
                print(f"{folder:30} {count:9.0f} instructions  {count / first:.3f}", flush=True)
            return 0
        os.sched_setaffinity(0, Cores.of_this_machine().measured)
        costs = times(options, calls)
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    for folder, cost in zip(options.folders, costs, strict=True):
        ratios = sorted(mine / first for mine, first in zip(cost, costs[0], strict=True))
        quarter = len(ratios) // 4
        spread = f"{ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f}"
        print(f"{folder:30} {statistics.median(cost):7.1f} us  {statistics.median(ratios):.3f} ({spread})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
