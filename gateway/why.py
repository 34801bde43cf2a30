"""`llm-gateway why ID`: what became of a request, and why, as text."""

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

from gateway.admin_client import add_request, explained
from gateway.summary import WHY_NOT, duration
from gateway.telemetry.output import visible

if TYPE_CHECKING:
    from collections.abc import Iterator

WIDTH, BAR = 100, 30
"""Characters of a line of text, and of a bar."""
MARKS = {"attempt": "#"}
"""What a bar is made of; a wait is dots."""


def main(arguments: list[str]) -> int:
    """Print why a request went as it did; return 0, or 1 when the gateway does not say."""
    parser = argparse.ArgumentParser(prog="llm-gateway why", description=__doc__)
    add_request(parser)
    options = parser.parse_args(arguments)
    document = explained("why", options.url, options.id)
    if document is None:
        return 1
    for line in lines_of(document):
        print(visible(line))  # noqa: T201
    return 0


def lines_of(document: dict[str, Any]) -> "Iterator[str]":
    """Yield the lines that explain a request: the sentence, who asked what, a waterfall, who was not asked."""
    yield from textwrap.wrap(str(document["why"]), WIDTH)
    yield ""
    told = [f"{name} {document[name]}" for name in ("model", "route", "caller", "generation") if document.get(name)]
    yield "  ".join([str(document["path"] or "unknown path"), *told])
    yield f"request {document['request_id']}  trace {document['trace_id']}  {document['started']}"
    if document["timeline"]:
        yield ""
        total = max(document["seconds"], 1e-6)
        for entry in document["timeline"]:
            yield _line(entry, total, document["attempts_made"])
    rest = [*_targets(document), *_tokens(document)]
    if rest:
        yield ""
        yield from rest


def _line(entry: dict[str, Any], total: float, attempts: list[dict[str, Any]]) -> str:
    end = entry["end"] if entry["end"] is not None else total
    left = min(BAR - 1, max(0, int(entry["start"] / total * BAR)))
    width = max(1, min(BAR - left, round((end - entry["start"]) / total * BAR)))
    bar = " " * left + MARKS.get(entry["kind"], ".") * width
    text = f"|{bar:{BAR}}| {duration(end - entry['start']):>8}  {entry['label']}"
    attempt = next((each for each in attempts if each["start"] == entry["start"]), None)
    if entry["kind"] != "attempt" or attempt is None:
        return text
    outcome = attempt["outcome"] or "under way"
    left_over = f"breaker {attempt['breaker']}, {attempt['budget_left']} retries left"
    decision = f" -> {attempt['decision']}" if attempt["decision"] else ""
    return f"{text}: {outcome}{decision} ({left_over})"


def _targets(document: dict[str, Any]) -> "Iterator[str]":
    for target in document["targets"]:
        model = f" ({target['model']})" if target["model"] else ""
        if not target["tried"]:
            yield f"{target['backend']}{model} was not asked: {_why_not(target)}"
            continue
        for replica in target["replicas"]:
            if not replica["tried"]:
                yield f"{replica['name']}{model} was not asked: {_why_not(replica)}"


def _why_not(one: dict[str, Any]) -> str:
    return WHY_NOT.get(one["why_not"], str(one["why_not"]))


def _tokens(document: dict[str, Any]) -> "Iterator[str]":
    tokens = document["tokens"]
    if tokens["input"] is not None or tokens["output"] is not None or tokens["charged"] is not None:
        charged = f"; {tokens['charged']} charged, as {tokens['source']}" if tokens["charged"] is not None else ""
        yield f"tokens: {_number(tokens['input'])} in, {_number(tokens['output'])} out{charged}"


def _number(tokens: int | None) -> str:
    return "unknown" if tokens is None else str(tokens)
