"""The environment of a developer's shell must not reach the tests; which event loops a test runs on."""

import asyncio
import os
from collections.abc import Callable, Mapping

import pytest
import uvloop

PREFIXES = ("GATEWAY_", "OTEL_", "MOCK_")
NAMES = ("HOST", "PORT", "CONTROL_HOST", "CONTROL_PORT", "APP_MODE", "MODEL_NAME", "LOG_LEVEL")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)


def pytest_asyncio_loop_factories(item: pytest.Item) -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop of asyncio; for tests that name their `loop_factories` uvloop as well."""
    factories: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
    marker = item.get_closest_marker("asyncio")
    if marker is not None and "loop_factories" in marker.kwargs:
        factories["uvloop"] = uvloop.new_event_loop
    return factories
