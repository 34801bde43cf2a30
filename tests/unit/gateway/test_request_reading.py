import json
import re
import resource
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gateway.dialects.dialect import Prompt
from gateway.dialects.model_field import with_model
from gateway.dialects.openai.chat import ChatRequest, CompletionsRequest, EmbeddingsRequest
from gateway.dialects.openai.responses import ResponsesRequest
from gateway.dialects.request_fields import _ESCAPED
from gateway.dialects.table import BY_PATH
from gateway.errors import InvalidJson, InvalidRequest
from gateway.record import Record

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = b'"messages":[{"role":"user","content":"hi"}]'


PATHS = tuple(BY_PATH)


def parse(path: str, body: bytes) -> Prompt:
    return BY_PATH[path].read_request(path, body)


def chat(more: bytes = b"") -> Prompt:
    return parse(CHAT, b"{" + MESSAGES + more + b"}")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, b"{" + MESSAGES + b"}"),
        (COMPLETIONS, b'{"prompt":"hi"}'),
        (COMPLETIONS, b'{"prompt":null}'),
        ("/v1/embeddings", b'{"input":[1,2]}'),
        ("/v1/responses", b"{}"),
        ("/v1/messages", b"{" + MESSAGES + b"}"),
    ],
)
def test_the_least_a_caller_must_send(path: str, body: bytes) -> None:
    prompt = parse(path, body)

    assert path in PATHS
    assert (prompt.path, prompt.body, prompt.model, prompt.stream, prompt.choices) == (path, body, None, False, 1)


def test_unknown_fields_and_null_ones_are_the_backends_business() -> None:
    prompt = chat(
        b',"model":null,"stream":null,"n":null,"temperature":null,"tools":[{"x":1}],"anything":{"deep":[1e999]}'
    )

    assert prompt.model is None
    assert not prompt.stream
    assert prompt.choices == 1


def test_what_is_read_of_a_request() -> None:
    prompt = chat(b',"model":"m","stream":true,"n":3,"temperature":1,"max_tokens":5')

    assert (prompt.model, prompt.stream, prompt.choices) == ("m", True, 3)


@pytest.mark.parametrize(
    ("body", "choices"),
    [
        (b'{"prompt":"a","n":2}', 2),
        (b'{"prompt":["a","b"],"n":2}', 4),
        (b'{"prompt":["a","b","c"]}', 3),
        (b'{"prompt":[1,2,3],"n":2}', 2),
        (b'{"prompt":[[1,2],[3]],"n":2}', 4),
        (b'{"prompt":[],"n":2}', 2),
    ],
)
def test_every_prompt_has_its_choices(body: bytes, choices: int) -> None:
    assert parse(COMPLETIONS, body).choices == choices


@pytest.mark.parametrize(
    "body",
    [
        *(
            b"",
            b" \n",
            b"{",
            b"{]",
            b"hello",
            b"{} {}",
            b'{"a":1,}',
            b"{'a':1}",
            b'{"a":NaN}',
            b'{"a":01}',
            b"\xef\xbb\xbf\xef\xbb\xbf{}",
            b"\xef\xbb\xbf",
            b"\xef\xbb{}",
        ),
        *(b'{"messages":5', b'{"messages":5,"x":nope}', b'{"a":"\x01"}'),
        b'{"a":"\xff"}',
        b'{"messages":5,"a":"\xff"}',
        b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":5,"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages":[{"role":"user","content":' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}]}",
    ],
)
def test_what_is_no_json(body: bytes) -> None:
    with pytest.raises(InvalidJson):
        parse(CHAT, body)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, b"[]", None),
        (CHAT, b"5", None),
        (CHAT, b"null", None),
        (CHAT, b'"x"', None),
        (CHAT, b"{}", "messages"),
        (CHAT, b'{"messages":null}', "messages"),
        (CHAT, b'{"messages":[]}', "messages"),
        (CHAT, b'{"messages":"hi"}', "messages"),
        (CHAT, b'{"messages":[{}]}', "messages[0].role"),
        (CHAT, b'{"messages":[{"role":"user"},{"role":5}]}', "messages[1].role"),
        (CHAT, b"{" + MESSAGES + b',"model":5}', "model"),
        (CHAT, b"{" + MESSAGES + b',"model":""}', "model"),
        (CHAT, b"{" + MESSAGES + b',"model":"' + b"m" * 513 + b'"}', "model"),
        (CHAT, b"{" + MESSAGES + b',"stream":"yes"}', "stream"),
        (CHAT, b"{" + MESSAGES + b',"n":0}', "n"),
        (CHAT, b"{" + MESSAGES + b',"n":1.5}', "n"),
        (CHAT, b"{" + MESSAGES + b',"n":true}', "n"),
        (CHAT, b"{" + MESSAGES + b',"temperature":"hot"}', "temperature"),
        (CHAT, b"{" + MESSAGES + b',"temperature":1e999}', "temperature"),
        (CHAT, b"{" + MESSAGES + b',"stream_options":{"include_usage":3}}', "stream_options.include_usage"),
        (COMPLETIONS, b"{}", "prompt"),
        (COMPLETIONS, b'{"prompt":5}', "prompt"),
        ("/v1/embeddings", b"{}", "input"),
        ("/v1/embeddings", b'{"input":null}', "input"),
        ("/v1/responses", b'{"input":5}', "input"),
        ("/v1/responses", b'{"max_output_tokens":"many"}', "max_output_tokens"),
        ("/v1/messages", b"{}", "messages"),
        ("/v1/messages", b'{"messages":[]}', "messages"),
        ("/v1/messages", b'{"messages":[{"content":"hi"}]}', "messages[0].role"),
        ("/v1/messages", b'{"messages":"' + b"x" * 70_000 + b'"}', "messages"),
        ("/v1/messages", b'{"messages":{"a":[' + b"{}," * 30_000 + b"{}]}}", "messages"),
        ("/v1/messages", b"{" + MESSAGES + b',"max_tokens":"many"}', "max_tokens"),
        ("/v1/messages", b"{" + MESSAGES + b',"stream":"yes"}', "stream"),
    ],
)
def test_a_wrong_field_is_named(path: str, body: bytes, param: str | None) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        parse(path, body)

    assert wrong.value.param == param


@pytest.mark.parametrize("written", ["1", "1.0", "1e0", "10E-1"])
def test_a_number_of_choices_may_be_written_as_a_float(written: str) -> None:
    for path, field in ((CHAT, MESSAGES), (COMPLETIONS, b'"prompt":"hi"')):
        choices = parse(path, b'{%s,"n":%s}' % (field, written.encode())).choices
        assert (choices, type(choices)) == (1, int)


@pytest.mark.parametrize("written", ["0.0", "0.5", "1.5", "-1.0", "1e300", "1e999", '"1"', "[1]"])
def test_any_other_number_of_choices_is_wrong(written: str) -> None:
    with pytest.raises(InvalidRequest, match="`n` must be a whole number of at least 1") as wrong:
        chat(b',"n":' + written.encode())
    assert wrong.value.param == "n"


def test_a_byte_order_mark_is_passed_over_and_goes_on() -> None:
    for path, rest in (
        (CHAT, MESSAGES),
        (COMPLETIONS, b'"prompt":"hi"'),
        ("/v1/responses", b'"input":"hi"'),
        ("/v1/messages", MESSAGES),
    ):
        body = b'\xef\xbb\xbf {"model":"m",' + rest + b"}"
        prompt = parse(path, body)
        assert (prompt.body, prompt.model) == (body, "m")
        assert with_model(body, "new") == b'\xef\xbb\xbf {"model":"new",' + rest + b"}"
        assert with_model(b"\xef\xbb\xbf{" + rest + b"}", "new") == b'\xef\xbb\xbf{"model":"new",' + rest + b"}"
        assert "hi" in prompt.dialect.prompt_messages(body)


@pytest.mark.parametrize(
    ("path", "more", "param"),
    [
        (CHAT, b'"model":"a","model":"b"', "model"),
        (CHAT, b'"model":"a","model":"a"', "model"),
        (CHAT, b'"model":"a","mod\\u0065l":"b"', "model"),
        (CHAT, b'"\\u006dodel":"a","mod\\u0065l":"b"', "model"),
        (CHAT, b'"model":"a" , "x":{"model":1}, "model" :null', "model"),
        (CHAT, b'"model":"a","\\u006D\\u006F\\u0064\\u0065\\u006C":"b"', "model"),
        (CHAT, b'"max_tokens":1,"max\\u005Ftokens":2', "max_tokens"),
        (CHAT, b'"Model":"a"', "model"),
        (CHAT, b'"model":"a","MODEL":"b"', "model"),
        (CHAT, b'"model":"a","\\u004dodel":"b"', "model"),
        (CHAT, b'"stream":true,"stream":false', "stream"),
        (CHAT, b'"Stream":true', "stream"),
        (CHAT, b'"n":null,"n":1', "n"),
        (CHAT, b'"stream_Options":null', "stream_options"),
        (CHAT, MESSAGES, "messages"),
        (CHAT, b'"messages":[{"role":"user","content":"' + b"x" * 5_000 + b'"}]', "messages"),
        (CHAT, b'"Messages":[]', "messages"),
        (CHAT, b'"max_completion_tokens":1,"max_completion_tokens":1', "max_completion_tokens"),
        (COMPLETIONS, b'"prompt":"hi"', "prompt"),
        (COMPLETIONS, b'"Prompt":"hi"', "prompt"),
        ("/v1/embeddings", b'"input":"hi"', "input"),
        ("/v1/embeddings", b'"INPUT":"hi"', "input"),
        ("/v1/responses", b'"input":"hi"', "input"),
        ("/v1/responses", b'"max_output_tokens":1,"Max_Output_Tokens":1', "max_output_tokens"),
        ("/v1/messages", b'"Messages":[]', "messages"),
        ("/v1/messages", b'"max_tokens":1,"max_tokens":2', "max_tokens"),
    ],
)
def test_a_field_that_is_read_may_not_be_there_twice_or_in_another_case(path: str, more: bytes, param: str) -> None:
    fields = {CHAT: MESSAGES, "/v1/messages": MESSAGES, COMPLETIONS: b'"prompt":"hi"'}.get(path, b'"input":"hi"')
    large = b'"x":{"model":"' + b"y" * 10_000 + b'"}'
    for members in ([fields, more], [more, fields], [fields, large, more], [more, b'"x":"\\ud83d"', fields]):
        for separator in (b",", b" ,\n "):
            with pytest.raises(InvalidRequest) as wrong:
                parse(path, b"{" + separator.join(members) + b"}")
            assert wrong.value.param == param
            assert "`" + param + "`" in wrong.value.message


def test_names_that_are_read_consist_of_small_letters_and_underscores() -> None:
    """The search for escaped ones relies on it."""
    for kind in (ChatRequest, CompletionsRequest, EmbeddingsRequest, ResponsesRequest):
        for name in kind.__struct_fields__:
            assert re.fullmatch(r"[a-z_]+", name)
            assert all(_ESCAPED.search(b"\\u%04x" % ord(letter)) for letter in name)
            assert all(_ESCAPED.search(b"\\u%04X" % ord(letter)) for letter in name)


@pytest.mark.parametrize(
    "more",
    [
        b'"x":{"model":1,"model":2,"Model":3}',
        b'"x":1,"x":2,"X":3',
        b'"x":"model","y":["model","model"]',
        b'"x":"\\"model\\":1,\\"model\\":2"',
        b'"prompt":1,"prompt":2,"input":1,"Input":2',
        b'"messages ":1,"models":2,"":3,"n\\n":4',
        b'"tools":[{"model":"' + b"y" * 10_000 + b'"},{"model":"stream","stream":true}]',
        b'"x":"\\u00e9 \\ud83d model"',
        b'"x":"' + b'\\\\"' + b',"y":"\\""',
    ],
)
def test_what_is_not_read_may_be_there_as_it_likes(more: bytes) -> None:
    for text in (b"hi", b"x" * 5_000, b'\\"model\\"' * 1_000):
        fields = b'"model":"m","messages":[{"role":"user","content":"%s","model":"inner","Model":1}]' % text
        for members in ([fields, more], [more, fields]):
            body = b"{" + b", ".join(members) + b"}"
            assert parse(CHAT, body).model == "m"


def test_an_error_quotes_nothing_of_the_prompt() -> None:
    for secret in (b'"s3cret"', b'{"s3cret":1}', b'["s3cret"]'):
        with pytest.raises(InvalidRequest) as wrong:
            chat(b',"temperature":' + secret)
        assert "s3cret" not in wrong.value.message


KEYS = st.sampled_from(["model", "Model", "models", "mod\\el", 'mo"del', "x", "", "é", "messages "])
NUMBERS = st.sampled_from(
    [b"0", b"-0", b"1.0E+5", b"1e-07", b"123456789012345678901234567890", b"0.10", b"1E400", b"-1.50"]
)
SPACE = st.sampled_from([b"", b" ", b"\n", b"\t ", b"\r\n  "])


@st.composite
def strings(draw: st.DrawFn, text: st.SearchStrategy[str]) -> bytes:
    """A JSON string, some of its characters escaped that need not be."""
    out = bytearray(b'"')
    for character in draw(text):
        plain = json.dumps(character, ensure_ascii=draw(st.booleans()))[1:-1]
        units = character.encode("utf-16-be")
        escaped = "".join(f"\\u{units[at]:02X}{units[at + 1]:02x}" for at in range(0, len(units), 2))
        out += (escaped if draw(st.integers(0, 3)) == 0 else plain).encode()
    return bytes(out + b'"')


TEXT = st.one_of(
    KEYS, st.text(st.characters(exclude_categories=["Cs"]), max_size=6), st.sampled_from(['"model":"x"', "{[", "]}"])
)
SCALARS = st.one_of(NUMBERS, strings(TEXT), st.sampled_from([b"true", b"false", b"null"]))


@st.composite
def members(draw: st.DrawFn, value: st.SearchStrategy[bytes], key: st.SearchStrategy[str]) -> bytes:
    pad = [draw(SPACE) for _ in range(4)]
    return pad[0] + draw(strings(key)) + pad[1] + b":" + pad[2] + draw(value) + pad[3]


def containers(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    array = st.builds(
        lambda items, pad: b"[" + (pad + b",").join(items) + pad + b"]", st.lists(inner, max_size=3), SPACE
    )
    pairs = st.lists(members(inner, KEYS), max_size=3)
    return array | st.builds(lambda items, pad: b"{" + pad + b",".join(items) + b"}", pairs, SPACE)


VALUES = st.recursive(SCALARS, containers, max_leaves=6)


@st.composite
def objects(draw: st.DrawFn) -> bytes:
    """A JSON object, its top-level `model` members texts or null."""
    others = members(VALUES, KEYS.filter(lambda key: key != "model"))
    models = members(st.one_of(strings(TEXT), st.just(b"null")), st.just("model"))
    items = draw(st.lists(st.one_of(others, others, models), max_size=5))
    return draw(SPACE) + b"{" + draw(SPACE) + b",".join(items) + b"}" + draw(SPACE)


def pairs_of(body: bytes) -> list[tuple[str, bytes]]:
    """The members of an object in order, values as their bytes, by a decoder that is not ours."""
    keys: list[str] = [key for key, _ in json.loads(body, object_pairs_hook=Pairs)]
    text = body.decode()
    at, out = text.index("{") + 1, []
    decoder = json.JSONDecoder(parse_float=str, parse_int=str)
    for key in keys:
        at = _skip(text, at)
        found, at = decoder.raw_decode(text, at)
        assert found == key
        at = _skip(text, _skip(text, at) + 1)
        _, end = decoder.raw_decode(text, at)
        out.append((key, text[at:end].encode()))
        at = _skip(text, end) + 1
    return out


class Pairs(list[tuple[str, Any]]):
    """An object's members, duplicates included."""


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


@given(objects(), st.one_of(TEXT, st.just("new-model")))
@example(b'{"mod\\u0065l":"old","x":1.0E+5}', "new")
@example(b'{"x":{"model":"inner"},"model":"old"}', "new")
@example(b'{"model":"a","x":"\\\\","model":"b"}', "new")
@example(b'{"x":"model","y":["model"],"model" \n:\t"old" }', "new")
@example(b'{"x":"a\\"","model":null}', "new")
@example(b"{ }", "new")
def test_only_the_model_changes_and_every_other_byte_stays(body: bytes, model: str) -> None:
    out = with_model(body, model)

    before, after = pairs_of(body), pairs_of(out)
    new = msgspec.json.encode(model)
    if all(key != "model" for key, _ in before):
        start = body.index(b"{") + 1
        added = b'"model":' + new + (b"," if before else b"")
        assert out == body[:start] + added + body[start:]
        assert after == [("model", new), *before]
        return
    assert after == [(key, new if key == "model" else value) for key, value in before]
    assert len(out) - len(body) == sum(len(new) - len(value) for key, value in before if key == "model")
    assert json.loads(out)["model"] == model


@given(objects(), st.booleans())
def test_names_are_compared_as_a_full_reading_would(body: bytes, padded: bool) -> None:  # noqa: FBT001
    if padded:
        comma = b"," if json.loads(body) else b""
        body = body.rstrip()[:-1] + comma + b'"pad":"' + b'{\\"model\\":' * 100 + b'"}'
    read = ("model", "input", "stream", "temperature", "top_p", "max_output_tokens")
    names = [key for key, _ in json.loads(body, object_pairs_hook=Pairs)]
    twice = any(names.count(name) > 1 or any(key != name and key.lower() == name for key in names) for name in read)
    refused = False
    try:
        parse("/v1/responses", body)
    except InvalidRequest as error:
        assume("characters" not in error.message)  # a model of no letters
        refused = True
    assert refused == twice


@given(objects(), TEXT.filter(bool))
def test_what_comes_out_is_read_with_the_new_model(body: bytes, model: str) -> None:
    try:
        parse("/v1/responses", body)
    except InvalidRequest:  # a model of no letters, or several
        assume(False)

    assert parse("/v1/responses", with_model(body, model)).model == model


@given(st.binary(max_size=60))
def test_no_bytes_make_the_parser_fail(body: bytes) -> None:
    for path in PATHS:
        try:
            prompt = parse(path, body)
        except (InvalidJson, InvalidRequest):
            continue
        assert prompt.body == body


@pytest.mark.parametrize("path", PATHS)
def test_half_a_surrogate_pair_in_an_escape_is_json(path: str) -> None:
    body = b'{"messages": [{"role": "user", "content": "\\ud83d"}], "prompt": "\\uDE00", "input": "", "\\udead": 1}'

    assert parse(path, body).body == body
    assert parse(path, with_model(body, "m")).model == "m"
    with pytest.raises(InvalidRequest):
        parse(path, body[:-1] + b', "model": 1}')
    with pytest.raises(InvalidJson):
        parse(path, body[:-1])


@pytest.mark.parametrize(("written", "told"), [("10", 10), ("10.0", 10), ("10.5", None), ("1e2", 100)])
def test_a_number_of_tokens_may_be_written_as_a_float(written: str, told: int | None) -> None:
    prompt = parse("/v1/completions", b'{"prompt": "p", "max_tokens": %s}' % written.encode())
    record = Record("POST", "/v1/completions", trace_id=1, span_id=1, request_id="r", started=0.0, started_ns=0)
    prompt.describe_in(record, model="m", route="*")

    assert record.max_tokens == told


def test_looking_for_the_model_keeps_nothing_of_a_long_text() -> None:
    """The backtracking of a careless expression takes 50 bytes for each escape: 250 MB here."""
    noise = b'"' + b"\\n" * 5_000_000 + b'"'
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = with_model(b'{"x":' + noise + b"}", "new")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    assert out == b'{"model":"new","x":' + noise + b"}"
    assert grown < 100_000, "KiB"


def test_a_body_of_ten_megabytes_is_changed_in_one_pass() -> None:
    """Strings full of quotes and backslashes, the hardest case; the test's own timeout is the bound."""
    noise = json.dumps('\\"{[' * 2_000_000).encode()
    body = b'{"x":' + noise + b',"model":"old"}'

    assert with_model(body, "new") == b'{"x":' + noise + b',"model":"new"}'
