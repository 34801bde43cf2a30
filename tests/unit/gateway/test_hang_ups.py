"""Hang-ups on connections that are not read: noticed at once, whatever waits unread, and never another's."""

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.server.hang_ups import HangUps

pytestmark = pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])


class Connection(asyncio.Transport):
    """A transport that reads nothing."""

    def __init__(self, own: socket.socket) -> None:
        super().__init__()
        self._own = own
        self.aborted = asyncio.Event()

    def get_extra_info(self, name: str, default: Any = None) -> Any:  # noqa: ANN401
        return self._own if name == "socket" else default

    def abort(self) -> None:
        self.aborted.set()


class Pair:
    """A connection of the gateway's, and its caller's socket."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.caller = socket.create_connection(listener.getsockname())
            self.own, _ = listener.accept()
        self.connection = Connection(self.own)

    def reset(self) -> None:
        self.caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.caller.close()

    def close(self) -> None:
        self.own.close()
        self.caller.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.fixture
def other() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.close()


@pytest.mark.parametrize("unread", [b"", b"bytes that wait"])
@pytest.mark.parametrize("how", ["closes", "says that nothing more will come", "resets"])
async def test_a_hang_up_aborts_the_connection(pair: Pair, other: Pair, how: str, unread: bytes) -> None:
    hang_ups = HangUps()
    for each in (pair, other):
        hang_ups.watch(each.connection)
    pair.caller.sendall(unread)
    await asyncio.sleep(0.05)
    assert not pair.connection.aborted.is_set()
    if how == "resets":
        pair.reset()
    elif how == "closes":
        pair.caller.close()
    else:
        pair.caller.shutdown(socket.SHUT_WR)
    async with asyncio.timeout(20):
        await pair.connection.aborted.wait()
    assert not other.connection.aborted.is_set()
    hang_ups.close()


async def test_a_connection_that_is_read_again_is_not_aborted(pair: Pair, other: Pair) -> None:
    hang_ups = HangUps()
    for each in (pair, other):
        hang_ups.watch(each.connection)
        hang_ups.watch(each.connection)
    hang_ups.forget(pair.connection)
    hang_ups.forget(pair.connection)
    pair.caller.close()
    other.caller.close()
    async with asyncio.timeout(20):
        await other.connection.aborted.wait()
    assert not pair.connection.aborted.is_set()
    hang_ups.close()


async def test_the_number_of_a_closed_socket_may_become_anothers(pair: Pair, other: Pair) -> None:
    hang_ups = HangUps()
    hang_ups.watch(pair.connection)
    number = pair.own.fileno()
    moved = socket.socket(fileno=number)  # the same number, as after a close and an accept
    pair.own.detach()
    moved.close()
    successor = socket.socket(fileno=os.dup2(other.own.fileno(), number))
    heir = Connection(successor)
    hang_ups.watch(heir)
    hang_ups.forget(pair.connection)
    other.caller.close()
    async with asyncio.timeout(20):
        await heir.aborted.wait()
    assert not pair.connection.aborted.is_set()
    successor.close()
    hang_ups.close()


async def test_a_closed_socket_is_not_watched(pair: Pair) -> None:
    hang_ups = HangUps()
    pair.own.close()
    hang_ups.watch(pair.connection)
    hang_ups.forget(pair.connection)
    hang_ups.close()


async def test_after_the_end_nothing_is_watched(pair: Pair) -> None:
    hang_ups = HangUps()
    hang_ups.close()
    hang_ups.watch(pair.connection)
    hang_ups.close()
    hang_ups.forget(pair.connection)
    pair.caller.close()
    await asyncio.sleep(0.05)
    assert not pair.connection.aborted.is_set()
