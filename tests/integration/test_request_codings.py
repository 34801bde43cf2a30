"""Compressed request bodies are decoded within the limits, and go out plain."""

import gzip
import json
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gateway.server import request_reader
from mock_model.serve import MockModel
from testkit.polling import until
from tests.integration.gateways import StartGateway, config
from tests.integration.recorder import Recorder
from tests.integration.test_bad_input import LIMIT, check_error, check_unharmed
from tests.integration.wire import BODY, chunked, dial, post, send

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LARGE = BODY[:-1] + b', "user": "' + b"0123456789" * 300_000 + b'"}'


def raw_deflate(data: bytes) -> bytes:
    compress = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compress.compress(data) + compress.flush()


ENCODED = pytest.mark.parametrize(
    ("coding", "encode"),
    [
        ("gzip", gzip.compress),
        ("GZIP", lambda data: gzip.compress(data[:50]) + gzip.compress(data[50:])),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("deflate", raw_deflate),
        ("zstd", zstd.compress),
        ("zstd", lambda data: zstd.compress(data[:50]) + zstd.compress(data[50:])),
        ("identity", bytes),
    ],
    ids=["gzip", "two members", "x-gzip", "zlib", "raw deflate", "zstd", "two frames", "identity"],
)


@ENCODED
async def test_the_backend_gets_it_plain(
    recorder: Recorder, start_gateway: StartGateway, coding: str, encode: Callable[[bytes], bytes]
) -> None:
    gateway = await start_gateway(recorder.url)
    headers = {"content-encoding": coding}
    body = encode(BODY)
    assert (await send(gateway, post(body, headers))).status == 200
    assert (await send(gateway, chunked(*(bytes([byte]) for byte in body), headers=headers))).status == 200
    large = encode(LARGE)
    assert (await send(gateway, post(large, headers))).status == 200
    async with dial(gateway.url) as wire:
        await wire.send(post(b"", headers | {"content-length": str(len(body)), "expect": "100-continue"}))
        assert await wire.head() == (100, {})
        await wire.send(body)
        assert (await wire.answer()).status == 200
    assert [seen.body for seen in recorder.seen] == [BODY, BODY, LARGE, BODY]
    for seen in recorder.seen:
        assert seen.header("content-encoding") is None
        assert seen.header("content-length") == str(len(seen.body))
    assert gateway.parts.byte_budget.held == 0


async def test_the_model_is_set_in_it(recorder: Recorder, start_gateway: StartGateway, tmp_path: Path) -> None:
    routes = f"""
backends:
  one: {{url: "{recorder.url}"}}
routes:
  - {{model: "*", targets: [{{backend: one, model: small-model}}]}}
"""
    gateway = await start_gateway(gateway_config=config(tmp_path, routes))
    assert (await send(gateway, post(zstd.compress(BODY), {"content-encoding": "zstd"}))).status == 200
    assert json.loads(recorder.seen[0].body) == json.loads(BODY) | {"model": "small-model"}


@ENCODED
async def test_the_limit_is_that_of_the_plain_body(
    mock: MockModel, start_gateway: StartGateway, coding: str, encode: Callable[[bytes], bytes]
) -> None:
    gateway = await start_gateway(mock, gateway_max_body_bytes=LIMIT)
    headers = {"content-encoding": coding}
    whole = BODY + b" " * (LIMIT - len(BODY))
    check_error(await send(gateway, post(encode(whole + b" "), headers)), 413, "request_too_large")
    check_error(await send(gateway, chunked(encode(whole + b" "), headers=headers)), 413, "request_too_large")
    if coding != "identity":
        check_error(await send(gateway, post(encode(b" " * (8 << 20)), headers)), 413, "request_too_large")
    await check_unharmed(gateway, mock)
    assert (await send(gateway, post(encode(whole), headers))).status == 200


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("gzip", BODY),
        ("gzip", gzip.compress(BODY)[:-1]),
        ("gzip", gzip.compress(BODY) + b"more"),
        ("deflate", zlib.compress(BODY)[:-5]),
        ("deflate", BODY),
        ("zstd", zstd.compress(BODY)[:-1]),
        ("zstd", BODY),
        ("zstd", gzip.compress(BODY)),
    ],
)
async def test_a_broken_one_is_refused(mock: MockModel, start_gateway: StartGateway, coding: str, body: bytes) -> None:
    gateway = await start_gateway(mock)
    for data in (post(body, {"content-encoding": coding}), chunked(body, headers={"content-encoding": coding})):
        check_error(await send(gateway, data), 400, "invalid_request", "content-encoding")
    await check_unharmed(gateway, mock)


async def test_an_empty_one_is_an_empty_body(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    for body in (b"", gzip.compress(b"")):
        check_error(await send(gateway, post(body, {"content-encoding": "gzip"})), 400, "invalid_json")
    await check_unharmed(gateway, mock)


@pytest.mark.parametrize("coding", ["br", "compress", "gzip, gzip", "gzip, identity", "aes128gcm", "m4rk3d"])
async def test_any_other_coding_is_refused_before_the_body(
    mock: MockModel, start_gateway: StartGateway, coding: str
) -> None:
    gateway = await start_gateway(mock)
    async with dial(gateway.url) as wire:
        await wire.send(post(b"", {"content-encoding": coding, "content-length": "100", "expect": "100-continue"}))
        answer = await wire.answer()
    check_error(answer, 415, "unsupported_media_type", "content-encoding")
    assert "gzip, deflate, zstd" in str(answer.error["message"])
    await check_unharmed(gateway, mock)


async def test_a_window_of_more_than_8_mib_is_refused(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    options: dict[int, int] = {zstd.CompressionParameter.window_log: 24}
    encoder = zstd.ZstdCompressor(options=options)
    body = encoder.compress(BODY) + encoder.flush()
    answer = await send(gateway, post(body, {"content-encoding": "zstd"}))
    check_error(answer, 415, "unsupported_media_type", "content-encoding")
    await check_unharmed(gateway, mock)


async def test_what_is_decoded_is_held_as_it_comes(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, gateway_max_buffered_bytes=8 << 20)
    body = gzip.compress(b" " * (16 << 20))
    answer = await send(gateway, post(body, {"content-encoding": "gzip"}))
    assert (answer.status, answer.error["code"]) == (503, "gateway_overloaded")
    await check_unharmed(gateway, mock)

    compress = zlib.compressobj(wbits=31)
    flushed = compress.compress(b" " * (1 << 20)) + compress.flush(zlib.Z_SYNC_FLUSH)
    async with dial(gateway.url) as wire:
        await wire.send(chunked(flushed, end=b"", headers={"content-encoding": "gzip"}))
        await until(lambda: gateway.parts.byte_budget.held == 1 << 20)


async def test_a_large_one_is_decoded_off_the_event_loop(
    recorder: Recorder, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = await start_gateway(recorder.url)
    threads: list[int] = []
    gather = request_reader._gather

    def seen(source: Iterator[bytes]) -> bytes | None:
        threads.append(threading.get_ident())
        return gather(source)

    monkeypatch.setattr(request_reader, "_gather", seen)
    assert (await send(gateway, post(zstd.compress(BODY), {"content-encoding": "zstd"}))).status == 200
    assert threads == []
    for body in (zstd.compress(LARGE), zstd.compress(b"") * 1_000 + zstd.compress(LARGE)):
        assert (await send(gateway, post(body, {"content-encoding": "zstd"}))).status == 200
        assert threads
        assert threading.get_ident() not in threads
        threads.clear()
    assert [seen.body for seen in recorder.seen] == [BODY, LARGE, LARGE]
