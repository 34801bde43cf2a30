"""The chaos suite: `make test-chaos`; `REPEATS=5` repeats every test with further seeds, `CHAOS_SEED` is the first."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from chaos.arena import Arena
from testkit.browser import BROWSERS, Tab, browser_tab, find_browser
from tests.chaos.verdict import StartArena

TIMEOUT = 180


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is marked `chaos`."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("chaos")
            item.add_marker(pytest.mark.timeout(TIMEOUT))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        first, repeats = int(os.environ.get("CHAOS_SEED", "1")), int(os.environ.get("REPEATS") or "1")
        metafunc.parametrize("seed", range(first, first + repeats), ids=lambda seed: f"seed-{seed}")


@pytest.fixture
async def start_arena(seed: int) -> AsyncIterator[StartArena]:
    """Start an arena; keyword arguments are those of `Arena`."""
    print(f"seed {seed}: CHAOS_SEED={seed} repeats this run")  # noqa: T201
    async with AsyncExitStack() as stack:

        async def start(**options: Any) -> Arena:  # noqa: ANN401
            return await stack.enter_async_context(Arena(seed, **options))

        yield start


@pytest.fixture(scope="session")
def browser() -> str:
    """The path of a browser."""
    found = find_browser()
    if found is None:
        reason = f"none of {', '.join(BROWSERS)} is installed"
        if os.environ.get("BROWSER_TESTS") == "require":
            pytest.fail(f"BROWSER_TESTS=require, but {reason}")
        pytest.skip(f"{reason}: nothing was opened in a browser")
    return found


@pytest.fixture
async def tab(browser: str, tmp_path: Path) -> AsyncIterator[Tab]:
    """A page in it."""
    async with browser_tab(browser, tmp_path) as page:
        yield page
