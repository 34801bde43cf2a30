"""Bodies that failed, remembered by their fingerprints: real servers answer 500 for what is wrong with a prompt."""

from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

MAX_FINGERPRINTS = 1000
BAD_BODY = 60.0
"""Seconds in which another 500 to the same body says nothing about the replica."""
REPEAT = 30.0
"""Seconds in which the same body of the same caller is a repeat."""


def fingerprint(path: str, content: "Iterable[bytes | memoryview]") -> bytes:
    """Return what stands for a body: SHA-256 of path and content."""
    digest = sha256(path.encode())
    digest.update(b"\n")
    for piece in content:
        digest.update(piece)
    return digest.digest()


class BadBodies:
    """The bodies that one replica answered with 500."""

    __slots__ = ("_clock", "_until")

    def __init__(self, clock: "Callable[[], float]") -> None:
        self._clock = clock
        self._until: dict[bytes, float] = {}

    def add(self, body: bytes) -> bool:
        """Remember a body (its fingerprint); return whether it was known already."""
        now = self._clock()
        known = self._until.pop(body, 0.0) > now
        self._until[body] = now + BAD_BODY
        if len(self._until) > MAX_FINGERPRINTS:
            del self._until[next(iter(self._until))]
        return known


class Repeats:
    """The requests that failed after more than one attempt, each with the names of the replicas that failed it.

    Many clients do not know `x-should-retry`, and send a failed request again.

    Attributes:
        failed: until when each is remembered, and the names of the replicas, by caller and body; the oldest first.
    """

    def __init__(self, clock: "Callable[[], float]") -> None:
        self._clock = clock
        self.failed: dict[tuple[str, bytes], tuple[float, frozenset[str]]] = {}

    def add(self, caller: str, body: bytes, replicas: frozenset[str]) -> None:
        """Remember a request that failed."""
        self.failed.pop((caller, body), None)
        self.failed[caller, body] = self._clock() + REPEAT, replicas
        if len(self.failed) > MAX_FINGERPRINTS:
            del self.failed[next(iter(self.failed))]

    def failed_by(self, caller: str, body: bytes) -> frozenset[str] | None:
        """Return the names of the replicas that failed the same request before; None when it is no repeat."""
        until, replicas = self.failed.get((caller, body), (0.0, frozenset()))
        if until > self._clock():
            return replicas
        self.failed.pop((caller, body), None)
        return None

    def expire(self) -> None:
        """Forget what is too old, oldest first."""
        now = self._clock()
        while self.failed and next(iter(self.failed.values()))[0] <= now:
            del self.failed[next(iter(self.failed))]
