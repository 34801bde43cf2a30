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
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])  # all of them, always  # noqa: C419

    def caller(self, request: "web.Request") -> str:
        """Return who asks: the key, where keys are needed, else the address."""
        if self._digests:
            return request.headers.get("Authorization", "")
        return request.remote or ""

    def check(self, request: "web.Request") -> None:
        """Refuse a request without a valid key. Raises: InvalidApiKey."""
        if not self.fit(request):
            raise InvalidApiKey("Send a gateway key as `Authorization: Bearer KEY`.")
