"""`python -m chaos.collector`: a collector of spans that can be killed and frozen; a line with a number per export."""

import os
from pathlib import Path

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


def main() -> None:
    """Serve until killed."""
    lines = Path(os.environ["CHAOS_COLLECTOR_FILE"]).open("a", encoding="ascii", buffering=1)  # noqa: SIM115 - to the end

    async def take(request: web.Request) -> web.Response:
        export = ExportTraceServiceRequest.FromString(await request.read())
        number = sum(len(scope.spans) for resource in export.resource_spans for scope in resource.scope_spans)
        lines.write(f"{number}\n")
        return web.Response(
            body=ExportTraceServiceResponse().SerializeToString(), content_type="application/x-protobuf"
        )

    async def alive(_request: web.Request) -> web.Response:
        return web.Response()

    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/traces", take)
    app.router.add_get("/", alive)
    web.run_app(app, host="127.0.0.1", port=int(os.environ["CHAOS_COLLECTOR_PORT"]), access_log=None, print=None)


if __name__ == "__main__":
    main()
