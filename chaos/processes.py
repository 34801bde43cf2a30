"""The gateway and the mock model as the chaos suite sees them: with what they counted, logged and hold."""

import json
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chaos.counts import from_log
from testkit import servers, usage
from testkit.exposition import Exposition
from testkit.polling import until
from testkit.ports import LOOPBACK


class Mock(servers.MockModel):
    """A mock model: one replica of a backend.

    Attributes:
        journal: The file to which it writes its journal.
    """

    def __init__(
        self, name: str, folder: Path, settings: Mapping[str, str], *, host: str = LOOPBACK, port: int | None = None
    ) -> None:
        self.journal = folder / f"{name}.journal"
        own = {"LOG_LEVEL": "warning", "MOCK_JOURNAL_FILE": str(self.journal)}
        super().__init__(name, folder, {**own, **settings}, host=host, port=port)

    def arrivals(self) -> list[dict[str, Any]]:
        """Return the prompts that came, over all lives of the process."""
        return [line for line in self.journal_lines() if line["event"] == "arrived" and line["path"] != "/v1/models"]

    def journal_lines(self) -> list[dict[str, Any]]:
        """Return the whole lines of the journal."""
        return [json.loads(line) for line in _whole_lines(self.journal)]


class Gateway(servers.Gateway):
    """The gateway under test."""

    def __init__(self, name: str, folder: Path, settings: Mapping[str, str], *, names: Path | None = None) -> None:
        self._tasks = folder / f"{name}.tasks"
        own = {"APP_MODE": "prod", "CHAOS_TASKS": str(self._tasks)}
        if names is not None:
            own["CHAOS_NAMES"] = str(names)
        super().__init__(name, folder, {**own, **settings}, module="chaos.inside")
        self._logged_before = 0

    async def start(self, *, wait: bool = True) -> None:
        """Start it, and wait until it serves."""
        self._logged_before = len(self.requests())
        await super().start(wait=wait)

    async def counted(self) -> Exposition:
        """Return its metrics; when a life of it has ended, what its log says of the same, over all lives."""
        if self.running:
            metrics = await self.metrics()
            if self.lives == 1:
                return metrics
            number = self._logged_before + metrics.value("gateway_requests_total")
            await until(lambda: len(self.requests()) >= number, "what this life has counted is in the log")
        return from_log(self.requests())

    async def tasks(self) -> int:
        """Count its asyncio tasks."""
        self._tasks.unlink(missing_ok=True)
        self.signal(signal.SIGUSR2)
        await until(self._tasks.exists, "the number of tasks")
        return int(self._tasks.read_text(encoding="utf-8"))

    def memory(self) -> int:
        """Return its resident memory in bytes."""
        return usage.resident_bytes(self.pid)

    def requests(self) -> list[dict[str, Any]]:
        """Return the lines of its log that are about prompts, over all lives of the process."""
        documents = [json.loads(line) for line in _whole_lines(self.output) if line.startswith(b"{")]
        return [line for line in documents if line.get("message") == "request" and line.get("method") == "POST"]

    def complaints(self) -> int:
        """Count the lines it has written so far that are not about a request."""
        return sum(b'"message":"request"' not in line for line in _whole_lines(self.output))


def _whole_lines(file: Path) -> list[bytes]:
    return file.read_bytes().split(b"\n")[:-1] if file.exists() else []
