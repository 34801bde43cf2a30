"""What the README tells is what there is: every setting, metric, span attribute and error code, and none besides."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway import errors
from gateway.app import create_app
from gateway.config import load_routing
from gateway.settings import SECRETS, Settings, load
from gateway.telemetry import Telemetry, spans
from gateway.telemetry.logs import RequestLog
from gateway.telemetry.tracing import Tracer
from mock_model.settings import Settings as MockSettings

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WORDS = set(re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)))


def metric_names() -> Iterator[str]:
    """As `/metrics` names them."""
    settings = load()
    telemetry = Telemetry(settings, tracer=Tracer(None), log=RequestLog(level="INFO", as_json=True))
    create_app(settings, load_routing(settings), telemetry)
    text = telemetry.metrics.exposition("")[0].decode()
    for family in text_string_to_metric_families(text):
        yield f"{family.name}_total" if family.type == "counter" else family.name


def test_every_metric_is_in_the_readme_and_no_other() -> None:
    section = README[README.index("## Metrics") : README.index("## Logs")]
    told = set(re.findall(r"`(gateway_[a-z_]+)[`{]", section))
    there = {name for name in metric_names() if not name.endswith("_created")}

    assert len(there) > 15
    assert told == there


@pytest.mark.parametrize("name", [field.upper() for field in Settings.model_fields])
def test_every_setting_has_a_row_with_its_default(name: str) -> None:
    rows = re.findall(rf"^\| `{name}` \| ([^|]*)\|", README, flags=re.MULTILINE)

    assert len(rows) == (2 if name == "MODEL_NAME" else 1), "one row each; the mock model has a MODEL_NAME, too"
    default = Settings.model_fields[name.lower()].default
    if default is None or default == []:
        assert rows[0] == ""
        return
    text = ",".join(default) if isinstance(default, list) else str(default)
    text = {"True": "true", "False": "false"}.get(text, text)
    assert rows[0].startswith(f"`{text}`")


def test_every_variable_in_the_readme_is_a_setting() -> None:
    told = {word for word in WORDS if re.fullmatch(r"GATEWAY_[A-Z_]+", word)}
    there = {field.upper() for field in Settings.model_fields} | {f"{name}_FILE" for name in SECRETS}
    of_compose = {"GATEWAY_PORT"}

    assert told <= there | of_compose


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_can_come_from_a_file(name: str) -> None:
    assert f"{name}_FILE" in WORDS


@pytest.mark.parametrize("name", [field.upper() for field in MockSettings.model_fields])
def test_every_setting_of_the_mock_model_is_in_the_readme(name: str) -> None:
    assert re.search(rf"`{name}\b", README)


def test_every_attribute_and_event_of_ours_is_in_the_readme() -> None:
    there = set(re.findall(r'"(gateway\.[a-z_.]+)"', inspect.getsource(spans)))

    assert len(there) > 10
    assert there <= WORDS


def codes(kind: type[errors.GatewayError]) -> Iterator[str]:
    yield kind.code
    for child in kind.__subclasses__():
        yield from codes(child)


@pytest.mark.parametrize(
    "code", sorted({code for code in codes(errors.GatewayError) if code != "client_closed_request"})
)
def test_every_error_code_is_in_the_table_of_errors(code: str) -> None:
    table = README[README.index("## Errors") : README.index("## Headers")]

    assert f"`{code}`" in table


PROOF = re.compile(r'\[test\]\((tests/[\w/]+\.py) "(test_\w+)"\)')


def test_every_promise_is_linked_to_a_test_that_there_is() -> None:
    section = README[README.index("## What you get when the model fails") : README.index("## Break it")]
    promises = re.findall(r"^\| (?!-|the backend \|).*\|$|^- \*\*.*(?:\n  .*)*", section, flags=re.MULTILINE)

    assert len(promises) == 14 + 8
    for promise in promises:
        proofs = PROOF.findall(promise)
        assert proofs, f"nothing proves: {promise}"
        for file, name in proofs:
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no {name}"
