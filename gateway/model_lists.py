"""The lists of models: what the backends of a `*` route list themselves, asked for in the background."""

import asyncio
import logging
import math
from typing import TYPE_CHECKING, Self
from weakref import WeakSet

from gateway.dialects.model_list import MODELS, names_in
from gateway.errors import ConnectionFailed, GatewayError, InvalidResponse, ServerFault, Silent
from gateway.phase_timer import PhaseTimer
from gateway.replica_tasks import ReplicaTasks

if TYPE_CHECKING:
    from collections.abc import Callable

    from gateway.backend.client import HttpClient
    from gateway.executor import Executor
    from gateway.generation import Generations
    from gateway.policy.byte_budget import ByteBudget
    from gateway.policy.endpoint import Endpoint
    from gateway.policy.pool import Pool
    from gateway.policy.replica import Replica

INTERVAL = 60.0
"""Seconds between two questions to a replica."""
EAGER_INTERVAL = 5.0
"""Seconds, for one that has listed nothing so far and cannot yet: it may start after the gateway, or be loading."""
TIMEOUT = 10.0
"""Seconds for a whole list; hosted services take longer for it than for a probe."""
MAX_LIST = 4 << 20
"""Bytes."""
OK = 200
HEADERS = [("accept", "application/json"), ("accept-encoding", "identity"), ("user-agent", "llm-gateway")]

_log = logging.getLogger("gateway")


class ModelLists:
    """Asks replicas for their models while it is entered; the pool keeps them.

    A question is no attempt: it says nothing to breaker, cooldown or health. What goes wrong leaves the last list.
    """

    def __init__(
        self,
        *,
        generations: "Generations",
        client: "HttpClient",
        byte_budget: "ByteBudget",
        executor: "Executor",
        clock: "Callable[[], float]",
    ) -> None:
        self._generations = generations
        self._client = client
        self._byte_budget = byte_budget
        self._executor = executor
        self._clock = clock
        self._tasks = ReplicaTasks(self._watch)
        self._logged: WeakSet[Replica] = WeakSet()

    async def __aenter__(self) -> Self:
        self.follow(self._generations.current.pool)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._tasks.end()

    def follow(self, pool: "Pool") -> None:
        """Ask the replicas of this pool from now on."""
        self._tasks.follow({replica: pool.endpoints[replica] for replica in pool.listing})

    async def _watch(self, replica: "Replica", endpoint: "Endpoint") -> None:
        """Ask one replica for its models again and again."""
        while True:
            interval = INTERVAL
            try:
                names = await self._ask(endpoint)
            except GatewayError as trouble:
                not_yet = isinstance(trouble, ConnectionFailed | ServerFault | Silent)
                interval = EAGER_INTERVAL if not_yet and replica.models is None else INTERVAL
                if not isinstance(trouble, ConnectionFailed | ServerFault):  # probes and attempts tell as much
                    self._log_trouble(replica, trouble)
            else:
                self._logged.discard(replica)
                self._generations.current.pool.note_models(replica, names)
            await asyncio.sleep(interval)

    async def _ask(self, endpoint: "Endpoint") -> tuple[str, ...]:
        """Return the names that a replica lists. Raises: GatewayError."""
        late = f"It did not come within {TIMEOUT:g} s."
        timer = PhaseTimer(self._clock, math.inf)
        timer.limit(TIMEOUT, lambda: Silent(late, timer="models"))
        with timer, self._byte_budget.share() as share:
            target = endpoint.target_of(MODELS, "")
            exchange = await self._client.send(endpoint, "GET", target, b"", HEADERS, fresh=True)
            try:
                if exchange.status >= 500:  # noqa: PLR2004
                    raise ServerFault(exchange.status, None, {})
                if exchange.status != OK:
                    raise InvalidResponse(f"The answer is {exchange.status}.")
                exchange.decode_within(MAX_LIST)
                body = await exchange.read_whole(share, MAX_LIST, lambda: None)
            finally:
                exchange.close()
            return await self._executor.read(len(body), names_in, body)

    def _log_trouble(self, replica: "Replica", trouble: GatewayError) -> None:
        """Log the first of several failures in a row."""
        if replica not in self._logged:
            self._logged.add(replica)
            _log.info("no list of models from %s: %s", replica.name, trouble.message)
