"""Speech: sound for a text, in pieces."""

import struct
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from mock_model.answer import Answer, Event
from mock_model.draws import stream
from mock_model.text import Writer, count_tokens

RATE = 24_000
"""Samples per second: 16 bits, mono."""
PIECE = 480
"""Samples in a piece: 20 ms."""
SAMPLE = 2
"""Bytes."""
QUIET = 64
"""By how much the noise is softened."""


def wav_header(size: int) -> bytes:
    """Return what stands before `size` bytes of samples in a WAV file."""
    kind = struct.pack("<IHHIIHH", 16, 1, 1, RATE, RATE * SAMPLE, SAMPLE, 8 * SAMPLE)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + kind + b"data" + struct.pack("<I", size)


def noise(seed: int, fingerprint: str, piece: int) -> bytes:
    """Return the samples of one piece."""
    raw = stream(seed, "speech", fingerprint, piece, length=SAMPLE * PIECE)
    return struct.pack(f"<{PIECE}h", *(number // QUIET for number in struct.unpack(f"<{PIECE}h", raw)))


class SpeechRequest(msgspec.Struct):
    """The body of `POST /v1/audio/speech`; fields not named here are ignored."""

    input: Annotated[str, Meta(min_length=1)]
    model: str | None = None
    voice: Any = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] | None = None

    @property
    def stream(self) -> bool:
        """Sound comes in pieces, but they are no events."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return noise, a piece for each token of a text; only `wav` and `pcm` are what their media type says."""
        form = self.response_format or "mp3"
        pieces = [noise(writer.seed, fingerprint, number) for number in range(writer.length)]
        if form == "wav":
            pieces[0] = wav_header(SAMPLE * PIECE * len(pieces)) + pieces[0]
        return Answer(
            media_type="audio/mpeg" if form == "mp3" else f"audio/{form}",
            events=tuple(Event(piece, "token", step=True) for piece in pieces),
            steps=len(pieces),
            input_tokens=count_tokens((self.input,)),
        )
