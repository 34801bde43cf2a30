import json

import pytest

from gateway.dialects.openai.chat import OpenAIChat
from gateway.dialects.openai.responses import OpenAIResponses, ResponseState
from gateway.errors import (
    BackendUnavailable,
    ConnectionFailed,
    DeadlineExceeded,
    GatewayDraining,
    GatewayError,
    GatewayOverloaded,
    InvalidRequest,
    Silent,
)
from gateway.record import AttemptRecord, Record
from gateway.server.responses import error_response, explaining, retry_headers
from tests.unit.gateway.fakes import error_answer

CHAT = OpenAIChat()
ERROR = b'{"error":{"message":"m","type":"t","param":null,"code":"c"}}'


def record(attempts: int = 0, *, status: int | None = 500) -> Record:
    of = Record("POST", "/v1/chat/completions", trace_id=0xABC, span_id=1, request_id="r-1", started=10.0, started_ns=0)
    for number in range(1, attempts + 1):
        attempt = AttemptRecord(number, f"a-{number}", number, 10.0)
        attempt.ended, attempt.outcome, attempt.status = 10.25, "status_500", status
        of.attempts.append(attempt)
    return of


def answer(status: int, **headers: str) -> GatewayError:
    return error_answer(status, ERROR, {"content-type": "application/json", **headers})


def lines(of: bytes) -> dict[str, str]:
    assert of.endswith(b"\r\n\r\n")
    return dict(line.split(": ", 1) for line in of[:-2].decode("ascii").splitlines())


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 501, 529])
def test_what_sdks_would_send_again_says_not_to_after_an_attempt(status: int) -> None:
    assert retry_headers(answer(status), attempts=1) == {"x-should-retry": "false"}


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_what_nobody_sends_again_says_nothing(status: int) -> None:
    assert retry_headers(answer(status), attempts=1) == {}


@pytest.mark.parametrize("status", [408, 409, 429, 500, 503])
@pytest.mark.parametrize("header", [{"retry-after": "30"}, {"retry-after-ms": "1500"}, {"retry-after": "0"}])
def test_a_retry_after_that_we_did_not_wait_for_is_passed_on_alone(status: int, header: dict[str, str]) -> None:
    headers = error_response(answer(status, **header), CHAT, record(1), 11.0).headers

    assert {name: headers[name] for name in header} == header
    assert "x-should-retry" not in headers


def test_garbage_in_retry_after_does_not_invite_anybody() -> None:
    headers = error_response(answer(503, **{"retry-after": "soon"}), CHAT, record(1), 11.0).headers

    assert headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (BackendUnavailable("m", retry_after=4.01), "5"),
        (BackendUnavailable("m", retry_after=0.0), "1"),
        (BackendUnavailable("m"), "1"),
        (BackendUnavailable("m", retry_after=0.2), "1"),
        (GatewayOverloaded("m", reason="queue_full"), "1"),
        (GatewayOverloaded("m", reason="queue_timeout", retry_after=2.0), "2"),
        (GatewayDraining("m"), "1"),
    ],
)
def test_a_refusal_says_in_whole_seconds_when_to_come_again(error: GatewayError, seconds: str) -> None:
    assert retry_headers(error, attempts=0) == {"retry-after": seconds}


def test_draining_says_so_after_an_attempt_too() -> None:
    assert retry_headers(GatewayDraining("m"), attempts=2) == {"retry-after": "1"}


def test_full_memory_after_an_attempt_is_final() -> None:
    assert retry_headers(GatewayOverloaded("m", reason="memory"), attempts=1) == {"x-should-retry": "false"}


def test_a_deadline_is_final_after_an_attempt_and_silent_before() -> None:
    assert retry_headers(DeadlineExceeded("m"), attempts=1) == {"x-should-retry": "false"}
    assert retry_headers(DeadlineExceeded("m"), attempts=0) == {}


def test_an_error_answer_of_a_backend_goes_on_as_it_came() -> None:
    response = error_response(answer(422, **{"x-ratelimit-limit-requests": "9"}), CHAT, record(1, status=422), 11.0)

    assert response.status == 422
    assert response.body == ERROR
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-ratelimit-limit-requests"] == "9"
    assert lines(response.lines)["x-gateway-backend"] == "a-1"
    assert not lines(response.lines).keys() & {name.lower() for name in response.headers}


def test_one_that_is_no_json_is_wrapped_with_its_status() -> None:
    response = error_response(error_answer(502, b"<html>", {"content-type": "text/html"}), CHAT, record(1), 11.0)

    assert response.status == 502
    assert response.headers["content-type"] == "application/json"
    assert isinstance(response.body, bytes)
    assert json.loads(response.body)["error"]["code"] == "backend_invalid_response"


def test_every_error_explains_itself() -> None:
    response = error_response(Silent("late", timer="answer"), CHAT, record(2, status=None), 11.0)
    headers = lines(response.lines)

    assert headers["x-request-id"] == "r-1"
    assert headers["x-trace-id"] == f"{0xABC:032x}"
    assert headers["x-gateway-attempts"] == "2"
    assert "x-gateway-backend" not in headers
    assert response.headers["content-type"] == "application/json"


def test_the_backend_is_named_only_when_it_answered() -> None:
    assert "x-gateway-backend" not in lines(explaining(record(0), 11.0))
    assert "x-gateway-backend" not in lines(explaining(record(1, status=None), 11.0))
    assert lines(explaining(record(2), 11.0))["x-gateway-backend"] == "a-2"


def test_an_error_event_is_the_envelope() -> None:
    event = CHAT.error_event(ConnectionFailed("gone"), None)

    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 2
    assert json.loads(event[6:]) == json.loads(CHAT.error_body(ConnectionFailed("gone")))


def test_an_error_event_of_a_response_is_typed_and_numbered() -> None:
    state = ResponseState()
    state.sequence_number = 7
    event = OpenAIResponses().error_event(Silent("late\nline", timer="answer"), state)
    first, second, *rest = event.split(b"\n")

    assert first == b"event: error"
    assert rest == [b"", b""]
    assert json.loads(second.removeprefix(b"data: ")) == {
        "type": "error",
        "sequence_number": 7,
        "code": "backend_timeout",
        "message": "late\nline",
        "param": "answer",
        "error": {"message": "late\nline", "type": "server_error", "param": "answer", "code": "backend_timeout"},
    }


def test_a_caller_error_has_neither_header() -> None:
    headers = error_response(InvalidRequest("m", param="n"), CHAT, record(0), 11.0).headers

    assert "x-should-retry" not in headers
    assert "retry-after" not in headers
