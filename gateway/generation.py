"""The configuration in force, and how a new one takes its place: whole, or not at all."""

import json
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from gateway.config_document import document
from gateway.settings import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.config import Routing
    from gateway.policy.pool import Pool
    from gateway.server.keys import Keys


@dataclass(frozen=True, slots=True, eq=False)
class Generation:
    """One configuration, and what is made of it. A request ends on the generation with which it began.

    Attributes:
        number: 1 at the start.
        routing: what was read.
        pool: the replicas and routes.
        keys: whose they are, and what is used of their limits.
        loaded_at: the instant at which it came into force.
    """

    number: int
    routing: "Routing"
    pool: "Pool"
    keys: "Keys"
    loaded_at: float

    @property
    def fingerprint(self) -> str:
        """What other processes with the same configuration have as well: SHA-256 of all that was read."""
        return sha256(json.dumps(document(self.routing, with_secrets=True)).encode()).hexdigest()


class Generations:
    """Holds the generation in force.

    Args:
        routing: of the first one.
        pool: makes a pool of a routing and the pool before it.
        keys: makes keys of a routing and the keys before them.
        clock: seconds, monotonic.

    Attributes:
        current: in force.
        error: why the latest configuration is not in force; None: it is.
        errors: how many were wrong.
    """

    def __init__(
        self,
        routing: "Routing",
        *,
        pool: "Callable[[Routing, Pool | None], Pool]",
        keys: "Callable[[Routing, Keys | None], Keys]",
        clock: "Callable[[], float]",
    ) -> None:
        self._pool = pool
        self._keys = keys
        self._clock = clock
        self.current = Generation(1, routing, pool(routing, None), keys(routing, None), clock())
        self.error: str | None = None
        self.errors = 0

    def count_from(self, number: int) -> None:
        """Have the generation in force be of this number: others have had those before it."""
        self.current = replace(self.current, number=number)

    def next_pool(self, routing: "Routing") -> "Pool | None":
        """Return the pool of a configuration, or None when it says what is in force already; nothing changes.

        It may take a while, and may be called in a thread, as long as nobody follows another one meanwhile.

        Raises:
            SettingsError: it would open the gateway to everybody, or close it.
        """
        before = self.current
        if bool(routing.keys) != before.keys.needed:
            raise SettingsError(
                "it has no gateway key, and the gateway would be open to everybody; restart it, if that is meant"
                if before.keys.needed
                else "it has gateway keys, and the gateway has been open since its start; restart it to close it"
            )
        return self._pool(routing, before.pool) if routing != before.routing else None

    def follow(self, routing: "Routing", pool: "Pool | None") -> Generation | None:
        """Put a configuration in force; return its generation, or None when it says what is in force already.

        Args:
            routing: the configuration.
            pool: of `next_pool`.
        """
        self.error = None
        if pool is None:
            return None
        before = self.current
        keys = self._keys(routing, before.keys)
        pool.take_over()
        self.current = Generation(before.number + 1, routing, pool, keys, self._clock())
        return self.current

    def refuse(self, error: str) -> None:
        """Note why a configuration is not put in force."""
        self.error = error
        self.errors += 1
