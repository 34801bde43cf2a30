# ruff: noqa: ANN401
import json
import struct
from base64 import b64decode
from math import isclose
from typing import Any

import msgspec
import pytest

from mock_model.answer import Answer
from mock_model.chat import ChatRequest
from mock_model.completions import CompletionRequest
from mock_model.decoding import decode
from mock_model.embeddings import EmbeddingRequest
from mock_model.errors import InvalidRequest
from mock_model.responses import ResponseRequest
from mock_model.text import Writer

WRITER = Writer(0, 4)
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


def answer(request_type: Any, **body: Any) -> Answer:
    request = decode(msgspec.json.Decoder(request_type), json.dumps(body).encode())
    if isinstance(request, ResponseRequest):
        return request.respond("resp_1", body.get("model", "demo-model"), "00aa", WRITER).answer
    result: Answer = request.answer(body.get("model", "demo-model"), "00aa", WRITER)
    return result


def chat(**body: Any) -> Answer:
    return answer(ChatRequest, **{"messages": [{"role": "user", "content": "hello"}], **body})


def document(result: Answer) -> Any:
    return json.loads(result.body)


def payloads(result: Answer) -> list[Any]:
    lines = [line for event in result.events for line in event.data.decode().splitlines()]
    return [json.loads(line[6:]) for line in lines if line.startswith("data: ") and line != "data: [DONE]"]


def test_an_unstreamed_chat_has_every_field_of_the_api() -> None:
    result = chat(model="m")
    body = document(result)

    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 4
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 4
    assert result.events == ()
    assert result.steps == 4


def test_a_streamed_chat_is_role_content_finish_done() -> None:
    result = chat(stream=True)
    chunks = payloads(result)

    assert [event.part for event in result.events] == ["opening", *["token"] * 4, "finish", "done"]
    assert [event.step for event in result.events] == [False, True, True, True, True, False, False]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert all("usage" not in chunk for chunk in chunks)


def test_the_usage_chunk_comes_when_asked_for() -> None:
    result = chat(stream=True, stream_options={"include_usage": True})
    chunks = payloads(result)

    assert [event.part for event in result.events][-3:] == ["finish", "usage", "done"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 6


def test_several_choices_come_side_by_side() -> None:
    streamed, whole = payloads(chat(stream=True, n=3)), document(chat(n=3))

    assert [chunk["choices"][0]["index"] for chunk in streamed[:6]] == [0, 1, 2, 0, 1, 2]
    for index in range(3):
        deltas = [chunk["choices"][0] for chunk in streamed if chunk["choices"][0]["index"] == index]
        assert deltas[-1]["finish_reason"] == "stop"
        text = "".join(delta["delta"].get("content") or "" for delta in deltas)
        assert text == whole["choices"][index]["message"]["content"]
    assert len({choice["message"]["content"] for choice in whole["choices"]}) == 3
    assert [event.step for event in chat(stream=True, n=2).events].count(True) == 4


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_a_limit_is_a_finish_by_length(field: str) -> None:
    body = document(chat(**{field: 2}))

    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


def test_a_tool_is_called_whole_and_in_pieces() -> None:
    message = document(chat(tools=[TOOL]))["choices"][0]
    chunks = payloads(chat(tools=[TOOL], stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    calls = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta]

    assert message["finish_reason"] == "tool_calls"
    assert message["message"]["content"] is None
    assert json.loads(message["message"]["tool_calls"][0]["function"]["arguments"]) == {"city": "text"}
    assert calls[0]["function"] == {"name": "weather", "arguments": ""}
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"city": "text"}
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_the_named_tool_is_called_and_none_is_none() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    named = chat(tools=[TOOL, other], tool_choice={"type": "function", "function": {"name": "other"}})
    after = [{"role": "user", "content": "x"}, {"role": "tool", "content": "sunny"}]

    assert document(named)["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "other"
    assert document(chat(tools=[TOOL], tool_choice="none"))["choices"][0]["finish_reason"] == "stop"
    assert document(chat(tools=[TOOL], messages=after))["choices"][0]["finish_reason"] == "stop"
    with pytest.raises(InvalidRequest, match="no tool 'nope'"):
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "nope"}})


@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_tool_is_picked_from_those_that_are_allowed(mode: str) -> None:
    other = {"type": "function", "function": {"name": "other"}}
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [other]}}
    after = [{"role": "user", "content": "x"}, {"role": "tool", "content": "sunny"}]
    message = document(chat(tools=[TOOL, other], tool_choice=choice))["choices"][0]["message"]

    assert message["tool_calls"][0]["function"]["name"] == "other"
    answered = chat(tools=[TOOL, other], tool_choice=choice, messages=after)
    assert document(answered)["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        ({"tools": [{"type": "function", "function": {"name": "nope"}}]}, "no tool 'nope'"),
        ({"tools": [{"type": "function"}]}, "no tool None"),
        ({"tools": ["weather"]}, "list of tools"),
        ({}, "list of tools"),
        (None, "list of tools"),
    ],
)
def test_allowed_tools_must_be_there(allowed: object, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        chat(tools=[TOOL], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
    assert caught.value.param == "tool_choice"


def test_structured_output_is_json() -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    assert json.loads(document(chat(response_format=form))["choices"][0]["message"]["content"]) == {"n": 1}
    assert json.loads(document(chat(response_format={"type": "json_object"}))["choices"][0]["message"]["content"]) == {}


def test_unknown_fields_are_ignored() -> None:
    assert chat(brand_new={"x": 1}).body != b""


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": 3}]}, "messages"),
        ({"n": 0}, "n"),
        ({"stream": "yes"}, "stream"),
        ({"model": 3}, "model"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(**body)

    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"messages": "\xff"}', b"[" * 100_000])
def test_what_is_no_json_is_said_to_be_none(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode(msgspec.json.Decoder(ChatRequest), body)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(InvalidRequest) as caught:
        decode(msgspec.json.Decoder(ChatRequest), b"{}")

    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1], [2, 3]], 2), (None, 1)],
)
def test_each_prompt_has_its_choices(prompt: Any, choices: int) -> None:
    result = answer(CompletionRequest, prompt=prompt, n=2)
    body = document(result)

    assert body["object"] == "text_completion"
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * choices))
    assert body["usage"]["completion_tokens"] == 8 * choices


def test_completions_stream_and_echo() -> None:
    result = answer(CompletionRequest, prompt="say ", echo=True, stream=True, stream_options={"include_usage": True})
    whole = document(answer(CompletionRequest, prompt="say ", echo=True))["choices"][0]["text"]
    chunks = payloads(result)

    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-1]) == whole
    assert whole.startswith("say ")
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] > 0
    assert result.events[-1].part == "done"


@pytest.mark.parametrize("prompt", [[], ["a", 1], [1, [2]]])
def test_a_mixed_prompt_is_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequest, match="prompt: "):
        answer(CompletionRequest, prompt=prompt)


def test_embeddings_are_unit_vectors_that_depend_on_their_input_alone() -> None:
    first = document(answer(EmbeddingRequest, input=["a", "b"]))["data"]
    second = document(answer(EmbeddingRequest, input="b"))["data"]

    assert [item["index"] for item in first] == [0, 1]
    assert first[1]["embedding"] == second[0]["embedding"]
    assert first[0]["embedding"] != first[1]["embedding"]
    assert isclose(sum(number**2 for number in first[0]["embedding"]), 1.0)


def test_base64_embeddings_are_little_endian_floats() -> None:
    numbers = document(answer(EmbeddingRequest, input=[1, 2], dimensions=8))["data"][0]["embedding"]
    text = document(answer(EmbeddingRequest, input=[1, 2], dimensions=8, encoding_format="base64"))["data"][0]

    decoded = struct.unpack("<8f", b64decode(text["embedding"]))
    assert all(isclose(a, b, rel_tol=1e-6) for a, b in zip(numbers, decoded, strict=True))


def test_inputs_of_nothing_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="input: "):
        answer(EmbeddingRequest, input=[])


def test_a_response_and_its_events_say_the_same() -> None:
    whole = document(answer(ResponseRequest, input="hello"))
    result = answer(ResponseRequest, input="hello", stream=True)
    events = payloads(result)

    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:4]] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert events[-1]["type"] == "response.completed"
    assert events[-1]["response"] == whole
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert text == whole["output"][0]["content"][0]["text"]
    assert all(event.data.startswith(b"event: response.") for event in result.events)
    assert not any(event.part == "done" for event in result.events)


def test_a_limited_response_is_incomplete() -> None:
    whole = document(answer(ResponseRequest, input="hello", max_output_tokens=1))
    events = payloads(answer(ResponseRequest, input="hello", max_output_tokens=1, stream=True))

    assert whole["status"] == "incomplete"
    assert whole["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events[-1]["type"] == "response.incomplete"


def test_a_response_calls_a_function() -> None:
    tool = {"type": "function", "name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}
    whole = document(answer(ResponseRequest, input="x", tools=[tool]))
    events = payloads(answer(ResponseRequest, input="x", tools=[tool], stream=True))
    done = [{"type": "function_call_output", "call_id": "c", "output": "sunny"}]

    assert whole["output"][0]["type"] == "function_call"
    assert json.loads(whole["output"][0]["arguments"]) == {"city": "text"}
    deltas = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(deltas) == whole["output"][0]["arguments"]
    assert document(answer(ResponseRequest, input=done, tools=[tool]))["output"][0]["type"] == "message"
    with pytest.raises(InvalidRequest, match="no tool"):
        answer(ResponseRequest, input="x", tools=[tool], tool_choice={"type": "function", "name": "other"})


def test_a_response_calls_a_function_that_is_allowed() -> None:
    tools = [{"type": "function", "name": "weather"}, {"type": "function", "name": "other"}]
    allowed = [{"type": "web_search"}, {"type": "function", "name": "other"}]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": allowed}
    only_hosted = {"type": "allowed_tools", "mode": "auto", "tools": allowed[:1]}

    called = document(answer(ResponseRequest, input="x", tools=tools, tool_choice=choice))
    assert called["output"][0]["name"] == "other"
    spoken = document(answer(ResponseRequest, input="x", tools=tools, tool_choice=only_hosted))
    assert spoken["output"][0]["type"] == "message"
