"""A task for each replica, that follows the configuration."""

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping
    from typing import Any

    from gateway.policy.endpoint import Endpoint
    from gateway.policy.replica import Replica


class ReplicaTasks:
    """Runs a coroutine for each replica and the endpoint at which it is asked, until one of them goes.

    Args:
        watch: makes the coroutine.
    """

    def __init__(self, watch: "Callable[[Replica, Endpoint], Coroutine[Any, Any, None]]") -> None:
        self._watch = watch
        self._tasks: dict[tuple[Replica, Endpoint], asyncio.Task[None]] = {}

    def follow(self, endpoints: "Mapping[Replica, Endpoint]") -> None:
        """Watch these from now on; those that were watched already go on."""
        for watched in self._tasks.keys() - endpoints.items():
            self._tasks.pop(watched).cancel()
        for replica, endpoint in endpoints.items():
            if (replica, endpoint) not in self._tasks:
                self._tasks[replica, endpoint] = asyncio.create_task(self._watch(replica, endpoint))

    async def end(self) -> None:
        """Watch nothing more."""
        tasks = list(self._tasks.values())
        self.follow({})
        await asyncio.gather(*tasks, return_exceptions=True)
