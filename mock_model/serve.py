"""A running mock model: both ports, for `python -m mock_model` and for tests in the same process."""

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any, Self

from aiohttp import web
from opentelemetry.sdk.trace import TracerProvider

from mock_model.app import Api
from mock_model.control import Control
from mock_model.journal import Journal
from mock_model.listener import Listener
from mock_model.load import Load, Pace
from mock_model.machine import Machine
from mock_model.metrics import Metrics
from mock_model.script import Script
from mock_model.settings import Settings
from mock_model.stored_responses import StoredResponses
from mock_model.text import Writer
from mock_model.tracing import build_provider, flush_and_stop

GRACE = 0.2
"""Seconds that a call under way has left when the mock model stops."""
POLL = 0.005
"""Seconds."""
PATIENCE = 20.0
"""Seconds that a test waits for what must happen: far more than a busy machine needs."""

_log = logging.getLogger("mock_model")


class MockModel:
    """A running mock model.

    ```python
    async with MockModel(Settings(port=0, control_port=0)) as mock:
        mock.set_faults([{"kind": "status", "with": {"status": 503}, "times": 1}])
        ...  # call mock.url
        await mock.settled()
        assert [call.ended for call in mock.journal.calls] == ["fault"]
    ```

    Attributes:
        faults: the script of faults.
        journal: of the calls.
        crash: what `POST /crash` and the fault `crash` do. By default what a caller sees of a crash: every connection
            is dropped and the API's port refuses, until `revive` or `reset`.
        tracer_provider: where spans go; by default made from the settings, and stopped with the mock model.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        crash: Callable[[], None] | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> None:
        self.settings = settings
        self.faults = Script(settings.mock_seed)
        self.journal = Journal(settings.mock_journal_file)
        self.crash = self.die if crash is None else crash
        self._owns_provider = tracer_provider is None
        self.tracer_provider = build_provider(settings) if tracer_provider is None else tracer_provider
        load = Load(settings.mock_max_concurrency)
        self._metrics = Metrics(load)
        pace = Pace(settings.mock_seed, settings.mock_ttft, settings.mock_token_interval, settings.mock_jitter)
        self._machine = Machine(
            seed=settings.mock_seed, pace=pace, load=load, refuse=self.refuse, crash=self._crash_now
        )
        writer = Writer(settings.mock_seed, settings.mock_tokens)
        self._responses = StoredResponses(writer=writer, pace=pace, place=lambda: f"{socket.gethostname()}:{self.port}")
        self._api = Api(
            models=(settings.model_name, *settings.mock_models),
            writer=writer,
            responses=self._responses,
            machine=self._machine,
            script=self.faults,
            journal=self.journal,
            metrics=self._metrics,
            tracer=self.tracer_provider.get_tracer("mock_model"),
        )
        control = Control(
            script=self.faults,
            journal=self.journal,
            metrics=self._metrics,
            reset=self.reset,
            crash=self._crash_now,
            hosts=(settings.control_host, *settings.mock_control_hosts),
        )
        self._api_runner = web.AppRunner(
            self._api.create_app(), access_log=None, handler_cancellation=True, shutdown_timeout=GRACE
        )
        self._control_runner = web.AppRunner(control.create_app(), access_log=None, shutdown_timeout=GRACE)
        self._listener = Listener(self._api_runner, settings.host, settings.port)
        self._control_listener = Listener(self._control_runner, settings.control_host, settings.control_port)

    @property
    def port(self) -> int:
        """The API's port."""
        return self._listener.port

    @property
    def url(self) -> str:
        """Where the API is, without `/v1`."""
        return f"http://{_shown(self.settings.host)}:{self.port}"

    @property
    def control_url(self) -> str:
        """Where the control API is."""
        return f"http://{_shown(self.settings.control_host)}:{self._control_listener.port}"

    @property
    def in_flight(self) -> int:
        """Calls that have not ended, hanging ones included."""
        return self._metrics.in_flight

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen on both ports.

        Raises:
            OSError: one of them is taken; nothing is left open.
        """
        try:
            await self._control_runner.setup()
            await self._api_runner.setup()
            await self._control_listener.open()
            await self._listener.open()
        except BaseException:
            await self.stop()
            raise
        _log.info("the API is at %s/v1, the control API at %s", self.url, self.control_url)

    async def stop(self) -> None:
        """Close every connection and both ports; spans are flushed, for at most 2 s."""
        self._api.stopping = True
        await self._listener.settle()
        await self._listener.close()
        self._machine.release()
        await self._api_runner.cleanup()
        await self._control_runner.cleanup()
        self.journal.close()
        if self._owns_provider:
            await asyncio.to_thread(flush_and_stop, self.tracer_provider)

    def set_faults(self, faults: Sequence[dict[str, Any]]) -> None:
        """Replace the script, as `PUT /faults` does.

        Raises:
            ScriptError: it cannot be used.
        """
        self.faults.replace(list(faults))

    async def reset(self) -> None:
        """Back to a mock model that was just started: no faults, no responses, an empty journal, an open port.

        Whom a fault makes wait is hung up on; calls that are answered as usual go on.
        """
        self.faults.clear()
        self.journal.clear()
        self._responses.clear()
        self._machine.release()
        await self.revive()

    async def refuse(self, seconds: float) -> None:
        """Close the API's port, and open the same one after so many seconds."""
        await self._listener.refuse(seconds)

    def die(self) -> None:
        """Drop every connection and refuse further ones, as if the process had been killed, until `revive`.

        The journal stays, for the test that reads it; the responses are forgotten.
        """
        self._responses.clear()
        self._listener.die()

    async def revive(self) -> None:
        """Listen again on the API's port."""
        await self._listener.revive()

    async def called(self, total: int, timeout: float = PATIENCE) -> None:  # noqa: ASYNC109
        """Wait until `total` calls are in the journal.

        Raises:
            TimeoutError: they are not after `timeout` seconds.
        """
        await _until(lambda: self.journal.total >= total, timeout)

    async def settled(self, timeout: float = PATIENCE) -> None:  # noqa: ASYNC109
        """Wait until no call is under way: then the journal is final.

        Raises:
            TimeoutError: one still is after `timeout` seconds.
        """
        await _until(lambda: not self._metrics.in_flight, timeout)

    def _crash_now(self) -> None:
        self.crash()


async def _until(condition: Callable[[], bool], seconds: float) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(POLL)


def _shown(host: str) -> str:
    """Return the host by which a client on this machine reaches a bind address."""
    if host in {"0.0.0.0", "::"}:
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
