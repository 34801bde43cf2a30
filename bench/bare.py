"""The reference: a pass-through of a few lines, as a good engineer writes it with aiohttp. It checks nothing.

`python -m bench.bare PORT BACKEND_URL`
"""

import asyncio
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web

SESSION = web.AppKey("session", aiohttp.ClientSession)
BACKEND = web.AppKey("backend", str)


async def forward(request: web.Request) -> web.StreamResponse:
    """Forward one request; a streamed answer is passed on as it comes."""
    body = await request.read()
    headers = {"content-type": request.content_type}
    async with request.app[SESSION].post(request.app[BACKEND] + request.path, data=body, headers=headers) as answer:
        if answer.content_type != "text/event-stream":
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)
        stream = web.StreamResponse(status=answer.status, headers={"content-type": "text/event-stream"})
        await stream.prepare(request)
        async for piece in answer.content.iter_any():
            await stream.write(piece)
        await stream.write_eof()
        return stream


async def health(_request: web.Request) -> web.Response:
    """Say that it is up."""
    return web.Response(text="ok")


async def session(app: web.Application) -> AsyncIterator[None]:
    """Hold one client session for all requests, without a limit of connections."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=300)) as client:
        app[SESSION] = client
        yield


def application(backend: str) -> web.Application:
    """Return the pass-through to a backend's url."""
    app = web.Application(client_max_size=64 << 20)
    app[BACKEND] = backend
    app.cleanup_ctx.append(session)
    app.router.add_get("/health", health)
    app.router.add_post("/v1/chat/completions", forward)
    return app


async def main(port: int, backend: str) -> None:
    """Serve forever."""
    runner = web.AppRunner(application(backend), access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2]))
