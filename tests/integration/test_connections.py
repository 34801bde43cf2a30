"""What becomes of a caller's connection after an answer."""

import json

import pytest

from tests.integration.gateways import CHAT, StartGateway, StartMock
from tests.integration.wire import dial, post

STREAMED = json.dumps(CHAT | {"stream": True}).encode()


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "cut", "with": {"after_events": 3, "how": "reset"}},
        {"kind": "malformed_event", "with": {"after_events": 3}},
    ],
    ids=lambda fault: fault["kind"],
)
async def test_after_an_error_event_the_connection_takes_the_next_request(
    start_mock: StartMock, start_gateway: StartGateway, fault: dict[str, object]
) -> None:
    mock = await start_mock(mock_token_interval=0.02)
    gateway = await start_gateway(mock)
    mock.set_faults([fault | {"times": 1}])
    async with dial(gateway.url) as wire:
        await wire.send(post(STREAMED))
        failed = await wire.answer()
        assert b'data: {"error"' in failed.body
        await wire.send(post(STREAMED))
        good = await wire.answer()
    assert good.status == 200
    assert good.body.endswith(b"data: [DONE]\n\n")
    assert mock.journal.total == 2
