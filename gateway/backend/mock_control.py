"""The control API of a mock model: what the buttons of the live page do to it."""

from dataclasses import dataclass, field
from typing import Any

import aiohttp
import msgspec

from gateway.errors import ConnectionFailed, InvalidResponse

SECONDS = 3.0
"""For a whole call."""
MAX_ANSWER = 65_536
"""Bytes read of an answer."""
MAX_MESSAGE = 300
"""Characters kept of an error's message."""
MAX_FAULTS = 20
"""Faults that are shown of a script."""


@dataclass(frozen=True)
class Action:
    """A button.

    Attributes:
        name: in the path of the call that presses it.
        label: on it.
        about: what happens.
        faults: the script that is put, in the form of `PUT /faults`; none heals.
    """

    name: str
    label: str
    about: str
    faults: list[dict[str, Any]] = field(default_factory=list)


ACTIONS = (
    Action("once", "Fail once", "The next call is reset.", [{"kind": "reset", "times": 1}]),
    Action("away", "Away for 3 s", "Nobody listens for 3 s.", [{"kind": "refuse", "with": {"seconds": 3}, "times": 1}]),
    Action("gone", "Gone", "Every call is reset until it is healed.", [{"kind": "reset"}]),
    Action("errors", "503s", "Every call gets a 503.", [{"kind": "status", "with": {"status": 503}}]),
    Action(
        "limited",
        "Rate limit",
        "The next call gets a 429: leave me alone for 5 s.",
        [{"kind": "status", "with": {"status": 429, "headers": {"retry-after": "5"}}, "times": 1}],
    ),
    Action("slow", "Slow", "Every answer begins 2 s later.", [{"kind": "latency", "with": {"delay": 2}}]),
    Action(
        "cut",
        "Cut streams",
        "Every stream is cut after three events.",
        [{"kind": "cut", "with": {"after_events": 3, "how": "reset"}}],
    ),
    Action("heal", "Heal", "No more faults."),
)
"""What can be done: fixed, so that the gateway passes on nothing that a page made up."""
BY_NAME = {action.name: action for action in ACTIONS}


class MockControl:
    """Asks the control API at a url, without `/` at its end."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/") + "/faults"

    async def faults(self) -> list[str]:
        """Return the kinds of faults that are in force. Raises: ConnectionFailed, InvalidResponse."""
        return await self._ask("GET", None)

    async def do(self, action: Action) -> list[str]:
        """Do it, and return the kinds of faults then in force. Raises: ConnectionFailed, InvalidResponse."""
        return await self._ask("PUT", action.faults)

    async def _ask(self, method: str, script: list[dict[str, Any]] | None) -> list[str]:
        limit = aiohttp.ClientTimeout(total=SECONDS)
        try:
            async with (
                aiohttp.ClientSession(timeout=limit) as session,  # rare enough for a connection of its own
                session.request(method, self._url, json=script, allow_redirects=False) as answer,
            ):
                body = await _read(answer.content)
                good = answer.status == 200  # noqa: PLR2004
        except (aiohttp.ClientError, OSError, TimeoutError):
            raise ConnectionFailed(
                "The mock model's control API (GATEWAY_UI_MOCK_CONTROL) does not answer; is the mock model running?"
            ) from None
        try:
            document = msgspec.json.decode(body)
            if good:
                return [str(fault["kind"]) for fault in document if _in_force(fault)][:MAX_FAULTS]
            message = str(document["error"]["message"])[:MAX_MESSAGE]
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
            raise InvalidResponse(
                "What answers at GATEWAY_UI_MOCK_CONTROL is not a mock model's control API."
            ) from None
        raise InvalidResponse(f"The mock model did not take this fault: {message}")


async def _read(content: aiohttp.StreamReader) -> bytes:
    body = b""
    while len(body) < MAX_ANSWER and (piece := await content.readany()):
        body += piece
    return body


def _in_force(fault: dict[str, Any]) -> bool:
    """Return whether a fault of the script may still happen."""
    times = fault.get("times")
    return times is None or fault.get("used", 0) < times
