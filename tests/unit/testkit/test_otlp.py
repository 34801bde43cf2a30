"""Receivers of spans: inside a program, and as a process of their own."""

import gzip
from pathlib import Path

import aiohttp
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, ScopeSpans, Span

from testkit.otlp import Export, Receiver, Sink


def export(resources: int = 1) -> bytes:
    """Three spans of each resource."""
    span = Span(name="a", trace_id=b"\x01" * 16, start_time_unix_nano=2**60, flags=257)
    scopes = [ScopeSpans(spans=[span, span]), ScopeSpans(spans=[span]), ScopeSpans()]
    resource_spans = [ResourceSpans(scope_spans=scopes) for _ in range(resources)]
    return bytes(ExportTraceServiceRequest(resource_spans=resource_spans).SerializeToString())


async def post(url: str, body: bytes, **headers: str) -> int:
    async with aiohttp.ClientSession() as session, session.post(url, data=body, headers=headers) as response:
        await response.read()
        return response.status


def test_the_spans_of_every_resource_and_scope_are_counted() -> None:
    assert Export("", {}, export(100)).count == 300
    assert Export("", {}, b"").count == 0


async def test_a_receiver_takes_exports_compressed_or_not_and_keeps_its_port() -> None:
    came: list[Export] = []
    async with Receiver(came.append) as receiver:
        assert await post(receiver.endpoint, export(), Api="x") == 200
        assert (
            await post(f"{receiver.url}/name/v1/traces", gzip.compress(export(2)), **{"Content-Encoding": "gzip"})
            == 200
        )
        port = receiver.port
        await receiver.stop()
        await receiver.start()
        assert receiver.port == port
        assert await post(receiver.endpoint, export()) == 200
    assert [(one.sender, one.count) for one in came] == [("", 3), ("name", 6), ("", 3)]
    assert came[0].headers["api"] == "x"
    assert came[1].body == export(2)


async def test_a_sink_counts_over_all_its_lives(tmp_path: Path) -> None:
    sink = Sink("sink", tmp_path)
    assert sink.spans() == 0
    async with sink:
        await post(f"{sink.url}/v1/traces", export())
        await post(f"{sink.url}/a-gateway/v1/traces", export(2))
        await sink.kill()
        await sink.start()
        await post(f"{sink.url}/a-gateway/v1/traces", export(3))
    assert (sink.spans(), sink.spans("a-gateway"), sink.spans(""), sink.spans("another")) == (18, 15, 3, 0)
