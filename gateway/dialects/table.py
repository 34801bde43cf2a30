"""The table of dialects: which one reads a path."""

from gateway.dialects.dialect import Dialect
from gateway.dialects.openai.chat import OpenAIChat
from gateway.dialects.openai.responses import OpenAIResponses
from gateway.dialects.passed_through import COUNT_TOKENS, OPERATIONS, PassedThrough

_CHAT = OpenAIChat()
DIALECTS: tuple[Dialect, ...] = (
    _CHAT,
    OpenAIResponses(),
    PassedThrough(OPERATIONS, _CHAT),
    PassedThrough(COUNT_TOKENS, _CHAT),
)
"""The first one also words the errors of paths that belong to none."""

BY_PATH = {path: dialect for dialect in DIALECTS for path in dialect.operations}


def dialect_of(path: str) -> Dialect:
    """Return the dialect of a path."""
    return BY_PATH.get(path, DIALECTS[0])
