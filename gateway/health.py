"""Background probes of every replica, and the document of `/health`."""

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Self

from gateway import __version__
from gateway.errors import NoConnection
from gateway.policy.breaker import State
from gateway.policy.replica import Probe
from gateway.stalls import stalled_since, stalls_of_loop

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.backend.client import HttpClient
    from gateway.config import ProbeConfig
    from gateway.day_store import DayStore
    from gateway.policy.admission import Admission
    from gateway.policy.pool import Pool
    from gateway.policy.replica import Replica
    from gateway.settings import Settings
    from gateway.telemetry import Telemetry

EAGER_INTERVAL = 0.25
"""Seconds between probes of a replica whose breaker is not closed."""

_log = logging.getLogger("gateway")


class Health:
    """Probes replicas while it is entered, and reports their state from memory."""

    def __init__(
        self,
        settings: "Settings",
        *,
        pool: "Pool",
        client: "HttpClient",
        admission: "Admission",
        telemetry: "Telemetry",
        limits: "DayStore",
        clock: "Callable[[], float]",
    ) -> None:
        self._app_mode = settings.app_mode
        self._pool = pool
        self._client = client
        self._admission = admission
        self._telemetry = telemetry
        self._limits = limits
        self._clock = clock
        self._started = clock()
        self._tasks: list[asyncio.Task[None]] = []
        self._first_probes = 0
        self._logged: set[Replica] = set()
        self._unprobed: set[Replica] = set()
        self._unwell = {replica.name: asyncio.Event() for replica in pool.replicas}

    @property
    def ready(self) -> bool:
        """Whether every replica has been probed once."""
        return self._first_probes >= len(self._pool.replicas)

    def breaker_changed(self, backend: str, new: State) -> None:
        """Probe a replica more often while its breaker is not closed."""
        if new is State.CLOSED:
            self._unwell[backend].clear()
        else:
            self._unwell[backend].set()

    async def __aenter__(self) -> Self:
        self._telemetry.metrics.loop_lag.set_function(stalls_of_loop().worst)
        self._tasks = [asyncio.create_task(self._watch(replica)) for replica in self._pool.replicas]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _watch(self, replica: "Replica") -> None:
        """Probe one replica, more often while its breaker is not closed."""
        config = replica.config.probe
        if config is None:
            self._first_probes += 1
            return
        await self._probe(replica, config)
        self._first_probes += 1
        while True:
            await self._until_next(replica, config.interval)
            await self._probe(replica, config)

    async def _until_next(self, replica: "Replica", interval: float) -> None:
        """Sleep for the interval, or until an eager probe is due."""
        began = self._clock()
        with suppress(TimeoutError):
            async with asyncio.timeout(interval):
                await self._unwell[replica.name].wait()
                await asyncio.sleep(began + EAGER_INTERVAL - self._clock())

    async def _probe(self, replica: "Replica", config: "ProbeConfig") -> None:
        began = self._clock()
        try:
            trouble = await self._client.probe(replica, config)
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
        backends = [_backend(replica, now, in_full=in_full) for replica in self._pool.replicas]
        states = [backend["status"] for backend in backends]
        downstream = "ok"
        if all(state == "down" for state in states):
            downstream = "down"
        elif any(state != "ok" for state in states):
            downstream = "degraded"
        telemetry, limits = self._telemetry.status, self._limits.status
        status = "degraded" if downstream == "ok" and "degraded" in {telemetry, limits} else downstream
        return {
            "status": status,
            "version": __version__,
            "app_mode": self._app_mode,
            "uptime_seconds": round(now - self._started, 3),
            "draining": self._admission.stopping,
            "in_flight": self._admission.in_flight,
            "queued": self._admission.queued,
            "downstream": {"status": downstream, "backends": backends},
            "telemetry": {"status": telemetry, "spans_dropped": self._telemetry.spans_dropped},
            "limits": {"status": limits},
        }


def _backend(replica: "Replica", now: float, *, in_full: bool) -> dict[str, Any]:
    error, probe, breaker = replica.last_error, replica.probe, replica.breaker
    document: dict[str, Any] = {
        "name": replica.name,
        "url": replica.shown_url,
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


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)
