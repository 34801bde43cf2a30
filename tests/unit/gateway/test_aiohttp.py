"""What our overrides assume of aiohttp: that each name exists, and does what it is used for.

A test that fails here after an upgrade says which override in `gateway/backend/aiohttp_connection.py` or
`gateway/server/aiohttp_protocol.py` has to be read again.
"""

import asyncio
import inspect
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from errno import EADDRNOTAVAIL, ECONNREFUSED, ENETUNREACH
from functools import partial
from typing import Any, cast

import aiohttp
import pytest
import uvloop
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.base_protocol import BaseProtocol
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import HttpRequestParser
from aiohttp.web_protocol import RequestHandler, _ErrInfo
from yarl import URL

from gateway.backend import aiohttp_connection
from gateway.backend.aiohttp_connection import READ, ConnectLimit, Connector, request_to, send, unread, waiting
from gateway.backend.aiohttp_connection import Protocol as BackendProtocol
from gateway.errors import ConnectTimeout
from gateway.server.aiohttp_protocol import OTHER_VERSION, Answer, OpenAnswer, Protocol
from gateway.server.connections import Connections
from gateway.server.hang_ups import HangUps
from gateway.stalls import stalls_of_loop
from tests.unit.gateway.fakes import Clock

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"


@asynccontextmanager
async def backend(serve: Serve) -> AsyncIterator[URL]:
    """A server that ends each connection when `serve` returns or the caller leaves."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with closing(writer):
            await serve(reader, writer)

    async with await asyncio.start_server(talk, "127.0.0.1", 0) as server:
        yield URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")


@asynccontextmanager
async def closing(writer: asyncio.StreamWriter) -> AsyncIterator[None]:
    try:
        yield
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def answer_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        writer.write(ANSWER)


@asynccontextmanager
async def connector(*, force_close: bool = False, resolver: AbstractResolver | None = None) -> AsyncIterator[Connector]:
    made = Connector(force_close=force_close, resolver=resolver)
    try:
        yield made
    finally:
        await made.close()
        await asyncio.sleep(0)  # its connections are lost in the next turn


def head(url: URL) -> bytes:
    return f"POST / HTTP/1.1\r\nhost: {url.authority}\r\ncontent-length: 0\r\n\r\n".encode()


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(3000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not happen")


class Transport(asyncio.Transport):
    """A transport that goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.resumed = 0

    def get_extra_info(self, _name: str, default: Any = None) -> Any:  # noqa: ANN401
        return default

    def pause_reading(self) -> None:
        """Nothing is read."""

    def resume_reading(self) -> None:
        self.resumed += 1

    def write(self, data: Any) -> None:  # noqa: ANN401
        """Nobody is there."""

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits."""

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing to close."""

    abort = close


# The client


async def test_a_connector_makes_the_connections_of_its_factory() -> None:
    async with backend(answer_each) as url, connector() as made:
        connection, _ = await made.open(request_to(url))
        assert isinstance(connection.protocol, BackendProtocol)
        connection.close()


async def test_a_connection_is_new_to_the_call_that_opened_it() -> None:
    async with backend(answer_each) as url, connector() as made:
        connection, new = await made.open(request_to(url))
        assert new
        await send(connection, head(url), b"")
        connection.release()
        again, new = await made.open(request_to(url))
        assert not new
        again.close()


async def test_kept_connections_are_a_queue_of_which_the_first_is_taken() -> None:
    async with backend(answer_each) as url, connector() as made:
        first, _ = await made.open(request_to(url))
        second, _ = await made.open(request_to(url))
        last_used = second.protocol
        for connection in (first, second):
            _, content = await send(connection, head(url), b"")
            assert await content.read() == b"{}"
            connection.release()
        (kept,) = made._conns.values()
        assert [protocol for protocol, _ in kept][-1] is last_used
        assert all(protocol.is_connected() for protocol, _ in kept)
        connection, _ = await made.open(request_to(url))
        assert connection.protocol is last_used
        connection.close()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    with asyncio.Runner(loop_factory=request.param) as one:
        yield one


def test_a_new_connection_is_opened_in_one_place_within_the_limit_of_its_call(runner: asyncio.Runner) -> None:
    async def story() -> None:
        def late(seconds: float) -> ConnectLimit:
            return ConnectLimit(seconds, lambda: ConnectTimeout("late"))

        async with connector(resolver=Mute()) as made:
            with pytest.raises(ConnectTimeout):
                await made.open(request_to(URL("http://model.test:9/")), late(0.1))
        async with backend(answer_each) as url, connector() as made:
            connection, _ = await made.open(request_to(url), late(30))
            connection.close()

    assert inspect.iscoroutinefunction(aiohttp.TCPConnector._create_connection)
    runner.run(story())


def test_a_connection_that_was_accepted_while_the_loop_stood_still_is_in_time(runner: asyncio.Runner) -> None:
    """Of a name: resolving it and connecting take several turns of the loop."""

    async def story() -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            url = URL(f"http://model.test:{listener.getsockname()[1]}/")
            late = ConnectLimit(1.0, lambda: ConnectTimeout("late"))
            async with connector(resolver=Book("127.0.0.1")) as made:
                stalls_of_loop()
                opening = asyncio.create_task(made.open(request_to(url), late))
                await asyncio.sleep(0)
                time.sleep(2.0)  # noqa: ASYNC251 - the loop stands still
                connection, new = await opening
                assert new
                connection.close()

    runner.run(story())


SHORT = OSError(EADDRNOTAVAIL, "Cannot assign requested address")


@pytest.mark.parametrize(("way", "number"), [(True, EADDRNOTAVAIL), (False, ENETUNREACH)], ids=["ports", "no way"])
def test_a_loop_connects_by_the_sockets_own_method_which_tells_two_troubles_apart(
    runner: asyncio.Runner, monkeypatch: pytest.MonkeyPatch, *, way: bool, number: int
) -> None:
    def connect(one: socket.socket, _address: object) -> None:
        if one.type == socket.SOCK_STREAM or not way:
            raise SHORT

    async def story() -> None:
        async with connector() as made:
            monkeypatch.setattr(socket.socket, "connect", connect)
            with pytest.raises(aiohttp.ClientConnectorError) as told:
                await made.open(request_to(URL("http://127.0.0.1:9/")))
            monkeypatch.undo()
        assert told.value.os_error.errno == number

    runner.run(story())


async def test_of_several_addresses_errors_the_shortage_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Aiohttp makes one error of them, which has no number."""

    def connect(_one: socket.socket, address: tuple[str, int]) -> None:
        raise SHORT if address[0] == "127.0.0.1" else ConnectionRefusedError(ECONNREFUSED, "Connection refused")

    async with connector(resolver=Book("127.0.0.1", "127.0.0.2")) as made:
        monkeypatch.setattr(socket.socket, "connect", connect)
        monkeypatch.setattr(aiohttp_connection, "_has_way_to", lambda *_: True)
        with pytest.raises(aiohttp.ClientConnectorError) as told:
            await made.open(request_to(URL("http://model.test:9/")))
    assert told.value.os_error.errno == EADDRNOTAVAIL


async def test_a_client_request_knows_its_host_and_is_no_more_than_that() -> None:
    request = request_to(URL("http://[::1]:8001/v1/chat/completions"))
    assert request.headers["Host"] == "[::1]:8001"
    assert request.connection_key.host == "::1"


async def test_a_protocol_reads_heads_one_after_the_other_and_bodies_without_decompression() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nx: 1\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 3\r\n\r\n\x00\xff\x01")

    async with backend(serve) as url, connector() as made:
        connection, _ = await made.open(request_to(url))
        message, content = await send(connection, head(url), b"")
        assert message.code == 200
        assert message.headers["content-encoding"] == "gzip"
        assert await content.read() == b"\x00\xff\x01"
        connection.close()


async def test_what_came_before_a_connection_failed_is_still_in_the_reader() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(65536)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()

    async with backend(serve) as url, connector() as made:
        connection, _ = await made.open(request_to(url))
        _, content = await send(connection, head(url), b"")
        await until(lambda: content.exception() is not None)
        assert unread(content) == b"half"
        connection.close()


async def test_a_failed_connection_leaves_aiohttps_body_waiting_and_ends_ours() -> None:
    for kind, ended in ((ResponseHandler, False), (BackendProtocol, True)):
        protocol = kind(asyncio.get_running_loop())
        protocol.connection_made(Transport())
        protocol.set_response_params(auto_decompress=False, read_until_eof=True)
        protocol.data_received(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        _, content = await protocol.read()
        protocol.set_exception(aiohttp.ClientPayloadError("no HTTP"))
        assert (content.exception() is not None) is ended, "aiohttp has changed: is the override needed any longer?"


async def test_reading_that_was_not_paused_is_not_resumed() -> None:
    transport = Transport()
    protocol = BackendProtocol(asyncio.get_running_loop())
    protocol.connection_made(transport)
    protocol.set_response_params(auto_decompress=False, read_until_eof=True)
    protocol.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    protocol.resume_reading()
    assert (transport.resumed, protocol._reading_paused) == (0, False)
    protocol.pause_reading()
    assert (transport.resumed, protocol._reading_paused) == (0, True)
    protocol.resume_reading()
    assert (transport.resumed, protocol._reading_paused) == (1, False)
    protocol.connection_lost(None)


@pytest.mark.parametrize("end", [None, ConnectionResetError()])
async def test_a_reset_is_no_proper_end_of_a_body_that_lasts_until_the_connection_ends(
    end: ConnectionResetError | None,
) -> None:
    protocol = BackendProtocol(asyncio.get_running_loop())
    protocol.connection_made(Transport())
    protocol.set_response_params(auto_decompress=False, read_until_eof=True)
    protocol.data_received(b"HTTP/1.1 200 OK\r\n\r\nhalf")
    _, content = await protocol.read()
    protocol.connection_lost(end)
    assert content.is_eof()
    assert (content.exception() is None) == (end is None)
    assert unread(content) == b"half"


async def test_a_backend_is_held_back_beside_aiohttps_own_pause() -> None:
    transport = Transport()
    protocol = BackendProtocol(asyncio.get_running_loop())
    protocol.connection_made(transport)
    protocol.set_response_params(auto_decompress=False, read_until_eof=True)
    protocol.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    protocol.hold_back()
    protocol.pause_reading()
    protocol.resume_reading()
    assert (transport.resumed, protocol._buffer_paused) == (0, True)
    protocol.go_on()
    assert (transport.resumed, protocol._buffer_paused) == (1, False)
    protocol.hold_back()
    protocol.pause_reading()
    protocol.go_on()
    assert transport.resumed == 1
    protocol.resume_reading()
    assert transport.resumed == 2
    protocol.connection_lost(None)


@pytest.mark.asyncio(loop_factories=["asyncio", "uvloop"])
async def test_a_protocol_reads_less_at_a_time_and_as_ever_again() -> None:
    sizes: list[int] = []

    class Noting(BackendProtocol):
        def data_received(self, data: bytes) -> None:
            sizes.append(len(data))
            super().data_received(data)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(2):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 4000000\r\n\r\n" + bytes(4_000_000))
        await reader.read()

    async with backend(serve) as url, connector() as made:
        made._factory = cast("Any", partial(Noting, asyncio.get_running_loop()))
        connection, _ = await made.open(request_to(url), ConnectLimit())
        protocol = connection.protocol
        assert isinstance(protocol, Noting)
        _, content = await send(connection, head(url), b"")
        protocol.read_less()
        sizes.clear()
        assert await content.read() == bytes(4_000_000)
        assert max(sizes) <= READ
        protocol.read_as_ever()
        sizes.clear()
        _, content = await send(connection, head(url), b"")
        await until(lambda: waiting(content) > 0)
        assert waiting(content) == content.total_bytes
        assert await content.read() == bytes(4_000_000)
        assert waiting(content) == 0
        assert max(sizes) > READ
        protocol.read_less()
        connection.close()
        await until(lambda: not protocol.is_connected())


async def test_what_waits_to_be_read_stops_at_twice_the_size() -> None:
    transport = Transport()
    protocol = BackendProtocol(asyncio.get_running_loop())
    protocol.connection_made(transport)
    connection = Holding(protocol, transport)
    sending = asyncio.create_task(send(cast("Any", connection), b"", b""))
    await asyncio.sleep(0)
    protocol.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 999999\r\n\r\n" + bytes(2 * READ))
    paused = [protocol._reading_paused]
    protocol.data_received(b".")
    assert [*paused, protocol._reading_paused] == [False, True]
    await sending
    protocol.connection_lost(None)


class Holding:
    """A connection, as far as `send` asks about it."""

    def __init__(self, protocol: BackendProtocol, transport: asyncio.Transport) -> None:
        self.protocol = protocol
        self.transport = transport


async def test_a_lost_connection_forgets_what_nobody_read() -> None:
    protocol = BackendProtocol(asyncio.get_running_loop())
    protocol.connection_made(Transport())
    protocol.set_response_params(auto_decompress=False, read_until_eof=True)
    protocol.data_received(ANSWER)
    assert len(protocol._buffer) == 1
    protocol.connection_lost(None)
    await asyncio.sleep(0)
    assert len(protocol._buffer) == 0


class Book(AbstractResolver):
    """A name server whose answers change: `addresses` now, None for no answer; `asked` how often."""

    def __init__(self, *addresses: str) -> None:
        self.addresses: tuple[str, ...] | None = addresses
        self.asked = 0

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        self.asked += 1
        await asyncio.sleep(0)
        if self.addresses is None:
            raise OSError("the name server does not answer")
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in self.addresses
        ]

    async def close(self) -> None:
        """Nothing to close."""


class Mute(Book):
    """A name server that never answers."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        await asyncio.Event().wait()
        return await super().resolve(host, port, family)


class Calls:
    """Calls of a host whose name `book` resolves, over a connector on a clock of its own."""

    def __init__(self, made: Connector, url: URL) -> None:
        self._made = made
        self._url = url

    async def peer(self) -> tuple[str, bool]:
        """Make a call: the address it went to, and whether over a new connection."""
        connection, new = await self._made.open(request_to(self._url))
        protocol = connection.protocol
        assert isinstance(protocol, BackendProtocol)
        _, content = await send(connection, head(self._url), b"")
        assert await content.read() == b"{}"
        connection.release()
        await asyncio.sleep(0.01)  # what goes on in the background has gone on
        return protocol.peer, new


@asynccontextmanager
async def calls(book: Book, clock: Clock) -> AsyncIterator[Calls]:
    """Calls of a server that listens on every address of this machine."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with closing(writer):
            await answer_each(reader, writer)

    made = Connector(force_close=False, resolver=book, clock=clock)
    async with await asyncio.start_server(talk, "0.0.0.0", 0) as server:
        try:
            yield Calls(made, URL(f"http://model.test:{server.sockets[0].getsockname()[1]}/"))
        finally:
            await made.close()
            await asyncio.sleep(0)


async def test_a_changed_address_is_used_under_steady_calls() -> None:
    book, clock = Book("127.0.0.1"), Clock()
    async with calls(book, clock) as to:
        assert await to.peer() == ("127.0.0.1", True)
        book.addresses = ("127.0.0.2",)
        went_to = []
        for _ in range(30):
            clock.forward(1)
            went_to.append(await to.peer())
        moved = went_to.index(("127.0.0.2", True))
        assert moved <= 11
        assert went_to[:moved] == [("127.0.0.1", False)] * moved
        assert went_to[moved + 1 :] == [("127.0.0.2", False)] * (29 - moved)
        assert book.asked <= 5


async def test_a_connection_to_one_of_several_addresses_is_kept() -> None:
    book, clock = Book("127.0.0.1"), Clock()
    async with calls(book, clock) as to:
        assert await to.peer() == ("127.0.0.1", True)
        book.addresses = ("127.0.0.3", "127.0.0.1")
        for _ in range(30):
            clock.forward(1)
            assert await to.peer() == ("127.0.0.1", False)


async def test_while_the_name_server_is_silent_kept_connections_are_good() -> None:
    book, clock = Book("127.0.0.1"), Clock()
    async with calls(book, clock) as to:
        assert await to.peer() == ("127.0.0.1", True)
        book.addresses = None
        for _ in range(30):
            clock.forward(1)
            assert await to.peer() == ("127.0.0.1", False)
        assert 3 <= book.asked <= 4


async def test_an_address_is_not_resolved_and_its_connection_is_kept() -> None:
    book, clock = Book("127.0.0.9"), Clock()
    async with backend(answer_each) as url:
        made = Connector(force_close=False, resolver=book, clock=clock)
        to = Calls(made, url)
        assert await to.peer() == ("127.0.0.1", True)
        clock.forward(100)
        assert await to.peer() == ("127.0.0.1", False)
        await made.close()
        await asyncio.sleep(0)
    assert book.asked == 0


# The server


async def nothing(_request: web.BaseRequest) -> web.Response:
    return web.Response()


def server_protocol(kind: type[RequestHandler] = RequestHandler) -> Any:  # noqa: ANN401
    server = web.Server(nothing)
    more: dict[str, Any] = {}
    if issubclass(kind, Protocol):
        more = {
            "answer_unhandled": lambda *_: web.Response(),
            "connections": Connections(1000, lambda _: None),
            "hang_ups": HangUps(),
            "write_timeout": 60.0,
        }
    return kind(server, loop=asyncio.get_running_loop(), **server._kwargs, **more)


class Sent(Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.data = b""

    def write(self, data: Any) -> None:  # noqa: ANN401
        self.data += bytes(data)


async def answered(handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]], asked: bytes) -> bytes:
    """What a caller gets."""
    protocol, sent = web.Server(handler, access_log=None)(), Sent()
    protocol.connection_made(sent)
    protocol.data_received(asked)
    await until(lambda: b"\r\n\r\n" in sent.data)
    await asyncio.sleep(0)
    protocol.connection_lost(None)
    await asyncio.sleep(0)
    return sent.data


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_lines_that_explain_stand_at_the_end_of_the_head_of_a_whole_answer(method: str, version: str) -> None:
    async def answer(_request: web.BaseRequest) -> web.StreamResponse:
        whole = Answer(body=b"{}", status=404, headers={"server": "us"})
        whole.lines = b"x-a: 1\r\nx-b: 2\r\n\r\n"
        return whole

    head, _, body = (await answered(answer, f"{method} / HTTP/{version}\r\nhost: a\r\n\r\n".encode())).partition(
        b"\r\n\r\n"
    )
    first, *lines = head.decode().split("\r\n")
    assert first == f"HTTP/{version} 404 Not Found"
    assert lines[-2:] == ["x-a: 1", "x-b: 2"]
    names = [line.partition(":")[0].lower() for line in lines]
    assert sorted(set(names) - {"connection", "content-type"}) == ["content-length", "date", "server", "x-a", "x-b"]
    assert len(names) == len(set(names))
    assert body == (b"{}" if method == "GET" else b"")


@pytest.mark.parametrize("lines", [b"", b"x-a: 1\r\n\r\n"])
async def test_lines_that_explain_stand_before_the_first_byte_of_an_answer_that_is_sent_as_it_comes(
    lines: bytes,
) -> None:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        opened = OpenAnswer(headers={"server": "us"})
        opened.lines = lines
        await opened.prepare(request)
        await opened.write(b"one")
        return opened

    sent = await answered(answer, b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    head, _, body = sent.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert (head + b"\r\n\r\n").endswith(lines)
    assert body.startswith(b"3\r\none\r\n")


async def test_malformed_http_waits_as_an_error_among_the_messages() -> None:
    protocol = server_protocol()
    protocol.connection_made(Transport())
    await asyncio.sleep(0)  # its task begins
    assert protocol._current_request is None
    assert protocol._request_count == 0
    protocol.data_received(b"nonsense\r\n\r\n")
    (error, _payload) = protocol._messages[-1]
    assert isinstance(error, _ErrInfo)
    assert isinstance(error.exc, BaseException)
    assert protocol._request_count == 1
    protocol.connection_lost(None)
    await asyncio.sleep(0)


def parsed(data: bytes) -> Any:  # noqa: ANN401
    """What the server's parser makes of data: the first message, or the text of its complaint."""
    parser = HttpRequestParser(server_protocol(), asyncio.get_running_loop(), 65_536)
    try:
        return parser.feed_data(data)[0]
    except HttpProcessingError as error:
        return error.message


async def test_the_parser_drops_what_is_behind_an_upgrade_and_says_that_it_is_one() -> None:
    plain = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
    ((message, _),) = parsed(plain.replace(b"\r\n\r\n", b"\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n") + plain)
    assert (message.upgrade, message.should_close, message.path) == (True, False, "/")
    assert message._replace(should_close=True).should_close
    assert [message.upgrade for message, _ in parsed(plain + plain)] == [False, False]


async def test_the_parser_knows_two_versions_besides_those_of_ours_and_complains_of_others_in_fixed_words() -> None:
    plain = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
    assert parsed(plain)[0][0].version is HttpVersion11
    assert parsed(plain.replace(b"1.1", b"1.0"))[0][0].version == HttpVersion10
    assert [parsed(plain.replace(b"1.1", other))[0][0].version for other in (b"0.9", b"2.0")] == [(0, 9), (2, 0)]
    for odd in (plain.replace(b"1.1", b"1.2"), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        assert parsed(odd).startswith(OTHER_VERSION)


async def test_the_parser_knows_an_absolute_form_by_its_url() -> None:
    ((message, _),) = parsed(b"GET http://a?x=1 HTTP/1.1\r\nhost: a\r\n\r\n")
    assert (message.path, message.url.absolute, message.url.raw_path) == ("http://a?x=1", True, "/")


async def test_a_server_makes_its_protocol_from_arguments_that_ours_takes_too() -> None:
    server = web.Server(nothing, handler_cancellation=True, access_log=None)
    assert server._kwargs == {"access_log": None}
    assert (server.request_handler, server.handler_cancellation) == (nothing, True)
    assert callable(server.request_factory)
    assert isinstance(server_protocol(Protocol), RequestHandler)


async def test_the_runner_makes_its_server_in_one_place() -> None:
    runner = web.AppRunner(web.Application(), access_log=None)
    assert inspect.iscoroutinefunction(runner._make_server)
    await runner.setup()
    assert runner.server is not None
    assert runner.server._kwargs["access_log"] is None
    await runner.cleanup()


@pytest.mark.parametrize(("kind", "waits"), [(RequestHandler, False), (Protocol, True)])
async def test_aiohttp_keeps_what_a_cancelled_writer_waited_for_and_ours_does_not(
    kind: type[RequestHandler],
    waits: bool,  # noqa: FBT001
) -> None:
    protocol = server_protocol(kind)
    protocol.connection_made(Transport())
    protocol.pause_writing()
    assert protocol.writing_paused
    first = asyncio.create_task(protocol._drain_helper())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    assert protocol._drain_waiter.cancelled()
    second = asyncio.create_task(protocol._drain_helper())
    await asyncio.wait({second}, timeout=0.05)
    assert (not second.done()) is waits, "aiohttp has changed: is the override needed any longer?"
    protocol.resume_writing()
    await asyncio.gather(second, return_exceptions=True)
    protocol.connection_lost(None)


PIPELINED = b"GET /1 HTTP/1.1\r\nhost: here\r\n\r\nGET /2 HTTP/1.1\r\nhost: here\r\n\r\n"


async def test_a_parser_of_one_message_stops_behind_it_and_goes_on_when_it_is_asked() -> None:
    protocol = server_protocol(Protocol)
    protocol.connection_made(Transport())
    messages, _, _ = protocol._parser.feed_data(PIPELINED)
    assert [message.path for message, _ in messages] == ["/1"]
    protocol._parser.message_consumed()
    messages, _, _ = protocol._parser.feed_data(b"")
    assert [message.path for message, _ in messages] == ["/2"]
    protocol.connection_lost(None)
    await asyncio.sleep(0)


@pytest.mark.parametrize(("kind", "together"), [(RequestHandler, 2), (Protocol, 1)])
async def test_aiohttp_parses_requests_that_wait_and_ours_parses_them_in_turn(
    kind: type[RequestHandler], together: int
) -> None:
    protocol = server_protocol(kind)
    protocol.connection_made(Transport())
    protocol.data_received(PIPELINED)
    assert len(protocol._messages) == together, "aiohttp has changed: is the override needed any longer?"
    protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_an_access_is_logged_when_the_answer_has_been_sent_and_nothing_is_read_on_before() -> None:
    transport = Transport()
    before: list[tuple[object, object, int]] = []
    parsed: list[int] = []

    class Noting(Protocol):
        def log_access(self, *of: Any) -> None:  # noqa: ANN401
            before.append((self._current_request, self._waiter, len(self._further)))
            super().log_access(*of)
            parsed.append(len(self._messages))

    protocol = server_protocol(Noting)
    protocol.connection_made(transport)
    protocol.data_received(PIPELINED)
    protocol.data_received(PIPELINED)
    assert (protocol._buffer_paused, transport.resumed) == (True, 0)
    await until(lambda: len(parsed) == 4)
    assert before == [(None, None, len(PIPELINED))] * 2 + [(None, None, 0)] * 2
    assert parsed == [1, 1, 1, 0]
    assert (protocol._buffer_paused, transport.resumed) == (False, 1)
    protocol.connection_lost(None)
    await asyncio.sleep(0)


@pytest.mark.parametrize(("kind", "parsed"), [(RequestHandler, 1), (Protocol, 0)])
async def test_aiohttp_asks_the_parser_after_every_read_of_a_body_and_ours_does_not(
    kind: type[RequestHandler], parsed: int
) -> None:
    class Counting(kind):  # type: ignore[valid-type, misc]
        asked = 0

        def data_received(self, data: bytes) -> None:
            self.asked += not data
            super().data_received(data)

    protocol = server_protocol(Counting)
    protocol.connection_made(Transport())
    protocol.data_received(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 9\r\n\r\nhalf")
    (_, body) = protocol._messages[0]
    assert await body.readany() == b"half"
    assert protocol.asked == parsed, "aiohttp has changed: is the override needed any longer?"
    protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_the_transport_of_a_protocol_is_paused_and_resumed_in_one_place() -> None:
    assert {"_pause_transport_reading", "_resume_transport_reading"} <= set(vars(BaseProtocol))
    paused: list[asyncio.Transport] = []

    class Noted(HangUps):
        def watch(self, connection: asyncio.Transport) -> None:
            paused.append(connection)

        def forget(self, connection: asyncio.Transport) -> None:
            if connection in paused:
                paused.remove(connection)

    protocol, transport = server_protocol(Protocol), Transport()
    protocol._hang_ups = Noted()
    protocol.connection_made(transport)
    protocol.data_received(b"POST / HTTP/1.1\r\nhost: here\r\ncontent-length: 999999999\r\n\r\n")
    protocol.data_received(b"." * (1 << 20))
    assert paused == [transport]
    await protocol._messages[0][1].readany()
    assert paused == []
    protocol.pause_reading()
    assert paused == [transport]
    protocol.connection_lost(None)
    assert paused == []
    await asyncio.sleep(0)


async def test_who_takes_nothing_of_what_waits_is_cut_off_and_who_takes_something_is_not() -> None:
    class Taking(Transport):
        taken = 0
        aborted = False
        limits: tuple[int | None, int | None] | None = None

        def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
            self.limits = high, low

        def get_write_buffer_size(self) -> int:
            return 1000 - self.taken

        def abort(self) -> None:
            self.aborted = True

    now, transport, loop = Clock(), Taking(), asyncio.get_running_loop()
    protocol = server_protocol(Protocol)
    protocol.connection_made(transport)
    assert transport.limits == (0, None)
    timers: list[tuple[float, Callable[[], None]]] = []

    class Loop:
        time = staticmethod(now)

        @staticmethod
        def call_later(seconds: float, call: Callable[..., None], *of: object) -> asyncio.TimerHandle:
            timers.append((seconds, partial(call, *of)))
            return loop.call_later(1000, lambda: None)

    protocol._loop = Loop()
    protocol.pause_writing()
    for _ in range(30):  # three times as long as the timeout
        seconds, call = timers.pop()
        now.forward(seconds)
        transport.taken += 1
        call()
    assert not transport.aborted
    for _ in range(9):
        seconds, call = timers.pop()
        now.forward(seconds)
        call()
    assert not transport.aborted
    seconds, call = timers.pop()
    now.forward(seconds)
    call()
    assert (transport.aborted, timers) == (True, [])
    protocol.resume_writing()
    assert protocol._write_timer is None
    protocol._loop = loop
    protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_the_writer_of_a_request_writes_without_a_wait() -> None:
    from aiohttp.http_writer import StreamWriter  # noqa: PLC0415

    protocol = server_protocol(Protocol)
    protocol.connection_made(Transport())
    protocol.pause_writing()
    writer = StreamWriter(protocol, asyncio.get_running_loop())
    async with asyncio.timeout(20):
        await writer.write(bytes(1_000_000), drain=False)
    protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_the_writer_of_a_request_counts_what_it_has_sent() -> None:
    from aiohttp.http_writer import StreamWriter  # noqa: PLC0415

    protocol = server_protocol()
    protocol.connection_made(Transport())
    writer = StreamWriter(protocol, asyncio.get_running_loop())
    assert writer.output_size == 0
    await writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    assert writer.output_size == 25
    protocol.connection_lost(None)


async def test_a_protocol_waits_for_headers_with_a_waiter_of_its_own() -> None:
    protocol = server_protocol()
    assert [protocol._waiter] == [None]
    protocol.connection_made(Transport())
    await asyncio.sleep(0)
    assert not protocol._waiter.done()
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: ")
    assert (protocol._waiter.done(), protocol._current_request, len(protocol._messages)) == (False, None, 0)
    protocol.data_received(b"a\r\n\r\n")
    assert (protocol._waiter.done(), len(protocol._messages)) == (True, 1)
    protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_a_protocol_is_closed_at_its_time_only_when_it_is_idle() -> None:
    loop = asyncio.get_running_loop()
    protocol = server_protocol()
    protocol._keepalive_timeout = 1000
    before = loop.time()
    protocol.connection_made(Transport())
    assert before + 1000 <= protocol._next_keepalive_close_time <= loop.time() + 1000
    await asyncio.sleep(0)
    protocol._keepalive_handle.cancel()
    protocol._process_keepalive()
    assert not protocol._force_close, "it is too early"
    protocol._keepalive_handle.cancel()
    protocol._next_keepalive_close_time = before
    protocol._process_keepalive()
    assert (protocol._force_close, protocol._keepalive_handle) == (True, None)


async def test_the_handler_of_a_protocol_can_be_another_one() -> None:
    protocol = server_protocol()
    assert protocol._request_handler is nothing
    called = asyncio.Event()

    async def another(_request: web.BaseRequest) -> web.Response:
        called.set()
        return web.Response()

    protocol._request_handler = another
    protocol.connection_made(Transport())
    protocol.data_received(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
    async with asyncio.timeout(30):
        await called.wait()
    protocol.connection_lost(None)
    await asyncio.sleep(0)


async def test_a_server_has_connections_of_its_own() -> None:
    assert web.Server(nothing)._connections == {}
