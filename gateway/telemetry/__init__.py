"""What the gateway reports about itself: traces, metrics, logs; built once and handed in."""

import asyncio
import logging
from random import Random
from time import monotonic, time_ns
from typing import TYPE_CHECKING, Self

from gateway.errors import InvalidApiKey
from gateway.headers import is_request_id
from gateway.record import MAX_TRACE_STATE, Record
from gateway.telemetry.logs import RequestLog
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.tracing import Tracer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from multidict import MultiMapping

    from gateway.policy.breaker import State
    from gateway.policy.guard import Trip
    from gateway.settings import Settings
    from gateway.telemetry.metric_export import MetricExport
    from gateway.telemetry.output import Output

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"})
"""The methods that are reported by name; others are `_OTHER` (OpenTelemetry's HTTP conventions)."""
_log = logging.getLogger("gateway")


class Telemetry:
    """Takes one record per request and makes spans, metrics and a log line of it. Runs while it is entered.

    Args:
        settings: which traces are kept.
        tracer: exports spans.
        log: writes the lines of requests.
        outputs: where lines go; those they lose are counted.
        metric_export: exports metrics; None: they are only asked for.
        clock: seconds, monotonic.
        wall_clock: nanoseconds since the epoch.
        rng: draws request ids.
    """

    def __init__(
        self,
        settings: "Settings",
        *,
        tracer: Tracer,
        log: RequestLog,
        outputs: "Iterable[Output]" = (),
        metric_export: "MetricExport | None" = None,
        clock: "Callable[[], float]" = monotonic,
        wall_clock: "Callable[[], int]" = time_ns,
        rng: Random | None = None,
    ) -> None:
        self.metrics = Metrics(clock=clock)
        self.metrics.watch_dropped(lambda: tracer.dropped, tuple(outputs))
        self.metrics.watch_export(lambda: self.data_points_dropped)
        self._metric_export = metric_export
        self._gen_ai = metric_export.gen_ai if metric_export is not None else None
        self._tracer = tracer
        self._log = log
        self._clock = clock
        self._wall_clock = wall_clock
        self._rng = rng or Random()
        self._keep_slow = settings.gateway_trace_keep_slow

    async def __aenter__(self) -> Self:
        self._tracer.start()
        if self._metric_export is not None:
            self._metric_export.start(self.metrics.read)
        return self

    async def __aexit__(self, *_: object) -> None:
        stopping = [asyncio.to_thread(self._tracer.stop)]
        if self._metric_export is not None:
            stopping.append(self._metric_export.stop(self.metrics.read))
        await asyncio.gather(*stopping)

    @property
    def status(self) -> str:
        """`ok`, `degraded` while an exporter fails, `off` without one."""
        statuses = {self._tracer.status, self._metric_export.status if self._metric_export is not None else "off"}
        return next(status for status in ("degraded", "ok", "off") if status in statuses)

    @property
    def spans_dropped(self) -> int:
        """Spans lost since the start."""
        return self._tracer.dropped

    @property
    def data_points_dropped(self) -> int:
        """Data points of metrics lost since the start: not exported, or rejected by the collector."""
        return self._metric_export.dropped if self._metric_export is not None else 0

    def begin(self, method: str, path: str | None, headers: "MultiMapping[str]") -> Record:
        """Return the record of a request whose headers have arrived; its trace is decided here."""
        method = method if method in METHODS else "_OTHER"
        asked = headers.get("x-request-id")
        request_id = asked if asked is not None and is_request_id(asked) else _uuid(self._rng)
        trace_id, span_id, parent_id, sampled = self._tracer.decide(method, path, headers.get("traceparent"))
        record = Record(method, path, trace_id, span_id, request_id, self._clock(), self._wall_clock(), parent_id)
        record.sampled = sampled
        if "tracestate" in headers and (parent_id is not None or "traceparent" not in headers):
            # The state of a trace that was not joined does not pass.
            state = ",".join(headers.getall("tracestate"))
            record.trace_state = state if 0 < len(state) <= MAX_TRACE_STATE else None
        return record

    def turn_away(self, record: Record) -> None:
        """Keep of a request without a valid key only its outcome; a stranger's flag and trace id sample nothing."""
        record.trace_state = None
        record.sampled = self._tracer.decide(record.method, record.path, None)[3]

    def finish(self, record: Record) -> None:
        """Report a request that has ended."""
        try:
            kept = record.sampled or self._worth_keeping(record)
            if kept:
                self._tracer.export(record)
            else:
                record.forget_texts()
            self.metrics.count(record, kept=kept and self._tracer.exports)
            if self._gen_ai is not None:
                self._gen_ai.count(record)
            self._log.write(record)
        except Exception:  # a defect here must not cost an answer  # noqa: BLE001
            _log.exception("telemetry failed for trace %032x", record.trace_id)

    def breaker_changed(self, backend: str, old: "State", new: "State") -> None:
        """Report that a breaker has changed its state."""
        self.metrics.breaker_changed(backend, new)
        level = logging.INFO if new == "closed" else logging.WARNING
        _log.log(level, "breaker of %s: %s -> %s", backend, old.value, new.value)

    def cooldown_begun(self, backend: str, seconds: float) -> None:
        """Report that a replica asked to be left alone."""
        _log.warning("cooldown of %s: %.3g s", backend, seconds)

    def released(self, backend: str, number: int) -> None:
        """Report that requests which waited for a backend go on."""
        _log.info("%s answers again: %d waiting request(s) released", backend, number)

    def guard_tripped(self, trip: "Trip") -> None:
        """Report that a target has lost its traffic, and what to do."""
        _log.warning(
            "GUARD TRIPPED: route %s: %s has lost its traffic to the other targets: %.1f %% of its first attempts"
            " failed (%d requests in %g s; allowed: %g %%). Set its weight to 0, or mend it and change the weights;"
            " then reload: it gets traffic again only with the next generation of the configuration.",
            trip.route,
            trip.target,
            trip.error_rate * 100,
            trip.requests,
            trip.window,
            trip.max_error_rate * 100,
        )

    def _worth_keeping(self, record: Record) -> bool:
        """Return whether a request failed, was retried, fell back or was slow: exported whatever the sampler said."""
        if self._keep_slow == "off" or record.outcome == InvalidApiKey.code:
            return False
        return bool(
            record.status >= 500  # noqa: PLR2004
            or record.outcome != "ok"
            or len(record.attempts) > 1
            or record.waits
            or record.fell_back
            or record.seconds(0.0) > self._keep_slow
        )


def _uuid(rng: Random) -> str:
    """Return a new UUID, version 4, variant 1 (RFC 9562, 5.4): there are servers that take no other request id."""
    text = rng.getrandbits(120).to_bytes(15).hex()
    return f"{text[:8]}-{text[8:12]}-4{text[12:15]}-8{text[15:18]}-{text[18:]}"
