"""Stored responses are found by an instance that did not make them, with a hint from the one that did."""

import pytest
from redis.asyncio import Redis

from mock_model.serve import MockModel
from testkit.limits_server import LimitsServer
from testkit.polling import until
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
    mocks: list[MockModel], limits_server: LimitsServer, start_gateway: StartGateway
) -> None:
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
    mocks: list[MockModel], limits_server: LimitsServer, start_gateway: StartGateway, trouble: str
) -> None:
    first, second = [await start_gateway(*mocks, gateway_limits_url=limits_server.url) for _ in range(2)]
    client = Redis(port=limits_server.port)
    response_id, replica = await made(first, "Hello")

    async def told() -> list[bytes]:
        return [bytes(key) for key in await client.keys("llm-gateway:responses:*") if isinstance(key, bytes)]

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
