import pytest

from mock_model.errors import InvalidRequest
from mock_model.form import MAX_PARTS, read_form

TYPE = "multipart/form-data; boundary=xyz"


def form(*parts: tuple[bytes, bytes], end: bytes = b"--xyz--\r\n") -> bytes:
    """A form of parts, each its disposition and its content."""
    return (
        b"".join(
            b"--xyz\r\nContent-Disposition: form-data; " + head + b"\r\n\r\n" + content + b"\r\n"
            for head, content in parts
        )
        + end
    )


def test_fields_are_texts_and_files_are_bytes() -> None:
    body = form(
        (b'name="model"', "größe".encode()), (b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav', b"\xff\x00")
    )

    assert read_form(body, TYPE) == {"model": "größe", "file": b"\xff\x00"}


def test_a_file_may_hold_line_ends_blank_lines_and_marks() -> None:
    content = b"\r\n--xy\r\n\r\n--\r\n\r\n"

    assert read_form(form((b'name="file"; filename="f"', content)), TYPE) == {"file": content}


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b'filename="name=x"; name="a"', "a"),
        (b"name=a", "a"),
        (b'NAME="a"', "a"),
        (b'name="a[]"; filename="f"', "a"),
        (b'name=""', ""),
    ],
)
def test_names_as_clients_write_them(head: bytes, name: str) -> None:
    assert list(read_form(form((head, b"1")), TYPE)) == [name]


def test_a_quoted_boundary_a_preamble_and_text_after_the_end() -> None:
    body = b"for old readers\r\n" + form((b'name="a"', b"1")) + b"afterwards"

    assert read_form(body, 'multipart/form-data; charset=utf-8; boundary="xyz"') == {"a": "1"}


@pytest.mark.parametrize(
    ("body", "content_type", "message"),
    [
        (form((b'name="a"', b"1")), "", "must be a form"),
        (form((b'name="a"', b"1")), "application/json", "must be a form"),
        (form((b'name="a"', b"1")), "multipart/form-data", "must be a form"),
        (form((b'name="a"', b"1")), "multipart/form-data; boundary=other", "end is missing"),
        (form((b'name="a"', b"1"), end=b""), TYPE, "end is missing"),
        (form((b'name="a"', b"1"), end=b"--xyz"), TYPE, "end is missing"),
        (b"", TYPE, "end is missing"),
        (form((b"x=1", b"1")), TYPE, "no name"),
        (form((b'name="a"', b"\xff")), TYPE, "not UTF-8"),
        (form(*[(b'name="a"', b"1")] * (MAX_PARTS + 1)), TYPE, "more than"),
    ],
)
def test_what_is_no_form_is_refused(body: bytes, content_type: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        read_form(body, content_type)


def test_a_form_may_have_as_many_parts_as_the_limit_says() -> None:
    assert read_form(form(*[(b'name="a"', b"1")] * MAX_PARTS), TYPE) == {"a": "1"}
