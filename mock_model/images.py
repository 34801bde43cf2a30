"""Images: tiny ones, for a text or for another image."""

import struct
import zlib
from base64 import b64encode
from typing import Annotated

import msgspec
from msgspec import Meta

from mock_model.answer import CREATED, Answer, document
from mock_model.draws import stream
from mock_model.text import Writer, count_tokens

SIDE = 8
"""Pixels."""
Number = Annotated[int, Meta(ge=1, le=10)]


def png(pixels: bytes) -> bytes:
    """Return an image of `SIDE` times `SIDE` pixels, three bytes each."""
    row = 3 * SIDE
    rows = b"".join(b"\0" + pixels[start : start + row] for start in range(0, row * SIDE, row))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


class ImageRequest(msgspec.Struct):
    """The body of `POST /v1/images/generations`; fields not named here are ignored."""

    prompt: Annotated[str, Meta(min_length=1)]
    model: str | None = None
    n: Number | None = None

    @property
    def stream(self) -> bool:
        """Images are not streamed here."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return `n` images as base64."""
        return images(self.prompt, self.n or 1, fingerprint, writer)


class ImageEditRequest(msgspec.Struct):
    """The form of `POST /v1/images/edits`; fields not named here are ignored."""

    image: bytes
    prompt: Annotated[str, Meta(min_length=1)]
    model: str | None = None
    n: Number | None = None

    @property
    def stream(self) -> bool:
        """Images are not streamed here."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return `n` images as base64."""
        return images(self.prompt, self.n or 1, fingerprint, writer)


def images(prompt: str, number: int, fingerprint: str, writer: Writer) -> Answer:
    """Return so many images as base64."""
    size = 3 * SIDE * SIDE
    drawn = (png(stream(writer.seed, "image", fingerprint, index, length=size)) for index in range(number))
    input_tokens = count_tokens((prompt,))
    usage = {"input_tokens": input_tokens, "output_tokens": number, "total_tokens": input_tokens + number}
    data = [{"b64_json": b64encode(image).decode()} for image in drawn]
    body = document({"created": CREATED, "data": data, "output_format": "png", "usage": usage})
    return Answer(body=body, steps=1, input_tokens=input_tokens, output_tokens=number)
