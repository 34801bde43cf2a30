"""The real Anthropic SDK, pointed at the gateway, gets what it gets from the model itself."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anthropic
import openai
import pytest
from anthropic import Anthropic, AsyncAnthropic

from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH, MESSAGES_PATH
from testkit.http import Answer
from testkit.polling import until
from tests.integration.gateways import KEY, Gateway, StartGateway
from tests.integration.recorder import Recorder

PROMPT: Any = {"model": "m", "max_tokens": 100, "messages": [{"role": "user", "content": "Say something."}]}
TOOL: Any = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TEXT_529 = {"kind": "status", "with": {"status": 529, "body": "text"}}
THINKING: Any = {"type": "enabled", "budget_tokens": 1024}

Ask = Callable[[AsyncAnthropic], Awaitable[Any]]


def sdk_of(url: str, *, key: str = "x", retries: int = 0) -> AsyncAnthropic:
    return AsyncAnthropic(base_url=url, api_key=key, max_retries=retries)


class Both:
    """The same question to the gateway and to the model itself."""

    def __init__(self, mock: MockModel, through: AsyncAnthropic, direct: AsyncAnthropic) -> None:
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
    async with sdk_of(gateway.url) as through, sdk_of(mock.url) as direct:
        yield Both(mock, through, direct)


def text_of(events: list[Any]) -> str:
    deltas = [event.delta for event in events if event.type == "content_block_delta"]
    return "".join(delta.text for delta in deltas if delta.type == "text_delta")


# What it gets


async def test_a_message(both: Both) -> None:
    answer = await both.whole(lambda sdk: sdk.messages.create(**PROMPT))
    assert answer.model == "m"
    assert answer.content[0].text
    assert answer.stop_reason == "end_turn"
    assert answer.usage.output_tokens > 0


async def test_a_streamed_message(both: Both) -> None:
    events = await both.streamed(lambda sdk: sdk.messages.create(**PROMPT, stream=True))
    assert (events[0].type, events[-1].type) == ("message_start", "message_stop")
    assert text_of(events)


async def test_counted_tokens(both: Both) -> None:
    prompt = {name: value for name, value in PROMPT.items() if name != "max_tokens"}
    counted = await both.whole(lambda sdk: sdk.messages.count_tokens(**prompt, system="Be brief.", tools=[TOOL]))
    assert counted.input_tokens > 0


async def test_thoughts_and_tools(both: Both) -> None:
    answer = await both.whole(lambda sdk: sdk.messages.create(**PROMPT, tools=[TOOL], thinking=THINKING))
    assert [block.type for block in answer.content] == ["thinking", "tool_use"]
    assert answer.content[1].input == {"city": "text"}
    assert answer.stop_reason == "tool_use"


async def test_streamed_thoughts_and_tools(both: Both) -> None:
    events = await both.streamed(
        lambda sdk: sdk.messages.create(**PROMPT, tools=[TOOL], thinking=THINKING, stream=True)
    )
    kinds = [event.delta.type for event in events if event.type == "content_block_delta"]
    assert {"thinking_delta", "signature_delta", "input_json_delta"} == set(kinds)


async def test_the_streaming_helper_puts_the_message_together(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    finals = []
    for url in (gateway.url, mock.url):
        async with sdk_of(url) as sdk, sdk.messages.stream(**PROMPT, tools=[TOOL], thinking=THINKING) as stream:
            finals.append(await stream.get_final_message())
    assert finals[0] == finals[1]
    assert [block.type for block in finals[0].content] == ["thinking", "tool_use"]
    assert finals[0].stop_reason == "tool_use"
    assert finals[0].usage.output_tokens > 0
    assert [call.ended for call in mock.journal.calls] == ["complete", "complete"]


async def test_the_blocking_client(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)

    def ask() -> tuple[str, str]:
        with Anthropic(base_url=gateway.url, api_key="x", max_retries=0) as sdk:
            block: Any = sdk.messages.create(**PROMPT).content[0]
            return block.text, text_of(list(sdk.messages.create(**PROMPT, stream=True)))

    whole, streamed = await asyncio.to_thread(ask)
    assert whole
    assert streamed
    assert mock.journal.total == 2


async def test_query_version_and_betas_go_on_and_the_key_does_not(
    recorder: Recorder, start_gateway: StartGateway
) -> None:
    recorder.pieces = [b'{"type": "message", "content": []}']
    gateway = await start_gateway(recorder.url, gateway_api_keys=[KEY])
    async with sdk_of(gateway.url, key=KEY) as sdk:
        await sdk.beta.messages.create(**PROMPT, betas=["context-1m"], extra_query={"beta": "true"})
        await sdk.with_options(api_key=None, auth_token=KEY).messages.create(**PROMPT)
    beta, plain = recorder.seen
    assert (beta.path, plain.path) == ("/v1/messages?beta=true", "/v1/messages")
    assert beta.header("anthropic-version")
    assert beta.header("anthropic-beta") == "context-1m"
    for seen in (beta, plain):
        assert not {"x-api-key", "authorization"} & {name for name, _ in seen.headers}
        assert KEY not in str(seen.headers)


# Errors


async def ask_for_error(gateway: Gateway, kind: type[anthropic.APIStatusError], **changes: Any) -> Any:  # noqa: ANN401
    """Ask unstreamed and streamed; both fail alike, before the SDK has anything of an answer."""
    errors = []
    for stream in (False, True):
        async with sdk_of(gateway.url) as sdk:
            with pytest.raises(kind) as info:
                await sdk.messages.create(**(PROMPT | {"stream": stream} | changes))
        assert type(info.value) is kind
        assert info.value.response.headers["x-request-id"]
        errors.append(info.value)
    whole, streamed = errors
    assert (whole.status_code, whole.body) == (streamed.status_code, streamed.body)
    return whole


def inside(error: Any) -> dict[str, str]:  # noqa: ANN401
    """The error of the gateway's own document."""
    assert error.body.keys() == {"type", "error"}
    assert error.body["type"] == "error"
    document: dict[str, str] = error.body["error"]
    return document


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, anthropic.BadRequestError),
        (402, anthropic.APIStatusError),
        (404, anthropic.NotFoundError),
        (409, anthropic.ConflictError),
        (413, anthropic.APIStatusError),
        (422, anthropic.UnprocessableEntityError),
        (429, anthropic.RateLimitError),
        (500, anthropic.InternalServerError),
        (503, anthropic.InternalServerError),
        (529, anthropic.InternalServerError),
    ],
)
async def test_a_backends_error_is_the_exception_it_would_be_without_the_gateway(
    mock: MockModel, start_gateway: StartGateway, status: int, kind: type[anthropic.APIStatusError]
) -> None:
    document = {"type": "error", "error": {"type": "some_error", "message": "as the model says"}, "request_id": "r"}
    mock.set_faults([{"kind": "status", "with": {"status": status, "body": document}}])
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    async with sdk_of(mock.url) as direct:
        with pytest.raises(kind) as info:
            await direct.messages.create(**PROMPT)
    mock.journal.clear()
    caught = await ask_for_error(gateway, type(info.value))
    assert (caught.status_code, caught.body) == (status, document)
    assert mock.journal.total == 2


async def test_each_error_of_the_gateways_own_is_its_exception(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=2_000)
    wrong = inside(await ask_for_error(gateway, anthropic.BadRequestError, messages=[]))
    assert (wrong["code"], wrong["param"], wrong["type"]) == ("invalid_request", "messages", "invalid_request_error")
    late = inside(await ask_for_error(gateway, anthropic.BadRequestError, extra_headers={"x-request-timeout": "never"}))
    assert (late["code"], late["param"]) == ("invalid_request", "x-request-timeout")
    async with sdk_of(gateway.url) as sdk:
        with pytest.raises(anthropic.APIStatusError) as large:
            await sdk.messages.create(**(PROMPT | {"system": "s" * 3_000}))
    assert large.value.status_code == 413
    assert inside(large.value)["type"] == "request_too_large"
    assert mock.journal.total == 0


async def test_a_wrong_key_is_an_authentication_error(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_api_keys=[KEY])
    wrong = inside(await ask_for_error(gateway, anthropic.AuthenticationError))
    assert (wrong["code"], wrong["type"]) == ("invalid_api_key", "authentication_error")
    async with sdk_of(gateway.url, key=KEY) as sdk:
        assert (await sdk.messages.create(**PROMPT)).content
    assert mock.journal.total == 1


async def test_a_base_url_with_a_v1_too_many_is_told_the_right_path(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    async with sdk_of(f"{gateway.url}/v1") as sdk:
        with pytest.raises(anthropic.NotFoundError) as caught:
            await sdk.messages.create(**PROMPT)
    told = inside(caught.value)
    assert (told["type"], told["code"]) == ("not_found_error", "not_found")
    assert "/v1/messages" in told["message"]


@pytest.mark.parametrize("base", ["/v1", ""])
@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/messages", 405, "method_not_allowed"),
        ("OPTIONS", "/messages", 405, "method_not_allowed"),
        ("POST", "/messages/", 404, "not_found"),
        ("POST", "/messages/batches", 404, "not_found"),
        ("GET", "/messages/batches/one/results", 404, "not_found"),
        ("POST", "/messages", 415, "unsupported_media_type"),
    ],
)
async def test_every_error_below_messages_is_anthropics(
    mock: MockModel, start_gateway: StartGateway, base: str, method: str, path: str, *, status: int, code: str
) -> None:
    gateway = await start_gateway(mock)
    async with gateway.client.request(method, base + path, data=b"x") as response:
        answer = await Answer.of(response)
    assert (answer.status, answer.error["code"]) == (status, code)
    assert answer.json["type"] == "error"
    assert answer.error["type"] == ("not_found_error" if status == 404 else "invalid_request_error")

    closed = await start_gateway(mock, gateway_api_keys=[KEY])
    async with closed.client.request(method, base + path, data=b"x") as response:
        answer = await Answer.of(response)
    if base or path == "/messages":
        assert (answer.status, answer.error["type"]) == (401, "authentication_error")
        assert answer.json["type"] == "error"
    assert mock.journal.total == 0


@pytest.mark.parametrize(
    ("fault", "settings", "code", "status", "kind"),
    [
        ({"kind": "reset"}, {}, "backend_connection_error", 502, "api_error"),
        ({"kind": "html"}, {}, "backend_invalid_response", 502, "api_error"),
        ({"kind": "status", "with": {"status": 401}}, {}, "backend_auth_error", 502, "api_error"),
        (TEXT_529, {}, "backend_invalid_response", 529, "overloaded_error"),
        ({"kind": "hang_before_headers"}, {"gateway_request_deadline": 0.3}, "deadline_exceeded", 504, "timeout_error"),
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
    kind: str,
) -> None:
    mock.set_faults([fault])
    gateway = await start_gateway(mock, gateway_max_attempts=1, **settings)
    async with sdk_of(gateway.url) as sdk:
        with pytest.raises(anthropic.InternalServerError) as caught:
            await sdk.messages.create(**PROMPT)
    assert caught.value.status_code == status
    assert (inside(caught.value)["code"], inside(caught.value)["type"]) == (code, kind)


async def test_the_sdks_own_retries_are_not_multiplied(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=2, gateway_backoff_initial=0, gateway_retry_after_max=0)
    for status in (408, 409, 429, 500, 503, 529):
        mock.journal.clear()
        mock.set_faults([{"kind": "status", "with": {"status": status}}])
        async with sdk_of(gateway.url, retries=2) as sdk:
            with pytest.raises(anthropic.APIStatusError) as caught:
                await sdk.messages.create(**(PROMPT | {"system": f"a body of its own for {status}"}))
        assert caught.value.status_code == status
        assert mock.journal.total == (1 if status in {409, 429} else 2)


async def test_the_sdk_comes_again_where_no_attempt_was_made(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=0)
    mock.set_faults([{"kind": "hang_before_headers", "times": 1}])
    hanging = asyncio.create_task(gateway.chat())
    await mock.called(1)
    async with sdk_of(gateway.url, retries=2) as sdk:
        asked = asyncio.create_task(sdk.messages.create(**PROMPT))
        await until(lambda: 'status="503"' in gateway.log.getvalue() or '"status":503' in gateway.log.getvalue())
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        assert (await asked).content
    assert mock.journal.total == 2


async def take(stream: Any, events: list[Any]) -> None:  # noqa: ANN401
    """All that comes, also when the stream fails."""
    async for event in stream:
        events.append(event)  # noqa: PERF401


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_both_sdks_side_by_side_raise_for_a_cut_stream(
    slow_mock: MockModel, start_gateway: StartGateway, how: str
) -> None:
    gateway = await start_gateway(slow_mock)
    slow_mock.set_faults([
        {"kind": "cut", "with": {"after_events": 6, "how": how}, "match": {"path": MESSAGES_PATH}},
        {"kind": "cut", "with": {"after_events": 4, "how": how}, "match": {"path": CHAT_PATH}},
    ])  # fmt: skip

    async def of_anthropic() -> None:
        events: list[Any] = []
        async with sdk_of(gateway.url, retries=2) as sdk:
            with pytest.raises(anthropic.APIStatusError) as caught:
                await take(await sdk.messages.create(**PROMPT, stream=True), events)
        assert inside(caught.value)["code"] == "backend_invalid_response"
        assert text_of(events)

    async def of_openai() -> None:
        events: list[Any] = []
        async with gateway.sdk.with_options(max_retries=2) as sdk:
            stream = await sdk.chat.completions.create(model="m", messages=PROMPT["messages"], stream=True)
            with pytest.raises(openai.APIError) as caught:
                await take(stream, events)
        assert caught.value.code == "backend_invalid_response"
        assert any(event.choices[0].delta.content for event in events)

    await asyncio.gather(*(ask() for ask in (of_anthropic, of_openai) * 3))
    assert slow_mock.journal.total == 6
    await until(lambda: gateway.parts.admission.in_flight == 0)
    assert gateway.parts.byte_budget.held == 0


async def test_both_sdks_side_by_side_see_nothing_of_a_fault_before_the_first_words(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    faults: list[dict[str, Any]] = [
        {"kind": "reset"},
        {"kind": "status", "with": {"status": 500}},
        {"kind": "cut", "with": {"after_events": 1}},
        {"kind": "error_event", "with": {"after_events": 1}},
        {"kind": "malformed_event", "with": {"after_events": 1}},
        {"kind": "html"},
    ]

    async def said_by(messages: AsyncAnthropic, chat: openai.AsyncOpenAI) -> tuple[list[Any], list[Any]]:
        said: list[Any] = []
        written: list[Any] = []

        async def of_anthropic() -> None:
            await take(await messages.messages.create(**PROMPT, stream=True), said)

        async def of_openai() -> None:
            stream = await chat.chat.completions.create(model="m", messages=PROMPT["messages"], stream=True)
            await take(stream, written)

        await asyncio.gather(of_anthropic(), of_openai())
        return said, written

    async with sdk_of(mock.url) as messages, openai.AsyncOpenAI(base_url=f"{mock.url}/v1", api_key="x") as chat:
        expected = await said_by(messages, chat)
    patient = {"gateway_breaker_failures": 1000, "gateway_retry_floor": 1000}
    gateway = await start_gateway(mock, gateway_backoff_initial=0, **patient)
    async with sdk_of(gateway.url) as messages, gateway.sdk as chat:
        for fault in faults:
            mock.set_faults([{**fault, "times": 1, "match": {"path": path}} for path in (MESSAGES_PATH, CHAT_PATH)])
            mock.journal.clear()
            assert await said_by(messages, chat) == expected
            assert {path: _faults_at(mock, path) for path in (MESSAGES_PATH, CHAT_PATH)} == {
                MESSAGES_PATH: [fault["kind"], None],
                CHAT_PATH: [fault["kind"], None],
            }


def _faults_at(mock: MockModel, path: str) -> list[str | None]:
    return [call.fault for call in mock.journal.calls if call.path == path]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("number", [503, 529])
async def test_a_short_outage_costs_the_sdk_only_time(
    mock: MockModel, start_gateway: StartGateway, number: int, *, stream: bool
) -> None:
    gateway = await start_gateway(mock, gateway_outage_wait=5, gateway_backoff_initial=0.01)
    mock.set_faults([{"kind": "status", "with": {"status": number}, "times": 4}])
    async with sdk_of(gateway.url) as sdk:
        raw = await sdk.messages.with_raw_response.create(**PROMPT, stream=stream)
        assert raw.headers["x-gateway-attempts"] == "5", "three attempts, and two trials beyond them"
        answer: Any = await raw.parse()
        if stream:
            events: list[Any] = []
            await take(answer, events)
            assert text_of(events)
        else:
            assert answer.content[0].text
    assert "bridging-" in raw.headers["server-timing"]
    assert mock.journal.total == 5


async def test_a_stream_closed_by_the_sdk_ends_the_backends_call(mock: MockModel, start_gateway: StartGateway) -> None:
    mock.set_faults([{"kind": "stall", "with": {"after_events": 5}}])
    gateway = await start_gateway(mock)
    async with sdk_of(gateway.url) as sdk:
        stream = await sdk.messages.create(**PROMPT, stream=True)
        async for _ in stream:
            break
        await stream.close()
        await mock.settled()
    assert [call.ended for call in mock.journal.calls] == ["caller_left"]
    await until(lambda: gateway.parts.admission.in_flight == 0)
    assert gateway.parts.byte_budget.held == 0
