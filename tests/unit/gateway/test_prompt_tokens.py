import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.prompt_tokens import tokens_of
from gateway.pieces import BLOCK

DATA = "iVBORw0KGgo" + "Aa0+/" * 20_000
PNG = f"data:image/png;base64,{DATA}"
PARTS: list[dict[str, Any]] = [
    {"type": "image_url", "image_url": {"url": PNG}},
    {"type": "image_url", "image_url": {"detail": "low", "url": PNG}},
    {"type": "image_url", "image_url": {"url": "https://example.com/cat.png"}},
    {"type": "input_audio", "input_audio": {"data": DATA, "format": "wav"}},
    {"type": "audio_url", "audio_url": {"url": PNG}},
    {"type": "file", "file": {"filename": "a.pdf", "file_data": PNG}},
    {"type": "file", "file": {"file_id": "file-1"}},
    {"type": "input_image", "image_url": PNG},
    {"type": "input_file", "filename": "a.pdf", "file_data": DATA},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": DATA}},
]


def body_of(*parts: dict[str, Any], **form: Any) -> bytes:  # noqa: ANN401
    content = [{"type": "text", "text": "What is this?"}, *parts]
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": content}]}, **form).encode()


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part['type']}-{len(str(part))}")
@pytest.mark.parametrize("form", [{}, {"separators": (",", ":")}, {"indent": 8}], ids=["usual", "dense", "wide"])
def test_a_part_that_is_no_text_is_a_thousand_tokens_whatever_its_size(
    part: dict[str, Any], form: dict[str, Any]
) -> None:
    assert 1_000 < tokens_of(body_of(part, **form)) < 1_250
    assert 3_000 < tokens_of(body_of(part, part, part, **form)) < 3_500


@pytest.mark.parametrize("slashes", [r"\/", "/"])
def test_data_in_which_slashes_are_escaped_is_data(slashes: str) -> None:
    body = body_of(PARTS[0]).replace(b"/", slashes.encode())
    assert tokens_of(body) < 1_100


@given(st.text(max_size=300))
def test_a_text_is_a_quarter_of_its_bytes_whatever_it_says(text: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
    assert tokens_of(body) == len(body) // 4


@pytest.mark.parametrize("part", PARTS, ids=lambda part: f"{part['type']}-{len(str(part))}")
def test_what_a_text_quotes_is_text(part: dict[str, Any]) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": json.dumps(part)}]}).encode()
    assert tokens_of(body) == len(body) // 4


@pytest.mark.parametrize("offset", range(BLOCK - 300, BLOCK + 30, 7))
def test_a_part_is_found_once_wherever_it_stands(offset: int) -> None:
    text = "x" * offset
    content = [{"type": "text", "text": text}, PARTS[0], {"type": "text", "text": text}]
    body = json.dumps({"messages": [{"role": "user", "content": content}]}).encode()
    assert 1_000 + offset // 2 < tokens_of(body) < 1_100 + offset // 2


@pytest.mark.parametrize("body", [b"", b"{}", b'{"data": "data:', b'"type": "file', PNG.encode()])
def test_no_body_is_too_odd(body: bytes) -> None:
    assert 0 <= tokens_of(body) <= len(body) // 4 + 1_000
