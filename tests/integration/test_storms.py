"""No storms on top of ours: the real OpenAI SDK, with its two retries, never multiplies the attempts at a backend."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from mock_model.serve import MockModel
from testkit.completions import CHAT
from testkit.polling import PATIENCE, until
from tests.integration.gateways import Gateway, StartGateway
from tests.integration.stopwatch import Stopwatch
from tests.integration.wire import dial, post

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]
RETRIES = 2
QUICK = {"gateway_backoff_initial": 0.01, "gateway_backoff_max": 0.01}
HANG = {"kind": "hang_before_headers"}


class Sdk(openai.AsyncOpenAI):
    """The real SDK as everybody has it; what it would sleep before a retry is noted, and not slept.

    Its read timeout is told the gateway, and passes only after `PATIENCE` more: a busy machine may stand still just
    between the two.

    Attributes:
        answers: every answer it got, those it retried included.
        waits: seconds before each of its retries.
    """

    def __init__(self, gateway: Gateway, **options: Any) -> None:  # noqa: ANN401
        self.answers: list[Any] = []
        self.waits: list[float] = []

        async def note(answer: Any) -> None:  # noqa: ANN401
            self.answers.append(answer)

        async def be_patient(request: Any) -> None:  # noqa: ANN401
            request.extensions["timeout"]["read"] += PATIENCE

        super().__init__(
            base_url=f"{gateway.url}/v1",
            api_key="sk-test",
            max_retries=RETRIES,
            http_client=openai.DefaultAsyncHttpxClient(event_hooks={"request": [be_patient], "response": [note]}),
            **options,
        )

    def _calculate_retry_timeout(self, *args: Any, **kwargs: Any) -> float:  # noqa: ANN401
        self.waits.append(super()._calculate_retry_timeout(*args, **kwargs))
        return 0.0

    async def ask(self, *, stream: bool = False) -> openai.APIError:
        """Ask for a chat that fails; how it failed in the end."""
        with pytest.raises(openai.APIError) as caught:
            await self._chat(stream=stream)
        return caught.value

    async def _chat(self, *, stream: bool) -> None:
        if not stream:
            await self.chat.completions.create(model="demo-model", messages=MESSAGES)
            return
        async with await self.chat.completions.create(model="demo-model", messages=MESSAGES, stream=True) as events:
            async for _ in events:
                pass

    @property
    def attempts(self) -> list[str]:
        """What each answer says of the gateway's attempts."""
        return [answer.headers["x-gateway-attempts"] for answer in self.answers]


def told_to_stay_away(sdk: Sdk) -> None:
    """One answer, and it says not to come again."""
    assert sdk.waits == []
    assert len(sdk.answers) == 1
    headers = sdk.answers[0].headers
    assert headers["x-should-retry"] == "false"
    assert "retry-after" not in headers
    assert "retry-after-ms" not in headers


def told_when_to_come(sdk: Sdk, *, status: int = 503) -> None:
    """Every answer says when to come again, and nothing else about it; the SDK obeys."""
    assert [answer.status_code for answer in sdk.answers] == [status] * (1 + RETRIES)
    for answer in sdk.answers:
        assert answer.headers["retry-after"].isdecimal()
        assert int(answer.headers["retry-after"]) >= 1
        assert "x-should-retry" not in answer.headers
    assert sdk.waits == [float(answer.headers["retry-after"]) for answer in sdk.answers[:RETRIES]]


def status(number: int, **headers: str) -> dict[str, Any]:
    """A fault."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"kind": "status", "with": {"status": number, "headers": named}}


# After attempts: nobody comes again


@pytest.mark.parametrize(
    ("fault", "told", "attempts"),
    [
        (status(408), 408, 3),
        (status(409), 409, 1),
        (status(429), 429, 2),
        (status(429, retry_after="soon"), 429, 2),
        (status(500), 500, 3),
        (status(500, x_should_retry="true"), 500, 3),
        (status(501), 501, 1),
        (status(502), 502, 3),
        (status(503), 503, 3),
        (status(504), 504, 3),
        ({"kind": "status", "with": {"status": 500, "body": "no JSON"}}, 500, 3),
        (status(401), 502, 1),
        ({"kind": "not_json"}, 502, 3),
        ({"kind": "html"}, 502, 3),
        ({"kind": "short_body"}, 502, 3),
        ({"kind": "reset"}, 502, 3),
        ({"kind": "stall"}, 504, 1),
        (HANG, 504, 1),
    ],
    ids=lambda value: None if isinstance(value, int) else f"{value['kind']} {value.get('with', '')}",
)
async def test_a_failure_after_attempts_is_final(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], told: int, attempts: int
) -> None:
    limits = {"gateway_answer_timeout": 0.5, "gateway_idle_timeout": 0.3, "gateway_retry_after_max": 2.5}
    gateway = await start_gateway(mock, **limits, **QUICK)
    mock.set_faults([fault])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert isinstance(failure, openai.APIStatusError)
    assert failure.status_code == told
    assert mock.journal.total == attempts
    assert sdk.attempts == [str(attempts)]
    assert sdk.waits == []
    assert sdk.answers[0].headers["x-should-retry"] == "false"
    assert failure.response.headers.get("retry-after") in {None, "soon"}


@pytest.mark.parametrize(
    ("fault", "told", "attempts"),
    [
        (status(500), 500, 3),
        ({"kind": "cut", "with": {"after_events": 1}}, 502, 3),
        ({"kind": "hang_after_headers"}, 504, 1),
        (HANG, 504, 1),
    ],
    ids=lambda value: None if isinstance(value, int) else value["kind"],
)
async def test_a_stream_that_fails_before_commit_is_final(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], told: int, attempts: int
) -> None:
    gateway = await start_gateway(mock, gateway_first_token_timeout=0.5, **QUICK)
    mock.set_faults([fault])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask(stream=True)
    assert isinstance(failure, openai.APIStatusError)
    assert failure.status_code == told
    told_to_stay_away(sdk)
    assert mock.journal.total == attempts


async def test_a_stream_cut_after_commit_is_not_asked_for_again(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "cut", "with": {"after_events": 4}}])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask(stream=True)
    assert failure.code == "backend_invalid_response"
    assert len(sdk.answers) == 1
    assert mock.journal.total == 1


async def test_a_request_that_is_wrong_goes_out_once(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([status(400)])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert isinstance(failure, openai.BadRequestError)
    assert "x-should-retry" not in failure.response.headers
    assert len(sdk.answers) == 1
    assert mock.journal.total == 1


async def test_refused_connections_are_not_multiplied(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.die()
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "backend_connection_error"
    told_to_stay_away(sdk)
    assert sdk.attempts == ["3"]
    assert 'gateway_attempts_total{backend="backend-1",outcome="connection_error"} 3.0' in await gateway.metrics()


async def test_the_deadline_is_final_once_the_backend_was_asked(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_request_deadline=0.3)
    mock.set_faults([HANG])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "deadline_exceeded"
    told_to_stay_away(sdk)
    assert mock.journal.total == 1


async def test_the_gateway_answers_before_the_sdks_own_timeout(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([HANG])
    async with Sdk(gateway, timeout=2.5) as sdk, Stopwatch() as watch:
        failure = await sdk.ask()
    assert watch.within(2.5), watch
    assert failure.code == "deadline_exceeded"
    told_to_stay_away(sdk)
    assert mock.journal.total == 1


async def test_an_answer_too_large_for_our_memory_is_not_fetched_again(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=800)
    mock.set_faults([{"kind": "status", "with": {"status": 200, "body": {"choices": [], "padding": "x" * 1000}}}])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "gateway_overloaded"
    told_to_stay_away(sdk)
    assert mock.journal.total == 1


async def test_twenty_callers_in_an_outage_cost_no_more_than_the_budget(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(
        mock, gateway_breaker_failures=1000, gateway_retry_budget=0.2, gateway_retry_floor=5, **QUICK
    )
    mock.set_faults([status(500)])
    async with Sdk(gateway) as sdk:
        failures = await asyncio.gather(*(sdk.ask() for _ in range(20)))
    assert {failure.status_code for failure in failures if isinstance(failure, openai.APIStatusError)} == {500}
    assert len(sdk.answers) == 20
    assert mock.journal.total == 25


# Retry-After


@pytest.mark.parametrize("number", [429, 503])
@pytest.mark.parametrize(
    "headers", [{"retry_after": "20"}, {"retry_after_ms": "20000"}], ids=["seconds", "milliseconds"]
)
async def test_a_retry_after_that_was_not_waited_for_is_passed_on_alone_and_kept_for_everybody(
    mock: MockModel, start_gateway: StartGateway, number: int, headers: dict[str, str]
) -> None:
    gateway = await start_gateway(mock, gateway_retry_after_max=10)
    mock.set_faults([status(number, **headers)])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    first, *others = sdk.answers
    assert {name.replace("-", "_"): v for name, v in first.headers.items() if name.startswith("retry-")} == headers
    assert sdk.waits[0] == 20, "the SDK was not told when to come again"
    assert not any("x-should-retry" in answer.headers for answer in sdk.answers)
    assert isinstance(failure, openai.RateLimitError), "the SDK's sleeps take no time here: it comes too early"
    assert failure.code == "backend_rate_limited"
    assert {int(answer.headers["retry-after"]) for answer in others} <= set(range(10, 21))
    assert sdk.attempts == ["1"] + ["0"] * RETRIES
    assert mock.journal.total == 1, "no more than once per cooldown"


async def test_a_date_to_come_again_is_passed_on_alone(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)
    mock.set_faults([status(429, retry_after=date)])
    async with Sdk(gateway) as sdk:
        await sdk.ask()
    assert [answer.headers["retry-after"] for answer in sdk.answers[:1]] == [date]
    assert {int(answer.headers["retry-after"]) for answer in sdk.answers[1:]} <= set(range(50, 61))
    assert not any("x-should-retry" in answer.headers for answer in sdk.answers)
    assert all(20 < wait <= 60 for wait in sdk.waits)
    assert mock.journal.total == 1


async def test_a_retry_after_beyond_the_deadline_is_passed_on_alone(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_request_deadline=4)
    mock.set_faults([status(429, retry_after="9")])
    async with Sdk(gateway) as sdk:
        await sdk.ask()
    told_when_to_come(sdk, status=429)
    assert mock.journal.total == 1


async def test_a_retry_after_that_was_waited_for_is_not_waited_for_again(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([status(429, retry_after_ms="50") | {"times": 1}, status(500)])
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert isinstance(failure, openai.InternalServerError)
    told_to_stay_away(sdk)
    assert mock.journal.total == 3


# Without an attempt: everybody is told when to come again, and the backend sees nothing of it


async def test_an_open_breaker_keeps_the_sdk_off_the_backend(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock,
        gateway_breaker_failures=1,
        gateway_breaker_open_seconds=20,
        gateway_breaker_open_max=20,
        gateway_max_attempts=1,
    )
    mock.set_faults([status(500)])
    await gateway.chat()
    assert mock.journal.total == 1
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "backend_unavailable"
    told_when_to_come(sdk)
    assert all(1 <= wait <= 24 for wait in sdk.waits), "20 s, +- 20 %"
    assert sdk.attempts == ["0"] * (1 + RETRIES)
    assert not any("x-gateway-backend" in answer.headers for answer in sdk.answers)
    assert mock.journal.total == 1


async def test_the_sdk_that_obeys_finds_the_breaker_half_open(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock, gateway_breaker_failures=1, gateway_breaker_open_seconds=10, gateway_max_attempts=1
    )
    mock.set_faults([status(500) | {"times": 1}])
    (replica,) = gateway.parts.pool.replicas
    clock = replica.breaker._clock
    async with Sdk(gateway) as sdk:
        replica.breaker._clock = lambda: clock() + sum(sdk.waits)
        await gateway.chat()
        answer = await sdk.chat.completions.with_raw_response.create(model="demo-model", messages=MESSAGES)
    assert answer.retries_taken == len(sdk.waits) == 1
    assert mock.journal.total == 2
    assert (await gateway.health())["downstream"]["backends"][0]["breaker"] == "closed"


@asynccontextmanager
async def occupied(gateway: Gateway, mock: MockModel) -> AsyncIterator[None]:
    """The only slot is taken by a caller whose backend hangs."""
    mock.set_faults([HANG])
    async with dial(gateway.url) as caller:
        await caller.send(post())
        await mock.called(1)
        yield
    await until(lambda: not gateway.parts.admission.in_flight)


async def test_a_full_queue_never_reaches_the_backend(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_max_queue=0)
    async with occupied(gateway, mock), Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "gateway_overloaded"
    told_when_to_come(sdk)
    assert sdk.attempts == ["0"] * (1 + RETRIES)
    assert mock.journal.total == 1


async def test_a_queue_that_takes_too_long_never_reaches_the_backend(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_in_flight=1, gateway_queue_timeout=0.1)
    async with occupied(gateway, mock), Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "gateway_overloaded"
    told_when_to_come(sdk)
    assert mock.journal.total == 1


async def test_a_prompt_too_large_for_our_memory_never_reaches_the_backend(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=40)
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "gateway_overloaded"
    told_when_to_come(sdk)
    assert mock.journal.total == 0


async def test_a_gateway_that_drains_never_reaches_the_backend(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    gateway.parts.admission.drain()
    async with Sdk(gateway) as sdk:
        failure = await sdk.ask()
    assert failure.code == "gateway_draining"
    told_when_to_come(sdk)
    assert sdk.waits == [1.0] * RETRIES
    assert mock.journal.total == 0


async def test_a_request_cut_off_by_the_stop_is_told_to_come_again_although_it_was_tried(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([HANG])
    async with Sdk(gateway) as sdk:
        asking = asyncio.create_task(sdk.ask())
        await mock.called(1)
        gateway.parts.admission.drain()
        gateway.parts.in_flight.cut_off()
        failure = await asking
    assert failure.code == "gateway_draining"
    told_when_to_come(sdk)
    assert sdk.attempts == ["1", "0", "0"]
    assert mock.journal.total == 1


async def test_a_plain_post_gets_the_same_rule(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([status(500)])
    async with gateway.client.post("/v1/chat/completions", json=CHAT) as answer:
        assert answer.headers["x-should-retry"] == "false"
    assert mock.journal.total == 3
