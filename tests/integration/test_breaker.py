"""The breaker of a replica: when it opens, what it spares the backend, and what closes it again."""

import asyncio
import math
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
        answer = await gateway.chat(**changes)
        assert mock.journal.total == number
    assert breaker_of(gateway) == "open"
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
        {"kind": "status", "with": {"status": 429}},
        {"kind": "status", "with": {"status": 429, "body": {"error": {"code": "insufficient_quota"}}}},
    ],
    ids=["400", "401", "408", "429", "quota"],
)
async def test_does_not_open_on_answers_that_are_no_failure(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any]
) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults([fault])
    for _ in range(6):
        await gateway.chat()
    assert mock.journal.total == 6
    assert (await backend(gateway))["breaker"] == "closed"


async def test_does_not_open_on_the_callers_deadline(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults([{"kind": "hang_before_headers"}])
    for _ in range(5):
        answer = await gateway.chat(headers={"x-request-timeout": "0.05"})
        assert answer.error["code"] == "deadline_exceeded"
    assert mock.journal.total == 5
    assert (await backend(gateway))["consecutive_failures"] == 0


async def test_only_a_whole_answer_ends_a_row_of_failures(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    for _ in range(4):
        mock.set_faults([FAIL])
        await gateway.chat()
        await gateway.chat()
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
    mock.set_faults([FAIL])
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (500, "mock_500"), "what the last attempt met"
    assert answer.attempts == mock.journal.total == 3
    assert answer.headers["x-should-retry"] == "false"


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
    for _ in range(3):
        await gateway.chat()
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
    for _ in range(3):
        await gateway.chat()
    assert breaker_of(gateway) == "open"
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
    await gateway.chat()
    assert mock.journal.total == 4
    document = await backend(gateway)
    assert document["breaker"] == "open"
    assert document["retry_in_seconds"] > 0.5 * 1.2, "at least twice as long, less a fifth, less the time since"
    assert document["retry_in_seconds"] <= 2 * 0.5 * 1.2


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
    answer = await gateway.chat(headers={"x-request-timeout": "0.1"})
    assert answer.error["code"] == "deadline_exceeded"
    assert (await gateway.chat()).status == 200
    assert mock.journal.total == 5


async def test_report_from_before_the_breaker_opened_changes_nothing(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **ALONE, **STAYS_OPEN)
    mock.set_faults(
        [
            {"kind": "latency", "with": {"delay": 0.5}, "match": {"model": "slow"}},
            {"kind": "status", "with": {"status": 500}},
        ]
    )
    slow = asyncio.create_task(gateway.chat(model="slow"))
    await mock.called(1)
    for _ in range(3):
        await gateway.chat()
    assert breaker_of(gateway) == "open"
    assert (await slow).status == 200, "an attempt under way goes on"
    assert breaker_of(gateway) == "open"
    assert refused(await gateway.chat())
    assert mock.journal.total == 4


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
    for _ in range(3):
        assert (await gateway.chat()).status == 500
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
    for _ in range(3):
        await gateway.chat()
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
    for _ in range(3):
        await gateway.chat()
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
    for _ in range(3):
        assert (await gateway.chat()).status == 500
    for number in range(1, 6):
        answer = await gateway.chat()
        assert answer.status == 200
        assert answer.headers["x-gateway-backend"] == "backend-2"
        assert good.journal.total == number
    assert bad.journal.total == 3
    assert (await backend(gateway, 1))["breaker"] == "closed"


async def test_each_change_is_counted(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **ALONE, gateway_breaker_open_seconds=1)
    assert 'gateway_breaker_state{backend="backend-1"} 0.0' in await gateway.metrics()
    await open_breaker(gateway, mock)
    assert 'gateway_breaker_state{backend="backend-1"} 2.0' in await gateway.metrics()
    mock.set_faults([])
    await until(lambda: breaker_of(gateway) == "half_open")
    assert 'gateway_breaker_state{backend="backend-1"} 1.0' in await gateway.metrics()
    await gateway.chat()
    assert 'gateway_breaker_state{backend="backend-1"} 0.0' in await gateway.metrics()
