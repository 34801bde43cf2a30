"""Short outages are bridged: who waits, for how long, what the backend sees of it, and what explains it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from opentelemetry.trace import SpanKind

from gateway.telemetry.metrics import BRIDGED_OUTCOMES
from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH
from testkit.exposition import Exposition
from testkit.http import Answer
from testkit.polling import until
from tests.integration.gateways import Gateway, StartGateway, StartMock, prefer
from tests.integration.stopwatch import Stopwatch
from tests.integration.traced import routes

BRIDGES: dict[str, Any] = {"gateway_outage_wait": 15, "gateway_backoff_initial": 0.01, "gateway_backoff_max": 0.01}


def status(number: int, times: int | None = None, **headers: str) -> dict[str, Any]:
    """A fault: an error answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    fault: dict[str, Any] = {"kind": "status", "with": {"status": number, "headers": named}}
    return fault if times is None else {**fault, "times": times}


async def bridged(gateway: Gateway) -> dict[str, float | None]:
    """How many requests were bridged, by outcome; those with none are left out."""
    return {outcome: number for outcome, number in (await outcomes(gateway)).items() if number}


async def outcomes(gateway: Gateway) -> dict[str, float | None]:
    found = Exposition.parse(await gateway.metrics())
    return {outcome: found.only("gateway_bridged_requests_total", outcome=outcome) for outcome in BRIDGED_OUTCOMES}


def waiting(gateway: Gateway) -> int:
    return len(gateway.parts.admission.waiting)


def at_once(gateway: Gateway, number: int, **changes: Any) -> list[asyncio.Task[Answer]]:  # noqa: ANN401
    """So many requests at once, each with a body of its own."""
    return [asyncio.create_task(gateway.chat(user=str(one), **changes)) for one in range(number)]


# One request


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("number", [502, 503, 504, 529])
async def test_a_short_outage_costs_the_caller_only_time(
    mock: MockModel, start_gateway: StartGateway, number: int, *, stream: bool
) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(number, times=4)])
    answer = await gateway.chat(stream=stream)
    assert answer.status == 200
    assert answer.text
    assert answer.attempts == mock.journal.total == 5, "three attempts, and two trials beyond them"
    assert len(answer.waits("bridging")) == 2
    assert len(answer.backoffs) == 2
    begun, *_, first, second = [call.time for call in mock.journal.calls]
    assert first - begun >= 0.24
    assert second - first >= 0.24
    assert await bridged(gateway) == {"answered": 1}
    assert "x-should-retry" not in answer.headers


async def test_refused_connections_are_bridged_until_the_backend_is_back(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.die()
    asking = asyncio.create_task(gateway.chat())
    await until(lambda: waiting(gateway) == 1)
    await asyncio.sleep(0.5)
    await mock.revive()
    async with Stopwatch() as watch:
        answer = await asking
    assert answer.status == 200
    assert watch.within(1 + 0.5), f"the interval of trials is never longer than a second: {watch}"
    assert mock.journal.total == 1
    assert await bridged(gateway) == {"answered": 1}


async def test_the_waits_are_explained_in_spans_log_and_server_timing(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(503, times=4)])
    answer = await gateway.chat()
    names = [(name, text) for name, text, _ in answer.timing if name.startswith("bridging")]
    assert names == [("bridging-1", "backend"), ("bridging-2", "backend")]
    assert answer.outcomes == ["backend-1 status_503"] * 4 + ["backend-1 ok"]

    await until(lambda: len(gateway.spans()) >= 6)
    attempts = [dict(span.attributes or {}) for span in gateway.spans() if span.kind is SpanKind.CLIENT]
    decisions = ["retry", "retry", "waited: bridging", "waited: bridging", "answered"]
    assert [attempt["gateway.decision"] for attempt in attempts] == decisions
    (server,) = [span for span in gateway.spans() if span.kind is SpanKind.SERVER]
    waits = [dict(event.attributes or {}) for event in server.events if event.name == "gateway.waited"]
    assert [(wait["gateway.wait"], wait["gateway.backend"]) for wait in waits] == [("bridging", "backend")] * 2
    seconds = [wait["gateway.wait_seconds"] for wait in waits]
    assert all(isinstance(each, float) and 0 < each < 15 for each in seconds)

    await until(lambda: gateway.log.getvalue().count("\n") == 1)
    line = json.loads(gateway.log.getvalue())
    assert [(wait["kind"], wait["backend"]) for wait in line["waits"]] == [("bridging", "backend")] * 2
    assert [attempt["decision"] for attempt in line["attempts"]] == decisions
    told = [wait["seconds"] for wait in line["waits"]]
    assert told == pytest.approx(seconds, abs=0.001)
    assert [each / 1000 for each in answer.waits("bridging")] == pytest.approx(told, abs=0.001)


async def test_a_cooldown_is_explained_in_spans_and_log(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(429, times=1, retry_after_ms="300")])
    answer = await gateway.chat()
    assert (answer.status, answer.attempts, len(answer.waits("cooldown"))) == (200, 2, 1)
    await until(lambda: len(gateway.spans()) >= 3)
    (server,) = [span for span in gateway.spans() if span.kind is SpanKind.SERVER]
    events = {event.name: dict(event.attributes or {}) for event in server.events}
    assert events["gateway.cooldown"]["gateway.backend"] == "backend-1"
    left = events["gateway.cooldown"]["gateway.cooldown_seconds"]
    assert isinstance(left, float)
    assert 0 < left <= 0.3, "what was left of it when the attempt had ended"
    assert "cooldown of backend-1: 0.3 s" in caplog.text
    assert events["gateway.waited"]["gateway.wait"] == "cooldown"
    await until(lambda: gateway.log.getvalue().count("\n") == 1)
    line = json.loads(gateway.log.getvalue())
    assert [wait["kind"] for wait in line["waits"]] == ["cooldown"]
    assert [attempt["decision"] for attempt in line["attempts"]] == ["waited: cooldown", "answered"]
    assert await bridged(gateway) == {}, "a cooldown is no outage"


# What is an outage


async def test_500s_to_two_different_bodies_are_an_outage(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(500, times=7)])
    bad = await gateway.chat(user="one")
    assert (bad.status, bad.attempts) == (500, 3), "one body says nothing of the backend"
    assert not bad.waits("bridging")
    answer = await gateway.chat(user="two")
    assert answer.status == 200
    assert answer.attempts == 5
    assert len(answer.waits("bridging")) == 2
    assert mock.journal.total == 8
    assert await bridged(gateway) == {"answered": 1}


@pytest.mark.parametrize(
    ("fault", "status_code"),
    [
        ({"kind": "not_json"}, 502),
        ({"kind": "cut"}, 502),
        (status(408), 408),
        (status(429, retry_after="60"), 429),
        (status(503, retry_after="60"), 503),
        (status(401), 502),
        (status(422), 422),
    ],
    ids=["no JSON", "cut", "408", "429", "503 with retry-after", "401", "422"],
)
async def test_what_is_no_outage_is_not_bridged(
    mock: MockModel, start_gateway: StartGateway, fault: dict[str, Any], status_code: int
) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([fault])
    async with Stopwatch() as watch:
        answer = await gateway.chat()
    assert answer.status == status_code
    assert not answer.waits("bridging")
    assert watch.within(1), watch
    assert await bridged(gateway) == {}


async def test_without_a_time_to_wait_nothing_is_bridged(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES | {"gateway_outage_wait": 0})
    mock.set_faults([status(503, times=3)])
    answer = await gateway.chat()
    assert (answer.status, answer.attempts) == (503, 3)
    assert answer.headers["x-should-retry"] == "false"
    assert await bridged(gateway) == {}


async def test_nobody_waits_where_another_target_can_answer(
    tmp_path: Path, start_mock: StartMock, start_gateway: StartGateway
) -> None:
    first, second = await start_mock(), await start_mock()
    gateway = await start_gateway(gateway_config=routes(tmp_path, first.url, second.url), **BRIDGES)
    first.set_faults([status(503)])
    for number in range(5):
        answer = await gateway.chat(user=str(number))
        assert answer.status == 200
        assert answer.headers["x-gateway-backend"] == "secondary"
        assert not answer.waits("bridging")
    assert second.journal.total == 5
    assert await bridged(gateway) == {}


async def test_nobody_waits_where_another_replica_can_answer(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **BRIDGES)
    prefer(gateway, "backend-1")
    bad.set_faults([status(503)])
    for number in range(4):
        answer = await gateway.chat(user=str(number))
        assert answer.status == 200
        assert not answer.waits("bridging")
    assert good.journal.total == 4
    assert await bridged(gateway) == {}


# An outage that lasts


async def test_an_outage_that_lasts_gives_errors_at_once_after_its_first_seconds(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **BRIDGES | {"gateway_outage_wait": 4, "gateway_breaker_failures": 100})
    mock.set_faults([status(503)])
    async with Stopwatch() as watch:
        answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (503, "mock_503"), "the last attempt's failure"
    assert answer.headers["x-should-retry"] == "false"
    assert watch.took >= 3.9
    assert watch.within(4 + 1), watch
    asked = mock.journal.total
    assert asked == answer.attempts
    assert 4 <= asked <= 3 + 6, "trials at 0.25 s, then doubling"
    async with Stopwatch() as watch:
        at_last = await gateway.chat(user="later")
    assert at_last.status == 503
    assert not at_last.waits("bridging")
    assert watch.within(0.5), watch
    assert await bridged(gateway) == {"failed": 1}
    mock.set_faults([])
    assert (await gateway.chat(user="well again")).status == 200


async def test_an_open_breaker_admits_the_trials_and_its_open_time_does_not_grow(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    settings = {"gateway_breaker_failures": 1, "gateway_breaker_open_seconds": 60, "gateway_breaker_open_max": 600}
    gateway = await start_gateway(mock, **BRIDGES | settings)
    mock.set_faults([status(503, times=3)])
    asking = asyncio.create_task(gateway.chat())
    breaker = gateway.parts.pool.replicas[0].breaker
    await until(lambda: breaker.state == "open")
    await mock.called(3)
    assert (breaker.retry_in or 0) <= 60 * 1.2
    answer = await asking
    assert answer.status == 200
    assert answer.attempts == mock.journal.total == 4
    assert len(answer.waits("bridging")) == 3
    assert breaker.state == "closed", "a trial that succeeds closes it"


# Many requests


@pytest.mark.parametrize("stream", [False, True])
async def test_all_that_wait_are_released_soon_after_the_first_success(
    mock: MockModel, start_gateway: StartGateway, *, stream: bool
) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(503)])
    firsts = [asyncio.create_task(gateway.chat(user=user, stream=stream)) for user in ("first", "second")]
    await until(lambda: waiting(gateway) == 2)  # while one makes a trial the other waits, and so do newcomers behind it
    others = at_once(gateway, 50, stream=stream)
    await until(lambda: waiting(gateway) >= 51)
    await asyncio.sleep(0.5)
    asked = mock.journal.total
    assert asked <= 2 + 10, "the first attempts, and no more than the budget"
    mock.set_faults([])
    async with Stopwatch() as watch:
        answers = await asyncio.gather(*firsts, *others)
    assert [answer.status for answer in answers] == [200] * 52
    assert watch.within(1 + 1), f"the next trial within a second, and a second for the release: {watch}"
    assert mock.journal.total <= asked + 52 + 1
    assert await bridged(gateway) == {"answered": 52}
    assert waiting(gateway) == 0


@pytest.mark.parametrize("failures", [5, 1000], ids=["a breaker that opens", "a breaker that stays closed"])
@pytest.mark.parametrize("number", [3, 4, 5, 30])
async def test_an_outage_that_finds_requests_under_way_costs_none_of_them_an_error(
    mock: MockModel, start_gateway: StartGateway, number: int, failures: int
) -> None:
    """Their retries, all at once, leave enough of the budget for the trials."""
    gateway = await start_gateway(mock, **BRIDGES, gateway_breaker_failures=failures)
    mock.set_faults([status(503)])
    asking = at_once(gateway, number)
    await until(lambda: waiting(gateway) == number)
    later = at_once(gateway, 3)
    await asyncio.sleep(1)
    assert mock.journal.total <= number + 10, "the first attempts, and no more than the budget"
    mock.set_faults([])
    async with Stopwatch() as watch:
        answers = await asyncio.gather(*asking, *later)
    assert [answer.status for answer in answers] == [200] * (number + 3)
    assert watch.within(1 + 1), watch
    assert await bridged(gateway) == {"answered": number + 3}


async def test_a_steady_load_survives_a_second_of_outage(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    asking = []
    for number in range(25):
        if number == 5:
            mock.set_faults([status(503)])
        if number == 15:
            mock.set_faults([])
        asking.append(asyncio.create_task(gateway.chat(user=str(number), stream=number % 2 == 0)))
        await asyncio.sleep(0.1)
    answers = await asyncio.gather(*asking)
    assert [answer.status for answer in answers] == [200] * 25
    assert all(answer.text for answer in answers)
    assert mock.journal.total <= 25 + 10, "no more than the budget beyond the first attempts"
    assert set(await bridged(gateway)) == {"answered"}


async def test_no_more_than_half_of_the_places_wait(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES, gateway_max_in_flight=8, gateway_breaker_failures=100)
    mock.set_faults([status(503)])
    asking = at_once(gateway, 8)
    await until(lambda: sum(task.done() for task in asking) == 4)
    await until(lambda: waiting(gateway) == 4, "all four wait, and none makes a trial")
    failed = [task.result() for task in asking if task.done()]
    assert {answer.status for answer in failed} <= {503}
    mock.set_faults([])
    answers = await asyncio.gather(*asking)
    assert sorted(answer.status for answer in answers) == [200] * 4 + [503] * 4


# Who waits and is gone


async def test_a_caller_who_leaves_while_waiting_leaves_no_trace(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(503)])
    async with aiohttp.ClientSession() as session:
        posting = asyncio.create_task(session.post(f"{gateway.url}{CHAT_PATH}", json=CHAT))
        await until(lambda: waiting(gateway) == 1)
        posting.cancel()
        await asyncio.gather(posting, return_exceptions=True)
        await until(lambda: waiting(gateway) == 0)
    parts = gateway.parts
    await until(lambda: not (len(parts.in_flight) or parts.admission.in_flight or parts.byte_budget.held))
    asked = mock.journal.total
    await asyncio.sleep(1.2)
    assert mock.journal.total == asked, "nobody is there to make a trial"
    assert await bridged(gateway) == {"left": 1}


async def test_a_gateway_that_stops_sends_away_who_waits(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES)
    mock.set_faults([status(503)])
    asking = at_once(gateway, 3)
    await until(lambda: waiting(gateway) == 3)
    gateway.parts.admission.drain()
    async with Stopwatch() as watch:
        answers = await asyncio.gather(*asking)
    assert watch.within(0.5), watch
    assert [(answer.status, answer.error["code"]) for answer in answers] == [(503, "gateway_draining")] * 3
    for answer in answers:
        assert int(answer.headers["retry-after"]) >= 1
        assert "x-should-retry" not in answer.headers
    assert await bridged(gateway) == {"draining": 3}


async def test_the_deadline_ends_a_wait(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **BRIDGES, gateway_connect_timeout=0.1)
    mock.set_faults([status(503)])
    async with Stopwatch() as watch:
        answer = await gateway.chat(headers={"x-request-timeout": "3"})
    assert watch.within(3 + 0.1), watch
    assert (answer.status, answer.error["code"]) == (503, "mock_503"), "what the last attempt met"
    assert answer.attempts == mock.journal.total
    assert await bridged(gateway) == {"failed": 1}


async def test_every_outcome_is_counted_from_the_start(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    assert await outcomes(gateway) == {"answered": 0, "failed": 0, "left": 0, "draining": 0}
