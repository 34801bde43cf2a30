"""First content, completeness and the end of a stream, exactly as the project defines them."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.anthropic import MessageState
from gateway.dialects.dialect import StreamState
from gateway.dialects.openai.choices import ChoicesState
from gateway.dialects.openai.responses import ResponseState
from gateway.errors import InvalidResponse


def chunk(*choices: dict[str, Any], **fields: object) -> bytes:
    return json.dumps({"id": "c-1", "model": "m", "choices": list(choices), **fields}).encode()


def delta(index: int = 0, reason: str | None = None, **fields: object) -> dict[str, Any]:
    return {"index": index, "delta": fields, "finish_reason": reason}


def seen(state: StreamState, *events: bytes) -> StreamState:
    for event in events:
        state.feed(event)
    return state


def chat(*events: bytes, choices: int = 1) -> StreamState:
    return seen(ChoicesState(choices), *events)


def responses(*events: dict[str, Any]) -> ResponseState:
    state = ResponseState()
    seen(state, *(json.dumps(event).encode() for event in events))
    return state


def document_of(state: StreamState) -> object:
    return state.error and state.error.document


@pytest.mark.parametrize(
    "choice",
    [
        delta(content="a"),
        delta(role="assistant", content="a"),
        delta(content=" "),
        delta(refusal="no"),
        delta(reasoning="hm"),
        delta(reasoning_content="hm"),
        delta(tool_calls=[{"index": 0, "function": {"name": "f"}}]),
        delta(function_call={"name": "f"}),
        delta(audio={"id": "a"}),
        delta(reason="stop"),
        delta(reason="content_filter"),
        {"index": 0, "text": "a", "finish_reason": None},
        {"index": 0, "text": "", "finish_reason": "length"},
    ],
)
def test_what_is_content(choice: dict[str, Any]) -> None:
    assert chat(chunk(choice)).content


@pytest.mark.parametrize(
    "event",
    [
        chunk(delta()),
        chunk(delta(role="assistant")),
        chunk(delta(role="assistant", content="")),
        chunk(delta(role="assistant", content=None, refusal=None, tool_calls=[])),
        chunk(delta(reason="")),
        chunk({"index": 0, "text": "", "finish_reason": None}),
        chunk({"index": 0, "text": None}),
        chunk({"index": 0, "delta": None}),
        chunk(),
        chunk(usage={"prompt_tokens": 1}),
        b"{}",
        b"[]",
        b"5",
        b"null",
        b'{"choices": null}',
        b'{"choices": [5, null, "x"]}',
        b'{"prompt_filter_results": []}',
    ],
)
def test_what_is_no_content(event: bytes) -> None:
    state = chat(event)

    assert not state.content
    assert not state.finished
    assert not state.ended
    assert state.error is None


def test_a_stream_is_complete_with_its_finish_reason() -> None:
    begun = chat(chunk(delta(content="a")))
    assert not begun.finished
    state = seen(begun, chunk(delta(reason="stop")))

    assert state.finished
    assert not state.ended
    assert state.finish_reasons == ["stop"]


def test_every_choice_needs_its_own_finish_reason() -> None:
    state = chat(chunk(delta(2, "stop")), chunk(delta(0, "length")), chunk(delta(0, "stop")), choices=3)

    assert not state.finished
    assert state.finish_reasons == ["stop", "error", "stop"]
    assert seen(state, chunk(delta(1, "tool_calls"))).finished


def test_one_chunk_may_finish_all_choices() -> None:
    assert chat(chunk(delta(0, "stop"), delta(1, "stop")), choices=2).finished


@pytest.mark.parametrize("index", [1, -1, 7, "0", None, 0.0])
def test_a_finish_reason_of_a_choice_nobody_asked_for_completes_nothing(index: object) -> None:
    assert not chat(chunk({"index": index, "delta": {}, "finish_reason": "stop"})).finished


def test_an_empty_finish_reason_is_none() -> None:
    """Some servers write "" where OpenAI writes null."""
    state = chat(chunk(delta(content="a", reason="")), chunk(delta(content="b", reason="")))

    assert not state.finished
    assert state.finish_reasons == ["error"]


@pytest.mark.parametrize("data", [b"[DONE]", b" [DONE] ", b"[DONE]\n"])
def test_done_is_trusted_without_a_finish_reason(data: bytes) -> None:
    state = chat(chunk(delta(content="a")), data)

    assert state.ended
    assert state.content
    assert state.finish_reasons == ["unknown"]


def test_done_after_the_finish_is_the_end() -> None:
    state = chat(chunk(delta(reason="stop")), b"[DONE]")

    assert state.ended
    assert state.finished
    assert state.done_event == b"data: [DONE]\n\n"


@pytest.mark.parametrize("error", [{"message": "m"}, "overloaded", 5, [], {}])
def test_an_error_in_an_event_is_the_backends_own(error: object) -> None:
    said = chat(json.dumps({"error": error}).encode()).error

    assert said is not None
    assert said.document == error


def test_a_null_error_is_none() -> None:
    state = chat(chunk(delta(content="a"), error=None))

    assert state.error is None
    assert state.content


def test_what_a_stream_says_about_itself() -> None:
    state = chat(
        chunk(delta(role="assistant")),
        chunk(delta(reason="stop"), usage=None),
        chunk(usage={"prompt_tokens": 3, "completion_tokens": 4}),
    )

    assert (state.model, state.response_id) == ("m", "c-1")
    assert (state.input_tokens, state.output_tokens) == (3, 4)
    assert state.text is None


@pytest.mark.parametrize("count", [-1, True, "3", None, 1.5, []])
def test_what_is_no_count_of_tokens(count: object) -> None:
    state = chat(chunk(usage={"prompt_tokens": count, "completion_tokens": 4}))

    assert (state.input_tokens, state.output_tokens) == (None, 4)


def test_words_are_kept_only_when_asked_for() -> None:
    events = chunk(delta(content="he")), chunk(delta(content="llo", reason="stop"))

    assert seen(ChoicesState(1), *events).text is None
    assert seen(ChoicesState(1, keep_text=True), *events).text == "hello"
    said = seen(ResponseState(keep_text=True), b'{"type": "response.output_text.delta", "delta": "hello"}')
    assert said.text == "hello"


@pytest.mark.parametrize("data", [b"", b"{", b"hello", b"{} {}", b"\xff", b'{"a": nan}', b"[" * 100_000])
def test_data_that_is_no_json_is_a_failure(data: bytes) -> None:
    for state in (ChoicesState(1), ResponseState()):
        with pytest.raises(InvalidResponse):
            state.feed(data)


@pytest.mark.parametrize(
    "kind",
    [
        *("response.output_text.delta", "response.reasoning_text.delta", "response.function_call_arguments.delta"),
        *("response.refusal.delta", "response.output_item.done"),
        *("response.completed", "response.incomplete", "response.failed"),
    ],
)
def test_what_is_content_of_a_response(kind: str) -> None:
    assert responses({"type": kind}).content


@pytest.mark.parametrize(
    "kind",
    [
        *("response.created", "response.queued", "response.in_progress", "response.output_item.added"),
        *("response.content_part.added", "response.content_part.done", "ping", ""),
    ],
)
def test_what_is_no_content_of_a_response(kind: str) -> None:
    state = responses({"type": kind, "response": {"status": "in_progress"}})

    assert not state.content
    assert not state.finished


@pytest.mark.parametrize("status", ["completed", "incomplete", "failed"])
def test_a_response_is_complete_with_its_terminal_event(status: str) -> None:
    response = {"id": "r-1", "model": "m", "usage": {"input_tokens": 1, "output_tokens": 2}}
    state = responses(
        {"type": "response.output_text.delta", "delta": "a", "sequence_number": 3},
        {"type": f"response.{status}", "response": response, "sequence_number": 4},
    )

    assert state.finished
    assert state.error is None
    assert state.done_event is None
    assert state.finish_reasons == [status]
    assert state.sequence_number == 5
    assert (state.model, state.response_id) == ("m", "r-1")
    assert (state.input_tokens, state.output_tokens) == (1, 2)


def test_a_response_without_its_terminal_event_is_not_complete() -> None:
    state = responses({"type": "response.output_text.delta", "delta": "a"}, {"type": "response.output_item.done"})
    with pytest.raises(InvalidResponse):
        seen(state, b"[DONE]")

    assert not state.finished
    assert not state.ended


def test_an_error_of_a_response_is_the_backends_own() -> None:
    flat = responses({"type": "error", "code": "c", "message": "m", "param": None})
    assert document_of(flat) == {"code": "c", "message": "m", "param": None}
    assert document_of(responses({"type": "error", "error": {"code": "c"}})) == {"code": "c"}
    assert document_of(responses({"error": {"code": "c"}})) == {"code": "c"}


def test_a_response_that_failed_before_any_content_is_an_error() -> None:
    failed = {"type": "response.failed", "response": {"error": {"code": "server_error", "message": "m"}}}

    assert document_of(responses(failed)) == {"code": "server_error", "message": "m"}
    late = responses({"type": "response.output_text.delta", "delta": "a"}, failed)
    assert late.error is None
    assert late.ended


@pytest.mark.parametrize("text", ["oops", "overloaded"])
def test_a_text_in_place_of_the_first_event_is_an_error(text: str) -> None:
    data = json.dumps(text).encode()

    assert document_of(seen(ChoicesState(1), data)) == text
    assert document_of(seen(ResponseState(), data)) == text
    assert document_of(seen(MessageState(), data)) == text
    assert chat(chunk(delta(content="a")), data).error is None


def test_usage_is_awaited_where_it_was_asked_for() -> None:
    state = ChoicesState(1, asks_usage=True)
    assert seen(state, chunk(delta(reason="stop"))).awaits_usage
    assert not seen(state, chunk(usage={"prompt_tokens": 3, "completion_tokens": 4})).awaits_usage
    assert not chat(chunk(delta(reason="stop"))).awaits_usage


def test_an_error_event_of_ours_is_numbered_from_0_or_after_the_last() -> None:
    assert responses().sequence_number == 0
    assert responses({"type": "response.created", "sequence_number": 0}).sequence_number == 1
    assert responses({"type": "response.created", "sequence_number": "x"}).sequence_number == 0


EVENTS_OF_MESSAGES = ("message_start", "content_block_delta", "text_delta", "message_delta", "message_stop")
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.sampled_from(["", "a", "stop", "error", "response.completed", *EVENTS_OF_MESSAGES]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    *("choices", "delta", "text", "index", "finish_reason", "usage", "error", "type", "response"),
                    *("model", "id", "prompt_tokens", "sequence_number", "message", "stop_reason"),
                ]
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)


@given(st.lists(VALUES, max_size=4), st.integers(1, 3), st.booleans())
def test_no_json_makes_it_fail_and_progress_is_never_lost(events: list[object], choices: int, keep: bool) -> None:  # noqa: FBT001
    for state in (ChoicesState(choices, keep_text=keep), ResponseState(keep_text=keep), MessageState(keep_text=keep)):
        before = (False, False, False)
        for event in events:
            state.feed(json.dumps(event).encode())
            now = (state.content, state.finished, state.ended)
            assert all(new or not old for old, new in zip(before, now, strict=True))
            assert state.content or not state.finished
            before = now
        assert all(isinstance(reason, str) for reason in state.finish_reasons)


WORDS = chunk(delta(content="word"), model="demo", id="one")
SAID = b'{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "word"}}'
NUMBERED = b'{"type": "response.output_text.delta", "sequence_number": 7, "delta": "word"}'


def told_of(state: StreamState, data: bytes) -> dict[str, object]:
    """What a stream is after an event."""
    broken = False
    try:
        state.feed(data)
    except InvalidResponse:
        broken = True
    names = ("content", "finished", "ended", "error", "model", "response_id", "input_tokens", "output_tokens")
    return {name: getattr(state, name) for name in names} | {
        "error": document_of(state),
        "broken": broken,
        "reasons": state.finish_reasons,
        "sequence_number": getattr(state, "sequence_number", None),
    }


@given(
    VALUES
    | st.fixed_dictionaries(
        {
            "choices": st.lists(
                st.fixed_dictionaries({}, optional={"finish_reason": VALUES, "index": VALUES}), max_size=2
            )
        },
        optional={"error": VALUES, "usage": VALUES, "model": VALUES},
    )
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["response.output_text.delta", "error"]), "sequence_number": VALUES},
        optional={"error": VALUES},
    )
    | st.fixed_dictionaries(
        {"type": st.sampled_from(["content_block_delta", "message_delta", "error"])},
        optional={"delta": VALUES | st.fixed_dictionaries({"type": st.just("text_delta")}), "usage": VALUES},
    ),
    st.none() | st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=2)),
)
@example({"choices": [{"delta": {"content": "x"}}]}, (30, b"\xff"))
@example({"choices": [{"delta": {"content": "x"}}]}, (30, b"\n"))
@example({"type": "content_block_delta", "delta": {"type": "text_delta", "text": "xxxx"}}, (70, b"\xff"))
@example({"type": "response.output_text.delta", "sequence_number": 8, "delta": "xxxxxxxxx"}, (75, b"\xff"))
def test_a_glance_at_an_event_of_words_tells_as_much_as_a_look(event: object, noise: tuple[int, bytes] | None) -> None:
    """Kept words make it look closely at every event."""
    data = json.dumps(event).encode()
    if noise is not None:
        at = noise[0] % (len(data) + 1)
        data = data[:at] + noise[1] + data[at + len(noise[1]) :]
    assert told_of(seen(ChoicesState(2), WORDS), data) == told_of(seen(ChoicesState(2, keep_text=True), WORDS), data)
    assert told_of(seen(ResponseState(), NUMBERED), data) == told_of(
        seen(ResponseState(keep_text=True), NUMBERED), data
    )
    assert told_of(seen(MessageState(), SAID), data) == told_of(seen(MessageState(keep_text=True), SAID), data)


@pytest.mark.parametrize("size", [10, 100_000])
@pytest.mark.parametrize(
    "fields",
    [
        {"role": "assistant", "content": "", "images": [{"url": "%"}]},
        {"role": "assistant", "content": None, "audio": {"data": "%"}},
        {"content": "", "refusal": "%"},
        {"content": "%"},
    ],
)
def test_a_delta_with_anything_in_it_is_content_however_large(fields: dict[str, Any], size: int) -> None:
    event = chunk(delta(**fields)).replace(b"%", b"x" * size)

    assert chat(event).content


@pytest.mark.parametrize("where", ["delta", "logprobs"])
def test_a_choice_is_read_however_many_objects_it_holds(where: str) -> None:
    objects = [{"token": "a", "logprob": 0}] * 10_000
    choice = delta(1, "stop", content="hi")
    inside = choice["delta"] if where == "delta" else choice
    inside["logprobs"] = {"content": objects}
    state = chat(chunk(delta(content="hi")), chunk(choice), chunk(delta(0, "length")), choices=2)

    assert chat(chunk(choice)).content
    assert (state.finished, state.finish_reasons) == (True, ["length", "stop"])
