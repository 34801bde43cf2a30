"""The mock model's own spans."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from mock_model.serve import MockModel
from mock_model.settings import Settings

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
BODY: Any = {"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}]}


class Traced:
    """A mock model whose spans stay in memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self.exporter))
        settings = Settings(port=0, control_port=0, mock_ttft=0, mock_token_interval=0)
        self.mock = MockModel(settings, tracer_provider=provider)

    async def call(self, *, leave: bool = False, path: str = "/v1/chat/completions", **body: Any) -> ReadableSpan:  # noqa: ANN401
        headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
        async with aiohttp.ClientSession(headers=headers) as session:
            try:
                async with session.post(f"{self.mock.url}{path}", json={**BODY, **body}) as answer:
                    if not leave:
                        await answer.read()
            except aiohttp.ClientError:
                pass
        await self.mock.settled()
        return self.exporter.get_finished_spans()[-1]


@pytest.fixture
async def traced() -> AsyncIterator[Traced]:
    instance = Traced()
    async with instance.mock:
        yield instance
    instance.mock.tracer_provider.shutdown()


async def test_a_call_is_a_server_span_below_its_caller(traced: Traced) -> None:
    span = await traced.call()
    attributes = dict(span.attributes or {})

    assert span.name == "POST /v1/chat/completions"
    assert span.kind == SpanKind.SERVER
    assert span.parent is not None
    assert f"{span.parent.trace_id:032x}" == TRACE
    assert f"{span.parent.span_id:016x}" == PARENT
    assert span.status.status_code == StatusCode.UNSET
    assert attributes["http.response.status_code"] == 200
    assert attributes["gen_ai.request.model"] == "m"
    assert attributes["gen_ai.operation.name"] == "chat"
    assert attributes["gen_ai.usage.output_tokens"] == 16
    assert attributes["mock_model.ended"] == "complete"
    assert "error.type" not in attributes


async def test_a_call_spoiled_by_a_fault_says_so(traced: Traced) -> None:
    traced.mock.set_faults([{"kind": "reset"}])
    span = await traced.call()
    attributes = dict(span.attributes or {})

    assert attributes["mock_model.fault"] == "reset"
    assert attributes["mock_model.ended"] == "fault"
    assert attributes["error.type"] == "reset"
    assert span.status.status_code == StatusCode.ERROR
    assert span.events == ()


async def test_a_call_whose_caller_leaves_is_kept(traced: Traced) -> None:
    traced.mock.set_faults([{"kind": "stall", "with": {"after_events": 2}}])
    span = await traced.call(leave=True, stream=True)
    attributes = dict(span.attributes or {})

    assert attributes["mock_model.fault"] == "stall"
    assert attributes["mock_model.ended"] == "caller_left"
    assert attributes["mock_model.events_sent"] == 2
    assert span.status.status_code == StatusCode.UNSET


async def test_no_text_of_a_prompt_or_answer_is_on_a_span(traced: Traced) -> None:
    span = await traced.call()

    assert "secret" not in span.to_json()
    assert "content" not in span.to_json()


async def test_a_call_without_a_route_is_a_span_without_its_path_in_the_name(traced: Traced) -> None:
    span = await traced.call(path="/v1/nothing")
    attributes = dict(span.attributes or {})

    assert span.name == "POST /v1/*"
    assert attributes["url.path"] == "/v1/nothing"
    assert attributes["http.response.status_code"] == 404
    assert attributes["mock_model.ended"] == "complete"
    assert span.status.status_code == StatusCode.UNSET


async def test_health_lists_of_models_and_control_are_not_traced(traced: Traced) -> None:
    async with aiohttp.ClientSession() as session:
        for url in (f"{traced.mock.url}/health", f"{traced.mock.url}/v1/models", f"{traced.mock.control_url}/journal"):
            async with session.get(url) as answer:
                assert answer.status == 200

    assert traced.exporter.get_finished_spans() == ()


async def test_a_malformed_traceparent_is_a_trace_of_its_own(traced: Traced) -> None:
    async with (
        aiohttp.ClientSession(headers={"traceparent": "00-zz-yy-01"}) as session,
        session.get(f"{traced.mock.url}/v1/models/m") as answer,
    ):
        assert answer.status == 200

    span = traced.exporter.get_finished_spans()[-1]
    assert span.name == "GET /v1/models/{model}"
    assert span.parent is None


async def test_spans_go_out_by_otlp(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[ExportTraceServiceRequest] = []

    async def collect(request: web.Request) -> web.Response:
        received.append(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response()

    app = web.Application()
    app.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{site.port}")
    async with (
        MockModel(Settings(port=0, control_port=0)) as mock,
        aiohttp.ClientSession() as session,
        session.post(f"{mock.url}/v1/chat/completions", json=BODY) as answer,
    ):
        await answer.read()
    await runner.cleanup()

    resource = received[0].resource_spans[0]
    service = {item.key: item.value.string_value for item in resource.resource.attributes}["service.name"]
    names = [span.name for part in received for spans in part.resource_spans[0].scope_spans for span in spans.spans]
    assert service == "mock-model"
    assert names == ["POST /v1/chat/completions"]


async def test_a_collector_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def hang(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)

    connections: list[asyncio.StreamWriter] = []
    collector = await asyncio.start_server(hang, "127.0.0.1", 0)
    port = collector.sockets[0].getsockname()[1]
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    async with aiohttp.ClientSession() as session:
        mock = MockModel(Settings(port=0, control_port=0))
        await mock.start()
        async with session.post(f"{mock.url}/v1/chat/completions", json=BODY) as answer:
            await answer.read()
        start = asyncio.get_running_loop().time()
        await mock.stop()
        took = asyncio.get_running_loop().time() - start
    collector.close()
    for writer in connections:
        writer.close()
    await collector.wait_closed()

    assert took < 6
