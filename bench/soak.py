"""`python -m bench.soak`: mixed load with faults for a long time; all stays flat, or it fails."""

import argparse
import asyncio
import itertools
import random
import signal
import statistics
import sys
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

from bench.machine import BenchError, Cores
from bench.report import grid
from testkit import usage
from testkit.completions import CHAT_PATH, EMBEDDINGS_PATH, MESSAGES_PATH, RESPONSES_PATH
from testkit.http import ask
from testkit.load import Call, Load, Plan
from testkit.otlp import Sink
from testkit.processes import ProcessError
from testkit.quantiles import median_and_p99
from testkit.servers import Gateway, MockModel

CALLERS = 12
SAMPLES = 30
WARM = 0.3
"""The part of the time after which things have to be flat."""
MAX_GROWTH_MB = 4.0
MAX_SLOWER = 3.0
"""Times the median latency may grow: a shared machine has such phases, a leak goes beyond."""
MAX_MORE_FILES = 4
REST = 25.0
"""Seconds until every idle connection to the backend must be closed."""
DEADLINE = 30.0

HEADER = " time s  calls/s  bad %  p50 ms  p99 ms  RSS MB  files threads"

FAULTS: list[dict[str, Any]] = [
    {"kind": "status", "with": {"status": 500}, "rate": 0.03},
    {"kind": "status", "with": {"status": 429}, "rate": 0.02},
    {"kind": "reset", "rate": 0.02},
    {"kind": "cut", "with": {"after_events": 4, "how": "reset"}, "rate": 0.03},
    {"kind": "cut", "with": {"after_events": 1, "how": "end", "where": "inside_character"}, "rate": 0.01},
    {"kind": "short_body", "rate": 0.02},
    {"kind": "malformed_event", "with": {"after_events": 3}, "rate": 0.01},
    {"kind": "not_json", "rate": 0.01},
    {"kind": "html", "rate": 0.01},
    {"kind": "no_done", "rate": 0.01},
    {"kind": "slow_first_token", "with": {"delay": 0.1}, "rate": 0.02},
    {"kind": "stall", "with": {"after_events": 3}, "rate": 0.002},
    {"kind": "hang_before_headers", "rate": 0.002},
    {"kind": "refuse", "with": {"seconds": 0.5}, "rate": 0.0001},
]
MODELS = 2
MODEL_ENV = {"MOCK_TTFT": "0.005", "MOCK_TOKEN_INTERVAL": "0.001", "APP_MODE": "prod"}
GATEWAY_ENV = {"GATEWAY_ANSWER_TIMEOUT": "1", "GATEWAY_FIRST_TOKEN_TIMEOUT": "1", "GATEWAY_IDLE_TIMEOUT": "1"}
"""Short timers, so that what hangs does not hold up the load; all else is the default."""
LOADS: dict[str, dict[str, Any]] = {
    "chat": {"callers": CALLERS, "keep_alive": True},
    "new-connections": {"rate": 10},
    "responses": {"rate": 10, "path": RESPONSES_PATH, "kinds": ("stream",), "keep_alive": True},
    "messages": {"rate": 10, "path": MESSAGES_PATH, "kinds": ("stream",), "keep_alive": True},
    "embeddings": {"rate": 10, "path": EMBEDDINGS_PATH, "kinds": ("answer",), "keep_alive": True},
    "large": {"rate": 5, "characters": 250_000, "kinds": ("answer",), "keep_alive": True},
    "leaves-in-a-stream": {"rate": 15, "kinds": ("stream",), "leave_after": 1},
    "leaves-at-once": {"rate": 5, "kinds": ("answer",), "leave_before": 0.002},
    "leaves-early": {"rate": 5, "kinds": ("answer",), "leave_before": 0.012},
}
"""Side by side; most calls are those of the callers, who make one after the other."""
ODD_CALLS = (
    *(("GET", path) for path in ("/health", "/metrics", "/v1/models", "/")),
    *(("POST", path) for path in (CHAT_PATH, "/v1/none")),
)
"""Reach no backend; a few each second."""
ODD_PAUSE = 0.1


class State(NamedTuple):
    """The gateway at one moment.

    Attributes:
        seconds: since the start of the load.
        rss: megabytes.
        files: open file descriptors.
        threads: of the process.
        in_flight: requests under way.
        buffered: bytes held.
        dropped: spans lost.
    """

    seconds: float
    rss: float
    files: int
    threads: int
    in_flight: float
    buffered: float
    dropped: float


class Row(NamedTuple):
    """One interval of the soak: its state at the end, its calls, and the times in ms of calls that were simply good."""

    state: State
    calls: int
    bad: int
    p50: float
    p99: float


class Tally:
    """What came back.

    Attributes:
        calls: How many.
        bad: How many of them ended with an error, or an error event.
        outcomes: How many of each.
        broken: What a caller must never see, a line each.
        times: Of the chat answers that were simply good, in ms; emptied by their reader.
    """

    def __init__(self) -> None:
        self.calls = 0
        self.bad = 0
        self.outcomes: Counter[str] = Counter()
        self.broken: list[str] = []
        self.times: list[float] = []

    def take(self, call: Call) -> None:
        """Count a call."""
        load = call.id.rsplit("-", 2)[0]
        self.calls += 1
        self.outcomes[f"{load}: {call.status} {call.outcome}"] += 1
        if call.flaw is not None or call.outcome in {"refused", "broken"}:
            self.broken.append(f"{call.id}: {call.outcome}: {call.flaw}")
        elif call.outcome not in {"ok", "left"}:
            self.bad += 1
        elif load == "chat" and call.kind == "answer" and len(call.tries) == 1:
            self.times.append(call.seconds * 1000)

    async def call_oddly(self, url: str) -> None:
        """Make calls that reach no backend, until cancelled."""
        for number in itertools.count():
            method, path = ODD_CALLS[number % len(ODD_CALLS)]
            answer = await ask(url + path, method=method, body=None if method == "GET" else b"{")
            self.outcomes[f"{method} {path}: {answer.status}"] += 1
            await asyncio.sleep(ODD_PAUSE)


async def look(gateway: Gateway, started: float) -> State:
    """Return the gateway's state now."""
    metrics = await gateway.metrics()
    return State(
        seconds=monotonic() - started,
        rss=usage.resident_bytes(gateway.pid) / 1e6,
        files=usage.open_files(gateway.pid).total(),
        threads=usage.threads(gateway.pid),
        in_flight=metrics.value("gateway_in_flight_requests"),
        buffered=metrics.value("gateway_buffered_bytes"),
        dropped=metrics.value("gateway_telemetry_dropped_spans_total"),
    )


async def play(gateway: Gateway, load: Load, tally: Tally, seconds: float) -> tuple[State, list[Row], State]:
    """Put the gateway under load; return its state at rest before, each interval, and its state at rest after."""
    started = monotonic()
    before = await look(gateway, started)
    stop = asyncio.Event()
    for asked in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(asked, stop.set)
    rows: list[Row] = []
    print(HEADER)
    async with load:
        odd = asyncio.create_task(tally.call_oddly(gateway.url))
        for number in range(SAMPLES):
            calls, bad, tally.times = tally.calls, tally.bad, []
            with suppress(TimeoutError):
                await asyncio.wait_for(stop.wait(), started + seconds * (number + 1) / SAMPLES - monotonic())
            if stop.is_set() or load.ended or odd.done():
                break
            state = await look(gateway, started)
            gateway.check()
            row = Row(state, tally.calls - calls, tally.bad - bad, *median_and_p99(tally.times))
            rate, share = row.calls * SAMPLES / seconds, 100 * row.bad / max(row.calls, 1)
            print(
                f"{state.seconds:7.0f} {rate:8.0f} {share:6.1f} {row.p50:7.1f} {row.p99:7.1f} {state.rss:7.1f} "
                f"{state.files:6} {state.threads:7}",
                flush=True,
            )
            rows.append(row)
        if odd.done():
            await odd
        odd.cancel()
    after = await look(gateway, started)
    resting = monotonic()
    while not at_rest(before, after) and monotonic() - resting < REST:
        await asyncio.sleep(0.5)
        after = await look(gateway, started)
    return before, rows, after


def at_rest(before: State, after: State) -> bool:
    """Tell whether nothing is left of the load."""
    return after.files <= before.files + MAX_MORE_FILES and not after.in_flight and not after.buffered


def verdict(before: State, rows: list[Row], after: State, tally: Tally) -> list[list[str]]:
    """Return a row for each promise: what, limit, measured, and whether it is kept."""
    flat = rows[int(len(rows) * WARM) :]
    half = len(flat) // 2
    first, last = flat[:half], flat[half:]
    growth = statistics.mean(row.state.rss for row in last) - statistics.mean(row.state.rss for row in first)
    slower = statistics.median(row.p50 for row in last) / max(statistics.median(row.p50 for row in first), 1e-9)

    def row(what: str, limit: str, value: str, kept: bool) -> list[str]:  # noqa: FBT001
        return [what, limit, value, "kept" if kept else "BROKEN"]

    return [
        row(
            "RSS, second half of the warm time / first",
            f"<= +{MAX_GROWTH_MB:g} MB",
            f"{growth:+.1f} MB",
            growth <= MAX_GROWTH_MB,
        ),
        row("median latency, the same", f"<= {MAX_SLOWER:g} x", f"{slower:.2f} x", slower <= MAX_SLOWER),
        row(
            "open files at rest",
            f"<= {before.files} + {MAX_MORE_FILES}",
            str(after.files),
            after.files <= before.files + MAX_MORE_FILES,
        ),
        row("threads at rest", f"<= {before.threads} + 1", str(after.threads), after.threads <= before.threads + 1),
        row("requests under way at rest", "0", f"{after.in_flight:g}", not after.in_flight),
        row("bytes held at rest", "0", f"{after.buffered:g}", not after.buffered),
        row("calls without a proper end", "0", str(len(tally.broken)), not tally.broken),
        row("spans lost", "0", f"{after.dropped:g}", not after.dropped),
    ]


async def soak(folder: Path, seconds: float, seed: int) -> int:
    """Start everything, play, judge; return the exit code."""
    cores = Cores.of_this_machine()
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(Sink("sink", folder, cores=cores.others))
        models = [
            MockModel(
                f"model-{number}",
                folder,
                MODEL_ENV | {"MOCK_SEED": f"{seed + number}"},
                cores=cores.others,
            )
            for number in range(MODELS)
        ]
        for model in models:
            await stack.enter_async_context(model)
            await model.faults(*FAULTS)
        own = {
            "APP_MODE": "prod",
            "GATEWAY_BACKEND_URLS": ",".join(model.url for model in models),
            "OTEL_EXPORTER_OTLP_ENDPOINT": sink.url,
        }
        gateway = await stack.enter_async_context(Gateway("gateway", folder, GATEWAY_ENV | own, cores=cores.measured))
        tally = Tally()
        plans = [
            Plan(urls=[gateway.url], seed=seed, prefix=name, deadline=DEADLINE, **fields)
            for name, fields in LOADS.items()
        ]
        load = Load(*plans, on_call=tally.take, keep=False, cores=cores.others)
        before, rows, after = await play(gateway, load, tally, seconds)
        if len(rows) < SAMPLES:
            print("stopped before its time: no verdict", file=sys.stderr)
            return 2
        print(f"\n{tally.calls} calls, {sink.spans()} spans at the sink")
    print(", ".join(f"{outcome}: {count}" for outcome, count in tally.outcomes.most_common()))
    for line in tally.broken[:10]:
        print(f"without a proper end: {line}")
    promises = verdict(before, rows, after, tally)
    print("\n" + grid([["promise", "limit", "measured", ""], *promises]))
    return 1 if any(promise[-1] == "BROKEN" for promise in promises) else 0


def main() -> int:
    """Return the exit code: 0: everything stayed flat; 1: something did not; 2: the soak could not run to its end."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Run under mixed load with faults.")
    parser.add_argument("--seconds", type=float, default=600.0, help="default: 600")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the calls and the faults")
    options = parser.parse_args()
    print(f"seed {options.seed}, {CALLERS} callers and more, {options.seconds:g} s")
    try:
        with tempfile.TemporaryDirectory(prefix="soak-") as folder:
            return asyncio.run(soak(Path(folder), options.seconds, options.seed))
    except (BenchError, ProcessError) as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
