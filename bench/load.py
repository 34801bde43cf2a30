"""Load on a system, and what it cost the system."""

import shutil
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from bench.caller import Spec, Tally, body
from bench.processes import LOOPBACK, BenchError, Cores, on_cores, python

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bench.systems import System

SETTLE = 0.8
"""Seconds after the load until the CPU time is read: what was put off, such as exports, counts too."""
REST = 4.0
"""Seconds for which a system is watched without load."""
BEFORE_THE_END = 0.4
"""Seconds before the end of the load at which memory is read, while the connections are open."""
SCRIPT = Path(__file__).with_name("post.lua")


class Sample(msgspec.Struct, kw_only=True):
    """One run.

    Attributes:
        measure: what was measured.
        setting: how: connections, streams, ...
        system: on whom.
        round: from 0.
        values: figures by name.
    """

    measure: str
    setting: str
    system: str
    round: int
    values: dict[str, float]


def aimed(spec: Spec, *systems: "System") -> Spec:
    """The spec with the ports and headers of these systems."""
    return msgspec.structs.replace(
        spec, ports=[system.port for system in systems], headers=[system.headers for system in systems]
    )


class Load:
    """Drives the load generators."""

    def __init__(self, cores: Cores, folder: Path) -> None:
        self._cores = cores
        self._folder = folder
        self._wrk = shutil.which("wrk")

    @property
    def generator(self) -> str:
        """Who makes the load of unstreamed calls."""
        return "wrk" if self._wrk else "bench.caller"

    def on(self, system: "System", spec: Spec) -> tuple[Tally, dict[str, float]]:
        """Put load on a system: the tally, and what it cost: `cpu` in `seconds`, `rss` in MB at the end."""
        spec = aimed(spec, system)
        before, started = system.process.cpu(), time.monotonic()
        child = self._start(system, spec)
        if spec.mode == "load":
            time.sleep(max(0.0, spec.seconds - BEFORE_THE_END))
        rss = system.process.rss()
        tally = self._tally(child)
        rss = max(rss, system.process.rss())
        time.sleep(SETTLE)
        system.process.check_alive()
        return tally, {"cpu": system.process.cpu() - before, "seconds": time.monotonic() - started, "rss": rss}

    def at_rest(self, system: "System") -> float:
        """The part of a core that a system uses without load."""
        before, started = system.process.cpu(), time.monotonic()
        time.sleep(REST)
        return (system.process.cpu() - before) / (time.monotonic() - started)

    def call(self, spec: Spec) -> Tally:
        """Run the caller on whatever ports the spec names."""
        return self._tally(self._run(python("bench.caller", msgspec.json.encode(spec).decode())))

    @contextmanager
    def held(self, spec: Spec) -> "Iterator[None]":
        """Hold connections open for a while, each after one call."""
        child = self._run(python("bench.caller", msgspec.json.encode(spec).decode()))
        try:
            if child.stdout is None or child.stdout.readline() != b"ready\n":
                raise BenchError(f"the connections to be held could not be made: {spec}")
            yield
            tally = self._tally(child)
            if tally.failed:
                raise BenchError(f"{tally.failed} of the held connections failed: {tally.problem}")
        finally:
            child.kill()
            child.communicate()

    def _start(self, system: "System", spec: Spec) -> "subprocess.Popen[bytes]":
        """Unstreamed load by wrk where it is installed."""
        if self._wrk is None or spec.mode != "load" or spec.stream:
            return self._run(python("bench.caller", msgspec.json.encode(spec).decode()))
        prompt = self._folder / "prompt.json"
        prompt.write_bytes(body(spec))
        headers = [part for name, value in system.headers.items() for part in ("-H", f"{name}: {value}")]
        url = f"http://{LOOPBACK}:{system.port}/v1/chat/completions"
        options = ["-t1", f"-c{spec.connections}", f"-d{spec.seconds:g}s", "--timeout", "60s", "--latency"]
        return self._run([self._wrk, *options, "-s", str(SCRIPT), *headers, url, "--", str(prompt)])

    def _run(self, argv: list[str]) -> "subprocess.Popen[bytes]":
        with on_cores(self._cores.others):
            return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def _tally(self, child: "subprocess.Popen[bytes]") -> Tally:
        output, errors = child.communicate()
        lines = output.splitlines()
        if child.returncode or not lines:
            raise BenchError(f"the load generator failed:\n{errors.decode(errors='replace')[-2000:]}")
        return msgspec.json.decode(lines[-1], type=Tally)
