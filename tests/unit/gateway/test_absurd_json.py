"""JSON of shapes that no real client or server sends: nothing of it is built that takes many times its bytes."""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest

from gateway.dialects.answer_fields import raise_error_inside
from gateway.dialects.anthropic import MESSAGES, AnthropicMessages, MessageState
from gateway.dialects.error_answers import read_error
from gateway.dialects.model_field import with_model
from gateway.dialects.openai.chat import CHAT, COMPLETIONS, EMBEDDINGS, OpenAIChat
from gateway.dialects.openai.choices import ChoicesState
from gateway.dialects.openai.responses import RESPONSES, OpenAIResponses, ResponseState
from gateway.dialects.table import BY_PATH
from gateway.errors import BackendError, GatewayError

if TYPE_CHECKING:
    from gateway.dialects.dialect import StreamState

SIZE = 1 << 20
A_MESSAGE = b'"messages":[{"role":"user","content":"hi"}]'
MAX_TIMES = 3.2
"""Bytes of memory for each byte of JSON at most, itself included: 3, and some for what is small."""
BYTES_PER_CALL = 40
"""Of Python: a loop over tokens makes a call for every few bytes."""


def filled(start: bytes, unit: bytes, end: bytes) -> bytes:
    return start + b",".join([unit] * ((SIZE - len(start) - len(end)) // (len(unit) + 1))) + end


BODIES = {
    "lists": (COMPLETIONS, filled(b'{"prompt":[', b"[]", b"]}")),
    "texts": (COMPLETIONS, filled(b'{"prompt":[', b'""', b"]}")),
    "tokens": (COMPLETIONS, filled(b'{"prompt":[', b"1", b"]}")),
    "objects": (COMPLETIONS, filled(b'{"prompt":[', b"{}", b"]}")),
    "messages": (CHAT, filled(b'{"messages":[', b'{"role":""}', b"]}")),
    "messages that are none": (CHAT, filled(b'{"messages":[', b"{}", b"]}")),
    "the last message is none": (CHAT, filled(b'{"messages":[', b'{"role":""}', b',{"role":1}]}')),
    "parts": (CHAT, filled(b'{"messages":[{"role":"","content":[', b'{"type":"text"}', b"]}]}")),
    "lists in content": (CHAT, filled(b'{"messages":[{"role":"","content":[', b"[]", b"]}]}")),
    "one text": (CHAT, b'{"messages":[{"role":"user","content":"%b"}]}' % (b"a" * SIZE)),
    "no ascii": (CHAT, b'{"messages":[{"role":"user","content":"%b"}]}' % ("é".encode() * (SIZE // 2))),
    "line ends": (CHAT, b'{"messages":[{"role":"user","content":"%b"}]}' % (rb"\n" * (SIZE // 2))),
    "escaped letters": (CHAT, b'{"messages":[{"role":"user","content":"%b"}]}' % (rb"\u0061" * (SIZE // 6))),
    "half surrogates": (CHAT, b'{"messages":[{"role":"user","content":"%b"}]}' % (rb"\ud800" * (SIZE // 6))),
    "backslashes": (CHAT, b'{"messages":[{"role":"user","content":"%b"}]}' % (rb"\\" * (SIZE // 2))),
    "names": (CHAT, b"{" + b",".join(b'"%d":0' % number for number in range(SIZE // 11)) + b"," + A_MESSAGE + b"}"),
    "one name": (CHAT, filled(b"{", b'"a":0', b"," + A_MESSAGE + b"}")),
    "escaped names": (CHAT, filled(b"{", rb'"\u0061":0', b"," + A_MESSAGE + b"}")),
    "tools": (CHAT, filled(b"{" + A_MESSAGE + b',"tools":[', b'{"a":{"b":[1,{"c":""}]}}', b"]}")),
    "depth": (CHAT, filled(b"{" + A_MESSAGE + b',"tools":[', b"[" * 490 + b"]" * 490, b"]}")),
    "too deep": (CHAT, filled(b"{" + A_MESSAGE + b',"tools":[', b"[" * 510 + b"]" * 510, b"]}")),
    "brackets in texts": (CHAT, filled(b"{" + A_MESSAGE + b',"tools":[', b'"[["', b"]}")),
    "spaces": (CHAT, b"{" + A_MESSAGE + b" " * SIZE + b"}"),
    "inputs": (EMBEDDINGS, filled(b'{"input":[', b"[1]", b"]}")),
    "items": (RESPONSES, filled(b'{"input":[', b'{"role":""}', b"]}")),
    "messages of Anthropic": (MESSAGES, filled(b'{"messages":[', b'{"role":""}', b"]}")),
    "messages of Anthropic that are none": (MESSAGES, filled(b'{"messages":[', b"{}", b"]}")),
    "blocks": (MESSAGES, filled(b'{"messages":[{"role":"","content":[', b'{"type":"text"}', b"]}]}")),
    "model inside": (CHAT, filled(b'{"messages":[', b'{"role":"","model":"x"}', b"]}")),
    "model as text": (COMPLETIONS, filled(b'{"prompt":[', b'"model"', b"]}")),
    "n inside": (CHAT, filled(b"{" + A_MESSAGE + b',"tools":[', b'{"n":0}', b"]}")),
    "a long number": (CHAT, b"{" + A_MESSAGE + b',"x":' + b"1" * SIZE + b"}"),
    "no end": (CHAT, filled(b"{" + A_MESSAGE + b',"tools":[', b"{}", b"")),
}
ANSWERS = {
    "choices": filled(b'{"choices":[', b"{}", b"]}"),
    "choices that are none": filled(b'{"choices":[', b"0", b"]}"),
    "numbers": filled(b'{"data":[{"embedding":[', b"0.1", b"]}]}"),
    "not finite": filled(b'{"data":[{"embedding":[', b"NaN", b"]}]}"),
    "texts": filled(b'{"choices":[],"x":[', b'""', b"]}"),
    "error": filled(b'{"error":[', b"{}", b"]}"),
    "half surrogates": b'{"choices":[{"message":{"content":"%b"}}]}' % (rb"\ud800" * (SIZE // 6)),
    "blocks": filled(b'{"type":"message","content":[', b"{}", b"]}"),
    "no object": filled(b"[", b"{}", b"]"),
}
EVENTS = {
    **{name: body for name, body in ANSWERS.items() if name != "no object"},
    "deltas": filled(b'{"choices":[{"delta":{', b'"a":0', b"}}]}"),
    "delta": filled(b'{"choices":[{"delta":{"content":[', b"{}", b"]}}]}"),
    "response": filled(b'{"type":"response.completed","response":{"output":[', b"{}", b"]}}"),
    "item": filled(b'{"type":"response.output_item.done","item":{"content":[', b"{}", b"]}}"),
    "message": filled(b'{"type":"message_start","message":{"content":[', b"{}", b"]}}"),
    "delta of a block": filled(b'{"type":"content_block_delta","delta":{"citation":[', b"{}", b"]}}"),
    "block": filled(b'{"type":"content_block_start","content_block":{"content":[', b"{}", b"]}}"),
    "end of a message": filled(b'{"type":"message_delta","delta":{"container":[', b"{}", b"]}}"),
    "usage": filled(b'{"usage":[', b"{}", b"]}"),
}


def cost(size: int, work: Callable[[], object]) -> None:
    """Assert what work on so many bytes takes: memory beside them, and calls."""
    work()  # what is built once
    tracemalloc.start()
    try:
        work()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size + peak <= MAX_TIMES * size, f"{1 + peak / size:.1f} times"
    calls = 0

    def count(_frame: FrameType, kind: str, _what: object) -> None:
        nonlocal calls
        calls += kind in {"call", "c_call"}

    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    assert calls <= size // BYTES_PER_CALL, f"{calls} calls"


def refused(work: Callable[[], Any]) -> Any:  # noqa: ANN401
    """What it returns, or the error."""
    try:
        return work()
    except (GatewayError, BackendError) as error:
        return error


@pytest.mark.parametrize("shape", BODIES)
def test_a_body_costs_little_more_than_its_bytes(shape: str) -> None:
    path, body = BODIES[shape]
    prompt = refused(lambda: BY_PATH[path].read_request(path, body))

    cost(len(body), lambda: refused(lambda: BY_PATH[path].read_request(path, body)))
    if not isinstance(prompt, GatewayError):
        cost(len(body), lambda: with_model(body, "other"))


@pytest.mark.parametrize("shape", ANSWERS)
def test_an_answer_costs_little_more_than_its_bytes(shape: str) -> None:
    body = ANSWERS[shape]
    for dialect in (OpenAIChat(), OpenAIResponses(), AnthropicMessages()):
        cost(
            len(body),
            lambda dialect=dialect: refused(lambda: dialect.read_answer("application/json", body).finish_reasons),  # type: ignore[misc]
        )
    cost(len(body), lambda: refused(lambda: read_error(500, body, {}, None)))
    cost(len(body), lambda: refused(lambda: raise_error_inside(body)))


@pytest.mark.parametrize("shape", EVENTS)
def test_an_event_costs_little_more_than_its_bytes(shape: str) -> None:
    data = EVENTS[shape]
    for make in (lambda: ChoicesState(1), ResponseState, MessageState):
        begun: StreamState = make()
        begun.feed(b'{"model":"m","type":"response.created","choices":[{"index":0,"delta":{"content":"hi"}}]}')
        for state in (begun, make()):
            cost(len(data), lambda state=state: refused(lambda: state.feed(data)))  # type: ignore[misc]
