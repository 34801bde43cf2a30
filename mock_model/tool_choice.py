"""Which function the model calls."""

from collections.abc import Sequence
from typing import Any

from mock_model.errors import InvalidRequest


def chosen(choice: str | dict[str, Any] | None, names: Sequence[str], *, answered: bool) -> str | None:
    """Return the function to call, or None: the one that is asked for, else the first that is allowed.

    Args:
        choice: `tool_choice` of chat completions or responses, which say the same in different places.
        names: of the functions there are.
        answered: whether the caller sends the result of a function: unless it names one again, it gets a text.

    Raises:
        InvalidRequest: it names an unknown function.
    """
    kind = choice.get("type") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and kind in ("function", None):
        return _known(_name(choice), names)
    if isinstance(choice, dict) and kind == "allowed_tools":
        names = _allowed(choice, names)
    if choice == "none" or answered:
        return None
    return names[0] if names else None


def _allowed(choice: dict[str, Any], names: Sequence[str]) -> list[str]:
    listed = choice.get("allowed_tools", choice)
    tools = listed.get("tools") if isinstance(listed, dict) else None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InvalidRequest("tool_choice: allowed_tools has no list of tools", param="tool_choice")
    return [_known(_name(tool), names) for tool in tools if tool.get("type") == "function"]


def _name(tool: dict[str, Any]) -> Any:  # noqa: ANN401
    inner = tool.get("function", tool)
    return inner.get("name") if isinstance(inner, dict) else None


def _known(name: Any, names: Sequence[str]) -> str:  # noqa: ANN401
    if name not in names:
        raise InvalidRequest(f"tool_choice: there is no tool {name!r}", param="tool_choice")
    return str(name)
