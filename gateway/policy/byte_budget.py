"""The bytes held for all requests together: their bodies, and answers that wait to be sent."""

from typing import TYPE_CHECKING, Self

from gateway.errors import GatewayOverloaded

if TYPE_CHECKING:
    from collections.abc import Callable


class ByteBudget:
    """At most `limit` bytes at a time, held by the shares of requests; those of one caller hold at most half of them.

    Attributes:
        held: bytes held now.
        of_one: those of each caller.
        ample: bytes up to which there is enough.
        short: is called where there is not; None: nobody could give more.
    """

    __slots__ = ("ample", "held", "limit", "of_one", "short")

    def __init__(self, limit: int) -> None:
        self.limit = self.ample = limit
        self.short: Callable[[], None] | None = None
        self.held = 0
        self.of_one: dict[str, int] = {}

    def resize(self, limit: int) -> None:
        """Have another limit from now on, which others give and take: more is asked for before it is reached."""
        self.limit = limit
        self.ample = limit * 3 // 4

    def scarce(self, size: int) -> None:
        """Ask for more, and refuse what is too much now. Raises: GatewayOverloaded."""
        if self.short is not None:
            self.short()
        if self.held + size > self.limit:
            raise GatewayOverloaded("The gateway holds as many bytes as it may. Try again shortly.", reason="memory")

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
        if budget.held + size > budget.ample:
            budget.scarce(size)
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
