"""The parts of a running application, built once and handed to each other."""

from random import Random
from typing import TYPE_CHECKING, Any

from gateway.backend.client import HttpClient
from gateway.day_store import DayStore
from gateway.executor import Executor
from gateway.files import Files
from gateway.forwarding.attempt import Attempts
from gateway.forwarding.charge import Charges
from gateway.forwarding.forwarder import Forwarder
from gateway.generation import Generations
from gateway.health import Health
from gateway.kept_requests import SLOW, KeptRequests
from gateway.limits_store import LimitsStore
from gateway.model_lists import ModelLists
from gateway.policy.admission import Admission
from gateway.policy.breaker import State
from gateway.policy.byte_budget import ByteBudget
from gateway.policy.pool import Maker, Pool
from gateway.policy.retry import RetryPolicy
from gateway.reload import Reload
from gateway.response_hints import ResponseHints
from gateway.server.admin import AdminCalls
from gateway.server.connections import Connections, connections_allowed
from gateway.server.handlers import Handlers
from gateway.server.in_flight import InFlight
from gateway.server.keys import Keys
from gateway.server.live_page import LivePage
from gateway.server.middleware import Middleware
from gateway.server.request_calls import RequestCalls
from gateway.server.request_reader import RequestReader
from gateway.ui.snapshot import Snapshot
from gateway.workers.parent_store import HINTS, SESSIONS, ParentStore

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Routing
    from gateway.generation import Generation
    from gateway.policy.guard import Trip
    from gateway.policy.replica import Replica
    from gateway.reload import Read
    from gateway.settings import Settings
    from gateway.store import Store
    from gateway.telemetry import Telemetry
    from gateway.valkey import Valkey
    from gateway.workers.worker import Worker


class Parts:
    """The parts of a running application, built once.

    Attributes:
        admission: told to drain when the server stops.
        byte_budget: the bytes held for all requests.
        connections: of callers.
        keepalive_timeout: seconds that one of them may be idle.
        in_flight: the requests in flight.
        generations: the configuration in force: replicas, routes and keys.
        reload: reads it anew.
        client: sends calls to backends.
        executor: looks into large bodies and answers.
        limits: keeps the limits of keys beyond this process: in a store that instances share, or those of a day.
        valkey: by which instances share limits and hints; None without one.
        hints: tells other instances where stored responses live; None without a store.
        health: probes, and the document of `/health`.
        model_lists: asks for the models of backends.
        charges: what requests count for the limits of tokens.
        handlers, middleware: of the routes.
        admin: lets admin calls through.
        live_page: the page for people; told to close when the server stops.
        kept_requests: the last ones; request_calls: the handlers that explain them.
        write_timeout: seconds; of `Runner`.
        telemetry: traces, metrics, logs.
    """

    def __init__(
        self,
        settings: "Settings",
        routing: "Routing",
        telemetry: "Telemetry",
        client: HttpClient,
        *,
        read: "Read",
        files: Files,
        clock: "Callable[[], float]",
        wall_clock: "Callable[[], float]",
        rng: Random,
        worker: "Worker | None" = None,
    ) -> None:
        self._worker = worker
        self._clock = clock
        self.telemetry = telemetry
        self.client = client
        self.executor = Executor()
        self.connections = Connections(
            connections_allowed(settings.gateway_max_connections, settings.gateway_max_in_flight),
            telemetry.metrics.connection_closed,
        )
        self.keepalive_timeout = settings.gateway_keepalive_timeout
        self.write_timeout = settings.gateway_write_timeout
        self.in_flight = InFlight(self.connections, worker.in_flight if worker is not None else None)
        self.admission = Admission(
            max_in_flight=settings.gateway_max_in_flight,
            max_queue=settings.gateway_max_queue,
            queue_timeout=settings.gateway_queue_timeout,
            max_buffered=settings.gateway_max_buffered_bytes,
        )
        self.byte_budget = ByteBudget(settings.gateway_max_buffered_bytes)
        epoch = wall_clock() - clock()  # the clock of limits goes on, whatever the machine's is set to

        def limits_clock() -> float:
            return epoch + clock()

        maker = Maker(
            settings,
            clock=clock,
            rng=rng,
            waiting=self.admission.waiting,
            breaker_changed=self._breaker_changed,
            cooldown_begun=self._cooldown_begun,
            released=telemetry.released,
            guard_tripped=self._guard_tripped,
        )

        def pool(routing: "Routing", before: Pool | None) -> Pool:
            return Pool(routing, maker, before)

        def keys(routing: "Routing", before: Keys | None) -> Keys:
            return Keys(routing.keys, clock, before, epoch=epoch)

        self.generations = generations = Generations(routing, pool=pool, keys=keys, clock=clock)
        forwarder = Forwarder(
            admission=self.admission,
            policy=RetryPolicy(settings, rng),
            attempts=Attempts(settings, client=client, executor=self.executor, clock=clock, rng=rng),
            repeats=self.pool.repeats,
            executor=self.executor,
            clock=clock,
            retry_allowed=telemetry.metrics.retry_allowed,
            retry_refused=telemetry.metrics.retry_refused,
        )
        self.valkey = _valkey(routing.limits_url)
        store, share = _store(self.valkey, worker, settings)
        self.hints = ResponseHints(store, self.pool.responses, limits_clock) if store is not None else None
        self.limits: DayStore | LimitsStore
        if store is None:
            self.limits = DayStore(settings.gateway_state_dir, self.keys.callers, limits_clock)
        else:
            self.limits = LimitsStore(store, self.keys.callers, share, limits_clock, self.admission.look_again)
        self.health = Health(
            settings,
            generations=generations,
            client=client,
            admission=self.admission,
            telemetry=telemetry,
            limits=self.limits,
            clock=clock,
        )
        self.model_lists = ModelLists(
            generations=generations, client=client, byte_budget=self.byte_budget, executor=self.executor, clock=clock
        )
        self.charges = Charges(self.executor, clock)
        self.handlers = Handlers(
            settings,
            generations=generations,
            reader=RequestReader(settings, self.executor, clock),
            admission=self.admission,
            byte_budget=self.byte_budget,
            charges=self.charges,
            forwarder=forwarder,
            hints=self.hints,
            health=self.health,
            telemetry=telemetry,
            clock=clock,
            siblings=worker,
        )
        slow = settings.gateway_trace_keep_slow
        self.kept_requests = KeptRequests(settings.gateway_kept_requests, slow=slow if slow != "off" else SLOW)
        self.request_calls = RequestCalls(self.kept_requests, self.in_flight, clock, worker)
        self.middleware = Middleware(
            generations=generations,
            admission=self.admission,
            in_flight=self.in_flight,
            kept=self.kept_requests,
            telemetry=telemetry,
            clock=clock,
        )
        self.admin = AdminCalls(
            routing.admin_key,
            clock=clock,
            hidden=self.middleware.recorded(self.handlers.hidden),
            siblings=ParentStore(worker, SESSIONS) if worker is not None else None,
        )
        snapshot = Snapshot(
            health=self.health,
            metrics=telemetry.metrics,
            admission=self.admission,
            callers=lambda: generations.current.keys.callers,
            wall_clock=wall_clock,
        )
        self.live_page = LivePage(
            snapshot,
            admission=self.admission,
            admits=self.admin.admits,
            mock_control=settings.gateway_ui_mock_control,
            clock=clock,
            siblings=worker,
        )
        telemetry.metrics.watch(generations, self.admission, self.byte_budget, self.connections)
        self.reload = Reload(read, files=files, generations=generations, changed=self._follow)
        telemetry.metrics.watch_limits(lambda: self.limits.status == "degraded")
        if worker is not None:
            self.admission.short = self.byte_budget.short = worker.short

    @property
    def pool(self) -> Pool:
        """The replicas and routes in force."""
        return self.generations.current.pool

    @property
    def keys(self) -> Keys:
        """The keys in force."""
        return self.generations.current.keys

    def _follow(self, generation: "Generation") -> None:
        """Have every part that knows replicas, routes or keys know those of a new generation."""
        self.health.follow(generation.pool)
        self.model_lists.follow(generation.pool)
        if self.valkey is not None and generation.routing.limits_url is not None:
            self.valkey.follow(generation.routing.limits_url)
        self.limits.follow(generation.keys.callers)
        self.admission.look_again()
        self.client.follow(generation.pool.endpoints.values())
        self.charges.follow({route.model for route in generation.pool.routes})
        self.telemetry.metrics.follow(generation)
        self.admin.set_key(generation.routing.admin_key)

    def _breaker_changed(self, replica: "Replica", old: "State", new: "State") -> None:
        self.telemetry.breaker_changed(replica.name, old, new)
        self.health.breaker_changed(replica, new)
        if self._worker is not None and new is State.OPEN:
            self._worker.tell("hint", ["breaker", replica.id])

    def _guard_tripped(self, trip: "Trip") -> None:
        if not any(watch.trip is trip for route in self.pool.routes for watch in route.watches):
            return  # of a generation before, whose last requests say nothing about this one
        self.telemetry.guard_tripped(trip)
        if self._worker is not None:
            self._worker.tell("hint", self._hint_of(trip))

    def tell_trips(self, number: int) -> None:
        """Tell another worker, which has just begun, which targets have lost their traffic."""
        for watch in [watch for route in self.pool.routes for watch in route.watches]:
            if watch.trip is not None and self._worker is not None:
                self._worker.tell("hint_to", [number, self._hint_of(watch.trip)])

    def _hint_of(self, trip: "Trip") -> list[Any]:
        """Return what others with the same configuration take a trip from."""
        age = self._clock() - trip.at
        fingerprint = self.generations.current.fingerprint
        return ["guard", fingerprint, trip.route, (trip.target, trip.error_rate, trip.requests, age)]

    def _cooldown_begun(self, replica: "Replica", model: str, seconds: float) -> None:
        self.telemetry.cooldown_begun(replica.name, seconds)
        if self._worker is not None:
            self._worker.tell("hint", ["cooldown", replica.id, model, seconds])


def _valkey(url: str | None) -> "Valkey | None":
    if url is None:
        return None
    from gateway.valkey import Valkey  # noqa: PLC0415 - few need redis-py

    return Valkey(url)


def _store(valkey: "Valkey | None", worker: "Worker | None", settings: "Settings") -> "tuple[Store | None, float]":
    """Return what several processes share, and the part of a limit that each may use where it has never answered."""
    if valkey is not None:
        return valkey, settings.gateway_limits_fallback_share
    if worker is not None:
        return ParentStore(worker, HINTS), 1 / settings.workers
    return None, 1.0
