"""The `usage` in an answer that is passed through: read at its two ends, whatever lies between them."""

from gateway.dialects.answer_fields import count, is_json
from gateway.dialects.json_text import NO_JSON, decode, leniently
from gateway.record import MAX_COUNT

END = 8_192
"""Bytes kept of the beginning and of the end of an answer."""
TRIES = 8
"""Names that are looked at in one end, at most."""
CLOSINGS = 3
"""Ends of objects that are tried behind a name at the beginning: a usage may hold details."""
USAGE, META = b'"usage"', b'"meta"'
INPUT, OUTPUT = ("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")
"""What servers call the tokens of either side."""
EVENTS = "text/event-stream"


def may_report(content_type: str) -> bool:
    """Return whether an answer of a media type can report a usage: JSON, or a stream of events."""
    return is_json(content_type) or content_type == EVENTS


class ReportedUsage:
    """Finds the tokens that an answer reports, while it goes by in pieces.

    Servers write a usage last (OpenAI for sound and images, vLLM for scores) or near the beginning (vLLM, llama.cpp and
    Jina for ranks); Cohere's is in `meta`, at the end. Of a stream of events the last one that has a usage counts.

    Args:
        content_type: the media type of the answer, in lower case.
    """

    __slots__ = ("_first", "_is_stream", "_last")

    def __init__(self, content_type: str) -> None:
        self._is_stream = content_type == EVENTS
        self._first = b""
        self._last = b""

    def feed(self, data: bytes) -> None:
        """Take in the next piece."""
        if len(self._first) < END:
            self._first += data[: END - len(self._first)]
        self._last = (self._last + data[-END:])[-END:]

    @property
    def tokens(self) -> int | None:
        """The tokens that were reported, of input and output together; None where none are."""
        if not self._is_stream:
            tokens = _in_end(self._last)
            return tokens if tokens is not None else _in_beginning(self._first)
        found = (_in_end(line) for line in reversed(self._last.splitlines()) if USAGE in line)
        return next((tokens for tokens in found if tokens is not None), None)


def _in_end(text: bytes) -> int | None:
    """Return the tokens in the last part of a JSON object.

    What begins with a name is an object behind a `{` only if the name is at its top.
    """
    at = len(text)
    for _ in range(TRIES):
        at = max(text.rfind(USAGE, 0, at), text.rfind(META, 0, at))
        if at < 0:
            return None
        if (tokens := _in_object(b"{" + text[at:])) is not None:
            return tokens
    return None


def _in_beginning(text: bytes) -> int | None:
    """Return the tokens in the first part of a JSON object.

    Closed behind a usage it is whole only if that is at its top.
    """
    at = 0
    for _ in range(TRIES):
        at = text.find(USAGE, at) + len(USAGE)
        if at < len(USAGE):
            return None
        end = at
        for _ in range(CLOSINGS):
            end = text.find(b"}", end) + 1
            if not end:
                break
            if (tokens := _in_object(text[:end] + b"}")) is not None:
                return tokens
    return None


def _in_object(text: bytes) -> int | None:
    """Return the tokens that an answer reports; None where it reports none, or is no object."""
    try:
        answer = leniently(decode, text)
    except NO_JSON:
        return None
    if not isinstance(answer, dict):
        return None
    meta = answer.get("meta")
    usage = answer.get("usage") or (meta.get("tokens") if isinstance(meta, dict) else None)
    if not isinstance(usage, dict):
        return None
    total = count(usage.get("total_tokens"))
    if total is None:
        sides = [_first_count(usage, INPUT), _first_count(usage, OUTPUT)]
        total = sum(side or 0 for side in sides) if sides != [None, None] else None
    return total if total is not None and total < MAX_COUNT else None


def _first_count(usage: dict[str, object], names: tuple[str, ...]) -> int | None:
    return next((number for name in names if (number := count(usage.get(name))) is not None), None)
