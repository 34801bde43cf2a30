"""Background probes of every replica, and the document of `/health`."""

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self
from weakref import WeakKeyDictionary, WeakSet

from gateway import __version__
from gateway.errors import NoConnection
from gateway.policy.breaker import State
from gateway.policy.replica import Probe
from gateway.replica_tasks import ReplicaTasks
from gateway.stalls import stalled_since, stalls_of_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gateway.backend.client import HttpClient
    from gateway.config import ProbeConfig
    from gateway.day_store import DayStore
    from gateway.generation import Generations
    from gateway.limits_store import LimitsStore
    from gateway.policy.admission import Admission
    from gateway.policy.endpoint import Endpoint
    from gateway.policy.guard import Watch
    from gateway.policy.pool import Pool
    from gateway.policy.replica import Replica
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry

EAGER_INTERVAL = 0.25
"""Seconds between probes of a replica whose breaker is not closed."""
HIDDEN = "The new configuration is wrong; a valid gateway key shows why."

_log = logging.getLogger("gateway")


class Health:
    """Probes replicas while it is entered, and reports their state from memory."""

    def __init__(
        self,
        settings: "Settings",
        *,
        generations: "Generations",
        client: "HttpClient",
        admission: "Admission",
        telemetry: "Telemetry",
        limits: "DayStore | LimitsStore",
        clock: "Callable[[], float]",
    ) -> None:
        self._app_mode = settings.app_mode
        self._generations = generations
        self._client = client
        self._admission = admission
        self._telemetry = telemetry
        self._limits = limits
        self._clock = clock
        self._started = clock()
        self._tasks = ReplicaTasks(self._watch)
        self._unasked: set[Replica] = set(generations.current.pool.replicas)  # of the first generation
        self._logged: WeakSet[Replica] = WeakSet()
        self._unprobed: WeakSet[Replica] = WeakSet()
        self._unwell: WeakKeyDictionary[Replica, asyncio.Event] = WeakKeyDictionary()

    @property
    def ready(self) -> bool:
        """Whether every replica that there was at the start has been probed once."""
        return not self._unasked

    def breaker_changed(self, replica: "Replica", new: State) -> None:
        """Probe a replica more often while its breaker is not closed."""
        unwell = self._unwell.setdefault(replica, asyncio.Event())
        if new is State.CLOSED:
            unwell.clear()
        else:
            unwell.set()

    async def __aenter__(self) -> Self:
        self._telemetry.metrics.loop_lag.set_function(stalls_of_loop().worst)
        self.follow(self._generations.current.pool)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.end()

    def follow(self, pool: "Pool") -> None:
        """Probe the replicas of this pool from now on."""
        self._tasks.follow(pool.endpoints)
        self._unasked.intersection_update(pool.replicas)

    async def _watch(self, replica: "Replica", endpoint: "Endpoint") -> None:
        """Probe one replica, more often while its breaker is not closed."""
        config = endpoint.config.probe
        if config is not None:
            await self._probe(replica, endpoint, config)
        self._unasked.discard(replica)
        replica.awaits_probe = False
        while config is not None:
            await self._until_next(replica, config.interval)
            await self._probe(replica, endpoint, config)

    async def _until_next(self, replica: "Replica", interval: float) -> None:
        """Sleep for the interval, or until an eager probe is due."""
        began = self._clock()
        with suppress(TimeoutError):
            async with asyncio.timeout(interval):
                await self._unwell.setdefault(replica, asyncio.Event()).wait()
                await asyncio.sleep(began + EAGER_INTERVAL - self._clock())

    async def _probe(self, replica: "Replica", endpoint: "Endpoint", config: "ProbeConfig") -> None:
        began = self._clock()
        try:
            trouble = await self._client.probe(endpoint, config)
        except NoConnection as shortage:  # it says nothing about the replica
            if replica not in self._unprobed:
                self._unprobed.add(replica)
                _log.warning("no probe of %s: %s", replica.name, shortage.message)
            return
        self._unprobed.discard(replica)
        now = self._clock()
        self._log_probe(replica, trouble)
        latency = now - began - stalled_since(began)
        replica.note_probe(Probe(ok=trouble is None, latency=latency, at=now))

    def _log_probe(self, replica: "Replica", trouble: str | None) -> None:
        """Log the second of two failed probes in a row, and the first good one after it."""
        if trouble is None and replica in self._logged:
            self._logged.discard(replica)
            _log.info("probe of %s: good", replica.name)
        elif trouble and replica.probe is not None and not replica.probe.ok and replica not in self._logged:
            self._logged.add(replica)
            _log.warning("probe of %s: failed: %s", replica.name, trouble)

    def document(self, *, in_full: bool) -> dict[str, Any]:
        """Return the document of `/health`; without urls and error messages unless `in_full`."""
        now = self._clock()
        generation = self._generations.current
        backends = [
            _backend(replica, endpoint, now, in_full=in_full) for replica, endpoint in generation.pool.endpoints.items()
        ]
        guards = [_guard(route.model, watch, now) for route in generation.pool.routes for watch in route.watches]
        downstream = downstream_status(backends, guards)
        telemetry, limits = self._telemetry.status, self._limits.status
        return {
            "status": whole_status(downstream, degraded="degraded" in {telemetry, limits}),
            "version": __version__,
            "app_mode": self._app_mode,
            "uptime_seconds": round(now - self._started, 3),
            "draining": self._admission.stopping,
            "in_flight": self._admission.in_flight,
            "queued": self._admission.queued,
            "config": {
                "generation": generation.number,
                "loaded_seconds_ago": _rounded(now - generation.loaded_at),
                "error": self._generations.error if in_full else self._generations.error and HIDDEN,
            },
            "downstream": {"status": downstream, "backends": backends, "guards": guards},
            "telemetry": {"status": telemetry, "spans_dropped": self._telemetry.spans_dropped},
            "limits": {"status": limits},
        }


def downstream_status(backends: "Sequence[Mapping[str, Any]]", guards: "Iterable[Mapping[str, Any]]") -> str:
    """Return how all backends are together: `down` only where each is."""
    states = [backend["status"] for backend in backends]
    if all(state == "down" for state in states):
        return "down"
    is_well = all(state == "ok" for state in states) and not any(guard["tripped"] for guard in guards)
    return "ok" if is_well else "degraded"


def whole_status(downstream: str, *, degraded: bool) -> str:
    """Return how the gateway is; `degraded`: something else than a backend is not well."""
    return "degraded" if degraded and downstream == "ok" else downstream


def _backend(replica: "Replica", endpoint: "Endpoint", now: float, *, in_full: bool) -> dict[str, Any]:
    error, probe, breaker = replica.last_error, replica.probe, replica.breaker
    document: dict[str, Any] = {
        "name": endpoint.name,
        "url": endpoint.shown_url,
        "status": replica.status,
        "breaker": breaker.state.value,
        "retry_in_seconds": _rounded(breaker.retry_in),
        "cooling_seconds": _rounded(replica.cooldown.left),
        "in_flight": replica.in_flight,
        "consecutive_failures": breaker.consecutive_failures,
        "last_success_seconds_ago": _rounded(now - replica.last_success if replica.last_success is not None else None),
        "last_error": None,
        "probe": {"ok": None, "latency_ms": None, "seconds_ago": None},
    }
    if error is not None:
        document["last_error"] = {
            "code": error.code,
            "message": error.message,
            "seconds_ago": _rounded(now - error.at),
            "trace_id": error.trace_id,
        }
    if probe is not None:
        document["probe"] = {
            "ok": probe.ok,
            "latency_ms": round(probe.latency * 1000, 3),
            "seconds_ago": _rounded(now - probe.at),
        }
    if not in_full:
        del document["url"]
        if error is not None:
            del document["last_error"]["message"]
    return document


def _guard(route: str, watch: "Watch", now: float) -> dict[str, Any]:
    counts, trip = watch.counts, watch.trip
    return {
        "route": route,
        "backend": watch.backend,
        "model": watch.model,
        "tripped": trip is not None,
        "tripped_seconds_ago": _rounded(now - trip.at if trip is not None else None),
        "requests": counts.requests if trip is None else trip.requests,
        "error_rate": round(counts.error_rate if trip is None else trip.error_rate, 4),
    }


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
