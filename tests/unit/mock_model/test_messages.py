# ruff: noqa: ANN401
import json
from typing import Any

import msgspec
import pytest

from mock_model.answer import Answer
from mock_model.chat import ChatRequest
from mock_model.decoding import decode
from mock_model.errors import InvalidRequest, error_body
from mock_model.messages import CountRequest, MessagesRequest
from mock_model.text import Writer

WRITER = Writer(0, 4)
HELLO = {"role": "user", "content": "hello"}
TOOL = {
    "name": "weather",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
THINKING = {"type": "enabled", "budget_tokens": 1024}


def answer(request_type: Any = MessagesRequest, **body: Any) -> Answer:
    request = decode(msgspec.json.Decoder(request_type), json.dumps({"messages": [HELLO], **body}).encode())
    result: Answer = request.answer(body.get("model", "demo-model"), "00aa", WRITER)
    return result


def document(result: Answer) -> Any:
    return json.loads(result.body)


def events(result: Answer) -> list[tuple[str, Any]]:
    """The name and the data of each event."""
    pairs = [event.data.decode().removesuffix("\n\n").split("\n") for event in result.events]
    return [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in pairs]


def put_together(result: Answer) -> Any:
    """The message that a client builds of a stream."""
    (_, start), *rest = events(result)
    message = start["message"]
    for name, data in rest:
        if name == "content_block_start":
            assert data["index"] == len(message["content"])
            message["content"].append(data["content_block"])
        elif name == "content_block_delta":
            block = message["content"][data["index"]]
            kind = data["delta"].pop("type")
            field, text = next(iter(data["delta"].items()))
            if kind == "input_json_delta":
                block["partial"] = block.get("partial", "") + text
            else:
                block[field] += text
        elif name == "message_delta":
            message.update(data["delta"], usage=data["usage"])
    for block in message["content"]:
        if "partial" in block:
            block["input"] = json.loads(block.pop("partial"))
    return message


def test_an_unstreamed_message_has_every_field_of_the_api() -> None:
    result = answer(model="m")
    body = document(result)

    assert (body["type"], body["role"], body["model"]) == ("message", "assistant", "m")
    assert [block["type"] for block in body["content"]] == ["text"]
    assert len(body["content"][0]["text"].split()) == 4
    assert (body["stop_reason"], body["stop_sequence"]) == ("end_turn", None)
    assert body["usage"] == {
        "input_tokens": 2,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": 4,
    }
    assert (result.events, result.steps) == ((), 4)


def test_a_streamed_message_follows_the_grammar() -> None:
    result = answer(stream=True)

    assert [name for name, _ in events(result)] == [
        "message_start",
        "content_block_start",
        "ping",
        *["content_block_delta"] * 4,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert all(data["type"] == name for name, data in events(result))
    assert [event.step for event in result.events] == [False] * 3 + [True] * 4 + [False] * 3
    assert [event.part for event in result.events][-3:] == ["closing", "finish", "done"]
    assert events(result)[0][1]["message"]["usage"]["input_tokens"] == 2
    assert events(result)[-2][1]["usage"]["output_tokens"] == 4


@pytest.mark.parametrize(
    "body",
    [{}, {"max_tokens": 2}, {"tools": [TOOL]}, {"thinking": THINKING}, {"thinking": THINKING, "tools": [TOOL]}],
)
def test_a_stream_builds_up_the_unstreamed_message(body: dict[str, Any]) -> None:
    streamed, whole = answer(**body, stream=True), answer(**body)

    assert put_together(streamed) == document(whole)
    assert sum(event.step for event in streamed.events) == streamed.steps == whole.steps == whole.output_tokens


def test_a_limit_ends_the_text() -> None:
    body = document(answer(max_tokens=2))

    assert len(body["content"][0]["text"].split()) == 2
    assert body["stop_reason"] == "max_tokens"


def test_thinking_comes_first_and_is_signed() -> None:
    thought, text = document(answer(thinking=THINKING))["content"]

    assert (thought["type"], text["type"]) == ("thinking", "text")
    assert thought["thinking"] != text["text"]
    assert thought["signature"]
    assert answer(thinking=THINKING).output_tokens == 8
    assert document(answer(thinking={"type": "disabled"}))["content"][0]["type"] == "text"
    assert len(document(answer(thinking={"type": "adaptive"}))["content"]) == 2


@pytest.mark.parametrize(("limit", "words"), [(3, [3]), (4, [4]), (5, [4, 1])])
def test_the_limit_counts_thoughts_too(limit: int, words: list[int]) -> None:
    body = document(answer(thinking=THINKING, max_tokens=limit))

    assert [len((block.get("text") or block["thinking"]).split()) for block in body["content"]] == words
    assert body["stop_reason"] == "max_tokens"


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (None, "weather"),
        ({"type": "auto"}, "weather"),
        ({"type": "any"}, "weather"),
        ({"type": "tool", "name": "other"}, "other"),
        ({"type": "none"}, None),
    ],
)
def test_tool_choice(choice: Any, name: str | None) -> None:
    result = answer(tools=[TOOL, {"name": "other"}], tool_choice=choice)
    block = document(result)["content"][0]

    assert block.get("name") == name
    assert document(result)["stop_reason"] == ("end_turn" if name is None else "tool_use")
    if name == "weather":
        assert block["input"] == {"city": "text"}


def test_a_tool_of_the_server_is_not_called() -> None:
    assert document(answer(tools=[{"type": "web_search_20250305", "name": "web_search"}]))["stop_reason"] == "end_turn"


@pytest.mark.parametrize("choice", [{"type": "tool", "name": "unknown"}, {"type": "tool"}, {"type": "function"}, {}])
def test_a_wrong_tool_choice_is_refused(choice: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        answer(tools=[TOOL], tool_choice=choice)

    assert caught.value.param == "tool_choice"


def test_the_result_of_a_tool_is_answered_with_a_text() -> None:
    use = {"role": "assistant", "content": [{"type": "tool_use", "id": "t", "name": "weather", "input": {}}]}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "12345678"}]}
    body = document(answer(messages=[HELLO, use, result], tools=[TOOL]))

    assert body["stop_reason"] == "end_turn"
    assert body["usage"]["input_tokens"] == 4, "13 characters"


def test_a_prompt_has_as_many_tokens_as_in_a_chat() -> None:
    blocks = [{"type": "text", "text": "hello"}, {"type": "image", "source": {"type": "url", "url": "x" * 100}}]
    system = [{"type": "text", "text": "be brief and clear"}]
    messages = [{"role": "user", "content": blocks}, {"role": "assistant", "content": "well"}]
    chat = decode(
        msgspec.json.Decoder(ChatRequest),
        json.dumps({"messages": [{"role": "system", "content": system}, *messages]}).encode(),
    )
    expected = chat.answer("m", "00aa", WRITER).input_tokens

    assert answer(messages=messages, system=system).input_tokens == expected
    assert document(answer(CountRequest, messages=messages, system=system)) == {"input_tokens": expected}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (529, "overloaded_error"),
    ],
)
def test_errors_are_anthropics_below_its_path(status: int, kind: str) -> None:
    expected = {"type": "error", "error": {"type": kind, "message": "no"}}

    assert json.loads(error_body("/v1/messages", status, "no", code="c")) == expected
    assert json.loads(error_body("/v1/messages/count_tokens", status, "no")) == expected
    assert set(json.loads(error_body("/v1/messagesx", status, "no"))["error"]) == {"message", "type", "param", "code"}
