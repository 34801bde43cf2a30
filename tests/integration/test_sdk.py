"""The real OpenAI SDK, pointed at the gateway, gets what it gets from the model itself."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

from mock_model.serve import MockModel
from testkit.polling import until
from tests.integration.gateways import Gateway, StartGateway, listed

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
REFUSED = "http://127.0.0.1:1"

Ask = Callable[[AsyncOpenAI], Awaitable[Any]]


class Both:
    """The same question to the gateway and to the model itself."""

    def __init__(self, mock: MockModel, through: AsyncOpenAI, direct: AsyncOpenAI) -> None:
        self._mock = mock
        self._through = through
        self._direct = direct

    async def whole(self, ask: Ask) -> Any:  # noqa: ANN401
        """The answer, which is the model's own; one call reached the model."""
        answer = await ask(self._through)
        assert [call.ended for call in self._mock.journal.calls] == ["complete"]
        assert answer == await ask(self._direct)
        return answer

    async def streamed(self, ask: Ask) -> list[Any]:
        """The events, which are the model's own."""
        events = [event async for event in await ask(self._through)]
        assert [call.ended for call in self._mock.journal.calls] == ["complete"]
        assert events == [event async for event in await ask(self._direct)]
        return events


@pytest.fixture
async def both(mock: MockModel, start_gateway: StartGateway) -> AsyncIterator[Both]:
    gateway = await start_gateway(mock)
    async with gateway.sdk as through, AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="x", max_retries=0) as direct:
        yield Both(mock, through, direct)


def text_of(chunks: list[Any], index: int = 0) -> str:
    """The words of one choice."""
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices if choice.index == index)


async def test_chat(both: Both) -> None:
    answer = await both.whole(lambda sdk: sdk.chat.completions.create(model="demo-model", messages=MESSAGES))
    assert answer.model == "demo-model"
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens > 0


async def test_chat_of_two_choices(both: Both) -> None:
    answer = await both.whole(lambda sdk: sdk.chat.completions.create(model="m", messages=MESSAGES, n=2))
    assert [choice.index for choice in answer.choices] == [0, 1]


@pytest.mark.parametrize("n", [1, 2, 5])
async def test_streamed_chat(both: Both, n: int) -> None:
    chunks = await both.streamed(
        lambda sdk: sdk.chat.completions.create(model="m", messages=MESSAGES, n=n, stream=True)
    )
    assert all(text_of(chunks, index) for index in range(n))
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason == "stop"]
    assert sorted(finished) == list(range(n))
    assert all(chunk.usage is None for chunk in chunks)


@pytest.mark.parametrize("n", [1, 2])
async def test_streamed_chat_with_its_usage(both: Both, n: int) -> None:
    chunks = await both.streamed(
        lambda sdk: sdk.chat.completions.create(
            model="m", messages=MESSAGES, n=n, stream=True, stream_options={"include_usage": True}
        )
    )
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0


async def test_tool_calls(both: Both) -> None:
    answer = await both.whole(
        lambda sdk: sdk.chat.completions.create(model="m", messages=MESSAGES, tools=[TOOL], tool_choice="required")
    )
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.tool_calls[0].function.name == "weather"


async def test_streamed_tool_calls(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk, sdk.chat.completions.stream(model="m", messages=MESSAGES, tools=[TOOL]) as stream:
        final = await stream.get_final_completion()
    calls: Any = final.choices[0].message.tool_calls
    assert final.choices[0].finish_reason == "tool_calls"
    assert (calls[0].function.name, calls[0].function.arguments) == ("weather", '{"city":"text"}')
    assert [call.ended for call in mock.journal.calls] == ["complete"]


async def test_structured_output(mock: MockModel, start_gateway: StartGateway) -> None:
    class City(BaseModel):
        name: str

    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk:
        answer = await sdk.chat.completions.parse(model="m", messages=MESSAGES, response_format=City)
    assert answer.choices[0].message.parsed == City(name="text")


@pytest.mark.parametrize("prompt", ["one", ["one", "two", "three"], [1, 2, 3], [[1, 2], [3]]])
@pytest.mark.parametrize("n", [1, 2])
async def test_completions_of_one_or_several_prompts(both: Both, prompt: Any, n: int) -> None:  # noqa: ANN401
    answer = await both.whole(lambda sdk: sdk.completions.create(model="m", prompt=prompt, n=n))
    prompts = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
    assert [choice.index for choice in answer.choices] == list(range(prompts * n))


@pytest.mark.parametrize("prompt", ["one", ["one", "two", "three"], [1, 2, 3], [[1, 2], [3]]])
async def test_streamed_completions_of_one_or_several_prompts(both: Both, prompt: Any) -> None:  # noqa: ANN401
    chunks = await both.streamed(lambda sdk: sdk.completions.create(model="m", prompt=prompt, n=2, stream=True))
    prompts = 1 if isinstance(prompt, str) or isinstance(prompt[0], int) else len(prompt)
    finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert sorted(finished) == list(range(prompts * 2))


@pytest.mark.parametrize("encoding", ["float", "base64", None])
async def test_embeddings(both: Both, encoding: Any) -> None:  # noqa: ANN401
    def ask(sdk: AsyncOpenAI) -> Awaitable[Any]:
        options = {} if encoding is None else {"encoding_format": encoding}
        return sdk.embeddings.create(model="m", input=["a", "b"], dimensions=8, **options)

    answer = await both.whole(ask)
    assert [entry.index for entry in answer.data] == [0, 1]
    for entry in answer.data:
        assert isinstance(entry.embedding, str) if encoding == "base64" else len(entry.embedding) == 8


async def test_embeddings_say_the_same_in_both_forms(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk:
        packed = await sdk.embeddings.create(model="m", input="a")
        plain = await sdk.embeddings.create(model="m", input="a", encoding_format="float")
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, rel=1e-6)


async def test_responses(both: Both) -> None:
    answer = await both.whole(lambda sdk: sdk.responses.create(model="m", input="Say something."))
    assert answer.status == "completed"
    assert answer.output_text


async def test_streamed_responses(both: Both) -> None:
    events = await both.streamed(lambda sdk: sdk.responses.create(model="m", input="Say something.", stream=True))
    assert (events[0].type, events[-1].type) == ("response.created", "response.completed")
    assert [event.sequence_number for event in events] == list(range(len(events)))
    words = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert words == events[-1].response.output_text


async def test_models(mock: MockModel, start_gateway: StartGateway, tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(
        f'backends: {{one: {{url: "{mock.url}"}}}}\n'
        'routes: [{model: org/small, targets: [{backend: one}]}, {model: "*", targets: [{backend: one}]}]\n'
    )
    gateway = await start_gateway(gateway_config=file, model_name="default")
    await listed(gateway)
    async with gateway.sdk as sdk:
        models = [model async for model in sdk.models.list()]
        assert [model.id for model in models] == ["org/small", "default", "demo-model"]
        for model in models:
            assert await sdk.models.retrieve(model.id) == model
        with pytest.raises(openai.NotFoundError) as caught:
            await sdk.models.retrieve("none-of-them")
    assert caught.value.code == "model_not_found"
    assert mock.journal.total == 0


async def test_the_blocking_client(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)

    def ask() -> tuple[str | None, str]:
        with OpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0) as sdk:
            answer = sdk.chat.completions.create(model="m", messages=MESSAGES)
            chunks = sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True)
            return answer.choices[0].message.content, text_of(list(chunks))

    whole, streamed = await asyncio.to_thread(ask)
    assert whole
    assert streamed
    assert mock.journal.total == 2


async def test_many_at_once_over_the_sdks_connections(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_connect_timeout=30)

    async def ask(sdk: AsyncOpenAI, number: int) -> None:
        messages: Any = [{"role": "user", "content": f"Say {number}."}]
        answer = await sdk.chat.completions.create(model=f"m-{number}", messages=messages)
        assert answer.model == f"m-{number}"
        stream = await sdk.chat.completions.create(model=f"m-{number}", messages=messages, stream=True)
        chunks = [chunk async for chunk in stream]
        assert {chunk.model for chunk in chunks} == {f"m-{number}"}

    async with gateway.sdk as sdk:
        await asyncio.gather(*(ask(sdk, number) for number in range(40)))
    assert mock.journal.total == 80
    assert {call.ended for call in mock.journal.calls} == {"complete"}
    await until(lambda: gateway.parts.admission.in_flight == 0)
    assert gateway.parts.byte_budget.held == 0


async def test_headers_are_there_in_raw_answers(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk:
        raw = await sdk.chat.completions.with_raw_response.create(
            model="m", messages=MESSAGES, extra_headers={"x-request-id": "mine-1"}
        )
        answer: Any = raw.parse()
    assert raw.headers["x-gateway-backend"] == "backend-1"
    assert raw.headers["x-gateway-attempts"] == "1"
    assert raw.request_id == "mine-1"
    assert answer._request_id == "mine-1"
    assert mock.journal.calls[0].request_id == "mine-1"


async def ask_for_error(gateway: Gateway, kind: type[openai.APIStatusError], **changes: Any) -> openai.APIStatusError:  # noqa: ANN401
    """Ask unstreamed and streamed; both fail alike, with a request id, before the SDK has anything of an answer."""
    caught: openai.APIStatusError | None = None
    for stream in (False, True):
        async with gateway.sdk as sdk:
            request: dict[str, Any] = {"model": "m", "messages": MESSAGES, "stream": stream}
            with pytest.raises(kind) as info:
                await sdk.chat.completions.create(**(request | changes))
        assert type(info.value) is kind
        assert info.value.request_id == info.value.response.headers["x-request-id"]
        assert caught is None or (caught.code, caught.status_code) == (info.value.code, info.value.status_code)
        caught = info.value
    assert caught is not None
    return caught


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, openai.BadRequestError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
        (504, openai.InternalServerError),
        (418, openai.APIStatusError),
    ],
)
async def test_a_backends_error_is_the_exception_it_would_be_without_the_gateway(
    mock: MockModel, start_gateway: StartGateway, status: int, kind: type[openai.APIStatusError]
) -> None:
    error = {"message": "as the model says", "type": "some_type", "param": "n", "code": "some_code"}
    mock.set_faults([{"kind": "status", "with": {"status": status, "body": {"error": error}}}])
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    caught = await ask_for_error(gateway, kind)
    assert caught.status_code == status
    assert (caught.code, caught.param, caught.type) == ("some_code", "n", "some_type")
    assert caught.body == error
    assert mock.journal.total == 2


async def test_each_error_of_the_gateways_own_is_its_exception(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=2_000)
    wrong = await ask_for_error(gateway, openai.BadRequestError, messages=[])
    assert (wrong.code, wrong.param, wrong.type) == ("invalid_request", "messages", "invalid_request_error")
    late = await ask_for_error(gateway, openai.BadRequestError, extra_headers={"x-request-timeout": "never"})
    assert (late.code, late.param) == ("invalid_request", "x-request-timeout")
    large = await ask_for_error(gateway, openai.APIStatusError, user="u" * 3_000)
    assert (large.code, large.status_code) == ("request_too_large", 413)
    assert mock.journal.total == 0


async def test_a_wrong_key_is_an_authentication_error(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=["the-key"])
    wrong = await ask_for_error(gateway, openai.AuthenticationError)
    assert (wrong.code, wrong.type) == ("invalid_api_key", "authentication_error")
    async with AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="the-key", max_retries=0) as sdk:
        assert (await sdk.chat.completions.create(model="m", messages=MESSAGES)).choices
        assert [model.id async for model in sdk.models.list()] == ["demo-model"]
    assert mock.journal.total == 1


@pytest.mark.parametrize(
    ("fault", "settings", "code", "status", "param"),
    [
        ({"kind": "reset"}, {}, "backend_connection_error", 502, None),
        ({"kind": "html"}, {}, "backend_invalid_response", 502, None),
        ({"kind": "status", "with": {"status": 401}}, {}, "backend_auth_error", 502, None),
        ({"kind": "status", "with": {"status": 403}}, {}, "backend_auth_error", 502, None),
        ({"kind": "status", "with": {"status": 500, "body": "text"}}, {}, "backend_invalid_response", 500, None),
        ({"kind": "hang_before_headers"}, {"gateway_request_deadline": 0.3}, "deadline_exceeded", 504, None),
    ],
)
async def test_a_failing_backend_is_a_server_error_with_its_code(
    mock: MockModel,
    start_gateway: StartGateway,
    *,
    fault: dict[str, Any],
    settings: dict[str, float],
    code: str,
    status: int,
    param: str | None,
) -> None:
    mock.set_faults([fault])
    gateway = await start_gateway(mock, gateway_max_attempts=1, **settings)
    caught = await ask_for_error(gateway, openai.InternalServerError)
    assert (caught.code, caught.status_code, caught.param, caught.type) == (code, status, param, "server_error")


async def test_a_silent_backend_is_a_timeout_that_names_its_timer(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "hang_before_headers"}])
    gateway = await start_gateway(mock, gateway_answer_timeout=0.3, gateway_first_token_timeout=0.3)
    for stream, timer in ((False, "answer"), (True, "first_token")):
        async with gateway.sdk as sdk:
            request: dict[str, Any] = {"model": "m", "messages": MESSAGES, "stream": stream}
            with pytest.raises(openai.InternalServerError) as caught:
                await sdk.chat.completions.create(**request)
        assert (caught.value.code, caught.value.status_code, caught.value.param) == ("backend_timeout", 504, timer)


async def test_a_refused_backend_is_an_internal_server_error(start_gateway: StartGateway) -> None:
    gateway = await start_gateway(REFUSED, gateway_max_attempts=1)
    caught = await ask_for_error(gateway, openai.InternalServerError)
    assert (caught.code, caught.status_code) == ("backend_connection_error", 502)


async def test_an_open_breaker_and_a_full_gateway_are_503(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(REFUSED, gateway_max_attempts=1, gateway_breaker_failures=1)
    async with gateway.sdk as sdk:
        with pytest.raises(openai.InternalServerError):
            await sdk.chat.completions.create(model="m", messages=MESSAGES)
    unavailable = await ask_for_error(gateway, openai.InternalServerError)
    assert (unavailable.code, unavailable.status_code) == ("backend_unavailable", 503)
    assert int(unavailable.response.headers["retry-after"]) >= 1

    mock.set_faults([{"kind": "hang_before_headers"}])
    full = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=0)
    hanging = asyncio.create_task(full.chat())
    await mock.called(1)
    overloaded = await ask_for_error(full, openai.InternalServerError)
    assert (overloaded.code, overloaded.status_code) == ("gateway_overloaded", 503)
    assert mock.journal.total == 1
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)


async def take(stream: Any, events: list[Any]) -> None:  # noqa: ANN401
    """All that comes, also when the stream fails."""
    async for event in stream:
        events.append(event)  # noqa: PERF401


async def test_a_cut_after_the_first_words_is_an_error_in_the_stream(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    mock.set_faults([{"kind": "cut", "with": {"after_events": 5, "how": "reset"}}])
    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk:
        for stream in (
            await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True),
            await sdk.responses.create(model="m", input="x", stream=True),
        ):
            events: list[Any] = []
            with pytest.raises(openai.APIError) as caught:
                await take(stream, events)
            assert caught.value.code == "backend_invalid_response"
            assert len(events) == 5
    assert mock.journal.total == 2
    assert {call.ended for call in mock.journal.calls} == {"fault"}


async def test_a_stream_closed_by_the_sdk_ends_the_backends_call(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "stall", "with": {"after_events": 4}}])
    gateway = await start_gateway(mock)
    async with gateway.sdk as sdk:
        stream = await sdk.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await until(lambda: gateway.parts.admission.in_flight == 0)
    assert gateway.parts.byte_budget.held == 0
