"""Real servers and clients: `make test-real`. They are started at the first test that needs them."""

import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from subprocess import run
from typing import Any

import pytest
import pytest_asyncio

from testkit.http import ask
from testkit.servers import Gateway, MockModel
from tests.real.clients import NODE, PROGRAMS, Client
from tests.real.servers import ENVIRONMENT, HERE, LiteLlm, Llama
from tests.suites import mark

REQUIRED = os.environ.get("REAL_TESTS") == "require"
NO_NODE = (
    "found no Node: its clients were not tested"
    if NODE is None
    else "found no tests/real/node/node_modules, which `make test-real` makes with npm: Node's clients were not tested"
    if not (HERE / "node" / "node_modules").exists()
    else None
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `real`; what shares processes names the session's event loop itself."""
    mark(items, HERE, "real", 180)


@pytest.fixture(scope="session", autouse=True)
def environment() -> None:
    if not (ENVIRONMENT / "python").exists():
        pytest.exit("found no .venv-real: run `make test-real`, which makes it", returncode=1)
    if REQUIRED and NO_NODE:
        pytest.exit(f"REAL_TESTS=require, but {NO_NODE}", returncode=1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all logs go."""
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="session")
def model(folder: Path) -> Path:
    """A model's file of 0.4 MB."""
    file = folder / "tiny.gguf"
    run([ENVIRONMENT / "python", HERE / "tiny_gguf.py", file], check=True)  # noqa: S603
    return file


StartLlama = Callable[..., Awaitable[Llama]]
StartGateway = Callable[..., Awaitable[Gateway]]


@pytest_asyncio.fixture(loop_scope="session")
async def start_llama(tmp_path: Path, model: Path) -> AsyncIterator[StartLlama]:
    """Start llama.cpp's server; keyword arguments are its parameters."""
    async with AsyncExitStack() as stack:
        names = (f"llama-{number}" for number in range(1, 10))

        async def start(**parameters: Any) -> Llama:  # noqa: ANN401
            return await stack.enter_async_context(Llama(next(names), tmp_path, model, **parameters))

        yield start


@pytest_asyncio.fixture(loop_scope="session")
async def start_gateway(tmp_path: Path) -> AsyncIterator[StartGateway]:
    """Start a gateway as its users do, before the servers at these urls; keyword arguments are its environment."""
    async with AsyncExitStack() as stack:

        async def start(*urls: str, **environment: str) -> Gateway:
            env = environment | ({"GATEWAY_BACKEND_URLS": ",".join(urls)} if urls else {})
            return await stack.enter_async_context(Gateway("gateway", tmp_path, env))

        yield start


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def llama(folder: Path, model: Path) -> AsyncIterator[Llama]:
    """A server that nothing breaks."""
    async with Llama("llama", folder, model) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def through(folder: Path, llama: Llama) -> AsyncIterator[Gateway]:
    """A gateway before that server, with only its url set."""
    async with Gateway("gateway", folder, {"GATEWAY_BACKEND_URLS": llama.url}) as gateway:
        yield gateway


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def litellm(folder: Path, llama: Llama, through: Gateway) -> AsyncIterator[LiteLlm]:
    """A proxy with the model `tiny`, and with `behind-a-gateway`, the same model behind the gateway."""
    async with LiteLlm(folder, {"tiny": llama.url, "behind-a-gateway": through.url}) as server:
        yield server


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def started_mock(folder: Path) -> AsyncIterator[MockModel]:
    async with MockModel("mock", folder, {"MOCK_TTFT": "0", "MOCK_TOKEN_INTERVAL": "0.02"}) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="session")
async def mock(started_mock: MockModel) -> MockModel:
    """A mock model without faults, with an empty journal."""
    await started_mock.control("POST", "/reset")
    return started_mock


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def behind(folder: Path, started_mock: MockModel) -> AsyncIterator[Gateway]:
    """A gateway before the mock model, for many tests: its breaker stays closed and it waits for no outage."""
    env = {
        "GATEWAY_BACKEND_URLS": started_mock.url,
        "GATEWAY_BREAKER_FAILURES": "1000",
        "GATEWAY_OUTAGE_WAIT": "0",
        "GATEWAY_RETRY_AFTER_MAX": "2",
        "GATEWAY_RETRY_FLOOR": "1000",
    }
    async with Gateway("behind", folder, env) as gateway:
        yield gateway


async def journal(mock: MockModel) -> list[dict[str, Any]]:
    """Return the calls that reached a mock model."""
    calls: list[dict[str, Any]] = (await ask(f"{mock.control_url}/journal")).json["calls"]
    return calls


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def clients(folder: Path) -> AsyncIterator[Callable[[str], Awaitable[Client]]]:
    """Start the program with a client library, once for all tests."""
    async with AsyncExitStack() as stack:
        started: dict[str, Client] = {}

        async def start(name: str) -> Client:
            if NO_NODE and PROGRAMS[name][0] == (NODE or ""):
                pytest.skip(NO_NODE)
            if name not in started:
                started[name] = await stack.enter_async_context(Client(name, folder))
            return started[name]

        yield start
