"""The limits of a key: requests and tokens in any minute and in any day, and requests in flight. All that are set hold.

Instants are seconds since the epoch of an injected clock that never goes back.
"""

import math
from operator import itemgetter
from typing import TYPE_CHECKING

from msgspec import Struct

from gateway.errors import RateLimitExceeded
from gateway.policy.window import DAY, MINUTE, SOON, Meter, Window

if TYPE_CHECKING:
    from asyncio import Future
    from collections.abc import Callable, Iterable, Iterator

    from gateway.config import LimitsConfig
    from gateway.policy.allotment import Allotment


class Limits:
    """What a key may use, and has used.

    Args:
        config: the limits that are set.
        clock: seconds; it never goes back.
        epoch: what its seconds lack to be those since the epoch.

    Attributes:
        requests, tokens: what is used of each; max_in_flight: requests at once, or None for any number.
        most_in_flight: those that may be here; fewer where other processes have the rest.
        in_flight: requests at once now.
        rolls_at: the instant from which `roll` is due.
        touched: something was used since somebody last set this to False.
        allotment: the part of them that this process holds; None where they are its own.
    """

    __slots__ = (
        "allotment",
        "clock",
        "epoch",
        "in_flight",
        "max_in_flight",
        "most_in_flight",
        "requests",
        "rolls_at",
        "tokens",
        "touched",
    )

    def __init__(self, config: "LimitsConfig", clock: "Callable[[], float]", epoch: float = 0.0) -> None:
        self.clock = clock
        self.epoch = epoch
        self.requests = Meter()
        self.tokens = Meter()
        self.in_flight = 0
        self.touched = False
        self.allotment: Allotment | None = None
        self._set(config, -math.inf)

    def change(self, config: "LimitsConfig") -> None:
        """Have other limits from now on; what was used of those that stay still counts."""
        self._set(config, math.nextafter(self.clock() + self.epoch, math.inf))

    def _set(self, config: "LimitsConfig", since: float) -> None:
        """Have these limits; those that are new begin at an instant."""
        self.rolls_at = 0.0
        for meter, limits in (
            (self.requests, _of("requests", config.requests_per_minute, config.requests_per_day)),
            (self.tokens, _of("tokens", config.tokens_per_minute, config.tokens_per_day)),
        ):
            known = {window.name: window for window in meter.windows}
            for name, limit, _ in limits:
                if (window := known.get(name)) is not None:
                    window.have(limit)
                    if self.allotment is None:
                        window.most = limit
            meter.watch(
                tuple(known.get(name) or Window(name, limit, seconds, meter, since) for name, limit, seconds in limits)
            )
        self.max_in_flight = config.max_in_flight
        if self.allotment is None or config.max_in_flight is None:
            self.most_in_flight = config.max_in_flight

    @property
    def windows(self) -> "tuple[Window, ...]":
        """All windows: of requests, then of tokens."""
        return (*self.requests.windows, *self.tokens.windows)

    def of_a_day(self) -> tuple[Window, ...]:
        """Return its windows of a day: they are worth keeping over a restart."""
        return tuple(window for window in self.windows if window.seconds == DAY)

    def look(self) -> float:
        """Return the instant, at which all windows are as they are to be."""
        now = self.clock() + self.epoch
        if now >= self.rolls_at:
            self.roll(now)
        return now

    def roll(self, now: float) -> None:
        """Have all windows as they are to be at an instant; they are aimed anew once a second."""
        self.rolls_at = float(min([math.floor(now) + 1, *[window.roll(now) for window in self.windows]]))
        self.requests.aim()
        self.tokens.aim()

    def state(self) -> "Iterator[tuple[str, int, int]]":
        """Yield each limit that is set: its name, what may be used, and what is used now, by this process."""
        self.look()
        for window in self.windows:
            yield window.name, window.limit, window.used
        if self.max_in_flight is not None:
            yield "max_in_flight", self.max_in_flight, self.in_flight


class _Cut:
    """A reservation of more tokens than the smallest of the limits, each of which has its own part of it.

    Attributes:
        tokens: all limits have these.
    """

    def __init__(self, meter: Meter, tokens: int) -> None:
        self._meter = meter
        self.tokens = smallest = int(meter.smallest)
        self._more = [(window, min(tokens, window.limit) - smallest) for window in meter.windows]

    def fits(self) -> bool:
        """Return whether it fits in the limits that are larger."""
        return all(window.used + self.tokens + more <= window.most for window, more in self._more)

    def change(self, at: float, times: int) -> None:
        """Use what the larger limits have beyond the smallest, or less of it."""
        for window, more in self._more:
            window.change(at, times * more)
        self._meter.aim()


class Reservation(Struct, eq=False):
    """What one request needs of its key's limits: taken before it is forwarded, settled by what it has used.

    Attributes:
        limits: of the key.
        tokens: reserved; those beyond a limit are cut to it.
    """

    limits: Limits
    tokens: int
    _taken_at: float | None = None
    _cut: "_Cut | None" = None

    def take(self) -> float | None:
        """Take it: None. Where it does not fit, return the seconds until it may; 0: when another request ends."""
        limits, tokens = self.limits, self.tokens
        now = limits.clock() + limits.epoch
        if now >= limits.rolls_at:  # as `look` does: a call less at each request
            limits.roll(now)
        of_requests, of_tokens = limits.requests, limits.tokens
        cut = None
        if tokens > of_tokens.smallest:
            cut = _Cut(of_tokens, tokens)
            tokens = cut.tokens
        if (
            of_requests.reading >= of_requests.bound
            or of_tokens.reading + tokens > of_tokens.bound
            or (limits.most_in_flight is not None and limits.in_flight >= limits.most_in_flight)
            or (cut is not None and not cut.fits())
        ):
            return self._wait(now)
        of_requests.reading += 1
        of_tokens.reading += tokens
        if cut is not None:
            self._cut = cut
            cut.change(now, 1)
        limits.in_flight += 1
        limits.touched = True
        self._taken_at = now
        return None

    def _wait(self, now: float) -> float:
        limits = self.limits
        if limits.allotment is not None:
            limits.allotment.lacks(self)
            return SOON
        waits = [window.wait(1, now) for window in limits.requests.windows]
        waits += [window.wait(min(self.tokens, window.limit), now) for window in limits.tokens.windows]
        return max(waits, default=0.0)

    def ask(self) -> "Future[None] | None":
        """Ask for what it lacks, where other processes may hold it; None where that makes no sense (now).

        Returns:
            What is done when an answer has come, or none will.
        """
        allotment = self.limits.allotment
        return allotment.ask(self) if allotment is not None else None

    def in_vain(self, wait: float) -> RateLimitExceeded | None:
        """Return why it cannot be taken within so many seconds, where other processes have used what it lacks."""
        if self.limits.allotment is None:
            return None
        refusal = self.refusal()
        return refusal if refusal is not None and refusal.wait > wait else None

    def settle(self, tokens: int) -> None:
        """Use so many tokens in place of those reserved; the request has ended. Once, after it was taken.

        What becomes free was used when it was taken, and is forgotten with that; what is used beyond it is used now.
        """
        at, limits = self._taken_at, self.limits
        if at is None:
            raise RuntimeError("nothing is taken")
        self._taken_at = None
        limits.in_flight -= 1
        limits.touched = True
        of_tokens, more = limits.tokens, tokens - self.tokens
        if self._cut is not None:
            more = tokens - self._cut.tokens
            self._cut.change(at, -1)
        if more > 0:
            limits.look()
            of_tokens.reading += more
        elif at >= of_tokens.began:
            of_tokens.reading += more
            if of_tokens.reading <= of_tokens.opened:
                of_tokens.told = None
        else:
            of_tokens.change(at, more)

    def give_back(self) -> None:
        """Give all of it back: the request was never forwarded."""
        at = self._taken_at
        self.settle(0)
        if at is not None:
            self.limits.requests.change(at, -1)

    def refusal(self, ahead: "Iterable[Reservation]" = ()) -> RateLimitExceeded | None:
        """Return why it cannot be taken now, by the limit that lets it wait longest; None if it can.

        Args:
            ahead: those of the same key that are taken before it.
        """
        limits, now = self.limits, self.limits.look()
        queue = [*ahead, self]
        waits = [(window.wait(len(queue), now), window) for window in limits.requests.windows]
        waits += [
            (window.wait(sum(min(each.tokens, window.limit) for each in queue), now), window)
            for window in limits.tokens.windows
        ]
        waits = [each for each in waits if each[0]]
        if waits:
            wait, window = max(waits, key=itemgetter(0))
            needed = 1 if window in limits.requests.windows else min(self.tokens, window.limit)
            whose = f"Of this key's {window.name} ({window.limit})"
            left = max(0, window.left)
            if limits.allotment is not None and not window.leased:
                left = max(0, window.most - window.used)
                whose = f"Other instances cannot be asked now. {whose} this one may use {window.most} meanwhile:"
            return RateLimitExceeded(
                f"{whose} {left} are left, and this request needs {needed}.", limit=window.name, wait=wait
            )
        most = limits.most_in_flight
        if most is not None and limits.in_flight >= most:
            return RateLimitExceeded(
                f"As many requests of this key are under way as may be ({limits.max_in_flight}).",
                limit="max_in_flight",
                wait=0.0,
            )
        return None


def _of(what: str, per_minute: int | None, per_day: int | None) -> list[tuple[str, int, int]]:
    """Return the limits of a kind that are set: name, limit, seconds."""
    limits = ((f"{what}_per_minute", per_minute, MINUTE), (f"{what}_per_day", per_day, DAY))
    return [(name, limit, seconds) for name, limit, seconds in limits if limit is not None]
