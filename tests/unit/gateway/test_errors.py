"""The tree at the top of errors.py is what the classes say."""

import re
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from gateway import errors
from gateway.dialects.openai.errors import envelope
from gateway.errors import BackendError, ErrorAnswer, GatewayError, InternalError, Verdict, drop_frames

_LINE = re.compile(r"^    (?P<stem>[|` -]*)(?P<name>[A-Z]\w+)\s*(?P<rest>.*)$")
_STATUS = re.compile(r"^(\d{3})\b")
CODES = {
    *("invalid_json", "invalid_request", "invalid_api_key", "not_found", "model_not_found", "method_not_allowed"),
    *("request_timeout", "request_too_large", "unsupported_media_type", "headers_too_large", "internal_error"),
    *("backend_connection_error", "backend_invalid_response", "backend_auth_error", "backend_unavailable"),
    "backend_rate_limited",
    *("gateway_overloaded", "gateway_draining", "backend_timeout", "deadline_exceeded", "client_closed_request"),
    *("model_not_allowed", "rate_limit_exceeded"),
}
"""Those of the contract, and the one for callers who left."""


class Row:
    """A line of the tree."""

    def __init__(self, name: str, parent: str | None, rest: str) -> None:
        self.name = name
        self.parent = parent
        self.status = int(match[1]) if (match := _STATUS.match(rest)) else None
        words = rest.split()
        self.codes = [word.rstrip(",") for word in words if word.rstrip(",") in CODES]


def tree() -> list[Row]:
    rows: list[Row] = []
    ancestors: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = _LINE.match(line)
        if match is None:
            continue
        depth = len(match["stem"]) // 3
        ancestors[depth] = match["name"]
        rows.append(Row(match["name"], ancestors[depth - 1] if depth else None, match["rest"]))
    return rows


def subclasses(kind: type[GatewayError]) -> Iterator[type[GatewayError]]:
    yield kind
    for each in kind.__subclasses__():
        yield from subclasses(each)


ROWS = tree()
CLASSES: dict[str, type[Any]] = {kind.__name__: kind for kind in subclasses(GatewayError)}


def test_the_tree_names_every_class_once() -> None:
    assert len(ROWS) > 25
    assert sorted(row.name for row in ROWS) == sorted(CLASSES)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_line_of_the_tree_is_what_its_class_says(row: Row) -> None:
    kind = CLASSES[row.name]

    if row.parent is not None:
        assert kind.__bases__ == (CLASSES[row.parent],)
    if row.status is not None and not issubclass(kind, ErrorAnswer):
        assert kind.status == row.status
    if row.codes:
        assert row.codes == [kind.code]


def test_every_code_is_one_of_the_contract_and_every_one_is_used() -> None:
    assert {kind.code for kind in CLASSES.values()} == CODES


@pytest.mark.parametrize(
    ("kind", "status", "code"),
    [
        (errors.InvalidJson, 400, "invalid_json"),
        (errors.InvalidRequest, 400, "invalid_request"),
        (errors.InvalidApiKey, 401, "invalid_api_key"),
        (errors.NotFound, 404, "not_found"),
        (errors.ModelNotFound, 404, "model_not_found"),
        (errors.MethodNotAllowed, 405, "method_not_allowed"),
        (errors.RequestTimeout, 408, "request_timeout"),
        (errors.RequestTooLarge, 413, "request_too_large"),
        (errors.UnsupportedMediaType, 415, "unsupported_media_type"),
        (errors.HeadersTooLarge, 431, "headers_too_large"),
        (errors.InternalError, 500, "internal_error"),
        (errors.DeadlineExceeded, 504, "deadline_exceeded"),
        (errors.BackendUnavailable, 503, "backend_unavailable"),
        (errors.BackendRateLimited, 429, "backend_rate_limited"),
        (errors.GatewayDraining, 503, "gateway_draining"),
        (errors.ConnectionFailed, 502, "backend_connection_error"),
        (errors.Unreachable, 502, "backend_connection_error"),
        (errors.StaleConnection, 502, "backend_connection_error"),
        (errors.ConnectTimeout, 504, "backend_timeout"),
        (errors.InvalidResponse, 502, "backend_invalid_response"),
        (errors.AnswerTooLarge, 502, "backend_invalid_response"),
        (errors.PartTooLarge, 502, "backend_invalid_response"),
        (errors.AuthRefused, 502, "backend_auth_error"),
        (errors.Stalled, 504, "backend_timeout"),
    ],
)
def test_an_error_has_the_status_and_the_code_of_the_contract(kind: type[GatewayError], status: int, code: str) -> None:
    error = kind("words")
    body = envelope(error)

    assert (error.status, error.code) == (status, code)
    assert set(body) == {"message", "type", "param", "code"}
    assert body["message"] == "words"
    assert body["code"] == code
    types = {401: "authentication_error", 429: "rate_limit_error"}
    expected = types.get(status, "invalid_request_error" if status < 500 else "server_error")
    assert body["type"] == expected


def test_a_timeout_names_its_timer() -> None:
    assert errors.ConnectTimeout("late").param == "connect"
    assert errors.Stalled("late").param == "idle"
    for timer in ("first_token", "answer"):
        late = errors.Silent("late", timer=timer)
        assert (late.status, late.code, late.param, late.outcome) == (504, "backend_timeout", timer, f"{timer}_timeout")
    assert errors.DeadlineExceeded("late").param is None


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        (errors.ConnectionFailed, (True, True, True, True, True, Verdict.FAILURE, False)),
        (errors.Unreachable, (True, True, True, True, True, Verdict.FAILURE, True)),
        (errors.ConnectTimeout, (True, True, True, True, True, Verdict.FAILURE, True)),
        (errors.StaleConnection, (True, True, True, True, True, Verdict.NEITHER, False)),
        (errors.InvalidResponse, (True, True, False, False, True, Verdict.FAILURE, False)),
        (errors.AnswerTooLarge, (False, True, False, False, True, Verdict.NEITHER, False)),
        (errors.PartTooLarge, (True, True, False, False, True, Verdict.NEITHER, False)),
        (errors.ErrorInside, (True, True, False, False, True, Verdict.FAILURE, False)),
        (errors.Silent, (True, False, True, False, True, Verdict.FAILURE, False)),
        (errors.Stalled, (True, False, True, False, True, Verdict.FAILURE, False)),
        (errors.CutOff, (True, True, False, False, True, Verdict.FAILURE, False)),
        (errors.WrongForm, (True, False, True, False, True, Verdict.FAILURE, False)),
        (errors.AuthRefused, (True, False, True, False, True, Verdict.SUCCESS, False)),
        (errors.RateLimited, (True, False, True, False, True, Verdict.FAILURE, False)),
        (errors.ServerFault, (True, True, False, False, True, Verdict.FAILURE, False)),
        (errors.ContextTooLong, (False, True, False, False, True, Verdict.FAILURE, False)),
        (errors.QuotaSpent, (False, True, False, False, True, Verdict.FAILURE, False)),
        (errors.NoSuchModel, (True, False, True, False, True, Verdict.FAILURE, False)),
        (errors.NoSuchPath, (True, False, True, False, True, Verdict.FAILURE, False)),
        (errors.Rejected, (False, True, False, False, False, Verdict.FAILURE, False)),
    ],
)
def test_the_class_is_the_policy(kind: type[BackendError], policy: tuple[object, ...]) -> None:
    """Retried, on the same replica, at once elsewhere, free elsewhere, falls back, verdict, unreachable.

    The verdict of an error answer hangs on its status as well: see test_error_answers.py.
    """
    says = (kind.retried, kind.same_replica, kind.at_once_elsewhere, kind.free_elsewhere, kind.falls_back)
    assert (*says, kind.verdict, kind.unreachable) == policy


def test_a_handled_error_holds_neither_frames_nor_the_errors_it_came_from() -> None:
    origins = [ValueError("a cause that was not handled"), KeyError("a context"), OSError("the cause of a context")]
    for origin in origins:
        with suppress(Exception):
            raise origin
    origins[0].__context__ = origins[1]
    origins[1].__cause__ = origins[2]
    origins[2].__cause__ = origins[0]  # a circle
    error = InternalError()
    error.__cause__ = origins[0]
    drop_frames(error)

    for each in (error, *origins):
        assert (each.__traceback__, each.__cause__, each.__context__) == (None, None, None)
