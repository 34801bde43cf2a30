"""Errors that the HTTP server itself finds (unknown path, wrong method, body too large), in OpenAI's form."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from mock_model.answer import JSON
from mock_model.errors import envelope

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


@web.middleware
async def openai_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with an envelope where the server would answer with plain text."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        body = envelope(error.status, f"{error.reason}: {request.method} {request.path}", code=_CODES.get(error.status))
        headers = {name: value for name, value in error.headers.items() if name.lower() == "allow"}
        return web.Response(status=error.status, body=body, content_type=JSON, headers=headers)
