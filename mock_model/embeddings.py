"""Embeddings, as numbers or as base64 of little-endian float32."""

import struct
from base64 import b64encode
from math import sqrt
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mock_model.answer import Answer, document
from mock_model.completions import split, tokens_of
from mock_model.draws import stream
from mock_model.errors import InvalidRequest
from mock_model.text import Writer

DIMENSIONS = 64
MAX_INPUTS = 2048


def vector(seed: int, item: str | list[int], dimensions: int) -> list[float]:
    """Return the embedding of one input, a vector of length 1: the same wherever the input stands."""
    raw = stream(seed, "embedding", item, length=2 * dimensions)
    numbers = [number + 0.5 for number in struct.unpack(f"<{dimensions}h", raw)]
    norm = sqrt(sum(number * number for number in numbers))
    return [number / norm for number in numbers]


class EmbeddingRequest(msgspec.Struct):
    """The body of `POST /v1/embeddings`; fields not named here are ignored."""

    input: str | list[str | int | list[int]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=4096)] | None = None

    @property
    def stream(self) -> bool:
        """Embeddings are never streamed."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return one embedding for each input."""
        try:
            inputs = split(self.input)
        except ValueError as error:
            raise InvalidRequest(f"input: {error}", param="input") from None
        if len(inputs) > MAX_INPUTS:
            raise InvalidRequest(f"input: more than {MAX_INPUTS} inputs", param="input")
        data = []
        for index, item in enumerate(inputs):
            embedding: Any = vector(writer.seed, item, self.dimensions or DIMENSIONS)
            if self.encoding_format == "base64":
                embedding = b64encode(struct.pack(f"<{len(embedding)}f", *embedding)).decode()
            data.append({"object": "embedding", "index": index, "embedding": embedding})
        count = tokens_of(inputs)
        usage = {"prompt_tokens": count, "total_tokens": count}
        body = document({"object": "list", "data": data, "model": model, "usage": usage})
        return Answer(body=body, steps=1, input_tokens=count)
