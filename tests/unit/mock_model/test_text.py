from mock_model.draws import draw, fingerprint
from mock_model.sample import sample
from mock_model.text import Writer, count_tokens, fragments, texts_in


def test_text_depends_on_seed_request_and_choice_only() -> None:
    writer = Writer(1, 16)
    text = writer.write("aa", 0, None).text

    assert text == Writer(1, 16).write("aa", 0, None).text
    assert text != Writer(2, 16).write("aa", 0, None).text
    assert text != writer.write("ab", 0, None).text
    assert text != writer.write("aa", 1, None).text


def test_a_limit_cuts_the_same_text() -> None:
    writer = Writer(1, 16)
    whole, cut = writer.write("aa", 0, None), writer.write("aa", 0, 3)

    assert len(whole.tokens) == 16
    assert not whole.cut
    assert cut.tokens == whole.tokens[:3]
    assert cut.cut
    assert not writer.write("aa", 0, 16).cut
    assert not writer.write("aa", 0, 100).cut


def test_a_text_is_words_between_single_blanks() -> None:
    text = Writer(3, 200).write("aa", 0, None).text

    assert text == " ".join(text.split())
    assert len(text.split()) == 200
    assert not text.isascii()


def test_json_is_cut_at_its_limit_too() -> None:
    schema = {"type": "object", "properties": {"city": {"type": "string"}}}

    assert Writer(0, 4).write_json(schema).text == '{"city":"text"}'
    assert Writer(0, 4).write_json(schema, 1).tokens == ['{"city']
    assert Writer(0, 4).write_json(schema, 1).cut
    assert not Writer(0, 4).write_json(schema, 3).cut


def test_fragments_make_the_text_again() -> None:
    assert "".join(fragments("abcdefghij", 3)) == "abcdefghij"


def test_tokens_are_four_characters_and_at_least_one() -> None:
    assert count_tokens([]) == 1
    assert count_tokens(["abcd"]) == 1
    assert count_tokens(["abcd", "e"]) == 2


def test_texts_are_found_in_parts_and_items() -> None:
    items = ["a", {"content": "b"}, {"content": [{"type": "input_text", "text": "c"}, {"type": "image"}]}, 3, None]

    assert list(texts_in(items)) == ["a", "b", "c"]


def test_fingerprints_tell_path_and_body_apart() -> None:
    mark = fingerprint("/v1/chat/completions", b"{}")

    assert mark == fingerprint("/v1/chat/completions", b"{}")
    assert len(mark) == 16
    assert len({mark, fingerprint("/v1/completions", b"{}"), fingerprint("/v1/chat/completions", b"{ }")}) == 3


def test_draws_are_spread_over_0_to_1() -> None:
    draws = [draw(0, "x", number) for number in range(1000)]

    assert all(0 <= number < 1 for number in draws)
    assert 400 < sum(number < 0.5 for number in draws) < 600
    assert draws == [draw(0, "x", number) for number in range(1000)]


def test_a_sample_fits_its_schema() -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "kind": {"enum": ["b", "c"]},
            "fixed": {"const": 3},
            "tags": {"type": "array", "items": {"type": "integer"}},
            "inner": {"$ref": "#/$defs/Inner"},
            "either": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            "maybe": {"type": ["number", "null"]},
            "left_out": {"type": "string"},
        },
        "required": ["name", "kind", "fixed", "tags", "inner", "either", "maybe"],
        "$defs": {"Inner": {"type": "object", "properties": {"x": {"type": "null"}}}},
    }

    assert sample(schema) == {
        "name": "text",
        "kind": "b",
        "fixed": 3,
        "tags": [1],
        "inner": {"x": None},
        "either": True,
        "maybe": 1.5,
    }


def test_a_sample_of_nonsense_is_an_empty_object() -> None:
    endless = {"$ref": "#"}

    assert sample(None) == {}
    assert sample("x") == {}
    assert sample(endless) == {}
    assert sample({"$ref": "#/nowhere"}) == {}
    assert sample({"type": "object", "properties": 3}) == {}
