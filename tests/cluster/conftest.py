"""One release for all tests here: installed at the first, left as it was after each, removed after the last."""

import contextlib
import subprocess
import time
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from chaos.report import report
from testkit import REPOSITORY
from tests.cluster.cluster import Release, bring_images, kubectl, remove, run, why_no_cluster
from tests.cluster.rollouts import Rollouts
from tests.suites import mark, need, skip_as_one

HERE = Path(__file__).parent
REPORT = REPOSITORY / "rollout-report.html"
COMMAND = "make test-cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark(items, HERE, "cluster", 720)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the state of the pods with a failed test, and all skips for want of a cluster as one line."""
    result = yield
    skip_as_one(result, __file__)
    if result.failed and "release" in getattr(item, "funcargs", {}):
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            result.sections.append(("kubectl get pods", kubectl("get", "pods", "-o", "wide")))
            logs = ("logs", "-l", "app.kubernetes.io/component=gateway", "--tail=15", "--prefix")
            result.sections.append(("kubectl logs", kubectl(*logs)))
    return result


@pytest.fixture(scope="session", autouse=True)
def cluster() -> None:
    need(why_no_cluster(), "CLUSTER_TESTS", "the chart was not tried on a cluster")


@pytest.fixture(scope="session")
def installed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    remove()
    bring_images()
    try:
        yield Release.install(tmp_path_factory.mktemp("release") / "values.json")
    finally:
        remove()


@pytest.fixture
def release(installed: Release) -> Iterator[Release]:
    installed.settled()
    with installed.left_as_it_was():
        yield installed


@pytest.fixture(scope="session")
def rollouts(installed: Release) -> Iterator[Rollouts]:
    """What is played here, of which a report is written at the end."""
    rollouts = Rollouts(installed)
    yield rollouts
    if rollouts.played:
        server = run("kubectl", "version").splitlines()[-1]
        when = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        page = report(
            rollouts.played,
            chosen=len(rollouts.played),
            where=f"Kubernetes, {server}",
            when=when,
            command=COMMAND,
            title="Rollouts",
        )
        REPORT.write_text(page, encoding="utf-8")
