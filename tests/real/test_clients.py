"""Real client libraries get through the gateway what they get from the model itself, and are never worse off."""

from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import pytest

from testkit.polling import until
from testkit.servers import Gateway, MockModel
from tests.real.clients import Client
from tests.real.conftest import journal

pytestmark = pytest.mark.asyncio(loop_scope="session")

StartClient = Callable[[str], Awaitable[Client]]

OPENAI = ("openai_python", "openai_node", "vercel_ai", "langchain", "pydantic_ai")
CLIENTS = (*OPENAI, "anthropic_python")
CALLS = (
    *((name, call) for name in CLIENTS for call in ("chat", "stream", "tools")),
    *((name, "structured") for name in OPENAI),
    *((name, "streamed_tools") for name in (*OPENAI[:3], "anthropic_python")),
    ("anthropic_python", "count_tokens"),
    *((name, "embeddings") for name in OPENAI[:4]),
    *((name, call) for name in OPENAI[:3] for call in ("responses", "streamed_responses")),
)
SURVIVED: dict[str, dict[str, Any]] = {
    "a 500": {"kind": "status", "with": {"status": 500}, "times": 1},
    "a 429": {"kind": "status", "with": {"status": 429}, "times": 1},
    "a 503 with Retry-After": {
        "kind": "status",
        "with": {"status": 503, "headers": {"retry-after": "1"}},
        "times": 1,
    },
    "a reset": {"kind": "reset", "times": 1},
    "a cut body": {"kind": "short_body", "with": {"bytes": 50}, "times": 1},
    "a page of HTML": {"kind": "html", "times": 1},
}
SEEN: dict[str, dict[str, Any]] = {
    "a cut": {"kind": "cut", "with": {"after_events": 6, "how": "end"}},
    "a reset": {"kind": "cut", "with": {"after_events": 6, "how": "reset"}},
    "no end": {"kind": "no_finish"},
    "a broken event": {"kind": "malformed_event", "with": {"after_events": 6}},
}
numbers = count(1)


def new_prompt() -> str:
    """The gateway does not retry a prompt that failed a moment ago."""
    return f"Say something about {next(numbers)}."


async def endings(mock: MockModel) -> list[str | None]:
    return [call["ended"] for call in await journal(mock)]


async def rested(gateway: Gateway) -> bool:
    return not any(backend["cooling_seconds"] for backend in (await gateway.health())["downstream"]["backends"])


@pytest.mark.parametrize(("name", "call"), CALLS)
async def test_a_client_gets_what_it_gets_from_the_model(
    clients: StartClient, mock: MockModel, behind: Gateway, name: str, call: str
) -> None:
    client, prompt = await clients(name), new_prompt()

    through = await client.call(call, behind.url, prompt)
    through_calls = await journal(mock)
    direct = await client.call(call, mock.url, prompt)

    assert through.value
    assert through == direct
    assert [one["ended"] for one in through_calls] == ["complete"]
    assert [one["fingerprint"] for one in await journal(mock)] == [through_calls[0]["fingerprint"]] * 2


@pytest.mark.parametrize("fault", SURVIVED)
@pytest.mark.parametrize("name", CLIENTS)
async def test_a_failure_that_is_over_at_once_is_seen_by_no_client(
    clients: StartClient, mock: MockModel, behind: Gateway, name: str, fault: str
) -> None:
    client = await clients(name)
    await mock.faults(SURVIVED[fault])

    outcome = await client.call("chat", behind.url, new_prompt())

    assert outcome.value
    assert await endings(mock) == ["fault", "complete"]


@pytest.mark.parametrize("status", [400, 429, 500])
@pytest.mark.parametrize("name", CLIENTS)
async def test_a_failure_that_lasts_is_the_models_and_is_asked_for_hardly_more_often(
    clients: StartClient, mock: MockModel, behind: Gateway, name: str, status: int
) -> None:
    client, prompt = await clients(name), new_prompt()
    await mock.faults({"kind": "status", "with": {"status": status}})

    direct = await client.call("chat", mock.url, prompt)
    direct_calls = len(await journal(mock))
    await mock.control("DELETE", "/journal")
    through = await client.call("chat", behind.url, prompt)
    through_calls = len(await journal(mock))

    assert direct.status == status
    assert through == direct
    # Vercel's does not know `x-should-retry`: three attempts for its first call, one for each of its two retries.
    assert through_calls <= (1 if status == 400 else direct_calls + 2 if name == "vercel_ai" else direct_calls)
    await mock.control("DELETE", "/faults")
    await until(lambda: rested(behind), "no replica wants to be left alone")
    assert (await client.call("chat", behind.url, new_prompt())).value, "and it is over with the fault"


@pytest.mark.parametrize("fault", SEEN)
@pytest.mark.parametrize("name", CLIENTS)
async def test_no_client_takes_a_part_of_a_stream_for_the_whole(
    clients: StartClient, mock: MockModel, behind: Gateway, name: str, fault: str
) -> None:
    client = await clients(name)
    await mock.faults(SEEN[fault])

    outcome = await client.call("stream", behind.url, new_prompt())

    assert outcome.error is not None
    assert "The backend" in outcome.error["message"]
    assert len(await journal(mock)) == 1


@pytest.mark.parametrize("name", OPENAI)
async def test_a_whole_stream_without_its_done_is_whole(
    clients: StartClient, mock: MockModel, behind: Gateway, name: str
) -> None:
    client, prompt = await clients(name), new_prompt()
    whole = await client.call("stream", mock.url, prompt)
    await mock.faults({"kind": "no_done"})

    outcome = await client.call("stream", behind.url, prompt)

    assert outcome.value
    assert outcome == whole


@pytest.mark.parametrize("name", CLIENTS)
async def test_the_model_stops_when_a_client_leaves(
    clients: StartClient, mock: MockModel, behind: Gateway, name: str
) -> None:
    client = await clients(name)

    outcome = await client.call("leave", behind.url, new_prompt())

    async def left() -> bool:
        return await endings(mock) == ["caller_left"]

    assert outcome.value
    await until(left, "the model sees that the caller has left")


async def test_what_the_client_sends_of_its_own_reaches_the_model(
    clients: StartClient, mock: MockModel, behind: Gateway
) -> None:
    client = await clients("openai_python")

    await client.call("chat", behind.url, new_prompt())

    (call,) = await journal(mock)
    assert call["traceparent"]
    assert call["request_id"]
