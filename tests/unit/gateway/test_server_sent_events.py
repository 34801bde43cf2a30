import tracemalloc

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.server_sent_events import (
    MAX_LINES,
    EventSplitter,
    begins_as_stream,
    data_of,
    error_of,
    view_of_data,
)
from gateway.errors import InvalidResponse, PartTooLarge

MAX_EVENT = 1 << 20
LINE_ENDS = (b"\n", b"\r\n", b"\r")
WORDS = st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12).map(str.encode)
FIELD = st.sampled_from([b"data: ", b"data:", b":", b": ", b"event: ", b"id: ", b"retry: ", b"", b"data"])
LINE = st.builds(bytes.__add__, FIELD, WORDS).filter(bool)


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """A stream of events and comments, each line with its own end, some empty lines between, and maybe a cut event."""
    out = bytearray()
    for _ in range(draw(st.integers(0, 6))):
        for line in draw(st.lists(LINE, max_size=4)):
            out += line + draw(st.sampled_from(LINE_ENDS))
        out += draw(st.sampled_from(LINE_ENDS))
    return bytes(out + draw(st.one_of(st.just(b""), LINE)))


def split(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({min(cut, len(data)) for cut in cuts})
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


def feed(pieces: list[bytes], *, proper: bool = False) -> list[bytes]:
    splitter = EventSplitter(MAX_EVENT)
    events = [event for piece in pieces for event in splitter.feed(piece)]
    return [*events, *splitter.end(proper=proper)]


def reference(data: bytes) -> list[bytes]:
    """Byte by byte, in the plainest way: an event ends with the line end that follows a line end."""
    events, begin, at, ends = [], 0, 0, 0
    while at < len(data):
        width = 2 if data[at : at + 2] == b"\r\n" else 1
        if data[at : at + width] in LINE_ENDS:
            ends += 1
            at += width
            if ends == 2:
                events.append(data[begin:at])
                begin, ends = at, 0
        else:
            ends = 0
            at += 1
    return events


def heard(events: list[bytes]) -> list[tuple[bytes | None, bytes | None]]:
    """What a reader hears of events: nothing of comments and empty lines."""
    each = [(data_of(event), error_of(event)) for event in events]
    return [words for words in each if words != (None, None)]


CUTS = st.lists(st.integers(0, 200), max_size=12)


@given(streams(), CUTS)
@example(b"data: a\r\n\r\ndata: b\r\n\r\n", [8, 9, 10, 11])
@example(b"data: a\r\rdata: b\n\r\n", [9, 19])
@example(b"data: a\n\r\ndata: b\n\n", [9])
@example(b"\n\n\r\n\r\r", [1, 2, 3, 4, 5])
def test_any_split_of_the_bytes_gives_the_same_events(data: bytes, cuts: list[int]) -> None:
    events = reference(data)

    for pieces in ([data], split(data, cuts), [data[at : at + 1] for at in range(len(data))]):
        found = feed(pieces)
        assert heard(found) == heard(events)
        assert data.startswith(b"".join(found))


@given(streams(), CUTS)
def test_events_joined_are_the_bytes_that_came(data: bytes, cuts: list[int]) -> None:
    joined = b"".join(feed(split(data, cuts)))

    assert data.startswith(joined)
    assert heard(reference(data[len(joined) :])) == []


@given(st.lists(st.binary(max_size=30), max_size=10))
def test_no_bytes_make_it_fail(pieces: list[bytes]) -> None:
    assert heard(feed(pieces)) == heard(reference(b"".join(pieces)))


@pytest.mark.parametrize("nothing", [b"\n", b"\r", b"\r\n", b":\n", b": ping\n\n", b":\r\r", b": \xff\r\n\r\n"])
def test_a_hundred_thousand_empty_lines_and_comments_are_one_event_or_a_few(nothing: bytes) -> None:
    run = nothing * 100_000
    pieces = [b"data: a\n\n", *(run[at : at + 16_384] for at in range(0, len(run), 16_384)), b"data: b\n\n"]

    events = feed(pieces)

    assert heard(events) == [(b"a", None), (b"b", None)]
    assert b"".join(events) == b"".join(pieces)
    assert len(events) <= 2 * len(pieces)


def test_a_large_event_of_many_lines_is_joined_once() -> None:
    splitter = EventSplitter(1 << 26)
    line = b"data: " + b"x" * 100 + b"\n"
    copied = 0
    for _ in range(900):
        assert splitter.feed(line * 10) == []
        copied += len(splitter._pieces) == 1
    assert copied == 1
    assert splitter.feed(b"\n") == [line * 9_000 + b"\n"]


@pytest.mark.parametrize("line", [b"data\n", b"x\r", b":\n", b"x\r\n"])
def test_lines_are_counted_whatever_they_are(line: bytes) -> None:
    splitter = EventSplitter(1 << 26)
    assert splitter.feed(b"data: a\n" + line * (MAX_LINES + 1)) == []

    with pytest.raises(PartTooLarge, match="lines"):
        splitter.feed(b"\ndata: b\n\n")


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_a_large_event_is_held_once_while_it_is_joined(line_end: bytes) -> None:
    size, piece = 1 << 23, 1 << 16
    splitter = EventSplitter(2 * size)
    tracemalloc.start()
    try:
        assert splitter.feed(b"data: ") == []
        for _ in range(size // piece):
            assert splitter.feed(b"%b" % (b"x" * piece)) == []
        tracemalloc.reset_peak()
        [event] = splitter.feed(2 * line_end) or splitter.end(proper=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert len(event) == len(b"data: ") + size + 2 * len(line_end)
    assert peak <= 1.3 * size


def test_the_data_of_a_large_event_is_seen_without_a_copy() -> None:
    event = b"data: %b\n\n" % (b"x" * (1 << 23))
    tracemalloc.start()
    try:
        data = view_of_data(event)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert data == event[6:-2]
    assert peak < 10_000


def test_half_an_event_never_goes_on() -> None:
    splitter = EventSplitter(MAX_EVENT)

    assert splitter.feed(b"data: hel") == []
    assert splitter.feed(b"lo\n") == []
    assert splitter.feed(b"\ndata") == [b"data: hello\n\n"]
    assert splitter.end(proper=False) == []


@pytest.mark.parametrize(
    ("rest", "last"),
    [
        (b"data: a", b"data: a\n\n"),
        (b"data: a\n", b"data: a\n\n"),
        (b"data: a\r\n", b"data: a\r\n\n"),
        (b"data: a\r", b"data: a\r\n"),
        (b"data: a\r\r", b"data: a\r\r"),
    ],
)
def test_the_last_event_may_lack_its_blank_line(rest: bytes, last: bytes) -> None:
    assert feed([b"data: b\n\n", rest], proper=True) == [b"data: b\n\n", last]


def test_a_byte_order_mark_before_the_first_event_is_no_part_of_a_line() -> None:
    event = b"\xef\xbb\xbfdata: a\n\n"

    assert feed([event[:2], event[2:]]) == [event]
    assert data_of(event) == b"a"
    assert begins_as_stream(event)


@pytest.mark.parametrize(
    ("event", "error"),
    [
        (b'error: {"code": 400}\n\n', b'{"code": 400}'),
        (b"event: x\r\nerror:no\r\n\r\n", b"no"),
        (b": error: x\n\n", None),
        (b"data: error: x\n\n", None),
    ],
)
def test_an_error_field(event: bytes, error: bytes | None) -> None:
    assert error_of(event) == error


def test_an_event_that_ends_with_a_bare_cr_waits_for_the_lf_that_may_follow() -> None:
    for after, first in ((b"\ndata: b", b"data: a\r\n\r\n"), (b"data: b", b"data: a\r\n\r")):
        splitter = EventSplitter(MAX_EVENT)
        assert splitter.feed(b"data: a\r\n\r") == []
        assert splitter.feed(after) == [first]
    splitter = EventSplitter(MAX_EVENT)
    assert splitter.feed(b"data: a\r\r") == []
    assert splitter.end(proper=False) == [b"data: a\r\r"]
    assert splitter.end(proper=False) == []


@pytest.mark.parametrize("line_end", LINE_ENDS)
def test_an_event_of_the_largest_size_passes_and_a_larger_one_fails(line_end: bytes) -> None:
    ends = 2 * line_end
    fits = b"data: " + b"x" * (MAX_EVENT - 6 - len(ends)) + ends
    assert feed([fits, fits]) == [fits, fits]
    for step in (1 << 16, len(fits) + 1):
        pieces = [b"data: x" + fits[6:]]
        pieces = [pieces[0][at : at + step] for at in range(0, len(pieces[0]), step)]
        with pytest.raises(InvalidResponse):
            feed(pieces)


def test_an_event_without_an_end_fails_at_the_limit_and_is_not_collected() -> None:
    splitter = EventSplitter(MAX_EVENT)
    for _ in range(MAX_EVENT // 1024):
        assert splitter.feed(b"x" * 1024) == []
    with pytest.raises(InvalidResponse):
        splitter.feed(b"x")


@pytest.mark.parametrize(
    ("event", "data"),
    [
        (b"data: x\n\n", b"x"),
        (b"data:x\n\n", b"x"),
        (b"data:  x\n\n", b" x"),
        (b"data: x\r\n\r\n", b"x"),
        (b"data: x\r\r", b"x"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\r\ndata:\rdata\ndata: b\n\n", b"a\n\n\nb"),
        (b"data\n\n", b""),
        (b"data:\n\n", b""),
        (b"event: error\ndata: x\nid: 7\n\n", b"x"),
        (b": ping\ndata: x\n\n", b"x"),
        (b"\ndata: x\n\n", b"x"),
        (b": ping\n\n", None),
        (b"event: ping\n\n", None),
        (b"\n\n", None),
        (b"dataset: x\n\n", None),
        (b" data: x\n\n", None),
        (b"data: a\rid: 1\n\n", b"a"),
    ],
)
def test_the_data_of_an_event(event: bytes, data: bytes | None) -> None:
    assert data_of(event) == view_of_data(event) == data


@given(st.lists(WORDS, min_size=1, max_size=4), st.data())
def test_data_comes_out_as_it_went_in(words: list[bytes], data: st.DataObject) -> None:
    ends = st.sampled_from(LINE_ENDS)
    lines = [b"data: " + word + data.draw(ends) for word in words]
    noise = data.draw(st.sampled_from([b"", b": ping\n", b"event: x\r\n", b"id: 1\n"]))

    assert data_of(b"".join([noise, *lines, b"\n"])) == b"\n".join(words)
