"""When the machine kept processes from running."""

import threading
import time
from itertools import pairwise

import pytest

from testkit import stalls as module
from testkit.stalls import SHORTEST, TICK, MachineStalls


class Machine:
    """Its clock, and for how long each process was kept from running."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.delays: dict[int, float] = {}
        self.stalls = MachineStalls(lambda: self.delays)
        self.stalls._due = self.now + TICK
        monkeypatch.setattr(module, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "run_delay", lambda pid: self.delays[pid])

    def runs(self, seconds: float) -> None:
        """The control wakes up when it should."""
        for _ in range(round(seconds / TICK)):
            self.now += TICK
            self.stalls._look()

    def stands_still(self, seconds: float) -> None:
        """For everybody; nobody has looked yet."""
        self.now += seconds
        for pid in self.delays:
            self.delays[pid] += seconds

    def keeps(self, pid: int, seconds: float) -> None:
        """One alone, which runs again now; what Linux counts is known only then."""
        self.runs(seconds)
        self.delays[pid] += seconds


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_a_machine_that_runs_has_none(machine: Machine) -> None:
    machine.delays = {1: 5.0}
    for _ in range(50):
        machine.runs(TICK)
        machine.delays[1] += SHORTEST / 2
    assert machine.stalls.within(0, machine.now) == 0


def test_a_machine_that_stands_still_counts_once_and_before_the_control_has_noticed(machine: Machine) -> None:
    machine.delays = {1: 0.0, 2: 7.0}
    machine.runs(0.5)
    began = machine.now
    machine.stands_still(3)
    assert machine.stalls.within(began, machine.now) == pytest.approx(3)
    machine.runs(0.5)
    assert machine.stalls.within(0, machine.now) == pytest.approx(3, abs=TICK)
    assert machine.stalls.within(began + 1, began + 2) == pytest.approx(1)
    assert machine.stalls.within(began + 3, machine.now) == 0
    assert machine.stalls.so_far().within(began + 2, machine.now, aftermath=0.1) == pytest.approx(1.3, abs=TICK)


def test_one_that_is_kept_from_running_alone_counts_where_it_was(machine: Machine) -> None:
    machine.delays = {1: 0.1, 2: 0.1}
    machine.runs(1)
    machine.keeps(2, 0.3)
    ended = machine.now
    machine.runs(1)
    machine.keeps(1, 0.2)
    assert machine.stalls.within(0, machine.now) == pytest.approx(0.5)
    assert machine.stalls.within(ended - 0.1, machine.now - 0.1) == pytest.approx(0.2, abs=1.1 * TICK)


def test_one_that_begins_or_ends_is_no_stall(machine: Machine) -> None:
    machine.runs(0.1)
    machine.delays = {1: 9.0}
    machine.runs(0.1)
    machine.delays = {}
    machine.runs(0.1)
    machine.delays = {1: 9.0, 2: 8.0}
    machine.runs(0.1)
    machine.delays[1] = 0.0  # it has ended, and is still asked about
    machine.runs(0.1)
    machine.delays[1] = 7.0  # another one has its id
    machine.runs(0.1)
    assert machine.stalls.within(0, machine.now) == 0


def test_what_this_process_does_itself_does_not_keep_the_control_from_running() -> None:
    """The interpreter's lock changes hands. Where the machine lets nobody run meanwhile, this thread sees it, too."""
    with MachineStalls() as stalls:
        began, looks = time.monotonic(), [time.monotonic()]
        while looks[-1] < began + 0.3:
            looks.append(time.monotonic())
        found = stalls.within(began, looks[-1])
    longest = max(later - sooner for sooner, later in pairwise(looks))
    assert found < 0.15 or longest >= SHORTEST, "busy for 0.3 s, and nobody kept it from running"
    assert not [thread for thread in threading.enumerate() if thread.name == "stalls"]
