"""Rerank and score, as vLLM answers them: how well texts fit another one."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.answer import CREATED, Answer, document
from mock_model.draws import draw
from mock_model.errors import InvalidRequest
from mock_model.text import Writer, count_tokens, texts_in

MAX_DOCUMENTS = 10_000


def _score(seed: int, query: str, text: str) -> float:
    return draw(seed, "score", query, text)


class RerankRequest(msgspec.Struct):
    """The body of `POST /v1/rerank`; fields not named here are ignored."""

    query: str
    documents: Annotated[list[str | dict[str, Any]], Meta(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str | None = None
    top_n: Annotated[int, Meta(ge=0)] | None = None

    @property
    def stream(self) -> bool:
        """Ranks are never streamed."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return the documents, the best first, at most `top_n` (0: all)."""
        texts = ["".join(texts_in(document)) for document in self.documents]
        results: list[dict[str, Any]] = [
            {"index": index, "document": {"text": text}, "relevance_score": _score(writer.seed, self.query, text)}
            for index, text in enumerate(texts)
        ]
        results.sort(key=lambda result: (-result["relevance_score"], result["index"]))
        count = count_tokens((self.query, *texts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        head = {"id": "rerank-" + fingerprint, "model": model, "usage": usage}
        return Answer(body=document({**head, "results": results[: self.top_n or None]}), steps=1, input_tokens=count)


class ScoreRequest(msgspec.Struct):
    """The body of `POST /v1/score`; fields not named here are ignored."""

    text_1: str | list[str]
    text_2: str | list[str]
    model: str | None = None

    @property
    def stream(self) -> bool:
        """Scores are never streamed."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return a score for each pair; a single first text goes with all second ones."""
        first = [self.text_1] if isinstance(self.text_1, str) else self.text_1
        second = [self.text_2] if isinstance(self.text_2, str) else self.text_2
        if len(first) == 1:
            first = first * len(second)
        if not second or len(first) != len(second) or len(first) > MAX_DOCUMENTS:
            raise InvalidRequest(
                f"text_1 must be one text or as many as text_2, which has 1 to {MAX_DOCUMENTS}", param="text_1"
            )
        data = [
            {"index": index, "object": "score", "score": _score(writer.seed, one, other)}
            for index, (one, other) in enumerate(zip(first, second, strict=True))
        ]
        count = count_tokens((*first, *second))
        usage = {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0, "prompt_tokens_details": None}
        head = {"id": "score-" + fingerprint, "object": "list", "created": CREATED, "model": model}
        return Answer(body=document({**head, "data": data, "usage": usage}), steps=1, input_tokens=count)
