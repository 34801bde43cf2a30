"""Ports for processes that may be stopped and started again."""

import contextlib
import random
import socket
from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
FIRST, LAST = 10_000, 32_000
"""Below the ports that kernels give to outgoing connections: one of those could take a stopped process's place."""


def free_port() -> int:
    """Return a port on which nothing listens."""
    while True:
        port = random.randint(FIRST, LAST)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return port


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """Hold a port that refuses connections: it is bound, so that nobody else gets it, and nothing listens."""
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))
        port: int = held.getsockname()[1]
        yield port


def free_ports(count: int) -> list[int]:
    """Return several different ports on which nothing listens."""
    ports: set[int] = set()
    while len(ports) < count:
        ports.add(free_port())
    return list(ports)
