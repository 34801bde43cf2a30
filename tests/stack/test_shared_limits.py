"""The profile `limits`: two gateways and a Valkey."""

from collections.abc import Iterator

import pytest

from testkit.completions import CHAT_PATH, prompt
from testkit.http import Answer
from testkit.polling import wait_for
from tests.stack.engine import PATIENCE, Stack, call

KEY = {"authorization": "Bearer demo-key-of-team-a"}
PORTS = ("GATEWAY_PORT", "GATEWAY_B_PORT")


@pytest.fixture
def sharing_stack(stack: Stack) -> Iterator[Stack]:
    """The stack with a second gateway, and limits that both share."""
    settings = {"GATEWAY_LIMITS_URL": "valkey://valkey", "GATEWAY_CONFIG": "docker/limits.yaml"}
    sharing = stack.with_profile("limits", **settings)
    sharing.compose("up", "--wait")
    yield sharing
    sharing.compose("rm", "--stop", "--force", "gateway-b", "valkey")
    stack.compose("up", "--wait")


def limits(stack: Stack, port: str) -> str:
    return str(call("GET", stack.url(port, "/health"), headers=KEY).json["limits"]["status"])


def ask(stack: Stack, port: str) -> Answer:
    return call("POST", stack.url(port, CHAT_PATH), prompt(max_tokens=1), KEY)


def test_two_gateways_share_limits_and_go_on_while_their_store_is_paused(sharing_stack: Stack) -> None:
    def are(status: str) -> bool:
        return all(limits(sharing_stack, port) == status for port in PORTS)

    wait_for(lambda: are("ok"), "both share", PATIENCE)
    used = [ask(sharing_stack, port).status for _ in range(10) for port in PORTS]
    assert set(used) == {200}
    sharing_stack.compose("pause", "valkey")
    try:
        wait_for(lambda: are("degraded"), "both have noticed", PATIENCE)
        used += [ask(sharing_stack, port).status for _ in range(10) for port in PORTS]
        assert set(used) == {200}
    finally:
        sharing_stack.compose("unpause", "valkey")
    wait_for(lambda: are("ok"), "both share again", PATIENCE)
    used += [ask(sharing_stack, port).status for _ in range(60) for port in PORTS]
    assert 90 <= used.count(200) <= 105
    assert set(used) == {200, 429}
