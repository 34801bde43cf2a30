"""What the kernel tells of a connection whose other end does not read."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from gateway.server.tcp import bytes_taken, limit_unsent
from tests.unit.gateway.test_hang_ups import Connection, Pair


async def fill(own: socket.socket) -> int:
    """Write until the kernel takes no more; how many bytes that were."""
    own.setblocking(False)
    size, quiet = 0, 0
    while quiet < 5:
        try:
            size += own.send(bytes(65_536))
            quiet = 0
        except BlockingIOError:
            quiet += 1
            await asyncio.sleep(0.02)
    return size


@asynccontextmanager
async def slow() -> AsyncIterator[Pair]:
    """A pair whose caller takes little."""
    pair = Pair()
    pair.caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    try:
        yield pair
    finally:
        pair.close()


async def test_the_kernel_holds_little_beyond_what_is_under_way() -> None:
    async with slow() as limited, slow() as unlimited:
        limit_unsent(limited.connection, 131_072)
        took = await fill(limited.own)
        assert took < await fill(unlimited.own)
        assert took < 131_072 + 4 * 65_536


async def test_bytes_are_taken_only_by_one_who_reads() -> None:
    async with slow() as pair:
        await fill(pair.own)
        taken = bytes_taken(pair.connection)
        assert taken > 0
        await asyncio.sleep(0.3)
        assert bytes_taken(pair.connection) == taken
        left = 200_000
        while left > 0:
            left -= len(pair.caller.recv(4096))
        async with asyncio.timeout(20):
            while bytes_taken(pair.connection) == taken:  # noqa: ASYNC110 - the kernel announces nothing
                await asyncio.sleep(0.01)


async def test_where_the_kernel_tells_nothing_our_own_buffer_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Waiting(Connection):
        def get_write_buffer_size(self) -> int:
            return 50

    async with slow() as pair:
        connection = Waiting(pair.own)
        monkeypatch.delattr(socket, "TCP_INFO")
        monkeypatch.delattr(socket, "TCP_NOTSENT_LOWAT")
        assert bytes_taken(connection) == -50
        limit_unsent(connection, 1)


async def test_of_a_closed_connection_nothing_is_known() -> None:
    class Gone(Connection):
        def get_write_buffer_size(self) -> int:
            return 0

    async with slow() as pair:
        pair.own.close()
        assert bytes_taken(Gone(pair.own)) == 0
        limit_unsent(pair.connection, 1)
