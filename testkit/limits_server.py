"""A Redis or Valkey server for limits that instances share: started, killed, frozen and started again, empty."""

import asyncio
import shutil
from pathlib import Path

from testkit.ports import LOOPBACK, free_port
from testkit.processes import Process

PROGRAMS = ("valkey-server", "redis-server")


def why_no_server() -> str | None:
    """Return why there is none to start; None: there is one."""
    return None if _program() else f"neither {' nor '.join(PROGRAMS)} is installed"


class LimitsServer(Process):
    """A server that keeps nothing on the disk.

    Args:
        folder: for its output.
        options: of the command line, in place of a plain port.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        self.port = free_port()
        port = ("--port", f"{self.port}") if "--tls-port" not in options else ("--port", "0")
        command = [_program() or PROGRAMS[0], "--bind", LOOPBACK, *port, "--save", "", "--dir", str(folder)]
        command += [option.replace("PORT", f"{self.port}") for option in options]
        super().__init__("limits-server", command, env={}, folder=folder, ready_url=f"{LOOPBACK}:{self.port}")

    @property
    def url(self) -> str:
        """For `GATEWAY_LIMITS_URL`."""
        return f"valkey://{LOOPBACK}:{self.port}"

    async def serves(self) -> bool:
        """Tell whether it takes connections."""
        try:
            _, writer = await asyncio.open_connection(LOOPBACK, self.port)
        except OSError:
            return False
        writer.close()
        return True


def _program() -> str | None:
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)
