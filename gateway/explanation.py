"""Why a request went as it did: its record as the documents of `GET /requests`. Pure; no prompt, no answer, no key."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from gateway.record import TARGET_DRAWN
from gateway.summary import IN_FLIGHT, sentence

if TYPE_CHECKING:
    from gateway.policy.pool import Candidate
    from gateway.record import AttemptRecord, Record, Wait

Document = dict[str, Any]
DIGITS = 6
"""Of seconds: microseconds."""


def summary(record: "Record", now: float) -> Document:
    """Return a request as an entry of the list; `now`: instant of the record's clock, for one that is under way."""
    ended = record.ended is not None
    began = datetime.fromtimestamp(record.started_ns / 1e9, UTC).isoformat(timespec="milliseconds")
    return {
        "request_id": record.request_id,
        "trace_id": record.trace,
        "started": began.replace("+00:00", "Z"),
        "seconds": round(record.seconds(now), DIGITS),
        "path": record.path,
        "route": record.route,
        "model": record.model,
        "backend": record.backend,
        "caller": record.caller.name,
        "status": record.status if ended else None,
        "outcome": record.outcome if ended else IN_FLIGHT,
        "stream": record.stream,
        "attempts": len(record.attempts),
        "first_token_seconds": _since(record, record.first_token),
        "input_tokens": record.input_tokens,
        "output_tokens": record.output_tokens,
        "why": sentence(record, now),
    }


def explanation(record: "Record", now: float) -> Document:
    """Return all there is to say about a request; instants are seconds since it began."""
    return summary(record, now) | {
        "timeline": _timeline(record),
        "attempts_made": [_attempt(record, attempt) for attempt in record.attempts],
        "targets": _targets(record),
        "waits": [_wait(record, wait) for wait in record.waits],
        "queued_seconds": round(record.queued, DIGITS),
        "stop_reason": record.stop_reason,
        "error": record.error_message,
        "shed": record.shed,
        "limit": record.limit or record.queued_for,
        "tokens": {
            "input": record.input_tokens,
            "output": record.output_tokens,
            "charged": record.charged,
            "source": record.charged_by,
        },
        "generation": record.generation,
        "events": [
            {"at": _since(record, at), "name": name, **{_short(key): value for key, value in attributes.items()}}
            for at, name, attributes in record.events
        ],
    }


def _timeline(record: "Record") -> list[Document]:
    """Return what the request did and waited for, in order."""
    entries: list[Document] = []

    def add(kind: str, label: str, start: float, end: float | None, **more: object) -> None:
        entries.append(
            {"kind": kind, "label": label, "start": _since(record, start), "end": _since(record, end)} | more
        )

    if record.queued_at is not None:
        waits = record.ended is None and not record.queued
        end = None if waits else record.queued_at + record.queued
        limit = record.queued_for
        add("limit" if limit else "queue", f"limit {limit}" if limit else "queue", record.queued_at, end, limit=limit)
    for wait in record.waits:
        add("wait", f"{wait.kind} of {wait.backend}", wait.began, wait.ended, backend=wait.backend, wait=wait.kind)
    for attempt in record.attempts:
        if attempt.backoff:
            label = f"backoff before attempt {attempt.number}"
            add("backoff", label, attempt.started - attempt.backoff, attempt.started, backend=attempt.backend)
        label = f"attempt {attempt.number} at {attempt.backend}"
        more = {"backend": attempt.backend, "outcome": attempt.outcome, "status": attempt.status}
        add("attempt", label, attempt.started, attempt.ended, **more)
    return sorted(entries, key=lambda entry: float(entry["start"]))


def _attempt(record: "Record", attempt: "AttemptRecord") -> Document:
    return {
        "number": attempt.number,
        "backend": attempt.backend,
        "model": attempt.model,
        "status": attempt.status,
        "outcome": attempt.outcome,
        "message": attempt.message,
        "timer": attempt.timer,
        "retry_after": attempt.retry_after,
        "resend": attempt.resend,
        "backoff": round(attempt.backoff, DIGITS),
        "breaker": str(attempt.breaker),
        "budget_left": attempt.budget_left,
        "deadline_left": round(attempt.deadline_left, DIGITS),
        "decision": attempt.decision,
        "backend_request_id": attempt.request_id,
        "passed_over": [{"backend": name, "why": why} for name, why in attempt.passed_over],
        "start": _since(record, attempt.started),
        "end": _since(record, attempt.ended),
    }


def _targets(record: "Record") -> list[Document]:
    """Return who could have answered, in the order of the request, and why those were not asked who were not."""
    skipped = dict(record.skipped)
    weighted = any(name == TARGET_DRAWN for _, name, _ in record.events)
    asked = {(attempt.backend, attempt.model) for attempt in record.attempts}
    over = {name: why for attempt in record.attempts for name, why in attempt.passed_over}
    targets = []
    for number, candidate in enumerate(record.candidates):
        model = candidate.model or record.model or None
        names = {name for name in candidate.replicas if (name, model) in asked}
        kept_from = skipped.get(candidate.backend) or skipped.get(candidate.name)
        why_not = None if names else kept_from or _not_needed(record, weighted=weighted)
        targets.append(
            {
                "backend": candidate.backend,
                "model": model,
                "weight": candidate.weight,
                "drawn": weighted and number == 0,
                "tried": bool(names),
                "why_not": why_not,
                "replicas": _replicas(candidate, names, over, why_not or "not drawn"),
            }
        )
    return targets


def _replicas(candidate: "Candidate", asked: set[str], over: dict[str, str], why_not: str) -> list[Document]:
    return [
        {"name": name, "tried": name in asked, "why_not": None if name in asked else over.get(name, why_not)}
        for name in candidate.replicas
    ]


def _not_needed(record: "Record", *, weighted: bool) -> str:
    """Return why a target was not asked that nothing kept from it."""
    if record.ended is None:
        return "not yet"
    if record.outcome == "ok":
        return "weight" if weighted and not record.fell_back else "not needed"
    return record.stop_reason or record.outcome


def _wait(record: "Record", wait: "Wait") -> Document:
    return {
        "kind": wait.kind,
        "backend": wait.backend,
        "start": _since(record, wait.began),
        "end": _since(record, wait.ended),
    }


def _since(record: "Record", instant: float | None) -> float | None:
    return None if instant is None else round(instant - record.started, DIGITS)


def _short(key: str) -> str:
    """Return the last name of an attribute: what it is of, the event says."""
    return key.removeprefix("gateway.").removeprefix("gen_ai.request.").rpartition(".")[2]
