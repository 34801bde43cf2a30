"""The gateway and the mock model, each as a process of its own."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from testkit.exposition import Exposition
from testkit.http import Answer, ask
from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process, ProcessError, clean_environment, python


class MockModel(Process):
    """A mock model.

    Args:
        name: For messages, and for the names of its files.
        folder: Where its output goes.
        settings: Its settings, beside its addresses.
        host: Where its API listens.
        port: The port of its API; None for any free one.
        control_port: The port of its control API; None for any free one.
        environment: What its settings are added to; None for what every program needs.
        cores: The cores it may run on; None for all.

    Attributes:
        url: Of its API, without `/v1`.
        control_url: Of its control API.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Mapping[str, str],
        *,
        host: str = LOOPBACK,
        port: int | None = None,
        control_port: int | None = None,
        environment: Mapping[str, str] | None = None,
        cores: Collection[int] | None = None,
    ) -> None:
        self.host = host
        self.port = port or free_port()
        self.control_port = control_port or free_port()
        self.url = f"http://{host}:{self.port}"
        self.control_url = f"http://{LOOPBACK}:{self.control_port}"
        addresses = {
            "HOST": host,
            "PORT": str(self.port),
            "CONTROL_HOST": LOOPBACK,
            "CONTROL_PORT": str(self.control_port),
        }
        super().__init__(
            name,
            python("mock_model"),
            env={**(clean_environment({}) if environment is None else environment), **settings, **addresses},
            folder=folder,
            ready_url=f"{self.url}/health",
            cores=cores,
        )

    async def faults(self, *faults: dict[str, Any]) -> None:
        """Replace its script of faults.

        Raises:
            ProcessError: It refuses the script.
        """
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
    """A gateway.

    Args:
        name: For messages, and for the names of its files.
        folder: Where its output goes.
        settings: Its settings, beside its address.
        port: Where it listens; None for any free port.
        module: What runs.
        environment: What its settings are added to; None for what every program needs.
        cores: The cores it may run on; None for all.

    Attributes:
        url: Of its API, without `/v1`.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        settings: Mapping[str, str],
        *,
        port: int | None = None,
        module: str = "gateway",
        environment: Mapping[str, str] | None = None,
        cores: Collection[int] | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://{LOOPBACK}:{self.port}"
        address = {"HOST": LOOPBACK, "PORT": str(self.port)}
        super().__init__(
            name,
            python(module),
            env={**(clean_environment({}) if environment is None else environment), **settings, **address},
            folder=folder,
            ready_url=f"{self.url}/readyz",
            cores=cores,
        )

    async def metrics(self) -> Exposition:
        """Return what `/metrics` says now."""
        return Exposition.parse((await ask(f"{self.url}/metrics")).body.decode())

    async def health(self) -> dict[str, Any]:
        """Return the document of `/health`."""
        document: dict[str, Any] = (await ask(f"{self.url}/health")).json
        return document
