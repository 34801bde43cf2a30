"""The chaos kit's steady open-loop load, on the gateway's published port."""

import asyncio
from typing import Any

from chaos.load import Load, Plan
from chaos.promises import Verdict
from testkit.load import Call, good, now
from testkit.polling import wait_for
from testkit.stalls import MachineStalls
from tests.chaos.verdict import good_probe, soon
from tests.stack.engine import PATIENCE, Stack

RECOVERY = 3.0
"""Seconds from the end of a fault, when the model answers, to the first caller who is answered."""
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
    """How long after the model answered, and after the gateway's good probe of it, the first caller did; waits for it.

    How long the model's start takes is the machine's affair. Its control API opens with the API, whose port is not
    published.
    """
    with stalls(load) as machine:
        await asyncio.to_thread(wait_for, lambda: stack.control("GET", "/faults"), "the model answers", PATIENCE, 0.05)
        answered = now()
        well = await asyncio.to_thread(
            wait_for, lambda: good_probe(stack.gateway("/health").json, since), "a probe is good", PATIENCE, 0.05
        )
        assert well is not None
        await load.until(lambda calls: bool(good(calls, since=max(answered, well))), 20)
    return [
        soon(machine, f"the first good answer after {what}", moment, _first(load.calls, moment), limit)
        for what, moment, limit in (("the model answers", answered, RECOVERY), ("a good probe", well, AFTER_PROBE))
    ]


def stalls(load: Load) -> MachineStalls:
    """When the machine kept this process, the load or its gateway from running; to be entered."""
    pids = [pid for plan in load.plans for pid in plan.pids]
    return MachineStalls(lambda: [load.pid, *pids])


def _first(calls: list[Call], since: float) -> float:
    return min(call.ended for call in good(calls, since=since))
