# ruff: noqa: ARG002 - the fakes have the signatures of what they stand for
"""Many callers before scripted servers, in virtual time: who was answered, when, and what the servers saw."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

from gateway.backend.client import HttpClient
from gateway.dialects.openai.chat import OpenAIChat
from gateway.errors import BackendError, GatewayError
from gateway.executor import Executor
from gateway.forwarding.attempt import Attempts
from gateway.forwarding.call import Call
from gateway.forwarding.forwarder import Forwarder
from gateway.policy.admission import Admission
from gateway.policy.byte_budget import ByteBudget
from gateway.policy.deadline import Deadline
from gateway.policy.retry import RetryPolicy
from gateway.record import Record
from gateway.settings import load
from tests.unit.gateway.fakes import Chance, Clock, pool
from tests.unit.gateway.scripted import CHAT, GoodAnswer

if TYPE_CHECKING:
    from gateway.backend.client import Exchange
    from gateway.policy.endpoint import Endpoint
    from gateway.policy.pool import Pool, Target

Served = tuple[float, BackendError | None]
"""How a server answers: after how many seconds, and with which failure, or None for a good answer."""
Server = Callable[[float, bytes], Served]
"""Called with the seconds since the scene began, and the body."""


def prompt(number: int, model: str = "m") -> bytes:
    """A body of its own for each number."""
    return b'{"model":"%s","messages":[{"role":"user","content":"%d"}]}' % (model.encode(), number)


class Ended:
    """What became of one request.

    Attributes:
        began, seconds: when it came, and how long it took.
        error: what it ended with, or None.
        record: all of it.
    """

    def __init__(self, began: float, seconds: float, error: BaseException | None, record: Record) -> None:
        self.began = began
        self.seconds = seconds
        self.error = error
        self.record = record


class _Servers(HttpClient):
    def __init__(self, scene: "Scene", servers: dict[str, Server]) -> None:
        super().__init__()
        self._scene = scene
        self._servers = servers

    async def send(
        self,
        endpoint: "Endpoint",
        method: str,
        target: str,
        body: bytes,
        headers: list[tuple[str, str]],
        *,
        fresh: bool,
    ) -> "Exchange":
        scene = self._scene
        scene.calls.append((scene.now, endpoint.name, body))
        delay, failure = self._servers[endpoint.name](scene.now, body)
        await asyncio.sleep(delay)
        if failure is not None:
            raise failure.with_traceback(None)
        return cast("Exchange", GoodAnswer())


class Scene:
    """A gateway in virtual time; make it inside of `virtual.run`.

    Args:
        clock: of the loop.
        servers: `a-1`, `a-2` are replicas of the first target, `b-1` of the second, and so on.
        settings: of the gateway, by the names of its fields.

    Attributes:
        calls: (seconds since the beginning, replica, body) of each attempt.
        ended: the requests that have ended, in the order of their ends.
    """

    def __init__(self, clock: Clock, servers: dict[str, Server], **settings: float) -> None:
        self._clock = clock
        self._began = clock()
        made = load(**settings)
        self.calls: list[tuple[float, str, bytes]] = []
        self.ended: list[Ended] = []
        self.admission = Admission(max_in_flight=made.gateway_max_in_flight, max_queue=0, queue_timeout=1)
        backends: dict[str, int] = {}
        for name in servers:
            backends[name[0]] = backends.get(name[0], 0) + 1
        rng = Chance(seed=int(settings.get("seed", 1)))
        self.pool: Pool = pool(clock, backends, rng, waiting=self.admission.waiting, **settings)
        self.replicas = {replica.name: replica for replica in self.pool.replicas}
        self._forwarder = Forwarder(
            admission=self.admission,
            policy=RetryPolicy(made, rng),
            attempts=Attempts(
                made, client=_Servers(self, servers), executor=Executor(at_once=1 << 40), clock=clock, rng=Chance()
            ),
            repeats=self.pool.repeats,
            executor=Executor(at_once=1 << 40),
            clock=clock,
            retry_allowed=lambda _name: None,
            retry_refused=lambda _name: None,
        )
        self.byte_budget = ByteBudget(1 << 28)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def failed(self) -> list[Ended]:
        """The requests that failed."""
        return [each for each in self.ended if each.error is not None]

    def calls_of(self, name: str) -> list[float]:
        """When a replica was asked."""
        return [at for at, replica, _ in self.calls if replica == name]

    def limit(self, max_in_flight: int) -> None:
        """Give each replica a largest number of attempts at once."""
        for target in self.pool.routes[0].targets:
            for replica in target.replicas:
                replica.max_in_flight = max_in_flight

    def only(self, number: int) -> "Target":
        """Return the first target with one of its replicas alone, the first of which is number 1."""
        target = self.pool.routes[0].targets[0]
        return target.only(target.replicas[number - 1])

    async def send(
        self,
        body: bytes,
        *,
        caller: str = "somebody",
        deadline: float = 600.0,
        target: "Target | None" = None,
        previous: str | None = None,
    ) -> Ended:
        """Send one request, and return what became of it.

        Args:
            body: of the request.
            caller: who sends it.
            deadline: seconds.
            target: where it may go; None: along its route.
            previous: the stored response that it goes on from.
        """
        clock = self._clock
        began = self.now
        record = Record("POST", CHAT, trace_id=1, span_id=1, request_id="r", started=clock(), started_ns=0)
        error: BaseException | None = None
        try:
            with self.byte_budget.share() as share:
                share.hold(len(body))
                request = OpenAIChat().read_request(CHAT, body)
                request.previous_response_id = previous
                targets = self.pool.routes[0].targets if target is None else (target,)
                call = Call(
                    request,
                    Deadline(clock, clock(), deadline),
                    record,
                    None,
                    model=request.model or "m",
                    targets=targets,
                    target=targets[0],
                    caller=caller,
                    share=share,
                    headers=[],
                    commit="first_token",
                )
                await self._forwarder.forward(call)
        except (GatewayError, asyncio.CancelledError) as failure:
            error = failure
        ended = Ended(began, self.now - began, error, record)
        self.ended.append(ended)
        return ended

    async def traffic(self, rate: float, seconds: float, *, model: str = "m", same_body: bool = False) -> None:
        """Send `rate` requests a second, and wait for all of them."""
        tasks = []
        for number in range(int(rate * seconds)):
            body = prompt(0 if same_body else number, model)
            tasks.append(asyncio.create_task(self.send(body, caller=f"caller {number}")))
            await asyncio.sleep(1 / rate)
        await asyncio.gather(*tasks)
        self.check_at_rest()

    def check_at_rest(self) -> None:
        """Assert that nothing of any request is left."""
        assert self.admission.in_flight == self.byte_budget.held == len(self.admission.waiting) == 0
        assert [replica.in_flight for replica in self.pool.replicas] == [0] * len(self.pool.replicas)
