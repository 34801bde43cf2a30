"""What suites that need more than Python have in common: their marks, and what becomes of them where it is missing."""

import os
from collections.abc import Iterable
from pathlib import Path

import pytest


def mark(items: Iterable[pytest.Item], folder: Path, name: str, seconds: float) -> None:
    """Mark the tests of a folder by its name; each has so many seconds, fixtures apart, unless it says itself."""
    for item in items:
        if folder in item.path.parents:
            item.add_marker(name)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(seconds, func_only=True))


def need(missing: str | None, variable: str, otherwise: str) -> None:
    """Skip where something is missing, or end the run where a variable requires it.

    Args:
        missing: what is; None: nothing.
        variable: of the environment, which may be `require`.
        otherwise: what was not done.
    """
    if missing is None:
        return
    if os.environ.get(variable) == "require":
        pytest.exit(f"{variable}=require, but {missing}", returncode=1)
    pytest.skip(f"{missing}: {otherwise}")


def skip_as_one(report: pytest.TestReport, file: str) -> None:
    """Have all skips of a suite shown as one line, with the path of its `conftest.py`."""
    if report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = file, 0, report.longrepr[2]
