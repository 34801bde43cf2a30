"""What the kernel knows of a caller's connection, and what it is told."""

import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

BYTES_ACKED = struct.Struct("=120xQ")
"""tcpi_bytes_acked in the struct tcp_info of linux/tcp.h."""


def limit_unsent(connection: "asyncio.BaseTransport", size: int) -> None:
    """Let the kernel hold about `size` bytes beyond what is under way to a slow reader; it would take megabytes."""
    own: socket.socket | None = connection.get_extra_info("socket")
    if own is not None and hasattr(socket, "TCP_NOTSENT_LOWAT"):
        with suppress(OSError):
            own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, size)


def bytes_taken(connection: "asyncio.WriteTransport") -> int:
    """Return a number that grows with each byte that the other end takes.

    It is what the other end has acknowledged: what leaves our own buffer says less, since the kernel takes it in large
    pieces, from a slow reader one in minutes. Where the kernel does not tell, our own buffer has to do.
    """
    own: socket.socket | None = connection.get_extra_info("socket")
    if own is not None and hasattr(socket, "TCP_INFO"):
        with suppress(OSError, struct.error):
            acked: int = BYTES_ACKED.unpack(own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED.size))[0]
            return acked
    return -connection.get_write_buffer_size()
