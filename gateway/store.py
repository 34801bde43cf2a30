"""What instances, or worker processes, share: a server of their own, or the parent of the workers."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class StoreError(Exception):
    """The store cannot be used; the message says why, without its password."""


class Store(Protocol):
    """A store. Every call ends soon, whatever becomes of it.

    Attributes:
        name: for people.
        keeps: what it is told outlives it, as far as it is to.
    """

    name: str
    keeps: bool

    async def ping(self) -> None:
        """Find out whether it answers. Raises: StoreError."""

    async def exchange(self, reports: "Sequence[tuple[str, bytes]]") -> list[bytes]:
        """Report to the ledgers of these keys; return the answers. Raises: StoreError."""

    async def publish(self, values: "Sequence[tuple[str, bytes]]", seconds: int) -> None:
        """Set values that end after so many seconds. Raises: StoreError."""

    async def look_up(self, key: str, seconds: float) -> bytes | None:
        """Return a value; None for none, and where it does not come within so many seconds."""

    async def close(self) -> None:
        """End all that is open."""
