"""The chaos kit's steady open-loop load, on the gateway's published port."""

import asyncio
from typing import Any

from chaos.load import Load, Plan
from chaos.promises import Verdict, at_most
from testkit.load import Call, good, now
from tests.stack.engine import Stack, wait_for

RECOVERY = 3.0
"""Seconds from the end of a fault to the first caller who is answered."""
AFTER_PROBE = 1.0
"""Seconds from the gateway's first good probe to that."""
Failure = tuple[int, str]
UNREACHABLE: set[Failure] = {(502, "backend_connection_error"), (503, "backend_unavailable")}
SILENT: set[Failure] = {(504, "backend_timeout"), (200, "backend_timeout")}
"""Of calls, and of streams that had begun, when a backend has become a black hole."""
CUT: set[Failure] = {(502, "backend_invalid_response"), (200, "backend_invalid_response")}
"""Of calls, and of streams that had begun, when a backend dies."""


def load(stack: Stack, rate: float, deadline: float = 5, **plan: Any) -> Load:  # noqa: ANN401
    """Every other call is a stream; `plan` is further fields of `Plan`."""
    fields: dict[str, Any] = {
        "urls": [stack.url("GATEWAY_PORT", "")],
        "pids": [stack.inspect("gateway")["State"]["Pid"]],
        "seed": 1,
        "mock_seed": 0,
    }
    return Load(Plan(rate=rate, deadline=deadline, **(fields | plan)))


async def recovers(stack: Stack, load: Load, since: float) -> list[Verdict]:
    """How long after `since` and after a good probe the first caller was answered; waits for it."""

    def probed() -> float | None:
        probe = stack.gateway("/health").json["downstream"]["backends"][0]["probe"]
        at: float = now() - probe["seconds_ago"]
        return at if probe["ok"] and at >= since else None

    well = await asyncio.to_thread(wait_for, probed, "a probe is good", 20, 0.05)
    assert well is not None
    await load.until(lambda calls: bool(good(calls, since=well)), 20)
    return [
        at_most("the first good answer after", _first(load.calls, since) - since, RECOVERY, " s"),
        at_most("... and after a good probe", _first(load.calls, well) - well, AFTER_PROBE, " s"),
    ]


def _first(calls: list[Call], since: float) -> float:
    return min(call.ended for call in good(calls, since=since))
