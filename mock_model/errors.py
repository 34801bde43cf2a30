"""Errors in OpenAI's form, `{"error": {"message", "type", "param", "code"}}`, and in Anthropic's below its path."""

import msgspec

MESSAGES = "/v1/messages"


class InvalidRequest(Exception):
    """The request cannot be answered: 400, or another status."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


OVERLOADED = 529
"""Anthropic's status for what is 503 elsewhere."""

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {
    **_TYPES,
    402: "billing_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
    OVERLOADED: "overloaded_error",
}
_SERVER_ERROR = 500


def is_anthropic(path: str) -> bool:
    """Return whether a path is one of Anthropic's API."""
    return path == MESSAGES or path.startswith(f"{MESSAGES}/")


def error_type(status: int) -> str:
    """Return the `type` that goes with a status."""
    if status >= _SERVER_ERROR:
        return "server_error"
    return _TYPES.get(status, "invalid_request_error")


def anthropic_error(status: int, message: str) -> dict[str, object]:
    """Return an error as Anthropic's answers and streams have it: `{"type": "error", "error": {"type", "message"}}`."""
    usual = "api_error" if status >= _SERVER_ERROR else "invalid_request_error"
    return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(status, usual), "message": message}}


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """Return the body of an error answer in OpenAI's form."""
    error = {"message": message, "type": error_type(status), "param": param, "code": code}
    return msgspec.json.encode({"error": error})


def error_body(path: str, status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """Return the body of an error answer in the form of the API that the path belongs to."""
    if is_anthropic(path):
        return msgspec.json.encode(anthropic_error(status, message))
    return envelope(status, message, param=param, code=code)
