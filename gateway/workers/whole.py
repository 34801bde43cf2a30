"""The parent's answers to what is asked of any worker about all of them."""

import asyncio
import logging
import signal
from time import monotonic
from typing import TYPE_CHECKING, Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder

from gateway.server.request_calls import limit_of
from gateway.telemetry.metrics import MAX_AGE, OPENMETRICS
from gateway.workers.health_of_all import health_of_all
from gateway.workers.metrics_of_all import MetricsOfAll, generation_of
from gateway.workers.page_of_all import PageOfAll
from gateway.workers.requests_of_all import found_of_all, listed_of_all

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

    from prometheus_client.metrics_core import Metric

    from gateway.workers.child import Child

LOOK_EVERY = 1.0
"""Seconds between two looks at what the workers count, so that little is lost when one dies."""

SILENT_LOOKS = 20
"""Looks in a row without an answer, about half a minute, after which a worker hangs: it is killed, another begins."""

_log = logging.getLogger("gateway")


class Whole:
    """Asks the workers, and answers for all of them.

    Args:
        children: the workers' places.
        used: returns what all have used of limits, by key and limit, as their ledgers know it.
        clock: seconds.

    Attributes:
        answers: what gives the answer to each question of a worker, by its name.
        generation: the number of the newest configuration that was in force in one.
    """

    def __init__(
        self,
        children: "list[Child]",
        *,
        used: "Callable[[], Mapping[tuple[str, str], int]]" = dict,
        clock: "Callable[[], float]" = monotonic,
    ) -> None:
        self._children = children
        self._used = used
        self._clock = clock
        self._metrics = MetricsOfAll()
        self._documents: dict[bool, tuple[float, str, str]] = {}
        self._page = PageOfAll()
        self._deaths = 0
        self._lost = 0
        self.generation = 1

        self.answers: dict[str, Callable[[Any], Awaitable[Any]]] = {
            "metrics": self._exposition,
            "health": self._health,
            "snapshot": self._snapshot,
            "listed": self._listed,
            "found": self._found,
        }

    async def watch(self) -> None:
        """Look at what the workers count, again and again."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            await self.look()

    async def look(self) -> None:
        """Look at what the workers count, and end those that hang: their callers would wait for nothing."""
        asked = [child for child in self._children if child.serves]
        present = await self._count()
        for child in asked:
            child.silent_looks = 0 if child.number in present else child.silent_looks + 1
            if child.silent_looks == SILENT_LOOKS:
                _log.error(
                    "worker %d hangs: it has not answered %d times in a row, and is killed", child.number, SILENT_LOOKS
                )
                child.send(signal.SIGKILL)

    def ended(self, child: "Child") -> None:
        """Note that a worker has died, and what died with it."""
        self._deaths += 1
        self._lost += child.in_flight
        self._metrics.ended(child.number)
        self._page.ended(child.number)

    async def _exposition(self, newer: bool) -> list[str]:  # noqa: FBT001 - JSON
        rendered, document, content_type = self._documents.get(newer, (float("-inf"), "", ""))
        if self._clock() - rendered >= MAX_AGE:
            present = await self._count()
            encode, content_type = choose_encoder(OPENMETRICS if newer else "")
            families = [*self._metrics.families(present, self._used()), *self.own(len(present))]
            document = encode(_Collected(families)).decode()
            self._documents[newer] = self._clock(), document, content_type
        return [document, content_type]

    async def _count(self) -> set[int]:
        """Ask all workers for what they count; return the numbers of those that answered."""
        answers = await self._ask("metrics")
        for number, families in answers.items():
            self._metrics.take(number, families)
            self.generation = max(self.generation, generation_of(families))
        return set(answers)

    def own(self, present: int) -> "Iterator[Metric]":
        """Yield what is known of the workers; so many answered."""
        workers = GaugeMetricFamily("gateway_workers", "Worker processes, by whether they answer.", labels=["state"])
        workers.add_metric(["answering"], present)
        workers.add_metric(["missing"], len(self._children) - present)
        yield workers
        yield CounterMetricFamily("gateway_worker_deaths", "Workers that died.", self._deaths)
        yield CounterMetricFamily("gateway_worker_lost_requests", "Requests that died with a worker.", self._lost)

    async def _health(self, in_full: bool) -> Any:  # noqa: ANN401, FBT001 - JSON
        answers = await self._ask("health", in_full)
        return health_of_all(list(answers.values()), self._missing(answers)) if answers else None

    async def _snapshot(self, _: Any) -> Any:  # noqa: ANN401 - JSON
        answers = await self._ask("snapshot")
        return self._page.snapshot(answers, self._missing(answers), self._used()) if answers else None

    async def _listed(self, asked: dict[str, str]) -> Any:  # noqa: ANN401 - JSON
        answers = await self._ask("listed", asked)
        return listed_of_all(answers.values(), limit_of(asked), self._missing(answers)) if answers else None

    async def _found(self, id_: str) -> Any:  # noqa: ANN401 - JSON
        answers = await self._ask("found", id_)
        return found_of_all(answers.values(), self._missing(answers)) if answers else None

    def _missing(self, answers: "Collection[int]") -> list[int]:
        return [child.number for child in self._children if child.number not in answers]

    async def _ask(self, what: str, data: Any = None) -> dict[int, Any]:  # noqa: ANN401 - JSON
        """Return the answers of all workers that give one, by number."""
        children = [child for child in self._children if child.channel is not None and child.serves]
        answers = await asyncio.gather(*(child.ask(what, data) for child in children))
        return {child.number: answer for child, answer in zip(children, answers, strict=True) if answer is not None}


class _Collected:
    """What an encoder asks for metrics."""

    def __init__(self, metrics: "list[Metric]") -> None:
        self._metrics = metrics

    def collect(self) -> "list[Metric]":
        return self._metrics
