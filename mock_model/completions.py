"""Completions: one or more prompts, text in and text out."""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.answer import CREATED, DONE, Answer, Event, data_event, document
from mock_model.decoding import StreamOptions
from mock_model.errors import InvalidRequest
from mock_model.text import Passage, Writer, count_tokens

Prompt = str | list[str | int | list[int]] | None
MAX_CHOICES = 2048


def split(prompt: Any) -> list[str | list[int]]:  # noqa: ANN401
    """Return the prompts (or inputs) in a value that holds one or several, as texts or as tokens.

    Raises:
        ValueError: it mixes them, or holds none.
    """
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if all(isinstance(item, int) for item in prompt):
            return [prompt]
        if all(isinstance(item, str) for item in prompt) or all(isinstance(item, list) for item in prompt):
            return prompt
    raise ValueError(
        "it must be a text, a list of texts, a list of tokens, or a list of lists of tokens, and not empty"
    )


def tokens_of(prompts: list[str | list[int]]) -> int:
    """Return the tokens of prompts, which may be tokens already."""
    return sum(count_tokens((prompt,)) if isinstance(prompt, str) else len(prompt) for prompt in prompts)


class CompletionRequest(msgspec.Struct):
    """The body of `POST /v1/completions`; fields not named here are ignored."""

    prompt: Prompt = None
    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    echo: bool | None = None

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return the model's answer: `n` choices for each prompt."""
        try:
            prompts = split("<|endoftext|>" if self.prompt is None else self.prompt)
        except ValueError as error:
            raise InvalidRequest(f"prompt: {error}", param="prompt") from None
        echoed = [prompt for prompt in prompts for _ in range(self.n or 1)]
        if len(echoed) > MAX_CHOICES:
            raise InvalidRequest(f"prompt: more than {MAX_CHOICES} choices", param="prompt")
        passages = [writer.write(fingerprint, index, self.max_tokens) for index in range(len(echoed))]
        if self.echo:
            passages = [
                Passage([prompt, *passage.tokens], passage.cut) if isinstance(prompt, str) else passage
                for prompt, passage in zip(echoed, passages, strict=True)
            ]
        input_tokens = tokens_of(prompts)
        output_tokens = sum(len(passage.tokens) for passage in passages)
        usage = {
            "prompt_tokens": input_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": input_tokens + output_tokens,
        }
        reasons = tuple("length" if passage.cut else "stop" for passage in passages)
        head = {"id": "cmpl-" + fingerprint, "object": "text_completion", "created": CREATED, "model": model}
        body, events = b"", tuple[Event, ...]()
        if self.stream:
            events = tuple(self._events(passages, reasons, head, usage))
        else:
            choices = [
                {"index": index, "text": passage.text, "logprobs": None, "finish_reason": reason}
                for index, (passage, reason) in enumerate(zip(passages, reasons, strict=True))
            ]
            body = document({**head, "choices": choices, "usage": usage, "system_fingerprint": "fp_mock"})
        return Answer(
            body=body,
            events=events,
            steps=max(len(passage.tokens) for passage in passages),
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            finish_reasons=reasons,
        )

    def _events(
        self, passages: list[Passage], reasons: tuple[str, ...], head: Mapping[str, Any], usage: Mapping[str, Any]
    ) -> Iterator[Event]:
        counted = self.stream_options is not None and bool(self.stream_options.include_usage)
        extra = {"usage": None} if counted else {}

        def chunk(index: int, text: str, reason: str | None = None) -> dict[str, Any]:
            piece = {"index": index, "text": text, "logprobs": None, "finish_reason": reason}
            return {**head, "choices": [piece], **extra}

        for tokens in zip_longest(*(passage.tokens for passage in passages)):
            step = True
            for index, token in enumerate(tokens):
                if token is not None:
                    yield data_event(chunk(index, token), "token", step=step)
                    step = False
        for index, reason in enumerate(reasons):
            yield data_event(chunk(index, "", reason), "finish")
        if counted:
            yield data_event({**head, "choices": [], "usage": usage}, "usage")
        yield DONE
