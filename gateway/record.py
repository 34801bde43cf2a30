"""What happened to one request, attempt by attempt.

Written while the request is under way and read when it has ended: headers, metrics, the log line and the spans are all
rendered from it. Plain numbers and words, and who asks: no HTTP, no telemetry. Instants are seconds of
`time.monotonic`.
"""

from dataclasses import dataclass, field
from functools import lru_cache
from sys import getsizeof
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from gateway.errors import ErrorAnswer, GatewayOverloaded, RateLimitExceeded
from gateway.policy.caller import NOBODY, Caller

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gateway.errors import GatewayError
    from gateway.policy.pool import Candidate

REPORTED, COUNTED = "reported", "counted"
"""Where a number of tokens comes from: the backend's usage, or what was sent and relayed."""
MAX_NAME = 256
"""Characters kept of a name that a backend gives."""
MAX_CHOICES = 16
"""Finish reasons kept of one answer."""
MAX_REASON = 64
"""Characters kept of a finish reason."""
MAX_MESSAGE = 512
"""Characters kept of an error's message: it may quote a name of the caller's."""
MAX_TRACE_STATE = 512
"""Characters of a `tracestate`; a longer one is dropped (W3C Trace Context, 3.3.1.5)."""
MAX_NUMBER = 10**100
"""A number of a caller's that is larger is not kept."""
ATTEMPT_SIZE = 2048
EVENT_SIZE = 256
"""Bytes that an attempt, and an event or a wait, hold at most."""
TARGET_SKIPPED = "gateway.target_skipped"
"""The event of a target that was passed over."""
TARGET_DRAWN = "gateway.target_drawn"
"""The event of the draw among a route's weighted targets."""
BREAKER_CHANGED = "gateway.breaker"
"""The event of a breaker that changed its state."""
GUARD_TRIPPED = "gateway.guard_tripped"
"""The event of a target that lost its traffic."""
COOLDOWN_BEGUN = "gateway.cooldown"
"""The event of a replica that asked to be left alone."""
BRIDGING, COOLDOWN, FULL = "bridging", "cooldown", "full"
"""What a request can wait for: the end of an outage, of a cooldown, or of another request at a full backend."""
MAX_COUNT = 2**63
"""A count of tokens is below it; a larger number is not a count."""


@dataclass(slots=True, eq=False)
class Wait:
    """A wait of a request: its kind, the backend it waited for, and its two instants."""

    kind: str
    backend: str
    began: float
    ended: float | None = None


class AttemptRecord(Struct, eq=False):
    """One HTTP call to one replica.

    Attributes:
        number: 1, 2, ... over all targets, including re-sends over a fresh connection.
        backend: name of the replica.
        host, port, url: where it was sent; the url without user info.
        model: the model it asked for.
        target: of a route with weights: the names of route, backend and model, as configured; None for others.
        span_id: 64 bits.
        started, ended: instants.
        status: the HTTP status of the answer, or None.
        outcome: `ok`, or the word of the failure; None while it is under way.
        error_type: for `error.type` of the span: a status, or the failure's word; None for success.
        message: the failure's message, or None.
        resend: whether it repeats an attempt whose kept-alive connection was dead.
        backoff: seconds slept before it.
        timer: the timer that ended it (`connect`, `first_token`, `answer`, `idle`), or None.
        retry_after: seconds that the failed answer asked to wait, or None.
        breaker: state of the breaker when it was sent.
        budget_left: retries left in the replica's budget when it was sent.
        deadline_left: seconds left of the deadline when it was sent.
        decision: what was decided after it: `answered`, `retry`, `resend`, `fallback`, `waited: <kind>`,
            `gave up: <why>`.
        request_id: what the backend calls it, or None.
        passed_over: the other replicas of its backend that were looked at and could not, or should not, be asked in its
            place, each with the reason: `breaker`, `cooldown`, `full`, `avoided`.
    """

    number: int
    backend: str
    span_id: int
    started: float
    host: str = ""
    port: int = 0
    url: str = ""
    model: str | None = None
    target: tuple[str, str, str] | None = None
    ended: float | None = None
    status: int | None = None
    outcome: str | None = None
    error_type: str | None = None
    message: str | None = None
    resend: bool = False
    backoff: float = 0.0
    timer: str | None = None
    retry_after: float | None = None
    breaker: str = "closed"
    budget_left: int = 0
    deadline_left: float = 0.0
    decision: str | None = None
    request_id: str | None = None
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True, eq=False)
class Record:
    """One request.

    Attributes:
        trace_id, span_id: of the SERVER span, 128 and 64 bits; parent_id: of the caller's span, or None.
        trace_state: the caller's `tracestate`, or None.
        sampled: decided at the start, and passed on to the backend.
        request_id: the caller's, or ours.
        caller: who asks; nobody before that is known.
        generation: the number of the configuration that holds for it.
        method, path: of the request; `path` is one of the known paths, or None.
        started: when its headers had arrived; started_ns: the same in nanoseconds since the epoch.
        queued: seconds in the queue; queued_at: when they began, or None.
        queued_for: the limit of its key that it queued for; None for a slot.
        waits: for the end of outages and cooldowns, in order.
        first_token: when the first content event arrived, or None.
        candidates: the targets that it could go to, in order.
        operation: `gen_ai.operation.name`, or None when it is no prompt; provider: `gen_ai.provider.name`.
        model: the model it was forwarded for; route: the route's pattern.
        status, outcome: of the answer; `outcome` is `ok` or a word from a fixed set.
        stop_reason: why no further attempt was made, or None.
        fell_back: whether a further target was tried.
        failed_by: the attempt whose failure is the answer, where that is not the latest one.
        shed: why it was refused at admission, or None.
        limit: which limit of the caller's key refused it, or None.
        charged: tokens that count for the limits of the key; None where it has none. charged_by: `reported`, as the
            backend counted them, or `counted`, from what was sent and relayed.
        events: (instant, name, attributes) in order.
        input_text, output_text: captured text, or None.
        extra: bytes beyond those that every request may hold, while it waits for its export.
    """

    method: str
    path: str | None
    trace_id: int
    span_id: int
    request_id: str
    started: float
    started_ns: int
    parent_id: int | None = None
    caller: Caller = NOBODY
    generation: int = 0
    trace_state: str | None = None
    sampled: bool = True
    attempts: list[AttemptRecord] = field(default_factory=list)
    events: "list[tuple[float, str, Mapping[str, Any]]]" = field(default_factory=list)
    queued: float = 0.0
    queued_at: float | None = None
    queued_for: str | None = None
    candidates: "tuple[Candidate, ...]" = ()
    waits: list[Wait] = field(default_factory=list)
    ended: float | None = None
    first_token: float | None = None
    operation: str | None = None
    provider: str | None = None
    model: str | None = None
    route: str | None = None
    stream: bool = False
    choices: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    status: int = 0
    outcome: str = "ok"
    error_message: str | None = None
    stop_reason: str | None = None
    fell_back: bool = False
    failed_by: AttemptRecord | None = None
    shed: str | None = None
    limit: str | None = None
    charged: int | None = None
    charged_by: str | None = None
    response_id: str | None = None
    response_model: str | None = None
    finish_reasons: list[str] | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_text: str | None = None
    output_text: str | None = None
    extra: int = 0
    _trace: str = ""

    @property
    def trace(self) -> str:
        """The trace id as people read it: 32 hexadecimal digits."""
        if not self._trace:
            self._trace = self.trace_id.to_bytes(16).hex()
        return self._trace

    def traceparent(self, span_id: int) -> str:
        """Return the `traceparent` of a call whose span has this id (W3C Trace Context)."""
        return f"00-{self.trace}-{span_id.to_bytes(8).hex()}-{'01' if self.sampled else '00'}"

    def skip_target(self, backend: str, why: str, now: float) -> None:
        """Note that a target was passed over: `breaker`, `cooldown`, `bridging`, `full`, or what was used up."""
        self.events.append((now, TARGET_SKIPPED, _skipped(backend, why)))

    def drop_attempt(self, why: str, now: float) -> None:
        """Note that the latest attempt was none: no connection could be opened for want of `why`."""
        self.skip_target(self.attempts.pop().backend, why, now)
        if self.attempts:
            self.attempt.decision = None  # what was decided did not happen

    def draw_target(
        self, backend: str, model: str, weight: int | None, now: float, *, tripped: list[str] | None = None
    ) -> None:
        """Note which target of a route with weights was drawn, and which were `tripped`: they have no part in it."""
        drawn: dict[str, Any] = {
            "gateway.backend": backend,
            "gen_ai.request.model": model[:MAX_NAME],
            "gateway.weight": weight,
        }
        if tripped:
            drawn["gateway.tripped"] = tripped
        self.events.append((now, TARGET_DRAWN, drawn))

    def note_guard(self, backend: str, now: float) -> None:
        """Note that a target lost its traffic with this request."""
        self.events.append((now, GUARD_TRIPPED, {"gateway.backend": backend}))

    def note_cooldown(self, now: float, backend: str, seconds: float) -> None:
        """Note that an attempt began a cooldown of a replica."""
        self.events.append(
            (now, COOLDOWN_BEGUN, {"gateway.backend": backend, "gateway.cooldown_seconds": round(seconds, 3)})
        )

    def note_breaker(self, now: float, backend: str, before: str, after: str) -> None:
        """Note that an attempt changed the state of a breaker."""
        change = {"gateway.backend": backend, "gateway.breaker.from": before, "gateway.breaker.to": after}
        self.events.append((now, BREAKER_CHANGED, change))

    @property
    def skipped(self) -> list[tuple[str, str]]:
        """The targets that were passed over, each with the reason: as `skip_target`, or `guard`."""
        found: list[tuple[str, str]] = []
        for _, name, event in self.events:
            if name == TARGET_SKIPPED:
                found.append((event["gateway.backend"], event["gateway.skip_reason"]))
            elif name == TARGET_DRAWN:
                found += [(tripped, "guard") for tripped in event.get("gateway.tripped", ())]
        return found

    def describe_request(
        self,
        *,
        operation: str | None,
        provider: str,
        model: str,
        route: str,
        stream: bool,
        choices: int,
        max_tokens: float | None,
        temperature: float | None,
        top_p: float | None,
    ) -> None:
        """Note what the caller asks for, except its text."""
        self.operation = operation
        self.provider = provider
        self.model = model
        self.route = route
        self.stream = stream
        self.choices = choices if choices < MAX_NUMBER else 1
        self.max_tokens = _whole(max_tokens)
        self.temperature = temperature
        self.top_p = top_p

    def describe_answer(
        self,
        *,
        response_id: str | None,
        model: str | None,
        finish_reasons: list[str] | None,
        input_tokens: int | None,
        output_tokens: int | None,
    ) -> None:
        """Note what an answer says about itself, within bounds: a backend may say anything."""
        self.response_id = response_id and response_id[:MAX_NAME]
        self.response_model = model and model[:MAX_NAME]
        self.finish_reasons = finish_reasons and [reason[:MAX_REASON] for reason in finish_reasons[:MAX_CHOICES]]
        self.input_tokens = _count(input_tokens)
        self.output_tokens = _count(output_tokens)

    def give_up(self, why: str) -> None:
        """Note why no further attempt follows, unless the latest one already says what was decided."""
        self.stop_reason = why
        if self.attempts and self.attempt.decision is None:
            self.attempt.decision = f"gave up: {why}"

    def end_with(self, error: "GatewayError") -> None:
        """Note the error that the request ends with."""
        self.status = self.status or error.status
        self.outcome = "backend_error" if isinstance(error, ErrorAnswer) else error.code
        self.error_message = error.message[:MAX_MESSAGE]
        if isinstance(error, GatewayOverloaded):
            self.shed = error.reason
        elif isinstance(error, RateLimitExceeded):
            self.limit = error.limit

    @property
    def is_large(self) -> bool:
        """Whether it holds more than every request may: texts, further attempts, events, waits."""
        return bool(
            self.events
            or self.waits
            or len(self.attempts) > 1
            or self.input_text is not None
            or self.output_text is not None
        )

    def measure(self) -> int:
        """Return the bytes that it holds beyond those that every request may, at most; kept as `extra`."""
        texts = [text for text in (self.input_text, self.output_text) if text is not None]
        attempts, events = max(0, len(self.attempts) - 1), len(self.events) + len(self.waits)
        self.extra = sum(map(getsizeof, texts)) + ATTEMPT_SIZE * attempts + EVENT_SIZE * events
        return self.extra

    def forget_texts(self) -> None:
        """Drop what was captured of prompt and answer."""
        self.input_text = self.output_text = None

    @property
    def attempt(self) -> AttemptRecord:
        """The latest attempt."""
        return self.attempts[-1]

    @property
    def is_bridged(self) -> bool:
        """Whether it waited for the end of an outage."""
        return any(wait.kind == BRIDGING for wait in self.waits)

    @property
    def backend(self) -> str | None:
        """The replica that answered, even if with an error; None when the attempt that counts got no answer."""
        attempt = self.failed_by or (self.attempts[-1] if self.attempts else None)
        return attempt.backend if attempt is not None and attempt.status is not None else None

    def seconds(self, now: float) -> float:
        """Return the seconds from the start to the end, or to `now`."""
        return (self.ended if self.ended is not None else now) - self.started

    def server_timing(self, now: float) -> str:
        """Return the `server-timing` header (W3C Server Timing), ms: queue, attempts, backoffs and waits."""
        parts = [f"queue;dur={self.queued * 1000:.1f}" if self.queued else "queue;dur=0.0"]
        if self.events:
            for _, name, drawn in self.events:
                if name == TARGET_DRAWN:
                    parts.append(f'drawn;desc="{drawn["gateway.backend"]}";dur=0.0')
        for attempt in self.attempts:
            if self.waits:
                before = self.attempts[attempt.number - 2].started if attempt.number > 1 else 0.0
                parts += self._waits_between(before, attempt.started, now)
            if attempt.backoff:
                parts.append(f"backoff-{attempt.number - 1};dur={attempt.backoff * 1000:.1f}")
            outcome = attempt.outcome or "streaming"
            took = ((attempt.ended if attempt.ended is not None else now) - attempt.started) * 1000
            parts.append(f'attempt-{attempt.number};desc="{attempt.backend} {outcome}";dur={took:.1f}')
        if self.waits:
            parts += self._waits_between(self.attempts[-1].started if self.attempts else 0.0, now, now)
        return ", ".join(parts)

    def _waits_between(self, start: float, end: float, now: float) -> list[str]:
        return [_timing(number, wait, now) for number, wait in enumerate(self.waits, 1) if start < wait.began <= end]


def _timing(number: int, wait: Wait, now: float) -> str:
    waited = ((wait.ended if wait.ended is not None else now) - wait.began) * 1000
    return f'{wait.kind}-{number};desc="{wait.backend}";dur={waited:.1f}'


@lru_cache
def _skipped(backend: str, why: str) -> "Mapping[str, str]":
    """Return the attributes of a skipped target's event, one for all requests: a thousand may wait."""
    return {"gateway.backend": backend, "gateway.skip_reason": why}


def _whole(number: float | None) -> int | None:
    """Return a whole number: some clients write 10.0 for 10."""
    if isinstance(number, float):
        number = int(number) if number.is_integer() else None
    return number if number is None or -MAX_NUMBER < number < MAX_NUMBER else None


def _count(tokens: int | None) -> int | None:
    return tokens if tokens is not None and 0 <= tokens < MAX_COUNT else None
