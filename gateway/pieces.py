"""Long bytes, copied piece by piece: no other thread gets its turn while the interpreter copies, all of it at once."""

from collections.abc import Iterable, Iterator
from io import BytesIO

BLOCK = 65_536
"""Bytes that are copied or looked at in one go; between two of them other threads get their turn."""


def joined(pieces: Iterable[bytes | memoryview]) -> bytes:
    """Return pieces as one, as `bytes.join` does. What only the iterator holds is not held beside it."""
    whole = BytesIO()
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, len(view), BLOCK):
            whole.write(view[at : at + BLOCK])
    return whole.getvalue()


def taken_from(pieces: list[bytes]) -> Iterator[bytes]:
    """Yield pieces in order, and take them out of their list."""
    pieces.reverse()
    while pieces:
        yield pieces.pop()
