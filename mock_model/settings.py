"""The settings, read from the environment and checked at the start."""

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DAY = 86_400.0


def _split(value: Any) -> Any:  # noqa: ANN401
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _lower(value: Any) -> Any:  # noqa: ANN401
    return value.lower() if isinstance(value, str) else value


Port = Annotated[int, Field(ge=0, le=65_535, description="a whole number from 0 to 65535 (0: any free port)")]
Name = Annotated[str, Field(min_length=1, description="a text that is not empty")]
Seconds = Annotated[float, Field(ge=0, le=DAY, allow_inf_nan=False, description="a number of seconds from 0 to 86400")]
LogLevel = Annotated[Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)]
AppMode = Annotated[Literal["dev", "prod"], BeforeValidator(_lower)]
Protocol = Annotated[Literal["http/protobuf", "grpc"], BeforeValidator(_lower)]
PROTOCOLS = "http/protobuf or grpc"


class SettingsError(Exception):
    """A setting cannot be used. The text is one line with its name, its value and what is allowed."""


class Settings(BaseSettings):
    """The mock model's settings; each field is the environment variable of the same name in capitals.

    Durations are float seconds. Names given to the constructor win over the environment.
    """

    model_config = SettingsConfigDict(env_ignore_empty=True, frozen=True, extra="ignore")

    host: Name = "127.0.0.1"
    port: Port = 8001
    control_host: Name = "127.0.0.1"
    control_port: Port = 8002
    app_mode: AppMode = Field(default="dev", description="dev or prod")
    log_level: LogLevel = Field(default="info", description="debug, info, warning, error or critical")
    model_name: Name = "demo-model"
    mock_models: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(
        default=[], description="names of models, separated by commas"
    )

    mock_seed: int = Field(default=0, description="a whole number")
    mock_ttft: Seconds = 0.02
    mock_token_interval: Seconds = 0.005
    mock_jitter: float = Field(
        default=0.0,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="a number from 0 to 1 (the part a wait may differ by)",
    )
    mock_max_concurrency: int = Field(
        default=0, ge=0, le=1_000_000, description="a whole number from 0 to 1000000 (0: no limit)"
    )
    mock_tokens: int = Field(default=16, ge=1, le=100_000, description="a whole number from 1 to 100000")
    mock_control_hosts: Annotated[list[str], NoDecode, BeforeValidator(_split)] = Field(
        default=[], description="names of hosts, separated by commas"
    )
    mock_journal_file: Path | None = Field(default=None, description="the path of a file that can be written")

    otel_traces_exporter: str = "otlp"
    otel_exporter_otlp_endpoint: str | None = None
    otel_exporter_otlp_traces_endpoint: str | None = None
    otel_exporter_otlp_protocol: Protocol = Field(default="http/protobuf", description=PROTOCOLS)
    otel_exporter_otlp_traces_protocol: Protocol | None = Field(default=None, description=PROTOCOLS)
    otel_service_name: Name = "mock-model"

    @property
    def exports_traces(self) -> bool:
        """Whether an OTLP endpoint is configured."""
        if self.otel_traces_exporter == "none":
            return False
        return bool(self.otel_exporter_otlp_endpoint or self.otel_exporter_otlp_traces_endpoint)

    @property
    def traces_protocol(self) -> str:
        """The OTLP protocol in force for traces."""
        return self.otel_exporter_otlp_traces_protocol or self.otel_exporter_otlp_protocol

    @property
    def level(self) -> int:
        """The log level as a number of `logging`."""
        return logging.getLevelNamesMapping()[self.log_level.upper()]


def read_settings() -> Settings:
    """Return settings from the environment.

    Raises:
        SettingsError: a variable cannot be used.
    """
    try:
        return Settings()  # type: ignore[call-arg,unused-ignore]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).lower()
        allowed = Settings.model_fields[name].description
        raise SettingsError(f"{name.upper()}={first['input']!r} is not allowed: it must be {allowed}") from None
