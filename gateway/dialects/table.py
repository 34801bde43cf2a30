"""The table of dialects: which one reads a path."""

from gateway.dialects.anthropic import AnthropicMessages
from gateway.dialects.dialect import Dialect
from gateway.dialects.openai.chat import OpenAIChat
from gateway.dialects.openai.responses import OpenAIResponses
from gateway.dialects.passed_through import COUNT_TOKENS, OPERATIONS, PassedThrough

_CHAT, _MESSAGES = OpenAIChat(), AnthropicMessages()
DIALECTS: tuple[Dialect, ...] = (
    _CHAT,
    OpenAIResponses(),
    _MESSAGES,
    PassedThrough(OPERATIONS, _CHAT),
    PassedThrough(COUNT_TOKENS, _MESSAGES),
)
"""The first one also words the errors of paths that belong to none."""

BY_PATH = {path: dialect for dialect in DIALECTS for path in dialect.operations}
