import json

import pytest

from gateway.dialects.model_list import MAX_MODELS, MAX_NAME, names_in
from gateway.errors import InvalidResponse

FORMS = {
    "OpenAI, vLLM": {"object": "list", "data": [{"id": "a", "object": "model"}, {"id": "b", "object": "model"}]},
    "llama.cpp": {
        "models": [{"name": "a.gguf", "model": "a.gguf"}],
        "object": "list",
        "data": [{"id": "a"}, {"id": "b"}],
    },
    "Anthropic": {
        "data": [{"type": "model", "id": "a"}, {"type": "model", "id": "b"}],
        "has_more": True,
        "last_id": "b",
    },
    "Cohere": {"models": [{"name": "a", "endpoints": ["chat"]}, {"name": "b"}], "next_page_token": None},
    "Together": [{"id": "a", "type": "chat"}, {"id": "b", "pricing": {"input": 0.1}}],
    "twice": {"data": [{"id": "a"}, {"id": "b"}, {"id": "a"}]},
    "odd entries": {
        "data": [{"id": 1}, {"id": "a"}, "x", None, {"id": ""}, {"id": "b\n"}, {"id": "x" * 513}, {"id": "b"}]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_names_are_read_in_each_form(form: str) -> None:
    assert names_in(json.dumps(FORMS[form]).encode()) == ("a", "b")


def test_names_of_any_kind_stay_as_they_are() -> None:
    names = ("qwen3:8b", "Qwen/Qwen3-8B", "/models/x.gguf", "models/gemini-2.5-pro", "ä", "x" * MAX_NAME)

    assert names_in(json.dumps({"data": [{"id": name} for name in names]}).encode()) == names


def test_a_list_without_models_is_a_list() -> None:
    assert names_in(b'{"object": "list", "data": []}') == ()
    assert names_in(b"[]") == ()


def test_what_only_python_takes_for_json_is_read() -> None:
    assert names_in(b'\xef\xbb\xbf {"data": [{"id": "a", "price": NaN}]}\n') == ("a",)


def test_of_a_long_list_the_first_names_are_taken() -> None:
    names = names_in(json.dumps({"data": [{"id": str(n)} for n in range(MAX_MODELS + 5)]}).encode())

    assert (len(names), names[0], names[-1]) == (MAX_MODELS, "0", str(MAX_MODELS - 1))


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>", b"null", b"3", b'"a"', b"{}", b'{"data": null}', b'{"data": {"id": "a"}}', b'{"data": [1]}'),
        *(b'{"error": {"message": "no key"}}', b'{"data": [{"id": "a"}]', b'{"data": [{"id": "\xff"}]}'),
        b'{"data": [' + b"[" * 600 + b"]" * 600 + b"]}",
    ],
)
def test_anything_else_is_no_list(body: bytes) -> None:
    with pytest.raises(InvalidResponse):
        names_in(body)
