"""The loop of a program with a client library: lines of JSON in, with a call's name, an url and a prompt; outcomes out.

These programs run in the environment of `requirements/real.txt`.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

WEATHER = {
    "name": "weather",
    "description": "Tell the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def described(error: BaseException) -> dict[str, Any]:
    """Return the error's type, words and HTTP status: its own, or that of the error that it came from."""
    status = None
    cause: BaseException | None = error
    while status is None and cause is not None:
        status = getattr(cause, "status_code", None)
        cause = cause.__cause__ or cause.__context__
    return {"type": type(error).__name__, "status": status, "message": str(error)}


def serve(calls: Mapping[str, Callable[[str, str], Any]]) -> None:
    """Make the calls that standard input asks for, until it ends.

    Args:
        calls: By their names; each is given the url of an API, with `/v1`, and a prompt, and returns JSON.
    """
    for line in sys.stdin:
        order = json.loads(line)
        try:
            outcome = {"value": calls[order["call"]](order["url"] + "/v1", order["prompt"])}
        except Exception as error:  # noqa: BLE001 - whatever a library raises is the outcome
            outcome = {"error": described(error)}
        print(json.dumps(outcome), flush=True)  # noqa: T201
