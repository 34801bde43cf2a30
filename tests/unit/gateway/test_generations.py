"""What stays and what goes from one generation of the configuration to the next."""

import gc
from dataclasses import replace
from hashlib import sha256

import pytest

from gateway.config import (
    BackendConfig,
    KeyConfig,
    LimitsConfig,
    RouteConfig,
    Routing,
    TargetConfig,
    Timeouts,
)
from gateway.generation import Generation, Generations
from gateway.policy.breaker import State
from gateway.policy.lease import take
from gateway.policy.limits import Reservation
from gateway.policy.pool import Pool
from gateway.policy.waiting_room import WaitingLimit
from gateway.server.keys import Keys
from gateway.settings import SettingsError, load
from tests.unit.gateway.fakes import Chance, Clock, pool_of, replica_config, trip

URLS = ("http://h:1", "http://h:2", "http://h:3")


def backend(name: str, *urls: str, **changes: object) -> BackendConfig:
    names = [name] if len(urls) == 1 else [f"{name}-{number}" for number in range(1, len(urls) + 1)]
    replicas = (replica_config(each, url) for each, url in zip(names, urls, strict=True))
    return BackendConfig(name, tuple(replace(each, **changes) for each in replicas))  # type: ignore[arg-type]


def routing(*backends: BackendConfig, keys: tuple[KeyConfig, ...] = ()) -> Routing:
    targets = tuple(TargetConfig(each.name, None) for each in backends)
    return Routing(backends, (RouteConfig("*", targets),), keys)


def pool(of: Routing, before: Pool | None = None, clock: Clock | None = None) -> Pool:
    limit = WaitingLimit(max_requests=10, max_bytes=10)
    made = pool_of(of, load(), clock or Clock(), Chance(), limit, before=before)
    made.take_over()
    return made


def follow(of: Generations, routing: Routing) -> Generation | None:
    return of.follow(routing, of.next_pool(routing))


def key(name: str | None, value: str = "k", models: tuple[str, ...] | None = None, **limits: int) -> KeyConfig:
    return KeyConfig(name, sha256(value.encode()).digest(), models, LimitsConfig(**limits))


@pytest.mark.parametrize(
    "changes",
    [
        {"timeouts": Timeouts(1, 2, 3, 4)},
        {"api_key": "other"},
        {"headers": (("x", "y"),)},
        {"query": (("x", "y"),)},
        {"probe": None},
        {"max_in_flight": 3},
        {"tls_digest": b"other"},
    ],
)
def test_a_replica_stays_however_else_it_is_asked(changes: dict[str, object]) -> None:
    first = pool(routing(backend("a", *URLS[:2])))
    trip(first.replicas[0])
    second = pool(routing(backend("a", *URLS[:2], **changes)), first)

    assert second.replicas == first.replicas
    assert second.replicas[0].breaker.state is State.OPEN
    assert not set(second.endpoints.values()) & set(first.endpoints.values())
    assert not any(replica.awaits_probe for replica in second.replicas)
    assert second.routes[0].targets[0].home is first.routes[0].targets[0].home
    assert (second.responses, second.repeats) == (first.responses, first.repeats)


def test_what_has_not_changed_is_asked_by_the_same_endpoint() -> None:
    first = pool(routing(backend("a", *URLS[:2]), backend("b", URLS[2])))
    second = pool(routing(backend("a", *URLS[:2]), backend("b", URLS[2], api_key="new")), first)

    (a1, a2, b1), (a3, a4, b2) = first.endpoints.values(), second.endpoints.values()
    assert (a1, a2) == (a3, a4)
    assert b1 is not b2


def test_a_new_user_in_a_url_is_still_the_same_server_and_shown_nowhere() -> None:
    first = pool(routing(backend("a", "http://me:old@h/v1")))
    second = pool(routing(backend("a", "http://me:new@h/v1")), first)

    assert second.replicas == first.replicas
    assert second.replicas[0].id == "a http://h/v1"
    (endpoint,) = second.endpoints.values()
    assert endpoint.user_info == "me:new"


@pytest.mark.parametrize(("name", "url"), [("a", URLS[1]), ("b", URLS[0]), ("a", URLS[0] + "/other")])
def test_another_url_and_another_backend_are_another_replica(name: str, url: str) -> None:
    first = pool(routing(backend("a", URLS[0])))
    second = pool(routing(backend(name, url)), first)

    assert not set(second.replicas) & set(first.replicas)
    assert second.replicas[0].awaits_probe
    assert second.routes[0].targets[0].home is not first.routes[0].targets[0].home


def test_replicas_of_the_first_generation_and_those_without_a_probe_await_none() -> None:
    assert not pool(routing(backend("a", *URLS))).replicas[0].awaits_probe
    before = pool(routing(backend("b", URLS[0])))
    assert not pool(routing(backend("a", *URLS, probe=None)), before).replicas[0].awaits_probe


def test_names_follow_the_places_and_replicas_the_urls() -> None:
    first = pool(routing(backend("a", *URLS)))
    second = pool(routing(backend("a", *URLS[1:])), first)

    assert second.replicas == first.replicas[1:]
    assert [each.name for each in second.replicas] == ["a-1", "a-2"]
    assert [each.name for each in first.endpoints.values()] == ["a-1", "a-2", "a-3"]
    twice = pool(routing(backend("a", URLS[0], URLS[0])), second)
    assert len({replica.id for replica in twice.replicas}) == 2


def test_a_backend_with_other_replicas_has_outages_of_its_own_and_those_from_before_hear_of_theirs() -> None:
    clock = Clock()
    one = pool(routing(backend("a", URLS[0])), None, clock)
    (first,) = one.replicas
    old = one.routes[0].targets[0].home
    old.outage.record_failure()
    two = pool(routing(backend("a", *URLS[:2])), one, clock)
    target = two.routes[0].targets[0]
    assert target.home is not old
    assert not target.home.outage.current, "the new one may answer"
    assert first.alone.outage.current == 1, "the known one alone is as before"
    assert target.only(first).home is first.alone
    assert set(first.outages) == {first.alone.outage, target.home.outage, old.outage}
    newcomer = take(two.replicas[1], "m")
    assert newcomer is not None
    newcomer.begin_answer()
    assert old.outage.current == 1, "it does not speak for those who cannot reach it"
    lease = take(first, "m")
    assert lease is not None
    lease.begin_answer()
    assert (old.outage.current, first.alone.outage.current) == (0, 0)


def test_an_outage_goes_on_where_only_others_have_gone() -> None:
    clock = Clock()
    two = pool(routing(backend("a", *URLS[:2])), None, clock)
    two.replicas[0].backend.outage.record_failure()
    one = pool(routing(backend("a", URLS[1])), two, clock)
    outage = one.routes[0].targets[0].home.outage
    assert outage is not two.routes[0].targets[0].home.outage
    assert (outage.current, outage.holds_newcomers) == (1, True)


def test_former_homes_are_forgotten_with_the_requests_under_way() -> None:
    first = pool(routing(backend("a", *URLS)))
    kept = first.replicas[0]
    second = pool(routing(backend("a", *URLS[:2])), first)
    third = pool(routing(backend("a", URLS[0])), second)
    assert len(list(kept.outages)) == 4
    del first, second
    gc.collect()
    assert list(kept.outages) == [third.routes[0].targets[0].home.outage]


def test_a_replica_that_awaits_its_first_probe_comes_after_all_others() -> None:
    first = pool(routing(backend("a", *URLS[:2])))
    second = pool(routing(backend("a", *URLS), backend("b", "http://h:9")), first)
    (a, b) = second.routes[0].targets
    new = second.replicas[2]

    assert new not in {a.pick("m") for _ in range(100)}
    assert a.pick("m", without=first.replicas) is new
    assert b.refuses("m", "/v1/chat/completions")
    assert not a.refuses("m", "/v1/chat/completions")
    new.awaits_probe = False
    assert new in {a.pick("m") for _ in range(100)}


def test_more_attempts_at_once_hold_for_both_generations() -> None:
    first = pool(routing(backend("a", URLS[0], max_in_flight=1)))
    assert take(first.replicas[0], "m") is not None
    assert take(first.replicas[0], "m") is None
    second = pool(routing(backend("a", URLS[0], max_in_flight=2)), first)
    assert take(first.replicas[0], "m") is not None
    assert take(second.replicas[0], "m") is None


def test_models_that_a_replica_listed_are_still_listed() -> None:
    first = pool(routing(backend("a", *URLS[:2])))
    first.note_models(first.replicas[1], ("x",))
    second = pool(routing(backend("a", *URLS[1:])), first)
    assert second.models == ("x",)


def generations(of: Routing, clock: Clock | None = None) -> Generations:
    clock = clock or Clock()
    return Generations(
        of,
        pool=lambda routing, before: pool_of(
            routing, load(), clock, Chance(), WaitingLimit(max_requests=10, max_bytes=10), before=before
        ),
        keys=lambda routing, before: Keys(routing.keys, clock, before),
        clock=clock,
    )


def test_a_configuration_comes_into_force_whole_or_not_at_all() -> None:
    first, clock = routing(backend("a", URLS[0]), keys=(key("t"),)), Clock()
    of = generations(first, clock)
    before = of.current
    clock.forward(5)
    assert follow(of, routing(backend("a", URLS[0]), keys=(key("t"),))) is None
    assert of.current is before
    with pytest.raises(SettingsError, match="open to everybody"):
        of.next_pool(routing(backend("a", URLS[1])))
    of.refuse("wrong")
    assert (of.current, of.error, of.errors) == (before, "wrong", 1)
    assert follow(of, first) is None
    assert (of.error, of.errors) == (None, 1)
    after = follow(of, routing(backend("a", URLS[1]), keys=(key("t"),)))
    assert after is of.current
    assert (after.number, after.loaded_at, before.number) == (2, clock(), 1)


def test_an_open_gateway_is_not_closed() -> None:
    of = generations(routing(backend("a", URLS[0])))
    with pytest.raises(SettingsError, match="restart it to close it"):
        of.next_pool(routing(backend("a", URLS[0]), keys=(key("t"),)))


def test_limits_are_a_key_s_by_its_name_else_by_its_digest() -> None:
    clock = Clock()
    first = Keys([key("t", "1", requests_per_minute=3), key(None, "2"), key(None, "3")], clock)
    (named, *unnamed) = first.callers
    assert named.limits is not None
    assert Reservation(named.limits, 0).take() is None
    second = Keys([key(None, "3"), key("t", "4", ("m",), requests_per_minute=5), key("new", "5")], clock, first)

    assert second.callers[1].limits is named.limits
    assert list(named.limits.state()) == [("requests_per_minute", 5, 1)]
    assert (named.models, second.callers[1].models) == (None, ("m",))
    assert second.callers[0].id == unnamed[1].id, "whose responses are whose does not depend on the order of keys"
    assert len({caller.id for caller in (*first.callers, *second.callers)}) == 4
    third = Keys([key("t", "4")], clock, second)
    assert third.callers[0].limits is None


def test_until_it_comes_into_force_nothing_changes() -> None:
    first = routing(backend("a", *URLS, max_in_flight=1))
    of = generations(first)
    replicas = of.current.pool.replicas
    assert of.next_pool(routing(backend("a", *URLS[1:]))) is not None
    assert [(each.name, each.max_in_flight) for each in replicas] == [("a-1", 1), ("a-2", 1), ("a-3", 1)]
    assert of.current.number == 1
