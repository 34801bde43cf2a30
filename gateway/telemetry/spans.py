"""The spans of a request, made from its record. Pure: ids, names, attributes, instants.

Names follow OpenTelemetry's semantic conventions: HTTP 1.44 (stable), GenAI 0.1.0 (development). Names of our own begin
with `gateway.`.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

from gateway.record import COUNTED
from gateway.telemetry.span_data import CLIENT, ERROR, SERVER, Shared, SpanData, Value

if TYPE_CHECKING:
    from gateway.record import AttemptRecord, Record


def spans_of(record: "Record") -> list[SpanData]:
    """Return the SERVER span and one CLIENT span per attempt."""
    return [_server(record), *[_client(record, attempt) for attempt in record.attempts]]


def _instant(record: "Record", moment: float) -> int:
    return record.started_ns + int((moment - record.started) * 1e9)


def _server(record: "Record") -> SpanData:
    if record.model is None or record.operation is None:
        shared = _http_attributes(record.method, record.path, record.status, record.outcome, record.generation)
    else:
        reasons = record.finish_reasons
        shared = _operation_attributes(
            record.method,
            record.path,
            record.status,
            record.outcome,
            record.generation,
            record.operation,
            record.provider,
            record.model[:256],
            record.stream,
            record.choices,
            record.max_tokens,
            record.temperature,
            record.top_p,
            record.response_model,
            tuple(reasons) if reasons is not None else None,
            record.route,
            len(record.attempts),
            record.stop_reason,
            record.charged_by,
        )
    span = SpanData(
        shared,
        trace_id=record.trace_id,
        span_id=record.span_id,
        parent_id=record.parent_id or 0,
        start=record.started_ns,
        end=_instant(record, record.ended if record.ended is not None else record.started),
        trace_state=record.trace_state,
    )
    _describe_own(record, span)
    if record.caller.name is not None:
        _describe_key(record, record.caller.name, span)
    if _error_type(record.status, record.outcome) is not None and record.outcome != LEFT:
        span.status = ERROR
        span.error = record.error_message
    if record.events or record.waits or record.first_token is not None or len(record.attempts) > 1:
        _describe_events(record, span)
    return span


def _describe_own(record: "Record", span: SpanData) -> None:
    """Add the attributes that are the request's alone."""
    span.own.append(("gateway.request_id", record.request_id))
    if record.response_id is not None:
        span.own.append(("gen_ai.response.id", record.response_id))
    if record.input_tokens is not None:
        span.own.append(("gen_ai.usage.input_tokens", record.input_tokens))
    if record.output_tokens is not None:
        span.own.append(("gen_ai.usage.output_tokens", record.output_tokens))
    if record.operation is None and record.attempts:
        span.own.append(("gateway.attempts", len(record.attempts)))
        if record.stop_reason is not None:
            span.own.append(("gateway.retry.stop_reason", record.stop_reason))
    if record.queued:
        span.own.append(("gateway.queue_seconds", record.queued))
    if record.input_text is not None:
        span.own.append(("gen_ai.input.messages", record.input_text))
    if record.output_text is not None:
        span.own.append(("gen_ai.output.messages", record.output_text))
    if record.first_token is not None:
        span.own.append(("gen_ai.response.time_to_first_chunk", record.first_token - record.started))


def _describe_key(record: "Record", name: str, span: SpanData) -> None:
    """Add whose key it is, never the key, and what of its limits was used."""
    span.own.append(("gateway.key", name))
    if record.limit is not None:
        span.own.append(("gateway.key.limit", record.limit))
    if record.charged is not None and (record.charged_by == COUNTED or record.output_tokens is None):
        span.own.append(("gateway.key.tokens", record.charged))


LEFT = "client_closed_request"
"""That a caller left is no failure: the span's status stays unset."""


def _error_type(status: int, outcome: str) -> str | None:
    """Return `error.type` of a SERVER span: for 5xx, failures after a 200 went out, callers who left; not for 4xx."""
    if status >= 500:  # noqa: PLR2004
        return str(status)
    if outcome == LEFT or (outcome != "ok" and status < 400):  # noqa: PLR2004
        return outcome
    return None


@lru_cache(maxsize=256)
def _http_attributes(method: str, path: str | None, status: int, outcome: str, generation: int) -> Shared:
    attributes: list[tuple[str, Value]] = [
        ("http.request.method", method),
        ("url.scheme", "http"),
        ("http.response.status_code", status),
        ("gateway.outcome", outcome),
        ("gateway.config_generation", generation),
    ]
    if path is not None:
        # Paths that callers make up appear nowhere: no route, no `url.path`. A template stands for itself.
        attributes += (("http.route", path), ("url.path", path))
    error_type = _error_type(status, outcome)
    if error_type is not None:
        attributes.append(("error.type", error_type))
    method = method if method != "_OTHER" else "HTTP"
    return Shared(f"{method} {path}" if path is not None else method, SERVER, attributes)


@lru_cache(maxsize=512)
def _operation_attributes(  # noqa: PLR0917 - the key of the cache
    method: str,
    path: str | None,
    status: int,
    outcome: str,
    generation: int,
    operation: str,
    provider: str | None,
    model: str,
    stream: bool,  # noqa: FBT001
    choices: int,
    max_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    response_model: str | None,
    finish_reasons: tuple[str, ...] | None,
    route: str | None,
    attempts: int,
    stop_reason: str | None,
    charged_by: str | None,
) -> Shared:
    http = _http_attributes(method, path, status, outcome, generation)
    attributes: list[tuple[str, Value]] = [
        *http.attributes,
        ("gen_ai.operation.name", operation),
        ("gen_ai.request.model", model),
        ("gateway.attempts", attempts),
    ]
    for attribute, value in (
        ("gen_ai.provider.name", provider),
        ("gen_ai.request.stream", stream or None),
        ("gen_ai.request.choice.count", choices if choices != 1 else None),
        ("gen_ai.request.max_tokens", max_tokens),
        ("gen_ai.request.temperature", temperature),
        ("gen_ai.request.top_p", top_p),
        ("gen_ai.response.model", response_model),
        ("gen_ai.response.finish_reasons", list(finish_reasons) if finish_reasons is not None else None),
        ("gateway.route", route),
        ("gateway.retry.stop_reason", stop_reason),
        ("gateway.key.tokens_source", charged_by),
    ):
        if value is not None:
            attributes.append((attribute, value))
    return Shared(http.name, SERVER, attributes)


def _describe_events(record: "Record", span: SpanData) -> None:
    for attempt in record.attempts:
        if attempt.backoff:
            slept: list[tuple[str, Value]] = [
                ("gateway.backoff_seconds", attempt.backoff),
                ("gateway.attempt", attempt.number),
            ]
            span.events.append((_instant(record, attempt.started - attempt.backoff), "gateway.backoff", slept))
    for wait in record.waits:
        waited: list[tuple[str, Value]] = [
            ("gateway.wait", wait.kind),
            ("gateway.backend", wait.backend),
            ("gateway.wait_seconds", (wait.ended or wait.began) - wait.began),
        ]
        span.events.append((_instant(record, wait.began), "gateway.waited", waited))
    for moment, name, attributes in record.events:
        span.events.append((_instant(record, moment), name, list(attributes.items())))
    if record.first_token is not None:
        span.events.append((_instant(record, record.first_token), "gateway.first_token", []))
    span.events.sort(key=lambda event: event[0])


def _client(record: "Record", attempt: "AttemptRecord") -> SpanData:
    shared = _attempt_attributes(
        attempt.url,
        attempt.host,
        attempt.port,
        attempt.number,
        attempt.status,
        attempt.backend,
        attempt.outcome,
        attempt.decision,
        attempt.breaker,
        attempt.timer,
        attempt.error_type,
        attempt.model and attempt.model[:256],
        record.method,
        record.path,
    )
    span = SpanData(
        shared,
        trace_id=record.trace_id,
        span_id=attempt.span_id,
        parent_id=record.span_id,
        own=[
            ("gateway.retry_budget.left", attempt.budget_left),
            ("gateway.deadline.left_seconds", attempt.deadline_left),
        ],
        start=_instant(record, attempt.started),
        end=_instant(record, attempt.ended if attempt.ended is not None else attempt.started),
        trace_state=record.trace_state,
    )
    own = span.own
    if attempt.request_id is not None:
        own.append(("gateway.backend_request_id", attempt.request_id))
    if attempt.backoff:
        own.append(("gateway.backoff_seconds", attempt.backoff))
    if attempt.retry_after is not None:
        own.append(("gateway.retry_after_seconds", attempt.retry_after))
    if attempt.error_type is not None and attempt.error_type not in NO_FAULT:
        span.status = ERROR
        span.error = attempt.message
    return span


@lru_cache(maxsize=512)
def _attempt_attributes(  # noqa: PLR0917 - the key of the cache
    url: str,
    host: str,
    port: int,
    number: int,
    status: int | None,
    backend: str,
    outcome: str | None,
    decision: str | None,
    breaker: str,
    timer: str | None,
    error_type: str | None,
    model: str | None,
    method: str,
    path: str | None,
) -> Shared:
    attributes: list[tuple[str, Value]] = [
        ("http.request.method", method),
        ("url.full", url),
        ("server.address", host),
        ("server.port", port),
        ("gateway.backend", backend),
        ("gateway.attempt", number),
        ("gateway.attempt.outcome", outcome or "ok"),
        ("gateway.decision", decision or "none"),
        ("gateway.breaker.state", breaker),
    ]
    for attribute, value in (
        ("http.request.resend_count", number - 1 or None),
        ("http.response.status_code", status),
        ("gen_ai.request.model", model),
        ("gateway.timer", timer),
        ("error.type", error_type),
    ):
        if value is not None:
            attributes.append((attribute, value))
    return Shared(f"{method} {path}", CLIENT, attributes)


NO_FAULT = frozenset({"cancelled", LEFT, "gateway_draining"})
"""Ends of an attempt that are no failure: the span's status stays unset."""
