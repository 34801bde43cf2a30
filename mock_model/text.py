"""The words of an answer, and how many tokens a prompt has."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from mock_model.draws import stream
from mock_model.sample import sample

# Some words are not ASCII: they show a relay that cuts inside a character.
VOCABULARY = tuple(
    """
    the a one some every and or but then while near over under after before with without from into toward
    river mountain harbour garden window letter lantern bridge forest morning evening winter summer market island
    engine signal pattern number question answer reason story voice colour shadow stone paper glass silver copper
    small quiet bright heavy early gentle hidden narrow open patient ready steady sudden plain clear warm
    walks turns opens carries follows gathers keeps leaves measures moves reaches returns rises settles waits writes
    slowly again always almost often once perhaps quite rather seldom soon still together twice very well
    café naïve Größe señal été жизнь 東京 words → … 🙂 ½
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Passage:
    """What the model writes for one choice: its tokens, and whether a limit ended it."""

    tokens: list[str]
    cut: bool

    @property
    def text(self) -> str:
        """The whole of it."""
        return "".join(self.tokens)


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes the answers: the same for the same seed, request and choice.

    Attributes:
        seed: decides every word.
        length: tokens of a text that no limit ends.
    """

    seed: int
    length: int

    def write(self, fingerprint: str, choice: int, limit: int | None) -> Passage:
        """Return a text of at most `limit` tokens."""
        count = self.length if limit is None else min(limit, self.length)
        numbers = stream(self.seed, fingerprint, choice, length=count)
        tokens = [" " + VOCABULARY[number % len(VOCABULARY)] for number in numbers]
        tokens[0] = tokens[0].lstrip()
        return Passage(tokens, cut=count < self.length)

    def write_json(self, schema: Any, limit: int | None = None) -> Passage:  # noqa: ANN401
        """Return JSON that fits a schema, in at most `limit` tokens."""
        tokens = fragments(msgspec.json.encode(sample(schema)).decode())
        return Passage(tokens[:limit], cut=limit is not None and limit < len(tokens))

    def name(self, prefix: str, *parts: object) -> str:
        """Return an id such as `call_6f1e...`."""
        return prefix + stream(self.seed, "id", prefix, *parts, length=12).hex()


def fragments(text: str, size: int = 6) -> list[str]:
    """Return JSON in tokens of `size` characters."""
    return [text[start : start + size] for start in range(0, len(text), size)]


def count_tokens(texts: Iterable[str]) -> int:
    """Return the number of tokens of a prompt, four characters each; at least one."""
    return max(1, -(-sum(map(len, texts)) // 4))


def texts_in(value: Any) -> Iterable[str]:  # noqa: ANN401
    """Return every `text` and `content` inside the messages or items of a request."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
    elif isinstance(value, dict):
        for key in ("content", "text", "output", "arguments"):
            yield from texts_in(value.get(key))
