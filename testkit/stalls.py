"""When the machine kept processes from running: measured beside what is judged, with a control that only sleeps."""

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import monotonic
from typing import Self

from testkit.usage import run_delay

TICK = 0.01
"""Seconds for which the control sleeps."""
SHORTEST = 0.02
"""Seconds; who waited for less has not been kept from anything that is judged here."""


@dataclass(frozen=True)
class Stalls:
    """Those that were found.

    Attributes:
        spans: Begin and end of each (of `time.monotonic`), in order; none of them reaches into another.
    """

    spans: tuple[tuple[float, float], ...]

    def within(self, start: float, end: float, *, aftermath: float = 0.0) -> float:
        """Return for how many seconds of a span (of `time.monotonic`) somebody was kept from running.

        Args:
            start: Of the span.
            end: Of the span; now at the latest.
            aftermath: What was left undone is caught up with after a stall; the part of its length that is to count.
        """
        seconds, reached = 0.0, start
        for begun, ended in self.spans:
            over = ended + aftermath * (ended - begun)
            seconds += max(0.0, min(over, end) - max(begun, reached))
            reached = max(reached, over)
        return seconds

    def holds(self, at: float) -> bool:
        """Return whether an instant lies in one of them."""
        return any(begun < at <= ended for begun, ended in self.spans)


class MachineStalls:
    """Spans of time in which this process, or one of others, was ready to run and could not; watched while entered.

    This one: a thread that sleeps wakes up late, however busy the others of the process are. Others: the run delay of
    their main threads, as Linux counts it. What a process does itself, however long it takes, is no stall, nor is a
    stop by a signal. Spans that were found are known afterwards, too.

    Args:
        pids: Returns the ids of the others; those that have ended count for nothing.
    """

    def __init__(self, pids: Callable[[], Iterable[int]] = tuple) -> None:
        self._pids = pids
        self._found: list[tuple[float, float]] = []
        self._delays: dict[int, float] = {}
        self._due = monotonic()
        self._lock = threading.Lock()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def __enter__(self) -> Self:
        self._due = monotonic() + TICK
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def so_far(self) -> "Stalls":
        """Return those up to now, to be asked about many spans."""
        with self._lock:
            if not self._ending.is_set():
                self._look()
            return Stalls(tuple(self._found))

    def within(self, start: float, end: float) -> float:
        """Return the same as `Stalls.within`, of those up to now."""
        return self.so_far().within(start, end)

    def _watch(self) -> None:
        while not self._ending.wait(TICK):
            with self._lock:
                self._look()

    def _look(self) -> None:
        now = monotonic()
        self._note(self._due, now)
        self._due = now + TICK
        delays = {pid: delay for pid in self._pids() if (delay := run_delay(pid))}  # an id may come again
        for pid, delay in delays.items():
            self._note(now - (delay - self._delays.get(pid, delay)), now)
        self._delays = delays

    def _note(self, begun: float, ended: float) -> None:
        if ended - begun < SHORTEST:
            return
        while self._found and self._found[-1][1] >= begun:
            begun = min(begun, self._found.pop()[0])
        self._found.append((begun, ended))
