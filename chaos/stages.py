"""Where experiments are played: processes of our own, a gateway that runs already, or the stack in containers."""

import asyncio
import contextlib
import json
import os
from asyncio.subprocess import PIPE
from typing import TYPE_CHECKING, Any, Protocol

import aiohttp

from chaos.arena import GATEWAY, KEY, MOCK, Arena
from chaos.experiment import ACTIONS, OF_STORE
from testkit.fault_proxy import Network
from testkit.limits_server import LimitsServer
from testkit.processes import ProcessError, spawn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.experiment import Experiment, Step

SERVICES = ("mock-model", "mock-model-b")
"""The mock models of compose.yaml, from number 1."""
DOCKER_SECONDS = 60.0
REVIVAL_SECONDS = 20.0
"""Until a mock model that was started again must answer."""


class Stage(Protocol):
    """A gateway, and what can be done to it and to its backends: `begin`, any number of `do`, `end`.

    Each may raise `ProcessError` or `aiohttp.ClientError`.

    Attributes:
        key: for the gateway, or None.
        plan: what the load knows of the mock model.
        settings: environment that was chosen for the experiment.
    """

    key: str | None
    plan: dict[str, Any]
    settings: dict[str, str]

    @property
    def url(self) -> str:
        """Of the gateway."""

    async def begin(self) -> None:
        """Make it ready, and remember how it was."""

    async def do(self, step: "Step") -> None:
        """Do what the step says."""

    async def revived(self, mock: int) -> None:
        """Wait until that mock model, started or thawed, answers its own health probe."""

    def arrivals(self) -> dict[str, list[str]]:
        """Return the request ids of the prompts that came to each mock model, by its url; of those that are known."""

    def stalled(self, start: float, end: float) -> float:
        """Return for how many seconds of a span (of `time.monotonic`) the machine kept it from running; 0: unknown."""

    async def end(self) -> None:
        """Leave it as `begin` found it."""


class LocalStage:
    """Processes of our own, started for one experiment."""

    key: str | None = None

    def __init__(self, experiment: "Experiment", seed: int) -> None:
        system = experiment.system
        gateway = {key: str(value) for key, value in system.gateway.items()}
        mock = {key: str(value) for key, value in system.mock.items()}
        config = json.dumps(system.config) if system.config else None
        self.settings = GATEWAY | MOCK | gateway | mock | ({"GATEWAY_CONFIG": config} if config else {})
        self.plan: dict[str, Any] = {}
        self._arena = Arena(
            seed,
            mocks=system.mocks,
            gateway=gateway,
            config=config,
            mock=mock,
            proxied=experiment.proxied,
            limits=dict(system.limits),
        )
        self.key = KEY if system.limits else None
        self._stack = contextlib.AsyncExitStack()

    @property
    def url(self) -> str:
        """Of the gateway."""
        return self._arena.gateway.url

    async def begin(self) -> None:
        """Start everything."""
        await self._stack.enter_async_context(self._arena)
        plan = self._arena.load(1.0).plan
        self.plan = {"mock_seed": plan.mock_seed, "mock_tokens": plan.mock_tokens, "pids": plan.pids}

    async def end(self) -> None:
        """End everything."""
        await self._stack.aclose()

    async def do(self, step: "Step") -> None:
        """Do what the step says."""
        if step.do in OF_STORE:
            await _do_to(self._arena.store, step.do)
        elif step.do == "network":
            await self._arena.proxies[step.mock - 1].be(Network(step.be))
        elif step.do == "stop-gateway":
            await self._arena.gateway.stop()
            await self._arena.gateway.start()
        else:
            await self._do_to_mock(step)

    async def _do_to_mock(self, step: "Step") -> None:
        mock = self._arena.mocks[step.mock - 1]
        if step.do == "faults":
            await mock.faults(*step.faults)
        elif step.do == "heal":
            await mock.faults()
        elif step.do == "crash":
            await mock.crash()
        elif step.do == "kill":
            await mock.kill()
        elif step.do == "start":
            if not mock.running:
                await mock.start()
        elif step.do == "freeze":
            mock.freeze()
        else:
            mock.thaw()

    async def revived(self, mock: int) -> None:
        """Wait until that mock model answers its own health probe."""
        await self._arena.mocks[mock - 1].ready()

    def arrivals(self) -> dict[str, list[str]]:
        """Return the request ids of the prompts that came to each mock model, by its url."""
        return {mock.url: [str(entry["request_id"]) for entry in mock.arrivals()] for mock in self._arena.mocks}

    def stalled(self, start: float, end: float) -> float:
        """Return for how many seconds of a span the machine kept one of us from running."""
        return self._arena.stalls.within(start, end)


async def _do_to(store: LimitsServer, action: str) -> None:
    if action == "kill-store":
        await store.kill()
    elif action == "start-store":
        if not store.running:
            await store.start()
    elif action == "freeze-store":
        store.freeze()
    else:
        store.thaw()


class RemoteStage:
    """A gateway that runs already, and the control ports of its mock models, whose scripts are put back at the end."""

    actions = frozenset({"faults", "heal"})

    def __init__(self, url: str, controls: "Sequence[str]", session: aiohttp.ClientSession, key: str | None) -> None:
        self.url = url.rstrip("/")
        self.key = key
        self.plan: dict[str, Any] = {}
        self.settings: dict[str, str] = {}
        self._controls = [control.rstrip("/") for control in controls]
        self._session = session
        self._found: list[Any] = []
        self._changed: set[int] = set()

    async def begin(self) -> None:
        """Remember the scripts."""
        self._found = [await self._control("GET", control) for control in self._controls]
        self._changed.clear()

    async def end(self) -> None:
        """Put back the scripts of those that were touched."""
        for number in sorted(self._changed):
            if number <= len(self._controls):
                await self._insist("PUT", number, self._found[number - 1])

    def arrivals(self) -> dict[str, list[str]]:
        """Return nothing: the journals of mock models that run already hold what others sent, too."""
        return {}

    def stalled(self, _start: float, _end: float) -> float:
        """Return 0: it may run on another machine."""
        return 0.0

    async def do(self, step: "Step") -> None:
        """Do what the step says."""
        self._changed.add(step.mock)
        await self._control("PUT", self._controls[step.mock - 1], list(step.faults))

    async def revived(self, mock: int) -> None:
        """Wait until that mock model answers at its control port, if that is known: its health port is not published.

        Raises:
            ProcessError: It does not.
        """
        if mock <= len(self._controls):
            await self._insist("GET", mock)

    async def _insist(self, method: str, mock: int, script: Any = None) -> None:  # noqa: ANN401
        """Call the control API of a mock model that may just be starting, until it answers."""
        control = self._controls[mock - 1]
        trouble: Exception | None = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(REVIVAL_SECONDS):
                while True:
                    try:
                        await self._control(method, control, script)
                    except (aiohttp.ClientError, TimeoutError) as error:
                        trouble = error
                        await asyncio.sleep(0.2)
                    else:
                        return
        raise ProcessError(f"the mock model at {control} does not answer: {trouble}")

    async def _control(self, method: str, control: str, body: Any = None) -> Any:  # noqa: ANN401
        url, timeout = f"{control}/faults", aiohttp.ClientTimeout(total=5)
        async with self._session.request(method, url, json=body, timeout=timeout) as response:
            if not response.ok:
                raise ProcessError(f"{method} {url}: {response.status} {await response.text()}")
            return await response.json()


class ComposeStage(RemoteStage):
    """The containers of compose.yaml. The project is the one `docker compose` finds: see `COMPOSE_PROJECT_NAME`."""

    actions = frozenset(ACTIONS) - OF_STORE - {"network"}

    def __init__(self, url: str, controls: "Sequence[str]", session: aiohttp.ClientSession, key: str | None) -> None:
        super().__init__(url, controls, session, key)
        self._stopped: set[str] = set()
        self._paused: set[str] = set()

    async def end(self) -> None:
        """Start containers first: a script can be put back only to one that runs."""
        for service in sorted(self._paused):
            await self._thaw(service)
        for service in sorted(self._stopped):
            await self._start(service)
        await super().end()

    async def do(self, step: "Step") -> None:
        """Do what the step says."""
        service = SERVICES[step.mock - 1]
        if step.do in RemoteStage.actions:
            await super().do(step)
        elif step.do == "stop-gateway":
            self._stopped.add("gateway")
            await compose("stop", "gateway")
            await self._start("gateway")
        else:
            self._changed.add(step.mock)
            await self._process(step, service)

    async def _process(self, step: "Step", service: str) -> None:
        if step.do == "kill":
            self._stopped.add(service)
            await compose("kill", service)
            self._paused.discard(service)
        elif step.do == "crash":
            self._stopped.add(service)
            async with self._session.post(f"{self._controls[step.mock - 1]}/crash"):
                pass
        elif step.do == "start":
            await self._start(service)
        elif step.do == "freeze":
            self._paused.add(service)
            await compose("pause", service)
        else:
            await self._thaw(service)

    async def _start(self, service: str) -> None:
        await compose("start", service)
        self._stopped.discard(service)

    async def _thaw(self, service: str) -> None:
        if service in self._paused:
            await compose("unpause", service)
            self._paused.discard(service)


async def compose(*args: str) -> str:
    """Run `docker compose ARGS` and return what it printed.

    Raises:
        ProcessError: It failed; the text is its last line.
    """
    command = ("docker", "compose", "--profile", "*", *args)
    try:
        process = await spawn(command, env=os.environ, stdout=PIPE, stderr=PIPE)
    except OSError as error:
        raise ProcessError(f"docker: {error.strerror}") from None
    ending = asyncio.ensure_future(process.communicate())
    try:
        async with asyncio.timeout(DOCKER_SECONDS):
            output, errors = await asyncio.shield(ending)
    except TimeoutError:
        process.kill()
        raise ProcessError(f"docker compose {' '.join(args)}: nothing for {DOCKER_SECONDS:g} s") from None
    except asyncio.CancelledError:
        await ending  # what was begun is known to be done, so that it can be undone
        raise
    if process.returncode:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise ProcessError(f"docker compose {' '.join(args)}: {last or process.returncode}")
    return output.decode(errors="replace").strip()


async def running(services: "Sequence[str]") -> list[str]:
    """Return those services that have a running container."""
    names = (await compose("ps", "--services", "--status", "running")).split()
    return [service for service in services if service in names]


async def published(service: str, port: int) -> str:
    """Return the address under which a container's port is published.

    Raises:
        ProcessError: It is not published.
    """
    address = await compose("port", service, str(port))
    if not address.rpartition(":")[2].isdecimal():
        raise ProcessError(f"docker compose port {service} {port}: {address or 'it is not published'}")
    return f"http://{address}"
