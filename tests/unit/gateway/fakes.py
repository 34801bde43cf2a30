"""Stand-ins for the tests of pure parts: a clock that moves when told to, chance that is given, a pool on both."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from random import Random
from time import time
from typing import Any

from gateway.config import BackendConfig, ReplicaConfig, RouteConfig, Routing, TargetConfig, usual_replica
from gateway.dialects.error_answers import read_error
from gateway.errors import BackendError
from gateway.headers import retry_after
from gateway.policy.breaker import State
from gateway.policy.pool import Maker, Pool, Target
from gateway.policy.replica import Replica
from gateway.policy.waiting_room import WaitingLimit
from gateway.settings import Settings, load


class Clock:
    """Seconds; moves only when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


class Chance(Random):
    """Seeded chance whose first draws are given."""

    def __init__(self, *first: float, seed: int = 0) -> None:
        super().__init__(seed)
        self._first = list(first)

    def random(self) -> float:
        return self._first.pop(0) if self._first else super().random()


def error_answer(status: int, body: bytes, headers: Mapping[str, str]) -> BackendError:
    """The failure that an answer of a backend is."""
    return read_error(status, body, headers, retry_after(headers, time()))


def replica_config(name: str, url: str = "http://127.0.0.1:1", **settings: Any) -> ReplicaConfig:  # noqa: ANN401
    return replace(usual_replica(load(**settings)), name=name, url=url)


def ignore(_replica: Replica, _old: State, _new: State) -> None:
    """Nobody listens to changes of breakers."""


def pool(
    clock: Callable[[], float],
    backends: Mapping[str, int],
    rng: Random | None = None,
    *,
    waiting: WaitingLimit | None = None,
    **settings: Any,  # noqa: ANN401
) -> Pool:
    """A pool with one route `*` over all backends in order; `backends` gives each name its number of replicas.

    Breakers open for exactly their open time.
    """
    configs = tuple(
        BackendConfig(name, tuple(replica_config(f"{name}-{n}", **settings) for n in range(1, count + 1)))
        for name, count in backends.items()
    )
    routes = (RouteConfig("*", tuple(TargetConfig(name, None) for name in backends)),)
    made = pool_of(Routing(configs, routes), load(**settings), clock, rng or Chance(), waiting)
    for replica in made.replicas:
        replica.breaker._draw = lambda: 0.5
    return made


def pool_of(
    routing: Routing,
    settings: Settings,
    clock: Callable[[], float],
    rng: Random,
    waiting: WaitingLimit | None = None,
    *,
    before: Pool | None = None,
) -> Pool:
    """A pool to which nobody listens."""
    maker = Maker(
        settings,
        clock=clock,
        rng=rng,
        waiting=waiting if waiting is not None else WaitingLimit(max_requests=1000, max_bytes=1 << 30),
        breaker_changed=ignore,
        cooldown_begun=lambda _backend, _model, _seconds: None,
        released=lambda _backend, _number: None,
    )
    return Pool(routing, maker, before)


def target(clock: Callable[[], float], replicas: int, **settings: float) -> Target:
    """One target whose replicas are `a-1`, `a-2`, ..."""
    return pool(clock, {"a": replicas}, None, waiting=None, **settings).routes[0].targets[0]


def trip(replica: Replica) -> None:
    """Open its breaker."""
    while replica.breaker.state is State.CLOSED:
        ticket = replica.breaker.admit()
        assert ticket is not None
        replica.breaker.record_failure(ticket)
