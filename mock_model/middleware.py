"""Errors that the HTTP server itself finds (unknown path, wrong method, body too large), in the form of the API."""

from collections.abc import Awaitable, Callable

from aiohttp import web

from mock_model.answer import JSON
from mock_model.errors import error_body

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}


@web.middleware
async def api_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer with JSON where the server would answer with plain text."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        message = f"{error.reason}: {request.method} {request.path}"
        body = error_body(request.path, error.status, message, code=_CODES.get(error.status))
        headers = {name: value for name, value in error.headers.items() if name.lower() == "allow"}
        return web.Response(status=error.status, body=body, content_type=JSON, headers=headers)
