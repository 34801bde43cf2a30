"""`llm-gateway export ID`: a kept request as a script of the mock model, and as an experiment of a game day.

What failed at the backends fails again in the same way and order; times, words and sizes are the mock model's own.
"""

import argparse
import json
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from gateway.admin_client import add_request, explained
from gateway.telemetry.output import visible

Fault = dict[str, Any]
EVENTS = 3
"""Events of a stream before it breaks off."""
TIMER = 1
"""Seconds of the timers where a backend was silent: nobody wants to wait again for as long."""
TIMERS = {"GATEWAY_FIRST_TOKEN_TIMEOUT": TIMER, "GATEWAY_ANSWER_TIMEOUT": TIMER, "GATEWAY_IDLE_TIMEOUT": TIMER}
GOOD_STATUS = 300
"""Statuses below it are of good answers, whatever is inside."""


def main(arguments: list[str]) -> int:
    """Write both files; return 0, or 1 when the gateway does not say, or nothing failed at a backend."""
    parser = argparse.ArgumentParser(prog="llm-gateway export", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), metavar="FOLDER", help="where the files go (.)")
    add_request(parser)
    options = parser.parse_args(arguments)
    document = explained("export", options.url, options.id)
    if document is None:
        return 1
    scripts = scripts_of(document)
    if not scripts:
        print("export: no attempt of this request failed at a backend; there is nothing to play", file=sys.stderr)  # noqa: T201
        return 1
    name = f"incident-{document['trace_id'][:8]}"
    files = {
        f"{name}.faults.json": json.dumps([fault for script in scripts.values() for fault in script], indent=2) + "\n",
        f"{name}.yaml": _comment(document) + yaml.safe_dump(experiment_of(document), sort_keys=False, width=100),
    }
    for file, text in files.items():
        try:
            (options.out / file).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"export: {options.out / file}: {error.strerror}", file=sys.stderr)  # noqa: T201
            return 1
        print(options.out / file)  # noqa: T201
    return 0


def scripts_of(document: dict[str, Any]) -> dict[str, list[Fault]]:
    """Return for each replica that failed the faults that it had, in order: as `PUT /faults` takes them."""
    scripts: dict[str, list[Fault]] = {}
    begun = document["first_token_seconds"] is not None and document["outcome"] != "ok"
    for attempt in document["attempts_made"]:
        last = attempt["number"] == document["attempts"]
        fault = _fault_of(attempt, stream=document["stream"], begun=begun and last)
        if fault is not None:
            scripts.setdefault(attempt["backend"], []).append(fault)
    return {
        name: [_times(fault, len(list(same))) for fault, same in groupby(script)] for name, script in scripts.items()
    }


def experiment_of(document: dict[str, Any]) -> dict[str, Any]:
    """Return the definition of an experiment (`chaos/experiments`) in which the same attempts fail."""
    scripts = scripts_of(document)
    asked = list(dict.fromkeys([*scripts, *(attempt["backend"] for attempt in document["attempts_made"])]))
    failed = sum(fault["times"] for script in scripts.values() for fault in script)
    silent = any(fault["kind"].startswith(("hang", "stall")) for script in scripts.values() for fault in script)
    promises: list[dict[str, Any]] = [
        {"text": "nobody hangs", "measure": "hung", "at_most": 0},
        {"text": "the attempts fail as they did", "measure": "failed_attempts", "at_least": failed, "until": 8},
    ]
    if document["outcome"] == "ok":
        promises.append({"text": "callers are answered, as this one was", "measure": "failures", "at_most": 0})
    else:
        promises.append({"text": "few callers fail, as this one did", "measure": "failures", "at_most": failed})
    return {
        "title": f"A request of {document['started'][:10]} again",
        "story": document["why"],
        "system": {"mocks": min(len(asked), 10)} | ({"gateway": TIMERS} if silent else {}),
        "steady_state": {
            "seconds": 8,
            "rate": 5,
            "deadline": 6,
            "kinds": ["stream" if document["stream"] else "answer"],
        },
        "method": [
            {"at": 1, "do": "faults", "mock": asked.index(name) + 1, "faults": script}
            for name, script in scripts.items()
        ],
        "rollback": [{"do": "heal", "mock": asked.index(name) + 1} for name in scripts],
        "promises": promises,
    }


def _fault_of(attempt: dict[str, Any], *, stream: bool, begun: bool) -> Fault | None:  # noqa: PLR0911
    """Return how the mock model fails in the same way; None where a backend did not.

    Args:
        attempt: as `GET /requests/{id}` has it.
        stream: whether one was asked for.
        begun: whether it failed when its answer had begun.
    """
    outcome, status, message = attempt["outcome"] or "", attempt["status"], attempt["message"] or ""
    if outcome.startswith("status_") and status is not None and status >= GOOD_STATUS:
        wait = attempt["retry_after"]
        headers = {"retry-after-ms": str(round(wait * 1000))} if wait is not None else {}
        return _fault("status", status=status, headers=headers)
    if outcome.startswith("status_"):
        error = {"message": "The same error again.", "type": "server_error", "code": int(outcome[7:])}
        return _fault("error_event", after_events=0, error=error) if stream else _inside(error)
    if outcome == "auth_error":
        return _fault("status", status=status or 401)
    if outcome in {"connection_error", "connect_timeout"}:
        return _fault("reset")
    if outcome in {"first_token_timeout", "answer_timeout", "deadline_exceeded"}:
        return _fault("hang_before_headers")
    if outcome == "idle_timeout":
        return _fault("stall", after_events=EVENTS) if begun else _fault("hang_after_headers")
    if outcome == "error_event":
        return _fault("error_event", after_events=EVENTS if begun else 0)
    if outcome == "invalid_response":
        return _unreadable(message, stream=stream, begun=begun)
    return None


def _unreadable(message: str, *, stream: bool, begun: bool) -> Fault:
    if "data is not JSON" in message:
        return _fault("malformed_event", after_events=EVENTS if begun else 0)
    if stream and (begun or "stream" in message.replace("text/event-stream", "")):
        return _fault("cut", after_events=EVENTS if begun else 0, how="reset" if "answer" in message else "end")
    if "cut off" in message:
        return _fault("short_body", bytes=10)
    return _fault("not_json") if "not JSON" in message else _fault("html")


def _inside(error: dict[str, Any]) -> Fault:
    return _fault("status", status=200, body={"error": error})


def _fault(kind: str, **parameters: object) -> Fault:
    return {"kind": kind, "with": parameters} if parameters else {"kind": kind}


def _times(fault: Fault, times: int) -> Fault:
    return fault | {"times": times}


def _comment(document: dict[str, Any]) -> str:
    """Return where it comes from, as the first lines of the file."""
    return (
        f"# Made by llm-gateway export of request {json.dumps(visible(document['request_id']))}.\n"
        "# Play it: python -m chaos FILE. Replicas stand for all backends that were asked.\n"
    )
