"""Backends and collectors behind TLS."""

import asyncio
import json
import ssl
from base64 import b64decode
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import trustme
from openai import AsyncOpenAI, InternalServerError

from gateway.settings import load_collector, load_otel
from gateway.telemetry.otlp_exporter import OtlpHttpExporter
from mock_model.serve import MockModel
from testkit.completions import CHAT
from tests.integration.collector import Collector
from tests.integration.gateways import StartGateway
from tests.integration.processes import Program, running
from tests.integration.tls import tls_before

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
TRUST = ("NETRC", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR")
OTLP = "OTEL_EXPORTER_OTLP_"
PROMPT: Any = CHAT


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    """Known to nobody who is not told."""
    return trustme.CA()


@pytest.fixture
def ours(authority: trustme.CA, tmp_path: Path) -> str:
    """The authority's certificate, as a file."""
    file = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(file))
    return str(file)


@pytest.fixture
def server(authority: trustme.CA) -> ssl.SSLContext:
    """For a server at `localhost`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    return context


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Empty; nor do proxies, passwords or trust of this machine count."""
    for name in (*PROXIES, *map(str.upper, PROXIES), *TRUST):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    return folder


def gateway_before(url: str, **environment: str) -> Any:  # noqa: ANN401
    """A gateway as a process: the authorities it trusts are read when it starts."""
    return running(HOST="127.0.0.1", PORT="0", GATEWAY_BACKEND_URLS=url, GATEWAY_CONNECT_TIMEOUT="30", **environment)


def sdk(gateway: Program) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="x", max_retries=0)


async def test_a_backend_behind_tls_is_called_retried_and_streamed(
    mock: MockModel, server: ssl.SSLContext, ours: str
) -> None:
    mock.set_faults([{"kind": "reset", "times": 1}])
    async with tls_before(mock.url, server) as url, gateway_before(url, SSL_CERT_FILE=ours) as gateway:
        await gateway.up()
        async with sdk(gateway) as client:
            for _ in range(3):
                raw = await client.chat.completions.with_raw_response.create(**PROMPT)
                assert raw.parse().choices[0].message.content
            large = PROMPT | {"messages": [{"role": "user", "content": "x" * 3_000_000}]}
            assert (await client.chat.completions.create(**large)).choices
            stream = await client.chat.completions.create(**PROMPT, stream=True)
            assert [chunk async for chunk in stream][-1].choices[0].finish_reason == "stop"

    assert [call.ended for call in mock.journal.calls] == ["fault", *["complete"] * 5]


async def test_a_certificate_that_is_not_trusted_is_told_as_what_it_is(mock: MockModel, server: ssl.SSLContext) -> None:
    async with tls_before(mock.url, server) as url, gateway_before(url) as gateway:
        await gateway.up()
        async with sdk(gateway) as client:
            with pytest.raises(InternalServerError) as caught:
                await client.chat.completions.create(**PROMPT)
        async with aiohttp.ClientSession() as session, session.get(f"{gateway.url}/health") as response:
            health = await response.json()

    assert caught.value.status_code == 502
    assert caught.value.code == "backend_connection_error"
    assert "certificate of backend-1 was not accepted: unable to get local issuer certificate" in str(caught.value)
    (backend,) = health["downstream"]["backends"]
    assert "certificate" in backend["last_error"]["message"]
    assert mock.journal.total == 0


async def test_a_certificate_for_another_host_is_told_without_its_name(
    mock: MockModel, server: ssl.SSLContext, ours: str
) -> None:
    async with tls_before(mock.url, server) as url:
        elsewhere = url.replace("localhost", "127.0.0.1")
        async with gateway_before(elsewhere, SSL_CERT_FILE=ours) as gateway:
            await gateway.up()
            async with sdk(gateway) as client:
                with pytest.raises(InternalServerError) as caught:
                    await client.chat.completions.create(**PROMPT)

    assert "The certificate of backend-1 was not accepted: it is for another host." in str(caught.value)


async def test_a_backend_that_closes_in_the_handshake_did_not_refuse(start_gateway: StartGateway) -> None:
    async def close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.close()

    async with await asyncio.start_server(close, "127.0.0.1", 0) as there:
        url = f"https://127.0.0.1:{there.sockets[0].getsockname()[1]}"
        gateway = await start_gateway(url, gateway_connect_timeout=30)
        answer = await gateway.chat()

    assert (answer.status, answer.error["code"]) == (502, "backend_connection_error")
    assert answer.error["message"] == "backend-1 closed the connection while it was being opened."


async def test_a_backend_without_tls_behind_an_https_url_is_told_as_what_it_is(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock.url.replace("http://", "https://"), gateway_connect_timeout=30)
    answer = await gateway.chat()

    assert (answer.status, answer.error["code"]) == (502, "backend_connection_error")
    assert answer.error["message"].startswith("The TLS handshake with backend-1 failed")


# The collector.


async def sent(exporter: OtlpHttpExporter) -> bool:
    """Whether an empty export was taken."""
    try:
        return await asyncio.to_thread(exporter.send, b"")
    finally:
        await asyncio.to_thread(exporter.shutdown)


@pytest.mark.parametrize("signal", ["", "TRACES_"])
async def test_spans_go_to_a_collector_that_asks_for_a_certificate(  # noqa: PLR0917
    authority: trustme.CA,
    ours: str,
    server: ssl.SSLContext,
    collector: Collector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signal: str,
) -> None:
    authority.configure_trust(server)
    server.verify_mode = ssl.CERT_REQUIRED
    own = authority.issue_cert("gateway")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    own.private_key_pem.write_to_path(str(key))
    own.cert_chain_pems[0].write_to_path(str(certificate))
    async with tls_before(collector.endpoint, server) as url:
        endpoint = f"{url}/v1/traces"
        assert not await sent(exporter(endpoint, timeout=1))
        monkeypatch.setenv(f"{OTLP}{signal}CERTIFICATE", ours)
        assert not await sent(exporter(endpoint, timeout=1))
        assert collector.bodies == []
        monkeypatch.setenv(f"{OTLP}{signal}CLIENT_CERTIFICATE", str(certificate))
        monkeypatch.setenv(f"{OTLP}{signal}CLIENT_KEY", str(key))
        assert await sent(exporter(endpoint))
    assert len(collector.bodies) == 1


def exporter(endpoint: str | None = None, timeout: float | None = None) -> OtlpHttpExporter:
    """As the gateway makes it."""
    reached = load_collector(endpoint) if endpoint else load_otel().collector
    return OtlpHttpExporter(endpoint, timeout, reached=reached)


async def test_the_name_and_password_of_netrc_are_sent(collector: Collector, home: Path) -> None:
    (home / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    assert await sent(exporter(f"http://127.0.0.1:{collector.port}/v1/traces"))

    came = [headers["authorization"] for headers in collector.headers]
    assert [b64decode(text.removeprefix("Basic ")) for text in came] == [b"me:secret"]


async def test_spans_go_by_the_proxy_of_the_environment(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{collector.port}")
    monkeypatch.setenv(f"{OTLP}ENDPOINT", "http://collector.invalid:4318")

    assert await sent(exporter())
    assert len(collector.bodies) == 1


async def test_the_name_and_password_in_the_collectors_url_are_sent(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{OTLP}ENDPOINT", f"http://me:secret@127.0.0.1:{collector.port}")
    assert await sent(exporter())

    came = [headers["authorization"] for headers in collector.headers]
    assert [b64decode(text.removeprefix("Basic ")) for text in came] == [b"me:secret"]


async def test_headers_and_compression_of_the_environment_are_heeded(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"{OTLP}ENDPOINT", f"http://127.0.0.1:{collector.port}")
    monkeypatch.setenv(f"{OTLP}HEADERS", "api-key=abc,x=y")
    monkeypatch.setenv(f"{OTLP}COMPRESSION", "gzip")
    assert await sent(exporter())

    (headers,) = collector.headers
    expected = {"api-key": "abc", "x": "y", "content-encoding": "gzip", "content-type": "application/x-protobuf"}
    assert {name: headers.get(name) for name in expected} == expected
    assert "OTel" in headers["user-agent"], json.dumps(headers)
