"""HTTP messages on a connection: where each begins and ends, and places in their bodies."""

import asyncio

import pytest

from testkit.fault_proxy import _AfterBytes, _AfterEvents
from testkit.http_messages import Head, NotHttp, read_head

STREAM = b": a comment\n\ndata: 1\n\nevent: x\r\ndata: 2\r\n\r\n: ping\n\ndata: 3\ndata: 4\n\n"
ENDS = [0, STREAM.index(b"event"), STREAM.index(b": ping"), len(STREAM)]


def reader_of(*pieces: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    for piece in pieces:
        reader.feed_data(piece)
    reader.feed_eof()
    return reader


async def head_of(reader: asyncio.StreamReader) -> Head:
    head = await read_head(reader)
    assert head is not None
    return head


async def answer(data: bytes, method: bytes = b"POST") -> tuple[bytes, bytes]:
    """The body of the first answer in it, and what follows."""
    reader = reader_of(data)
    head = await head_of(reader)
    return b"".join([piece async for piece in head.answer_body(reader, method)]), await reader.read()


@pytest.mark.parametrize(
    ("head", "body", "method"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3", b"abc", b"POST"),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked",
            b"1;x=y\r\na\r\n2\r\nbc\r\n0\r\ntrailer: 1\r\n\r\n",
            b"POST",
        ),
        (b"HTTP/1.1 200\r\ncontent-length: 0", b"", b"POST"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 3", b"", b"HEAD"),
        (b"HTTP/1.1 204 No Content", b"", b"DELETE"),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 3", b"", b"GET"),
    ],
)
async def test_an_answer_ends_where_its_framing_says(head: bytes, body: bytes, method: bytes) -> None:
    found, rest = await answer(head + b"\r\n\r\n" + body + b"HTTP/1.1", method)

    assert found == (b"abc" if body else b"")
    assert rest == b"HTTP/1.1"


async def test_an_answer_without_a_length_ends_with_its_connection() -> None:
    assert await answer(b"HTTP/1.0 200 OK\r\n\r\nabc") == (b"abc", b"")


async def test_a_request_without_a_length_has_no_body() -> None:
    reader = reader_of(b"GET /health?x=1 HTTP/1.1\r\nhost: x\r\n\r\nGET")
    head = await head_of(reader)

    assert [piece async for piece in head.request_body(reader)] == []
    assert (head.path, await reader.read()) == ("/health", b"GET")


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n9\r\nabc",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nnine\r\nabc",
    ],
)
async def test_a_body_that_breaks_off_is_no_whole_one(data: bytes) -> None:
    with pytest.raises((EOFError, ConnectionError)):
        await answer(data)


@pytest.mark.parametrize("data", [b"SSH-2.0\r\n\r\n", b"half a head", b"HTTP/1.1 what\r\n\r\n"])
async def test_what_is_no_http_is_given_back(data: bytes) -> None:
    with pytest.raises(NotHttp) as caught:
        await read_head(reader_of(data))
    assert caught.value.data == data


async def test_the_end_of_a_connection_is_no_message() -> None:
    assert await read_head(reader_of(b"")) is None


async def test_the_head_of_an_answer_that_is_the_last_and_shorter() -> None:
    head = await head_of(
        reader_of(b"HTTP/1.1 200 OK\r\nKeep-Alive: timeout=5\r\nContent-Length: 9\r\nX: connection: y\r\n\r\n")
    )

    assert head.closing(4) == b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\nX: connection: y\r\nConnection: close\r\n\r\n"
    assert b"Content-Length: 9" in head.closing(None)


@pytest.mark.parametrize("count", range(len(ENDS)))
@pytest.mark.parametrize("step", [1, 2, 3, 7, len(STREAM)])
def test_events_are_counted_however_they_are_split(count: int, step: int) -> None:
    place, position = _AfterEvents(count), 0

    while (found := place.within(STREAM[position : position + step])) is None:
        position += step

    assert position + found == ENDS[count]


def test_a_stream_that_is_too_short_is_never_enough() -> None:
    assert _AfterEvents(4).within(STREAM) is None


@pytest.mark.parametrize(("count", "step"), [(0, 1), (5, 1), (5, 2), (5, 5), (5, 9)])
def test_bytes_are_counted_however_they_are_split(count: int, step: int) -> None:
    place, position = _AfterBytes(count), 0

    while (found := place.within(STREAM[position : position + step])) is None:
        position += step

    assert position + found == count
