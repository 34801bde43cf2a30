"""The bytes held for all requests together: their bodies, and answers that wait to be sent."""

from typing import Self

from gateway.errors import GatewayOverloaded


class ByteBudget:
    """At most `limit` bytes at a time, held by the shares of requests.

    Attributes:
        held: bytes held now.
    """

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def share(self) -> "Share":
        """Return an empty share for one request."""
        return Share(self)


class Share:
    """The bytes one request holds. As a context manager it gives all of them back at the end."""

    __slots__ = ("_budget", "held")

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self.held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(self.held)

    def hold(self, size: int) -> None:
        """Hold `size` more bytes.

        Raises:
            GatewayOverloaded: all requests together would hold more than the limit.
        """
        budget = self._budget
        if budget.held + size > budget.limit:
            raise GatewayOverloaded("The gateway holds as many bytes as it may. Try again shortly.", reason="memory")
        budget.held += size
        self.held += size

    def count(self, size: int) -> None:
        """Hold `size` bytes that are there already, whatever the limit."""
        self._budget.held += size
        self.held += size

    def give_back(self, size: int) -> None:
        """Give back `size` bytes."""
        self._budget.held -= size
        self.held -= size

    def give_back_to(self, held: int) -> None:
        """Give back what was taken since `held` bytes were held."""
        self.give_back(self.held - held)
