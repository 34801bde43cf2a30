"""Every error a caller can get, as a tree. The type is the policy.

::

    GatewayError                     status  code
    |- CallerError                   4xx     the request itself is wrong; nothing was forwarded
    |  |- InvalidJson                400     invalid_json
    |  |- InvalidRequest             400     invalid_request
    |  |- InvalidApiKey              401     invalid_api_key
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
    |- Refusal                       503     no attempt is made; says when to come again
    |  |- BackendUnavailable                 backend_unavailable
    |  |- GatewayOverloaded                  gateway_overloaded
    |  `- GatewayDraining                    gateway_draining
    `- BackendError                          how one attempt failed, and what follows
       |- ConnectionFailed           502     backend_connection_error   refused, DNS, reset before headers
       |  |- Unreachable             502     refused, unresolved, no route, TLS failed: nothing was sent
       |  |- ConnectTimeout          504     backend_timeout, param connect
       |  `- StaleConnection         502     a kept-alive connection died before a byte of the answer
       |- InvalidResponse            502     backend_invalid_response   cut or unreadable
       |  |- AnswerTooLarge          502     the same, above GATEWAY_MAX_ANSWER_BYTES
       |  `- ErrorEvent              502     the backend ended its stream with an error of its own
       |- Silent                     504     backend_timeout, param first_token or answer
       |- Stalled                    504     backend_timeout, param idle
       |- AuthRefused                502     backend_auth_error         the backend's own 401 or 403
       `- ErrorAnswer                        the backend answered an error: passed on as it came
          |- Overloaded              429 503
          |- ServerFault             408 5xx
          |- Exhausted               4xx     quota spent, context too long: another target may do
          `- Rejected                4xx     every other
"""

from enum import Enum
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Mapping


def let_go(error: BaseException) -> None:
    """Cut a spent error, and those it came from, off the frames they have passed.

    The frames hold the bytes of the request, and often the error itself: a cycle, which would wait for Python's
    collector.
    """
    spent: BaseException | None = error
    while spent is not None:
        spent.__traceback__ = None
        spent = spent.__context__


class Verdict(Enum):
    """What the breaker of a replica makes of an attempt."""

    SUCCESS = "success"
    FAILURE = "failure"
    NEITHER = "neither"


class GatewayError(Exception):
    """An error with an answer of its own.

    Attributes:
        status: HTTP status of the answer.
        code: the contract's error code.
        message: for people; holds nothing of a prompt, an answer or a key.
        param: the field, header or timer it is about, or None.
        retry_after: seconds until it makes sense to come again, or None.
        outcome: a short word of a bounded set, for metrics, logs and `server-timing`: `word`, else the code.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    word: ClassVar[str | None] = None

    def __init__(self, message: str, *, param: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after = retry_after
        self.outcome = self.word or self.code

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """OpenAI's error envelope, all four keys."""
        return envelope(self.status, self.code, self.message, self.param)


def envelope(status: int, code: str, message: str, param: str | None = None) -> dict[str, dict[str, str | None]]:
    """OpenAI's error envelope: `type` follows from the status."""
    kind = "authentication_error" if status == 401 else "invalid_request_error" if status < 500 else "server_error"  # noqa: PLR2004
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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


class InvalidApiKey(CallerError):
    """Keys are configured and this is none of them."""

    status = 401
    code = "invalid_api_key"


class NotFound(CallerError):
    """Unknown path."""

    status = 404
    code = "not_found"


class ModelNotFound(CallerError):
    """No route matches the model."""

    status = 404
    code = "model_not_found"


class MethodNotAllowed(CallerError):
    """The path is known, the method is not."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(CallerError):
    """The caller's own body is late."""

    status = 408
    code = "request_timeout"


class RequestTooLarge(CallerError):
    """The caller's own body is too large."""

    status = 413
    code = "request_too_large"


class UnsupportedMediaType(CallerError):
    """The body is not `application/json`, or has a `Content-Encoding`."""

    status = 415
    code = "unsupported_media_type"


class HeadersTooLarge(CallerError):
    """Request line or headers too large."""

    status = 431
    code = "headers_too_large"


class InternalError(GatewayError):
    """Our own defect: logged with its trace, nothing of it in the answer."""


class CallerLeft(GatewayError):
    """The caller closed the connection before the answer ended; nobody reads this."""

    status = 499
    code = "client_closed_request"


class DeadlineExceeded(GatewayError):
    """The total time a caller waits is over, wherever the request stood."""

    status = 504
    code = "deadline_exceeded"


class Refusal(GatewayError):
    """No attempt is made; `retry_after` (seconds) says when to come again."""

    status = 503


class BackendUnavailable(Refusal):
    """Every breaker that could take the request is open."""

    code = "backend_unavailable"


class GatewayOverloaded(Refusal):
    """Queue or memory is full, or the request queued too long; `reason` says which."""

    code = "gateway_overloaded"

    def __init__(self, message: str, *, reason: str, retry_after: float = 1.0) -> None:
        super().__init__(message, retry_after=retry_after)
        self.reason = reason


class GatewayDraining(Refusal):
    """The gateway is stopping."""

    code = "gateway_draining"


class BackendError(GatewayError):
    """How one attempt failed. The class attributes below are the policy.

    Attributes:
        retried: a further attempt within the target may follow.
        same_replica: that further attempt may go to the replica that just failed.
        at_once_elsewhere: another replica is tried without a sleep.
        free_elsewhere: that attempt takes nothing from the retry budget.
        falls_back: the next target is tried when this one is spent.
        verdict: what the breaker makes of it.
        unreachable: nothing listens there: a good probe ends the breaker's open time early.
    """

    retried: ClassVar[bool] = True
    same_replica: ClassVar[bool] = True
    at_once_elsewhere: ClassVar[bool] = False
    free_elsewhere: ClassVar[bool] = False
    falls_back: ClassVar[bool] = True
    unreachable: ClassVar[bool] = False
    verdict: Verdict = Verdict.FAILURE


class ConnectionFailed(BackendError):
    """Refused, unresolved, or reset before the headers of the answer."""

    word = "connection_error"
    status = 502
    code = "backend_connection_error"
    at_once_elsewhere = True
    free_elsewhere = True


class Unreachable(ConnectionFailed):
    """Refused, unresolved, without a route, or without the TLS we ask for: nothing was sent."""

    unreachable = True


class ConnectTimeout(ConnectionFailed):
    """The connection was not made within `GATEWAY_CONNECT_TIMEOUT`."""

    word = "connect_timeout"
    status = 504
    code = "backend_timeout"
    unreachable = True

    def __init__(self, message: str) -> None:
        super().__init__(message, param="connect")


class StaleConnection(ConnectionFailed):
    """A kept-alive connection died before a byte of the answer; sent again once, at once, on a fresh one."""

    word = "stale_connection"
    verdict = Verdict.NEITHER


class InvalidResponse(BackendError):
    """The answer was cut or cannot be read."""

    word = "invalid_response"
    status = 502
    code = "backend_invalid_response"


class AnswerTooLarge(InvalidResponse):
    """The answer is larger than `GATEWAY_MAX_ANSWER_BYTES`; the same prompt would give the same."""

    retried = False


class ErrorEvent(InvalidResponse):
    """The backend ended its stream with an error of its own: `event`, bytes as they came."""

    word = "error_event"

    def __init__(self, event: bytes) -> None:
        super().__init__("The backend ended its stream with an error.")
        self.event = event


class Silent(BackendError):
    """Nothing came within the first-token or answer timeout (`param`): never again on the same replica."""

    status = 504
    code = "backend_timeout"
    same_replica = False
    at_once_elsewhere = True

    def __init__(self, message: str, *, timer: str) -> None:
        super().__init__(message, param=timer)
        self.outcome = f"{timer}_timeout"


class Stalled(BackendError):
    """The body stood still for `GATEWAY_IDLE_TIMEOUT`."""

    word = "idle_timeout"
    status = 504
    code = "backend_timeout"

    def __init__(self, message: str) -> None:
        super().__init__(message, param="idle")


class AuthRefused(BackendError):
    """The backend refuses our key (its 401 or 403)."""

    word = "auth_error"
    status = 502
    code = "backend_auth_error"
    retried = False
    verdict = Verdict.SUCCESS


class ErrorAnswer(BackendError):
    """The backend answered an error: passed on with its status, body and allowed headers.

    Attributes:
        answer_status: the backend's status.
        body: the backend's body, bytes as they came; None when it is no JSON and the envelope replaces it.
        headers: the headers of the backend's answer that pass to callers.
    """

    code = "backend_invalid_response"

    def __init__(
        self,
        answer_status: int,
        body: bytes | None,
        headers: "Mapping[str, str]",
        *,
        retry_after: float | None = None,
    ) -> None:
        without = " without a JSON body" if body is None else ""
        super().__init__(f"The backend answered {answer_status}{without}.", retry_after=retry_after)
        self.answer_status = answer_status
        self.body = body
        self.headers = headers
        self.outcome = f"status_{answer_status}"
        if answer_status not in BREAKER_STATUSES:
            self.verdict = Verdict.SUCCESS

    def envelope(self) -> dict[str, dict[str, str | None]]:
        """The envelope where the body cannot be passed on as it came: it keeps the backend's status."""
        return envelope(self.answer_status, self.code, self.message)


BREAKER_STATUSES = frozenset({500, 502, 503, 504})


class Overloaded(ErrorAnswer):
    """429 or 503: another replica at once when `Retry-After` says when, else like a server fault."""


class ServerFault(ErrorAnswer):
    """408, 500, 502, 504 and the like: tried again with backoff."""


class Exhausted(ErrorAnswer):
    """The account's quota is spent, or the prompt too long for the model: another target may do."""

    retried = False


class Rejected(ErrorAnswer):
    """Every other error answer (4xx; 501 and 505, which no repetition changes): one attempt, passed on."""

    retried = False
    falls_back = False
