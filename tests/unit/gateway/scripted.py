# ruff: noqa: ARG002 - the fakes have the signatures of what they stand for
"""A forwarder whose HTTP calls are scripted: who was called when, with which words, in virtual time."""

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
from gateway.policy.byte_budget import ByteBudget, Share
from gateway.policy.deadline import Deadline
from gateway.policy.retry import RetryPolicy
from gateway.record import Record
from gateway.settings import load
from tests.unit.gateway.fakes import Chance, Clock, pool
from tests.unit.gateway.virtual import run

if TYPE_CHECKING:
    from gateway.backend.client import Exchange
    from gateway.policy.endpoint import Endpoint
    from gateway.policy.replica import Replica

CHAT = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"hi"}]}'
ANSWER = b'{"id":"1","choices":[{"index":0,"finish_reason":"stop"}]}'
Outcome = BackendError | None
"""How a call ends: with a failure, or (None) with a good answer."""


class GoodAnswer:
    """An exchange whose whole body is there."""

    status = 200
    content_type = "application/json"
    request_id: str | None = None

    def decode_within(self, limit: int) -> None:
        """It is plain."""

    def passed_headers(self, *, limited: bool) -> dict[str, str]:
        return {"content-type": self.content_type}

    async def read_whole(self, share: Share, limit: int, each_read: Callable[[], None]) -> bytes:
        share.hold(len(ANSWER))
        return ANSWER

    def close(self) -> None:
        """Nothing to close."""


class ScriptedClient(HttpClient):
    """Answers from a script per replica; the last entry repeats.

    Attributes:
        calls: (instant, replica, over a fresh connection) in order.
    """

    def __init__(self, script: dict[str, list[Outcome]], clock: Clock) -> None:
        super().__init__()
        self._script = {name: list(outcomes) for name, outcomes in script.items()}
        self._clock = clock
        self.calls: list[tuple[float, str, bool]] = []

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
        self.calls.append((self._clock(), endpoint.name, fresh))
        outcomes = self._script[endpoint.name]
        outcome = outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]
        if outcome is not None:
            raise outcome.with_traceback(None)
        return cast("Exchange", GoodAnswer())


class Story:
    """What happened to one request.

    Attributes:
        calls: the replicas that were called, in order.
        at: when, seconds after the start.
        fresh: whether over a connection of its own.
        error: what it ended with, or None.
        record: all of it.
        replicas: by name.
    """

    def __init__(self, client: ScriptedClient, began: float, record: Record, replicas: "dict[str, Replica]") -> None:
        self.calls = [name for _, name, _ in client.calls]
        self.at = [moment - began for moment, _, _ in client.calls]
        self.fresh = [fresh for _, _, fresh in client.calls]
        self.record = record
        self.replicas = replicas
        self.error: GatewayError | None = None

    @property
    def decisions(self) -> list[str | None]:
        return [attempt.decision for attempt in self.record.attempts]


def forward(
    script: dict[str, list[Outcome]],
    *,
    prepare: "Callable[[dict[str, Replica]], None]" = lambda _replicas: None,
    deadline: float = 600.0,
    read_timeout: float | None = None,
    first: str | None = None,
    seed: int = 0,
    **settings: float,
) -> Story:
    """Forward one prompt.

    Args:
        script: outcomes per replica; `a-1`, `a-2` are replicas of the first target, `b-1` of the second, and so on.
        prepare: called with the replicas before the request comes.
        deadline: seconds.
        read_timeout: of the OpenAI SDK, seconds.
        first: of two equally busy replicas the one that is asked first.
        seed: of all other chance.
        settings: of the gateway, by the names of its fields; no outage is bridged unless they say so.
    """
    settings = {"gateway_outage_wait": 0} | settings

    async def story(clock: Clock) -> Story:
        backends: dict[str, int] = {}
        for name in script:
            backend = name.split("-", 1)[0]
            backends[backend] = backends.get(backend, 0) + 1
        rng = Chance(*([] if first is None else [0.0 if first.endswith("-1") else 0.9]), seed=seed)
        admission = Admission(max_in_flight=2, max_queue=0, queue_timeout=1)
        where = pool(clock, backends, rng, waiting=admission.waiting, **settings)
        replicas = {replica.name: replica for replica in where.replicas}
        prepare(replicas)
        client = ScriptedClient(script, clock)
        made = load(**settings)
        forwarder = Forwarder(
            admission=admission,
            policy=RetryPolicy(made, rng),
            attempts=Attempts(made, client=client, executor=Executor(at_once=1 << 40), clock=clock, rng=Chance()),
            repeats=where.repeats,
            executor=Executor(at_once=1 << 40),
            clock=clock,
            retry_allowed=lambda _name: None,
            retry_refused=lambda _name: None,
        )
        record = Record("POST", CHAT, trace_id=1, span_id=1, request_id="r", started=clock(), started_ns=0)
        byte_budget = ByteBudget(1 << 20)
        began = clock()
        error: GatewayError | None = None
        with byte_budget.share() as share:
            call = Call(
                OpenAIChat().read_request(CHAT, BODY),
                Deadline(clock, clock(), deadline, read_timeout),
                record,
                None,
                model="m",
                targets=where.routes[0].targets,
                target=where.routes[0].targets[0],
                caller="somebody",
                share=share,
                headers=[],
                commit="first_token",
            )
            try:
                await forwarder.forward(call)
            except GatewayError as failure:
                error = failure
            assert (call.answer is None) == (error is not None)
        assert admission.in_flight == byte_budget.held == 0
        assert [replica.in_flight for replica in where.replicas] == [0] * len(where.replicas)
        told = Story(client, began, record, replicas)
        told.error = error
        return told

    return run(story)
