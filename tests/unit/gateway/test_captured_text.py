import json
from typing import Any

import pytest

from gateway.dialects.anthropic import AnthropicMessages
from gateway.dialects.captured_text import MAX_MESSAGES, MAX_TEXT, output_messages, texts_of
from gateway.dialects.openai.chat import OpenAIChat
from gateway.dialects.openai.responses import OpenAIResponses

CHAT, RESPONSES, MESSAGES = OpenAIChat(), OpenAIResponses(), AnthropicMessages()


def text(content: str, role: str = "user") -> dict[str, Any]:
    return {"role": role, "parts": [{"type": "text", "content": content}]}


@pytest.mark.parametrize(
    ("body", "messages"),
    [
        ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]},
         [text("Be kind.", "system"), text("Hi")]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image_url"}]}]},
         [{"role": "user", "parts": [{"type": "text", "content": "See"}, {"type": "image_url"}]}]),
        ({"messages": [{"role": "assistant", "content": None}]}, [{"role": "assistant", "parts": []}]),
        ({"prompt": "Once"}, [text("Once")]),
        ({"prompt": ["a", "b"]}, [text("a"), text("b")]),
        ({"prompt": [1, 2, 3]}, [{"role": "user", "parts": []}]),
        ({"input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]}, [text("Hi")]),
        ({"input": None}, [{"role": "user", "parts": []}]),
    ],
)  # fmt: skip
def test_a_prompt_has_the_form_of_the_conventions(body: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    assert json.loads(CHAT.prompt_messages(json.dumps(body).encode())) == messages
    if "input" in body:
        assert json.loads(RESPONSES.prompt_messages(json.dumps(body).encode())) == messages


@pytest.mark.parametrize(
    ("body", "texts"),
    [
        ({"choices": [{"message": {"content": "a"}}, {"message": {"content": None}}]}, ["a", ""]),
        ({"choices": [{"text": "b"}]}, ["b"]),
        ({"output": [{"type": "reasoning"}, {"content": [{"text": "c"}, {"text": "d"}]}]}, ["cd"]),
        ({"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "e"}, {"text": "f"}]}, ["ef"]),
        ({"content": [{"type": "tool_use", "name": "f", "input": {}}]}, []),
        ({"data": [{"embedding": [0.1]}]}, []),
    ],
)
def test_the_texts_of_an_answer(body: dict[str, Any], texts: list[str]) -> None:
    dialect = RESPONSES if "output" in body else MESSAGES if "content" in body else CHAT
    assert dialect.answer_texts(json.dumps(body).encode()) == texts


@pytest.mark.parametrize("system", ["Be kind.", [{"type": "text", "text": "Be kind."}]])
def test_a_system_prompt_beside_the_messages_comes_first(system: object) -> None:
    blocks = [{"type": "text", "text": "Hi"}, {"type": "tool_result", "content": "secret"}]
    body = {"system": system, "messages": [{"role": "user", "content": blocks}]}

    assert json.loads(MESSAGES.prompt_messages(json.dumps(body).encode())) == [
        text("Be kind.", "system"),
        {"role": "user", "parts": [{"type": "text", "content": "Hi"}, {"type": "tool_result"}]},
    ]
    assert json.loads(MESSAGES.prompt_messages(b'{"messages": [{"role": "user", "content": "Hi"}]}')) == [text("Hi")]


def test_an_answer_is_told_with_its_finish_reasons() -> None:
    told = json.loads(output_messages(["a", "b"], ["stop"]))

    assert told == [text("a", "assistant") | {"finish_reason": "stop"}, text("b", "assistant")]


def test_all_of_it_is_bounded() -> None:
    long = {"messages": [{"role": "r" * 9999, "content": "x" * 9999}] * 1000}
    many = {"messages": [{"role": "user", "content": ""}] * 1000}
    parts = {"messages": [{"role": "user", "content": [{"type": "image" * 99}] * 1000}] * 1000}

    assert len(CHAT.prompt_messages(json.dumps(long).encode())) < MAX_TEXT + 1000
    assert len(CHAT.prompt_messages(json.dumps(parts).encode())) < 3 * MAX_TEXT
    assert len(json.loads(CHAT.prompt_messages(json.dumps(many).encode()))) == MAX_MESSAGES
    assert len(output_messages(["y" * 99_999] * 5, None)) < MAX_TEXT + 1000


def test_what_cannot_be_decoded_in_full_costs_the_capture_alone() -> None:
    body = b'{"prompt": "p", "odd": 1%s}' % (b"0" * 5000)

    assert json.loads(CHAT.prompt_messages(body)) in ([text("p")], [{"role": "user", "parts": []}])
    assert CHAT.answer_texts(body) == RESPONSES.answer_texts(body) == MESSAGES.answer_texts(body) == []


def test_of_a_large_body_of_small_values_nothing_is_kept_and_of_a_large_text_its_beginning() -> None:
    body = b'{"messages": [{"role": "user", "content": [%b]}]}' % b",".join([b"[]"] * 30_000)
    assert OpenAIChat().prompt_messages(body) == OpenAIChat().prompt_messages(b"{}")
    assert texts_of(OpenAIChat(), b'{"choices": [%b]}' % b",".join([b"{}"] * 30_000)) == []
    text = json.dumps({"choices": [{"message": {"content": "a word, " * 30_000}}]}).encode()
    assert [len(each) for each in texts_of(OpenAIChat(), text)] == [MAX_TEXT]
