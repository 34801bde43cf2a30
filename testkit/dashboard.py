"""Grafana's dashboard as a file: its panels and what they ask Prometheus."""

import json
from dataclasses import dataclass
from typing import Any

from testkit import REPOSITORY

FILE = REPOSITORY / "otel" / "grafana" / "dashboard.json"


@dataclass(frozen=True)
class Query:
    """A query of a panel.

    Attributes:
        panel: Its title.
        expression: In PromQL, with Grafana's variables.
        exemplars: Whether its exemplars are shown.
    """

    panel: str
    expression: str
    exemplars: bool

    def over(self, interval: str) -> str:
        """Return the expression as Grafana asks it where rates look back for `interval`."""
        return self.expression.replace("$__rate_interval", interval)


def document() -> dict[str, Any]:
    """Return the whole of it."""
    whole: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return whole


def panels() -> list[dict[str, Any]]:
    """Return its panels, without the headings of rows."""
    return [panel for panel in document()["panels"] if panel["type"] != "row"]


def queries() -> list[Query]:
    """Return all queries of all panels."""
    return [
        Query(panel["title"], target["expr"], bool(target.get("exemplar")))
        for panel in panels()
        for target in panel["targets"]
    ]
