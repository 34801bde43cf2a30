import re
from email import message_from_bytes
from email.message import Message

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gateway.dialects.form_data import (
    MAX_HEAD,
    MAX_HEADS,
    MAX_PARTS,
    boundary_of,
    model_in,
    with_model,
    without_boundaries,
)
from gateway.errors import InvalidRequest
from gateway.pieces import BLOCK

B = b"----WebKitFormBoundary7MA4YWxkTrZu0gW"
FILE = b'Content-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav'
SIGNS = "0123456789abcXYZ'()+_,-./:=?"
BOUNDARIES = st.builds(str.__add__, st.text(SIGNS + " ", max_size=69), st.text(SIGNS, min_size=1, max_size=1))
BLANKS = [sign.encode() for sign in "\xa0\x85\u1680\u2003\u2028\u3000\ufeff"] + [b"\xa0", b"\x85"]
MODELS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=40)


def field(value: bytes, name: bytes = b'"model"', *more: bytes) -> bytes:
    return b"\r\n".join([b"Content-Disposition: form-data; name=" + name, *more]) + b"\r\n\r\n" + value


def form(*parts: bytes, boundary: bytes = B, end: bytes = b"\r\n") -> bytes:
    return b"".join(b"--%b\r\n%b\r\n" % (boundary, part) for part in parts) + b"--" + boundary + b"--" + end


def file(content: bytes) -> bytes:
    return FILE + b"\r\n\r\n" + content


def refused(body: bytes, boundary: bytes = B) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        model_in(body, boundary)
    return caught.value


def as_email_reads(body: bytes, boundary: bytes) -> list[bytes]:
    """The values of `model`, as Python's parser of mail reads them."""
    head = b'Content-Type: multipart/form-data; boundary="' + boundary + b'"\r\n\r\n'
    message = message_from_bytes(head + body)
    return [
        bytes(part.get_payload(decode=True))
        for part in message.walk()
        if isinstance(part, Message) and part.get_param("name", header="content-disposition") == "model"
    ]


@given(
    BOUNDARIES,
    MODELS,
    st.lists(st.one_of(st.binary(max_size=60), st.text("\r\n-ab ", max_size=60).map(str.encode)), max_size=3),
    st.integers(0, 3),
    st.sampled_from([b"", b"\r\n"]),
    MODELS,
)
@example("x", "m", [b"-x", b"\r\n--", b"\r\n-x--"], 1, b"", "n")
@example("x" * 70, "m", [b"\r\n--" + b"x" * 69, b"-" + b"x" * 70], 0, b"\r\n", "n")
def test_any_files_and_any_boundary(  # noqa: PLR0917
    boundary: str, model: str, files: list[bytes], at: int, end: bytes, other: str
) -> None:
    mark = boundary.encode()
    assume(all(b"--" + mark not in content for content in files))
    assume(mark not in model.encode() + other.encode())
    parts = [file(content) for content in files]
    at = min(at, len(parts))
    body = form(*parts[:at], field(model.encode()), *parts[at:], boundary=mark, end=end)
    without = form(*parts, boundary=mark, end=end)

    assert boundary_of(f'multipart/form-data; boundary="{boundary}"') == mark
    assert model_in(body, mark) == model
    assert as_email_reads(body, mark) in ([model.encode()], [])  # it reads bare CR and other marks in its own way
    assert with_model(body, mark, other) == form(
        *parts[:at], field(other.encode()), *parts[at:], boundary=mark, end=end
    )
    assert model_in(without, mark) is None
    added = with_model(without, mark, other)
    assert model_in(added, mark) == other
    assert added.endswith(without)
    assert with_model(added, mark, model) == with_model(without, mark, model)
    assert b"".join(without_boundaries(body, mark)) == b"".join(
        b"\r\n" + part for part in [*parts[:at], field(model.encode()), *parts[at:]]
    )


@given(
    st.lists(
        st.one_of(
            st.sampled_from(
                [
                    *(
                        b"--" + B,
                        b"--" + B + b"--",
                        b"\r\n",
                        b"\n",
                        b"\r",
                        b"--",
                        b" ",
                        b";",
                        b":",
                        b"model",
                        b'"',
                        b"\\",
                    ),
                    *(b'Content-Disposition: form-data; name="model"', b"content-disposition: form-data; name=model"),
                    *(b'Content-Disposition: form-data; filename="x"; name="file"', b"Content-Length: 3", b"m", b"x"),
                    *(b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\nm' % B, b"\r\n--%b--\r\n" % B),
                    *(b"Content-Type: text/plain", b"\r\n--%b\r\n" % B, b"\r\n\r\n", b"name", b"=", b"*"),
                ]
            ),
            st.binary(max_size=2),
        ),
        max_size=12,
    )
)
def test_what_is_taken_other_parsers_read_alike(pieces: list[bytes]) -> None:
    body = b"--" + B + b"\r\n" + b"".join(pieces)
    try:
        model = model_in(body, B)
    except InvalidRequest:
        return
    read = as_email_reads(body, B)
    assert read in ([model.encode()] if model is not None else [], [])
    assert len(read) == (model is not None) or b"\r" in re.sub(rb"\r\n", b"", body) or b"\n" in body


@pytest.mark.parametrize(
    "part",
    [
        field(b"m"),
        field(b"m", b"model"),
        field(b"m", b'"model"', b"Content-Type: text/plain; charset=utf-8"),
        field(b"m", b'"model"', b"Content-Type: text/plain; charset=ISO-8859-1", b"Content-Transfer-Encoding: 8bit"),
        field(b"m", b'"model"', b"content-length: 1"),
        b"Content-Type: text/plain\r\nContent-Disposition: form-data; name=model\r\n\r\nm",
        b"content-disposition:FORM-DATA;NAME=model\r\n\r\nm",
        b'Content-Disposition: form-data ; name="model" \r\n\r\nm',
    ],
)
def test_fields_as_clients_write_them(part: bytes) -> None:
    body = form(file(b"\x00"), part)

    assert model_in(body, B) == "m"
    assert model_in(with_model(body, B, "larger"), B) == "larger"


def test_a_content_length_within_a_part_follows_its_value() -> None:
    body = form(field(b"m", b'"model"', b"Content-Length: 1", b"X-A: b"), file(b"content-length: 1"))

    assert with_model(body, B, "ten bytes.") == form(
        field(b"ten bytes.", b'"model"', b"Content-Length: 10", b"X-A: b"), file(b"content-length: 1")
    )
    assert "content-length" in refused(form(field(b"mm", b'"model"', b"Content-Length: 1"))).message
    assert (
        "content-length"
        in refused(form(field(b"m"), file(b"abc").replace(b"audio", b"a\r\nContent-Length: 9\r\nX: a"))).message
    )


@pytest.mark.parametrize(
    "part",
    [
        field(b"m", b'"model"; filename="m.txt"'),
        field(b"m", b'"model"; filename=""'),
        field(b"m", b'"model"; x="y"'),
        field(b"m", b"\"model\"; filename*=utf-8''m"),
        field(b"m", b'"model"', b"Content-Type: application/json"),
        field(b"m", b'"model"', b"Content-Type: text/plain; charset=utf-16"),
        field(b"\xe4", b'"model"', b"Content-Type: text/plain; charset=iso-8859-1"),
        field(b"\xc3\xa4", b'"model"', b"Content-Type: text/plain; charset=us-ascii"),
        field(b"m", b'"model"', b"Content-Type: text/plain; charset*=utf-16"),
        field(b"m", b'"model"', b"Content-Transfer-Encoding: base64"),
        field(b"m", b'"model"', b"Content-Encoding: gzip"),
        field(b""),
        field(b"\xff"),
        field(b"m" * 513),
        field("\U0001f600".encode() * 513),
        *(field(b"m", name) for name in (b'"Model"', b"MODEL", b'"mod\\el"', b'"%6dodel"', b'" model"', b"'model'")),
        *(field(b"m", b'"%b"' % (blank + b"model")) for blank in BLANKS),
        *(field(b"m", b'"%b"' % (b"model" + blank)) for blank in BLANKS),
        *(field(b"m", b'"%b"' % (b"mo" + blank + b"del")) for blank in BLANKS),
        field(b"m", b'"%C2%A0model"'),
        field(b"m", b'"file"; filename="a; name=\xc2\xa0model"'),
        field(b"m", b'"file"', b"X: name=model"),
        field(b"m", b'"file"; filename="a; name=model"'),
        field(b"m", b'"file"; filename="a\\"; name=\\"model\\""'),
    ],
)
def test_a_model_that_some_server_could_read_otherwise_is_refused(part: bytes) -> None:
    assert refused(form(file(b"x"), part)).param == "model"


@pytest.mark.parametrize("blank", BLANKS)
@pytest.mark.parametrize("at", [0, len("model")])
def test_a_name_without_quotes_has_no_blank_of_unicode_that_some_strip(blank: bytes, at: int) -> None:
    name = b"model"[:at] + blank + b"model"[at:]

    assert refused(form(field(b"dear", name), field(b"cheap"))).status == 400
    assert refused(form(field(b"dear", b"file; filename=" + name), field(b"cheap"))).status == 400


def test_a_model_that_is_there_twice_is_refused() -> None:
    error = refused(form(field(b"a"), file(b"x"), field(b"b")))

    assert error.param == "model"
    assert "more than once" in error.message


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--",
        b"preamble\r\n" + form(field(b"m")),
        b"\n" + form(field(b"m")),
        form(field(b"m")).replace(b"\r\n", b"\n"),
        form(field(b"m"), end=b"")[:-2],
        form(field(b"m"))[:-10],
        form(field(b"m"), end=b"\r\nmore"),
        form(field(b"m"), end=b"\r\n" * MAX_HEAD),
        form(field(b"m")).replace(b"--%b\r\n" % B, b"--%b \r\n" % B),
        form(field(b"m")).replace(b"--%b\r\n" % B, b"--%b\n" % B),
        form(b"", field(b"m")),
        form(b"no header\r\n\r\n", field(b"m")),
        form(b"\r\nwithout headers", field(b"m")),
        form(b"Content-Type: text/plain\r\n\r\nwithout a name"),
        form(b"Content-Disposition: form-data\r\n\r\nwithout a name"),
        form(b'Content-Disposition: attachment; name="model"\r\n\r\nm'),
        form(b'Content-Disposition : form-data; name="model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data;\r\n name="model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="a"\r\nContent-Disposition: form-data; name="model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="a"; name="model"\r\n\r\nm'),
        form(b"Content-Disposition: form-data; name=\"a\"; name*=utf-8''model\r\n\r\nm"),
        form(b'Content-Disposition: form-data; name="a"; filename="C:\\dir\\"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name= "model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data;; name="model"\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="model";\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="a"; filename="a.wav" ; \r\n\r\nm'),
        form(b"Content-Disposition: form-data; name=model; x=a=b\r\n\r\nm"),
        form(b'Content-Disposition: form-data; name="a" model\r\n\r\nm'),
        form(b'Content-Disposition: form-data; name="a"\nX: y\r\n\r\nm'),
        form(field(b"m", b'"a"', b"X: " + b"y" * MAX_HEAD)),
        form(file(b"a\n--" + B + b"\r\nb")),
        form(file(b"a\r--" + B + b"\r\nb")),
        form(file(b"a\r\n--" + B + b" \r\nb")),
        form(file(b"a\r\n--" + B + b"x\r\nb")),
        form(file(b"--" + B + b"\r\nb")),
        form(field(b"m"), file(b"x--" + B + b"\r\n" + field(b"dear"))),
        form(field(b"m"), field(b"x--" + B, b'"prompt"')),
        form(field(b"m--" + B)),
        form(file(b"-" + b"--" + B)),
        form(b"--" + B + b": x\r\n" + field(b"m")),
        form(*[field(b"m", b'"a"')] * (MAX_PARTS + 1)),
    ],
)
def test_a_form_that_servers_read_in_different_ways_is_refused(body: bytes) -> None:
    assert refused(body).status == 400


def test_forms_at_the_limits_are_taken() -> None:
    assert model_in(form(), B) is None
    assert model_in(with_model(form(), B, "m"), B) == "m"
    assert model_in(b"\r\n" + form(field(b"m")), B) == "m"
    assert with_model(b"\r\n" + form(), B, "m") == b"\r\n" + form(field(b"m"))
    assert model_in(form(*[field(b"x", b'"a"')] * (MAX_PARTS - 1), field(b"m")), B) == "m"
    assert model_in(form(field("\U0001f600".encode() * 512)), B) == "\U0001f600" * 512
    assert model_in(form(*headers_of(MAX_HEADS)), B) is None


def test_the_headers_of_all_parts_together_have_a_limit() -> None:
    assert "128 KiB" in refused(form(*headers_of(MAX_HEADS + 1))).message


def headers_of(size: int) -> list[bytes]:
    """Parts without content, of this size together."""
    part = field(b"", b'"a"', b"X: " + b"y" * 4000)
    count = size // len(part) - 1
    return [part] * count + [part.replace(b"y", b"yz", size - (count + 1) * len(part))]


def test_a_model_that_holds_the_boundary_of_a_caller_is_not_set() -> None:
    for body in (form(field(b"m"), boundary=b"x"), form(boundary=b"x")):
        with pytest.raises(InvalidRequest) as caught:
            with_model(body, b"x", "org--x")
        assert caught.value.param == "content-type"


@pytest.mark.parametrize("shift", range(-len(B) - 6, 7))
def test_a_boundary_across_two_blocks_is_found(shift: int) -> None:
    head = len(form(file(b""))) - len(form())
    body = form(file(b"-" * (BLOCK - head + shift)), field(b"m"))

    assert model_in(body, B) == "m"


@pytest.mark.parametrize(
    ("content_type", "boundary"),
    [
        ("multipart/form-data; boundary=abc", b"abc"),
        ('Multipart/Form-Data; charset=UTF-8; BOUNDARY="a b:c/d=e?"', b"a b:c/d=e?"),
        ("multipart/form-data;boundary====1==;", b"===1=="),
        ("multipart/form-data; boundary=----WebKitFormBoundary7MA4", b"----WebKitFormBoundary7MA4"),
        ("multipart/form-data; boundary=" + "x" * 70, b"x" * 70),
    ],
)
def test_boundaries_that_are_taken(content_type: str, boundary: bytes) -> None:
    assert boundary_of(content_type) == boundary


@pytest.mark.parametrize(
    "content_type",
    [
        "multipart/form-data",
        "multipart/form-data; boundary",
        "multipart/form-data; boundary=",
        'multipart/form-data; boundary=""',
        'multipart/form-data; boundary="a "',
        'multipart/form-data; boundary="a',
        'multipart/form-data; boundary="a\\b"',
        "multipart/form-data; boundary=\udce9",
        "multipart/form-data; boundary=a; boundary=b",
        "multipart/form-data; boundary=a; boundary*=utf-8''b",
        "multipart/form-data; boundary=a; boundary*0=b",
        'multipart/form-data; x="a\\"; boundary=b; y=\\""; boundary=a',
        'multipart/form-data; boundary=a; x="; boundary =b"',
        "multipart/form-data; boundary=a; charset=utf-16",
        "multipart/form-data, multipart/form-data; boundary=a b",
        "multipart/form-data; boundary=" + "x" * 71,
    ],
)
def test_boundaries_that_are_refused(content_type: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        boundary_of(content_type)
    assert caught.value.param == "content-type"


def test_forms_that_differ_only_by_their_boundary_have_the_same_content() -> None:
    one = b"".join(without_boundaries(form(field(b"m"), file(b"x")), B))

    assert one == b"".join(without_boundaries(form(field(b"m"), file(b"x"), boundary=b"other"), b"other"))
    assert one != b"".join(without_boundaries(form(field(b"m"), file(b"y")), B))


def test_a_header_full_of_blanks_is_read_once() -> None:
    """Where it is read again from each of its blanks, this takes minutes."""
    blanks = form(b"A:" + b" " * (MAX_HEAD - 200) + b"\x01\r\n" + FILE + b"\r\n\r\na")
    for _ in range(500):
        refused(blanks)
