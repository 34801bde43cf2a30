"""Errors in OpenAI's form: `{"error": {"message", "type", "param", "code"}}`."""

import msgspec


class InvalidRequest(Exception):
    """The request cannot be answered: 400, or another status."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = "invalid_request", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_SERVER_ERROR = 500


def error_type(status: int) -> str:
    """Return the `type` that goes with a status."""
    if status >= _SERVER_ERROR:
        return "server_error"
    return _TYPES.get(status, "invalid_request_error")


def envelope(status: int, message: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """Return the body of an error answer."""
    error = {"message": message, "type": error_type(status), "param": param, "code": code}
    return msgspec.json.encode({"error": error})
