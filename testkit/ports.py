"""Ports for processes that may be stopped and started again."""

import contextlib
import random
import socket
from collections import deque
from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
PORTS = range(10_300, 25_000)
"""Below the ports that kernels give to outgoing connections, one of which could take a stopped process's place, and
below those at which Kubernetes takes what goes to any address of its node, though nothing listens there; above those of
Kubernetes' own processes, which may just be starting."""
CONTAINERS = range(25_000, 30_000)
"""For containers, which listen minutes after their ports are chosen, while other tests run beside them."""
_given: deque[int] = deque(maxlen=1000)


def free_port(among: range = PORTS) -> int:
    """Return a port on which nothing listens, and which was not returned just before: somebody will listen there."""
    while True:
        port = random.randint(among.start, among.stop - 1)
        if port in _given:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                _given.append(port)
                return port


@contextlib.contextmanager
def refusing_port() -> Iterator[int]:
    """Hold a port that refuses connections: it is bound, so that nobody else gets it, and nothing listens."""
    with socket.socket() as held:
        held.bind((LOOPBACK, 0))
        port: int = held.getsockname()[1]
        yield port


def free_ports(count: int, among: range = PORTS) -> list[int]:
    """Return several different ports on which nothing listens."""
    return [free_port(among) for _ in range(count)]
