"""The bytes held for all requests together: their bodies, and answers that wait to be sent."""

from typing import Self

from gateway.errors import GatewayOverloaded


class ByteBudget:
    """At most `limit` bytes at a time, held by the shares of requests; those of one caller hold at most half of them.

    Attributes:
        held: bytes held now.
        of_one: those of each caller.
    """

    __slots__ = ("held", "limit", "of_one")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.of_one: dict[str, int] = {}

    def share(self, caller: str = "") -> "Share":
        """Return an empty share for one request. A caller without a name is nobody in particular, and has no half."""
        return Share(self, caller)


class Share:
    """The bytes one request holds. As a context manager it gives all of them back at the end."""

    __slots__ = ("_budget", "_caller", "held")

    def __init__(self, budget: ByteBudget, caller: str) -> None:
        self._budget = budget
        self._caller = caller
        self.held = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.give_back(self.held)

    def hold(self, size: int) -> None:
        """Hold `size` more bytes.

        Raises:
            GatewayOverloaded: all requests together, or the caller's, would hold more than they may.
        """
        budget, caller = self._budget, self._caller
        if budget.held + size > budget.limit:
            raise GatewayOverloaded("The gateway holds as many bytes as it may. Try again shortly.", reason="memory")
        if caller:
            of_one = budget.of_one.get(caller, 0) + size
            if of_one > budget.limit // 2:
                raise GatewayOverloaded(
                    "Your requests hold as many bytes as those of one caller may. Try again shortly.", reason="memory"
                )
            budget.of_one[caller] = of_one
        budget.held += size
        self.held += size

    def count(self, size: int) -> None:
        """Hold `size` bytes that are there already, whatever the limit."""
        budget, caller = self._budget, self._caller
        if caller:
            budget.of_one[caller] = budget.of_one.get(caller, 0) + size
        budget.held += size
        self.held += size

    def give_back(self, size: int) -> None:
        """Give back `size` bytes."""
        budget, caller = self._budget, self._caller
        if caller:
            left = budget.of_one.get(caller, 0) - size
            if left:
                budget.of_one[caller] = left
            else:
                budget.of_one.pop(caller, None)
        budget.held -= size
        self.held -= size

    def give_back_to(self, held: int) -> None:
        """Give back what was taken since `held` bytes were held."""
        self.give_back(self.held - held)
