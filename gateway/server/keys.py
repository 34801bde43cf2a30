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

    @property
    def needed(self) -> bool:
        """Whether callers are known by their keys."""
        return bool(self._digests)

    def fit(self, request: "web.Request") -> bool:
        """Return whether the request carries a valid key, or needs none."""
        return not self._digests or self._known(request) is not None

    def check(self, request: "web.Request") -> str:
        """Return who asks: the key where keys are needed, else the address.

        Raises:
            InvalidApiKey: the request carries no valid key, and needs one.
        """
        if not self._digests:
            return request.remote or ""
        known = self._known(request)
        if known is None:
            raise InvalidApiKey(
                "Send a gateway key as `Authorization: Bearer KEY`, `x-api-key: KEY` or `api-key: KEY`.",
                shown=any(_shown(request)),
            )
        return f"key {known}"

    def _known(self, request: "web.Request") -> int | None:
        """Return which of the gateway keys the request carries, whatever is beside it; None for none of them."""
        shown = [sha256(key.encode("utf-8", "surrogateescape")).digest() for key in _shown(request)]
        fits = [any([hmac.compare_digest(digest, known) for digest in shown]) for known in self._digests]  # noqa: C419
        return fits.index(True) if any(fits) else None  # all of them have been compared, always


def _shown(request: "web.Request") -> list[str]:
    """Return the keys that a request carries, in whichever header: the SDKs of Anthropic and Azure have their own."""
    headers = request.headers
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    keys += [headers[name].strip() for name in ("x-api-key", "api-key") if name in headers]
    return keys
