"""What every chaos test ends with."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from chaos.arena import Arena
from chaos.counts import Books
from chaos.processes import Gateway
from chaos.promises import Verdict, agree, in_time, nothing_held, well_formed
from testkit.load import Call, Load, good, now, summary

StartArena = Callable[..., Awaitable[Arena]]
RECOVERY = 1.0
"""Seconds from a backend's first good answer to a probe to the first caller who is answered."""


def keep(calls: Sequence[Call], *verdicts: Verdict) -> None:
    """Print every verdict; fail when a promise is broken."""
    lines = "\n".join([str(verdict) for verdict in verdicts])
    print(lines)  # noqa: T201
    assert all(verdict.kept for verdict in verdicts), f"\n{lines}\n{summary(calls)}"


async def nothing_is_lost(arena: Arena, calls: Sequence[Call], *verdicts: Verdict) -> Books:
    """The promises of every test: no hang, nothing ill-formed, counts agree, nothing held; ends the mock models."""
    books = await arena.books(calls)
    own = [in_time(calls), well_formed(calls), agree(books), nothing_held(await arena.leaks())]
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


async def recovers(load: Load, since: float, within: float = RECOVERY) -> Verdict:
    """How long after `since` the first caller was answered; waits for it."""
    await load.until(lambda calls: bool(good(calls, since=since)), within + 20)
    seconds = min(call.ended for call in good(load.calls, since=since)) - since
    return Verdict(f"the first good answer within {within:g} s", f"{seconds:.3f} s", seconds <= within)
