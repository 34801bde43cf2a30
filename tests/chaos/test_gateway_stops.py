"""The gateway itself stops, under load."""

import asyncio
from http import HTTPStatus

from chaos.processes import Gateway
from chaos.promises import Verdict, all_good, at_least
from testkit.http import ask
from testkit.load import now, sent_between
from testkit.polling import until
from tests.chaos.verdict import UNHURRIED, StartArena, nothing_is_lost, soon

LONG = {"MOCK_TOKENS": "40", "MOCK_TOKEN_INTERVAL": "0.05"}
"""An answer takes 2 s."""
NEW_ONES = 5
"""Calls that come while it drains, at least."""


async def drains(gateway: Gateway) -> bool:
    """Whether it says that it takes no more requests."""
    return (await ask(gateway.ready_url)).status == HTTPStatus.SERVICE_UNAVAILABLE


async def test_a_gateway_that_is_told_to_stop_loses_nothing(start_arena: StartArena) -> None:
    """SIGTERM under 20 calls/s of 2 s each, with a grace of 8 s.

    0 of the requests under way (at least 20, by the backend's journal) are lost; /readyz is 503 within 0.5 s; those who
    come then get 503 `gateway_draining` with Retry-After; the exit code is 0, at most 2 s after the last request under
    way could end (2 s).
    """
    arena = await start_arena(mock=LONG, gateway={**UNHURRIED, "GATEWAY_SHUTDOWN_GRACE": "8"})
    async with arena.load(20, deadline=6) as load:
        await asyncio.sleep(2.5)
        arrived = {line["request_id"] for line in arena.mock.arrivals()}
        told = now()
        stopping = asyncio.create_task(arena.gateway.stop())
        await until(lambda: drains(arena.gateway), "/readyz answers 503")
        drained = now()
        await load.until(lambda calls: len(sent_between(calls, drained, now())) >= NEW_ONES, 20)
    code = await stopping
    stopped = now()
    before = [call for call in load.calls if call.id in arrived]
    under_way = sum(call.ended > told for call in before)
    after = sent_between(load.calls, drained, now())
    kinds = {(call.status, call.outcome, call.retry_after) for call in after}
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(before, "callers before"),
        at_least("requests under way", under_way, 20),
        Verdict("new ones are told to come again", f"{kinds}", kinds == {(503, "gateway_draining", "1")}),
        soon(arena.stalls, "/readyz says so", told, drained, 0.5),
        Verdict("exit code", f"{code}", code == 0),
        soon(arena.stalls, "it stops", told, stopped, 4),
    )


async def test_what_is_left_at_the_end_of_the_grace_ends_with_a_typed_error(start_arena: StartArena) -> None:
    """SIGTERM under 20 calls/s of 4 s each, with a grace of 0.5 s.

    Each request that is cut off gets `gateway_draining`: 503, or one error event in a stream that has begun; the exit
    code is 0, at most 3 s after SIGTERM (grace, 1 s for the last words, 1.5 s for the machine).
    """
    longer, patient = {**LONG, "MOCK_TOKENS": "80"}, {**UNHURRIED, "GATEWAY_ANSWER_TIMEOUT": "9"}
    arena = await start_arena(mock=longer, gateway={**patient, "GATEWAY_SHUTDOWN_GRACE": "0.5"})
    async with arena.load(20, deadline=9, total=50) as load:
        while len(arena.mock.arrivals()) < 50:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.3)
        told = now()
        code = await arena.gateway.stop()
        stopped = now()
    cut = [call for call in load.calls if call.outcome != "ok"]
    kinds = {(call.kind, call.status, call.outcome, call.error_events) for call in cut}
    begun = {("answer", 503, "gateway_draining", 0), ("stream", 200, "gateway_draining", 1)}
    typed = begun | {("stream", 503, "gateway_draining", 0)}
    await nothing_is_lost(
        arena,
        load.calls,
        Verdict(
            "typed errors alone",
            f"{len(cut)} cut off: {sorted(kinds, key=str)}",
            begun <= kinds <= typed,
        ),
        Verdict("exit code", f"{code}", code == 0),
        soon(arena.stalls, "it stops", told, stopped, 3),
    )


async def test_a_rolling_restart_of_two_gateways_loses_nothing(start_arena: StartArena) -> None:
    """Two gateways are restarted one after the other (SIGTERM, start) under 30 calls/s.

    The callers go to the other gateway when one refuses or drains, and some have to: 0 failures; both exit codes are 0.
    """
    arena = await start_arena(gateways=2, gateway=UNHURRIED, mock={"MOCK_TOKENS": "20", "MOCK_TOKEN_INTERVAL": "0.02"})
    codes = []
    async with arena.load(30) as load:
        for gateway in arena.gateways:
            await asyncio.sleep(1.5)
            codes.append(await gateway.stop())
            await asyncio.sleep(0.5)
            await gateway.start()
        await asyncio.sleep(1)
    moved = sum(call.gateway != int(call.id.rpartition("-")[2]) % 2 for call in load.calls)
    await nothing_is_lost(
        arena,
        load.calls,
        all_good(load.calls),
        at_least("calls that went to the other gateway", moved, 1),
        Verdict("exit codes", f"{codes}", codes == [0, 0]),
    )
