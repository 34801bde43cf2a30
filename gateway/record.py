"""What happened to one request, attempt by attempt.

Written while the request is under way, read when it has ended: headers, metrics, the log line and the spans are all
rendered from it. Plain numbers and words only: no HTTP, no telemetry. All instants are seconds of
`time.monotonic`.
"""

from time import time_ns
from typing import TYPE_CHECKING, Any

from gateway.dialects.capture import answer_messages, prompt_messages
from gateway.errors import ErrorAnswer, GatewayOverloaded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gateway.dialects.requests import Prompt
    from gateway.errors import GatewayError

MAX_NAME = 256
"""Characters kept of a name that a backend gives."""
MAX_CHOICES = 16
"""Finish reasons kept of one answer."""
SKIPPED = "gateway.target_skipped"
"""The event of a target that was passed over."""
MAX_COUNT = 2**63
"""A count of tokens is below it; what is not is no count."""


class Attempt:
    """One HTTP call to one replica.

    Attributes:
        number: 1, 2, ... over all targets, a re-send on a fresh connection included.
        backend: name of the replica.
        host, port, url: where it was sent; the url without user info.
        model: the model it was asked for, or None for the caller's own words.
        span_id: 64 bits.
        started, ended: seconds.
        status: the HTTP status of the answer, or None.
        outcome: `ok`, or the word of the failure; None while it is under way.
        error_type: for `error.type` of the span: a status, or the failure's word; None for success.
        message: the failure's message, or None.
        resend: whether it repeats an attempt whose kept-alive connection died.
        backoff: seconds slept before it.
        timer: the timer that ended it (`connect`, `first_token`, `answer`, `idle`), or None.
        retry_after: what the failed answer asked to wait, seconds, or None.
        breaker: state of the breaker when it was sent.
        budget_left: retries left in the replica's budget when it was sent.
        deadline_left: seconds left of the deadline when it was sent.
        decision: what was decided after it: `answered`, `retry`, `resend`, `fallback`, `gave up: <why>`.
    """

    __slots__ = (
        "backend",
        "backoff",
        "breaker",
        "budget_left",
        "deadline_left",
        "decision",
        "ended",
        "error_type",
        "host",
        "message",
        "model",
        "number",
        "outcome",
        "port",
        "resend",
        "retry_after",
        "span_id",
        "started",
        "status",
        "timer",
        "url",
    )

    def __init__(self, number: int, backend: str, span_id: int, started: float) -> None:
        self.number = number
        self.backend = backend
        self.span_id = span_id
        self.started = started
        self.host = ""
        self.port = 0
        self.url = ""
        self.timer: str | None = None
        self.model: str | None = None
        self.ended: float | None = None
        self.status: int | None = None
        self.outcome: str | None = None
        self.error_type: str | None = None
        self.message: str | None = None
        self.resend = False
        self.backoff = 0.0
        self.retry_after: float | None = None
        self.breaker = "closed"
        self.budget_left = 0
        self.deadline_left = 0.0
        self.decision: str | None = None


class Record:
    """One request.

    Attributes:
        trace_id, span_id: of the SERVER span, 128 and 64 bits; parent_id: of the caller's span, or None.
        trace_state: the caller's `tracestate`, or None.
        sampled: decided at the start; what the backend is told.
        request_id: the caller's, or ours.
        method, path: of the request; `path` is one of the known paths, or None.
        started: when its headers had arrived; started_ns: the same, nanoseconds since the epoch.
        queued: seconds in the queue.
        first_token: when the first content event arrived, or None.
        model: the model it was forwarded for; route: the route's pattern.
        status, outcome: of the answer; `outcome` is `ok` or a word of a bounded set.
        stop_reason: why no further attempt was made, or None.
        fell_back: whether a further target was tried.
        shed: why it was refused at admission, or None.
        events: (instant, name, attributes) in order.
    """

    __slots__ = (
        "attempts",
        "choices",
        "ended",
        "error_message",
        "events",
        "fell_back",
        "finish_reasons",
        "first_token",
        "input_text",
        "input_tokens",
        "max_tokens",
        "method",
        "model",
        "outcome",
        "output_text",
        "output_tokens",
        "parent_id",
        "path",
        "queued",
        "request_id",
        "response_id",
        "response_model",
        "route",
        "sampled",
        "shed",
        "span_id",
        "started",
        "started_ns",
        "status",
        "stop_reason",
        "stream",
        "temperature",
        "top_p",
        "trace_id",
        "trace_state",
    )

    def __init__(
        self, method: str, path: str | None, *, trace_id: int, span_id: int, request_id: str, started: float
    ) -> None:
        self.method = method
        self.path = path
        self.trace_id = trace_id
        self.span_id = span_id
        self.request_id = request_id
        self.started = started
        self.started_ns = time_ns()
        self.parent_id: int | None = None
        self.trace_state: str | None = None
        self.sampled = True
        self.attempts: list[Attempt] = []
        self.events: list[tuple[float, str, dict[str, Any]]] = []
        self.queued = 0.0
        self.ended: float | None = None
        self.first_token: float | None = None
        self.model: str | None = None
        self.choices = 1
        self.max_tokens: int | None = None
        self.temperature: float | None = None
        self.top_p: float | None = None
        self.route: str | None = None
        self.stream = False
        self.status = 0
        self.outcome = "ok"
        self.error_message: str | None = None
        self.stop_reason: str | None = None
        self.fell_back = False
        self.shed: str | None = None
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.finish_reasons: list[str] | None = None
        self.response_model: str | None = None
        self.response_id: str | None = None
        self.input_text: str | None = None
        self.output_text: str | None = None

    def skipped(self, backend: str, now: float) -> None:
        """A target was passed over: the breakers of its replicas are open."""
        self.events.append((now, SKIPPED, {"gateway.backend": backend, "gateway.skip_reason": "breaker"}))

    def asked(self, prompt: "Prompt", *, model: str, route: str, keep_text: bool) -> None:
        """What the caller asks for is known; of its text nothing is kept, unless `keep_text`."""
        self.model = model
        self.route = route
        self.stream = prompt.stream
        self.choices = prompt.choices
        self.max_tokens = _whole(prompt.max_tokens)
        self.temperature = prompt.temperature
        self.top_p = prompt.top_p
        if keep_text:
            self.input_text = prompt_messages(prompt.body)

    def answered(
        self,
        *,
        response_id: str | None,
        model: str | None,
        finish_reasons: list[str] | None,
        input_tokens: int | None,
        output_tokens: int | None,
        texts: "Sequence[str] | None",
    ) -> None:
        """What an answer says about itself; a backend may say anything, so that all of it is bounded here."""
        self.response_id = response_id and response_id[:MAX_NAME]
        self.response_model = model and model[:MAX_NAME]
        self.finish_reasons = finish_reasons and [reason[:MAX_NAME] for reason in finish_reasons[:MAX_CHOICES]]
        self.input_tokens = _count(input_tokens)
        self.output_tokens = _count(output_tokens)
        self.output_text = None if texts is None else answer_messages(texts, self.finish_reasons)

    @property
    def texts(self) -> int:
        """Characters captured of prompt and answer."""
        return len(self.input_text or "") + len(self.output_text or "")

    def forget_texts(self) -> None:
        """What was captured of prompt and answer is not kept any longer."""
        self.input_text = self.output_text = None

    def failed(self, error: "GatewayError", status: int) -> None:
        """The request ends with `error`."""
        self.status = self.status or status
        self.outcome = "backend_error" if isinstance(error, ErrorAnswer) else error.code
        self.error_message = error.message
        if isinstance(error, GatewayOverloaded):
            self.shed = error.reason

    @property
    def attempt(self) -> Attempt:
        """The latest attempt."""
        return self.attempts[-1]

    @property
    def backend(self) -> str | None:
        """The replica that answered, if only with an error; None when the last attempt got no answer."""
        if self.attempts and self.attempts[-1].status is not None:
            return self.attempts[-1].backend
        return None

    def seconds(self, now: float) -> float:
        """Seconds since the start."""
        return (self.ended if self.ended is not None else now) - self.started

    def server_timing(self, now: float) -> str:
        """The `server-timing` header (W3C Server Timing), ms: queue, each attempt with its outcome, each backoff."""
        parts = [f"queue;dur={self.queued * 1000:.1f}" if self.queued else "queue;dur=0.0"]
        for attempt in self.attempts:
            if attempt.backoff:
                parts.append(f"backoff-{attempt.number - 1};dur={attempt.backoff * 1000:.1f}")
            outcome = attempt.outcome or ("streaming" if self.stream else "ok")
            took = ((attempt.ended if attempt.ended is not None else now) - attempt.started) * 1000
            parts.append(f'attempt-{attempt.number};desc="{attempt.backend} {outcome}";dur={took:.1f}')
        return ", ".join(parts)


def _whole(number: float | None) -> int | None:
    """Some clients write 10.0 for 10."""
    if isinstance(number, float):
        return int(number) if number.is_integer() else None
    return number


def _count(tokens: int | None) -> int | None:
    return tokens if tokens is not None and 0 <= tokens < MAX_COUNT else None
