"""Real client libraries get through the gateway what they get from the model itself, and are never worse off."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from testkit.polling import until
from testkit.servers import Gateway, MockModel
from tests.real.clients import Client
from tests.real.conftest import StartGateway, journal

Start = Callable[[str], Awaitable[Client]]

CLIENTS = ("openai_python", "openai_node", "vercel_ai", "langchain", "pydantic_ai")
CALLS = (
    *((name, call) for name in CLIENTS for call in ("chat", "stream", "tools", "structured")),
    *((name, "streamed_tools") for name in ("openai_python", "openai_node", "vercel_ai")),
    *((name, "embeddings") for name in CLIENTS if name != "pydantic_ai"),
    *((name, call) for name in CLIENTS[:3] for call in ("responses", "streamed_responses")),
)


@pytest.mark.parametrize(("name", "call"), CALLS)
async def test_a_client_gets_what_it_gets_from_the_model(
    clients: Start, mock: MockModel, start_gateway: StartGateway, name: str, call: str
) -> None:
    client, gateway = await clients(name), await start_gateway(mock.url)

    through = await client.call(call, gateway.url)
    through_calls = await journal(mock)
    direct = await client.call(call, mock.url)

    assert through.value
    assert through == direct
    assert [one["ended"] for one in through_calls] == ["complete"]
    assert [one["fingerprint"] for one in await journal(mock)] == [through_calls[0]["fingerprint"]] * 2
