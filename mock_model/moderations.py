"""Moderations: how harmful a text is, which here is never."""

from typing import Any

import msgspec

from mock_model.answer import Answer, document
from mock_model.draws import draw
from mock_model.errors import InvalidRequest
from mock_model.text import Writer

CATEGORIES = """
    harassment harassment/threatening hate hate/threatening illicit illicit/violent self-harm self-harm/instructions
    self-harm/intent sexual sexual/minors violence violence/graphic
""".split()  # noqa: SIM905
HARMLESS = 0.01
"""All scores are below."""
MAX_INPUTS = 2048


class ModerationRequest(msgspec.Struct):
    """The body of `POST /v1/moderations`; fields not named here are ignored."""

    input: str | list[str | dict[str, Any]]
    model: str | None = None

    @property
    def stream(self) -> bool:
        """Moderations are never streamed."""
        return False

    def answer(self, model: str, fingerprint: str, writer: Writer) -> Answer:
        """Return a result for each text, or one for a list of parts (texts and images)."""
        inputs = [self.input] if isinstance(self.input, str) else self.input
        if not inputs or len(inputs) > MAX_INPUTS:
            raise InvalidRequest(f"input: it must hold 1 to {MAX_INPUTS} texts", param="input")
        if any(isinstance(item, dict) for item in inputs):
            inputs = [str(inputs)]
        results = [_result(writer.seed, item) for item in inputs]
        return Answer(body=document({"id": "modr-" + fingerprint, "model": model, "results": results}), steps=1)


def _result(seed: int, item: object) -> dict[str, Any]:
    return {
        "flagged": False,
        "categories": dict.fromkeys(CATEGORIES, False),
        "category_scores": {name: HARMLESS * draw(seed, "moderation", name, item) for name in CATEGORIES},
    }
