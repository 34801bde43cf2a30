"""The gateway, the mock model and the testkit do not import each other: the testkit starts the others as processes.

But for one file: the fault proxy takes the same scripts of faults as the mock model.
"""

import ast
from pathlib import Path

import pytest

from testkit import REPOSITORY

PACKAGES = ("gateway", "mock_model", "testkit")
EXCEPTION = {"fault_proxy.py": {"mock_model"}}


def imported(file: Path) -> set[str]:
    """The first part of each module's name that a file imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("package", PACKAGES)
def test_gateway_mock_model_and_testkit_do_not_import_each_other(package: str) -> None:
    files = list((REPOSITORY / package).rglob("*.py"))
    others = set(PACKAGES) - {package}

    assert files
    found = {file.name: imported(file) & others for file in files if imported(file) & others}
    assert found == (EXCEPTION if package == "testkit" else {})
