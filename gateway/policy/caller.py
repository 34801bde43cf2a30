"""Who asks."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gateway.policy.limits import Limits


class Caller:
    """Who shows a key, or an address where the gateway is open.

    Attributes:
        id: counts requests of one caller together: which key, or the address; "" for nobody in particular.
        name: of the key, as configured; None for a key without one, and for an address.
        limits: of the key; None: it has none.
        models: those it may use, by their names or the beginning of names (`name-*`); None for all.
    """

    __slots__ = ("id", "limits", "models", "name")

    def __init__(
        self, id_: str, name: str | None = None, models: tuple[str, ...] | None = None, limits: "Limits | None" = None
    ) -> None:
        self.id = id_
        self.name = name
        self.limits = limits
        self.models = models

    def may_use(self, model: str) -> bool:
        """Return whether the model is one of those allowed."""
        return self.models is None or any(
            model.startswith(allowed[:-1]) if allowed.endswith("*") else model == allowed for allowed in self.models
        )


NOBODY = Caller("")
"""Who asks before that is known."""
