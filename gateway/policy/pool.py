"""The pool: all backends and routes of one generation, and which replica is asked next."""

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from gateway.policy.backend import Backend
from gateway.policy.breaker import Breaker, State
from gateway.policy.cooldown import Cooldown
from gateway.policy.endpoint import Endpoint
from gateway.policy.fingerprints import Repeats
from gateway.policy.guard import Guard, target_name
from gateway.policy.lease import take
from gateway.policy.replica import Replica
from gateway.policy.response_homes import ResponseHomes
from gateway.policy.retry_budget import RetryBudget

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from random import Random

    from gateway.config import BackendConfig, RouteConfig, Routing, TargetConfig
    from gateway.policy.guard import Trip, Watch
    from gateway.policy.lease import Lease
    from gateway.policy.response_homes import Home
    from gateway.policy.waiting_room import WaitingLimit
    from gateway.settings import Settings

ANY = "*"
"""The model of a route for all of them."""
DEFAULT_MODEL = "demo-model"
"""The mock model's."""


class Candidate(NamedTuple):
    """What is remembered of a target: the names of its backend, model and replicas, and its weight."""

    backend: str
    model: str | None
    weight: int | None
    replicas: tuple[str, ...]

    @property
    def name(self) -> str:
        """For people, as the guard's watch has it."""
        return target_name(self.backend, self.model)


class Target:
    """A backend, and the model to ask it for; None keeps the caller's.

    Attributes:
        backend: its name; home: itself.
        endpoints: how each of its replicas is asked.
        replicas: of the backend.
        weight: its share of the route's requests; None where the route has none.
        labels: where it has, the names by which its attempts are counted: of the route, the backend and the model.
        watch: of the route's guard; None where nobody watches.
        candidate: what records keep of it.
    """

    __slots__ = ("_rng", "backend", "candidate", "endpoints", "home", "labels", "model", "replicas", "watch", "weight")

    def __init__(
        self,
        home: Backend,
        endpoints: "Mapping[Replica, Endpoint]",
        model: str | None,
        rng: "Random",
        weight: int | None = None,
        *,
        labels: tuple[str, str, str] | None = None,
        watch: "Watch | None" = None,
    ) -> None:
        self.home = home
        self.backend = home.name
        self.model = model
        self.endpoints = endpoints
        self.replicas = tuple(endpoints)
        self.weight = weight
        self.labels = labels
        self.watch = watch
        self.candidate = Candidate(home.name, model, weight, tuple(replica.name for replica in self.replicas))
        self._rng = rng

    def only(self, replica: Replica) -> "Target":
        """Return the same with one of its replicas alone, with whose outages and waiting rooms it waits."""
        if len(self.replicas) == 1:
            return self
        endpoints = {replica: self.endpoints[replica]}
        return Target(replica.alone, endpoints, self.model, self._rng, labels=self.labels, watch=self.watch)

    @property
    def has_tripped(self) -> bool:
        """Whether the guard has taken its traffic."""
        return self.watch is not None and self.watch.trip is not None

    @property
    def full(self) -> bool:
        """Whether a replica would be asked if it had not as many attempts under way as it may have."""
        return any(replica.full and replica.breaker.admits for replica in self.replicas)

    @property
    def connect_timeout(self) -> float:
        """Seconds for a connection: with less of the deadline left, an attempt makes no sense."""
        return self.endpoints[self.replicas[0]].timeouts.connect

    def pick(self, model: str, *, without: "Collection[Replica]" = ()) -> Replica | None:
        """Return a replica that admits an attempt for the model, or None.

        It is the less busy of two random ones (the power of two choices). One that is avoided comes after all others.
        """
        return (self._at_once(model) if not without else None) or self._among_all(model, without)

    def lease(
        self, model: str, *, without: "Collection[Replica]" = (), last: "Callable[[Replica], bool] | None" = None
    ) -> "Lease | None":
        """Take a place for an attempt for the model, at a replica as `pick` gives it; None: no other one admits it.

        Args:
            model: that is asked for.
            without: replicas that are not asked.
            last: tells of a replica whether it is asked only where no other one can be; None: of none.
        """
        replica = self._at_once(model, last) if not without else None
        if replica is not None:
            return take(replica, model)
        replica = self._among_all(model, without, last)
        return self.take(replica, model) if replica is not None else None

    def take(self, replica: Replica, model: str, *, trial: bool = False) -> "Lease | None":
        """Take a place at one of its replicas, as `lease.take` does; the lease says why the others were passed over."""
        lease = take(replica, model, trial=trial)
        if lease is not None:
            others = (other for other in self.replicas if other is not replica)
            lease.passed_over = tuple((each.name, why) for each in others if (why := each.why_not(model)) is not None)
        return lease

    def _at_once(self, model: str, last: "Callable[[Replica], bool] | None" = None) -> Replica | None:
        """Return the less busy of two random replicas if nothing speaks against either; no other one is looked at."""
        if len(self.replicas) == 1:
            return self.replicas[0] if self.replicas[0].admits(model) else None
        pair = self.replicas if len(self.replicas) == 2 else self._rng.sample(self.replicas, 2)  # noqa: PLR2004
        for each in pair:
            if each.why_not(model) is not None or (last is not None and last(each)):
                return None
        return self._less_busy(*pair)

    def _among_all(
        self, model: str, without: "Collection[Replica]", last: "Callable[[Replica], bool] | None" = None
    ) -> Replica | None:
        """Return the less busy of two random ones of the replicas against which least speaks."""
        free = [each for each in self.replicas if each not in without and each.admits(model)]
        if last is not None and len(free) > 1:
            free = [each for each in free if not last(each)] or free
        if len(free) > 1:
            free = [each for each in free if not each.is_avoided(model)] or free
        if len(free) > 2:  # noqa: PLR2004
            free = self._rng.sample(free, 2)
        if len(free) == 2:  # noqa: PLR2004
            return self._less_busy(*free)
        return free[0] if free else None

    def refuses(self, model: str, path: str) -> bool:
        """Return whether each replica that admits an attempt refused our key, model or path a short time ago.

        One that has never been probed is not preferred to others either.
        """
        refused = False
        for replica in self.replicas:
            if replica.admits(model):
                refused = replica.awaits_probe or replica.refuses(model) or replica.lacks(path, model)
                if not refused:
                    return False
        return refused

    def free_at(self, model: str, now: float, *, without: "Collection[Replica]" = ()) -> float | None:
        """Return the instant at which the first replica admits an attempt: `now` when one does.

        None while all breakers are open.
        """
        return min(
            (
                replica.cooldown.due(model) or now
                for replica in self.replicas
                if replica not in without and replica.breaker.admits and not replica.full
            ),
            default=None,
        )

    def cooling_until(self, model: str) -> float | None:
        """Return the instant at which the first cooldown of a replica ends; None when none cools."""
        ends = [end for replica in self.replicas if (end := replica.cooldown.due(model)) is not None]
        return min(ends, default=None)

    def retry_in(self) -> float | None:
        """Return the seconds until a replica admits an attempt again; None when no breaker is open."""
        waits = [wait for replica in self.replicas if (wait := replica.breaker.retry_in) is not None]
        return min(waits, default=None)

    def _less_busy(self, first: Replica, second: Replica) -> Replica:
        if first.in_flight == second.in_flight:
            return first if self._rng.random() < 0.5 else second  # noqa: PLR2004
        return first if first.in_flight < second.in_flight else second


class Route:
    """A model name, the beginning of names (`name-*`) or all of them (`*`), and its targets.

    Attributes:
        model: as configured.
        targets: in their order.
        weighted: whether the first one is drawn for each request.
        guard: takes the traffic of a target that fails too often; None: nobody does.
    """

    __slots__ = ("_prefix", "_rng", "_total", "guard", "model", "targets", "weighted")

    def __init__(self, model: str, targets: tuple[Target, ...], rng: "Random", guard: Guard | None = None) -> None:
        self.model = model
        self.targets = targets
        self.guard = guard
        self._prefix = model[:-1] if model.endswith("*") else None
        self._total = sum(target.weight or 0 for target in targets)
        self.weighted = self._total > 0
        self._rng = rng

    @property
    def watches(self) -> "Sequence[Watch]":
        """Those of the guard; none without one."""
        return self.guard.watches if self.guard is not None else ()

    @property
    def names_a_model(self) -> bool:
        """Whether it is for one model, by its name."""
        return self._prefix is None

    def matches(self, model: str) -> bool:
        """Return whether it is for this model."""
        return model == self.model if self._prefix is None else model.startswith(self._prefix)

    def overlaps(self, beginning: str) -> bool:
        """Return whether it is for a model whose name begins so."""
        if self._prefix is None:
            return self.model.startswith(beginning)
        return self._prefix.startswith(beginning) or beginning.startswith(self._prefix)

    def order(self) -> tuple[Target, ...]:
        """Return the targets in the order in which one request tries them.

        With weights the first one is drawn, and the others follow in their order; after them what has lost its traffic:
        a caller may still be better off with it than with an error.
        """
        if not self.weighted:
            return self.targets
        targets, total = self.targets, self._total
        if self.guard is not None and self.guard.lost:
            targets = tuple(sorted(targets, key=lambda target: target.has_tripped))
            total = sum(target.weight or 0 for target in targets if not target.has_tripped)
        left = self._rng.random() * total
        for drawn in targets:
            left -= drawn.weight or 0
            if left < 0:
                break
        return (drawn, *(target for target in targets if target is not drawn))


class Maker:
    """Makes the parts of pools, one generation after the other.

    Args:
        settings: of breakers, budgets and outages.
        clock: seconds, monotonic.
        rng: draws replicas.
        waiting: of all requests that wait.
        breaker_changed: called with (replica, old, new) at each change of a breaker's state.
        cooldown_begun: called with (replica, model, seconds).
        released: called with (name of a backend, number) when requests that waited are released.
        guard_tripped: called when a guard takes a target's traffic.

    Attributes:
        model_name: the model of a request that names none, as configured; None: it is not.
    """

    def __init__(
        self,
        settings: "Settings",
        *,
        clock: "Callable[[], float]",
        rng: "Random",
        waiting: "WaitingLimit",
        breaker_changed: "Callable[[Replica, State, State], None]",
        cooldown_begun: "Callable[[Replica, str, float], None]",
        released: "Callable[[str, int], None]",
        guard_tripped: "Callable[[Trip], None]" = lambda _trip: None,
    ) -> None:
        self.model_name = settings.model_name
        self._settings = settings
        self._clock = clock
        self._rng = rng
        self._waiting = waiting
        self._breaker_changed = breaker_changed
        self._cooldown_begun = cooldown_begun
        self._released = released
        self._guard_tripped = guard_tripped

    def backend(self, name: str) -> Backend:
        """Return a new backend, or what is one replica of it alone."""
        return Backend(
            name,
            outage_wait=self._settings.gateway_outage_wait,
            limit=self._waiting,
            clock=self._clock,
            released=self._released,
        )

    def replica(self, id_: str, name: str, homes: tuple[Backend, ...]) -> Replica:
        """Return a new replica."""
        settings, clock = self._settings, self._clock
        breaker_changed, cooldown_begun = self._breaker_changed, self._cooldown_begun
        replica: Replica = Replica(
            name,
            breaker=Breaker(
                failures=settings.gateway_breaker_failures,
                open_seconds=settings.gateway_breaker_open_seconds,
                open_max=settings.gateway_breaker_open_max,
                clock=clock,
                draw=self._rng.random,
                changed=lambda old, new: breaker_changed(replica, old, new),
            ),
            cooldown=Cooldown(
                clock=clock,
                begun=lambda model, seconds: cooldown_begun(replica, model, seconds),
                changed=lambda model, over: replica.cooldown_changed(model, over),  # noqa: PLW0108 - it is not there yet
            ),
            budget=RetryBudget(ratio=settings.gateway_retry_budget, floor=settings.gateway_retry_floor, clock=clock),
            clock=clock,
            homes=homes,
            id_=id_,
        )
        return replica

    def repeats(self) -> Repeats:
        """Return a new memory of the requests that failed lately."""
        return Repeats(self._clock)

    def route(
        self, config: "RouteConfig", backends: "Mapping[str, tuple[Backend, Mapping[Replica, Endpoint]]]"
    ) -> Route:
        """Return a route over backends; its guard watches the targets that are to get traffic."""
        guard = self._guard(config)

        def target(each: "TargetConfig") -> Target:
            labels = (config.model, each.backend, each.model or config.model) if each.weight is not None else None
            watch = guard.watch(each.backend, each.model) if guard is not None and each.weight else None
            home, endpoints = backends[each.backend]
            return Target(home, endpoints, each.model, self._rng, each.weight, labels=labels, watch=watch)

        return Route(config.model, tuple(map(target, config.targets)), self._rng, guard)

    def whole(self, home: Backend, endpoints: "Mapping[Replica, Endpoint]") -> Target:
        """Return all of a backend as a target that keeps the caller's model."""
        return Target(home, endpoints, None, self._rng)

    def _guard(self, config: "RouteConfig") -> Guard | None:
        """Return a new guard, where a route has one."""
        if config.guard is None:
            return None
        return Guard(
            config.model,
            max_error_rate=config.guard.max_error_rate,
            window=config.guard.window,
            min_requests=config.guard.min_requests,
            clock=self._clock,
            tripped=self._guard_tripped,
        )


class Pool:
    """All replicas and routes of one generation.

    What is known about a replica outlives generations, as long as its backend's name and its url stay: only how it is
    asked is new. The same holds for a backend as a whole, and its waiting rooms, as long as it has the same replicas.

    Args:
        routing: backends and routes.
        maker: of their parts.
        before: the generation before; None: there is none.

    Attributes:
        default_model: the model of a request that names none: the configured one, else the first that is listed.
        models: those that routes name, in order; in place of `*` the default one and what its backends list.
        listing: the replicas whose lists of models count: those of a `*` route's targets that keep the caller's model.
        repeats: the requests that failed lately, in all generations.
        homes: by name each backend as a whole, and how its replicas are asked.
        endpoints: how each replica of all backends is asked, in order.
        replicas: those.
        backends: those of all routes in their order, each once, as targets that keep the caller's model.
        responses: where stored responses live, of all generations.
        routes: the first one that matches wins.
    """

    def __init__(self, routing: "Routing", maker: Maker, before: "Pool | None" = None) -> None:
        self._model_name = maker.model_name
        self.repeats: Repeats = before.repeats if before is not None else maker.repeats()
        self.responses: ResponseHomes = before.responses if before is not None else ResponseHomes()
        self._new_home = maker.backend
        homes = before.homes if before is not None else {}
        self._new: set[Replica] = set()

        def backend(config: "BackendConfig") -> tuple[Backend, dict[Replica, Endpoint]]:
            endpoints = [Endpoint(each) for each in config.replicas]
            ids = _ids(config.name, endpoints)
            whole, known = homes.get(config.name, (None, {}))
            if whole is None or {replica.id for replica in known} != set(ids):
                whole = maker.backend(config.name)
            by_id = {replica.id: replica for replica in known}
            made: dict[Replica, Endpoint] = {}
            for id_, each in zip(ids, endpoints, strict=True):
                replica = by_id.get(id_)
                if replica is None:
                    own = (maker.backend(config.name), whole) if len(ids) > 1 else (whole,)
                    replica = maker.replica(id_, each.name, own)
                    self._new.add(replica)
                    replica.awaits_probe = before is not None and each.config.probe is not None
                known_as = known.get(replica)
                made[replica] = known_as if known_as is not None and known_as.config == each.config else each
            return whole, made

        backends = {each.name: backend(each) for each in routing.backends}

        self.homes: dict[str, tuple[Backend, dict[Replica, Endpoint]]] = backends
        self.endpoints: dict[Replica, Endpoint] = {}
        for _, endpoints in backends.values():
            self.endpoints |= endpoints
        self.replicas = tuple(self.endpoints)
        self.routes = tuple(maker.route(each, backends) for each in routing.routes)
        routed = dict.fromkeys(target.backend for route in self.routes for target in route.targets)
        self.backends = tuple(maker.whole(*backends[name]) for name in routed)
        for_all = [target for route in self.routes if route.model == ANY for target in route.targets]
        asked = (replica for target in for_all if target.model is None for replica in target.replicas)
        self.listing = tuple(dict.fromkeys(asked))
        self.default_model: str
        self.models: tuple[str, ...]
        self._set_models()
        if before is None:
            self.take_over()

    def take_over(self) -> None:
        """Come into force: what stays of the generation before is called and limited as this one says.

        Until then nothing of that one has changed.
        """
        for whole, endpoints in self.homes.values():
            for replica, endpoint in endpoints.items():
                replica.name = endpoint.name
                replica.max_in_flight = endpoint.config.max_in_flight
                if replica.backend is not whole:
                    self._move(replica, whole, endpoints)
                replica.freed()  # more attempts at once may be allowed now
        self._set_models()

    def _move(self, replica: Replica, whole: Backend, siblings: "Collection[Replica]") -> None:
        """Have a replica that stays speak for its backend as it is now, which other replicas have joined or left.

        An outage goes on where nobody has come who may answer.
        """
        alone, was = replica.alone, replica.backend
        if self._new.isdisjoint(siblings):
            whole.outage.go_on_from(was.outage)
        if alone is was and len(siblings) > 1:
            alone = self._new_home(whole.name)
            alone.outage.go_on_from(was.outage)
        replica.settle_in(*((alone, whole) if len(siblings) > 1 else (whole,)))

    def route(self, model: str) -> Route | None:
        """Return the first route that matches the model, or None."""
        for route in self.routes:
            if route.matches(model):
                return route
        return None

    def backends_for(self, models: tuple[str, ...] | None) -> tuple[Target, ...]:
        """Return those of `backends` to which a route leads from one of the models; None: from any."""
        if models is None:
            return self.backends
        homes = {target.home for model in models for route in self._routes_of(model) for target in route.targets}
        return tuple(target for target in self.backends if target.home in homes)

    def _routes_of(self, model: str) -> list[Route]:
        """Return the routes of a model, or of those whose names begin so (`name-*`)."""
        if not model.endswith(ANY):
            return [route for route in (self.route(model),) if route is not None]
        found = []
        for route in self.routes:
            if route.overlaps(model[:-1]):
                found.append(route)
            if not route.names_a_model and route.matches(model[:-1]):
                break  # it takes them all
        return found

    def home_target(self, home: "Home", model: str, route: Route | None) -> Target | None:
        """Return the target that asks the home of a stored response alone; None when it is not there.

        Args:
            home: of the response.
            model: of the call.
            route: of the model: the target of it that made the response, else another one for the same replica. None:
                whatever the routes are.
        """
        targets = self.backends if route is None else route.targets
        able = [target.only(replica) for target in targets for replica in target.replicas if replica.id == home.replica]
        return next((target for target in able if (target.model or model) == home.model), able[0] if able else None)

    def note_models(self, replica: Replica, names: tuple[str, ...]) -> None:
        """Take in what a replica lists; its names stay while it cannot be asked."""
        if names != replica.models:
            replica.models = names
            self._set_models()

    def _is_for_all(self, model: str) -> bool:
        """Return whether a model goes to the route for all of them."""
        route = self.route(model)
        return route is not None and route.model == ANY

    def _set_models(self) -> None:
        listed = [name for replica in self.listing for name in replica.models or ()]
        # What nobody asked for may lead nowhere else than to where it is listed.
        self.default_model = self._model_name or next(filter(self._is_for_all, listed), DEFAULT_MODEL)
        names: list[str] = []
        for route in self.routes:
            if route.names_a_model:
                names.append(route.model)
            elif route.model == ANY:
                names += [self.default_model, *listed]
        self.models = tuple(dict.fromkeys(names))


def _ids(backend: str, endpoints: "Sequence[Endpoint]") -> list[str]:
    """Return what the replicas of a backend are known by in all generations: its name and their urls.

    Names of replicas do not serve: those of the others change when one in the middle goes. Nor does what user info the
    url holds: it is a key, which changes.
    """
    times: Counter[str] = Counter()
    ids = []
    for endpoint in endpoints:
        url = endpoint.shown_url
        times[url] += 1
        ids.append(f"{backend} {url}" + (f" {times[url]}" if times[url] > 1 else ""))
    return ids
