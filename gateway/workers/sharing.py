"""The parent's side of limits that hold for all workers together: each has a share, moved to where it is needed."""

import asyncio
from typing import TYPE_CHECKING, Any

from gateway.policy.shares import LEAST, divided

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.settings import Settings
    from gateway.workers.child import Child

PAUSE = 0.05
"""Seconds between two moves."""

Shares = list[int]
"""Of requests in flight, of places in the queue, of bytes held."""


class Sharing:
    """Divides the limits on requests in flight, on the queue and on bytes.

    A share is taken from one worker before it is given to another: together they never have more than the whole, beyond
    what is in use where nothing is free.
    """

    def __init__(self, settings: "Settings", children: "list[Child]") -> None:
        self._totals = [
            settings.gateway_max_in_flight,
            settings.gateway_max_queue,
            settings.gateway_max_buffered_bytes,
        ]
        self._children = children
        self._given: dict[Child, Shares] = {}
        self._moving: asyncio.Task[None] | None = None
        self._asked = False

    def first(self, child: "Child") -> Shares:
        """Return the shares of a worker that begins: its part, as far as the others have left it."""
        self.ended(child)
        number = len(self._children)
        self._given[child] = [
            max(min(LEAST, total), min(total // number, left))
            for total, left in zip(self._totals, self._left(), strict=True)
        ]
        return self._given[child]

    def ended(self, child: "Child") -> None:
        """Take back what a worker had that is gone."""
        self._given.pop(child, None)

    @property
    def moving(self) -> bool:
        """Whether shares are being moved."""
        return self._moving is not None

    def short(self) -> None:
        """Move shares soon: a worker needs more."""
        self._asked = True
        if self._moving is None:
            self._moving = asyncio.get_running_loop().create_task(self._move_while_asked())

    async def _move_while_asked(self) -> None:
        try:
            while self._asked:
                self._asked = False
                await self._move()
                await asyncio.sleep(PAUSE)
        finally:
            self._moving = None

    async def _move(self) -> None:
        uses = await self._ask_all((child, "use", None) for child in list(self._given))
        present = [child for child in uses if child in self._given]
        if not present:
            return
        fixed = [given for child, given in self._given.items() if child not in present]
        wanted = dict(zip(present, self._wanted([uses[child] for child in present], fixed), strict=True))
        less = {child: list(map(min, self._given[child], wanted[child])) for child in present}
        # What a worker says that it still has is what it has: it may use more than it is to keep.
        kept = await self._ask_all(
            (child, "shares", shares) for child, shares in less.items() if shares != self._given[child]
        )
        for child, shares in kept.items():
            if child in self._given:
                self._given[child] = shares
        for child in present:
            if child in self._given and child.channel is not None:
                left = self._left()
                given = self._given[child]
                more = [
                    max(has, min(want, has + free)) for has, want, free in zip(given, wanted[child], left, strict=True)
                ]
                if more != given:
                    self._given[child] = more
                    child.channel.tell("shares", more)

    def _wanted(self, uses: list[Shares], fixed: list[Shares]) -> list[Shares]:
        by_limit = []
        for place, total in enumerate(self._totals):
            free = total - sum(shares[place] for shares in fixed)
            by_limit.append(divided(free, [use[place] for use in uses]))
        return [list(shares) for shares in zip(*by_limit, strict=True)]

    def _left(self) -> Shares:
        """Return what nobody has."""
        return [
            max(0, total - sum(given[place] for given in self._given.values()))
            for place, total in enumerate(self._totals)
        ]

    async def _ask_all(self, questions: "Iterable[tuple[Child, str, Any]]") -> "dict[Child, Shares]":
        asked = [(child, child.ask(what, data)) for child, what, data in questions]
        answers = await asyncio.gather(*(answer for _, answer in asked))
        return {child: answer for (child, _), answer in zip(asked, answers, strict=True) if answer is not None}
