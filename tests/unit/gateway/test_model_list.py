import json

import pytest

from gateway.dialects import model_list
from gateway.dialects.model_field import MAX_MODEL
from gateway.dialects.model_list import MAX_MODELS, MAX_VALUES, names_in
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
    "what cannot be asked for": {
        "data": [{"id": "*"}, {"id": "openai/*"}, {"id": " "}, {"id": ""}, {"id": "a"}, {"id": "b"}]
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_the_names_are_read_in_each_form(form: str) -> None:
    assert names_in(json.dumps(FORMS[form]).encode()) == ("a", "b")


def test_names_of_any_kind_stay_as_they_are() -> None:
    names = ("qwen3:8b", "Qwen/Qwen3-8B", "/models/x.gguf", "models/gemini-2.5-pro", "ä", "x" * MAX_MODEL)

    assert names_in(json.dumps({"data": [{"id": name} for name in names]}).encode()) == names


def test_a_list_without_models_is_a_list() -> None:
    assert names_in(b'{"object": "list", "data": []}') == ()
    assert names_in(b"[]") == ()


def test_what_only_python_takes_for_json_is_read() -> None:
    assert names_in(b'\xef\xbb\xbf {"data": [{"id": "a", "price": NaN}]}\n') == ("a",)


def test_of_a_long_list_the_first_names_are_taken() -> None:
    names = names_in(json.dumps({"data": [{"id": str(n)} for n in range(MAX_MODELS + 5)]}).encode())

    assert (len(names), names[0], names[-1]) == (MAX_MODELS, "0", str(MAX_MODELS - 1))


@pytest.mark.parametrize("value", [b"1", b"{}", b'{"id":"a"}', b"[[[1]]]", b'[",",1]'])
def test_nothing_is_built_of_a_list_with_too_many_values(value: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[object] = []
    monkeypatch.setattr(model_list, "_entries_of", built.append)
    for form in (b"[%b]", b' {"data":[%b]}', b'\xef\xbb\xbf{"data":[],"x":[%b]}'):
        with pytest.raises(InvalidResponse, match="more than 100,000 values"):
            names_in(form % b",".join([value] * (MAX_VALUES + 1)))

    assert built == []


def test_a_long_list_of_models_with_all_that_is_said_of_them_is_read() -> None:
    model = {"description": "fast, cheap, good; " * 20, "pricing": {str(n): n for n in range(20)}, "tags": ["a"] * 10}

    assert (
        len(names_in(json.dumps({"data": [model | {"id": str(n)} for n in range(MAX_MODELS)]}).encode())) == MAX_MODELS
    )


def test_only_the_first_models_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[object] = []
    monkeypatch.setattr(model_list, "_name_of", looked_at.append)
    with pytest.raises(InvalidResponse):
        names_in(b"[%b]" % b",".join([b"1"] * 50_000))

    assert len(looked_at) == MAX_MODELS


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
