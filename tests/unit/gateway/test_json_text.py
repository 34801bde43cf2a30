"""Where our JSON ends: at the same depth on every interpreter, whatever stands in the texts."""

import json
import re
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import json_text
from gateway.dialects.json_text import MAX_DEPTH, NO_JSON, check, decode, decode_with

decode_struct = msgspec.json.Decoder(msgspec.defstruct("Anything", [])).decode

TEXTS = st.text(st.sampled_from('[]{}"\\a\n'), max_size=12)
SHORT = "[" * 600
"""A text with more brackets than there may be levels, so that every document with it is looked through."""


def nested(depth: int, inner: str = "1", *, objects: bool = False) -> bytes:
    before, after = ('{"a":', "}") if objects else ("[", "]")
    return (before * depth + inner + after * depth).encode()


def is_taken(data: bytes) -> bool:
    """By all three ways, or by none."""
    ways = (decode, check, lambda text: decode_with(decode_struct, b'{"x":' + text + b"}"))
    taken = [takes(way, data) for way in ways]
    assert taken[0] == taken[1]
    return all(taken)


def takes(way: Callable[[bytes], object], data: bytes) -> bool:
    try:
        way(data)
    except NO_JSON:
        return False
    return True


@pytest.mark.parametrize("objects", [False, True])
@pytest.mark.parametrize("before", ["", SHORT, '\\"', "\\", '\\\\"]}'])
def test_the_limit_of_depth_is_exact(before: str, *, objects: bool) -> None:
    text = json.dumps(before)
    for depth, good in ((MAX_DEPTH - 2, True), (MAX_DEPTH + 1, False), (20 * MAX_DEPTH, False), (400_000, False)):
        inner = f"[{text},1]" if objects else f'{{"t":{text}}}'
        data = nested(depth, inner, objects=objects)
        assert is_taken(data) == good, depth
        assert is_taken(b'{"first": [%s, 1], "second": %s}' % (text.encode(), nested(depth - 2, inner))) == good, depth


@given(
    st.recursive(
        TEXTS | st.none(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=20,
    ),
    st.integers(MAX_DEPTH - 8, MAX_DEPTH + 2),
)
def test_what_stands_in_texts_is_no_level(document: Any, around: int) -> None:  # noqa: ANN401
    data = nested(around, json.dumps([SHORT, document]))

    assert (depth_of(document) + around + 1 <= MAX_DEPTH) == takes(decode, data)


def depth_of(document: Any) -> int:  # noqa: ANN401
    if isinstance(document, dict):
        document = list(document.values())
    return 1 + max(map(depth_of, document), default=0) if isinstance(document, list) else 0


@given(
    st.lists(
        st.sampled_from(["a", ",", "\\\\", '\\"', "\\u0061", "\\ud800", "\u017f", "\u212a", "\U0001f30d", '"']),
        max_size=120,
    )
)
def test_blocks_are_the_whole_and_tear_neither_escapes_nor_characters(parts: list[str]) -> None:
    text = "".join(parts).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_text, "BLOCK", 16)
        found = list(json_text.blocks(text))

    assert b"".join(found) == text
    whole = re.compile(r"(?:\\u....|\\[^u]|[^\\])*")
    assert all(whole.fullmatch(block.decode()) for block in found)
