"""The port the API listens on: open, closed for a while, or dead."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any

from aiohttp import web

BACKLOG = 1024
RETRY = 0.05

_log = logging.getLogger("mock_model")


class Listener:
    """Listens on one address, and again on the same port after it has been closed."""

    def __init__(self, runner: web.AppRunner, host: str, port: int) -> None:
        self.port = port
        self._runner = runner
        self._host = host
        self._site: web.TCPSite | None = None
        self._change: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether connections are accepted."""
        return self._site is not None

    async def open(self) -> None:
        """Listen.

        Raises:
            OSError: the address is taken or not ours.
        """
        if self._site is not None:
            return
        site = web.TCPSite(self._runner, self._host, self.port, backlog=BACKLOG)
        try:
            await site.start()
        except OSError as error:
            await site.stop()
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise OSError(error.errno, f"cannot listen on {self._host}:{self.port}: {reason}") from None
        self._site = site
        self.port = site.port

    async def close(self) -> None:
        """Refuse further connections; calls under way go on, idle connections close."""
        site, self._site = self._site, None
        if site is not None:
            await site.stop()
        if self._runner.server is not None:
            self._runner.server.pre_shutdown()
            for connection in self._runner.server.connections:  # aiohttp leaves idle ones open, and deaf
                if connection._current_request is None and connection.transport is not None:  # noqa: SLF001
                    connection.transport.close()

    async def refuse(self, seconds: float) -> None:
        """Close now, and open again after `seconds`."""
        await self.close()
        self._replace_change(self._reopen(seconds))

    def die(self) -> None:
        """Close now and drop every connection, as a killed process does; `open` brings it back."""
        self._drop_connections()
        self._replace_change(self._stay_dead())

    async def revive(self) -> None:
        """Open now, whatever closed it."""
        await self.settle()
        await self.open()

    async def settle(self) -> None:
        """Give up a change that is under way."""
        change, self._change = self._change, None
        if change is not None:
            change.cancel()
            await asyncio.gather(change, return_exceptions=True)

    def _replace_change(self, change: Coroutine[Any, Any, None]) -> None:
        if self._change is not None:
            self._change.cancel()
        self._change = asyncio.get_running_loop().create_task(change)

    async def _stay_dead(self) -> None:
        await self.close()
        self._drop_connections()

    def _drop_connections(self) -> None:
        if self._runner.server is not None:
            for connection in self._runner.server.connections:
                if connection.transport is not None:
                    connection.transport.abort()

    async def _reopen(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        while not self.is_open:
            try:
                await self.open()
            except OSError as error:
                _log.warning("port %d is not free again yet: %s", self.port, error)
                await asyncio.sleep(RETRY)
