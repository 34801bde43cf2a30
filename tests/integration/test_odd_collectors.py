"""Collectors that redirect, never end, drip or blow up: none takes memory, or holds an export beyond its time."""

import asyncio
import resource
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent import futures
from contextlib import asynccontextmanager, suppress
from time import monotonic
from typing import Any

import grpc  # type: ignore[import-untyped]
import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.sdk.trace.export import SpanExportResult

from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from gateway.telemetry.otlp_transport import MAX_REASON

TIMEOUT = 1.0
"""Seconds that an export may take where it is to run out of time."""
LATER = 20.0
"""Seconds: far more than a busy machine adds to it."""
MEMORY = 64 * 1024
"""KB by which none of them may grow this process."""

Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def collector(answer: Answer) -> AsyncIterator[str]:
    """A collector that reads an export, and answers so."""
    answering: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
            await writer.drain()
            await reader.read()
        writer.transport.abort()
        await asyncio.sleep(0)

    def begin(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answering.add(asyncio.create_task(serve(reader, writer)))

    server = await asyncio.start_server(begin, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/traces"
        await asyncio.wait_for(asyncio.gather(*answering), LATER)


async def sent(url: str, limit: float = LATER) -> tuple[bool, float]:
    """Whether an export was taken, and the seconds it took."""
    exporter = OtlpHttpExporter(url, timeout=limit)
    began = monotonic()
    try:
        return await asyncio.to_thread(exporter.send, b"x"), monotonic() - began
    finally:
        await asyncio.to_thread(exporter.shutdown)


async def test_the_words_beside_a_status_are_cut_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 " + b"R" * 5000 + b"\r\ncontent-length: 0\r\n\r\n")

    async with collector(refuse) as url:
        assert not (await sent(url))[0]
    assert "R" * MAX_REASON in caplog.text
    assert "R" * (MAX_REASON + 1) not in caplog.text


async def drip(writer: asyncio.StreamWriter, piece: bytes) -> None:
    while True:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(TIMEOUT / 10)


async def never_ending_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nx: ")
    await drip(writer, b"x")


async def never_ending_answer(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n")
    await drip(writer, b"x")


async def never_ending_continues(writer: asyncio.StreamWriter) -> None:
    await drip(writer, b"HTTP/1.1 100 Continue\r\n\r\n")


async def huge_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for _ in range(4096):
        writer.write(b"x: " + b"y" * 65_000 + b"\r\n")
        await writer.drain()


async def unavailable_with_a_long_name(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 503 " + b"z" * 1_000_000 + b"\r\ncontent-length: 0\r\n\r\n")


@pytest.mark.parametrize(
    "answer",
    [
        never_ending_headers,
        never_ending_answer,
        never_ending_continues,
        huge_headers,
        unavailable_with_a_long_name,
    ],
)
async def test_an_answer_that_does_not_end_fails_in_time(answer: Answer) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with collector(answer) as url:
        taken, seconds = await sent(url, TIMEOUT)

    assert not taken
    assert seconds < TIMEOUT + LATER
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_not_followed_and_not_taken_for_a_success(
    status: int, caplog: pytest.LogCaptureFixture
) -> None:
    followed: list[bool] = []

    async def good(writer: asyncio.StreamWriter) -> None:
        followed.append(True)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    async with collector(good) as elsewhere:

        async def redirect(writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 %d No\r\nlocation: %s\r\ncontent-length: 0\r\n\r\n" % (status, elsewhere.encode()))

        async with collector(redirect) as url:
            taken, _ = await sent(url)

    assert not taken
    assert not followed
    assert f"the collector redirects ({status})" in caplog.text


@pytest.mark.parametrize("kind", ["endless", "bomb"])
async def test_no_more_of_an_answer_is_read_than_it_needs(kind: str) -> None:
    zeros, press = bytes(1_000_000), zlib.compressobj(1, wbits=31)
    bomb = b"".join([*(press.compress(zeros) for _ in range(500)), press.flush()])
    written = 0

    async def answer(writer: asyncio.StreamWriter) -> None:
        nonlocal written
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n\r\n")
        piece = bomb[:65_536] if kind == "endless" else bomb
        while written < 1 << 30:
            writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            await writer.drain()
            written += len(piece)
            if kind == "bomb":
                writer.write(b"0\r\n\r\n")
                return

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    async with collector(answer) as url:
        taken, seconds = await sent(url)

    assert taken
    assert seconds < LATER
    assert written < 1 << 28
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY


async def test_a_connection_is_kept_for_the_next_export_and_a_dead_one_is_made_anew() -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        with suppress(asyncio.IncompleteReadError):
            for _ in range(2):
                await reader.readuntil(b"\r\n\r\nx")
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        exporter = OtlpHttpExporter(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/traces", timeout=LATER)
        taken = [await asyncio.to_thread(exporter.send, b"x") for _ in range(6)]
        await asyncio.to_thread(exporter.shutdown)

    assert taken == [True] * 6
    assert connections == 3


async def test_a_shutdown_ends_the_export_under_way() -> None:
    begun = asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        begun.set()
        await drip(writer, b"H")

    async with collector(hang) as url:
        exporter = OtlpHttpExporter(url, timeout=3600)
        sending = asyncio.create_task(asyncio.to_thread(exporter.send, b"x"))
        await begun.wait()
        await asyncio.to_thread(exporter.shutdown)

        assert not await sending
        assert not await asyncio.to_thread(exporter.send, b"x")


class Bomb(TraceServiceServicer):
    """Answers every export by gRPC with 64 MB of zeros, compressed."""

    def Export(self, _request: Any, context: Any) -> ExportTraceServiceResponse:  # noqa: ANN401, N802
        context.set_compression(grpc.Compression.Gzip)
        answer = ExportTraceServiceResponse()
        answer.partial_success.error_message = "0" * 64_000_000
        return answer


async def test_a_bomb_by_grpc_is_an_export_that_failed() -> None:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    add_TraceServiceServicer_to_server(Bomb(), server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    exporter = GrpcExporter(endpoint=f"http://127.0.0.1:{port}", timeout=5)
    try:
        assert await asyncio.to_thread(exporter.export, []) is SpanExportResult.FAILURE
    finally:
        exporter.shutdown()
        server.stop(None).wait()
