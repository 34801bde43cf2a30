from collections import Counter
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.backend.client import own_headers
from gateway.config import load_routing
from gateway.errors import (
    AuthRefused,
    BackendError,
    ConnectionFailed,
    ErrorAnswer,
    InvalidResponse,
    Silent,
    StaleConnection,
    Unreachable,
)
from gateway.policy.backend import Backend
from gateway.policy.breaker import Breaker
from gateway.policy.cooldown import Cooldown
from gateway.policy.endpoint import Endpoint
from gateway.policy.lease import Lease, take
from gateway.policy.pool import Pool, Target
from gateway.policy.replica import SLOW_PROBE, Probe, Replica
from gateway.policy.retry_budget import RetryBudget
from gateway.policy.waiting_room import WaitingLimit
from gateway.settings import load
from tests.unit.gateway.fakes import Chance, Clock, error_answer, pool, pool_of, replica_config, target, trip


def replica(clock: Clock | None = None) -> Replica:
    clock = clock or Clock()
    breaker = Breaker(failures=2, open_seconds=5, open_max=30, clock=clock, draw=lambda: 0.5)
    budget = RetryBudget(ratio=0.2, floor=10, clock=clock)
    home = Backend(
        "a",
        outage_wait=5,
        limit=WaitingLimit(max_requests=1, max_bytes=1),
        clock=clock,
        released=lambda _backend, _number: None,
    )
    return Replica("a", breaker=breaker, cooldown=Cooldown(clock=clock), budget=budget, clock=clock, homes=(home,))


def endpoint(url: str = "http://127.0.0.1:1") -> Endpoint:
    return Endpoint(replica_config("a", url))


def leased(of: Replica) -> Lease:
    lease = take(of, "m")
    assert lease is not None
    return lease


def fail(of: Replica, error: BackendError) -> None:
    end_with(leased(of), error)


def end_with(lease: Lease, error: BackendError) -> None:
    lease.fail(error, "t" * 32, counted=False, body=lambda: b"1", outages={})


def test_of_two_replicas_the_one_with_less_in_flight_is_picked() -> None:
    of = target(Clock(), 2)
    of.replicas[0].in_flight = 3
    of.replicas[1].in_flight = 2

    assert {of.pick("m") for _ in range(50)} == {of.replicas[1]}


def test_equally_loaded_replicas_are_picked_evenly() -> None:
    of = target(Clock(), 2)
    picks = Counter(of.pick("m") for _ in range(1000))

    assert set(picks) == set(of.replicas)
    assert min(picks.values()) > 300  # 12 standard deviations from 500


def test_of_many_replicas_two_are_drawn_and_the_busiest_of_all_never_wins() -> None:
    of = target(Clock(), 4)
    for number, each in enumerate(of.replicas):
        each.in_flight = number
    picks = Counter(of.pick("m") for _ in range(2000))

    assert set(picks) == set(of.replicas[:3])  # the last one loses against each other
    assert picks[of.replicas[0]] > picks[of.replicas[1]] > picks[of.replicas[2]] > 100


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=5))
def test_only_a_replica_that_would_be_admitted_and_is_not_left_out_is_picked(
    replicas: list[tuple[bool, bool, int]],
) -> None:
    of = target(Clock(), len(replicas))
    without = []
    for each, (is_open, left_out, in_flight) in zip(of.replicas, replicas, strict=True):
        each.in_flight = in_flight
        if is_open:
            trip(each)
        if left_out:
            without.append(each)
    able = [
        each for each, (is_open, left_out, _) in zip(of.replicas, replicas, strict=True) if not (is_open or left_out)
    ]

    picked = of.pick("m", without=without)

    assert picked in able if able else picked is None


@pytest.mark.parametrize("replicas", [2, 3, 1000])
def test_where_nothing_speaks_against_a_pair_no_other_replica_is_looked_at(
    replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = target(Clock(), replicas)
    looked_at: list[Replica] = []
    admits = Replica.admits

    def admits_when_looked_at(self: Replica, model: str) -> bool:
        looked_at.append(self)
        return admits(self, model)

    monkeypatch.setattr(Replica, "admits", admits_when_looked_at)
    monkeypatch.setattr(Replica, "why_not", lambda self, _model: looked_at.append(self))
    monkeypatch.setattr(Replica, "lacks", lambda self, _path, _model: looked_at.append(self))

    lease = of.lease("m", last=lambda each: each.lacks("/v1/chat/completions", "m"))

    assert lease is not None
    assert lease.passed_over == ()
    assert len(set(looked_at)) == 2
    looked_at.clear()
    assert not of.refuses("m", "/v1/chat/completions")
    assert len(set(looked_at)) == 1


@pytest.mark.parametrize("replicas", [2, 3, 10])
def test_whoever_was_looked_at_in_vain_is_named_with_the_reason(replicas: int) -> None:
    of = target(Clock(), replicas)
    trip(of.replicas[0])
    of.replicas[-1].max_in_flight = 1 if replicas > 2 else None
    of.replicas[-1].in_flight = 1
    expected = [("a-1", "breaker"), (f"a-{replicas}", "full")][: 1 if replicas == 2 else 2]
    seen = set()
    for _ in range(200):
        lease = of.lease("m")
        assert lease is not None
        assert lease.replica is not of.replicas[0]
        seen.add(lease.passed_over)
        lease.release()

    assert seen == ({tuple(expected)} if replicas < 10 else {tuple(expected), ()})


def test_one_that_comes_last_is_asked_only_where_no_other_one_can_be() -> None:
    of = target(Clock(), 3)
    first, second, third = of.replicas
    for without, expected in (((), {third}), ((third,), {first, second})):
        leases = [of.lease("m", without=without, last=lambda each: each is not third) for _ in range(100)]

        assert {lease.replica for lease in leases if lease is not None} == expected


def test_a_half_open_replica_whose_place_is_taken_is_not_picked() -> None:
    clock = Clock()
    of = target(clock, 1)
    trip(of.replicas[0])
    assert of.pick("m") is None
    clock.forward(6)
    assert of.pick("m") is of.replicas[0]
    lease = leased(of.replicas[0])
    assert of.pick("m") is None
    assert take(of.replicas[0], "m") is None
    lease.release()
    assert of.pick("m") is of.replicas[0]


def test_a_target_comes_back_with_its_first_replica() -> None:
    clock = Clock()
    of = target(clock, 2)
    assert of.retry_in() is None
    trip(of.replicas[0])
    clock.forward(2)
    trip(of.replicas[1])

    assert of.retry_in() == 3


@given(st.lists(st.sampled_from(["succeed", "fail", "neither", "release", "twice"]), max_size=12))
def test_after_any_mix_of_outcomes_nothing_is_in_flight(ends: list[str]) -> None:
    clock = Clock()
    of = replica(clock=clock)
    for end in ends:
        lease = take(of, "m")
        if lease is None:
            clock.forward(40)
            lease = leased(of)
        assert of.in_flight == 1
        if end in {"succeed", "twice"}:
            lease.succeed()
        if end in {"fail", "twice"}:
            end_with(lease, ConnectionFailed("gone"))
        if end == "neither":
            end_with(lease, StaleConnection("dead"))
        lease.release()
        lease.release()
        assert of.in_flight == 0
    clock.forward(40)
    leased(of)  # no half-open place was lost


def test_only_the_first_end_of_an_attempt_counts() -> None:
    of = replica()
    lease = leased(of)
    lease.succeed()
    end_with(lease, ConnectionFailed("gone"))

    assert of.breaker.consecutive_failures == 0
    assert of.last_error is None


@pytest.mark.parametrize("status", [500, 502, 503, 504])
def test_a_failing_server_counts(status: int) -> None:
    of = replica()
    fail(of, error_answer(status, b"{}", {}))

    assert of.breaker.consecutive_failures == 1
    assert of.status == "degraded"


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 501, 505])
def test_a_wrong_request_is_a_well_backend(status: int) -> None:
    clock = Clock(70.0)
    of = replica(clock=clock)
    fail(of, InvalidResponse("cut"))
    fail(of, error_answer(status, b"{}", {}))

    assert of.breaker.consecutive_failures == 0
    assert of.status == "ok"
    assert of.last_success == 70


@pytest.mark.parametrize("error", [error_answer(429, b"{}", {}), error_answer(408, b"{}", {}), AuthRefused("no")])
def test_an_answer_that_helps_nobody_ends_the_row_of_failures_and_shows(error: BackendError) -> None:
    of = replica()
    fail(of, InvalidResponse("cut"))
    fail(of, error)

    assert of.breaker.consecutive_failures == 0
    assert of.status == "degraded"
    assert of.last_error is not None
    assert of.last_error.code == (error.outcome if isinstance(error, ErrorAnswer) else error.code)


def test_a_stale_connection_is_neither_success_nor_failure() -> None:
    of = replica()
    fail(of, InvalidResponse("cut"))
    fail(of, StaleConnection("dead"))

    assert of.breaker.consecutive_failures == 1


def test_the_status_follows_breaker_probe_and_last_attempt() -> None:
    clock = Clock()
    of = replica(clock=clock)
    assert of.status == "ok"
    probe(of, ok=False)
    assert of.status == "degraded"
    probe(of, ok=True)
    assert of.status == "ok"
    fail(of, Unreachable("no"))
    assert of.status == "degraded"
    fail(of, Unreachable("no"))
    assert of.status == "down"
    clock.forward(6)
    assert of.status == "degraded"
    leased(of).succeed()
    assert of.status == "ok"


def probe(of: Replica, *, ok: bool) -> None:
    of.note_probe(Probe(ok=ok, latency=0.1, at=of.clock()))


def test_three_failed_probes_in_a_row_are_down_unless_an_attempt_has_succeeded_since() -> None:
    clock = Clock()
    of = replica(clock=clock)
    for _ in range(2):
        probe(of, ok=False)
        clock.forward(2)
    assert of.status == "degraded"
    leased(of).succeed()
    clock.forward(1)
    probe(of, ok=False)
    assert of.status == "degraded"  # a success came between the first of the three and the last
    clock.forward(2)
    probe(of, ok=False)
    assert of.status == "degraded"
    clock.forward(2)
    probe(of, ok=False)
    assert of.status == "down"  # none came since the first of the last three
    leased(of).succeed()
    assert of.status == "degraded"
    probe(of, ok=True)
    assert of.status == "ok"
    probe(of, ok=False)
    assert of.status == "degraded"


def test_the_last_error_says_what_when_and_where() -> None:
    of = replica(clock=Clock(70.0))
    fail(of, Unreachable("a refused the connection."))

    assert of.last_error is not None
    assert (of.last_error.code, of.last_error.at) == ("backend_connection_error", 70)
    assert (of.last_error.message, of.last_error.trace_id) == ("a refused the connection.", "t" * 32)


@pytest.mark.parametrize(
    ("url", "base", "origin", "host", "port"),
    [
        ("http://h", "http://h/v1", "http://h", "h", 80),
        ("http://h/", "http://h/v1", "http://h", "h", 80),
        ("http://h/v1", "http://h/v1", "http://h", "h", 80),
        ("http://h:8001/v1/", "http://h:8001/v1", "http://h:8001", "h", 8001),
        ("https://h/openai/v1", "https://h/openai/v1", "https://h", "h", 443),
        ("https://h/v1beta/openai", "https://h/v1beta/openai", "https://h", "h", 443),
        ("https://h/api/v3/", "https://h/api/v3", "https://h", "h", 443),
        ("http://h/v1/v1", "http://h/v1/v1", "http://h", "h", 80),
        ("http://h/myv1", "http://h/myv1", "http://h", "h", 80),
        ("http://[::1]:8001/v1", "http://[::1]:8001/v1", "http://[::1]:8001", "::1", 8001),
        ("http://me:s3cret@h:1/v1", "http://h:1/v1", "http://h:1", "h", 1),
    ],
)
def test_a_url_is_a_base_as_the_sdks_take_it(url: str, base: str, origin: str, host: str, port: int) -> None:
    of = endpoint(url)

    assert of.url_of("/v1/chat/completions") == f"{base}/chat/completions"
    assert (of.base, of.origin, of.host, of.port) == (base, origin, host, port)
    assert "s3cret" not in of.shown_url


def test_user_info_is_sent_decoded_and_a_key_wins_over_it() -> None:
    of = endpoint("http://me:p%40ss%3A%C3%A9@h")
    assert own_headers(of) == [("authorization", "Basic bWU6cEBzczrDqQ==")]  # me:p@ss:é
    of.config = replace(of.config, api_key="k3y")
    assert own_headers(of) == [("authorization", "Bearer k3y")]
    of.config = replace(of.config, api_key_header="api-key", headers=(("x", "y"),), secret_headers=(("z", "s"),))
    assert own_headers(of) == [("x", "y"), ("z", "s"), ("api-key", "k3y")]
    of.config = replace(of.config, api_key=None, secret_headers=(("authorization", "Token t"),))
    assert own_headers(of) == [("x", "y"), ("authorization", "Token t")]
    assert own_headers(endpoint()) == []


def with_query(*query: tuple[str, str]) -> Endpoint:
    return Endpoint(replace(replica_config("a", "http://h/base"), query=query))


@pytest.mark.parametrize(
    ("url", "chat", "tokenize"),
    [
        ("http://h", "/v1/chat/completions", "/tokenize"),
        ("http://h/v1/", "/v1/chat/completions", "/tokenize"),
        ("http://h/api/v1", "/api/v1/chat/completions", "/api/tokenize"),
        ("http://h/api/v3", "/api/v3/chat/completions", "/api/v3/tokenize"),
    ],
)
def test_a_path_below_v1_follows_the_base_and_another_stands_beside_its_v1(url: str, chat: str, tokenize: str) -> None:
    of = endpoint(url)
    assert of.target_of("/v1/chat/completions", "") == chat
    assert of.target_of("/tokenize", "") == tokenize
    assert of.url_of("/tokenize") == f"http://h{tokenize}"


def test_the_query_of_a_backend_is_encoded() -> None:
    assert with_query().target_of("/v1/embeddings", "") == "/base/embeddings"
    of = with_query(("api-version", "2024-10-21"), ("a b", "c&d=é"))
    assert of.target_of("/v1/embeddings", "") == "/base/embeddings?api-version=2024-10-21&a%20b=c%26d%3D%C3%A9"


def test_the_query_of_a_backend_wins_over_that_of_a_caller() -> None:
    assert with_query().target_of("/v1/messages", "beta=true&&x=%20") == "/base/messages?beta=true&x=%20"
    of = with_query(("a b", "ours"))
    assert of.target_of("/v1/messages", "a%20b=theirs&a+b=theirs&c=1&a+b") == "/base/messages?c=1&a%20b=ours"
    assert of.target_of("/v1/messages", "a%20b=theirs") == "/base/messages?a%20b=ours"


def limited(of: Target, max_in_flight: int) -> Target:
    """The same target; each of its replicas takes so many attempts at once."""
    for each in of.replicas:
        each.max_in_flight = max_in_flight
    return of


def test_a_full_replica_is_passed_over() -> None:
    of = limited(target(Clock(), 3), 2)
    leases = [leased(chosen) for _ in range(6) if (chosen := of.pick("m")) is not None]

    assert [each.in_flight for each in of.replicas] == [2, 2, 2]
    assert of.pick("m") is None
    assert of.full
    assert take(of.replicas[0], "m") is None
    leases[0].succeed()
    assert of.pick("m") is leases[0].replica
    assert of.retry_in() is None


def test_a_target_whose_breakers_are_open_is_not_full() -> None:
    of = limited(target(Clock(), 1), 1)
    leased(of.replicas[0])
    trip(of.replicas[0])

    assert of.pick("m") is None
    assert not of.full


def routed(tmp_path: Path) -> Pool:
    (tmp_path / "gateway.yaml").write_text(
        dedent("""
            backends: {a: {urls: [http://h, http://i]}, b: {url: http://j}}
            routes:
              - {model: m, targets: [{backend: a}, {backend: b, model: small}]}
              - {model: n, targets: [{backend: b}]}
              - {model: m, targets: [{backend: b}]}
              - {model: "*", targets: [{backend: b}]}
              - {model: late, targets: [{backend: a}]}
        """)
    )
    settings = load(gateway_config=tmp_path / "gateway.yaml", model_name="n")
    return pool_of(load_routing(settings), settings, Clock(), Chance())


def test_the_first_route_that_matches_wins(tmp_path: Path) -> None:
    of = routed(tmp_path)

    assert of.route("m") is of.routes[0]
    assert of.route("n") is of.routes[1]
    assert of.route("anything") is of.routes[3]
    assert of.route("late") is of.routes[3]
    assert [each.name for each in of.replicas] == ["a-1", "a-2", "b"]
    assert [(each.backend, each.model) for each in of.routes[0].targets] == [("a", None), ("b", "small")]


def test_a_replica_is_the_same_in_every_route(tmp_path: Path) -> None:
    of = routed(tmp_path)

    assert of.routes[0].targets[1].replicas == of.routes[1].targets[0].replicas == of.replicas[2:]


def test_models_are_the_named_routes_and_the_default_one_each_once(tmp_path: Path) -> None:
    assert routed(tmp_path).models == ("m", "n", "late")
    assert pool(Clock(), {"a": 1}).models == ("demo-model",)


def test_what_the_backends_of_a_route_for_all_list_is_in_its_place_each_once(tmp_path: Path) -> None:
    of = with_routes(
        tmp_path,
        "[{model: m, targets: [{backend: a}]}, {model: '*', targets: [{backend: b}, {backend: a, model: tiny}]}, "
        "{model: 'n-*', targets: [{backend: a}]}]",
    )
    assert [each.name for each in of.listing] == ["b"]
    assert (of.default_model, of.models) == ("demo-model", ("m", "demo-model"))

    of.note_models(of.listing[0], ("org/x:1b", "m"))

    assert (of.default_model, of.models) == ("org/x:1b", ("m", "org/x:1b"))


def test_the_default_model_is_the_first_that_any_replica_lists_unless_one_is_configured(tmp_path: Path) -> None:
    of = pool(Clock(), {"a": 2})
    first, second = of.listing
    of.note_models(second, ("late",))
    assert (of.default_model, of.models) == ("late", ("late",))
    of.note_models(first, ("early", "late"))
    assert (of.default_model, of.models) == ("early", ("early", "late"))
    of.note_models(first, ())
    assert (of.default_model, of.models) == ("late", ("late",))

    named = routed(tmp_path)
    (b,) = named.listing
    named.note_models(b, ("x",))
    assert (named.default_model, named.models) == ("n", ("m", "n", "x", "late"))


def test_a_listed_model_is_the_default_only_where_it_leads_to_the_route_for_all(tmp_path: Path) -> None:
    of = with_routes(
        tmp_path,
        "[{model: m, targets: [{backend: a}]}, {model: 'gpt-*', targets: [{backend: a}]}, "
        "{model: '*', targets: [{backend: b}]}, {model: 'late-*', targets: [{backend: a}]}]",
    )
    of.note_models(of.listing[0], ("gpt-4", "m", "late-1", "own"))
    assert (of.default_model, of.models) == ("late-1", ("m", "late-1", "gpt-4", "own"))

    of.note_models(of.listing[0], ("gpt-4", "m"))
    assert (of.default_model, of.models) == ("demo-model", ("m", "demo-model", "gpt-4"))


@pytest.mark.parametrize(
    ("models", "backends"),
    [
        (None, ["a", "b", "c"]),
        (("m",), ["a"]),
        (("gpt-4",), ["b"]),
        (("gpt-4", "m"), ["a", "b"]),
        (("other",), ["c"]),
        (("gp*",), ["b", "c"]),
        (("gpt-4*",), ["b"]),
        (("x*",), ["c"]),
        (("*",), ["a", "b", "c"]),
    ],
)
def test_the_backends_that_a_key_may_reach_are_those_of_routes_for_its_models(
    tmp_path: Path, models: tuple[str, ...] | None, backends: list[str]
) -> None:
    of = with_routes(
        tmp_path,
        "[{model: m, targets: [{backend: a}]}, {model: 'gpt-*', targets: [{backend: b}]}, "
        "{model: '*', targets: [{backend: c}]}]",
    )
    assert [target.backend for target in of.backends_for(models)] == backends


def test_a_key_for_models_of_no_route_reaches_no_backend(tmp_path: Path) -> None:
    of = with_routes(tmp_path, "[{model: m, targets: [{backend: a}]}]")
    assert of.backends_for(("other", "x*")) == ()


def test_without_a_match_there_is_no_route(tmp_path: Path) -> None:
    of = routed(tmp_path)
    of.routes = of.routes[:2]

    assert of.route("other") is None
    assert of.route("*") is None


def with_routes(tmp_path: Path, routes: str, rng: Chance | None = None) -> Pool:
    (tmp_path / "gateway.yaml").write_text(
        f"backends: {{a: {{url: http://h}}, b: {{url: http://i}}, c: {{url: http://j}}}}\nroutes: {routes}"
    )
    settings = load(gateway_config=tmp_path / "gateway.yaml")
    return pool_of(load_routing(settings), settings, Clock(), rng or Chance())


CANARY = (
    "[{model: m, targets: [{backend: a, model: spare, weight: 0}, "
    "{backend: a, weight: 9}, {backend: b, model: new, weight: 1}]}]"
)


@pytest.mark.parametrize(
    ("draw", "order"), [(0.0, [1, 0, 2]), (0.89, [1, 0, 2]), (0.9, [2, 0, 1]), (0.999999999, [2, 0, 1])]
)
def test_the_first_target_is_drawn_and_the_others_follow_in_their_order(
    tmp_path: Path, draw: float, order: list[int]
) -> None:
    (route,) = with_routes(tmp_path, CANARY, Chance(draw)).routes

    assert route.weighted
    assert route.order() == tuple(route.targets[n] for n in order)


def test_weights_are_shares_of_the_requests(tmp_path: Path) -> None:
    (route,) = with_routes(tmp_path, CANARY).routes
    first = Counter(route.order()[0] for _ in range(10_000))

    assert set(first) == set(route.targets[1:])
    assert 850 < first[route.targets[2]] < 1150  # 5 standard deviations


def test_without_weights_nothing_is_drawn(tmp_path: Path) -> None:
    (route,) = with_routes(tmp_path, "[{model: m, targets: [{backend: a}, {backend: b}]}]").routes

    assert not route.weighted
    assert route.order() is route.targets


def test_a_prefix_matches_the_names_that_begin_with_it_and_is_no_model(tmp_path: Path) -> None:
    of = with_routes(
        tmp_path,
        "[{model: qwen-max, targets: [{backend: a}]}, {model: 'qwen-*', targets: [{backend: b}]}, "
        "{model: m, targets: [{backend: a}]}]",
    )

    assert of.route("qwen-max") is of.routes[0]
    assert of.route("qwen-") is of.routes[1]
    assert of.route("qwen-3/8b") is of.routes[1]
    assert of.route("qwen") is None
    assert of.route("my-qwen-3") is None
    assert of.models == ("qwen-max", "m")
    assert of.listing == ()


def test_a_good_probe_that_was_slow_ends_the_open_time_of_a_backend_that_was_frozen() -> None:
    for latency, state in ((0.1, "open"), (SLOW_PROBE, "half_open")):
        clock = Clock()
        of = replica(clock=clock)
        fail(of, Silent("late", timer="answer"))
        fail(of, Silent("late", timer="answer"))
        of.note_probe(Probe(ok=True, latency=latency, at=clock()))
        assert of.breaker.state == state
