"""Which connection of a caller gives way to a new one, and how many there may be."""

import asyncio
import resource
from typing import Any, get_args

import pytest

from gateway.server.connections import EXTRA, FRESH, CloseReason, Connections, connections_allowed
from gateway.telemetry.metrics import CLOSE_REASONS


class Fake:
    """A connection."""

    def __init__(self, *, idle_since: float | None = 0.0, has_asked: bool = True) -> None:
        self.idle_since = idle_since
        self.has_asked = has_asked
        self.closed: list[str] = []
        self.refuses = False

    def close_for(self, reason: str) -> None:
        self.closed.append(reason)
        self.idle_since = None

    def refuse_prompts(self) -> None:
        self.refuses = True


def add(connections: Connections, *new: Any) -> bool:  # noqa: ANN401
    """Let them in one by one; whether there was a place for each."""
    for each in new:
        if not connections.make_room():
            return False
        connections.add(each)
    return True


def made(limit: int) -> Connections:
    return Connections(limit, lambda _: None)


async def test_up_to_the_limit_nobody_gives_way() -> None:
    connections, open_ones = made(3), [Fake() for _ in range(3)]
    assert add(connections, *open_ones)
    assert not any(each.closed or each.refuses for each in open_ones)
    assert len(connections) == 3


async def test_they_give_way_in_the_order_in_which_they_became_idle() -> None:
    times = [5.0, 3.0, None, 1.0, 4.0]
    connections, open_ones = made(5), [Fake(idle_since=since) for since in times]
    assert add(connections, *open_ones)
    gone = []
    for _ in range(4):
        assert add(connections, Fake(idle_since=None))
        (one,) = (each for each in open_ones if each.closed and each not in gone)
        gone.append(one)
    assert [open_ones.index(each) for each in gone] == [3, 1, 4, 0]
    assert len(connections) == 5


async def test_one_that_has_had_a_request_since_the_last_look_is_passed_over() -> None:
    connections, open_ones = made(3), [Fake(idle_since=since) for since in (1.0, 2.0, 3.0)]
    assert add(connections, *open_ones)
    assert add(connections, Fake(idle_since=9.0))
    assert open_ones[0].closed == ["made_room"]
    open_ones[1].idle_since = 10.0
    new = Fake(idle_since=11.0)
    assert add(connections, new)
    assert add(connections, Fake(idle_since=12.0))
    assert open_ones[2].closed
    assert not open_ones[1].closed, "the one that came while the limit was reached has been idle for longer"


async def test_a_new_one_that_is_about_to_ask_does_not_give_way() -> None:
    now = asyncio.get_running_loop().time()
    connections, fresh = made(1), Fake(idle_since=now + 60, has_asked=False)
    assert add(connections, fresh)
    assert add(connections, extra := Fake())
    assert (fresh.closed, extra.refuses) == ([], True)
    fresh.idle_since = now - FRESH
    assert add(connections, Fake())
    assert fresh.closed == ["made_room"]


async def test_beyond_the_limit_a_few_extra_ones_refuse_prompts_and_then_there_is_no_place() -> None:
    connections, busy = made(2), [Fake(idle_since=None) for _ in range(2)]
    extra = [Fake(idle_since=None) for _ in range(EXTRA)]
    assert add(connections, *busy, *extra)
    assert all(each.refuses for each in extra)
    assert not connections.make_room()
    extra[7].idle_since = 1.0
    assert connections.make_room()
    assert [each for each in extra if each.closed] == [extra[7]]
    connections.add(Fake(idle_since=None))  # type: ignore[arg-type]
    assert not connections.make_room()
    connections.remove(busy[0])  # type: ignore[arg-type]
    assert add(connections, regular := Fake())
    assert not regular.refuses


@pytest.mark.parametrize(
    ("files", "wanted", "in_flight", "allowed"),
    [
        (16_384, None, 1024, 15_168),
        (1_024, None, 1024, 416),
        (256, None, 1024, 96),
        (256, None, 10, 182),
        (1_024, 100, 1024, 100),
        (1_024, 5_000, 1024, 832),
        (resource.RLIM_INFINITY, None, 1024, (1 << 30) - 192 - 1024),
    ],
)
def test_the_limit_of_open_files_is_shared_by_callers_backends_and_a_reserve(
    monkeypatch: pytest.MonkeyPatch, files: int, wanted: int | None, in_flight: int, allowed: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (files, files))
    assert connections_allowed(wanted, in_flight) == allowed


def test_each_reason_is_one_of_the_metrics() -> None:
    assert get_args(CloseReason) == CLOSE_REASONS
