"""The alerts: each has a runbook and is tested by promtool; what they and the dashboard ask for is there."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from testkit.dashboard import panels
from tests.unit.test_docs import anchors, metric_names

ROOT = Path(__file__).parents[2]
RULES = ROOT / "otel" / "alerts.yaml"
RULE_TESTS = ROOT / "otel" / "alerts_test.yaml"
RUNBOOKS = ROOT / "docs" / "runbooks.md"


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"] if "alert" in rule}


def runbooks() -> dict[str, str]:
    sections = RUNBOOKS.read_text(encoding="utf-8").split("\n## ")[1:]
    return {heading.strip(): text for heading, _, text in (section.partition("\n") for section in sections)}


@pytest.mark.parametrize("name", alerts())
def test_every_alert_says_how_bad_it_is_and_where_to_read_on(name: str) -> None:
    alert = alerts()[name]

    assert alert["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description", "runbook_url"} == set(alert["annotations"])
    file, _, anchor = alert["annotations"]["runbook_url"].partition("#")
    assert ROOT / file == RUNBOOKS
    assert anchor == name.lower()
    assert anchor in anchors(RUNBOOKS.read_text(encoding="utf-8"))


def test_every_runbook_is_an_alert_s_and_says_what_to_do() -> None:
    assert set(runbooks()) == set(alerts())
    for name, text in runbooks().items():
        for part in ("**Means:**", "**Look at:**", "**Do:**"):
            assert part in text, f"{name}: {part}"


def test_the_panels_that_runbooks_name_are_there() -> None:
    named = {name for text in runbooks().values() for name in re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text)}
    assert len(named) > 4
    assert named <= {panel["title"] for panel in panels()}


def test_every_metric_in_an_alert_is_there() -> None:
    there = set(metric_names())
    used = set(re.findall(r"\bgateway_[a-z_]+", re.sub(r"#.*", "", RULES.read_text(encoding="utf-8"))))

    assert len(used) > 8
    assert {name for name in used if re.sub(r"_(bucket|count|sum)$", "", name) not in there} == set()


def test_every_alert_is_tested_to_fire() -> None:
    tests = yaml.safe_load(RULE_TESTS.read_text(encoding="utf-8"))["tests"]
    fires = {
        name
        for test in tests
        for one in test.get("promql_expr_test", [])
        for sample in one["exp_samples"]
        if sample["value"]
        for name in re.findall(r'alertname="(\w+)"', f"{one['expr']} {sample['labels']}")
    }
    fires |= {one["alertname"] for test in tests for one in test.get("alert_rule_test", []) if one["exp_alerts"]}

    assert fires == set(alerts())


def promtool(*args: str) -> str:
    tool = shutil.which("promtool")
    if tool is None:
        assert os.environ.get("PROMTOOL") != "require", "PROMTOOL=require, but there is none"
        pytest.skip("found no promtool (Debian's package prometheus has it): the alerts were not evaluated")
    done = subprocess.run([tool, *args], cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_rules_and_the_configuration_are_valid(tmp_path: Path) -> None:
    promtool("check", "rules", str(RULES))
    configuration = (ROOT / "otel" / "prometheus.yaml").read_text(encoding="utf-8")
    (tmp_path / "prometheus.yaml").write_text(configuration.replace("/etc/prometheus/", f"{ROOT}/otel/"))
    promtool("check", "config", str(tmp_path / "prometheus.yaml"))


def test_the_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", str(RULE_TESTS))
