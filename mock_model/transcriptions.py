"""Transcriptions and translations: a text for a sound, in every form that the API knows."""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import msgspec

from mock_model.answer import Answer, Event, data_event, document
from mock_model.draws import fingerprint as mark_of
from mock_model.text import Passage, Writer

PLAIN = "text/plain; charset=utf-8"
TOKENS_PER_SECOND = 10
"""Of sound."""
BYTES_PER_SECOND = 32_000
"""Of sound in 16 bits, mono, 16 kHz; whatever the file is."""


class TranscriptionRequest(msgspec.Struct):
    """The form of `POST /v1/audio/transcriptions`; fields not named here are ignored."""

    task: ClassVar[str] = "transcribe"

    file: bytes
    model: str | None = None
    response_format: Literal["json", "text", "srt", "verbose_json", "vtt"] | None = None
    stream: bool | None = None

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:  # noqa: ARG002
        """Return a text: the same for the same file, however the form's boundary reads.

        As at OpenAI its usage is in tokens in a stream, and where the model is one like `gpt-4o-transcribe`, else in
        seconds.
        """
        passage = writer.write(mark_of(self.task, self.file), 0, None)
        seconds = -(-len(self.file) // BYTES_PER_SECOND)
        count = len(passage.tokens)
        sound = TOKENS_PER_SECOND * seconds
        tokens = {"type": "tokens", "input_tokens": sound, "output_tokens": count, "total_tokens": sound + count}
        if self.stream:
            return Answer(events=tuple(_events(passage, tokens)), steps=count, output_tokens=count)
        usage = tokens if "transcribe" in model else {"type": "duration", "seconds": seconds}
        body, media_type = self._body(passage.text, seconds, usage)
        return Answer(body=body, media_type=media_type, steps=count, output_tokens=count)

    def _body(self, text: str, seconds: int, usage: dict[str, Any]) -> tuple[bytes, str]:
        """Return the answer in the form that is asked for, and its media type ("": JSON)."""
        match self.response_format:
            case "text":
                return f"{text}\n".encode(), PLAIN
            case "srt":
                return f"1\n{_clock(0, ',')} --> {_clock(seconds, ',')}\n{text}\n\n".encode(), PLAIN
            case "vtt":
                return f"WEBVTT\n\n{_clock(0, '.')} --> {_clock(seconds, '.')}\n{text}\n\n".encode(), PLAIN
            case "verbose_json":
                segment: dict[str, Any] = {"id": 0, "seek": 0, "start": 0.0, "end": float(seconds), "text": text}
                segment |= {"tokens": [], "temperature": 0.0, "avg_logprob": -0.1}
                segment |= {"compression_ratio": 1.0, "no_speech_prob": 0.0}
                head = {"task": self.task, "language": "english", "duration": float(seconds)}
                return document({**head, "text": text, "segments": [segment], "usage": usage}), ""
            case _:
                return document({"text": text, "usage": usage}), ""


class TranslationRequest(TranscriptionRequest):
    """The form of `POST /v1/audio/translations`."""

    task = "translate"


def _events(passage: Passage, usage: dict[str, Any]) -> Iterator[Event]:
    for token in passage.tokens:
        yield data_event({"type": "transcript.text.delta", "delta": token}, "token", step=True)
    yield data_event({"type": "transcript.text.done", "text": passage.text, "usage": usage}, "finish")


def _clock(seconds: int, point: str) -> str:
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}{point}000"
