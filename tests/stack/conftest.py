"""One stack for all tests here: made at the first, left steady before each, removed after the last."""

import contextlib
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.stack.engine import SERVICES, Stack, why_no_engine

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.stack)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(120, func_only=True))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the services' last log lines with a failed test, and all skips for want of an engine as one line."""
    report = yield
    if report.skipped and isinstance(report.longrepr, tuple):
        report.longrepr = __file__, 0, report.longrepr[2]
    funcargs: dict[str, object] = getattr(item, "funcargs", {})
    stack = funcargs.get("stack") or funcargs.get("built_stack") or funcargs.get("metrics_stack")
    if report.failed and isinstance(stack, Stack):
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            log = stack.compose("logs", "--no-color", "--tail=25", "gateway", "mock-model")
            report.sections.append(("docker compose logs", log))
    return report


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    reason = why_no_engine()
    if reason is None:
        return
    if os.environ.get("STACK_TESTS") == "require":
        pytest.exit(f"STACK_TESTS=require, but {reason}", returncode=1)
    pytest.skip(f"{reason}: the stack was not tested")


@pytest.fixture(scope="session")
def built_stack(engine: None) -> Iterator[Stack]:
    stack = Stack.with_free_ports()
    stack.down()
    try:
        stack.compose("up", "--build", "--wait", seconds=600)
        yield stack
    finally:
        stack.down()


@pytest.fixture
def stack(built_stack: Stack) -> Stack:
    if not built_stack.running() >= SERVICES:  # a test before this one left something undone
        built_stack.compose("up", "--wait")
    built_stack.steady()
    return built_stack
