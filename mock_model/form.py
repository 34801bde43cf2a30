"""Forms, `multipart/form-data` (RFC 7578): their fields and files."""

import re
from email.message import Message

from mock_model.errors import InvalidRequest

MAX_PARTS = 1000
_NAME = re.compile(r';\s*name=(?:"((?:[^"\\]|\\.)*)"|([^\s;]+))', re.IGNORECASE)
_FILE = re.compile(r";\s*filename\*?=", re.IGNORECASE)
_DISPOSITION = b"content-disposition:"


def read_form(body: bytes, content_type: str) -> dict[str, str | bytes]:
    """Return the fields of a form as texts, its files as bytes; `image[]` is `image`.

    Of a name that comes twice, the last counts.

    Raises:
        InvalidRequest: it is no form, a part has no name, or its end is missing.
    """
    head = Message()
    head["content-type"] = content_type
    boundary = head.get_boundary()
    if head.get_content_type() != "multipart/form-data" or not boundary:
        raise InvalidRequest("the body must be a form: content-type: multipart/form-data; boundary=...")
    mark = b"\r\n--" + boundary.encode(errors="surrogateescape")
    _, *parts = (b"\r\n" + body).split(mark, MAX_PARTS + 2)
    if len(parts) > MAX_PARTS + 1:
        raise InvalidRequest(f"the form has more than {MAX_PARTS} parts")
    if not parts or not parts[-1].startswith(b"--"):
        raise InvalidRequest("the form's end is missing: --boundary--")
    return dict(_read_part(part) for part in parts[:-1])


def _read_part(part: bytes) -> tuple[str, str | bytes]:
    head, _, content = part.partition(b"\r\n\r\n")
    lines = (line for line in head.split(b"\r\n") if line.lower().startswith(_DISPOSITION))
    disposition = next(lines, b"").decode(errors="replace")
    found = _NAME.search(disposition)
    if found is None:
        raise InvalidRequest("a part of the form has no name")
    name = (found[1] or found[2] or "").removesuffix("[]")
    if _FILE.search(disposition):
        return name, content
    try:
        return name, content.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"{name}: the text is not UTF-8", param=name) from None
