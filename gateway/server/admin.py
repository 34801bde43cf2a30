"""Admin calls: who may look into the gateway. A gateway key is no admin key, and an admin key is no gateway key."""

import logging
import re
from asyncio import timeout
from collections import OrderedDict
from contextlib import suppress
from functools import partial
from hashlib import sha256
from hmac import compare_digest
from ipaddress import IPv6Address, ip_address
from secrets import token_urlsafe
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from gateway.errors import (
    GatewayError,
    InternalError,
    InvalidApiKey,
    InvalidJson,
    InvalidRequest,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from gateway.server.paths import worded_by
from gateway.server.responses import CHALLENGE, CHALLENGE_AGAIN, unrecorded_error
from gateway.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiohttp.typedefs import Handler

    from gateway.store import Store

COOKIE = "llm-gateway-admin"
SESSION_SECONDS = 12 * 60 * 60
"""How long a session lasts."""
LOOK_UP_SECONDS = 1.0
"""How long other workers may take to say whether they know one."""
MAX_SESSIONS = 64
"""Sessions at once; beyond them the oldest one ends."""
MAX_BODY = 4096
"""Bytes of the body of an admin call."""
BODY_SECONDS = 10
"""How long it may take to arrive."""
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
"""The methods that change nothing (RFC 9110, 9.2.1)."""
OURSELVES = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?", re.IGNORECASE)
"""A `Host` of this machine: any other name that leads here may have been pointed here by a stranger (DNS rebinding)."""
OF_PROXIES = ("forwarded", "via", "x-real-ip")
"""Headers that say that somebody else stands behind the peer, besides `X-Forwarded-*`."""
PROTECTED = {
    "cache-control": "no-store",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "x-frame-options": "DENY",
}
"""On every answer: no page of somebody else's may hold it, and no cache."""

_log = logging.getLogger("gateway")


class AdminCalls:
    """Lets admin calls through: with the key or a session where there is a key, else from this machine alone.

    Args:
        key: the admin key, or None.
        clock: seconds, monotonic.
        hidden: answers those who may not know that there are such calls, as a path that does not exist is answered.
        siblings: knows the sessions that began at other workers; None: there are none.
    """

    def __init__(
        self,
        key: str | None,
        *,
        clock: "Callable[[], float]",
        hidden: "Handler",
        siblings: "Store | None" = None,
    ) -> None:
        self._siblings = siblings
        self._clock = clock
        self._hidden = hidden
        self._digest: bytes | None = None
        self._sessions: OrderedDict[bytes, float] = OrderedDict()
        self.set_key(key)

    def set_key(self, key: str | None) -> None:
        """Take another key, or none; a change ends all sessions."""
        digest = _digest(key) if key is not None else None
        if digest != self._digest:
            self._sessions.clear()
        self._digest = digest

    def guarded(self, handler: "Handler", *, signs_in: bool = False) -> "Handler":
        """Wrap the handler of an admin call; one that `signs_in` asks for the key in its body itself."""
        return partial(self._answer, handler=handler, signs_in=signs_in)

    async def admits(self, request: web.Request) -> bool:
        """Return whether a call that was let through still would be: keys change, and sessions end."""
        try:
            await self._check_key(request)
        except InvalidApiKey:
            return False
        return True

    async def login(self, request: web.Request) -> web.Response:
        """Answer `POST /ui/login`: a session for who sends `{"key": ...}`.

        Raises:
            InvalidApiKey: it is another key.
            InvalidJson, InvalidRequest, RequestTooLarge, RequestTimeout: the body is not that.
        """
        shown = _key_in(await self._body(request))
        if self._digest is None:
            return web.Response(status=204)  # nobody needs a session
        if not compare_digest(_digest(shown), self._digest):
            raise _wrong_key(shown=True)
        session = token_urlsafe(32)
        self._sessions[_digest(session)] = self._clock() + SESSION_SECONDS
        if len(self._sessions) > MAX_SESSIONS:
            self._sessions.popitem(last=False)
        if self._siblings is not None:
            with suppress(StoreError):
                await self._siblings.publish([(self._name_of(session), b"")], SESSION_SECONDS)
        response = web.Response(status=204)
        response.set_cookie(
            COOKIE,
            session,
            max_age=SESSION_SECONDS,
            path="/",
            httponly=True,
            samesite="Strict",
            # The gateway itself speaks plain HTTP. The browser says how it reached us, with a proxy for TLS in between.
            secure=request.headers.get("Origin", "").startswith("https://"),
        )
        return response

    async def _answer(self, request: web.Request, *, handler: "Handler", signs_in: bool) -> web.StreamResponse:
        if self._digest is None and not _is_from_here(request):
            return await self._hidden(request)
        try:
            if not signs_in:
                await self._check_key(request)
            _check_origin(request)
            response = await handler(request)
        except GatewayError as error:
            response = _refusal(error, request)
        except (web.HTTPException, ConnectionError):
            raise
        except Exception:  # noqa: BLE001 - every error has an answer
            _log.exception("an admin call failed")
            response = _refusal(InternalError("The gateway failed. Its log has the details."), request)
        if not response.prepared:
            for name, value in PROTECTED.items():
                response.headers.setdefault(name, value)
        return response

    async def _check_key(self, request: web.Request) -> None:
        """Check that the key or a session comes with a call, where there is a key. Raises: InvalidApiKey."""
        if self._digest is None:
            return
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if not compare_digest(_digest(key.strip()), self._digest):
                raise _wrong_key(shown=True)
            return
        session = request.cookies.get(COOKIE)
        # Looked up by digest: the time it takes says nothing about the sessions there are.
        if session is None or not (self._is_known(session) or await self._is_known_elsewhere(session)):
            raise _wrong_key(shown=False)

    def _is_known(self, session: str) -> bool:
        return self._sessions.get(_digest(session), 0.0) > self._clock()

    async def _is_known_elsewhere(self, session: str) -> bool:
        if self._siblings is None:
            return False
        return await self._siblings.look_up(self._name_of(session), LOOK_UP_SECONDS) is not None

    def _name_of(self, session: str) -> str:
        """Return the name of a session among those of all workers; with another admin key it has another."""
        return f"{(self._digest or b'').hex()}{_digest(session).hex()}"

    async def _body(self, request: web.Request) -> bytes:
        """Return the body of a call. Raises: RequestTooLarge, RequestTimeout, InvalidRequest."""
        body = b""
        if "Expect" in request.headers:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0
        try:
            async with timeout(BODY_SECONDS):
                while piece := await request.content.readany():
                    body += piece
                    if len(body) > MAX_BODY:
                        raise RequestTooLarge(f"The body of an admin call has at most {MAX_BODY} bytes.")
        except TimeoutError:
            raise RequestTimeout(f"The request's body did not arrive within {BODY_SECONDS} s.") from None
        except web.RequestPayloadError:
            raise InvalidRequest("The request's body is malformed HTTP.") from None
        return body


def _is_from_here(request: web.Request) -> bool:
    """Return whether a call comes from this machine, by its name, through no proxy that shows itself.

    nginx speaks HTTP/1.0 to what is behind it unless it is told otherwise, and may add nothing. The target of a request
    may be a whole url, whose host counts as well.
    """
    hosts = [*request.headers.getall("Host", []), request.host]
    return (
        _is_loopback(request.remote)
        and len(hosts) == 2  # noqa: PLR2004
        and all(map(OURSELVES.fullmatch, hosts))
        and request.version >= (1, 1)
        and not any(name.lower() in OF_PROXIES or name.lower().startswith("x-forwarded") for name in request.headers)
    )


def _is_loopback(address: str | None) -> bool:
    try:
        peer = ip_address(address or "")
    except ValueError:
        return False
    if isinstance(peer, IPv6Address) and peer.ipv4_mapped is not None:
        peer = peer.ipv4_mapped
    return peer.is_loopback


def _check_origin(request: web.Request) -> None:
    """Check that no page of another origin makes the call: its browser says so, and sends our cookie all the same.

    A cookie is one host's, whatever the port, so that another server on this machine is "same-site".

    Raises:
        InvalidRequest: it is one.
        UnsupportedMediaType: it may be one: a form needs no leave to be sent anywhere, JSON does.
    """
    headers = request.headers
    site, navigates = headers.get("Sec-Fetch-Site"), headers.get("Sec-Fetch-Mode") == "navigate"
    if site in {"cross-site", "same-site"} and not (navigates and request.method in SAFE):
        raise InvalidRequest("Pages of other origins may not make this call.", param="sec-fetch-site")
    if request.method in SAFE:
        return
    ours = [f"{scheme}://{host.lower()}" for host in headers.getall("Host", []) for scheme in ("http", "https")]
    if any(origin.lower() not in ours for origin in headers.getall("Origin", [])):
        raise InvalidRequest("Pages of other origins may not make this call.", param="origin")
    if request.method == "POST" and request.content_type != "application/json":
        raise UnsupportedMediaType("Send the body as `content-type: application/json`.")


def _key_in(body: bytes) -> str:
    """Return the key in the body of a login. Raises: InvalidJson, InvalidRequest."""
    try:
        document = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise InvalidJson('The body is not JSON: send {"key": "the admin key"}.') from None
    key = document.get("key") if isinstance(document, dict) else None
    if not isinstance(key, str):
        raise InvalidRequest('`key` must be a string: send {"key": "the admin key"}.', param="key")
    return key


def _wrong_key(*, shown: bool) -> InvalidApiKey:
    wrong = "This is not the admin key. " if shown else ""
    return InvalidApiKey(f"{wrong}Send the admin key as `Authorization: Bearer KEY`.", shown=shown)


def _refusal(error: GatewayError, request: web.Request) -> web.Response:
    headers = {}
    if isinstance(error, InvalidApiKey):
        headers["www-authenticate"] = CHALLENGE_AGAIN if error.shown else CHALLENGE
    return unrecorded_error(error, worded_by(request.path), headers)


def _digest(text: str) -> bytes:
    return sha256(text.encode("utf-8", "surrogateescape")).digest()
