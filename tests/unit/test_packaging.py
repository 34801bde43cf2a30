"""What `pip install .` installs, and that the version stands in one place."""

import email
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from gateway import __version__

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = ("gateway", "mock_model")
MADE = {"__pycache__", "node_modules"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    (source / "tests").mkdir()
    (source / "tests" / "__init__.py").touch()
    build = "from setuptools.build_meta import build_wheel; build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)  # noqa: S603
    (built,) = (source / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    install = [sys.executable, "-m", "uv", "pip", "install", "--offline", "--no-deps", f"--target={target}", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)  # noqa: S603
    return target


def test_the_wheel_holds_both_packages_whole_and_nothing_else(wheel: Path) -> None:
    kinds = {".py", ".html", ".css", ".js"}
    paths = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.suffix in kinds)
    files = {path.relative_to(ROOT).as_posix() for path in paths}
    assert len(files) > 40

    names = set(zipfile.ZipFile(wheel).namelist())

    others = {f"{name}/py.typed" for name in PACKAGES} | {"gateway/limits_ledger.lua"}
    assert {name for name in names if ".dist-info/" not in name} == files | others


def test_the_wheel_has_the_version_and_the_license(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"llm_gateway-{__version__}.dist-info"

    metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))

    assert (metadata["Name"], metadata["Version"]) == ("llm-gateway", __version__)
    assert f"{info}/licenses/LICENSE" in archive.namelist()


@pytest.mark.parametrize(("command", "module"), [("llm-gateway", "gateway"), ("mock-model", "mock_model")])
def test_a_command_runs_the_installed_program(installed: Path, tmp_path: Path, command: str, module: str) -> None:
    """It gets as far as its settings, and its exit code is passed on."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PORT": "none"}

    ended = subprocess.run(  # noqa: S603
        [installed / "bin" / command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )

    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith(f"{module}: PORT=")


def test_the_mock_model_needs_nothing_that_the_gateway_does_not() -> None:
    gateway = {re.split("[<>=]", requirement)[0] for requirement in PROJECT["project"]["dependencies"]}

    assert set(PROJECT["dependency-groups"]["mock-model"]) < gateway


def texts() -> Iterator[Path]:
    """Everything that could repeat the version, but for locks and the history of releases."""
    folders = (".ci", ".github", "bench", "chaos", "deploy", "docker", "docs", "gateway", "mock_model", "otel")
    for folder in (*folders, "testkit", "tests", "tools"):
        yield from (ROOT / folder).rglob("*")
    yield from set(ROOT.glob("*")) - {ROOT / "CHANGELOG.md"}


def test_the_version_stands_in_one_place() -> None:
    # The semantic conventions for generative AI have a version of their own.
    version = re.compile(rf"(?<!GenAI )(?<!GenAI\n)(?<![\d.]){re.escape(__version__)}(?!\.?\d)")
    read = [path for path in texts() if path.is_file() and not MADE & {*path.parts}]
    assert len(read) > 100

    found = [path for path in read if version.search(path.read_text(encoding="utf-8", errors="replace"))]

    # The chart's appVersion is compared with it, and its renders hold what they are compared with.
    chart = ROOT / "deploy" / "helm" / "llm-gateway" / "Chart.yaml"
    renders = ROOT / "tests" / "unit" / "deploy" / "renders"
    assert {path for path in found if path.parent != renders} == {ROOT / "gateway" / "__init__.py", chart}
