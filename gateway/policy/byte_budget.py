"""The bytes held for all requests together: their bodies, and answers that wait to be sent."""

from typing import Self

from gateway.errors import GatewayOverloaded


class ByteBudget:
    """At most `limit` bytes at a time, held by the shares of requests; those of one caller hold at most half of them.

    Attributes:
        held: bytes held now.
    """

    __slots__ = ("_of_one", "held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._of_one: dict[str, int] = {}

    def share(self, caller: str = "") -> "Share":
        """Return an empty share for one request. A caller without a name is nobody in particular, and has no half."""
        return Share(self, caller)

    def hold(self, caller: str, size: int) -> None:
        """Hold `size` more bytes, or fewer where it is negative.

        Raises:
            GatewayOverloaded: all requests together, or the caller's, would hold more than they may.
        """
        held = self.held + size
        if size > 0 and held > self.limit:
            raise GatewayOverloaded("The gateway holds as many bytes as it may. Try again shortly.", reason="memory")
        if caller:
            of_one = self._of_one.get(caller, 0) + size
            if size > 0 and of_one > self.limit // 2:
                raise GatewayOverloaded(
                    "Your requests hold as many bytes as those of one caller may. Try again shortly.", reason="memory"
                )
            if of_one:
                self._of_one[caller] = of_one
            else:
                self._of_one.pop(caller, None)
        self.held = held


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
        self._budget.hold(self._caller, size)
        self.held += size

    def count(self, size: int) -> None:
        """Hold `size` bytes that are there already, whatever the limit."""
        self._budget.held += size
        self.held += size

    def give_back(self, size: int) -> None:
        """Give back `size` bytes."""
        self._budget.hold(self._caller, -size)
        self.held -= size

    def give_back_to(self, held: int) -> None:
        """Give back what was taken since `held` bytes were held."""
        self.give_back(self.held - held)
