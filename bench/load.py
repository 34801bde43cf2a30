"""Load on a system, and what it cost the system."""

import asyncio
import shutil
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic

import msgspec

from bench.caller import Spec, Tally, body
from bench.machine import BenchError, Cores
from bench.systems import System
from testkit.completions import CHAT_PATH
from testkit.ports import LOOPBACK
from testkit.processes import clean_environment, spawn
from testkit.workers import Worker

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


def aimed(spec: Spec, *systems: System) -> Spec:
    """Return the spec with the ports and headers of these systems."""
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
        """What makes the load of unstreamed calls."""
        return "wrk" if self._wrk else "bench.caller"

    async def on(self, system: System, spec: Spec) -> tuple[Tally, dict[str, float]]:
        """Put load on a system.

        Returns:
            The tally, and what it cost: `cpu` seconds in `seconds`, and `rss` in MB at the end.
        """
        spec = aimed(spec, system)
        before, started = system.cpu(), monotonic()
        loading = asyncio.create_task(self._loaded(system, spec))
        try:
            if spec.mode == "load":
                await asyncio.wait([loading], timeout=spec.seconds - BEFORE_THE_END)
            rss = system.rss()
            tally = await loading
        finally:
            loading.cancel()
        rss = max(rss, system.rss())
        await asyncio.sleep(SETTLE)
        system.process.check()
        return tally, {"cpu": system.cpu() - before, "seconds": monotonic() - started, "rss": rss}

    async def at_rest(self, system: System) -> float:
        """Return the part of a core that a system uses without load."""
        before, started = system.cpu(), monotonic()
        await asyncio.sleep(REST)
        return (system.cpu() - before) / (monotonic() - started)

    async def call(self, spec: Spec) -> Tally:
        """Run the caller on whatever ports the spec names."""
        async with self._caller(spec) as worker:
            return await _tally(worker)

    @asynccontextmanager
    async def held(self, spec: Spec) -> AsyncIterator[None]:
        """Hold connections open for a while, each after one call."""
        async with self._caller(spec) as worker:
            yield
            worker.finish()
            tally = await _tally(worker)
        if tally.failed:
            raise BenchError(f"{tally.failed} of the held connections failed: {tally.problem}")

    def _caller(self, spec: Spec) -> Worker:
        return Worker("bench.caller", msgspec.json.encode(spec), cores=self._cores.others)

    async def _loaded(self, system: System, spec: Spec) -> Tally:
        """Load a system with unstreamed calls by wrk where that is installed, else by the caller."""
        if self._wrk is None or spec.mode != "load" or spec.stream:
            return await self.call(spec)
        prompt = self._folder / "prompt.json"
        prompt.write_bytes(body(spec))
        headers = [part for name, value in system.headers.items() for part in ("-H", f"{name}: {value}")]
        url = f"http://{LOOPBACK}:{system.port}{CHAT_PATH}"
        options = ["-t1", f"-c{spec.connections}", f"-d{spec.seconds:g}s", "--timeout", "60s", "--latency"]
        command = [self._wrk, *options, "-s", str(SCRIPT), *headers, url, "--", str(prompt)]
        wrk = await spawn(command, env=clean_environment({}), stdout=PIPE, cores=self._cores.others)
        output, _ = await wrk.communicate()
        if wrk.returncode:
            raise BenchError(f"wrk ended with exit code {wrk.returncode}")
        return msgspec.json.decode(output.splitlines()[-1], type=Tally)


async def _tally(worker: Worker) -> Tally:
    results = [result async for result in worker.results()]
    return msgspec.json.decode(results[-1], type=Tally)
