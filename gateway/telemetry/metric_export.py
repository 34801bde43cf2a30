"""Metrics by OTLP: the instruments of `/metrics` and GenAI's, read on the event loop, encoded and sent by a thread."""

import asyncio
import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple, Protocol

from opentelemetry.sdk.metrics.export import MetricsData, ResourceMetrics, ScopeMetrics

from gateway.telemetry.export_thread import end_export
from gateway.telemetry.gen_ai_metrics import GenAiMetrics
from gateway.telemetry.readings import Reading, metric_of, readings_of, since
from gateway.telemetry.sdk_spans import SCOPE

if TYPE_CHECKING:
    from collections.abc import Callable

    from opentelemetry.sdk.resources import Resource
    from prometheus_client import Metric as Family

    from gateway.telemetry.partial_success import PartialSuccess

INTERVAL = 60.0
"""Seconds between exports: OpenTelemetry's default."""
AGAIN = 5.0
"""Seconds after which an export that failed is followed by another, if that is sooner: `/health` shows the failure."""

_log = logging.getLogger("gateway")


class ExportFailedError(Exception):
    """A collector has not got an export of metrics; the message says why."""


class NoMetricsTakenError(ExportFailedError):
    """It takes spans, and no metrics."""


class MetricExporter(Protocol):
    """Sends metrics to a collector, by HTTP or gRPC."""

    @property
    def partial(self) -> "PartialSuccess":
        """What the collector rejects of the exports that it takes."""

    def send(self, data: MetricsData) -> None:
        """Send metrics within the time limit. Raises: NoMetricsTakenError, ExportFailedError."""

    def shutdown(self) -> None:
        """End an export that is under way, and close the connection."""


class _Moment(NamedTuple):
    """What was read at one moment, in nanoseconds since the epoch."""

    families: "list[Family]"
    gen_ai: list[Reading]
    read_at: int


class MetricExport:
    """Exports metrics while it runs: `start` it, and `stop` it in the end.

    While an export takes longer than the interval, the next one waits, and has the newest numbers: nothing piles up.

    Args:
        exporter: sends them.
        resource: of the process, as spans have it.
        interval: seconds between exports.
        delta: whether counters and histograms count since the export before, else since the start.
        wall_clock: nanoseconds since the epoch.

    Attributes:
        gen_ai: GenAI's metrics, which only exports have.
        dropped: data points of exports that failed, or that the collector rejected.
    """

    def __init__(
        self,
        exporter: MetricExporter,
        *,
        resource: "Resource",
        interval: float = INTERVAL,
        delta: bool = False,
        wall_clock: "Callable[[], int]" = time.time_ns,
    ) -> None:
        self.gen_ai = GenAiMetrics()
        self.dropped = 0
        self._exporter = exporter
        self._resource = resource
        self._interval = interval
        self._delta = delta
        self._wall_clock = wall_clock
        self._started = self._exported = wall_clock()
        self._before: dict[str, Reading] = {}
        self._newest: _Moment | None = None
        self._wake = threading.Event()
        self._stopping = False
        self._status = "ok"
        self._failing = False
        self._reading: asyncio.Task[None] | None = None
        self._thread = threading.Thread(target=self._run, name="metric-export", daemon=True)

    @property
    def status(self) -> str:
        """`ok`, `degraded` while exports fail, `off` while the collector takes no metrics."""
        return self._status

    def start(self, read: "Callable[[], list[Family]]") -> None:
        """Start; `read` returns the instruments of `/metrics`, and is called on this event loop."""
        self._thread.start()
        self._reading = asyncio.get_running_loop().create_task(self._read_at_intervals(read), name="metric-export")

    async def stop(self, read: "Callable[[], list[Family]]") -> None:
        """Export what has been counted since, for a short time."""
        if self._reading is None:
            return
        self._reading.cancel()
        with suppress(asyncio.CancelledError):
            await self._reading
        self._stopping = True
        self._read(read)
        self._wake.set()
        await asyncio.to_thread(end_export, self._thread, self._exporter.shutdown, "metrics")

    async def _read_at_intervals(self, read: "Callable[[], list[Family]]") -> None:
        due = time.monotonic() + self._interval
        while True:
            await asyncio.sleep(max(0.0, min(due - time.monotonic(), AGAIN)))
            if self._failing or time.monotonic() >= due:
                self._read(read)
                due = time.monotonic() + self._interval

    def _read(self, read: "Callable[[], list[Family]]") -> None:
        """Read all instruments, where they are counted: on the event loop."""
        try:
            self._newest = _Moment(read(), list(self.gen_ai.read()), self._wall_clock())
        except Exception:  # a defect here must not end the exports  # noqa: BLE001
            _log.exception("metrics could not be read")
        self._wake.set()

    def _run(self) -> None:
        while not self._stopping or self._newest is not None:
            self._wake.wait()
            self._wake.clear()
            moment, self._newest = self._newest, None
            if moment is not None:
                try:
                    self._export(moment)
                except Exception:  # whatever an exporter does, the thread goes on  # noqa: BLE001
                    _log.exception("the exporter of metrics failed")
                    self._status = "degraded"

    def _export(self, moment: _Moment) -> None:
        readings = [*readings_of(moment.families), *moment.gen_ai]
        gained = since(self._before, readings) if self._delta else readings
        start = self._exported if self._delta else self._started
        metrics = [metric_of(one, start=start, now=moment.read_at, delta=self._delta) for one in gained]
        self._before = {one.name: one for one in readings}
        self._exported = moment.read_at
        points = sum(len(metric.data.data_points) for metric in metrics)
        scope = ScopeMetrics(SCOPE, metrics, "")
        try:
            self._exporter.send(MetricsData([ResourceMetrics(self._resource, [scope], "")]))
        except NoMetricsTakenError as error:
            self._failing = False
            self._tell("off", "the collector takes no metrics (%s): set OTEL_METRICS_EXPORTER=none", error)
        except ExportFailedError as error:
            self.dropped += points
            self._failing = True
            self._tell("degraded", "metrics could not be exported (%s)", error)
        else:
            self._failing = False
            rejected = self._exporter.partial.take(points)
            self.dropped += rejected
            self._status = "degraded" if rejected else "ok"

    def _tell(self, status: str, message: str, error: ExportFailedError) -> None:
        """Log the first of failures that follow each other."""
        if self._status != status:
            level = logging.INFO if status == "off" else logging.WARNING
            _log.log(level, message, error)
        self._status = status
