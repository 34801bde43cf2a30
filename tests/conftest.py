"""The environment of a developer's shell must not reach the tests."""

import os

import pytest

PREFIXES = ("GATEWAY_", "OTEL_", "MOCK_")
NAMES = ("HOST", "PORT", "CONTROL_HOST", "CONTROL_PORT", "APP_MODE", "MODEL_NAME", "LOG_LEVEL")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(PREFIXES) or name in NAMES:
            monkeypatch.delenv(name)
