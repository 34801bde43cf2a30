"""One stack for all tests here: made at the first, left steady before each, removed after the last."""

import contextlib
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.stack.engine import SERVICES, Stack, why_no_engine
from tests.suites import mark, need, skip_as_one

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, HERE, "stack", 240)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the services' last log lines with a failed test, and all skips for want of an engine as one line."""
    report = yield
    skip_as_one(report, __file__)
    funcargs: dict[str, object] = getattr(item, "funcargs", {})
    stack = funcargs.get("stack") or funcargs.get("built_stack") or funcargs.get("metrics_stack")
    if report.failed and isinstance(stack, Stack):
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            log = stack.compose("logs", "--no-color", "--tail=25", "gateway", "mock-model")
            report.sections.append(("docker compose logs", log))
    return report


@pytest.fixture(scope="session", autouse=True)
def engine() -> None:
    need(why_no_engine(), "STACK_TESTS", "the stack was not tested")


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
