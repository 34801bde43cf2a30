"""Codings are decoded piece by piece, all parts of a body, and no further than the limit."""

import gzip
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.content_coding import (
    MAX_MEMBERS,
    PIECE,
    BrokenCoding,
    DecodedTooLarge,
    Decoder,
    UnknownCoding,
    coding_of,
)

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

LIMIT = 8 << 20
TEXT = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}' * 100


def raw_deflate(data: bytes) -> bytes:
    compress = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return compress.compress(data) + compress.flush()


ENCODERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", raw_deflate),
    ("zstd", zstd.compress),
]
ENCODED = pytest.mark.parametrize(
    ("coding", "encode"), ENCODERS, ids=["gzip", "x-gzip", "deflate as zlib", "deflate raw", "zstd"]
)


def decoded(coding: str, *pieces: bytes, limit: int = LIMIT) -> bytes:
    decoder = Decoder(coding, limit)
    return b"".join([*map(decoder.feed, pieces), decoder.end()])


@ENCODED
@pytest.mark.parametrize("text", [b"", b"x", TEXT, random.Random(1).randbytes(100_000), b"a" * 5_000_000])
def test_what_was_encoded_comes_out(coding: str, encode: Callable[[bytes], bytes], text: bytes) -> None:
    assert decoded(coding, encode(text)) == text


@ENCODED
def test_it_may_come_in_any_pieces(coding: str, encode: Callable[[bytes], bytes]) -> None:
    body = encode(TEXT)
    for size in (1, 2, 3, 7, 4095, 4096, 4097):
        assert decoded(coding, *(body[at : at + size] for at in range(0, len(body), size))) == TEXT


@pytest.mark.parametrize("level", range(10))
def test_both_forms_of_deflate_are_told_apart_at_every_level(level: int) -> None:
    for text in (b"", b"x", TEXT, random.Random(level).randbytes(70_000)):
        for bits in (*range(9, 16), *range(-15, -8)):
            compress = zlib.compressobj(level, wbits=bits)
            assert decoded("deflate", compress.compress(text) + compress.flush()) == text


@given(st.lists(st.binary(max_size=50), max_size=5), st.integers(1, 30))
def test_all_members_and_frames_are_read(texts: list[bytes], size: int) -> None:
    for coding, encode in (("gzip", gzip.compress), ("zstd", zstd.compress)):
        body = b"".join(encode(text) for text in texts)
        assert decoded(coding, body) == b"".join(texts)
        assert decoded(coding, *(body[at : at + size] for at in range(0, len(body), size))) == b"".join(texts)


def test_a_frame_that_is_to_be_skipped_is_skipped() -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert decoded("zstd", skipped + zstd.compress(b"one") + skipped + zstd.compress(b"two") + skipped) == b"onetwo"


def test_what_was_flushed_comes_out_at_once() -> None:
    for coding, bits in (("gzip", 31), ("deflate", 15), ("deflate", -15)):
        compress, decoder = zlib.compressobj(wbits=bits), Decoder(coding, LIMIT)
        for text in (b"one", b"two", TEXT):
            assert decoder.feed(compress.compress(text) + compress.flush(zlib.Z_SYNC_FLUSH)) == text
        assert decoder.feed(compress.flush()) == b""
        assert decoder.end() == b""
    encoder, decoder = zstd.ZstdCompressor(), Decoder("zstd", LIMIT)
    for text in (b"one", b"two", TEXT):
        assert decoder.feed(encoder.compress(text, encoder.FLUSH_BLOCK)) == text
    assert decoder.feed(encoder.flush()) == b""
    assert decoder.end() == b""


@ENCODED
def test_a_body_that_is_cut_off_is_broken_wherever_the_cut_is(coding: str, encode: Callable[[bytes], bytes]) -> None:
    body = encode(TEXT)
    for cut in range(1, len(body)):
        with pytest.raises(BrokenCoding, match="cut off"):
            decoded(coding, body[:cut])
    assert decoded(coding) == b""


@ENCODED
def test_what_is_not_in_the_coding_is_broken(coding: str, encode: Callable[[bytes], bytes]) -> None:
    flipped = bytearray(encode(TEXT))
    flipped[-1] ^= 1
    broken = [TEXT, encode(TEXT) + b"more", encode(TEXT) + b"\0", b"\xff" * 20]
    if encode is not raw_deflate:  # it has no checksum
        broken.append(bytes(flipped))
    for body in broken:
        with pytest.raises(BrokenCoding):
            decoded(coding, body)


@given(st.binary(max_size=60))
def test_no_bytes_fail_otherwise(data: bytes) -> None:
    for coding, encode in ENCODERS:
        for body in (data, encode(b"x") + data, encode(b"x")[:10] + data):
            try:
                decoded(coding, body)
            except (BrokenCoding, UnknownCoding):
                continue


@ENCODED
def test_the_limit_is_that_of_the_whole_decoded_body(coding: str, encode: Callable[[bytes], bytes]) -> None:
    body = encode(b"a" * 10_000)
    assert len(decoded(coding, body, limit=10_000)) == 10_000
    with pytest.raises(DecodedTooLarge, match="9999 bytes"):
        decoded(coding, body, limit=9_999)
    if coding != "deflate":
        assert len(decoded(coding, body * 3, limit=30_000)) == 30_000
        with pytest.raises(DecodedTooLarge):
            decoded(coding, body * 3, limit=29_999)


@ENCODED
def test_decoding_stops_at_the_limit(coding: str, encode: Callable[[bytes], bytes]) -> None:
    bomb = encode(b"\0" * (64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(DecodedTooLarge):
            decoded(coding, bomb, limit=2 << 20)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


@ENCODED
def test_no_piece_is_larger_than_said(coding: str, encode: Callable[[bytes], bytes]) -> None:
    pieces = list(Decoder(coding, LIMIT).pieces(encode(b"\0" * (5 << 20))))
    assert max(map(len, pieces)) <= PIECE
    assert sum(map(len, pieces)) == 5 << 20


def test_the_number_of_parts_is_bounded() -> None:
    empty = gzip.compress(b"")
    assert decoded("gzip", empty * MAX_MEMBERS) == b""
    with pytest.raises(BrokenCoding, match="100000 parts"):
        decoded("gzip", empty * (MAX_MEMBERS + 1))


@pytest.mark.parametrize("window", [23, 24])
def test_windows_of_zstd_are_bounded(window: int) -> None:
    options: dict[int, int] = {zstd.CompressionParameter.window_log: window}
    encoder = zstd.ZstdCompressor(options=options)
    body = encoder.compress(TEXT) + encoder.flush()
    if window == 23:
        assert decoded("zstd", body) == TEXT
        return
    with pytest.raises(UnknownCoding, match="8 MiB"):
        decoded("zstd", body)


@pytest.mark.parametrize(
    ("headers", "coding"),
    [
        ([], None),
        ([""], None),
        (["identity"], None),
        (["Identity "], None),
        (["gzip"], "gzip"),
        ([" GZip "], "gzip"),
        (["x-gzip"], "x-gzip"),
        (["deflate,"], "deflate"),
        (["zstd"], "zstd"),
    ],
)
def test_one_coding_may_be_named(headers: list[str], coding: str | None) -> None:
    assert coding_of(headers) == coding


@pytest.mark.parametrize(
    "headers", [["br"], ["compress"], ["gzip, gzip"], ["gzip", "gzip"], ["gzip, identity"], ["gz\u0131p"], ["a b"]]
)
def test_any_other_is_unknown(headers: list[str]) -> None:
    with pytest.raises(UnknownCoding):
        coding_of(headers)
