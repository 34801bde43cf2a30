"""The program: settings -> telemetry -> app -> listen."""

import asyncio
import logging
import sys
from functools import partial
from typing import TYPE_CHECKING

import uvloop

from gateway.app import PARTS, create_app, runner_of
from gateway.check import doubts
from gateway.config import Routing, load_routing
from gateway.files import Files
from gateway.server.connections import raise_open_files
from gateway.server.listener import listen
from gateway.settings import Settings, SettingsError, lacks_its_urls, load, load_otel, set_threads_of_libuv, unknown
from gateway.telemetry import Telemetry
from gateway.telemetry.exporters import exporter_for, metric_export_for, tracer_for
from gateway.telemetry.logs import RequestLog, setup_logs
from gateway.telemetry.output import Output, standard_outputs, write_last
from gateway.workers.parent import Parent
from gateway.workers.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.settings import OtelSettings

_log = logging.getLogger("gateway")


async def run(settings: Settings, files: Files, worker: Worker | None = None) -> None:
    """Build the parts and serve until told to stop.

    Args:
        settings: of the gateway.
        files: those read so far.
        worker: what this process is among others, or None.
    """
    if worker is not None:
        await worker.open(settings.gateway_shutdown_delay + settings.gateway_shutdown_grace)
    otel = load_otel()
    tracer = tracer_for(otel, exporter_for(settings, otel))
    log = RequestLog(level=settings.log_level, as_json=settings.app_mode == "prod")
    outputs = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, Output)]
    metric_export = metric_export_for(otel, tracer.resource)
    telemetry = Telemetry(settings, tracer=tracer, log=log, outputs=outputs, metric_export=metric_export)
    routing = load_routing(settings, files)
    if worker is None:
        _warn(settings, otel, routing)
    read = partial(_read, aloud=worker is None or worker.number == 1)
    app = create_app(settings, routing, telemetry, read=read, files=files, worker=worker)
    parts = app[PARTS]
    await listen(
        runner_of(app),
        settings,
        admission=parts.admission,
        connections=parts.connections,
        in_flight=parts.in_flight,
        replicas=len(parts.pool.replicas),
        needs_keys=bool(routing.keys),
        reload=parts.reload.ask,
        worker=worker,
    )


def _read(files: Files, *, aloud: bool) -> Routing:
    """Read backends, routes and keys anew, with all secrets; `aloud`: say what looks wrong. Raises: SettingsError."""
    routing = load_routing(load(files), files)
    for doubt in doubts(routing) if aloud else ():
        _log.warning(doubt)
    return routing


async def run_workers(settings: Settings, files: Files) -> int:
    """Run several workers until told to stop; return the exit code."""
    routing = load_routing(settings, files)
    _warn(settings, load_otel(), routing)  # what is wrong is said once
    return await Parent(settings, routing.keys).run()


def _warn(settings: Settings, otel: "OtelSettings", routing: Routing) -> None:
    """Say what looks wrong, or is not used."""
    for name in unknown():
        _log.warning("%s is not a setting of the gateway", name)
    if lacks_its_urls(settings):
        default = ",".join(settings.gateway_backend_urls)
        _log.warning("GATEWAY_BACKEND_URLS is empty: prompts go to %s", default)
    for complaint in (*otel.complaints, *doubts(routing)):
        _log.warning(complaint)
    if settings.gateway_api_keys and settings.gateway_config is not None and routing.keys[0].name is not None:
        _log.warning("GATEWAY_API_KEYS is not read: GATEWAY_CONFIG has keys")
    if settings.gateway_workers > settings.workers:
        _log.warning(
            "GATEWAY_WORKERS is %d, but GATEWAY_MAX_IN_FLIGHT %d: so many workers start, each with one at least",
            settings.gateway_workers,
            settings.workers,
        )
    if settings.gateway_state_dir is not None and settings.gateway_limits_url is not None:
        _log.warning("GATEWAY_STATE_DIR is not used: limits are kept at GATEWAY_LIMITS_URL")


def main(arguments: "Sequence[str]" = ()) -> int:
    """Run the gateway, or a worker of it; return 0 after a clean stop, 2 for a wrong setting, 1 for any other failure.

    Args:
        arguments: what a parent tells a worker, else none.
    """
    outputs = standard_outputs()
    try:
        return serve(Worker(*map(int, arguments)) if arguments else None)
    finally:
        write_last(*outputs)


def serve(worker: Worker | None) -> int:
    """Serve until told to stop; return the exit code."""
    try:
        files = Files()
        settings = load(files)
        number = worker.number if worker is not None else None
        setup_logs(settings.log_level, as_json=settings.app_mode == "prod", worker=number)
        if worker is None and settings.workers > 1:
            return asyncio.run(run_workers(settings, files))  # uvloop cannot put a process in a group of its own
        set_threads_of_libuv()
        raise_open_files()
        uvloop.run(run(settings, files, worker))
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 - before any log is set up
        return 2
    except OSError as error:
        where = f"{settings.host}:{settings.port}"
        reason = str(error.strerror).partition(" (while attempting")[0]  # the address again
        print(f"gateway: cannot listen on {where}: {reason}; HOST and PORT name another", file=sys.stderr)  # noqa: T201
        return 1
    except Exception:
        logging.getLogger("gateway").critical("the gateway failed", exc_info=True)
        return 1
    return 0
