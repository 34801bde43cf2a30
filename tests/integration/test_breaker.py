"""The breaker of a replica: when it opens, what it spares the backend, and what closes it again."""

import asyncio
import math
from time import monotonic
from typing import Any

import pytest

from mock_model.serve import MockModel
from testkit.http import Answer
from testkit.polling import until
from tests.integration.backends_raw import STREAM_HEAD, RawCall, StartRaw, chunk
from tests.integration.gateways import Gateway, StartGateway, StartMock, prefer
from tests.integration.stopwatch import Stopwatch

FAIL = {"kind": "status", "with": {"status": 500}}
LONG = 600
ALONE: dict[str, Any] = {"gateway_max_attempts": 1, "gateway_breaker_failures": 3}
STAYS_OPEN: dict[str, Any] = {"gateway_breaker_open_seconds": LONG, "gateway_breaker_open_max": LONG}
OPENS_SOON: dict[str, Any] = {"gateway_breaker_open_seconds": 0.3, "gateway_breaker_open_max": 0.3}


async def backend(gateway: Gateway, number: int = 0) -> dict[str, Any]:
    """What `/health` says of a replica."""
    document: dict[str, Any] = (await gateway.health())["downstream"]["backends"][number]
    return document


def breaker_of(gateway: Gateway) -> str:
    return gateway.parts.pool.replicas[0].breaker.state.value


async def open_breaker(gateway: Gateway, mock: MockModel, fault: dict[str, Any] = FAIL, **changes: Any) -> Answer:  # noqa: ANN401
    """Fail until it opens; the last answer."""
    mock.set_faults([fault])
    for number in range(1, ALONE["gateway_breaker_failures"] + 1):
        assert breaker_of(gateway) == "closed"
        answer = await gateway.chat(user=f"opener {number}", **changes)
        assert mock.journal.total == number
    assert breaker_of(gateway) in {"open", "half_open"}, "it opened; where it opens soon, that may be over"
    return answer


def refused(answer: Answer) -> bool:
    """Whether the answer is the breaker's, without an attempt."""
    return answer.status == 503 and answer.error["code"] == "backend_unavailable" and answer.attempts == 0


COUNTED: dict[str, tuple[dict[str, Any], bool]] = {
    "500": ({"kind": "status", "with": {"status": 500}}, False),
    "502": ({"kind": "status", "with": {"status": 502}}, False),
    "503": ({"kind": "status", "with": {"status": 503}}, False),
    "504": ({"kind": "status", "with": {"status": 504}}, True),
    "reset": ({"kind": "reset"}, False),
    "silence": ({"kind": "hang_before_headers"}, False),
    "no first token": ({"kind": "hang_after_headers"}, True),
    "stall": ({"kind": "stall"}, False),
    "stall after commit": ({"kind": "stall", "with": {"after_events": 4}}, True),
    "cut": ({"kind": "cut"}, False),
    "cut stream": ({"kind": "cut"}, True),
    "cut after commit": ({"kind": "cut", "with": {"after_events": 4}}, True),
    "reset after commit": ({"kind": "cut", "with": {"after_events": 4, "how": "reset"}}, True),
    "no finish": ({"kind": "no_finish"}, True),
    "garbage after commit": ({"kind": "malformed_event", "with": {"after_events": 4}}, True),
    "html": ({"kind": "html"}, False),
    "no json": ({"kind": "not_json"}, False),
}
TIMERS = {"gateway_answer_timeout": 0.15, "gateway_first_token_timeout": 0.3, "gateway_idle_timeout": 0.15}


@pytest.mark.parametrize(("fault", "stream"), COUNTED.values(), ids=COUNTED.keys())
async def test_opens_after_so_many_failures_and_spares_the_backend(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], *, stream: bool
) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN, **TIMERS)
    await open_breaker(gateway, mock, fault, stream=stream)
    mock.set_faults([])
    for _ in range(5):
        assert refused(await gateway.chat(stream=stream))
    assert mock.journal.total == 3, "the backend is left alone"


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "with": {"status": 400}},
        {"kind": "status", "with": {"status": 401}},
        {"kind": "status", "with": {"status": 408}},
        {"kind": "status", "with": {"status": 404}},
        {"kind": "status", "with": {"status": 429, "headers": {"retry-after-ms": "1"}}},
        {"kind": "status", "with": {"status": 429, "body": {"error": {"code": "insufficient_quota"}}}},
    ],
    ids=["400", "401", "408", "404 for the model", "429", "quota"],
)
async def test_does_not_open_on_answers_that_are_no_failure(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults([fault])
    for number in range(6):
        answer = await gateway.chat(user=str(number))
        assert answer.attempts == 1
    assert mock.journal.total == 6
    document = await backend(gateway)
    assert (document["breaker"], document["consecutive_failures"]) == ("closed", 0)


async def test_does_not_open_on_the_callers_deadline(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults([{"kind": "hang_before_headers"}])
    answers = await asyncio.gather(*(gateway.chat(headers={"x-request-timeout": "3"}) for _ in range(5)))
    assert {answer.error["code"] for answer in answers} == {"deadline_exceeded"}
    assert mock.journal.total == 5
    assert (await backend(gateway))["consecutive_failures"] == 0


async def test_only_a_whole_answer_ends_a_row_of_failures(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    for number in range(4):
        mock.set_faults([FAIL])
        await gateway.chat(user=f"{number}, first")
        await gateway.chat(user=f"{number}, second")
        assert (await backend(gateway))["consecutive_failures"] == 2
        mock.set_faults([])
        assert (await gateway.chat()).status == 200
    assert mock.journal.total == 12
    assert (await backend(gateway))["consecutive_failures"] == 0


async def test_retry_after_is_the_time_until_half_open(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, gateway_breaker_open_seconds=20, gateway_breaker_open_max=30)
    await open_breaker(gateway, mock)
    before = (await backend(gateway))["retry_in_seconds"]
    answer = await gateway.chat()
    after = (await backend(gateway))["retry_in_seconds"]
    assert refused(answer)
    assert 16 - 1 <= after <= before <= 24
    assert math.ceil(after) <= int(answer.headers["retry-after"]) <= math.ceil(before)
    assert "x-should-retry" not in answer.headers
    assert "x-gateway-backend" not in answer.headers


async def test_open_is_answered_at_once(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    await open_breaker(gateway, mock)
    async with Stopwatch() as watch:
        assert refused(await gateway.chat(stream=True))
    assert watch.within(0.5), watch


async def test_breaker_that_opens_ends_the_retries(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE | {"gateway_max_attempts": 10}, **STAYS_OPEN, gateway_backoff_initial=0)
    mock.set_faults([{"kind": "cut", "with": {"after_events": 4}, "match": {"stream": True}}, FAIL])
    for _ in range(2):
        await gateway.chat(stream=True)
    assert (await backend(gateway))["consecutive_failures"] == 2
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (500, "mock_500"), "what the last attempt met"
    assert answer.attempts == 1
    assert mock.journal.total == 3
    assert answer.headers["x-should-retry"] == "false"
    assert breaker_of(gateway) == "open"


# A request, and a body, count once


@pytest.mark.parametrize("number", [500, 502])
async def test_request_counts_once_however_many_attempts_it_took(
    mock: MockModel, start_gateway: StartGateway, number: int
) -> None:
    gateway = await start_gateway(mock, **ALONE | {"gateway_max_attempts": 5}, **STAYS_OPEN, gateway_backoff_initial=0)
    mock.set_faults([{"kind": "status", "with": {"status": number}}])
    answer = await gateway.chat()
    assert answer.status == number
    assert answer.attempts == mock.journal.total == 5
    document = await backend(gateway)
    assert (document["breaker"], document["consecutive_failures"]) == ("closed", 1)


async def test_the_same_body_answered_with_500_counts_once(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults([FAIL])
    for number in range(1, 7):
        assert (await gateway.chat(user="one bad prompt")).status == 500
        assert mock.journal.total == number
    document = await backend(gateway)
    assert (document["breaker"], document["consecutive_failures"]) == ("closed", 1)
    for user in ("another", "a third"):
        await gateway.chat(user=user)
    assert breaker_of(gateway) == "open"


async def test_the_same_body_counts_each_time_when_the_failure_is_no_500(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults([{"kind": "status", "with": {"status": 502}}])
    for _ in range(3):
        assert (await gateway.chat()).status == 502
    assert breaker_of(gateway) == "open"
    assert refused(await gateway.chat())
    assert mock.journal.total == 3


async def test_trial_with_a_body_that_failed_before_leaves_the_open_time_and_the_next_request_tries(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **ALONE, **OPENS_SOON)
    await open_breaker(gateway, mock)
    await until(lambda: breaker_of(gateway) == "half_open")
    assert (await gateway.chat(user="opener 1")).status == 500
    assert breaker_of(gateway) == "half_open", "a bad prompt says nothing of the backend"
    mock.set_faults([])
    assert (await gateway.chat()).status == 200
    assert mock.journal.total == 5
    assert breaker_of(gateway) == "closed"


# Repeats


RETRIED: dict[str, Any] = {"gateway_breaker_failures": 100, "gateway_backoff_initial": 0.01}


async def test_repeat_of_a_failed_body_gets_one_attempt(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **RETRIED)
    mock.set_faults([FAIL])
    assert (await gateway.chat()).attempts == 3
    for number in range(1, 4):
        repeat = await gateway.chat()
        assert (repeat.status, repeat.attempts) == (500, 1)
        assert not repeat.backoffs
        assert mock.journal.total == 3 + number
    assert (await gateway.chat(user="another")).attempts == 3, "another body is no repeat"
    mock.set_faults([])
    assert (await gateway.chat()).status == 200, "it is still asked"


async def test_repeat_of_a_failed_body_is_asked_once_at_each_replica(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mocks = [await start_mock(), await start_mock(), await start_mock()]
    gateway = await start_gateway(*mocks, **RETRIED, gateway_max_attempts=2)
    for one in mocks:
        one.set_faults([FAIL])
    assert (await gateway.chat()).attempts == 2
    (spared,) = [one for one in mocks if one.journal.total == 0]
    repeat = await gateway.chat()
    assert repeat.attempts == 2
    assert not repeat.backoffs
    assert repeat.outcomes[0] == f"backend-{mocks.index(spared) + 1} status_500", "first one that did not fail it"
    assert sorted(one.journal.total for one in mocks) == [1, 1, 2]


async def test_another_callers_same_body_is_no_repeat(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **RETRIED, gateway_api_keys=["key-1", "key-2"])
    mock.set_faults([FAIL])
    attempts = [
        (await gateway.chat(headers={"authorization": f"Bearer {key}"})).attempts
        for key in ("key-1", "key-1", "key-2", "key-2")
    ]
    assert attempts == [3, 1, 3, 1]
    assert mock.journal.total == 8


# Cooldowns


async def test_429_is_no_failure_but_cools(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE | {"gateway_breaker_failures": 1}, **STAYS_OPEN)
    mock.set_faults([{"kind": "status", "with": {"status": 429}, "times": 1}])
    assert (await gateway.chat()).status == 429
    document = await backend(gateway)
    assert (document["breaker"], document["consecutive_failures"]) == ("closed", 0)
    assert (document["cooling_seconds"] or 0) <= 1
    assert (await gateway.chat()).status == 200
    first, second = mock.journal.calls
    assert second.time - first.time >= 1, "however late the second one came"
    assert (await backend(gateway))["cooling_seconds"] is None


async def test_503_with_retry_after_cools_and_counts(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE | {"gateway_breaker_failures": 2}, **STAYS_OPEN)
    mock.set_faults([{"kind": "status", "with": {"status": 503, "headers": {"retry-after-ms": "2000"}}}])
    assert (await gateway.chat()).status == 503
    document = await backend(gateway)
    assert (document["breaker"], document["consecutive_failures"]) == ("closed", 1)
    assert 0 < document["cooling_seconds"] <= 2
    answer = await gateway.chat()
    assert (answer.status, len(answer.waits("cooldown"))) == (503, 1)
    assert mock.journal.total == 2
    assert breaker_of(gateway) == "open"


@pytest.mark.parametrize("stream", [False, True])
async def test_all_replicas_cool_longer_than_anybody_waits(
    start_mock: StartMock, start_gateway: StartGateway, *, stream: bool
) -> None:
    mocks = [await start_mock(), await start_mock()]
    gateway = await start_gateway(*mocks, gateway_retry_after_max=5)
    for one, seconds in zip(mocks, ("40", "20"), strict=True):
        one.set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after": seconds}}}])
    first = await gateway.chat(stream=stream)
    assert (first.status, first.error["code"], first.attempts) == (429, "mock_429", 2), "the backend's own answer"
    for _ in range(5):
        async with Stopwatch() as watch:
            answer = await gateway.chat(stream=stream)
        assert (answer.status, answer.error["code"], answer.attempts) == (429, "backend_rate_limited", 0)
        assert answer.error["type"] == "rate_limit_error"
        assert 15 < int(answer.headers["retry-after"]) <= 20, "the shortest remaining cooldown"
        assert "x-should-retry" not in answer.headers
        assert "x-gateway-backend" not in answer.headers
        assert watch.within(0.5), watch
    assert [one.journal.total for one in mocks] == [1, 1], "not asked before their cooldown is over"


async def test_a_limited_model_takes_no_other_down(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    limited = {"status": 429, "headers": {"retry-after": "60"}}
    mock.set_faults([{"kind": "status", "with": limited, "match": {"model": "limited"}}])
    assert (await gateway.chat(model="limited")).error["code"] == "mock_429"
    assert (await gateway.chat(model="limited")).error["code"] == "backend_rate_limited"
    for _ in range(3):
        other = await gateway.chat(model="other")
        assert other.status == 200
        assert not other.waits("cooldown")
    assert mock.journal.total == 4


async def test_one_of_three_limited_replicas_draws_no_traffic(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mocks = [await start_mock(), await start_mock(mock_ttft=0.1), await start_mock(mock_ttft=0.1)]
    gateway = await start_gateway(*mocks)
    mocks[0].set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after": "30"}}}])
    answers = [answer for _ in range(8) for answer in await asyncio.gather(*(gateway.chat() for _ in range(4)))]
    assert [answer.status for answer in answers] == [200] * 32
    assert mocks[0].journal.total <= 4, "those that were sent before its first answer"
    assert all(not answer.waits("cooldown") for answer in answers)


async def test_half_open_admits_exactly_one(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **OPENS_SOON)
    await open_breaker(gateway, mock)
    await until(lambda: breaker_of(gateway) == "half_open")
    mock.set_faults([{"kind": "hang_before_headers"}])
    trial = asyncio.create_task(gateway.chat())
    await mock.called(4)
    answers = await asyncio.gather(*(gateway.chat() for _ in range(10)))
    assert all(refused(answer) for answer in answers)
    assert mock.journal.total == 4
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)


async def test_half_open_closes_by_a_real_answer(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **OPENS_SOON)
    await open_breaker(gateway, mock)
    mock.set_faults([])
    await until(lambda: breaker_of(gateway) == "half_open")
    assert (await gateway.chat()).status == 200
    assert breaker_of(gateway) == "closed"
    assert (await backend(gateway))["consecutive_failures"] == 0


async def test_half_open_tries_a_new_connection(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    """A kept one may be dead without a word, and spoil the trial of a backend that is well again."""

    async def play(call: RawCall) -> None:
        await call.answer(b"{}", status="500 Oh") if call.number <= 3 else await call.answer()

    raw = await start_raw(play)
    gateway = await start_gateway(raw.url, **ALONE, **OPENS_SOON)
    for number in range(3):
        await gateway.chat(user=str(number))
    await until(lambda: breaker_of(gateway) == "half_open")
    trial = await gateway.chat()
    after = await gateway.chat()

    assert (trial.status, after.status) == (200, 200)
    assert [call.turn for call in raw.calls] == [1, 2, 3, 1, 4]


async def test_half_open_closes_by_the_first_content_of_a_stream(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        if call.number <= 3:
            await call.answer(b"{}", status="500 Oh")
            return
        await call.send(STREAM_HEAD)
        await call.events(chunk())
        await asyncio.sleep(0.2)
        seen.append(breaker_of(gateway))
        await call.events(chunk("word"))
        await call.left()

    seen: list[str] = []
    server = await start_raw(play)
    gateway = await start_gateway(server.url, **ALONE, **OPENS_SOON)
    for number in range(3):
        await gateway.chat(user=str(number))
    await until(lambda: breaker_of(gateway) == "half_open")
    streaming = asyncio.create_task(gateway.chat(stream=True))
    await until(lambda: breaker_of(gateway) == "closed")
    assert seen == ["half_open"], "a role chunk is no answer"
    streaming.cancel()
    await asyncio.gather(streaming, return_exceptions=True)


async def test_failed_half_open_attempt_opens_it_again_for_longer(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(
        mock, **ALONE, gateway_breaker_open_seconds=0.5, gateway_breaker_open_max=LONG, gateway_probe_interval=LONG
    )
    await open_breaker(gateway, mock)
    await until(lambda: breaker_of(gateway) == "half_open")
    began = monotonic()
    await gateway.chat()
    assert mock.journal.total == 4
    retry_in = (await backend(gateway))["retry_in_seconds"]
    assert retry_in <= 2 * 0.5 * 1.2
    assert retry_in + monotonic() - began > 0.5 * 1.2, "at least twice as long, less a fifth"


async def test_cancelled_half_open_attempt_gives_its_place_back(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **OPENS_SOON)
    await open_breaker(gateway, mock)
    await until(lambda: breaker_of(gateway) == "half_open")
    mock.set_faults([{"kind": "hang_before_headers", "times": 1}])
    trial = asyncio.create_task(gateway.chat())
    await mock.called(4)
    trial.cancel()
    await asyncio.gather(trial, return_exceptions=True)
    await mock.settled()
    assert mock.journal.calls[-1].ended == "caller_left"
    assert breaker_of(gateway) == "half_open"
    assert (await gateway.chat()).status == 200
    assert breaker_of(gateway) == "closed"


async def test_deadline_in_a_half_open_attempt_gives_its_place_back(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **ALONE, **OPENS_SOON)
    await open_breaker(gateway, mock)
    await until(lambda: breaker_of(gateway) == "half_open")
    mock.set_faults([{"kind": "hang_before_headers", "times": 1}])
    answer = await gateway.chat(headers={"x-request-timeout": "2"})
    assert answer.error["code"] == "deadline_exceeded"
    assert (await gateway.chat()).status == 200
    assert mock.journal.total == 5


async def test_report_from_before_the_breaker_opened_changes_nothing(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    late = asyncio.Event()

    async def play(call: RawCall) -> None:
        if call.number == 1:
            await late.wait()
        await call.answer(status="200 OK" if call.number == 1 else "500 Oh")

    server = await start_raw(play)
    gateway = await start_gateway(server.url, **ALONE, **STAYS_OPEN)
    slow = asyncio.create_task(gateway.chat())
    await server.called(1)
    for number in range(3):
        await gateway.chat(user=str(number))
    assert breaker_of(gateway) == "open"
    late.set()
    assert (await slow).status == 200, "an attempt under way goes on"
    assert breaker_of(gateway) == "open"
    assert refused(await gateway.chat())
    assert len(server.calls) == 4


async def test_failure_from_before_the_breaker_opened_does_not_count_after_it_has_closed(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    late = asyncio.Event()

    async def play(call: RawCall) -> None:
        if call.number == 1:
            await late.wait()
        await call.answer(status="500 Oh" if call.number <= 4 else "200 OK")

    server = await start_raw(play)
    gateway = await start_gateway(server.url, **ALONE, **OPENS_SOON)
    slow = asyncio.create_task(gateway.chat())
    await server.called(1)
    for number in range(3):
        assert (await gateway.chat(user=str(number))).status == 500
    await until(lambda: breaker_of(gateway) == "half_open")
    assert (await gateway.chat()).status == 200
    late.set()
    assert (await slow).status == 500
    assert len(server.calls) == 5
    document = await backend(gateway)
    assert document["breaker"] == "closed"
    assert document["consecutive_failures"] == 0


# Probes


async def test_refused_backend_is_back_at_its_next_good_probe(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN, gateway_probe_interval=LONG)
    mock.die()
    for _ in range(3):
        assert (await gateway.chat()).status == 502
    assert breaker_of(gateway) == "open"
    await mock.revive()
    async with Stopwatch() as watch:
        await until(lambda: breaker_of(gateway) == "half_open")
    assert watch.within(1), watch
    assert (await gateway.chat()).status == 200
    assert mock.journal.total == 1
    assert breaker_of(gateway) == "closed"


async def test_backend_that_failed_a_probe_is_back_at_its_next_good_one(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    await open_breaker(gateway, mock)
    mock.set_faults([{"kind": "status", "with": {"status": 503}, "match": {"path": "/health"}, "times": 1}])
    await until(lambda: breaker_of(gateway) == "half_open")
    assert (await gateway.chat()).status == 200
    assert breaker_of(gateway) == "closed"


async def test_good_probe_does_not_end_the_open_time_of_a_backend_whose_answers_fail(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    server = await start_raw(lambda call: call.answer(b"{}", status="500 Oh"))
    gateway = await start_gateway(server.url, **ALONE, **STAYS_OPEN)
    for number in range(3):
        await gateway.chat(user=str(number))
    before = server.probes
    await until(lambda: server.probes >= before + 3)
    assert breaker_of(gateway) == "open"
    assert refused(await gateway.chat())
    assert len(server.calls) == 3


async def test_backend_is_probed_often_while_its_breaker_is_not_closed(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.answer(b"{}", status="500 Oh")

    server = await start_raw(play)
    gateway = await start_gateway(server.url, **ALONE, **STAYS_OPEN, gateway_probe_interval=LONG)
    await until(lambda: server.probes == 1)
    for number in range(3):
        await gateway.chat(user=str(number))
    async with Stopwatch() as watch:
        await until(lambda: server.probes >= 5)
    assert watch.within(4 * 0.25 + 0.5), watch


async def test_good_probe_closes_nothing(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **OPENS_SOON, gateway_probe_interval=0.05)
    await open_breaker(gateway, mock)
    await until(lambda: breaker_of(gateway) == "half_open")
    probed = gateway.parts.pool.replicas[0].probe
    await until(lambda: gateway.parts.pool.replicas[0].probe is not probed)
    assert breaker_of(gateway) == "half_open"
    assert mock.journal.total == 3


# Several replicas


async def test_other_replica_takes_over_and_the_open_one_is_not_touched(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **ALONE, **STAYS_OPEN)
    prefer(gateway, "backend-1")
    bad.set_faults([FAIL])
    for number in range(3):
        assert (await gateway.chat(user=str(number))).status == 500
    for number in range(1, 6):
        answer = await gateway.chat()
        assert answer.status == 200
        assert answer.headers["x-gateway-backend"] == "backend-2"
        assert good.journal.total == number
    assert bad.journal.total == 3
    assert (await backend(gateway, 1))["breaker"] == "closed"


async def test_each_change_is_counted(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, gateway_breaker_open_seconds=3)
    assert 'gateway_breaker_state{backend="backend-1"} 0.0' in await gateway.metrics()
    await open_breaker(gateway, mock)
    assert 'gateway_breaker_state{backend="backend-1"} 2.0' in await gateway.metrics()
    mock.set_faults([])
    await until(lambda: breaker_of(gateway) == "half_open")
    assert 'gateway_breaker_state{backend="backend-1"} 1.0' in await gateway.metrics()
    await gateway.chat()
    assert 'gateway_breaker_state{backend="backend-1"} 0.0' in await gateway.metrics()
