"""What an answer of a backend means: the class of its failure, and when it asks to come again."""

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.anthropic import AnthropicMessages, WholeMessage
from gateway.dialects.openai.chat import OpenAIChat
from gateway.dialects.openai.choices import WholeAnswer
from gateway.dialects.openai.responses import OpenAIResponses, WholeResponse
from gateway.errors import (
    AuthRefused,
    BackendError,
    ContextTooLong,
    ErrorAnswer,
    Exhausted,
    InvalidResponse,
    NoSuchPath,
    QuotaSpent,
    RateLimited,
    Rejected,
    ServerFault,
    Verdict,
)
from gateway.headers import retry_after
from tests.unit.gateway.fakes import error_answer

JSON = b'{"error": {"message": "no", "type": "t", "param": null, "code": "c"}}'
NEUTRAL = {"content-type": "application/json"}


DIALECTS = OpenAIChat(), OpenAIResponses(), AnthropicMessages()


def envelope(error: BackendError) -> dict[str, str | None]:
    """The inside of the gateway's own answer to an error."""
    document: dict[str, dict[str, str | None]] = json.loads(OpenAIChat().error_body(error))
    return document["error"]


def error_body(**fields: object) -> bytes:
    return json.dumps({"error": {"message": "no", **fields}}).encode()


@pytest.fixture
def tokyo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose local time is nine hours ahead."""
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("status", "kind", "verdict"),
    [
        (300, InvalidResponse, Verdict.FAILURE),
        (304, InvalidResponse, Verdict.FAILURE),
        (400, Rejected, Verdict.SUCCESS),
        (401, AuthRefused, Verdict.SUCCESS),
        (402, QuotaSpent, Verdict.SUCCESS),
        (403, AuthRefused, Verdict.SUCCESS),
        (404, Rejected, Verdict.SUCCESS),
        (407, InvalidResponse, Verdict.FAILURE),
        (408, ServerFault, Verdict.SUCCESS),
        (409, Rejected, Verdict.SUCCESS),
        (413, Rejected, Verdict.SUCCESS),
        (422, Rejected, Verdict.SUCCESS),
        (429, RateLimited, Verdict.SUCCESS),
        (499, Rejected, Verdict.SUCCESS),
        (500, ServerFault, Verdict.FAILURE),
        (501, Rejected, Verdict.SUCCESS),
        (502, ServerFault, Verdict.FAILURE),
        (503, ServerFault, Verdict.FAILURE),
        (504, ServerFault, Verdict.FAILURE),
        (505, Rejected, Verdict.SUCCESS),
        (507, ServerFault, Verdict.SUCCESS),
        (529, ServerFault, Verdict.FAILURE),
        (599, ServerFault, Verdict.SUCCESS),
        (600, InvalidResponse, Verdict.FAILURE),
        (999, InvalidResponse, Verdict.FAILURE),
    ],
)
def test_each_status_has_its_class_and_its_verdict(status: int, kind: type[BackendError], verdict: Verdict) -> None:
    failure = error_answer(status, JSON, NEUTRAL)

    assert type(failure) is kind
    assert failure.verdict is verdict
    if isinstance(failure, ErrorAnswer):
        assert failure.status == status
        assert failure.body == JSON
        assert failure.headers == NEUTRAL
        assert failure.outcome == f"status_{status}"


@pytest.mark.parametrize("field", ["code", "type"])
@pytest.mark.parametrize("status", [400, 404, 413, 429])
@pytest.mark.parametrize(
    "word", ["insufficient_quota", "context_length_exceeded", "billing_hard_limit_reached", "credit_balance_exhausted"]
)
def test_a_spent_quota_or_a_prompt_too_long_may_do_at_another_target(field: str, status: int, word: str) -> None:
    failure = error_answer(status, error_body(**{field: word}), NEUTRAL)

    assert type(failure) is (ContextTooLong if word == "context_length_exceeded" else QuotaSpent)
    assert isinstance(failure, Exhausted)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"404 page not found",
        b"<html>",
        b'{"detail": "Not Found"}',
        b'{"error": {"code": 404, "message": "File Not Found", "type": "not_found_error"}}',
        b'{"type": "error", "error": {"type": "not_found_error", "message": "Not Found"}}',
    ],
    ids=["empty", "Ollama", "a proxy", "vLLM", "llama.cpp", "Anthropic"],
)
def test_a_404_that_names_no_model_is_about_the_path(body: bytes) -> None:
    failure = error_answer(404, body, NEUTRAL)
    assert type(failure) is NoSuchPath
    assert (failure.avoided, failure.verdict) == (False, Verdict.SUCCESS)


def test_a_server_that_fails_is_not_exhausted_whatever_it_says() -> None:
    assert type(error_answer(500, error_body(code="insufficient_quota"), NEUTRAL)) is ServerFault
    assert type(error_answer(503, error_body(code="insufficient_quota"), NEUTRAL)) is ServerFault


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff\xfe", b'{"error"', b"[" * 100_000])
def test_a_body_that_is_no_json_keeps_its_status_and_is_wrapped(body: bytes) -> None:
    failure = error_answer(500, body, {"content-type": "text/html"})

    assert isinstance(failure, ServerFault)
    assert failure.body is None
    assert failure.status == 500
    assert envelope(failure)["code"] == "backend_invalid_response"
    assert envelope(failure)["type"] == "server_error"
    assert envelope(error_answer(404, body, {}))["type"] == "invalid_request_error"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["error", "code", "type"]), inner),
    max_leaves=12,
)


@given(
    st.integers(300, 599), st.one_of(st.binary(max_size=40), JSON_VALUES.map(lambda value: json.dumps(value).encode()))
)
def test_no_body_makes_the_classification_fail(status: int, body: bytes) -> None:
    failure = error_answer(status, body, NEUTRAL)

    assert isinstance(failure, BackendError)
    assert envelope(failure)["message"]


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({}, None),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after": " 3 "}, 3.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "0.5"}, 0.0005),
        ({"retry-after": "9", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "9", "retry-after-ms": "soon"}, 9.0),
        ({"retry-after": "9", "retry-after-ms": "-1"}, 9.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "Sunday, 06-Nov-94 08:49:37 GMT"}, 0.0),
        ({"retry-after": "Sun Nov  6 08:49:37 1994"}, 0.0),
    ],
)
def test_retry_after_in_every_form(headers: dict[str, str], wait: float | None) -> None:
    assert retry_after(headers, time.time()) == wait


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "soon", "-1", "-0.5", "nan", "NaN", "inf", "-inf", "1e999", "1000000000", "1e12"),
        *("1_0", "\u0661", "7s", "1,5"),
        "Wed, 99 Oct 2015 07:28:00 GMT",
        "Wed, 21 Oct 99999 07:28:00 GMT",
        "Wed, 21 Oct 2015 07:28:00 +9999999999",
    ],
)
def test_garbage_is_no_retry_after(text: str) -> None:
    assert retry_after({"retry-after": text}, time.time()) is None
    assert retry_after({"retry-after-ms": text}, time.time()) is None


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"])
def test_a_date_is_gmt_wherever_the_gateway_runs(form: str, tokyo: None) -> None:
    """All three forms of RFC 9110; the last, asctime's, names no zone."""
    asked = datetime.now(UTC) + timedelta(seconds=100)

    wait = retry_after({"retry-after": asked.strftime(form)}, time.time())

    assert wait is not None
    assert 50 < wait <= 100


@given(st.text(max_size=40) | st.datetimes(timezones=st.just(UTC)).map(lambda date: format_datetime(date, usegmt=True)))
def test_no_text_makes_retry_after_fail(text: str) -> None:
    for name in ("retry-after", "retry-after-ms"):
        wait = retry_after({name: text}, time.time())
        assert wait is None or wait >= 0


@pytest.mark.parametrize(
    "body", [b"{}", b'{"error": null}', '{"id": "é"}'.encode(), b'{"choices": 5, "usage": "many"}']
)
def test_any_object_without_an_error_is_a_good_answer(body: bytes) -> None:
    for dialect in DIALECTS:
        answer = dialect.read_answer("application/json", body)
        assert isinstance(answer, WholeAnswer | WholeResponse | WholeMessage)
        assert bytes(answer.error) == b"null"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"[]", b"5", b'"x"', b"null", b"{", b"{} {}", b'{"a": nan}', b'{"a": "\xff"}'),
        *(b'{"error": {}}', b'{"error": "x"}'),
        b'{"object": "error", "type": "error"}',
        b'{"error": false}',
        b'{"choices": 5, "error": "x"}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
)
def test_what_is_no_good_answer(body: bytes) -> None:
    for dialect in DIALECTS:
        with pytest.raises(InvalidResponse):
            dialect.read_answer("application/json", body)


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/problem+json", "application/json"])
@pytest.mark.parametrize("body", [b"{}", b'{"logprob": -Infinity, "a": [NaN, Infinity], "b": "NaN \\" Infinity"}'])
def test_json_of_any_plausible_type_is_taken_and_numbers_that_are_not_finite(content_type: str, body: bytes) -> None:
    for dialect in DIALECTS:
        assert dialect.read_answer(content_type, body)


@pytest.mark.parametrize("content_type", ["text/html", "text/event-stream", "application/jsonl"])
def test_an_answer_of_another_type_is_none(content_type: str) -> None:
    for dialect in DIALECTS:
        with pytest.raises(InvalidResponse):
            dialect.read_answer(content_type, b"{}")


def test_an_answer_tells_about_itself() -> None:
    whole = OpenAIChat().read_answer(
        "application/json",
        json.dumps(
            {
                "id": "chatcmpl-1",
                "model": "m",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {}}, {"index": 1}],
                "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7},
            }
        ).encode(),
    )

    assert (whole.id, whole.model, whole.finish_reasons) == ("chatcmpl-1", "m", ["stop", "error"])
    assert (whole.input_tokens, whole.output_tokens) == (3, 4)


def test_a_message_tells_about_itself() -> None:
    """With the cached tokens of its prompt, as OpenTelemetry's conventions count them."""
    usage = {"input_tokens": 3, "cache_creation_input_tokens": 10, "cache_read_input_tokens": 200, "output_tokens": 4}
    document = {"id": "msg_1", "type": "message", "model": "m", "content": [], "stop_reason": "end_turn"}
    whole = AnthropicMessages().read_answer("application/json", json.dumps(document | {"usage": usage}).encode())

    assert (whole.response_id, whole.model, whole.finish_reasons) == ("msg_1", "m", ["end_turn"])
    assert (whole.input_tokens, whole.output_tokens) == (213, 4)
    bare = AnthropicMessages().read_answer("application/json", json.dumps(document).encode())
    assert (bare.input_tokens, bare.output_tokens) == (None, None)
