"""Keys come as files, and show nowhere."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.stack.engine import Stack

CALLERS_KEY = "key-of-a-caller"
BACKENDS_KEY = "key-for-the-backend"
ADMINS_KEY = "key-of-an-admin"


@pytest.fixture
def locked_stack(stack: Stack, tmp_path: Path) -> Iterator[Stack]:
    """The stack with keys of its own."""
    callers, backends, admins = tmp_path / "callers", tmp_path / "backends", tmp_path / "admins"
    callers.write_text(f"{CALLERS_KEY}\nanother-key\n")
    backends.write_text(f"{BACKENDS_KEY}\n")
    admins.write_text(f"# of the live page\n{ADMINS_KEY}\n")
    for path in (tmp_path, *tmp_path.parents[:2]):
        path.chmod(0o755)
    files = {"GATEWAY_API_KEYS_FILE": str(callers), "GATEWAY_BACKEND_API_KEY_FILE": str(backends)}
    files |= {"GATEWAY_ADMIN_KEY_FILE": str(admins)}
    locked = replace(stack, env=stack.env | files)
    locked.compose("up", "--wait", "gateway")
    yield locked
    stack.compose("up", "--wait", "gateway")


def test_a_gateway_with_keys_asks_for_one(locked_stack: Stack) -> None:
    refused = locked_stack.ask()
    assert (refused.status, refused.own_error["code"]) == (401, "invalid_api_key")
    assert locked_stack.ask(authorization="Bearer wrong").status == 401
    assert locked_stack.ask(authorization=f"Bearer {CALLERS_KEY}").status == 200
    assert locked_stack.gateway("/livez").status == 200


def test_the_live_page_is_there_with_an_admin_key_alone_and_breaks_the_mock_model(
    stack: Stack, request: pytest.FixtureRequest
) -> None:
    assert stack.gateway("/ui").status == 404
    locked_stack: Stack = request.getfixturevalue("locked_stack")
    assert locked_stack.gateway("/ui").status == 200
    assert locked_stack.gateway("/ui/mock").status == 401
    asked = locked_stack.gateway("/ui/mock", authorization=f"Bearer {ADMINS_KEY}")
    assert asked.json == {"faults": []}


def test_no_key_shows_in_the_container_or_its_log(locked_stack: Stack) -> None:
    locked_stack.ask(authorization=f"Bearer {CALLERS_KEY}")
    shown = json.dumps(locked_stack.inspect("gateway")) + locked_stack.compose("logs", "gateway")
    assert CALLERS_KEY not in shown
    assert BACKENDS_KEY not in shown
    assert ADMINS_KEY not in shown
    files = locked_stack.compose("exec", "-T", "gateway", "sh", "-c", "cat /run/secrets/*")
    assert {CALLERS_KEY, BACKENDS_KEY} <= set(files.split()), "the files are there"
