"""Seeded draws: each depends on what it is for, never on the order in which calls arrive."""

from hashlib import blake2b, shake_128

_SPAN = float(1 << 64)


def fingerprint(path: str, body: bytes) -> str:
    """Return 16 hex digits that stand for a request: the same for the same bytes sent to the same path."""
    digest = blake2b(path.encode(), digest_size=8)
    digest.update(b"\n")
    digest.update(body)
    return digest.hexdigest()


def draw(seed: int, *parts: object) -> float:
    """Return a number in [0, 1) that is the same for the same seed and parts."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest()) / _SPAN


def stream(seed: int, *parts: object, length: int) -> bytes:
    """Return `length` bytes that are the same for the same seed and parts."""
    text = "/".join(map(str, (seed, *parts)))
    return shake_128(text.encode()).digest(length)
