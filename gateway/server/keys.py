"""Gateway keys: who may send prompts, in one generation."""

from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from gateway.config import LimitsConfig
from gateway.errors import InvalidApiKey
from gateway.policy.caller import Caller
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
        clock, epoch: of their limits.
        before: the generation before; what its keys have used counts for those of the same name, or without one of the
            same digest. None: there is none.

    Attributes:
        callers: whom they belong to, in order.
    """

    def __init__(
        self,
        keys: "Iterable[KeyConfig]",
        clock: "Callable[[], float]",
        before: "Keys | None" = None,
        *,
        epoch: float = 0.0,
    ) -> None:
        used: dict[str, Limits | None] = {}
        if before is not None:
            used = {caller.id: caller.limits for caller in before.callers}

        def limits(id_: str, config: LimitsConfig) -> Limits | None:
            if config == LimitsConfig():
                return None
            known = used.get(id_)
            if known is None:
                return Limits(config, clock, epoch)
            known.change(config)
            return known

        def caller(key: "KeyConfig") -> Caller:
            id_ = f"key {key.name}" if key.name is not None else f"key of {key.digest.hex()}"
            return Caller(id_, key.name, key.models, limits(id_, key.limits))

        self._by_digest = {key.digest: caller(key) for key in keys}
        self.callers: tuple[Caller, ...] = tuple(self._by_digest.values())
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
