"""What the tests of pure parts hold in their hands: a clock that stands still, and a pool of replicas on it."""

from collections.abc import Callable, Mapping

from gateway.config import BackendConfig, ReplicaConfig, RouteConfig, Routing, TargetConfig
from gateway.policy.breaker import State
from gateway.policy.pool import Pool, Replica, Target
from gateway.settings import load


class Clock:
    """Seconds; moves only when told to."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def forward(self, seconds: float) -> None:
        self.now += seconds


def replica_config(name: str, url: str = "http://127.0.0.1:1") -> ReplicaConfig:
    return ReplicaConfig(name, url, None, "/health")


def ignore(_backend: str, _old: State, _new: State) -> None:
    """Nobody listens to changes of breakers."""


def pool(clock: Callable[[], float], backends: Mapping[str, int], **settings: float) -> Pool:
    """A pool with one route `*` over all backends in order; `backends` gives each name its number of replicas."""
    configs = tuple(
        BackendConfig(name, tuple(replica_config(f"{name}-{n}") for n in range(1, count + 1)))
        for name, count in backends.items()
    )
    routes = (RouteConfig("*", tuple(TargetConfig(name, None) for name in backends)),)
    return Pool(Routing(configs, routes), load(**settings), clock, ignore, draw=lambda: 0.5)


def target(clock: Callable[[], float], replicas: int, **settings: float) -> Target:
    """One target whose replicas are `a-1`, `a-2`, ..."""
    return pool(clock, {"a": replicas}, **settings).routes[0].targets[0]


def trip(replica: Replica) -> None:
    """Open its breaker."""
    while replica.breaker.state is State.CLOSED:
        ticket = replica.breaker.admit()
        assert ticket is not None
        replica.breaker.fail(ticket)
