"""What every chaos test ends with."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

from chaos.arena import Arena
from chaos.counts import Books
from chaos.processes import Gateway
from chaos.promises import Verdict, agree, in_time, nothing_held, well_formed
from testkit.load import Call, Load, good, now, summary
from testkit.stalls import MachineStalls, Stalls

StartArena = Callable[..., Awaitable[Arena]]
RECOVERY = 1.0
"""Seconds from a backend's first good answer to a probe to the first caller who is answered."""
UNHURRIED = {"GATEWAY_FIRST_TOKEN_TIMEOUT": "5", "GATEWAY_ANSWER_TIMEOUT": "5", "GATEWAY_IDLE_TIMEOUT": "5"}
"""Timers of a gateway whose backend is never just silent: those of the arena, 0.8 s, would time the machine."""
FELT = 0.4
"""Seconds: half of what the arena's timers allow a backend before it counts as silent."""


def keep(calls: Sequence[Call], *verdicts: Verdict) -> None:
    """Print every verdict; fail when a promise is broken."""
    lines = "\n".join([str(verdict) for verdict in verdicts])
    print(lines)  # noqa: T201
    assert all(verdict.kept for verdict in verdicts), f"\n{lines}\n{summary(calls)}"


async def nothing_is_lost(arena: Arena, calls: Sequence[Call], *verdicts: Verdict) -> Books:
    """The promises of every test: no hang, nothing ill-formed, counts agree, nothing held; ends the mock models."""
    books = await arena.books(calls)
    own = [_ran(arena, calls), in_time(calls), well_formed(calls), agree(books), nothing_held(await arena.leaks())]
    keep(calls, *own, *verdicts)
    return books


async def probed_well(gateway: Gateway, since: float) -> float:
    """Wait for a good probe of the backend after `since`; the instant. For faults that may swallow a probe."""
    async with asyncio.timeout(20):
        while (at := good_probe(await gateway.health(), since)) is None:  # noqa: ASYNC110 - the instant is wanted
            await asyncio.sleep(0.02)
    return at


def good_probe(health: dict[str, Any], since: float) -> float | None:
    """When the gateway's last probe of the first backend was made, if it was good and after `since`."""
    probe = health["downstream"]["backends"][0]["probe"]
    at: float = now() - probe["seconds_ago"]
    return at if probe["ok"] and at >= since else None


async def recovers(arena: Arena, load: Load, since: float, within: float = RECOVERY) -> Verdict:
    """How long after `since` the first caller was answered; waits for it."""
    await load.until(lambda calls: bool(good(calls, since=since)), within + 20)
    answered = min(call.ended for call in good(load.calls, since=since))
    return soon(arena.stalls, "the first good answer", since, answered, within)


def soon(stalls: MachineStalls, promise: str, start: float, end: float, limit: float) -> Verdict:
    """Judge how long something took; seconds in which the machine kept one of us from running are told, not counted.

    They are measured in the same run, with a control that only sleeps: on a machine that runs, all count.
    """
    seconds, stalled = end - start, stalls.within(start, end)
    told = f", {stalled:.3f} s of it stalls of the machine" if stalled else ""
    return Verdict(f"{promise} within {limit:g} s", f"{seconds:.3f} s{told}", seconds - stalled <= limit)


def unstalled(arena: Arena, spans: Iterable[tuple[float, float]]) -> list[float]:
    """Return the seconds of each span (its start and end) in which the machine ran.

    As much time again after a stall, in which all that has come meanwhile is caught up with, is the stall's, too.
    """
    stalls = arena.stalls.so_far()
    return [end - start - stalls.within(start, end, aftermath=1.0) for start, end in spans]


def seconds_in_gateway(arena: Arena, lines: Iterable[dict[str, Any]]) -> list[float]:
    """Return how long the requests in a gateway's log took it while the machine ran."""
    to_monotonic = time.monotonic() - time.time()
    ends = [(datetime.fromisoformat(line["time"]).timestamp() + to_monotonic, line["seconds"]) for line in lines]
    return unstalled(arena, [(end - seconds, end) for end, seconds in ends])


def seconds_of_callers(arena: Arena, calls: Iterable[Call]) -> list[float]:
    """Return how long callers waited while the machine ran."""
    return unstalled(arena, [(call.started, call.ended) for call in calls])


def undisturbed(arena: Arena, calls: Iterable[Call]) -> list[Call]:
    """Return those in whose time the machine kept nobody from running for as long as `FELT` in any second.

    Whatever became of the others, they say nothing of the gateway. `nothing_is_lost` tells how many they are.
    """
    stalls = arena.stalls.so_far()
    return [call for call in calls if not _is_disturbed(stalls, call)]


def _is_disturbed(stalls: Stalls, call: Call) -> bool:
    at = call.started
    while at < call.ended:
        if stalls.within(at, min(at + 1, call.ended)) >= FELT:
            return True
        at += FELT / 2
    return False


def _ran(arena: Arena, calls: Sequence[Call]) -> Verdict:
    """That the machine ran well enough for a judgement."""
    number = len(undisturbed(arena, calls))
    return Verdict(
        "the machine ran under at least half of the calls", f"{number} of {len(calls)}", 2 * number >= len(calls)
    )
