"""Stored responses are found by an instance that did not make them, with a hint from the one that did."""

import asyncio
from contextlib import suppress
from typing import Self

import pytest
from redis.asyncio import Redis

from mock_model.serve import MockModel
from testkit.limits_server import LimitsServer
from testkit.polling import PATIENCE, until
from testkit.ports import LOOPBACK
from tests.integration.gateways import Gateway, StartGateway, StartMock


async def made(gateway: Gateway, text: str) -> tuple[str, str]:
    """Make a response: its id, and who has it."""
    async with gateway.client.post("/v1/responses", json={"model": "m", "input": text}) as response:
        assert response.status == 200
        return (await response.json())["id"], response.headers["x-gateway-backend"]


def reads(mock: MockModel) -> int:
    return sum(call.path.startswith("/v1/responses/") for call in mock.journal.calls)


@pytest.fixture
async def mocks(start_mock: StartMock) -> list[MockModel]:
    return [await start_mock() for _ in range(4)]


async def test_a_response_that_another_instance_made_is_asked_for_where_it_is(
    mocks: list[MockModel],
    limits_server: LimitsServer,
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gateway.response_hints.PATIENCE", PATIENCE)
    monkeypatch.setattr("gateway.valkey.TIMEOUT", PATIENCE)
    first, second = [await start_gateway(*mocks, gateway_limits_url=limits_server.url) for _ in range(2)]
    client = Redis(port=limits_server.port)
    for number in range(1, 9):
        response_id, replica = await made(first, f"Hello {number}")

        async def is_told(number: int = number) -> bool:
            return len(await client.keys("llm-gateway:responses:*")) == number

        await until(is_told, "the hint is told")
        assert not await client.keys(f"*{response_id}*")
        async with second.client.get(f"/v1/responses/{response_id}") as response:
            assert (response.status, response.headers["x-gateway-backend"]) == (200, replica)
            assert response.headers["x-gateway-attempts"] == "1"
    assert sum(reads(mock) for mock in mocks) == 8, "nobody else was asked"
    await client.aclose()


@pytest.mark.parametrize("trouble", ["frozen", "gone", "nonsense"])
async def test_without_a_hint_the_replicas_are_asked_in_turn(
    mocks: list[MockModel],
    limits_server: LimitsServer,
    start_gateway: StartGateway,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    client = Redis(port=limits_server.port)

    async def told() -> list[bytes]:
        return [bytes(key) for key in await client.keys("llm-gateway:responses:*") if isinstance(key, bytes)]

    with monkeypatch.context() as patient:
        patient.setattr("gateway.valkey.TIMEOUT", PATIENCE)  # a hint is told once
        first, second = [await start_gateway(*mocks, gateway_limits_url=limits_server.url) for _ in range(2)]
        response_id, replica = await made(first, "Hello")
        await until(told, "the hint is told")
    if trouble == "nonsense":
        await client.set((await told())[0], b"\xc1")
    await client.aclose()
    if trouble == "frozen":
        limits_server.freeze()
    elif trouble == "gone":
        await limits_server.kill()
    async with second.client.get(f"/v1/responses/{response_id}") as response:
        assert (response.status, response.headers["x-gateway-backend"]) == (200, replica)


@pytest.mark.parametrize(
    "nonsense", [b":no number\r\n", b"*1\r\n" * 50_000, b"-" + b"E" * 500_000], ids=["number", "nested", "endless line"]
)
async def test_a_store_that_answers_nonsense_costs_no_request_and_is_told_hints_again(
    mocks: list[MockModel], limits_server: LimitsServer, start_gateway: StartGateway, nonsense: bytes
) -> None:
    async with _Between(limits_server.port) as between:
        gateway = await start_gateway(*mocks, gateway_limits_url=f"valkey://127.0.0.1:{between.port}")
        between.nonsense = nonsense
        response_id, replica = await made(gateway, "Hello")
        for asked, status in ((response_id, 200), ("resp_unknown", 404)) * 2:
            async with gateway.client.get(f"/v1/responses/{asked}") as response:
                assert response.status == status
        await until(lambda: between.answered_nonsense > 1, "the store was asked again")
        between.nonsense = b""
        client = Redis(port=limits_server.port)

        async def is_told() -> bool:
            await made(gateway, "Hello again")
            return bool(await client.keys("llm-gateway:responses:*"))

        await until(is_told, "hints are told again", seconds=20)
        await client.aclose()
        async with gateway.client.get(f"/v1/responses/{response_id}") as response:
            assert (response.status, response.headers["x-gateway-backend"]) == (200, replica)


class _Between:
    """Passes on what is said to a store and what it answers; while there is `nonsense`, that is the answer."""

    def __init__(self, store: int) -> None:
        self._store = store
        self.nonsense = b""
        self.answered_nonsense = 0

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, LOOPBACK, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        store_reader, store = await asyncio.open_connection(LOOPBACK, self._store)
        back = asyncio.create_task(self._pass_on(store_reader, writer))
        try:
            with suppress(ConnectionError):
                while data := await reader.read(65_536):
                    if self.nonsense:
                        self.answered_nonsense += 1
                        writer.write(self.nonsense)
                    else:
                        store.write(data)
        finally:
            back.cancel()
            writer.close()
            store.close()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
