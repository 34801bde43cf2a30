"""Content codings (RFC 9110, 8.4.1; zstd: RFC 9659): decoding a body piece by piece, within a limit.

No I/O and no clock. The messages of the errors are predicates: "The request's body is not valid gzip."
"""

import sys
import zlib
from collections.abc import Iterable, Iterator

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

CODINGS = frozenset({"gzip", "x-gzip", "deflate", "zstd"})
"""What `Decoder` decodes; `x-gzip` is another name of `gzip`."""
WINDOW_LOG = 23
"""zstd windows of up to 8 MiB, the most that RFC 9659 lets a sender use."""
MAX_MEMBERS = 100_000
"""gzip members or zstd frames of one body; each costs microseconds, however little it holds."""
PIECE = 1 << 20
"""Bytes of one decoded piece, at most."""
_SLICE = 4096
"""Bytes that are decoded at once. What follows a member is copied for each one, so a slice must be short."""
_ZLIB_HEADER = 2
"""Bytes that tell zlib's format from raw deflate."""


class CodingError(Exception):
    """A body cannot be decoded."""


class BrokenCoding(CodingError):
    """It is not in the coding that it names, or is cut off."""


class UnknownCoding(CodingError):
    """It is in a coding, or in a variant of one, that is not decoded here."""


class DecodedTooLarge(CodingError):
    """Decoded, it exceeds the limit."""


def coding_of(values: Iterable[str]) -> str | None:
    """Return the one coding that the `content-encoding` headers name, or None for `identity` or no header.

    Raises:
        UnknownCoding: they name several, or one that is not decoded here.
    """
    names = [name for value in values for part in value.split(",") if (name := part.strip().lower())]
    if not names or names == ["identity"]:
        return None
    if len(names) > 1:
        raise UnknownCoding("has more than one content-encoding")
    if names[0] not in CODINGS:
        raise UnknownCoding("has a content-encoding other than gzip, deflate, zstd and identity")
    return names[0]


class Decoder:
    """Decodes one body of any number of gzip members or zstd frames, or of one deflate stream (zlib's format or raw).

    What has arrived comes out at once, as far as the sender has flushed it. After an error it must not be used again.

    Args:
        coding: one of `CODINGS`.
        limit: bytes of the decoded body; decoding stops as soon as it exceeds them.

    Attributes:
        decoded: bytes so far.
        members: gzip members or zstd frames so far.
    """

    __slots__ = ("_begun", "_coding", "_limit", "_member", "decoded", "members")

    def __init__(self, coding: str, limit: int) -> None:
        self._coding = coding.removeprefix("x-")
        self._limit = limit
        self._member: _Zlib | _Zstd | None = None
        self._begun = b""
        self.decoded = 0
        self.members = 0

    def feed(self, data: bytes) -> bytes:
        """Return what `data` decodes to.

        Raises:
            BrokenCoding: it is not in the coding.
            UnknownCoding: it needs a zstd window of more than 8 MiB.
            DecodedTooLarge: the body exceeds the limit.
        """
        return b"".join(self.pieces(data))

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """Yield what `data` decodes to in pieces of at most `PIECE` bytes, some of them empty: each is little work.

        Raises:
            CodingError: as `feed`.
        """
        for start in range(0, len(data), _SLICE):
            rest = data[start : start + _SLICE]
            more = True
            while more:
                piece, rest, more = self._decode(rest)
                self.decoded += len(piece)
                if self.decoded > self._limit:
                    raise DecodedTooLarge(f"is larger than {self._limit} bytes when decoded")
                yield piece

    def end(self) -> bytes:
        """Return the rest when all has been fed: it is empty, since `feed` holds nothing back.

        Raises:
            BrokenCoding: the body is cut off.
        """
        if self._begun or (self._member is not None and not self._member.eof):
            raise BrokenCoding(f"is cut off: its {self._coding} has no end")
        return b""

    def _decode(self, data: bytes) -> tuple[bytes, bytes, bool]:
        """Return the next piece, the bytes that are left to decode, and whether there is more to come from them."""
        try:
            member = self._member
            if member is None or member.eof:
                data = self._begun + data
                member = self._member = self._next_member(data)
                self._begun = data if member is None else b""
                if member is None:
                    return b"", b"", False
            piece = member.decompress(data, min(PIECE, self._limit - self.decoded + 1))
        except (zlib.error, zstd.ZstdError) as error:
            if "too much memory" in str(error):
                raise UnknownCoding("needs a zstd window of more than 8 MiB") from None
            raise BrokenCoding(f"is not valid {self._coding}") from None
        return piece, member.rest, bool(member.rest) or member.pending

    def _next_member(self, data: bytes) -> "_Zlib | _Zstd | None":
        """Return the decoder of the member that `data` begins, or None if more of it is needed to tell."""
        if self._member is not None and self._coding == "deflate":
            raise BrokenCoding("goes on after the end of its deflate")
        if self._coding == "deflate" and len(data) < _ZLIB_HEADER:
            return None
        self.members += 1
        if self.members > MAX_MEMBERS:
            raise BrokenCoding(f"has more than {MAX_MEMBERS} parts in {self._coding}")
        if self._coding == "zstd":
            return _Zstd()
        if self._coding == "gzip":
            return _Zlib(16 + zlib.MAX_WBITS)
        return _Zlib(zlib.MAX_WBITS if _is_zlib(data) else -zlib.MAX_WBITS)


class _Zlib:
    """A gzip member or a deflate stream.

    Attributes:
        eof: its end has come.
        rest: bytes that were not used: after its end, or since the piece was full.
        pending: more can come out without further bytes.
    """

    __slots__ = ("_decompress", "eof", "pending", "rest")

    def __init__(self, window_bits: int) -> None:
        self._decompress = zlib.decompressobj(window_bits)
        self.eof = self.pending = False
        self.rest = b""

    def decompress(self, data: bytes, most: int) -> bytes:
        """Return at most `most` bytes. Raises: zlib.error."""
        inner = self._decompress
        piece = inner.decompress(data, most)
        self.eof = inner.eof
        self.rest = inner.unused_data if self.eof else inner.unconsumed_tail
        self.pending = len(piece) == most and not self.eof
        return piece


class _Zstd:
    """A zstd frame. Attributes as of `_Zlib`."""

    __slots__ = ("_decompress", "eof", "pending", "rest")

    def __init__(self) -> None:
        self._decompress = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
        self.eof = self.pending = False
        self.rest = b""

    def decompress(self, data: bytes, most: int) -> bytes:
        """Return at most `most` bytes. Raises: zstd.ZstdError."""
        inner = self._decompress
        piece = inner.decompress(data, most)
        self.eof = inner.eof
        self.rest = inner.unused_data if self.eof else b""
        self.pending = not inner.needs_input and not self.eof
        return piece


def _is_zlib(data: bytes) -> bool:
    """Return whether data begins like zlib's format (RFC 1950): raw deflate never has these bits by any encoder."""
    return data[0] & 0x8F == 8 and int.from_bytes(data[:_ZLIB_HEADER], "big") % 31 == 0  # noqa: PLR2004
