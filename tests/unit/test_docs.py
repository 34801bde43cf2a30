"""What README and docs say is what there is: every setting, metric, span attribute, error code, fault and target."""

import inspect
import re
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
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
from gateway.workers.whole import Whole
from mock_model.faults import KINDS
from mock_model.settings import Settings as MockSettings

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "bench" / "README.md"]
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SCREEN = 160
"""Characters of a line in a table."""


@cache
def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page(name: str) -> str:
    return text_of(ROOT / "docs" / f"{name}.md")


def section(name: str, heading: str) -> str:
    """The text of a page from one of its headings to the next of the same rank."""
    return page(name).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def words_of(text: str) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", FENCED.sub("", text)))


WORDS = set().union(*(words_of(text_of(path)) for path in PAGES))


def metric_names() -> Iterator[str]:
    """As `/metrics` names them."""
    settings = load()
    telemetry = Telemetry(settings, tracer=Tracer(None), log=RequestLog(level="INFO", as_json=True))
    create_app(settings, load_routing(settings), telemetry)
    text = telemetry.metrics.exposition("")[0].decode()
    for family in (*text_string_to_metric_families(text), *Whole([]).own(0)):
        yield f"{family.name}_total" if family.type == "counter" else family.name


def test_every_metric_is_in_the_docs_and_no_other() -> None:
    told = set(re.findall(r"`(gateway_[a-z_]+)[`{]", section("observability", "Metrics")))
    there = {name for name in metric_names() if not name.endswith("_created")}

    assert len(there) > 15
    assert told == there


@pytest.mark.parametrize("name", [field.upper() for field in Settings.model_fields])
def test_every_setting_has_a_row_with_its_default(name: str) -> None:
    rows = re.findall(rf"^\| `{name}` \| ([^|]*)\|", page("configuration"), flags=re.MULTILINE)

    assert len(rows) == 1
    default = Settings.model_fields[name.lower()].default
    if default is None or default == []:
        assert rows[0] == ""
        return
    text = ",".join(default) if isinstance(default, list) else str(default)
    text = {"True": "true", "False": "false"}.get(text, text)
    assert rows[0].startswith(f"`{text}`")


def test_every_variable_in_the_docs_is_a_setting() -> None:
    told = {word for word in WORDS if re.fullmatch(r"GATEWAY_[A-Z_]+", word)}
    there = {field.upper() for field in Settings.model_fields} | {f"{name}_FILE" for name in SECRETS}
    of_compose = {"GATEWAY_PORT", "GATEWAY_B_PORT"}

    assert told <= there | of_compose


@pytest.mark.parametrize("name", SECRETS)
def test_every_secret_can_come_from_a_file(name: str) -> None:
    assert f"{name}_FILE" in words_of(page("configuration"))


@pytest.mark.parametrize("name", [field.upper() for field in MockSettings.model_fields])
def test_every_setting_of_the_mock_model_is_in_the_docs(name: str) -> None:
    where = "configuration" if name.startswith("OTEL_") else "mock-model"  # OTEL_* mean the same for both
    assert re.search(rf"`{name}\b", page(where))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_fault_is_in_the_docs(kind: str) -> None:
    assert kind in words_of(page("mock-model"))


def test_every_attribute_and_event_of_ours_is_in_the_docs() -> None:
    there = set(re.findall(r'"(gateway\.[a-z_.]+)"', inspect.getsource(spans)))

    assert len(there) > 10
    assert there <= words_of(page("observability"))


def codes(kind: type[errors.GatewayError]) -> Iterator[str]:
    yield kind.code
    for child in kind.__subclasses__():
        yield from codes(child)


@pytest.mark.parametrize(
    "code", sorted({code for code in codes(errors.GatewayError) if code != "client_closed_request"})
)
def test_every_error_code_is_in_the_table_of_errors(code: str) -> None:
    assert f"`{code}`" in section("api", "Errors")


@pytest.mark.parametrize(
    "target", re.findall(r"^([a-z][a-z0-9.-]*):.*## ", text_of(ROOT / "Makefile"), flags=re.MULTILINE)
)
def test_every_make_target_is_in_the_docs(target: str) -> None:
    assert target == "help" or re.search(rf"make {re.escape(target)}\b", "".join(map(text_of, PAGES)))


def test_the_readme_is_short() -> None:
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_table_is_wider_than_a_screen(path: Path) -> None:
    lines = FENCED.sub("", text_of(path)).splitlines()

    assert [line for line in lines if line.startswith("|") and len(line) > SCREEN] == []


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings, and those that are set by hand."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text), flags=re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([\w-]+)">', text))


LINK = re.compile(r"\]\(([^)\s]+)(?: \"[^\"]*\")?\)|^\[[\w-]+\]: (\S+)", re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for link in LINK.findall(FENCED.sub("", text_of(path))):
        target = link[0] or link[1]
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists(), f"{path.name}: {target}"
        if anchor:
            assert anchor in anchors(text_of(there)), f"{path.name}: {target}"


PROOF = re.compile(r'^\[([\w-]+)\]: (?:\.\./)?(tests/[\w/]+\.py) "(test_\w+)"$', re.MULTILINE)
USED = re.compile(r"\]\[([\w-]+)\]")


@pytest.mark.parametrize(
    ("text", "promises"),
    [
        (text_of(ROOT / "README.md").partition("\n## What is promised\n")[2].partition("\n## ")[0], 13),
        (page("failures"), 20 + 6 + 18),
    ],
    ids=["README", "failures"],
)
def test_every_promise_is_linked_to_a_test_that_there_is(text: str, promises: int) -> None:
    proofs = {name: (file, test) for name, file, test in PROOF.findall(text)}
    rows = re.findall(r"^\| (?!-|the (?:backend|gateway) \|).*\|$|^- \*\*.*(?:\n  .*)*", text, flags=re.MULTILINE)

    assert len(rows) == promises
    for row in rows:
        used = USED.findall(row)
        assert used, f"nothing proves: {row}"
        for name in used:
            file, test = proofs[name]
            assert f"def {test}(" in text_of(ROOT / file), f"{file} has no {test}"
    assert {name for row in rows for name in USED.findall(row)} | set(USED.findall(text)) == set(proofs)


MADE_BY_USERS = re.compile(r"_FILE=(?:\./)?([\w./-]+)|>(docker/[\w./-]+)|: ([\w./-]+\.pem)")
"""Files of secrets that the docs have their readers make: keys, certificates."""


def made_by_users() -> set[str]:
    """Those files, and the ones that name them."""
    pages = "".join(text_of(path) for path in PAGES)
    return {".env", "docker/gateway.env"} | {name for found in MADE_BY_USERS.findall(pages) for name in found if name}


def goes_into_an_image(path: str, ignoring: Path) -> bool:
    """Whether Docker, which reads the last line that matches, would send a file to the build."""
    sent = True
    for line in text_of(ignoring).splitlines():
        pattern = line.removeprefix("!").removeprefix("**/")
        if line and not line.startswith("#") and (fnmatch(path, pattern) or fnmatch(path.rpartition("/")[2], pattern)):
            sent = line.startswith("!")
    return sent


def test_no_file_of_secrets_that_the_docs_ask_for_gets_into_git_or_an_image() -> None:
    secrets = made_by_users()
    assert {"openai-key", "docker/secrets/backend-api-key", "docker/secrets/gateway-api-keys", "key.pem"} <= secrets
    for ignoring in (".dockerignore", "docker/test.Dockerfile.dockerignore"):
        assert not [path for path in secrets if goes_into_an_image(path, ROOT / ignoring)]
    assert goes_into_an_image("docker/secrets/gateway-api-keys.example", ROOT / "docker/test.Dockerfile.dockerignore")
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    ask = ("git", "check-ignore", "--no-index", *sorted(secrets))
    asked = subprocess.run(ask, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603
    assert set(asked.stdout.split()) == secrets
