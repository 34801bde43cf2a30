"""Keeps web pages away from the control API: it has no key, and a browser on this machine or in its network reaches it.

A page can reach it in two ways: by a request across origins, which browsers send without asking first where it is a
plain POST, and by DNS rebinding, when a name of the page's own comes to stand for this address.
"""

from collections.abc import Iterable
from ipaddress import ip_address

from aiohttp import web
from aiohttp.typedefs import Middleware

from mock_model.answer import JSON
from mock_model.errors import envelope
from mock_model.middleware import Handler

SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that change nothing."""


def control_guard(hosts: Iterable[str]) -> Middleware:
    """Return a middleware that refuses what a web page may have sent.

    Args:
        hosts: further names under which the control API may be asked.
    """
    known = frozenset(host.lower() for host in hosts)

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        host = request.headers.get("Host", "").lower()
        if not is_ours(host, known):
            return _refusal(
                403,
                f"The control API does not answer to the host {host!r}: use localhost, an IP address or a name without"
                " dots, or add the name to MOCK_CONTROL_HOSTS",
                param="host",
                code="host_not_allowed",
            )
        if comes_from_elsewhere(request, host):
            return _refusal(
                403,
                "The control API takes no requests from pages of other origins: send it from a program, without Origin",
                param="origin",
                code="origin_not_allowed",
            )
        if request.method == "POST" and request.body_exists and request.content_type != JSON:
            return _refusal(
                415,
                f"A POST with a body needs content-type: {JSON}",
                param="content-type",
                code="unsupported_media_type",
            )
        return await handler(request)

    return guard


def is_ours(host: str, known: frozenset[str]) -> bool:
    """Return whether no stranger can own the name in a `Host` header, so that it is not rebound.

    Addresses are no names; a name without dots is this machine's or this network's.
    """
    name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
    name = name.removesuffix(".")
    if not name:
        return False
    try:
        ip_address(name)
    except ValueError:
        return "." not in name or name in known
    return True


def comes_from_elsewhere(request: web.Request, host: str) -> bool:
    """Return whether a page of another origin sends this: `Origin` says so, or `Sec-Fetch-Site` of a change."""
    origin = request.headers.get("Origin")
    if origin is not None and origin.lower().partition("://")[2] != host:
        return True
    site = request.headers.get("Sec-Fetch-Site", "none")
    return request.method not in SAFE and site not in {"none", "same-origin"}


def _refusal(status: int, message: str, *, param: str, code: str) -> web.Response:
    return web.Response(status=status, body=envelope(status, message, param=param, code=code), content_type=JSON)
