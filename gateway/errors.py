"""Every error a caller can get, as a tree. The type of an error decides what happens next: it is the policy.

::

    GatewayError                     status  code
    |- CallerError                   4xx     the request itself is wrong; it was not forwarded
    |  |- InvalidJson                400     invalid_json
    |  |- InvalidRequest             400     invalid_request
    |  |  `- UnsupportedHttpVersion  505     neither HTTP/1.1 nor HTTP/1.0
    |  |- InvalidApiKey              401     invalid_api_key
    |  |- ModelNotAllowed            403     model_not_allowed
    |  |- NotFound                   404     not_found
    |  |- ModelNotFound              404     model_not_found
    |  |- MethodNotAllowed           405     method_not_allowed
    |  |- RequestTimeout             408     request_timeout
    |  |- RequestTooLarge            413     request_too_large
    |  |- UnsupportedMediaType       415     unsupported_media_type
    |  `- HeadersTooLarge            431     headers_too_large
    |- InternalError                 500     internal_error
    |- CallerLeft                    499     client_closed_request, in metrics and logs only
    |- DeadlineExceeded              504     deadline_exceeded
    |- Refusal                       503     nobody who could answer was asked; says when to try again
    |  |- BackendUnavailable                 backend_unavailable
    |  |- BackendRateLimited      429        backend_rate_limited
    |  |- RateLimitExceeded       429        rate_limit_exceeded    a limit of the caller's key
    |  |- GatewayOverloaded                  gateway_overloaded
    |  |  |- BackendFull                      every replica that could answer has its `max_in_flight`
    |  |  `- NoConnection                     descriptors, local ports or the system's buffers are used up
    |  `- GatewayDraining                    gateway_draining
    `- BackendError                          how one attempt failed, and what follows
       |- ConnectionFailed           502     backend_connection_error   refused, DNS, reset before headers
       |  |- Unreachable             502     refused, unresolved, no route, TLS failed: no request was sent
       |  |- ConnectTimeout          504     backend_timeout, param connect
       |  `- StaleConnection         502     a kept-alive connection died before a byte of the answer
       |- InvalidResponse            502     backend_invalid_response   cut or unreadable
       |  |- AnswerTooLarge          502     larger than GATEWAY_MAX_ANSWER_BYTES: our limit, not its failure
       |  |- PartTooLarge            502     an event larger than that, headers larger than 64 KiB: the same
       |  |- CutOff                  502     the connection failed in the middle of the answer
       |  |- WrongForm               502     a stream where none was asked for, or the other way round
       |  `- ErrorInside             502     a good status with an error inside: read, it is an error answer
       |- Silent                     504     backend_timeout, param first_token or answer
       |- Stalled                    504     backend_timeout, param idle
       |- AuthRefused                502     backend_auth_error         the backend's own 401 or 403
       `- ErrorAnswer                        the backend answered with an error: passed on unchanged
          |- RateLimited             429, and 503 or 529 with a Retry-After: the replica is left alone
          |- ServerFault             408 5xx
          |- Exhausted               4xx     another target may answer
          |  |- ContextTooLong
          |  |- QuotaSpent
          |  |- NoSuchModel
          |  |- NoSuchPath          a 404 that names no model
          |  `- NoSuchResponse      each replica is asked for it
          `- Rejected                4xx     all others
"""

import copyreg
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


def drop_frames(error: BaseException) -> None:
    """Drop the traceback of a handled error, and the errors it came from with theirs.

    Their frames hold the request's bytes and often the error itself: a cycle that only Python's collector would free.
    """
    handled = [error]
    for each in handled:
        handled += [origin for origin in (each.__cause__, each.__context__) if origin is not None]
        each.__traceback__ = each.__cause__ = each.__context__ = None


class Verdict(Enum):
    """What an attempt means to the breaker of its replica."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEITHER = "neither"


class GatewayError(Exception):
    """An error that has an answer.

    Attributes:
        status: HTTP status of the answer.
        code: the contract's error code.
        message: for people; never quotes a prompt, an answer or a key.
        param: the field, header or timer it is about, or None.
        retry_after: seconds after which another try makes sense, or None.
        outcome: a short word from a fixed set, for metrics, logs and `server-timing`: `word`, else the code.
    """

    status: int = 500
    code: ClassVar[str] = "internal_error"
    word: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.outcome = self.word or self.code

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what pickles make it of again, whatever its constructor takes: see `side_process.py`."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class CallerError(GatewayError):
    """The request itself is wrong."""


class InvalidJson(CallerError):
    """The body is empty, no JSON, or nested too deep."""

    status = 400
    code = "invalid_json"


class InvalidRequest(CallerError):
    """A field or header is wrong, or the HTTP is malformed; `param` names the field or header."""

    status = 400
    code = "invalid_request"


class UnsupportedHttpVersion(InvalidRequest):
    """The request is in a version of HTTP other than 1.1 and 1.0 (RFC 9110, 15.6.6)."""

    status = 505

    def __init__(self) -> None:
        super().__init__("The gateway speaks HTTP/1.1 and HTTP/1.0. Send the request in one of them.")


class InvalidApiKey(CallerError):
    """Keys are configured, and the request carries none of them; `shown`: it carries another one."""

    status = 401
    code = "invalid_api_key"

    def __init__(self, message: str, *, shown: bool = False) -> None:
        super().__init__(message)
        self.shown = shown


class ModelNotAllowed(CallerError):
    """The caller's key may not use the model."""

    status = 403
    code = "model_not_allowed"


class NotFound(CallerError):
    """Unknown path."""

    status = 404
    code = "not_found"

    def __init__(
        self,
        message: str = "There is nothing at this path. Prompts go to /v1/chat/completions; GET / says where to look.",
        *,
        param: str | None = None,
    ) -> None:
        super().__init__(message, param=param)


class ModelNotFound(CallerError):
    """No route matches the model."""

    status = 404
    code = "model_not_found"


class MethodNotAllowed(CallerError):
    """The path is known, the method is not."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(CallerError):
    """The caller's body did not arrive in time."""

    status = 408
    code = "request_timeout"


class RequestTooLarge(CallerError):
    """The caller's body is too large."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(CallerError):
    """The body is not `application/json`, or in a content coding that is not decoded."""

    status = 415
    code = "unsupported_media_type"


class HeadersTooLarge(CallerError):
    """Request line or headers too large."""

    status = 431
    code = "headers_too_large"

    def __init__(self, message: str = "The request line or the headers are too large.") -> None:
        super().__init__(message)


class InternalError(GatewayError):
    """A defect of the gateway: logged with its trace; the answer reveals nothing of it."""

    def __init__(self, message: str = "The gateway failed. Its log has the details under this trace id.") -> None:
        super().__init__(message)


class CallerLeft(GatewayError):
    """The caller closed the connection before the answer ended; nobody receives this."""

    status = 499
    code = "client_closed_request"

    def __init__(self, message: str = "The caller closed the connection.") -> None:
        super().__init__(message)


class DeadlineExceeded(GatewayError):
    """The request's deadline passed, wherever the request was."""

    status = 504
    code = "deadline_exceeded"


class Refusal(GatewayError):
    """Nobody who could answer was asked; `retry_after` (seconds) says when to try again."""

    status = 503


class BackendUnavailable(Refusal):
    """The breakers of all backends for this request are open."""

    code = "backend_unavailable"


class BackendRateLimited(Refusal):
    """Every replica that could answer has asked to be left alone."""

    status = 429
    code = "backend_rate_limited"


class RateLimitExceeded(Refusal):
    """A limit of the caller's key is used up.

    Attributes:
        limit: its name.
        wait: seconds until the request may fit; 0: when another one of the same key ends.
    """

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: str, wait: float) -> None:
        super().__init__(message, retry_after=wait)
        self.limit = limit
        self.wait = wait


class GatewayOverloaded(Refusal):
    """Something is full or used up, or the request queued too long; `reason` says which. No backend's failure."""

    code = "gateway_overloaded"

    def __init__(self, message: str, *, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)
        self.reason = reason


class BackendFull(GatewayOverloaded):
    """Every replica that could answer has as many attempts under way as it may have."""

    def __init__(self) -> None:
        super().__init__(
            "All backends for this request have as many requests under way as they may have.", reason="backend_full"
        )


class NoConnection(GatewayOverloaded):
    """No connection to a backend could be opened for want of descriptors, local ports or buffers: nothing was sent.

    Every other replica would fail for the same reason, and none of them is to blame.
    """


class GatewayDraining(Refusal):
    """The gateway is stopping."""

    code = "gateway_draining"

    def __init__(self, message: str = "The gateway is stopping. Send the request again.") -> None:
        super().__init__(message, retry_after=1.0)


class BackendError(GatewayError):
    """How one attempt failed. These class attributes are the policy.

    Attributes:
        retried: another attempt within the target may follow.
        same_replica: that attempt may go to the replica that just failed.
        at_once_elsewhere: another replica is tried without a backoff.
        free_elsewhere: that attempt costs nothing of the retry budget.
        everywhere: every replica is asked, however many attempts that takes.
        falls_back: the next target is tried when this one has no attempts left.
        verdict: what the failure means to the breaker.
        unreachable: nothing listens there, so a good probe ends the breaker's open time early.
        cools: the replica asked to be left alone; it is asked again when its cooldown is over.
        avoided: it repeats by nature, so for a while the replica is asked for that model after all others.
        ours: a limit of ours was exceeded, which says nothing about the replica.
        outage: the backend cannot be used: the request may wait for the end of the outage.
        event: the bytes of a backend's own error event, which goes on unchanged after commit, or None.
    """

    retried: ClassVar[bool] = True
    same_replica: ClassVar[bool] = True
    at_once_elsewhere: ClassVar[bool] = False
    free_elsewhere: ClassVar[bool] = False
    everywhere: ClassVar[bool] = False
    falls_back: ClassVar[bool] = True
    unreachable: ClassVar[bool] = False
    cools: ClassVar[bool] = False
    avoided: ClassVar[bool] = False
    ours: ClassVar[bool] = False
    outage: bool = False
    event: bytes | None = None
    verdict: Verdict = Verdict.FAILURE


class ConnectionFailed(BackendError):
    """Refused, unresolved, or reset before the answer's headers."""

    word = "connection_error"
    status = 502
    code = "backend_connection_error"
    at_once_elsewhere = True
    free_elsewhere = True
    outage = True


class Unreachable(ConnectionFailed):
    """Refused, unresolved, without a route, or TLS failed: no request was sent."""

    unreachable = True


class ConnectTimeout(ConnectionFailed):
    """No connection within `GATEWAY_CONNECT_TIMEOUT`."""

    word = "connect_timeout"
    status = 504
    code = "backend_timeout"
    unreachable = True

    def __init__(self, message: str) -> None:
        super().__init__(message, param="connect")


class StaleConnection(ConnectionFailed):
    """A kept-alive connection was dead before the first byte of an answer; sent again once, at once, on a new one."""

    word = "stale_connection"
    outage = False
    verdict = Verdict.NEITHER


class InvalidResponse(BackendError):
    """The answer was cut off or cannot be read."""

    word = "invalid_response"
    status = 502
    code = "backend_invalid_response"


class AnswerTooLarge(InvalidResponse):
    """The answer is larger than `GATEWAY_MAX_ANSWER_BYTES`; the same prompt would be answered the same way."""

    retried = False
    ours = True
    verdict = Verdict.NEITHER


class PartTooLarge(InvalidResponse):
    """An event is larger than `GATEWAY_MAX_ANSWER_BYTES`, or the headers than 64 KiB: most likely they have no end."""

    avoided = True
    ours = True
    verdict = Verdict.NEITHER


@dataclass(frozen=True, slots=True)
class ErrorWords:
    """What a server says in an error.

    Attributes:
        document: as it came, of any JSON type.
        message: for people, or "".
        names: its code, type and status, in lower case.
        number: its own HTTP status, 400 to 599, or None.
    """

    document: object
    message: str
    names: frozenset[str]
    number: int | None


class ErrorInside(InvalidResponse):
    """An error in an answer with a good status: `words`. It is made an error answer (`read_error_inside`).

    Attributes:
        words: what it says.
        event: the bytes of the event that holds it, or None.
    """

    word = "error_event"

    def __init__(self, words: ErrorWords, event: bytes | None = None) -> None:
        super().__init__("The backend sent an error with a good status.")
        self.words = words
        self.event = event


class CutOff(InvalidResponse):
    """The connection failed in the middle of the answer; where that opens a breaker, an outage has begun."""


class WrongForm(InvalidResponse):
    """A stream where none was asked for, or the other way round: it repeats by nature."""

    same_replica = False
    at_once_elsewhere = True


class Silent(BackendError):
    """No answer within the first-token or answer timeout (`param`): the same replica is not asked again."""

    status = 504
    code = "backend_timeout"
    same_replica = False
    at_once_elsewhere = True

    def __init__(self, message: str, *, timer: str, alive: bool = False) -> None:
        super().__init__(message, param=timer)
        self.outcome = f"{timer}_timeout"
        if alive:  # there were signs of life
            self.verdict = Verdict.NEITHER


class Stalled(BackendError):
    """No byte of the body came for `GATEWAY_IDLE_TIMEOUT`: the same replica is not asked again."""

    word = "idle_timeout"
    status = 504
    code = "backend_timeout"
    same_replica = False
    at_once_elsewhere = True

    def __init__(self, message: str) -> None:
        super().__init__(message, param="idle")


class AuthRefused(BackendError):
    """The backend refused the gateway's key (its 401 or 403): only another replica may follow."""

    word = "auth_error"
    status = 502
    code = "backend_auth_error"
    same_replica = False
    at_once_elsewhere = True
    avoided = True
    verdict = Verdict.SUCCESS


class ErrorAnswer(BackendError):
    """The backend answered with an error: passed on with its status, body and allowed headers.

    Attributes:
        status: the backend's.
        body: the backend's body, unchanged; None when it is not JSON and an error of ours replaces it.
        headers: the headers of the backend's answer that pass to callers.
        meaning: what it says, where that decides what follows; never in the backend's words.
    """

    code = "backend_invalid_response"
    meaning: ClassVar[str] = ""

    def __init__(
        self,
        status: int,
        body: bytes | None,
        headers: "Mapping[str, str]",
        *,
        retry_after: float | None = None,
    ) -> None:
        without = " without a JSON body" if body is None else ""
        meaning = f" ({self.meaning})" if self.meaning else ""
        super().__init__(f"The backend answered {status}{without}{meaning}.", retry_after=retry_after)
        self.status = status
        self.body = body
        self.headers = headers
        self.outcome = f"status_{status}"
        if status not in BREAKER_STATUSES:
            self.verdict = Verdict.SUCCESS
        self.outage = status in OUTAGE_STATUSES


ERROR_STATUSES = frozenset(range(400, 600)) - {407}
"""Those of error answers. 407 asks for a proxy's key: callers, and proxies before them, would take it for their own."""
OVERLOADED_STATUSES = frozenset({503, 529})
"""Of a server that has too much to do for now: 529 is Anthropic's word for it."""
BREAKER_STATUSES = frozenset({500, 502, 504}) | OVERLOADED_STATUSES
OUTAGE_STATUSES = frozenset({502, 504, 520, 521, 522, 523}) | OVERLOADED_STATUSES
"""Also what a content delivery network says of a server that it cannot reach."""


class RateLimited(ErrorAnswer):
    """429, or 503 or 529 with a `Retry-After`: another replica is asked at once; this one when its cooldown is over."""

    same_replica = False
    at_once_elsewhere = True
    cools = True

    def __init__(
        self, status: int, body: bytes | None, headers: "Mapping[str, str]", *, retry_after: float | None = None
    ) -> None:
        super().__init__(status, body, headers, retry_after=retry_after)
        self.outage = False


class ServerFault(ErrorAnswer):
    """408, 500, 502, 503, 504 and similar: tried again with backoff."""


class Exhausted(ErrorAnswer):
    """Another target may answer."""

    retried = False


class ContextTooLong(Exhausted):
    """The prompt is too long for the model."""

    meaning = "the prompt is too long for the model"


class QuotaSpent(Exhausted):
    """The account's quota is spent."""

    meaning = "the account's quota is spent"
    avoided = True


class NoSuchModel(Exhausted):
    """The replica does not know the model: another one may."""

    meaning = "it has no such model"
    retried = True
    same_replica = False
    at_once_elsewhere = True
    avoided = True


class NoSuchPath(Exhausted):
    """The server does not have the path, or somebody else listens there: that says nothing about other paths.

    While another replica or target can answer, this one is not asked by this path for the model for a while.
    """

    meaning = "it has no such path"
    retried = True
    same_replica = False
    at_once_elsewhere = True


class NoSuchResponse(Exhausted):
    """The replica does not know the stored response that the request is about: the one that made it does.

    It is the answer only where every replica that may know it says so.
    """

    meaning = "it has no such response"
    retried = True
    same_replica = False
    at_once_elsewhere = True
    free_elsewhere = True
    everywhere = True


class Rejected(ErrorAnswer):
    """All other error answers (4xx; 501 and 505, which repeating does not change): one attempt, passed on."""

    retried = False
    falls_back = False
