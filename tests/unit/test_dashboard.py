"""Grafana's files, without Grafana: its own types take the dashboard whole, and what it asks for is there.

That each query finds something, tests/stack/test_profiles.py proves on the real Prometheus.
"""

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models import units
from grafana_foundation_sdk.models.dashboard import Dashboard

from gateway.telemetry.gen_ai_metrics import GenAiMetrics
from testkit.dashboard import FILE, document, panels, queries
from tests.unit.gateway.test_readings import a_record
from tests.unit.test_alerts import RULES
from tests.unit.test_docs import metric_names

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "otel" / "grafana"
UNITS = {value for name, value in vars(units).items() if name[0].isupper() and isinstance(value, str)}


class Compose(yaml.SafeLoader):
    """Reads the tag with which Compose replaces what another service has."""


def _in_place(loader: yaml.SafeLoader, node: yaml.SequenceNode) -> list[Any]:
    return list(loader.construct_sequence(node))


Compose.add_constructor("!override", _in_place)


def read(file: Path) -> Any:  # noqa: ANN401
    return yaml.load(file.read_text(encoding="utf-8"), Loader=Compose)  # noqa: S506 - it is a safe one


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:  # noqa: ANN401
    """What Grafana's types do not know, by its path."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            if key in kept:
                yield from lost(value, kept[key], f"{path}/{key}")
            else:
                yield f"{path}/{key}"
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for place, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}/{place}")
    elif given != kept:
        yield path


def by_grafana(given: dict[str, Any]) -> Any:  # noqa: ANN401
    """The same, read by Grafana's types and written again."""
    register_default_plugins()
    return json.loads(JSONEncoder().encode(Dashboard.from_json(given)))


def test_grafana_s_types_take_all_of_it() -> None:
    assert list(lost(document(), by_grafana(document()))) == []


@pytest.mark.parametrize(
    ("old", "new", "path"),
    [
        ('"legendFormat"', '"legendFromat"', "/legendFromat"),
        ('"fillOpacity"', '"fillOpactiy"', "/fillOpactiy"),
        ('"editable"', '"editible"', "/editible"),
    ],
)
def test_a_misspelt_word_is_noticed(old: str, new: str, path: str) -> None:
    wrong = json.loads(FILE.read_text(encoding="utf-8").replace(old, new))

    found = list(lost(wrong, by_grafana(wrong)))
    assert found
    assert all(one.endswith(path) for one in found)


def test_panels_have_places_titles_and_descriptions_of_their_own() -> None:
    found = panels()
    assert len({panel["id"] for panel in document()["panels"]}) == len(document()["panels"]) > 25
    assert len({panel["title"] for panel in found}) == len(found)
    assert all(panel["description"] for panel in found)
    for one, other in combinations([panel["gridPos"] for panel in document()["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in found)


def test_units_are_grafana_s() -> None:
    used = {panel["fieldConfig"]["defaults"].get("unit", "short") for panel in panels()}

    assert len(UNITS) > 100
    assert used <= UNITS


def test_every_metric_and_rule_that_it_asks_for_is_there() -> None:
    gen_ai = GenAiMetrics()
    gen_ai.count(a_record())
    by_otlp = {
        reading.name.replace(".", "_") + ("_seconds" if reading.unit == "s" else "") for reading in gen_ai.read()
    }
    rules = {rule["record"] for group in read(RULES)["groups"] for rule in group["rules"] if "record" in rule}
    there = set(metric_names()) | by_otlp | rules
    used = {
        name for query in queries() for name in re.findall(r"\b(?:gateway[_:]|gen_ai_)[a-z0-9_:]+", query.expression)
    }
    used -= {"gateway_route"}  # a label

    assert len(used) > 20
    assert {
        name for name in used if name not in there and re.sub(r"_(bucket|count|sum)$", "", name) not in there
    } == set()


def test_its_sources_are_those_that_are_provisioned_and_its_points_lead_to_jaeger() -> None:
    sources = {source["uid"]: source for source in read(GRAFANA / "datasources.yaml")["datasources"]}
    used = {source["uid"] for panel in panels() for source in (panel["datasource"], panel["targets"][0]["datasource"])}

    assert used == {"prometheus"}
    assert sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"] == [
        {"name": "trace_id", "datasourceUid": "jaeger"}
    ]
    assert sources["jaeger"]["type"] == "jaeger"
    assert {query.panel for query in queries() if query.exemplars} == {"Duration", "First token"}


def test_compose_gives_grafana_its_files_and_nobody_a_login() -> None:
    compose = read(ROOT / "compose.yaml")
    grafana = compose["services"]["grafana"]
    given = {one["target"]: ROOT / compose["configs"][one["source"]]["file"] for one in grafana["configs"]}
    (provider,) = read(GRAFANA / "dashboards.yaml")["providers"]

    assert set(given.values()) == set(GRAFANA.iterdir())
    assert given[f"{provider['options']['path']}/dashboard.json"] == FILE
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] in given
    assert grafana["environment"]["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"
    assert grafana["environment"]["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert not [name for name in grafana["environment"] if "PASSWORD" in name]
    assert all(port.startswith("127.0.0.1:") for port in grafana["ports"])
    assert re.fullmatch(r"grafana/grafana:\d+\.\d+\.\d+", grafana["image"])
