"""`make up` makes an admin key once and says where the live page is."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = """#!/bin/sh
echo "$GATEWAY_ADMIN_KEY_FILE $*"
"""


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools" / "up", tmp_path / "tools")
    (tmp_path / "docker" / "secrets").mkdir(parents=True)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    return tmp_path


def up(clone: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}
    environment |= {"PATH": f"{clone / 'bin'}:{os.environ['PATH']}"} | variables
    done = subprocess.run(  # noqa: S603
        [clone / "tools" / "up"], cwd="/", env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_key_is_made_once_and_told_with_the_page(clone: Path) -> None:
    first, second = up(clone), up(clone)
    file = clone / "docker" / "secrets" / "admin-key"
    key = file.read_text().strip()

    assert len(key) == 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o644, "uid 10001 reads it"
    assert first == second
    assert first.startswith("docker/secrets/admin-key compose up --build --wait\n")
    assert "live page  http://localhost:8000/ui\n" in first
    assert f"admin key  {key}  (docker/secrets/admin-key)\n" in first
    assert up(clone.rename(clone.with_name("other"))).count(key) == 1


@pytest.mark.parametrize("where", ["environment", ".env"])
def test_a_key_of_your_own_is_taken_in_place_of_it(clone: Path, where: str) -> None:
    (clone / "mine").write_text("# of the admins\nmy-own-key\n")
    variables = {"GATEWAY_ADMIN_KEY_FILE": "mine", "GATEWAY_PORT": "9000"}
    if where == ".env":
        (clone / ".env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        variables = {}
    said = up(clone, **variables)

    assert said.startswith("mine compose up")
    assert "http://localhost:9000/ui" in said
    assert "admin key  my-own-key  (mine)" in said
    assert not (clone / "docker" / "secrets" / "admin-key").exists()
