"""How a limit for several processes is divided among them."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

LEAST = 1
"""What each may use whatever the others do, so that it finds out that it needs more."""


def divided(total: int, used: "Sequence[int]") -> list[int]:
    """Return the share of each: what it uses now, and an equal part of what nobody uses.

    The shares come to `total`, and to more only where more is used already, or where `total` is not enough for the
    least of each. Who is short again and again gets half of the rest each time, and so nearly all.
    """
    least = min(LEAST, total)
    shares = [max(each, least) for each in used]
    each, first = divmod(max(0, total - sum(shares)), len(shares))
    return [share + each + (place < first) for place, share in enumerate(shares)]
