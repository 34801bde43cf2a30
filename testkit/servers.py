"""The gateway and the mock model, each as a process of its own."""

import asyncio
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from testkit.exposition import Exposition
from testkit.http import Answer, ask
from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process, ProcessError, python

METRICS_AGE = 1.05
"""Seconds for which the gateway gives the same document again, and what two clocks may differ."""


class MockModel(Process):
    """A mock model; see `Process`. Its ports are free ones unless they are given, and go into its environment.

    Attributes:
        url: Of its API, without `/v1`.
        control_url: Of its control API.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        env: Mapping[str, str],
        *,
        host: str = LOOPBACK,
        port: int | None = None,
        control_port: int | None = None,
        cores: Collection[int] | None = None,
    ) -> None:
        self.host = host
        self.port, self.control_port = port or free_port(), control_port or free_port()
        self.url, self.control_url = f"http://{host}:{self.port}", f"http://{LOOPBACK}:{self.control_port}"
        own = {"HOST": host, "PORT": str(self.port), "CONTROL_HOST": LOOPBACK, "CONTROL_PORT": str(self.control_port)}
        ready_url = f"{self.url}/health"
        super().__init__(
            name, python("mock_model"), env={**env, **own}, folder=folder, ready_url=ready_url, cores=cores
        )

    async def faults(self, *faults: dict[str, Any]) -> None:
        """Replace its script of faults."""
        await self.control("PUT", "/faults", list(faults))

    async def crash(self) -> None:
        """Let the process end from inside."""
        await self.control("POST", "/crash")
        await self.wait()

    async def control(self, method: str, path: str, body: object = None) -> Answer:
        """Call its control API.

        Raises:
            ProcessError: It refuses the call.
        """
        answer = await ask(self.control_url + path, method=method, body=body)
        if answer.status >= 300:
            raise ProcessError(f"{self.name}: {method} {path}: {answer.status} {answer.body.decode(errors='replace')}")
        return answer


class Gateway(Process):
    """A gateway; see `Process`. Its port is a free one unless it is given, and goes into its environment.

    Attributes:
        url: Of its API, without `/v1`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        env: Mapping[str, str],
        *,
        port: int | None = None,
        module: str = "gateway",
        cores: Collection[int] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        own = {"HOST": LOOPBACK, "PORT": str(self.port)}
        ready_url = f"{self.url}/readyz"
        super().__init__(name, python(module), env={**env, **own}, folder=folder, ready_url=ready_url, cores=cores)

    async def metrics(self) -> Exposition:
        """Return what `/metrics` says after this call has begun: it may be as old as `METRICS_AGE`."""
        await asyncio.sleep(METRICS_AGE)
        return Exposition.parse((await ask(f"{self.url}/metrics")).body.decode())

    async def health(self) -> dict[str, Any]:
        """Return the document of `/health`."""
        document: dict[str, Any] = (await ask(f"{self.url}/health")).json
        return document
