"""Streams of messages as Anthropic, vLLM, llama.cpp and Ollama send them, and errors as Anthropic words them."""

import json
from typing import Any

import pytest

from gateway.dialects.anthropic import AnthropicMessages, MessageState
from gateway.dialects.error_answers import read_error, read_error_inside
from gateway.dialects.table import DIALECTS
from gateway.errors import (
    AuthRefused,
    ContextTooLong,
    ErrorWords,
    GatewayError,
    GatewayOverloaded,
    InvalidApiKey,
    InvalidRequest,
    InvalidResponse,
    NoSuchModel,
    QuotaSpent,
    RateLimited,
    Rejected,
    RequestTooLarge,
    ServerFault,
    Silent,
)
from gateway.server.paths import worded_by
from tests.unit.gateway.fakes import error_answer

DIALECT = AnthropicMessages()


def delta(kind: str, **fields: object) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": 0, "delta": {"type": kind, **fields}}


def start(**usage: int) -> dict[str, Any]:
    return {"type": "message_start", "message": {"id": "msg_1", "model": "claude", "content": [], "usage": usage}}


def end(reason: str | None = "end_turn", **usage: int) -> dict[str, Any]:
    return {"type": "message_delta", "delta": {"stop_reason": reason, "stop_sequence": None}, "usage": usage}


PING = {"type": "ping"}
STOP = {"type": "message_stop"}
BLOCK = {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
BLOCK_STOP = {"type": "content_block_stop", "index": 0}
WORD = delta("text_delta", text="Hello")
THOUGHT = delta("thinking_delta", thinking="I need to find the GCD")
SIGNATURE = delta("signature_delta", signature="EqQBCgIYAhIM1gbcDa9GJwZA2b3hGgxBdjrkzLoky3dl1pkiMOYds")

WHOLE = {
    "text": [start(input_tokens=25, output_tokens=1), BLOCK, PING, WORD, WORD, BLOCK_STOP, end(output_tokens=15), STOP],
    "tool": [
        start(input_tokens=472, output_tokens=2),
        BLOCK,
        PING,
        WORD,
        BLOCK_STOP,
        {"type": "content_block_start", "index": 1, "content_block": {"type": "tool_use", "id": "t", "name": "w"}},
        delta("input_json_delta", partial_json=""),
        delta("input_json_delta", partial_json='{"city":'),
        BLOCK_STOP,
        end("tool_use", output_tokens=89),
        STOP,
    ],
    "thinking": [start(input_tokens=1), BLOCK, THOUGHT, SIGNATURE, BLOCK_STOP, BLOCK, WORD, BLOCK_STOP, end(), STOP],
    "nothing to say": [start(input_tokens=3), end(output_tokens=0), STOP],
    "signed late (llama.cpp)": [start(input_tokens=1), THOUGHT, WORD, SIGNATURE, BLOCK_STOP, end(), STOP],
    "a tool without arguments (llama.cpp)": [start(input_tokens=1), BLOCK, BLOCK_STOP, end("tool_use"), STOP],
    "several ends": [start(input_tokens=1), BLOCK, WORD, BLOCK_STOP, end(None), end("end_turn"), STOP],
    "an event of tomorrow": [start(input_tokens=1), {"type": "mood", "message": "kind"}, BLOCK, WORD, end(), STOP],
}


def fed(*events: object, keep_text: bool = False, until_answer: bool = False) -> MessageState:
    state = MessageState(keep_text=keep_text, until_answer=until_answer)
    for event in events:
        state.feed(json.dumps(event).encode())
    return state


def inside(error: GatewayError) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(DIALECT.error_body(error))
    assert document.keys() == {"type", "error"}
    assert document["type"] == "error"
    error_inside: dict[str, Any] = document["error"]
    return error_inside


# Streams


@pytest.mark.parametrize("name", WHOLE)
def test_a_message_is_complete_with_message_stop_and_not_before(name: str) -> None:
    state = MessageState()
    for event in WHOLE[name]:
        assert not state.ended
        assert not state.finished, "what ends before message_stop is cut, however it ends"
        state.feed(json.dumps(event).encode())
        assert state.error is None

    assert state.ended
    assert state.content
    assert state.done_event is None
    assert state.finish_reasons == [WHOLE[name][-2]["delta"]["stop_reason"]]
    assert (state.response_id, state.model) == ("msg_1", "claude")


@pytest.mark.parametrize(
    ("event", "content", "answer"),
    [
        (start(input_tokens=3), False, False),
        (PING, False, False),
        (BLOCK, False, False),
        (BLOCK_STOP, False, False),
        ({"type": "mood"}, False, False),
        (THOUGHT, True, False),
        (SIGNATURE, True, False),
        (WORD, True, True),
        (delta("input_json_delta", partial_json=""), True, True),
        (delta("citations_delta", citation={"cited_text": "x"}), True, True),
        (delta("words_of_tomorrow"), True, True),
        (end(output_tokens=0), True, True),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else None,
)
@pytest.mark.parametrize("keep_text", [False, True])
@pytest.mark.parametrize("size", [0, 100_000])
def test_what_is_content_and_what_is_an_answer(
    event: dict[str, Any],
    content: bool,  # noqa: FBT001
    answer: bool,  # noqa: FBT001
    keep_text: bool,  # noqa: FBT001
    size: int,
) -> None:
    """Of a large event too, wherever it is large."""
    large = {"padding": "x" * size}
    for padded in (
        event | large,
        {**event, **{key: event[key] | large for key in ("delta", "message") & event.keys()}},
    ):
        state = fed(padded, keep_text=keep_text, until_answer=True)
        assert (state.content, state.answer) == (content, answer)
        assert not state.ended


def test_a_message_that_ends_without_a_word_has_no_content() -> None:
    state = fed(start(input_tokens=3), STOP)

    assert state.ended
    assert not state.content


@pytest.mark.parametrize(
    ("events", "tokens"),
    [
        ([start(input_tokens=25, output_tokens=1), WORD], (25, None)),
        ([start(input_tokens=25, output_tokens=1), end(output_tokens=15)], (25, 15)),
        ([start(input_tokens=25, output_tokens=1), end(output_tokens=15), end(output_tokens=20)], (25, 20)),
        # vLLM and Ollama know the prompt's tokens late, or guess them first; Ollama says 0 of a cached prompt
        ([start(input_tokens=0, output_tokens=0), end(input_tokens=7, output_tokens=2)], (7, 2)),
        ([start(input_tokens=9), end(input_tokens=11, output_tokens=2)], (11, 2)),
        ([start(input_tokens=9), end(input_tokens=0, output_tokens=2)], (9, 2)),
        ([start(input_tokens=0), end(output_tokens=0)], (0, 0)),
        # what is cached counts as well
        (
            [start(input_tokens=3, cache_creation_input_tokens=40, cache_read_input_tokens=500), end(output_tokens=2)],
            (543, 2),
        ),
        (
            [
                start(input_tokens=3, cache_creation_input_tokens=40, cache_read_input_tokens=500),
                end(input_tokens=5, output_tokens=2),
            ],
            (545, 2),
        ),
        ([start(), end()], (None, None)),
        ([start(input_tokens=-1), end(output_tokens=-1)], (None, None)),
    ],
)
def test_tokens_are_those_counted_last(events: list[object], tokens: tuple[int | None, int | None]) -> None:
    state = fed(*events)

    assert (state.input_tokens, state.output_tokens) == tokens


def test_a_cut_message_has_no_stop_reason() -> None:
    assert fed(start(), WORD).finish_reasons == ["error"]
    assert fed(start(), WORD, end(None), STOP).finish_reasons == ["unknown"]


def test_words_of_a_message_are_kept_only_when_asked_for() -> None:
    assert fed(WORD, THOUGHT, WORD, keep_text=True).text == "HelloHello"
    assert fed(delta("text_delta", text="x" * 70_000), keep_text=True).text == "x" * 16_384
    assert fed(WORD).text is None


def test_done_before_message_stop_is_no_end() -> None:
    state = fed(start(), WORD, end())
    with pytest.raises(InvalidResponse):
        state.feed(b"[DONE]")

    assert not state.ended


OVERLOADED = {"type": "overloaded_error", "message": "Overloaded"}


@pytest.mark.parametrize(
    ("event", "document"),
    [
        ({"type": "error", "error": OVERLOADED, "request_id": "req_1"}, OVERLOADED),
        ({"type": "error", "error": "busy"}, "busy"),
        ({"type": "error", "message": "busy"}, {"type": "error", "message": "busy"}),
        ({"type": "error"}, {"type": "error"}),
        ({"type": "error", "error": None}, {"type": "error", "error": None}),
        ({"error": OVERLOADED}, OVERLOADED),
        ({"error": {"code": 500, "message": "m"}, "type": "response.failed"}, {"code": 500, "message": "m"}),
        # llama.cpp's, with nothing around it
        (
            {"code": 500, "message": "Compute error.", "type": "server_error"},
            {"code": 500, "message": "Compute error.", "type": "server_error"},
        ),
        ({"message": "m"}, {"message": "m"}),
    ],
)
@pytest.mark.parametrize("before", [[], [start(), WORD]])
def test_an_error_in_an_event_is_the_backends_own_in_every_form(
    event: dict[str, Any], document: object, before: list[object]
) -> None:
    state = fed(*before, event)

    assert state.error is not None
    assert state.error.document == document
    assert not state.ended


@pytest.mark.parametrize(
    "event", [{"type": "mood", "message": "kind"}, {"type": "mood", "error": None}, {"type": 5}, {"type": []}, {}, 5]
)
def test_what_nobody_knows_is_no_error(event: object) -> None:
    assert fed(event).error is None


# Errors


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        *((400, "invalid_request_error"), (401, "authentication_error"), (402, "billing_error")),
        *((403, "permission_error"), (404, "not_found_error"), (405, "invalid_request_error")),
        *((408, "invalid_request_error"), (409, "conflict_error"), (413, "request_too_large")),
        *((422, "invalid_request_error"), (429, "rate_limit_error"), (431, "invalid_request_error")),
        *((500, "api_error"), (502, "api_error"), (503, "overloaded_error")),
        *((504, "timeout_error"), (505, "api_error"), (529, "overloaded_error")),
    ],
)
def test_an_error_has_anthropics_word_for_its_status(status: int, kind: str) -> None:
    error = InvalidResponse("m")
    error.status = status

    assert inside(error) == {"type": kind, "message": "m", "code": "backend_invalid_response"}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidApiKey("m"), {"type": "authentication_error", "message": "m", "code": "invalid_api_key"}),
        (RequestTooLarge("m"), {"type": "request_too_large", "message": "m", "code": "request_too_large"}),
        (
            GatewayOverloaded("m", reason="memory"),
            {"type": "overloaded_error", "message": "m", "code": "gateway_overloaded"},
        ),
        (
            InvalidRequest("m", param="max_tokens"),
            {"type": "invalid_request_error", "message": "m", "code": "invalid_request", "param": "max_tokens"},
        ),
        (
            Silent("late", timer="answer"),
            {"type": "timeout_error", "message": "late", "code": "backend_timeout", "param": "answer"},
        ),
    ],
)
def test_an_error_says_our_code_and_what_it_is_about(error: GatewayError, expected: dict[str, str]) -> None:
    assert inside(error) == expected
    first, second, *rest = DIALECT.error_event(error, None).split(b"\n")
    assert (first, rest) == (b"event: error", [b"", b""])
    assert json.loads(second.removeprefix(b"data: ")) == {"type": "error", "error": expected}


def test_an_error_answer_of_the_backend_is_the_error_event_in_its_own_words() -> None:
    own = {"type": "overloaded_error", "message": "Overloaded", "details": None}
    failure = error_answer(529, json.dumps({"type": "error", "error": own, "request_id": "req_1"}).encode(), {})
    event = json.loads(DIALECT.error_event(failure, None).partition(b"data: ")[2])

    assert event == {"type": "error", "error": own}


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (400, {"type": "invalid_request_error", "message": "prompt is too long: 9 tokens > 8 maximum"}, ContextTooLong),
        (400, {"type": "invalid_request_error", "message": "max_tokens: Field required"}, Rejected),
        (402, {"type": "billing_error", "message": "Your credit balance is too low."}, QuotaSpent),
        (401, {"type": "authentication_error", "message": "invalid x-api-key"}, AuthRefused),
        (403, {"type": "permission_error", "message": "not for you"}, AuthRefused),
        (404, {"type": "not_found_error", "message": "model: claude-x"}, NoSuchModel),
        (413, {"type": "request_too_large", "message": "Request exceeds the maximum size"}, ContextTooLong),
        (429, {"type": "rate_limit_error", "message": "Number of request tokens has exceeded"}, RateLimited),
        (500, {"type": "api_error", "message": "Internal server error"}, ServerFault),
        (504, {"type": "timeout_error", "message": "Request timed out"}, ServerFault),
        (529, {"type": "overloaded_error", "message": "Overloaded"}, ServerFault),
    ],
)
def test_what_anthropic_says_is_understood(status: int, error: dict[str, str], kind: type[GatewayError]) -> None:
    failure = read_error(status, json.dumps({"type": "error", "error": error}).encode(), {}, None)

    assert type(failure) is kind


@pytest.mark.parametrize("retry_after", [None, 2.0])
def test_overloaded_is_as_a_503(retry_after: float | None) -> None:
    body = b'{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}'
    there, here = (read_error(status, body, {}, retry_after) for status in (529, 503))

    assert type(there) is type(here)
    assert (there.verdict, there.outage, there.cools) == (here.verdict, here.outage, here.cools)
    assert isinstance(there, RateLimited) == (retry_after is not None)


@pytest.mark.parametrize(
    ("event", "status", "error"),
    [
        ({"type": "error", "error": OVERLOADED}, 503, OVERLOADED),
        (
            {"type": "error", "error": {"type": "rate_limit_error", "message": "m"}},
            429,
            {"type": "rate_limit_error", "message": "m"},
        ),
        (
            {"type": "error", "error": {"type": "api_error", "message": "m"}},
            502,
            {"type": "api_error", "message": "m"},
        ),
        (
            {"type": "error", "error": {"type": "internal_error", "message": "m"}},
            502,
            {"type": "internal_error", "message": "m"},
        ),
        (
            {"code": 400, "message": "m", "type": "exceed_context_size_error"},
            400,
            {"code": 400, "message": "m", "type": "exceed_context_size_error"},
        ),
        ({"error": {"code": 429, "message": "m"}}, 429, {"type": "rate_limit_error", "code": 429, "message": "m"}),
        ({"error": "busy", "error_type": "overloaded"}, 503, {"type": "overloaded", "message": "busy"}),
        (
            {"type": "error"},
            502,
            {"type": "error", "message": "The backend sent an error without a message."},
        ),
    ],
)
def test_an_error_event_before_any_content_is_an_error_answer_in_anthropics_form(
    event: dict[str, Any], status: int, error: dict[str, Any]
) -> None:
    words = fed(event).error
    assert isinstance(words, ErrorWords)
    failure = read_error_inside(words, DIALECT.error_inside(words), {"content-type": "text/event-stream"}, None)

    assert failure.status == status
    assert json.loads(getattr(failure, "body", b"")) == {"type": "error", "error": error}
    assert getattr(failure, "headers", {}) == {"content-type": "application/json"}


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/messages", "/messages", "/v1/messages/", "//v1/messages", "/v1/v1/messages", "/V1/Messages"),
        *("/v1/messages/batches", "/messages/batches", "/v1/messages/batches/msgbatch_1/results", "/messages//x"),
        *("/v1/messages/count_tokens", "/messages/count_tokens"),
    ],
)
def test_errors_are_anthropics_for_every_path_at_or_below_messages(path: str) -> None:
    body = json.loads(worded_by(path).error_body(InvalidRequest("m")))

    assert body == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "m", "code": "invalid_request"},
    }


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "*",
        "/v1",
        "/v1/",
        "/v1/chat/completions",
        "/v1/models/messages",
        "/v1/messagesx",
        "/x/v1/messages",
        "/v1/complete",
        "a",
    ],
)
def test_errors_are_openais_elsewhere(path: str) -> None:
    assert worded_by(path).error_body(InvalidRequest("m")) == DIALECTS[0].error_body(InvalidRequest("m"))
