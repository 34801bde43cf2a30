"""`python -m gateway`: settings -> telemetry -> app -> serve."""

import logging
import sys

import uvloop

from gateway.app import create_app
from gateway.config import load_routing
from gateway.server.listener import serve
from gateway.settings import Settings, SettingsError, load, load_otel, set_threads_of_libuv, unknown
from gateway.telemetry import Telemetry
from gateway.telemetry.exporters import exporter_for
from gateway.telemetry.logs import RequestLog, setup_logs
from gateway.telemetry.tracing import Tracer


async def run(settings: Settings) -> None:
    """Wire the process and serve until it is told to stop."""
    as_json = settings.app_mode == "prod"
    tracer = Tracer(exporter_for(settings, load_otel()))
    log = RequestLog(level=settings.log_level, as_json=as_json)
    app = create_app(settings, load_routing(settings), Telemetry(settings, tracer=tracer, log=log))
    await serve(app, settings)


def main() -> int:
    """The exit code: 0 after a clean stop, 2 for a wrong setting, 1 when the port cannot be had."""
    try:
        settings = load()
        setup_logs(settings.log_level, as_json=settings.app_mode == "prod")
        for name in unknown():
            logging.getLogger("gateway").warning("%s is no setting of the gateway", name)
        set_threads_of_libuv()
        uvloop.run(run(settings))
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201 - one line, before any log is set up
        return 2
    except OSError as error:
        print(f"gateway: cannot listen on {settings.host}:{settings.port}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
