"""`python -m bench.soak`: mixed load with faults for a long time; all stays flat, or it fails."""

import argparse
import asyncio
import json
import random
import re
import signal
import statistics
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import aiohttp

from bench.caller import percentiles
from bench.processes import LOOPBACK, BenchError, Cores, Running, fetch, free_ports, python, running
from bench.report import grid

CALLERS = 16
SAMPLES = 30
WARM = 0.3
"""The part of the time after which things have to be flat."""
MAX_GROWTH_MB = 4.0
MAX_SLOWER = 3.0
"""Times the median latency may grow: a shared machine has such phases, a leak goes beyond."""
MAX_MORE_FILES = 4
REST = 25.0
"""Seconds until every idle connection to the backend must be closed."""
LONGEST_CALL = 30.0

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
KINDS = {
    "plain": 35,
    "stream": 35,
    "responses": 5,
    "embeddings": 5,
    "large": 4,
    "leaves in a stream": 6,
    "leaves early": 4,
    "invalid": 3,
    "looks": 3,
}


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


class Soak:
    """The load, and what comes back."""

    def __init__(self, url: str, seed: int) -> None:
        self._url = url
        self._random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.times: list[float] = []
        self.calls = 0
        self.bad = 0
        self.broken: list[str] = []

    async def run(self, stop: asyncio.Event) -> None:
        """All callers until `stop`."""
        timeout = aiohttp.ClientTimeout(total=LONGEST_CALL)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(self._url, timeout=timeout, connector=connector) as session:
            await asyncio.gather(*(self._caller(session, stop) for _ in range(CALLERS)))

    async def _caller(self, session: aiohttp.ClientSession, stop: asyncio.Event) -> None:
        while not stop.is_set():
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            self.calls += 1
            try:
                outcome = await self._call(session, kind)
            except (aiohttp.ClientError, TimeoutError) as error:
                outcome = "BROKEN"
                self.broken.append(f"{kind}: {error!r}")
            self.outcomes[outcome] += 1

    async def _call(self, session: aiohttp.ClientSession, kind: str) -> str:
        """One call; how it ended."""
        # Some callers make a connection for each call.
        headers = {"connection": "close"} if self._random.random() < 0.05 else {}
        if kind in {"looks", "invalid"}:
            return await self._other(session, kind)
        text = f"Say something about {self._random.randrange(10**6)}. "
        if kind == "large":
            text *= 10_000
        chat: dict[str, Any] = {"model": "demo-model", "messages": [{"role": "user", "content": text}]}
        if kind == "leaves early":
            with suppress(TimeoutError):
                async with asyncio.timeout(self._random.uniform(0, 0.02)):
                    await self._whole(session, "/v1/chat/completions", chat, headers)
            return "left early"
        if kind == "embeddings":
            return await self._whole(session, "/v1/embeddings", {"model": "demo-model", "input": text}, headers)
        if kind == "responses":
            content = {"model": "demo-model", "input": text, "stream": True}
            return await self._streamed(session, "/v1/responses", content, headers, leaves=False)
        if kind in {"plain", "large"}:
            return await self._whole(session, "/v1/chat/completions", chat, headers)
        leaves = kind == "leaves in a stream"
        return await self._streamed(session, "/v1/chat/completions", chat | {"stream": True}, headers, leaves=leaves)

    async def _other(self, session: aiohttp.ClientSession, kind: str) -> str:
        """A call that reaches no backend."""
        if kind == "looks":
            path = self._random.choice(("/health", "/metrics", "/v1/models", "/"))
            async with session.get(path) as answer:
                await answer.read()
        else:
            path = self._random.choice(("/v1/chat/completions", "/v1/none"))
            async with session.post(path, data=b"{", headers={"content-type": "application/json"}) as answer:
                await answer.read()
        return f"{kind}: {answer.status}"

    async def _whole(
        self, session: aiohttp.ClientSession, path: str, content: dict[str, Any], headers: dict[str, str]
    ) -> str:
        start = monotonic()
        async with session.post(path, json=content, headers=headers) as answer:
            document = await answer.json()
            if answer.status != 200:
                self.bad += 1
                return f"error: {answer.status} {document['error']['code']}"
            if answer.headers.get("x-gateway-attempts") == "1" and path == "/v1/chat/completions":
                self.times.append((monotonic() - start) * 1000)
            return "good"

    async def _streamed(
        self,
        session: aiohttp.ClientSession,
        path: str,
        content: dict[str, Any],
        headers: dict[str, str],
        *,
        leaves: bool,
    ) -> str:
        async with session.post(path, json=content, headers=headers) as answer:
            if answer.status != 200:
                self.bad += 1
                return f"error: {answer.status} {(await answer.json())['error']['code']}"
            if leaves:
                await answer.content.readany()
                answer.close()
                return "left in a stream"
            text = await answer.read()
            if b"data: [DONE]" in text or b'"response.completed"' in text:
                return "good stream"
            if b'"error"' in text:
                self.bad += 1
                return "error event"
            raise aiohttp.ClientPayloadError("a stream ended without an end and without an error")


def look(gateway: Running, url: str, started: float) -> State:
    """The gateway's state now."""
    values = {
        name: float(value)
        for name, value in re.findall(r"^(gateway_\w+) (\S+)$", fetch(f"{url}/metrics").decode(), re.MULTILINE)
    }
    status = Path(f"/proc/{gateway.pid}/status").read_text()
    threads = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
    return State(
        seconds=monotonic() - started,
        rss=gateway.rss(),
        files=gateway.open_files(),
        threads=int(threads[1]) if threads else 0,
        in_flight=values["gateway_in_flight_requests"],
        buffered=values["gateway_buffered_bytes"],
        dropped=values["gateway_telemetry_dropped_spans_total"],
    )


async def play(gateway: Running, url: str, seconds: float, seed: int) -> tuple[State, list[Row], State, Soak]:
    """Load for so long; the state at rest before, each interval, the state at rest after, the load."""
    started = monotonic()
    before = await asyncio.to_thread(look, gateway, url, started)
    soak, stop = Soak(url, seed), asyncio.Event()
    for asked in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(asked, stop.set)
    load = asyncio.create_task(soak.run(stop))
    rows: list[Row] = []
    print(HEADER)
    for number in range(SAMPLES):
        calls, bad, soak.times = soak.calls, soak.bad, []
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), started + seconds * (number + 1) / SAMPLES - monotonic())
        if stop.is_set() or load.done():
            break
        state = await asyncio.to_thread(look, gateway, url, started)
        gateway.check_alive()
        row = Row(state, soak.calls - calls, soak.bad - bad, *percentiles(soak.times))
        rate, share = row.calls * SAMPLES / seconds, 100 * row.bad / max(row.calls, 1)
        print(
            f"{state.seconds:7.0f} {rate:8.0f} {share:6.1f} {row.p50:7.1f} {row.p99:7.1f} {state.rss:7.1f} "
            f"{state.files:6} {state.threads:7}",
            flush=True,
        )
        rows.append(row)
    stop.set()
    await load
    after = await asyncio.to_thread(look, gateway, url, started)
    resting = monotonic()
    while not at_rest(before, after) and monotonic() - resting < REST:
        await asyncio.sleep(0.5)
        after = await asyncio.to_thread(look, gateway, url, started)
    return before, rows, after, soak


def at_rest(before: State, after: State) -> bool:
    """Whether nothing is left of the load."""
    return after.files <= before.files + MAX_MORE_FILES and not after.in_flight and not after.buffered


def verdict(before: State, rows: list[Row], after: State, soak: Soak) -> list[list[str]]:
    """A row for each promise: what, limit, measured, and whether it is kept."""
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
        row("calls without a proper end", "0", str(len(soak.broken)), not soak.broken),
        row("spans lost", "0", f"{after.dropped:g}", not after.dropped),
    ]


def main() -> int:
    """The exit code: 0 when everything stayed flat, 1 when not, 2 when the soak cannot run."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description="Run under mixed load with faults.")
    parser.add_argument("--seconds", type=float, default=600.0, help="default: 600")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of the calls and the faults")
    options = parser.parse_args()
    print(f"seed {options.seed}, {CALLERS} callers, {options.seconds:g} s")
    try:
        with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="soak-") as folder:
            return soak_in(stack, Path(folder), options.seconds, options.seed)
    except BenchError as error:
        print(f"soak: {error}", file=sys.stderr)
        return 2


def soak_in(stack: ExitStack, folder: Path, seconds: float, seed: int) -> int:
    """Start everything, play, judge."""
    cores = Cores.of_this_machine()
    port, sink_port, *model_ports = free_ports(2 + 2 * MODELS)
    url = f"http://{LOOPBACK}:{port}"
    backends = []

    def start(name: str, argv: list[str], env: dict[str, str], where: frozenset[int], ready: str) -> Running:
        log = folder / f"{name}.log"
        child = stack.enter_context(running(name, argv, env=env, cores=where, log=log))
        child.wait_until_ready(ready, 20)
        return child

    start("sink", python("bench.sink", str(sink_port)), {}, cores.others, f"http://{LOOPBACK}:{sink_port}/")
    for number, (model_port, control_port) in enumerate(zip(model_ports[::2], model_ports[1::2], strict=True)):
        env = {"PORT": str(model_port), "CONTROL_PORT": str(control_port), "MOCK_SEED": str(seed + number)}
        control = f"http://{LOOPBACK}:{control_port}/faults"
        start(f"model-{number}", python("mock_model"), MODEL_ENV | env, cores.others, control)
        put_faults(control)
        backends.append(f"http://{LOOPBACK}:{model_port}")
    gateway_env = GATEWAY_ENV | {
        "APP_MODE": "prod",
        "HOST": LOOPBACK,
        "PORT": str(port),
        "GATEWAY_BACKEND_URLS": ",".join(backends),
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{LOOPBACK}:{sink_port}/gateway",
    }
    gateway = start("gateway", python("gateway"), gateway_env, cores.measured, f"{url}/readyz")
    before, rows, after, soak = asyncio.run(play(gateway, url, seconds, seed))
    if len(rows) < SAMPLES:
        print("stopped before its time: no verdict", file=sys.stderr)
        return 2
    spans = json.loads(fetch(f"http://{LOOPBACK}:{sink_port}/")).get("gateway", 0)
    print(f"\n{soak.calls} calls, {spans} spans at the sink")
    print(", ".join(f"{outcome}: {count}" for outcome, count in soak.outcomes.most_common()))
    for line in soak.broken[:10]:
        print(f"without a proper end: {line}")
    promises = verdict(before, rows, after, soak)
    print("\n" + grid([["promise", "limit", "measured", ""], *promises]))
    return 1 if any(promise[-1] == "BROKEN" for promise in promises) else 0


def put_faults(control: str) -> None:
    """Script a mock model."""

    async def put() -> None:
        async with aiohttp.ClientSession() as session, session.put(control, json=FAULTS) as answer:
            if not answer.ok:
                raise BenchError(f"the mock model refuses the faults: {await answer.text()}")

    asyncio.run(put())


if __name__ == "__main__":
    sys.exit(main())
