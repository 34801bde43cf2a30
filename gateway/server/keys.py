"""Gateway keys: who may send prompts."""

import hmac
from hashlib import sha256
from typing import TYPE_CHECKING

from gateway.errors import InvalidApiKey

if TYPE_CHECKING:
    from aiohttp import web


class Keys:
    """The gateway keys; without any, everybody may send prompts. Compared by digest, in constant time."""

    def __init__(self, keys: list[str]) -> None:
        self._digests = [sha256(key.encode()).digest() for key in keys]

    def fit(self, request: "web.Request") -> bool:
        """Return whether the request carries a valid key, or needs none."""
        if not self._digests:
            return True
        shown = [sha256(key.encode("utf-8", "surrogateescape")).digest() for key in _shown(request)]
        fits = [hmac.compare_digest(digest, known) for digest in shown for known in self._digests]
        return any(fits)  # all of them are compared, always

    def caller(self, request: "web.Request") -> str:
        """Return who asks: the key, where keys are needed, else the address."""
        if self._digests:
            return " ".join(_shown(request))
        return request.remote or ""

    def check(self, request: "web.Request") -> None:
        """Refuse a request without a valid key. Raises: InvalidApiKey."""
        if not self.fit(request):
            raise InvalidApiKey(
                "Send a gateway key as `Authorization: Bearer KEY`, `x-api-key: KEY` or `api-key: KEY`.",
                shown=any(_shown(request)),
            )


def _shown(request: "web.Request") -> list[str]:
    """Return the keys that a request carries, in whichever header: the SDKs of Anthropic and Azure have their own."""
    headers = request.headers
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    keys += [headers[name].strip() for name in ("x-api-key", "api-key") if name in headers]
    return keys
