"""The arena: gateways and mock models on ports of their own, a load, and what is measured at the end."""

import asyncio
import json
import tempfile
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from chaos.counts import Books, reconcile
from chaos.load import Load, Plan
from chaos.processes import Gateway, Mock
from testkit import usage
from testkit.fault_proxy import FaultProxy, Network
from testkit.limits_server import LimitsServer
from testkit.load import Call, now
from testkit.otlp import Sink
from testkit.polling import PATIENCE, until
from testkit.ports import LOOPBACK
from testkit.stalls import MachineStalls

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

TOKENS = 8
MOCK = {"MOCK_TTFT": "0.02", "MOCK_TOKEN_INTERVAL": "0.005", "MOCK_TOKENS": f"{TOKENS}"}
"""An answer takes 0.055 s."""
GATEWAY = {
    "GATEWAY_REQUEST_DEADLINE": "10",
    "GATEWAY_CONNECT_TIMEOUT": "0.3",
    "GATEWAY_FIRST_TOKEN_TIMEOUT": "0.8",
    "GATEWAY_ANSWER_TIMEOUT": "0.8",
    "GATEWAY_IDLE_TIMEOUT": "0.8",
    "GATEWAY_BACKOFF_INITIAL": "0.05",
    "GATEWAY_BACKOFF_MAX": "0.2",
    "GATEWAY_BREAKER_OPEN_SECONDS": "1",
    "GATEWAY_BREAKER_OPEN_MAX": "4",
    "GATEWAY_PROBE_INTERVAL": "0.5",
    "GATEWAY_SHUTDOWN_GRACE": "5",
}
"""As at home, only faster."""
KEY = "key-of-the-game-day"
"""The gateway key where it has limits."""
HOST_NAME = "mock.chaos.test"
SLACK = 2
"""Open files and tasks that may come and go."""


@dataclass
class Vitals:
    """What a gateway holds while nothing is asked of it.

    Attributes:
        files: open files of every kind; tasks: of asyncio; threads: of the process.
        memory: resident bytes.
    """

    files: int
    tasks: int
    threads: int
    memory: int


class Arena:
    """Starts everything while it is entered, and ends everything it has started.

    Args:
        seed: of the mock models and of the load.
        mocks: how many replicas.
        gateways: how many gateways before them.
        gateway: further environment of the gateways; `config` is the document of `GATEWAY_CONFIG`, in which `$0`,
            `$1`, ... stand for the replicas' urls.
        mock: further environment of the mock models.
        proxied: whether each replica stands behind a `Proxy`.
        named: whether the (one) replica is reached by a host name; see `resolve`.
        collected: whether the gateways send their spans to a `Sink`.
        limits: of the one key, `KEY`, that a store shares; none: there is neither.

    Attributes:
        stalls: when the machine kept this process, a gateway, a replica or a load from running.
    """

    def __init__(
        self,
        seed: int,
        *,
        mocks: int = 1,
        gateways: int = 1,
        gateway: "dict[str, str] | None" = None,
        config: str | None = None,
        mock: "dict[str, str] | None" = None,
        proxied: bool = False,
        named: bool = False,
        collected: bool = False,
        limits: "dict[str, int] | None" = None,
    ) -> None:
        self.seed = seed
        self._numbers = mocks, gateways
        self._gateway_env = GATEWAY | (gateway or {})
        self._config = config
        self._mock_env = MOCK | {"MOCK_SEED": f"{seed}"} | (mock or {})
        self._proxied = proxied
        self._named = named
        self._collected = collected
        self._limits = limits or {}
        self._stack = AsyncExitStack()
        self.mocks: list[Mock] = []
        self.proxies: list[FaultProxy] = []
        self.gateways: list[Gateway] = []
        self.folder: Path
        self.collector: Sink
        self.store: LimitsServer
        self._before: list[Vitals] = []
        self._loads: list[Load] = []
        self.stalls = MachineStalls(self._pids)

    @property
    def mock(self) -> Mock:
        """The first mock model."""
        return self.mocks[0]

    @property
    def gateway(self) -> Gateway:
        """The first gateway."""
        return self.gateways[0]

    @property
    def proxy(self) -> FaultProxy:
        """The first proxy."""
        return self.proxies[0]

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: "TracebackType | None"
    ) -> None:
        await self._stack.aclose()

    def load(self, rate: float, *, on_call: "Callable[[Call], None] | None" = None, **plan: Any) -> Load:  # noqa: ANN401
        """Return a load on the gateways, to be entered; `plan` is further fields of `Plan`."""
        fields: dict[str, Any] = {
            "urls": [gateway.url for gateway in self.gateways],
            "pids": [gateway.pid for gateway in self.gateways],
            "mock_seed": int(self._mock_env["MOCK_SEED"]),
            "mock_tokens": int(self._mock_env["MOCK_TOKENS"]),
        }
        load = Load(Plan(rate=rate, seed=self.seed, **(fields | plan)), on_call=on_call)
        self._loads.append(load)
        return load

    def resolve(self, address: str | None) -> None:
        """Let the host name of the backend resolve to an address; None: to nothing."""
        names = {HOST_NAME: address} if address is not None else {}
        draft = self.folder / "names.draft"
        draft.write_text(json.dumps(names), encoding="utf-8")
        draft.replace(self.folder / "names.json")

    async def add_mock(self, *, host: str = LOOPBACK, port: int | None = None) -> Mock:
        """Start one more mock model, which no gateway knows of yet."""
        mock = Mock(f"mock-{len(self.mocks) + 1}", self.folder, self._mock_env, host=host, port=port)
        self.mocks.append(mock)
        self._stack.push_async_callback(mock.kill)
        await mock.start()
        return mock

    async def answers(self, mock: Mock, seconds: float = 10.0) -> float:
        """Wait until a mock model answers its probe, and return the instant at which it did."""
        await mock.ready(seconds)
        return now()

    async def idle(self, seconds: float = PATIENCE) -> None:
        """Wait until no gateway that runs has anything under way."""
        names = (
            "gateway_in_flight_requests",
            "gateway_queued_requests",
            "gateway_backend_in_flight",
            "gateway_buffered_bytes",
        )

        async def is_idle(gateway: Gateway) -> bool:
            if not gateway.running:
                return True
            metrics = await gateway.metrics()
            return not any(metrics.value(name) for name in names)

        for gateway in self.gateways:
            await until(lambda: is_idle(gateway), f"{gateway.name} is idle", seconds=seconds)  # noqa: B023 - awaited

    async def books(self, calls: "Sequence[Call]") -> Books:
        """Return the three counts; the gateways have served `calls` and nothing else."""
        await self.idle()
        backends = {f"backend-{number}": mock.arrivals() for number, mock in enumerate(self.mocks, 1)}
        if self._named:
            backends = {"backend-1": [entry for mock in self.mocks for entry in mock.arrivals()]}
        return reconcile(calls, [await gateway.counted() for gateway in self.gateways], backends)

    async def leaks(self, seconds: float = 15.0) -> list[str]:
        """Return what a gateway still holds after everything has ended, a line each; this ends the mock models.

        Without them no connection to a backend is kept, and open files are comparable with the beginning.
        """
        await self.idle()
        for mock in self.mocks:
            await mock.kill()
        for proxy in self.proxies:
            await proxy.be(Network.REFUSES)
        found: list[str] = []
        end = now() + seconds
        while now() < end:
            found = [line for number, before in enumerate(self._before) for line in await self._held(number, before)]
            if not found:
                break
            await asyncio.sleep(0.1)
        return found

    async def vitals(self, gateway: Gateway) -> Vitals:
        """Return what a gateway holds now."""
        files = usage.open_files(gateway.pid).total()
        return Vitals(files, await gateway.tasks(), usage.threads(gateway.pid), gateway.memory())

    async def _held(self, number: int, before: Vitals) -> list[str]:
        gateway = self.gateways[number]
        if not gateway.running:
            return []
        after = await self.vitals(gateway)
        return [
            f"{gateway.name}: {name} {was} -> {now_}"
            for name, was, now_ in (
                ("open files", before.files, after.files),
                ("tasks", before.tasks, after.tasks),
                ("threads", before.threads, after.threads),
            )
            if now_ > was + SLACK
        ]

    def _pids(self) -> list[int]:
        processes = [process.pid for process in (*self.gateways, *self.mocks) if process.running]
        return processes + [load.pid for load in self._loads if load.pid]

    async def _start(self) -> None:
        stack = self._stack
        stack.enter_context(self.stalls)
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chaos-")))
        mocks, gateways = self._numbers
        await asyncio.gather(*(self.add_mock() for _ in range(mocks)))
        self.mocks.sort(key=lambda mock: mock.name)
        for mock in self.mocks if self._proxied else ():
            proxy = FaultProxy((mock.host, mock.port))
            stack.push_async_callback(proxy.close)
            await proxy.be(Network.GOOD)
            self.proxies.append(proxy)
        self.resolve(LOOPBACK)
        env = self._gateway_env | self._backends()
        if self._collected:
            self.collector = Sink("collector", self.folder)
            stack.push_async_callback(self.collector.kill)
            await self.collector.start()
            env["OTEL_EXPORTER_OTLP_ENDPOINT"] = self.collector.url
        if self._limits:
            self.store = LimitsServer(self.folder)
            stack.push_async_callback(self.store.kill)
            await self.store.start()
            env |= {"GATEWAY_LIMITS_URL": self.store.url, "KEY": KEY}
        names = self.folder / "names.json" if self._named else None
        for number in range(gateways):
            gateway = Gateway(f"gateway-{number + 1}", self.folder, env, names=names)
            stack.push_async_callback(gateway.kill)
            self.gateways.append(gateway)
        await asyncio.gather(*(gateway.start() for gateway in self.gateways))
        self._before = [await self.vitals(gateway) for gateway in self.gateways]

    def _backends(self) -> dict[str, str]:
        urls = [proxy.url for proxy in self.proxies] if self._proxied else [mock.url for mock in self.mocks]
        if self._named:
            urls = [f"http://{HOST_NAME}:{self.mock.port}"]
        if self._limits:
            backends = {"backend": {"urls": urls}}
            routes = [{"model": "*", "targets": [{"backend": "backend"}]}]
            keys = [{"name": "game-day", "key_env": "KEY", "limits": self._limits}]
            file = self.folder / "gateway.yaml"
            file.write_text(json.dumps({"backends": backends, "routes": routes, "keys": keys}), encoding="utf-8")
            return {"GATEWAY_CONFIG": str(file)}
        if self._config is None:
            return {"GATEWAY_BACKEND_URLS": ",".join(urls)}
        file = self.folder / "gateway.yaml"
        text = self._config
        for number, url in enumerate(urls):
            text = text.replace(f"${number}", url)
        file.write_text(text, encoding="utf-8")
        return {"GATEWAY_CONFIG": str(file)}
