"""Gateway keys: who may send prompts."""

from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from gateway.config import LimitsConfig
from gateway.errors import InvalidApiKey
from gateway.policy.caller import KEY, Caller
from gateway.policy.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiohttp import web

    from gateway.config import KeyConfig


ADDRESSES = 1024
"""Callers of an open gateway that are remembered."""


class Keys:
    """The gateway keys; without any, everybody may send prompts. Looked up by digest: only that is held.

    Args:
        keys: as configured.
        clock: of their limits.

    Attributes:
        callers: whom they belong to, in order.
    """

    def __init__(self, keys: "Iterable[KeyConfig]", clock: "Callable[[], float]") -> None:
        self._by_digest = {
            key.digest: Caller(
                f"{KEY}{key.name or number}",
                key.name,
                key.models,
                Limits(key.limits, clock) if key.limits != LimitsConfig() else None,
            )
            for number, key in enumerate(keys)
        }
        self.callers = tuple(self._by_digest.values())
        self._of_address = lru_cache(maxsize=ADDRESSES)(Caller)

    @property
    def needed(self) -> bool:
        """Whether callers are known by their keys."""
        return bool(self._by_digest)

    def fit(self, request: "web.Request") -> bool:
        """Return whether the request carries a valid key, or needs none."""
        return not self._by_digest or self._known(request) is not None

    def check(self, request: "web.Request") -> Caller:
        """Return who asks: whose key it is where keys are needed, else the address.

        Raises:
            InvalidApiKey: the request carries no valid key, and needs one.
        """
        if not self._by_digest:
            return self._of_address(request.remote or "")
        known = self._known(request)
        if known is None:
            shown = any(_shown(request))
            wrong = "This key is none of the gateway's. " if shown else ""
            raise InvalidApiKey(
                f"{wrong}Send a gateway key as `Authorization: Bearer KEY`, `x-api-key: KEY` or `api-key: KEY`.",
                shown=shown,
            )
        return known

    def _known(self, request: "web.Request") -> Caller | None:
        """Return whose key the request carries, whatever is beside it; None for nobody's."""
        for key in _shown(request):
            caller = self._by_digest.get(sha256(key.encode("utf-8", "surrogateescape")).digest())
            if caller is not None:
                return caller
        return None


def _shown(request: "web.Request") -> list[str]:
    """Return the keys that a request carries, in whichever header: the SDKs of Anthropic and Azure have their own."""
    headers = request.headers
    scheme, _, key = headers.get("Authorization", "").partition(" ")
    keys = [key.strip()] if scheme.lower() == "bearer" else []
    keys += [headers[name].strip() for name in ("x-api-key", "api-key") if name in headers]
    return keys
