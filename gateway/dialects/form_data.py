"""Forms (`multipart/form-data`, RFC 7578): finding and setting the field `model`, every other byte left as it is.

The servers behind the gateway read forms with parsers that differ at the edges: which line ends, spaces, escapes and
repetitions they take, and what they make of text before the first boundary. What one of them could read otherwise than
this one is refused, so that the `model` that decides the route is the one that the backend sees.
"""

import re
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

from gateway.dialects.model_field import MAX_MODEL
from gateway.errors import InvalidRequest
from gateway.pieces import BLOCK, joined

MAX_PARTS = 1000
"""Parts of one form; real servers take no more."""
MAX_HEAD = 8192
"""Bytes of the headers of one part."""
MAX_HEADS = 131_072
"""Bytes of the headers of all parts together, so that reading them takes a few milliseconds at most."""
LINE_END = b"\r\n"
MODEL = "model"
ASCII_CHARSETS = frozenset({b"", b"us-ascii", b"ascii", b"iso-8859-1", b"utf-8", b"utf8"})
"""Those in which ASCII stands for itself; "" for none."""
UTF_8 = frozenset({b"", b"utf-8", b"utf8"})
PLAIN_ENCODINGS = frozenset({b"7bit", b"8bit", b"binary"})
"""Values of `content-transfer-encoding` that change nothing."""

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
_QUOTED = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_PARAMETER = re.compile(rb"[ \t]*;[ \t]*(%b)=(%b|%b)" % (_TOKEN, _QUOTED, _TOKEN), re.DOTALL)
_LOOSE_PARAMETER = re.compile(rb'[ \t]*;[ \t]*(%b)=(%b|[^\s";\\]+)' % (_TOKEN, _QUOTED), re.DOTALL)
"""Clients do not quote boundaries whose signs would ask for it."""
_LINE = re.compile(rb"(%b):([^\x00-\x08\x0a-\x1f\x7f]*)" % _TOKEN)
_BOUNDARY = re.compile(rb"[0-9A-Za-z'()+_,\-./:=? ]{0,69}[0-9A-Za-z'()+_,\-./:=?]")
"""RFC 2046, 5.1.1."""
_NAMED_BOUNDARY = re.compile(rb"(?i)boundary[\s*0-9]*=")
"""In a `content-type`: a second one within another parameter's quotes could be taken by a careless parser."""
_HIDDEN = re.compile(
    rb"""name(?<![0-9a-z_*-]name)[ \t\x80-\xff]*=[ \t\x80-\xff\\"']*%b(?![0-9a-z_.\[-])""" % MODEL.encode()
)
"""In lower case: a name elsewhere in the headers of a part, for which a careless parser could take it."""
_BESIDE = bytes(sign for sign in range(256) if sign not in range(0x21, 0x7F)) + b"\\\"'"
"""What one parser or another strips from a name: all that is not visible, Unicode's blanks among it, and quotes."""


class Part:
    """One part of a form.

    Attributes:
        name: of its field.
        begin: where its headers begin.
        start, end: where its content begins and ends.
        headers: their names in lower case; parameters: of its `content-disposition`, the names in lower case.
    """

    __slots__ = ("begin", "end", "headers", "name", "parameters", "start")

    def __init__(self, body: bytes, begin: int, start: int, end: int) -> None:
        self.begin = begin
        self.start = start
        self.end = end
        head = body[begin : max(begin, start - 2 * len(LINE_END))]
        self.headers = _headers(head)
        self.parameters = _disposition(self.headers.get(b"content-disposition", b""))
        self.name = self.parameters[b"name"]
        if self.name != MODEL.encode() and _is_hidden_in(head.lower()):
            raise InvalidRequest(f"A part of the form may be taken for `{MODEL}`. Rename its file.", param=MODEL)
        length = self.headers.get(b"content-length")
        if length is not None and length != b"%d" % (end - start):
            raise _malformed("the content-length of a part is not that of its content")


def boundary_of(content_type: str) -> bytes:
    """Return the boundary that a `content-type` of a form names.

    Raises:
        InvalidRequest: it names none, several, or one that RFC 2046 does not allow; or a charset other than UTF-8.
    """
    text = content_type.encode("utf-8", "surrogateescape")
    _, semicolon, rest = text.partition(b";")
    try:
        parameters = _parameters((semicolon + rest).rstrip(b" \t").removesuffix(b";"), _LOOSE_PARAMETER)
    except InvalidRequest:
        parameters = {}
    boundary = parameters.get(b"boundary", b"")
    if _BOUNDARY.fullmatch(boundary) is None or len(_NAMED_BOUNDARY.findall(text)) > 1:
        raise InvalidRequest(
            "The content-type of a form must name its boundary: 1 to 70 letters, digits and some signs (RFC 2046).",
            param="content-type",
        )
    if parameters.get(b"charset", b"utf-8").lower() not in {b"utf-8", b"utf8"}:
        raise InvalidRequest("The charset of a form must be utf-8, or left out.", param="content-type")
    return boundary


def model_in(body: bytes, boundary: bytes) -> str | None:
    """Return the value of the field `model`, None in a form without one.

    Raises:
        InvalidRequest: the form is malformed, or the field is there twice, no plain text, or otherwise ambiguous.
    """
    if not body:
        raise InvalidRequest("The body is empty. Send a form.")
    model: str | None = None
    for part in _parts(body, boundary):
        if not _is_model(part):
            continue
        if model is not None:
            raise InvalidRequest(f"`{MODEL}` is there more than once. Send it once.", param=MODEL)
        model = _text_of(part, body)
    return model


def with_model(body: bytes, boundary: bytes, model: str) -> bytes:
    """Return the same form with its field `model` replaced or, if it has none, added in front.

    Every other byte stays, except the `content-length` that a few clients write into a part.

    Args:
        body: as `model_in` has checked it.
        boundary: of the form.
        model: the new value.

    Raises:
        InvalidRequest: the caller has chosen a boundary that the new value holds.
    """
    value = model.encode()
    if b"--" + boundary in value:
        raise InvalidRequest(
            "The boundary of the form is part of a model's name. Choose a longer one.", param="content-type"
        )
    view = memoryview(body)
    for part in _parts(body, boundary):
        if _is_model(part):
            head: bytes | memoryview = view[part.begin : part.start]
            if b"content-length" in part.headers:
                head = re.sub(rb"(?i)(\ncontent-length:[ \t]*)\d+", rb"\g<1>%d" % len(value), b"\n" + head)[1:]
            return joined([view[: part.begin], head, value, view[part.end :]])
    at = _first(body, boundary)
    field = b'--%b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n' % (boundary, value)
    return joined([view[:at], field, view[at:]])


def without_boundaries(body: bytes, boundary: bytes) -> Iterator[memoryview]:
    """Yield what a form holds but for its boundary, which clients draw anew for each request. Nothing is copied."""
    view = memoryview(body)
    for part in _parts(body, boundary):
        yield view[part.begin - len(LINE_END) : part.end]


def _parts(body: bytes, boundary: bytes) -> Iterator[Part]:
    """Yield the parts of a form, of which nothing but their headers is copied.

    Raises:
        InvalidRequest: it is malformed.
    """
    delimiter = b"--" + boundary
    at = _first(body, boundary)
    heads = 0
    for _ in range(MAX_PARTS + 1):
        at += len(delimiter)
        if body.startswith(b"--", at):
            if body[at + 2 : at + 2 + MAX_HEAD].strip(LINE_END) or len(body) > at + MAX_HEAD:
                raise _malformed("something follows its last boundary")
            return
        begin = at + len(LINE_END)
        if body[at:begin] != LINE_END:
            raise _ambiguous()
        if body.startswith(LINE_END, begin):
            start = begin + len(LINE_END)
        else:
            start = body.find(2 * LINE_END, begin, begin + MAX_HEAD) + 2 * len(LINE_END)
            if start < begin:
                raise _malformed("the headers of a part have no end, or are larger than 8 KiB")
        heads += start - begin
        if heads > MAX_HEADS:
            raise _malformed("the headers of its parts are together larger than 128 KiB")
        at = _find(body, delimiter, begin)  # from there on, to see one that is out of place
        if at < 0:
            raise _malformed("its last boundary is missing")
        end = at - len(LINE_END)
        if end < start or body[end:at] != LINE_END:
            raise _ambiguous()
        yield Part(body, begin, start, end)
    raise _malformed(f"it has more than {MAX_PARTS} parts")


def _first(body: bytes, boundary: bytes) -> int:
    """Return where the first boundary begins; an empty line may stand before it. Raises: InvalidRequest."""
    at = len(LINE_END) if body.startswith(LINE_END) else 0
    if not body.startswith(b"--" + boundary, at):
        raise _malformed("it does not begin with the boundary that content-type names")
    return at


def _find(body: bytes, what: bytes, at: int) -> int:
    """Return where something is found, block by block, so that other threads get their turn; -1: nowhere."""
    for start in range(at, len(body), BLOCK):
        found = body.find(what, start, start + BLOCK + len(what) - 1)
        if found >= 0:
            return found
    return -1


def _headers(head: bytes) -> dict[bytes, bytes]:
    """Return the headers of a part, each once. Raises: InvalidRequest."""
    headers: dict[bytes, bytes] = {}
    for line in head.split(LINE_END):
        header = _LINE.fullmatch(line)
        if header is None or (name := header[1].lower()) in headers:
            raise _malformed("a part has a wrong header, one that is there twice, or none")
        headers[name] = header[2].strip(b" \t")
    return headers


def _is_hidden_in(head: bytes) -> bool:
    return MODEL.encode() in head and _HIDDEN.search(head) is not None


def _disposition(value: bytes) -> dict[bytes, bytes]:
    """Return the parameters of a `content-disposition`. Raises: InvalidRequest."""
    kind, semicolon, rest = value.partition(b";")
    parameters = _parameters(semicolon + rest)
    if kind.strip(b" \t").lower() != b"form-data" or b"name" not in parameters:
        raise _malformed("a part has no `Content-Disposition: form-data` with a name")
    if any(name.startswith(b"name*") for name in parameters):
        raise _malformed("the name of a field is encoded")
    return parameters


def _parameters(text: bytes, pattern: re.Pattern[bytes] = _PARAMETER) -> dict[bytes, bytes]:
    """Return the parameters that follow a value, without their quotes. Raises: InvalidRequest."""
    parameters: dict[bytes, bytes] = {}
    at = 0
    while found := pattern.match(text, at):
        at = found.end()
        name, value = found[1].lower(), found[2]
        if name in parameters:
            raise _malformed("a parameter of a header is there twice")
        parameters[name] = value[1:-1] if value.startswith(b'"') else value
    if text[at:].strip(b" \t"):
        raise _malformed("a header of a part cannot be read")
    return parameters


def _is_model(part: Part) -> bool:
    """Return whether a part is the field `model`. Raises: InvalidRequest, if only some would take it for that."""
    if part.name == MODEL.encode():
        return True
    plain = unquote_to_bytes(part.name.replace(b"\\", b"")).translate(None, _BESIDE)
    if plain.lower() == MODEL.encode():
        raise InvalidRequest(f"`{MODEL}` must be written in lower case, and nothing else with it.", param=MODEL)
    return False


def _text_of(part: Part, body: bytes) -> str:
    """Return the name of a model in a plain field. Raises: InvalidRequest."""
    kind, semicolon, rest = part.headers.get(b"content-type", b"text/plain").partition(b";")
    parameters = _parameters(semicolon + rest)
    charset = parameters.get(b"charset", b"").lower()
    encoding = part.headers.get(b"content-transfer-encoding", b"binary").lower()
    is_plain = kind.strip().lower() == b"text/plain" and charset in ASCII_CHARSETS and encoding in PLAIN_ENCODINGS
    is_plain = is_plain and not any(name.startswith(b"charset*") for name in parameters)
    if not is_plain or len(part.parameters) > 1 or b"content-encoding" in part.headers:
        raise InvalidRequest(f"`{MODEL}` must be a field of plain text in UTF-8, not a file.", param=MODEL)
    value = body[part.start : min(part.end, part.start + 4 * MAX_MODEL + 1)]
    try:
        text = value.decode("utf-8" if charset in UTF_8 else "ascii")
    except UnicodeDecodeError:
        text = ""
    if not 0 < len(text) <= MAX_MODEL:
        raise InvalidRequest(f"`{MODEL}` must be a text of 1 to {MAX_MODEL} characters.", param=MODEL)
    return text


def _malformed(why: str) -> InvalidRequest:
    return InvalidRequest(f"The form is malformed: {why}.")


def _ambiguous() -> InvalidRequest:
    return InvalidRequest(
        "The form is malformed: its boundary stands where it ends no part. Boundaries stand alone in lines that end "
        "with CR LF, and nowhere in the content."
    )
