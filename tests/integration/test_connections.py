"""What becomes of a connection after an answer: a caller's, and one to a backend."""

import asyncio
import json

from testkit.completions import CHAT
from testkit.polling import until
from tests.integration.backends_raw import RawCall, StartRaw
from tests.integration.gateways import StartGateway

STREAMED = json.dumps(CHAT | {"stream": True}).encode()


async def test_of_the_kept_connections_to_a_backend_the_one_used_last_is_taken(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    both = asyncio.Event()

    async def play(call: RawCall) -> None:
        if call.number == 2:
            both.set()
        await both.wait()
        await call.answer()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    await asyncio.gather(gateway.chat(), gateway.chat())
    for _ in range(3):
        assert (await gateway.chat()).status == 200

    assert [call.turn for call in backend.calls] == [1, 1, 2, 3, 4]


async def test_of_the_kept_connections_a_dead_one_is_passed_over_for_the_next_newest(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    answered = [asyncio.Event() for _ in range(4)]
    answered[0].set()

    async def play(call: RawCall) -> None:
        if call.number <= 3:
            await backend.called(3)
            await answered[call.number - 1].wait()
        await call.answer()
        if call.number == 4:
            call.close()

    async def ask(number: int) -> None:
        assert (await gateway.chat()).status == 200
        answered[number].set()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_connect_timeout=30)
    first = asyncio.create_task(ask(1))
    await backend.called(1)
    second = asyncio.create_task(ask(2))
    await backend.called(2)
    await asyncio.gather(first, second, ask(3))
    assert (await gateway.chat()).status == 200
    (kept,) = gateway.parts.client._kept._conns.values()
    await until(lambda: not kept[-1][0].is_connected())
    assert (await gateway.chat()).status == 200

    connections = [call._writer for call in backend.calls]
    assert connections[3] is connections[2]
    assert connections[4] is connections[1]
