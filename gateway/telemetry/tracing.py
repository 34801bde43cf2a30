"""Traces: ids and sampling when a request begins; spans when it has ended, made and exported by a thread.

The resource, the sampler and the exporters are the OpenTelemetry SDK's. Spans are not recorded through its API: one of
its spans costs more than all the rest of a request (docs/performance.md), so a request fills a plain record, and this
thread turns records into spans.
"""

import logging
import threading
import time
from collections import deque
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from gateway import __version__
from gateway.telemetry.export_thread import end_export
from gateway.telemetry.otlp_encoder import Encoder
from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from gateway.telemetry.partial_success import PartialSuccess
from gateway.telemetry.sdk_spans import SCOPE, to_readable
from gateway.telemetry.span_data import SpanData
from gateway.telemetry.spans import spans_of
from gateway.telemetry.terminal import TreePrinter
from gateway.telemetry.trace_context import is_sampled, parse_traceparent, takes_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.record import Record

MAX_WAITING = 4096
"""Requests whose spans wait for the exporter."""
BATCH = 128
"""Requests per export."""
BATCH_EXTRA = 700_000
"""Extra bytes of its requests after which an export is closed; encoded they are at most twice as many. Collectors take
4 MiB by gRPC, 20 MiB by HTTP; what every request may hold is at most 16 KB encoded, 2 MB in a batch."""
MAX_EXTRA = 32_000_000
"""Extra bytes of the requests that wait: beyond half of it they wait without texts, beyond it the oldest are lost."""
CHUNK = 32
"""Requests whose spans are made in one go: a thread that holds the interpreter for longer slows requests down."""
BREATH = 0.001
"""Seconds between two chunks."""
INTERVAL = 0.5
"""Seconds between exports while less than a batch waits."""
ASK_AGAIN = 2.0
"""Seconds between two empty exports that check whether a failing collector is back, while no spans wait."""
RECENT = 10.0
"""Seconds for which dropped spans show as `degraded`."""

_log = logging.getLogger("gateway")


class Tracer:
    """Decides traces and exports spans; without an exporter it only decides.

    Args:
        exporter: takes the spans.
        interval: seconds between exports while less than a batch waits.
        max_waiting: requests whose spans wait at most; beyond that the oldest are dropped, and counted.
        batch: requests whose spans are exported together.
        most_spans: spans of an export at most, however many a request has; None: what a batch has.
        rng: draws ids.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        exporter: SpanExporter | None,
        *,
        interval: float = INTERVAL,
        max_waiting: int = MAX_WAITING,
        batch: int = BATCH,
        most_spans: int | None = None,
        rng: Random | None = None,
        clock: "Callable[[], float]" = time.monotonic,
    ) -> None:
        self._max_waiting = max_waiting
        self._batch = batch
        self._most_spans = most_spans
        self._rng = rng or Random()
        self._clock = clock
        self._exporter = exporter
        self._local = isinstance(exporter, TreePrinter)
        self._interval = 0.05 if self._local else interval
        self.resource = _resource()
        self._encoder = Encoder(self.resource.attributes, SCOPE.name, __version__)
        self._sampler = TracerProvider(resource=self.resource, shutdown_on_exit=False).sampler
        self._takes_all = takes_all(self._sampler)
        self._waiting: deque[Record] = deque()
        self._added = 0
        self._taken = 0
        self._asked_at = 0.0
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._failing = False
        self._pushed_out = 0
        self._pushed_out_at = -RECENT
        self._unsent = 0

    @property
    def dropped(self) -> int:
        """Spans lost since the start: dropped while they waited, not exported, or rejected by the collector."""
        return self._pushed_out + self._unsent  # one thread writes each

    @property
    def exports(self) -> bool:
        """Whether spans go to a place where they can be looked up."""
        return self._exporter is not None and not self._local

    @property
    def status(self) -> str:
        """`ok`, `degraded` while the exporter fails or is too slow, `off` without one (the terminal does not count)."""
        if not self.exports:
            return "off"
        return "degraded" if self._failing or self._clock() - self._pushed_out_at < RECENT else "ok"

    def decide(self, method: str, path: str | None, traceparent: str | None) -> tuple[int, int, int | None, bool]:
        """Return trace id, span id, the caller's span id or None, and whether the sampler takes the request."""
        parent = parse_traceparent(traceparent) if traceparent is not None else None
        span_id = self._rng.getrandbits(64) or 1
        trace_id, parent_id = parent[:2] if parent is not None else (self._rng.getrandbits(128) or 1, None)
        if parent is None and self._takes_all:
            return trace_id, span_id, None, True
        name = f"{method} {path}" if path is not None else method
        return trace_id, span_id, parent_id, is_sampled(self._sampler, trace_id, name, parent)

    def export(self, record: "Record") -> None:
        """Export a request that has ended, later and by the thread."""
        if self._exporter is None:
            record.forget_texts()
            return
        if record.is_large:
            self._make_room(record)
        waiting = self._waiting
        if len(waiting) >= self._max_waiting:
            self._push_out()
        waiting.append(record)
        if len(waiting) >= self._batch:
            self._wake.set()

    @property
    def _extra(self) -> int:
        """Extra bytes of the requests that wait; one thread writes each of the two sums."""
        return self._added - self._taken

    def _make_room(self, record: "Record") -> None:
        """Count the extra bytes of a request that is going to wait."""
        if self._extra + record.measure() > MAX_EXTRA // 2:
            record.forget_texts()
            record.measure()
        while self._extra + record.extra > MAX_EXTRA and self._waiting:
            self._push_out()
        self._added += record.extra

    def _push_out(self) -> None:
        """Drop the oldest request that waits, and count its spans."""
        with suppress(IndexError):  # unless the thread was faster
            oldest = self._waiting.popleft()
            self._added -= oldest.extra
            self._pushed_out += 1 + len(oldest.attempts)
            self._pushed_out_at = self._clock()

    def start(self) -> None:
        """Start the thread."""
        if self._exporter is not None:
            self._stopping = False
            self._thread = threading.Thread(target=self._run, name="span-export", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Export what waits, for a short time: a dead collector cannot delay the stop."""
        if self._thread is None or self._exporter is None:
            return
        self._stopping = True
        self._wake.set()
        end_export(self._thread, self._exporter.shutdown, "spans")

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(self._interval)
            self._wake.clear()
            self._export_waiting()
            self._ask_again()
        while self._waiting:
            self._export_batch()

    def _export_waiting(self) -> None:
        """Export what waits. What arrives meanwhile can wait: sending a handful costs as much as sending a batch."""
        full = True
        while full or len(self._waiting) >= self._batch:
            full = self._export_batch()

    def _export_batch(self) -> bool:
        """Export a batch; return whether its bytes closed it early: then few requests may still be much to export."""
        if not self._waiting:
            return False
        spans: list[SpanData] = []
        encoded: list[bytes] = []
        size = 0
        try:
            for _ in range(min(self._batch, len(self._waiting)) // CHUNK + 1):
                chunk, extra = self._next_chunk(BATCH_EXTRA - size)
                spans += chunk
                size += extra
                if isinstance(self._exporter, OtlpHttpExporter):
                    encoded += map(self._encoder.span, chunk)
                if not self._stopping:
                    time.sleep(BREATH)
                if size >= BATCH_EXTRA:
                    break
            lost = self._export(spans, encoded)
        except Exception:  # whatever an exporter does, the thread goes on  # noqa: BLE001
            _log.exception("the span exporter failed")
            lost = len(spans)
        self._failing = lost > 0
        self._unsent += lost
        return size >= BATCH_EXTRA

    def _next_chunk(self, room: int) -> tuple[list[SpanData], int]:
        """Return the spans of the next requests, and their extra bytes; it ends when these are as many as `room`."""
        spans: list[SpanData] = []
        extra = 0
        for _ in range(min(CHUNK, len(self._waiting))):
            try:
                record = self._waiting.popleft()
            except IndexError:  # the oldest was dropped meanwhile
                break
            spans += spans_of(record)
            if record.extra:
                self._taken += record.extra
                extra += record.extra
                record.forget_texts()
                if extra >= room:
                    break
        return spans, extra

    def _ask_again(self) -> None:
        """Check whether a failing collector is back while there is nothing to send."""
        now = self._clock()
        if not self._failing or self._exporter is None or self._waiting or now - self._asked_at < ASK_AGAIN:
            return
        try:
            if isinstance(self._exporter, OtlpHttpExporter):
                self._failing = not self._exporter.send(b"")
            else:
                self._failing = self._exporter.export([]) is not SpanExportResult.SUCCESS
        except Exception:  # as in an export  # noqa: BLE001
            _log.exception("the span exporter failed")
        self._asked_at = self._clock()

    def _export(self, spans: list[SpanData], encoded: list[bytes]) -> int:
        """Export spans; return how many of them are lost."""
        most = self._most_spans or len(spans) or 1
        return sum(
            self._export_at_once(spans[start : start + most], encoded[start : start + most])
            for start in range(0, len(spans), most)
        )

    def _export_at_once(self, spans: list[SpanData], encoded: list[bytes]) -> int:
        exporter = self._exporter
        if isinstance(exporter, OtlpHttpExporter):
            good = exporter.send(self._encoder.request(encoded))
        elif exporter is not None:
            readable = [to_readable(span, self.resource) for span in spans]
            good = exporter.export(readable) is SpanExportResult.SUCCESS
        else:
            good = True
        if not good:
            return len(spans)
        partial = getattr(exporter, "partial", None)  # of those by OTLP, of which gRPC's is slow to load
        return partial.take(len(spans)) if isinstance(partial, PartialSuccess) else 0


def _resource() -> Resource:
    """Return our resource; `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` win over it."""
    own = Resource(
        {
            "service.name": "gateway",
            "service.version": __version__,
            "service.instance.id": f"{Random().getrandbits(64):016x}",
        }
    )
    return Resource.create().merge(own).merge(OTELResourceDetector().detect())
