"""The retry budget: what an outage costs a backend, counted there."""

import asyncio
from typing import Any

import pytest

from gateway.policy.replica import FAILURES_AVOIDED
from mock_model.serve import MockModel
from tests.integration.gateways import Gateway, StartGateway, StartMock, prefer

FAIL = {"kind": "status", "with": {"status": 500}}
QUICK: dict[str, Any] = {"gateway_backoff_initial": 0, "gateway_breaker_failures": 10_000}


async def outage(gateway: Gateway, mock: MockModel, requests: int) -> None:
    """A total outage, one request after the other: never more than 1.2 attempts per request so far."""
    mock.set_faults([FAIL])
    for number in range(1, requests + 1):
        answer = await gateway.chat(user=str(number))  # not a repeat
        assert answer.status == 500
        assert mock.journal.total <= 1.2 * number, f"after {number} requests"


async def test_outage_without_a_floor_costs_a_fifth_more(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK, gateway_retry_floor=0)
    await outage(gateway, mock, 100)
    assert mock.journal.total == 120, "the budget is there to be used"
    text = await gateway.metrics()
    assert 'gateway_retries_refused_total{backend="backend-1"}' in text


async def test_outage_at_five_requests_a_second_costs_a_fifth_more(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    """The floor of 10 in 10 s is a fifth of the 50 requests that come in that time."""
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([FAIL])
    for number in range(50):
        assert (await gateway.chat(user=str(number))).status == 500
    assert mock.journal.total == 50 + 10


async def test_outage_under_parallel_requests_costs_a_fifth_more(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK, gateway_retry_floor=0, gateway_connect_timeout=10)
    mock.set_faults([FAIL])
    answers = await asyncio.gather(*(gateway.chat() for _ in range(100)))
    assert {answer.status for answer in answers} == {500}
    assert mock.journal.total <= 120
    assert mock.journal.total == sum(answer.attempts for answer in answers)


async def test_outage_of_two_replicas_costs_each_a_fifth_more(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    mocks = [await start_mock(), await start_mock()]
    gateway = await start_gateway(*mocks, **QUICK, gateway_retry_floor=0)
    for mock in mocks:
        mock.set_faults([FAIL])
    firsts = {"backend-1": 0, "backend-2": 0}
    for _ in range(100):
        answer = await gateway.chat()
        firsts[answer.outcomes[0].split()[0]] += 1
    for mock, first in zip(mocks, firsts.values(), strict=True):
        assert mock.journal.total <= 1.2 * first, firsts
    assert sum(mock.journal.total for mock in mocks) > 100


async def test_no_retry_budget_is_no_retry_at_all(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK, gateway_retry_budget=0, gateway_retry_floor=10)
    mock.set_faults([FAIL])
    for number in range(1, 11):
        answer = await gateway.chat()
        assert answer.status == 500
        assert answer.attempts == 1
        assert answer.headers["x-should-retry"] == "false"
        assert mock.journal.total == number


@pytest.mark.parametrize("fault", [{"kind": "reset"}, {"kind": "status", "with": {"status": 503}}])
async def test_no_retry_budget_holds_for_another_replica_too(
    start_mock: StartMock, start_gateway: StartGateway, fault: dict[str, Any]
) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **QUICK, gateway_retry_budget=0)
    prefer(gateway, "backend-1")
    bad.set_faults([fault])
    answer = await gateway.chat()
    assert answer.status in {502, 503}
    assert (bad.journal.total, good.journal.total) == (1, 0)


async def test_killed_replicas_share_is_taken_by_the_other_for_nothing(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    dead, healthy = await start_mock(), await start_mock()
    gateway = await start_gateway(dead, healthy, **QUICK, gateway_retry_budget=0.001, gateway_retry_floor=0)
    prefer(gateway, "backend-1")
    dead.die()
    for number in range(1, 31):
        answer = await gateway.chat()
        assert answer.status == 200
        assert answer.attempts == (2 if number <= FAILURES_AVOIDED else 1), "it draws no traffic"
        assert healthy.journal.total == number


async def test_retry_elsewhere_after_any_other_failure_costs_the_replica_that_gets_it(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **QUICK, gateway_retry_floor=3)
    prefer(gateway, "backend-1")
    bad.set_faults([FAIL])
    statuses = [(await gateway.chat(user=str(number))).status for number in range(12)]
    # The good one's budget is its floor, then the bad one's own: a retry that fails. After that it draws no traffic.
    assert statuses == [200] * 3 + [500] + [200] * 8
    assert good.journal.total == 3 + 8
    assert bad.journal.total == 4 + 2


async def test_the_replica_whose_budget_refused_is_told(start_mock: StartMock, start_gateway: StartGateway) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **QUICK, gateway_retry_budget=0.001, gateway_retry_floor=0)
    prefer(gateway, "backend-1")
    bad.set_faults([{"kind": "status", "with": {"status": 503, "headers": {"retry-after": "1"}}}])
    assert (await gateway.chat()).status == 503
    metrics = await gateway.metrics()
    assert good.journal.total == 0
    assert sum(metrics.count(f'refused_total{{backend="{name}"}} 1.0') for name in ("backend-1", "backend-2")) == 1


async def test_retry_elsewhere_of_a_silent_replica_costs(start_mock: StartMock, start_gateway: StartGateway) -> None:
    silent, good = await start_mock(), await start_mock()
    gateway = await start_gateway(
        silent, good, **QUICK, gateway_retry_budget=0.001, gateway_retry_floor=1, gateway_answer_timeout=0.3
    )
    prefer(gateway, "backend-1")
    silent.set_faults([{"kind": "hang_before_headers"}])
    statuses = [(await gateway.chat()).status for _ in range(3)]
    assert statuses == [200, 504, 504]
    assert (silent.journal.total, good.journal.total) == (3, 1)


async def test_budget_does_not_limit_first_attempts(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK, gateway_retry_floor=0)
    await outage(gateway, mock, 10)
    before = mock.journal.total
    mock.set_faults([])
    answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == before + 1
