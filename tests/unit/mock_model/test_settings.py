import logging

import pytest

from mock_model.settings import Settings, SettingsError, read_settings


def test_defaults_are_those_of_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)

    settings = read_settings()

    assert (settings.host, settings.port) == ("127.0.0.1", 8001)
    assert (settings.control_host, settings.control_port) == ("127.0.0.1", 8002)
    assert settings.model_name == "demo-model"
    assert settings.otel_service_name == "mock-model"
    assert settings.level == logging.INFO
    assert not settings.exports_traces


def test_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "9001")
    monkeypatch.setenv("MOCK_SEED", "7")
    monkeypatch.setenv("MOCK_TTFT", "0.5")
    monkeypatch.setenv("LOG_LEVEL", "WARNING")
    monkeypatch.setenv("MOCK_JOURNAL_FILE", "")
    monkeypatch.setenv("MOCK_CONTROL_HOSTS", "a.example, b.example,")
    monkeypatch.setenv("MOCK_MODELS", "one, org/two:tag")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")

    settings = read_settings()

    assert (settings.port, settings.mock_seed, settings.mock_ttft) == (9001, 7, 0.5)
    assert settings.level == logging.WARNING
    assert settings.mock_journal_file is None
    assert settings.mock_control_hosts == ["a.example", "b.example"]
    assert settings.mock_models == ["one", "org/two:tag"]
    assert settings.exports_traces
    assert settings.traces_protocol == "grpc"


def test_no_exporter_is_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")

    assert not read_settings().exports_traces


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "eight"),
        ("PORT", "70000"),
        ("CONTROL_PORT", "-1"),
        ("APP_MODE", "test"),
        ("LOG_LEVEL", "loud"),
        ("MOCK_SEED", "1.5"),
        ("MOCK_TTFT", "-1"),
        ("MOCK_TTFT", "nan"),
        ("MOCK_TOKEN_INTERVAL", "inf"),
        ("MOCK_JITTER", "2"),
        ("MOCK_MAX_CONCURRENCY", "-1"),
        ("MOCK_TOKENS", "0"),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json"),
    ],
)
def test_a_bad_value_names_variable_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        read_settings()

    text = str(caught.value)
    assert text.startswith(f"{name}={value!r} is not allowed: it must be ")
    assert "None" not in text
    assert "\n" not in text


def test_every_setting_that_can_be_wrong_says_what_is_allowed() -> None:
    for name, field in Settings.model_fields.items():
        if field.annotation not in {str, str | None} or field.metadata:
            assert field.description, name
