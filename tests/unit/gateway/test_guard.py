"""Promises: a target above its rate loses its traffic for good; what all share, or too few show, takes nobody's."""

from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config import load_routing
from gateway.policy.guard import SLICES, Guard, Trip, Watch
from gateway.policy.pool import Pool
from gateway.settings import load
from tests.unit.gateway.fakes import Chance, Clock, pool_of


class Guarded:
    """A guard with targets `old` and `new`, and further ones; a fifth may fail, of 20 requests in 60 s at least."""

    def __init__(self, *names: str, rate: float = 0.2, window: float = 60.0, least: int = 20) -> None:
        self.clock = Clock()
        self.trips: list[Trip] = []
        self.guard = Guard(
            "m", max_error_rate=rate, window=window, min_requests=least, clock=self.clock, tripped=self.trips.append
        )
        self.watches = {name: self.guard.watch(name, None) for name in names or ("old", "new")}
        self.old, self.new = (self.watches[name] for name in ("old", "new"))

    @property
    def tripped(self) -> list[str]:
        """The names of those that have lost their traffic."""
        return [trip.target for trip in self.trips]


def give(to: Watch, *, good: int = 0, failed: int = 0, first: bool = True) -> None:
    """First the good ones: only the last failure decides."""
    for _ in range(good):
        to.note(failed=False, first=first)
    for _ in range(failed):
        to.note(failed=True, first=first)


def test_a_target_above_the_rate_loses_its_traffic_once_and_it_is_told() -> None:
    of = Guarded()
    give(of.old, good=100)
    give(of.new, good=16, failed=4)
    assert of.tripped == []  # a fifth is allowed

    assert of.new.note(failed=True, first=True)
    assert not of.new.note(failed=True, first=True)

    (trip,) = of.trips
    assert (trip.route, trip.target, trip.requests, trip.error_rate) == ("m", "new", 21, 5 / 21)
    assert (trip.window, trip.max_error_rate, trip.at) == (60, 0.2, 1000)
    assert of.guard.lost == ["new"]
    assert (of.new.trip, of.old.trip) == (trip, None)


def test_fewer_requests_than_asked_for_say_nothing() -> None:
    of = Guarded()
    give(of.old, good=100)
    give(of.new, failed=19)
    assert of.tripped == []
    give(of.new, failed=1)
    assert of.tripped == ["new"]


def test_what_is_older_than_the_window_is_forgotten_and_a_trip_is_not() -> None:
    of = Guarded()
    give(of.old, good=100)
    give(of.new, failed=19)
    of.clock.forward(60)
    give(of.old, good=100)
    give(of.new, failed=19)
    assert of.tripped == []
    assert (of.new.counts.first, of.new.counts.first_failed) == (19, 19)
    give(of.new, failed=1)
    of.clock.forward(3600)
    give(of.new, good=100)
    assert of.new.trip is not None


def test_a_window_holds_at_least_all_but_one_of_its_slices() -> None:
    of = Guarded()
    of.clock.forward(0.999)
    give(of.new, good=1)
    of.clock.forward(59)
    assert of.new.counts.first == 1
    of.clock.forward(1)
    assert of.new.counts.first == 0


@pytest.mark.parametrize("window", [0.001, 60, 86_400])
def test_what_is_held_is_bounded(window: float) -> None:
    of = Guarded(window=window)
    for _ in range(SLICES * 5):
        of.clock.forward(window / SLICES / 2)
        give(of.new, good=1)

    assert len(of.new._slices) <= SLICES


def test_a_fault_that_both_share_trips_neither() -> None:
    of = Guarded()
    for _ in range(50):
        give(of.old, good=1, failed=1)
        give(of.new, good=1, failed=1)

    assert of.tripped == []


def test_of_two_above_the_rate_the_worse_one_loses_its_traffic_unless_it_may_be_chance() -> None:
    of = Guarded()
    give(of.old, good=70, failed=30)
    give(of.new, good=10, failed=10)
    assert of.tripped == []
    give(of.new, good=40, failed=40)
    assert of.tripped == []  # 50 % and 30 % of 100 are 2.9 standard errors apart
    give(of.new, failed=2)
    assert of.tripped == ["new"]
    give(of.old, failed=1000)
    assert of.tripped == ["new"]  # the last one keeps it


@pytest.mark.parametrize("answered", [0, 19])
def test_nobody_loses_it_to_one_that_has_answered_too_few(answered: int) -> None:
    of = Guarded()
    give(of.new, good=answered)
    give(of.old, good=100, failed=100)
    assert of.tripped == []
    give(of.new, good=20 - answered)
    give(of.old, failed=1)
    assert of.tripped == ["old"]


def test_what_a_fallback_gets_tells_how_the_others_do_and_not_how_it_does_itself() -> None:
    of = Guarded()
    give(of.old, good=100)
    give(of.new, good=20)
    give(of.new, failed=100, first=False)  # requests that had failed elsewhere
    assert (of.tripped, of.new.counts.error_rate) == ([], 0)
    give(of.old, failed=100)
    assert of.tripped == []  # they fail at the new one as well


def test_requests_that_open_breakers_turn_away_are_requests_of_the_target() -> None:
    of = Guarded()
    give(of.old, good=100)
    give(of.new, failed=5)
    assert [of.new.turn_away() for _ in range(15)] == [False] * 14 + [True]

    assert (of.tripped, of.trips[0].requests, of.trips[0].error_rate) == (["new"], 20, 1)


def test_a_short_outage_of_a_busy_target_is_within_the_rate() -> None:
    of = Guarded()
    give(of.old, good=1000)
    give(of.new, good=100, failed=5)

    assert not any(of.new.turn_away() for _ in range(1000))


def test_with_three_targets_the_two_bad_ones_go_one_after_the_other() -> None:
    of = Guarded("old", "new", "newer")
    give(of.old, good=300)
    for _ in range(30):
        give(of.new, failed=1)
        give(of.watches["newer"], failed=1)

    assert set(of.tripped) == {"new", "newer"}


@given(
    st.lists(
        st.tuples(st.sampled_from(["old", "new", "newer"]), st.booleans(), st.booleans(), st.integers(1, 30)),
        max_size=60,
    )
)
def test_whatever_happens_one_keeps_its_traffic(events: list[tuple[str, bool, bool, int]]) -> None:
    of = Guarded("old", "new", "newer", least=3)
    for name, failed, first, times in events:
        for _ in range(times):
            of.watches[name].note(failed=failed, first=first)

    assert len(of.trips) < 3
    assert len(set(of.tripped)) == len(of.tripped)
    assert {name for name, watch in of.watches.items() if watch.trip is not None} == set(of.tripped)


def guarded_pool(tmp_path: Path, chance: Chance | None = None) -> Pool:
    (tmp_path / "gateway.yaml").write_text(
        dedent("""
            backends: {a: {urls: [http://h, http://g]}, b: {url: http://i}, c: {url: http://j}}
            routes:
              - model: m
                targets:
                  - {backend: b, model: new, weight: 1}
                  - {backend: a, weight: 2}
                  - {backend: c, weight: 0}
                  - {backend: a, model: other, weight: 1}
                guard: {min_requests: 1}
              - {model: n, targets: [{backend: b, weight: 1}]}
              - {model: o, targets: [{backend: b}]}
        """)
    )
    settings = load(gateway_config=tmp_path / "gateway.yaml")
    return pool_of(load_routing(settings), settings, Clock(), chance or Chance())


def trip_first(of: Pool) -> None:
    """The target `b` of the first route loses its traffic."""
    new, old, *_ = of.routes[0].watches
    give(old, good=1)
    give(new, failed=1)
    assert new.trip is not None


def test_a_target_without_traffic_is_drawn_no_more_and_is_the_last_fallback(tmp_path: Path) -> None:
    of = guarded_pool(tmp_path, Chance(0.0, 0.0, 0.66, 0.67, 0.999999999))
    route = of.routes[0]
    new, old, spare, other = route.targets
    assert route.order() == (new, old, spare, other)
    trip_first(of)

    assert route.order() == (old, spare, other, new)
    assert route.order() == (old, spare, other, new)
    assert route.order() == (other, old, spare, new)
    assert route.order() == (other, old, spare, new)
    assert route.targets == (new, old, spare, other)


def test_a_guard_watches_those_targets_of_its_route_that_have_traffic(tmp_path: Path) -> None:
    of = guarded_pool(tmp_path)

    assert [(watch.backend, watch.model) for watch in of.routes[0].watches] == [
        ("b", "new"),
        ("a", None),
        ("a", "other"),
    ]
    assert [target.watch is not None for target in of.routes[0].targets] == [True, True, False, True]
    assert [route.watches for route in of.routes[1:]] == [(), ()]
    assert [target.labels for route in of.routes for target in route.targets] == [
        ("m", "b", "new"),
        ("m", "a", "m"),
        ("m", "c", "m"),
        ("m", "a", "other"),
        ("n", "b", "n"),
        None,
    ]


def test_one_replica_of_a_target_is_watched_as_the_target_is(tmp_path: Path) -> None:
    target = guarded_pool(tmp_path).routes[0].targets[1]
    alone = target.only(target.replicas[1])

    assert (alone.watch, alone.labels) == (target.watch, target.labels)


def test_a_hint_takes_a_targets_traffic_without_a_word_but_never_the_last_ones() -> None:
    of = Guarded()
    of.guard.hint("new", 0.5, 40, 7.0)
    of.guard.hint("new", 0.9, 90, 1.0)
    of.guard.hint("old", 0.5, 40, 7.0)
    assert (of.guard.lost, of.trips) == (["new"], [])
    assert of.new.trip is not None
    assert (of.new.trip.error_rate, of.new.trip.requests, of.old.trip) == (0.5, 40, None)
