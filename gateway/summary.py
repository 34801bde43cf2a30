"""One sentence that says what happened to a request, and why. Pure; of prompt and answer it has nothing.

The failures speak with the messages of `errors.py`, put into the sentence: "The backend answered 502." becomes
"primary-1 answered 502".
"""

from itertools import groupby
from typing import TYPE_CHECKING

from gateway.errors import (
    BackendRateLimited,
    BackendUnavailable,
    CallerLeft,
    DeadlineExceeded,
    ErrorInside,
    GatewayDraining,
    GatewayOverloaded,
    InternalError,
    InvalidApiKey,
    RateLimitExceeded,
)
from gateway.record import BRIDGING, COOLDOWN, FULL, GUARD_TRIPPED, TARGET_DRAWN

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gateway.record import AttemptRecord, Record, Wait

IN_FLIGHT = "in_flight"
"""The outcome of a request that is under way."""
MAX_FAILURES = 4
"""Groups of failures that are told one by one."""
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
PASSED_OVER = {
    "breaker": ("its circuit breaker was open", "their circuit breakers were open"),
    "cooldown": ("it had asked to be left alone", "they had asked to be left alone"),
    "bridging": (
        "others already waited for the end of its outage",
        "others already waited for the end of their outages",
    ),
    "full": ("it was full (max_in_flight)", "they were full (max_in_flight)"),
    "guard": ("the route's guard had taken its traffic", "the route's guard had taken their traffic"),
    "avoided": (
        "it had failed or refused requests a short time before",
        "they had failed or refused requests a short time before",
    ),
    "descriptors": ("the gateway had no file descriptor left for a connection",) * 2,
    "ports": ("the gateway had no local port left for a connection",) * 2,
    "buffers": ("the gateway's machine had no memory left for a connection",) * 2,
}
"""Why a target or a replica was passed over, or several were."""
NO_MORE = {
    "not retryable": "asking again would not have changed that",
    "attempts": "no target gets more attempts than that",
    "budget": "the retry budget was used up",
    "cooldown": "nobody else could answer in the time that a request may wait",
    "bridging": "the outage lasted longer than requests wait for its end",
    "repeat": "each replica was asked only once, since the same request had failed a short time before",
    "no other replica": "nobody else could be asked",
    "breaker": "no circuit breaker admitted another attempt",
    "deadline": "too little of the deadline was left to try again",
    "full": "whoever else could answer was full (max_in_flight)",
    "committed": "nothing can be retried at that point",
}
"""Why no further attempt was made."""
SHED = {
    "queue_full": "every slot was taken, and the queue was full",
    "queue_timeout": "no slot became free in the time that a request may queue",
    "memory": "the gateway held as many bytes as it may, for all requests or for this caller",
    "backend_full": "every backend that could answer was full (max_in_flight)",
    "connections": "the gateway had no free connection",
    "descriptors": "the gateway had no file descriptor left for a connection to a backend",
    "ports": "the gateway had no local port left for a connection to a backend",
    "buffers": "the gateway's machine had no memory left for a connection to a backend",
}
"""Why a request was refused at admission, or no connection could be opened."""
WAITING = {
    BRIDGING: "for the end of {}'s outage",
    COOLDOWN: "for the end of {}'s cooldown",
    FULL: "for a free place at {}",
}
"""What a request waits for."""
WHY_NOT = {
    "weight": "the draw by weight chose another",
    "not needed": "another one answered",
    "not yet": "it may be asked yet",
} | {why: one for why, (one, _) in PASSED_OVER.items()}
"""Why a target or a replica was not asked."""
PAST = {
    " is ": " was ",
    " are ": " were ",
    " has ": " had ",
    " needs ": " needed ",
    " cannot be asked now. Of ": " could not be asked, and of ",
}
"""Messages are told in the past."""
BACKENDS_OWN = "backend_error"
"""The outcome of a request whose answer is a backend's own error."""
OWN_ENDS = frozenset({DeadlineExceeded.code, GatewayDraining.code, InternalError.code, GatewayOverloaded.code})
"""Outcomes of requests that no backend's failure ended."""
CUT_SHORT = OWN_ENDS | {"cancelled"}
"""Outcomes of attempts that were ended, and did not fail."""


def sentence(record: "Record", now: float) -> str:
    """Return what happened to a request, in one sentence; `now`: instant of the record's clock."""
    if record.ended is None:
        return _under_way(record, now)
    took = duration(record.seconds(now))
    if record.outcome == "ok":
        return _answered(record, took)
    if record.outcome == CallerLeft.code:
        return _left(record, took)
    if 200 <= record.status < 300:  # noqa: PLR2004 - the status went out before the failure
        return _broke_off(record, took)
    return _failed(record, took) if record.attempts else _refused(record, took)


def duration(seconds: float) -> str:
    """Return seconds as people say them."""
    if 0 < seconds < 0.00095:  # noqa: PLR2004
        return f"{seconds * 1000:.1f} ms"
    if seconds < 0.0995:  # noqa: PLR2004
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:  # noqa: PLR2004
        return f"{seconds:.1f}".removesuffix(".0") + " s"
    if seconds < 119.5:  # noqa: PLR2004
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if rest else f"{minutes} min"


def _answered(record: "Record", took: str) -> str:
    if not record.attempts:
        return f"Answered by the gateway itself, in {took}."
    text = f"Answered by {record.attempt.backend} at the {_ordinal(len(record.attempts))} attempt, in {took}"
    text += _spent(record)
    failures = _failures(record.attempts[:-1])
    if failures:
        text += f", after {failures}"
    return _sentence(text, *_choice(record))


def _failed(record: "Record", took: str) -> str:
    code = f" ({record.outcome})" if record.outcome != BACKENDS_OWN else ""
    number = len(record.attempts)
    after = f"after {number} attempts in {took}" if number > 1 else f"at the first attempt, in {took}"
    head = f"Failed with {record.status}{code} {after}{_spent(record)}"
    if record.failed_by is not None and record.failed_by is not record.attempt:
        head += f", with the answer of {record.failed_by.backend}"
    return _sentence(f"{head}: {_how_it_failed(record)}", *_choice(record))


def _broke_off(record: "Record", took: str) -> str:
    """Say how an answer broke off whose status had gone out."""
    is_only_heartbeat = record.stream and record.first_token is None and record.stop_reason != "committed"
    sent = "only heartbeats" if is_only_heartbeat else "part of the answer"
    head = f"Broke off after {took}{_spent(record)}, with {sent} already sent"
    told = "the caller got the error as the last event" if record.stream else ""
    return _sentence(f"{head}: {_how_it_failed(record)}", told, *_choice(record))


def _how_it_failed(record: "Record") -> str:
    """Say what failed, and why no further attempt was made; or who else ended the request."""
    failures = _failures(record.attempts)
    if not failures and record.outcome not in OWN_ENDS:
        return _clause(record)
    if record.outcome in OWN_ENDS:
        return f"{failures}, and then {_own_end(record)}" if failures else _own_end(record)
    why = NO_MORE.get(record.stop_reason or "")
    return f"{failures}, and {why}" if why else failures


def _left(record: "Record", took: str) -> str:
    head = f"The caller left after {took}{_spent(record)}, {_meanwhile(record) or _before(record)}"
    failures = _failures(record.attempts)
    return _sentence(f"{head}, after {failures}" if failures else head, *_choice(record))


def _meanwhile(record: "Record") -> str:
    """Return what a request waited for when it was ended, or who was answering it; empty where it was neither."""
    if record.waits and (not record.attempts or record.waits[-1].began > record.attempt.started):
        return f"while the request waited {_waited_for(record.waits[-1])}"
    if not record.attempts:
        return "while the request was queued" if record.queued_at is not None else ""
    if record.attempt.outcome not in CUT_SHORT:
        return ""
    return f"while {record.attempt.backend} {'was sending its answer' if _has_begun(record) else 'was being asked'}"


def _before(record: "Record") -> str:
    """Return what a request came to an end before."""
    if not record.attempts:
        return "before the request was forwarded"
    if record.attempt.outcome == "ok":
        return f"before it had taken the answer of {record.attempt.backend}"
    return "before the request was sent again"


def _has_begun(record: "Record") -> bool:
    """Return whether the latest attempt has brought a part of the answer."""
    return record.first_token is not None and record.first_token >= record.attempt.started


def _refused(record: "Record", took: str) -> str:
    """Say why no attempt was made."""
    is_refusal = record.outcome not in {DeadlineExceeded.code, InternalError.code}
    head = f"{'Refused' if is_refusal else 'Failed'} with {record.status} ({record.outcome})"
    if record.outcome == InvalidApiKey.code:
        return f"{head}: it carried no valid gateway key."
    if record.outcome == RateLimitExceeded.code:
        return f"{head} after {took}{_spent(record)}: {_limit(record)}."
    unasked = f"{head} after {took}{_spent(record)}, without an attempt"
    if record.outcome in {BackendUnavailable.code, BackendRateLimited.code}:
        return _sentence(f"{unasked}: {_passed_over(record) or _clause(record)}", _guard(record))
    if record.outcome in OWN_ENDS:
        return _sentence(f"{unasked}: {_own_end(record)}", *_choice(record))
    return f"{head}, and not forwarded: {_clause(record)}."


def _limit(record: "Record") -> str:
    """Say which limit of its key kept a request out, and what was left of it."""
    whose = record.caller.name or "its key"
    return _past(_clause(record)).replace("this key", whose)


def _under_way(record: "Record", now: float) -> str:
    """Say what a request waits for now."""
    head = f"Under way for {duration(record.seconds(now))}"
    failures = _failures([each for each in record.attempts if each.ended is not None])
    after = f"; so far {failures}" if failures else ""
    if record.waits and record.waits[-1].ended is None:
        return f"{head}: it waits {_waited_for(record.waits[-1])}{after}."
    if not record.attempts:
        if record.queued_at is not None and not record.queued:
            return f"{head}: it waits in the queue{_for_limit(record)}."
        return f"{head}: it has not been forwarded yet."
    attempt = record.attempt
    if attempt.ended is None:
        if _has_begun(record):
            doing = f"{attempt.backend} is sending its answer"
        else:
            doing = f"{attempt.backend} has been asked {duration(now - attempt.started)} ago and has not answered yet"
        which = f" (attempt {attempt.number})" if attempt.number > 1 else ""
        return f"{head}: {doing}{which}{after}."
    if attempt.outcome == "ok":
        return f"{head}: the answer of {attempt.backend} is on its way to the caller{after}."
    return f"{head}: it is about to be sent again{after}."


def _own_end(record: "Record") -> str:
    """Say how a request ended that neither a backend nor its caller ended."""
    meanwhile = _meanwhile(record)
    if record.outcome == InternalError.code:
        own = "the gateway failed by a defect of its own, which its log has under this trace id"
        return f"{own}, {meanwhile}" if meanwhile else own
    if record.outcome == GatewayOverloaded.code:
        return SHED.get(record.shed or "", "the gateway was overloaded")
    if not meanwhile:
        return "the gateway was stopping" if record.outcome == GatewayDraining.code else _clause(record)
    own = "the gateway was stopped" if record.outcome == GatewayDraining.code else "the deadline passed"
    return f"{own} {meanwhile}"


def _failures(attempts: "Iterable[AttemptRecord]") -> str:
    """Return what failed, in order: `primary-1 answered 502 twice, then sent no content within 30 s`."""
    told = [_told(attempt) for attempt in attempts if attempt.outcome not in {"ok", None, *CUT_SHORT}]
    groups = [(who, what, len(list(same))) for (who, what), same in groupby(told)]
    parts: list[str] = []
    before = None
    for who, what, times in groups[:MAX_FAILURES]:
        often = TIMES.get(times, f"{times} times")
        is_plain = what.startswith("answered") and what[-1].isdigit()
        text = what if times == 1 else f"{what} {often}" if is_plain else f"{what} ({often})"
        if who and who == before:
            text = f"its{text[2:]}" if text.startswith("'s ") else text
        elif who:
            text = f"{who}{text}" if text.startswith("'s ") else f"{who} {text}"
        parts.append(text)
        before = who
    rest = sum(times for _, _, times in groups[MAX_FAILURES:])
    if rest:
        parts.append(f"{rest} more attempts failed" if rest > 1 else "one more attempt failed")
    return ", then ".join(parts)


def _told(attempt: "AttemptRecord") -> tuple[str, str]:
    """Return who failed and how: a replica and what it did; or nobody and a whole clause."""
    name, message = attempt.backend, _past((attempt.message or "").rstrip("."))
    outcome = attempt.outcome or ""
    if outcome.startswith("status_") and attempt.status is not None and attempt.status < 300:  # noqa: PLR2004
        return name, f"sent an error ({outcome.removeprefix('status_')}) inside a {attempt.status}"
    if outcome == ErrorInside.word:
        return name, "sent an error event"
    if attempt.retry_after is not None and outcome.startswith("status_"):
        message += f" and asked to be left alone for {duration(attempt.retry_after)}"
    for subject in ("The backend", name):
        if message.startswith(f"{subject}'s "):
            return name, message.removeprefix(subject)
        if message.startswith(f"{subject} "):
            return name, message.removeprefix(f"{subject} ")
    if message:
        return "", _lower(message).replace("the backend's", f"{name}'s")
    return name, f"failed ({outcome})"


def _choice(record: "Record") -> tuple[str, str, str]:
    """Return who was drawn, who was passed over, and whose traffic a guard took now, each in a clause or empty."""
    return _drawn(record), _passed_over(record), _guard(record)


def _passed_over(record: "Record") -> str:
    """Return which targets and replicas were passed over, and why; not those that were only waited for."""
    asked = {attempt.backend for attempt in record.attempts}
    for target in record.candidates:
        if not asked.isdisjoint(target.replicas):
            asked |= {target.backend, target.name}
    told = {(wait.backend, wait.kind) for wait in record.waits}
    skipped = [each for each in record.skipped if each not in told]
    skipped += [over for attempt in record.attempts for over in attempt.passed_over if over[0] not in asked]
    whom: dict[tuple[str, bool], dict[str, None]] = {}
    for who, why in skipped:
        whom.setdefault((why, who in asked), {})[who] = None
    parts = []
    for (why, was_asked), names in whom.items():
        one, several = PASSED_OVER.get(why, (why, why))
        was, reason = ("was", one) if len(names) == 1 else ("were", several)
        first = " at first" if was_asked else ""
        parts.append(f"{_list(names)} {was} passed over{first} because {reason}")
    return ", and ".join(parts)


def _drawn(record: "Record") -> str:
    for _, name, drawn in record.events:
        if name == TARGET_DRAWN:
            return f"{drawn['gateway.backend']} was drawn first, by its weight of {drawn['gateway.weight']}"
    return ""


def _guard(record: "Record") -> str:
    """Return whose traffic the guard took with this request."""
    for _, name, event in record.events:
        if name == GUARD_TRIPPED:
            return f"the route's guard took the traffic of {event['gateway.backend']} with this request"
    return ""


def _spent(record: "Record") -> str:
    """Return, in parentheses, when the first token came and where time went besides attempts."""
    parts = []
    if record.queued >= 0.001:  # noqa: PLR2004
        parts.append(f"{duration(record.queued)} in the queue{_for_limit(record)}")
    for (kind, backend), same in groupby(record.waits, key=lambda wait: (wait.kind, wait.backend)):
        total = sum((wait.ended or wait.began) - wait.began for wait in same)
        parts.append(f"{duration(total)} waiting {WAITING[kind].format(backend)}")
    backoff = sum(attempt.backoff for attempt in record.attempts)
    if backoff:
        parts.append(f"{duration(backoff)} in backoff")
    if record.first_token is not None and record.ended is not None:
        parts.append(f"first token after {duration(record.first_token - record.started)}")
    return f" ({', '.join(parts)})" if parts else ""


def _list(names: "Iterable[str]") -> str:
    """Return names as people list them."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _for_limit(record: "Record") -> str:
    return f" for the limit {record.queued_for} of its key" if record.queued_for is not None else ""


def _waited_for(wait: "Wait") -> str:
    return WAITING[wait.kind].format(wait.backend)


def _past(text: str) -> str:
    for present, past in PAST.items():
        text = text.replace(present, past)
    return text


def _ordinal(number: int) -> str:
    if number <= len(ORDINALS):
        return ORDINALS[number - 1]
    ending = "th" if number % 100 in {11, 12, 13} else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _clause(record: "Record") -> str:
    """Return what the caller was told as a part of a sentence."""
    return _lower((record.error_message or "nobody knows why").rstrip("."))


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:] if text[1:2].islower() or text.startswith("A ") else text


def _sentence(*parts: str) -> str:
    return "; ".join(filter(None, parts)) + "."
