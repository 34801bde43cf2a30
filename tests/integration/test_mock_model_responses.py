# ruff: noqa: ANN401
"""What the mock model remembers of its responses, on real sockets."""

from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from mock_model.serve import MockModel
from mock_model.settings import Settings

PATH = "/v1/responses"
LONG = 600.0
"""Seconds for a first token that no test waits for."""


def settings(**changes: Any) -> Settings:
    fast = {"port": 0, "control_port": 0, "mock_ttft": 0, "mock_token_interval": 0, "mock_tokens": 4}
    return Settings(**{**fast, **changes})


@pytest.fixture
async def mock() -> AsyncIterator[MockModel]:
    async with MockModel(settings()) as running:
        yield running


@pytest.fixture
async def client(mock: MockModel) -> AsyncIterator[AsyncOpenAI]:
    async with sdk(mock) as client:
        yield client


def sdk(mock: MockModel) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="any", max_retries=0)


async def test_a_conversation_goes_on_until_it_is_deleted(client: AsyncOpenAI, mock: MockModel) -> None:
    first = await client.responses.create(model="m", input="hello")
    second = await client.responses.create(model="m", input="and then?", previous_response_id=first.id)
    shown = await client.responses.retrieve(second.id)
    await client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError) as unknown:
        await client.responses.create(model="m", input="and then?", previous_response_id=first.id)
    with pytest.raises(openai.NotFoundError) as gone:
        await client.responses.retrieve(first.id)

    assert shown.output_text == second.output_text
    assert shown.previous_response_id == first.id
    assert (unknown.value.param, unknown.value.code) == ("previous_response_id", "previous_response_not_found")
    assert gone.value.body == {
        "message": f"Response with id '{first.id}' not found.",
        "type": "invalid_request_error",
        "param": None,
        "code": None,
    }
    assert [(call.method, call.path) for call in mock.journal.calls] == [
        ("POST", PATH),
        ("POST", PATH),
        ("GET", f"{PATH}/{second.id}"),
        ("DELETE", f"{PATH}/{first.id}"),
        ("POST", PATH),
        ("GET", f"{PATH}/{first.id}"),
    ]


async def test_two_mock_models_do_not_know_each_others_responses(client: AsyncOpenAI) -> None:
    async with MockModel(settings()) as other, sdk(other) as stranger:
        ours = await client.responses.create(model="m", input="hello")
        theirs = await stranger.responses.create(model="m", input="hello")
        with pytest.raises(openai.NotFoundError):
            await stranger.responses.retrieve(ours.id)

    assert ours.id != theirs.id
    assert ours.output_text == theirs.output_text, "the same seed"


async def test_the_same_port_seed_and_requests_give_the_same_ids_again() -> None:
    async def ids(port: int) -> tuple[int, list[str]]:
        async with MockModel(settings(port=port)) as mock, sdk(mock) as client:
            return mock.port, [(await client.responses.create(model="m", input=text)).id for text in ("a", "b", "a")]

    port, first = await ids(0)
    _, second = await ids(port)

    assert first == second
    assert first[0] == first[2] != first[1]


async def test_a_streamed_response_can_be_streamed_again(client: AsyncOpenAI) -> None:
    events = [event async for event in await client.responses.create(model="m", input="hello", stream=True)]
    made: Any = events[-1]
    again = [event async for event in await client.responses.retrieve(made.response.id, stream=True)]
    rest = [event async for event in await client.responses.retrieve(made.response.id, stream=True, starting_after=3)]

    assert again == events
    assert rest == events[4:]


async def test_a_background_response_is_cancelled_while_it_runs() -> None:
    async with MockModel(settings(mock_ttft=LONG, mock_max_concurrency=1)) as mock, sdk(mock) as client:
        told = await client.responses.create(model="m", input="hello", background=True)
        running = await client.responses.retrieve(told.id)
        cancelled = await client.responses.cancel(told.id)
        again = await client.responses.cancel(told.id)
        shown = await client.responses.retrieve(told.id)

    assert [answer.status for answer in (told, running, cancelled, again, shown)] == [
        "queued",
        "in_progress",
        "cancelled",
        "cancelled",
        "cancelled",
    ]


async def test_a_background_response_is_complete_after_its_time(client: AsyncOpenAI) -> None:
    told = await client.responses.create(model="m", input="hello", background=True)
    shown = await client.responses.retrieve(told.id)
    with pytest.raises(openai.BadRequestError, match="Cannot cancel a completed response"):
        await client.responses.cancel(told.id)

    assert (told.status, shown.status) == ("queued", "completed")
    assert len(shown.output_text.split()) == 4


async def test_a_background_stream_that_was_cut_is_resumed(client: AsyncOpenAI, mock: MockModel) -> None:
    mock.set_faults([{"kind": "cut", "with": {"after_events": 4}, "match": {"path": PATH}}])
    stream = await client.responses.create(model="m", input="hello", stream=True, background=True)
    events: list[Any] = [event async for event in stream]
    response_id = events[0].response.id
    rest: list[Any] = [
        event
        async for event in await client.responses.retrieve(
            response_id, stream=True, starting_after=events[-1].sequence_number
        )
    ]

    numbers = [event.sequence_number for event in [*events, *rest]]
    assert len(events) == 4
    assert numbers == list(range(len(numbers)))
    assert rest[-1].type == "response.completed"


@pytest.mark.parametrize("kind", ["status", "reset", "overload"])
async def test_a_refused_call_changes_nothing(client: AsyncOpenAI, mock: MockModel, kind: str) -> None:
    made = await client.responses.create(model="m", input="hello")
    parameters: Any = {"status": {"status": 503}, "reset": {}, "overload": {"capacity": 0}}[kind]
    mock.set_faults([{"kind": kind, "with": parameters, "times": 1, "match": {"path": f"{PATH}/*"}}])
    with pytest.raises(openai.APIError):
        await client.responses.delete(made.id)

    assert (await client.responses.retrieve(made.id)).id == made.id
    await client.responses.delete(made.id)
    assert [call.fault for call in mock.journal.calls] == [None, kind, None, None]


async def test_an_error_event_in_a_resumed_stream_has_the_next_number(client: AsyncOpenAI, mock: MockModel) -> None:
    made: Any = [event async for event in await client.responses.create(model="m", input="x", stream=True)]
    mock.set_faults([{"kind": "error_event", "with": {"after_events": 1}, "match": {"path": f"{PATH}/*"}}])
    url = f"{mock.url}{PATH}/{made[0].response.id}?stream=true&starting_after=2"
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        text = await answer.text()

    assert '"sequence_number":3' in text
    assert text.count("event: ") == 2
    assert 'event: error\ndata: {"type":"error","sequence_number":4,' in text


async def test_reset_and_crash_forget_the_responses(client: AsyncOpenAI, mock: MockModel) -> None:
    made = await client.responses.create(model="m", input="hello")
    await mock.reset()
    with pytest.raises(openai.NotFoundError):
        await client.responses.retrieve(made.id)
    made = await client.responses.create(model="m", input="hello")
    mock.die()
    await mock.revive()
    async with sdk(mock) as later:
        with pytest.raises(openai.NotFoundError):
            await later.responses.retrieve(made.id)


async def test_other_methods_are_refused(mock: MockModel) -> None:
    async with aiohttp.ClientSession(mock.url) as http:
        for method, path, status in (
            ("POST", f"{PATH}/resp_x", 405),
            ("GET", f"{PATH}/resp_x/cancel", 405),
            ("POST", f"{PATH}/resp_x/cancel", 404),
            ("GET", f"{PATH}/resp_x/input_items", 404),
        ):
            async with http.request(method, path) as answer:
                assert answer.status == status
                assert set((await answer.json())["error"]) == {"message", "type", "param", "code"}
