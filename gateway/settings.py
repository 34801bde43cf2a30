"""The settings: read from the environment once, at start, and checked.

Nothing else reads the environment (the OpenTelemetry SDK reads its own `OTEL_*`). Durations are float seconds.
"""

import os
import re
from dataclasses import dataclass
from os.path import exists, expanduser
from pathlib import Path
from typing import Annotated, Any, Literal, get_args
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from gateway.files import Files

SECRETS = ("GATEWAY_API_KEYS", "GATEWAY_BACKEND_API_KEY", "GATEWAY_ADMIN_KEY", "GATEWAY_LIMITS_URL")
"""Variables that can also be given as `NAME_FILE`: the path of a file that holds the value."""
MAY_BE_EMPTY = ("GATEWAY_PROBE_PATH",)
"""Variables for which an empty value is a value. An empty secret is an error; any other is as if it were not set."""
BYTE_ORDER_MARK = "\ufeff"
SAMPLERS = (
    "always_on",
    "always_off",
    "traceidratio",
    "parentbased_always_on",
    "parentbased_always_off",
    "parentbased_traceidratio",
)
"""Those of the SDK itself."""
DIGITS = 9
"""Of a number of OpenTelemetry's at most: milliseconds of eleven days."""
NETRC = ("~/.netrc", "~/_netrc")
_USER_INFO = re.compile(r"[^,\n'\"]*@")
"""Everything up to the last @ of an entry: an invalid url may have its password anywhere before it."""


Commit = Literal["first_token", "first_answer", "complete"]
"""When a stream is passed on: at its first content, at its first answer after any reasoning, or when it is complete."""
COMMITS: tuple[Commit, ...] = get_args(Commit)
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
A_URL = "an http:// or https:// url with a host, without query and fragment, in ASCII"

A_STORE_URL = (
    "valkey://host, valkey://user:password@host:port/0 or, with TLS, valkeys://...; redis:// and rediss:// are the same"
)


class SettingsError(Exception):
    """A setting is invalid. The message is one line: the variable, its value, what is allowed."""


def _split(value: object) -> object:
    """Split `"a, b"`, or lines, into `["a", "b"]`. Raises: ValueError."""
    if not isinstance(value, str):
        return value
    parts = [part.strip() for part in value.replace("\n", ",").split(",") if part.strip()]
    if not parts and value.strip():  # a lone comma must not open the gateway to everybody
        raise ValueError("no entry")
    return parts


def check_url(url: str) -> str:
    """Return an absolute http(s) url with a host. Raises: ValueError."""
    try:
        parts = urlsplit(url)
        valid = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
        (parts.hostname or "").encode("idna")  # a UnicodeError is a ValueError: an empty label, or one above 63 letters
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or not (url.isascii() and url.isprintable()) or " " in url:
        raise ValueError(f"{A_URL} is needed")
    return url


def _check_store_url(value: SecretStr) -> SecretStr:
    """Return the url of a Valkey or Redis. Raises: ValueError."""
    url = value.get_secret_value()
    parts = urlsplit(url)
    known = parts.scheme in {"valkey", "valkeys", "redis", "rediss"} and bool(parts.hostname) and parts.port != 0
    database = parts.path.strip("/")
    if not known or parts.query or parts.fragment or " " in url or not (database.isdecimal() or not database):
        raise ValueError(A_STORE_URL)
    return value


def check_path(path: str) -> str:
    """Return the path of a url, or the empty text. Raises: ValueError."""
    if path and (not path.startswith("/") or not path.isascii() or not path.isprintable() or set(path) & {" ", "#"}):
        raise ValueError("a path that begins with '/' is needed")
    return path


def _printable(value: str) -> str:
    """Return a text that may stand in a log, a header's value or JSON. Raises: ValueError."""
    if not value.isprintable():
        raise ValueError("it holds a control character, or is not UTF-8 text")
    return value


def _host(value: str) -> str:
    """Return a name or an address that can be looked up. Raises: ValueError."""
    value.encode("idna")  # a UnicodeError is a ValueError
    return _printable(value)


def _one_key(value: SecretStr | None) -> SecretStr | None:
    """Return a single key. Raises: ValueError."""
    if value is not None and len(value.get_secret_value().split()) != 1:
        raise ValueError("spaces or several lines")
    return value


def _known_log_level(value: str) -> str:
    level = value.upper()
    if level not in LOG_LEVELS:
        raise ValueError(level)
    return level


Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False, description="a number of seconds greater than 0")]
SecondsOrNone = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a number of seconds, 0 or more")]
Share = Annotated[float, Field(ge=0, allow_inf_nan=False, description="a share, 0 or more")]
Count = Annotated[int, Field(ge=1, description="a whole number of at least 1")]
CountOrNone = Annotated[int, Field(ge=0, description="a whole number of at least 0")]
MOST_WORKERS = 256
"""More than any machine has cores for."""


class Settings(BaseSettings):
    """Every variable of the gateway: the field has its name in lower case; the description says what is allowed."""

    model_config = SettingsConfigDict(extra="ignore", env_ignore_empty=True, frozen=True)

    host: Annotated[str, AfterValidator(_host), Field(description="an address or the name of a host")] = "0.0.0.0"
    port: Annotated[int, Field(ge=0, le=65535, description="a whole number from 0 to 65535")] = 8000
    app_mode: Annotated[Literal["dev", "prod"], Field(description="dev or prod")] = "dev"
    model_name: Annotated[
        Annotated[str, AfterValidator(_printable), Field(min_length=1, max_length=256)] | None,
        Field(description="1 to 256 printable characters"),
    ] = None
    log_level: Annotated[
        str, AfterValidator(_known_log_level), Field(description=f"one of {', '.join(LOG_LEVELS)}")
    ] = "INFO"

    gateway_workers: Annotated[
        int, Field(ge=0, le=MOST_WORKERS, description=f"a whole number from 0 to {MOST_WORKERS}")
    ] = 1

    gateway_backend_urls: Annotated[
        list[Annotated[str, AfterValidator(check_url)]],
        NoDecode,
        BeforeValidator(_split),
        Field(min_length=1, description=f"at least one url, separated by commas or lines, each {A_URL}"),
    ] = Field(default=["http://127.0.0.1:8001"], validate_default=True)
    gateway_backend_api_key: SecretStr | None = None
    gateway_config: Path | None = None
    gateway_api_keys: Annotated[
        list[SecretStr],
        NoDecode,
        BeforeValidator(_split),
        Field(description="one key or several, separated by commas or lines; unset it for none"),
    ] = []

    gateway_admin_key: Annotated[SecretStr | None, AfterValidator(_one_key), Field(description="one key")] = None

    gateway_state_dir: Path | None = None
    gateway_limits_url: Annotated[
        Annotated[SecretStr, AfterValidator(_check_store_url)] | None, Field(description=A_STORE_URL)
    ] = None
    gateway_limits_fallback_share: Annotated[
        float, Field(gt=0, le=1, allow_inf_nan=False, description="a share, greater than 0 and at most 1")
    ] = 0.25

    gateway_ui_mock_control: Annotated[Annotated[str, AfterValidator(check_url)] | None, Field(description=A_URL)] = (
        None
    )

    gateway_request_deadline: Seconds = 600
    gateway_connect_timeout: Seconds = 1
    gateway_first_token_timeout: Seconds = 30
    gateway_answer_timeout: Seconds = 120
    gateway_idle_timeout: Seconds = 30
    gateway_body_timeout: Seconds = 30
    gateway_heartbeat: SecondsOrNone = 0
    gateway_outage_wait: SecondsOrNone = 5

    gateway_max_attempts: Count = 3
    gateway_backoff_initial: SecondsOrNone = 0.1
    gateway_backoff_max: SecondsOrNone = 2
    gateway_retry_after_max: SecondsOrNone = 10
    gateway_retry_budget: Share = 0.2
    gateway_retry_floor: CountOrNone = 10

    gateway_breaker_failures: Count = 5
    gateway_breaker_open_seconds: Seconds = 5
    gateway_breaker_open_max: Seconds = 10

    gateway_max_connections: Annotated[Count | None, Field(description="a whole number of at least 1")] = None
    gateway_keepalive_timeout: Seconds = 75
    gateway_write_timeout: Seconds = 60
    gateway_max_in_flight: Count = 1024
    gateway_max_queue: CountOrNone = 256
    gateway_queue_timeout: Seconds = 2
    gateway_max_body_bytes: Count = 33_554_432
    gateway_max_answer_bytes: Count = 67_108_864
    gateway_max_buffered_bytes: Count = 268_435_456

    gateway_stream_commit: Annotated[Commit, Field(description="first_token, first_answer or complete")] = "first_token"
    gateway_probe_path: Annotated[
        str, AfterValidator(check_path), Field(description="a path that begins with '/', or empty for no probes")
    ] = "/health"
    gateway_probe_interval: Seconds = 2
    gateway_probe_timeout: Seconds = 2
    gateway_shutdown_delay: SecondsOrNone = 0
    gateway_shutdown_grace: SecondsOrNone = 20
    gateway_capture_content: Annotated[bool, Field(description="true or false")] = False
    gateway_kept_requests: Annotated[int, Field(ge=0, le=10_000, description="a whole number from 0 to 10000")] = 1000

    @property
    def workers(self) -> int:
        """How many processes share the port: no more than requests may be in flight, since each may have one."""
        wanted = self.gateway_workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
        return min(wanted, self.gateway_max_in_flight)

    gateway_trace_keep_slow: Annotated[
        Annotated[float, Field(gt=0)] | Literal["off"], Field(description="a number of seconds greater than 0, or off")
    ] = 10


def load(files: Files | None = None, /, **overrides: Any) -> Settings:  # noqa: ANN401
    """Read and check the environment.

    Args:
        files: reads those that hold secrets.
        **overrides: fields that win over it, for tests and tools.

    Raises:
        SettingsError: the first setting that is invalid, in one line.
    """
    files = files or Files()
    secrets = {name.lower(): value for name in SECRETS if (value := secret(name, files)) is not None}
    empty = {name.lower(): "" for name in MAY_BE_EMPTY if os.environ.get(name) == ""}
    try:
        return Settings(**(secrets | empty | overrides))
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None


def secret(name: str, files: Files) -> str | None:
    """Return the value of the variable `name`, or of the file that `NAME_FILE` names; None when neither is set.

    Spaces around lines and blank lines are dropped, in a file also a byte order mark and comments (lines that begin
    with `#`).

    Args:
        name: of the variable.
        files: reads the file.

    Raises:
        SettingsError: both are set, or nothing is left, or a line is not printable text, or the file cannot be read.
    """
    value, path = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value is not None and path is not None:
        raise SettingsError(f"{name} and {name}_FILE are both set: set only one of them")
    if value is not None:
        return _printable_lines(value, f"{name}=(hidden)", comment=None)
    if path is None:
        return None
    where = f"{name}_FILE={path!r}"
    if not path:
        raise SettingsError(f"{where}: it is empty; give it the path of a file, or unset the variable to do without")
    try:
        text = files.read(Path(path)).decode("utf-8", "surrogateescape").removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise SettingsError(f"{where}: {error.strerror}; it must be the path of a readable text file") from None
    return _printable_lines(text, where, comment="#")


def _printable_lines(text: str, where: str, *, comment: str | None) -> str:
    """Return the lines of a secret, without those that begin with `comment`. Raises: SettingsError."""
    kept = []
    for number, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or (comment is not None and stripped.startswith(comment)):
            continue
        if not stripped.isprintable():
            raise SettingsError(f"{where}: line {number} holds a control character, or is not UTF-8 text")
        kept.append(stripped)
    if not kept:
        raise SettingsError(f"{where}: there is nothing in it; give it a value, or unset the variable to do without")
    return "\n".join(kept)


def _one_line(error: ValidationError) -> str:
    wrong = dict.fromkeys(str(each["loc"][0]) for each in error.errors())
    field = next(iter(wrong))
    name = field.upper()
    value = os.environ.get(name, error.errors()[0]["input"])
    shown = "(hidden)" if name in SECRETS else _USER_INFO.sub("(hidden)@", repr(value))
    others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return f"{name}={shown} is not valid: it must be {Settings.model_fields[field].description}{others}"


def unknown() -> list[str]:
    """Return the variables that look like settings but are not, sorted: a misspelt one is not silently ignored."""
    known = {name.upper() for name in Settings.model_fields} | {f"{name}_FILE" for name in SECRETS}
    return sorted(name for name in os.environ if name.startswith("GATEWAY_") and name not in known)


def lacks_its_urls(settings: Settings) -> bool:
    """Return whether the urls are given but empty, as of a variable of the shell that is not set, and needed."""
    return os.environ.get("GATEWAY_BACKEND_URLS") == "" and settings.gateway_config is None


def set_threads_of_libuv() -> None:
    """Have more threads for name look-ups, unless the environment says how many; call it before the loop starts.

    Half of them may wait for name servers. Of the default 4, two look-ups of a dead name would block those of every
    other backend.
    """
    os.environ.setdefault("UV_THREADPOOL_SIZE", "32")


@dataclass(frozen=True)
class CollectorSettings:
    """How a collector is reached by HTTP.

    Attributes:
        certificate: file of the authorities that are trusted, or None: the system's.
        client_certificate, client_key: files of our own certificate, or None.
        proxy: url of the proxy on the way, or None.
        trusts_environment: its name and password may be in a file (`.netrc`).
        by_provider: a plugin of the SDK logs in, with a session of `requests`.
    """

    certificate: str | None = None
    client_certificate: str | None = None
    client_key: str | None = None
    proxy: str | None = None
    trusts_environment: bool = False
    by_provider: bool = False


@dataclass(frozen=True)
class SpanBatches:
    """How spans are batched: `OTEL_BSP_*`. None: the gateway's own figure.

    Attributes:
        delay: seconds between exports while less than a batch waits.
        queue: spans that wait at most.
        size: spans of an export at most.
        timeout: seconds an export may take at most, beside the exporter's own time limit.
    """

    delay: float | None = None
    queue: int | None = None
    size: int | None = None
    timeout: float | None = None


@dataclass(frozen=True)
class MetricSettings:
    """How metrics are exported by OTLP.

    Attributes:
        enabled: an endpoint for them is set.
        protocol: `http/protobuf` or `grpc`.
        collector: how it is reached by HTTP.
        interval: seconds between exports.
        timeout: seconds an export may take at most, beside the exporter's own time limit.
        delta: whether what is counted is told since the export before, else since the start.
    """

    enabled: bool = False
    protocol: str = "http/protobuf"
    collector: CollectorSettings = CollectorSettings()
    interval: float = 60.0
    timeout: float | None = None
    delta: bool = False


@dataclass(frozen=True)
class OtelSettings:
    """The few `OTEL_*` variables that decide what is built; the SDK reads all others itself.

    Attributes:
        disabled: no spans at all.
        has_endpoint: an OTLP endpoint is set.
        protocol: `http/protobuf` or `grpc`.
        collector: how it is reached by HTTP.
        batches: how spans are batched.
        metrics: how metrics are exported.
        complaints: variables that are not valid, and for which their defaults stand in, as OpenTelemetry asks.
    """

    disabled: bool
    has_endpoint: bool
    protocol: str
    collector: CollectorSettings
    batches: SpanBatches = SpanBatches()
    metrics: MetricSettings = MetricSettings()
    complaints: tuple[str, ...] = ()


def load_otel() -> OtelSettings:
    """Read and check `OTEL_*`.

    Raises:
        SettingsError: protocol, endpoint or sampler is invalid.
    """
    env = os.environ
    protocol = _protocol("TRACES")
    _check_endpoint("OTEL_EXPORTER_OTLP_ENDPOINT", protocol)
    _check_endpoint("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", protocol)
    endpoint = _of_signal("TRACES", "ENDPOINT")
    _check_sampler(env.get("OTEL_TRACES_SAMPLER", "").lower().strip(), env.get("OTEL_TRACES_SAMPLER_ARG"))
    off = env.get("OTEL_SDK_DISABLED", "").lower() == "true"
    complaints: list[str] = []
    return OtelSettings(
        disabled=off or env.get("OTEL_TRACES_EXPORTER") == "none",
        has_endpoint=endpoint is not None,
        protocol=protocol,
        collector=load_collector(endpoint or ""),
        batches=_batches(complaints),
        metrics=MetricSettings() if off or env.get("OTEL_METRICS_EXPORTER") == "none" else _metrics(complaints),
        complaints=tuple(complaints),
    )


def _batches(complaints: list[str]) -> SpanBatches:
    queue = _positive("OTEL_BSP_MAX_QUEUE_SIZE", complaints)
    size = _positive("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", complaints)
    if queue is not None and size is not None and size > queue:
        complaints.append(
            f"OTEL_BSP_MAX_EXPORT_BATCH_SIZE={size} is more than OTEL_BSP_MAX_QUEUE_SIZE: {queue} is used"
        )
        size = queue
    delay = _positive("OTEL_BSP_SCHEDULE_DELAY", complaints)
    timeout = _positive("OTEL_BSP_EXPORT_TIMEOUT", complaints)
    return SpanBatches(_seconds(delay), queue, size, _seconds(timeout))


def _metrics(complaints: list[str]) -> MetricSettings:
    protocol = _protocol("METRICS")
    own = "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT"
    _check_endpoint(own if os.environ.get(own) else "OTEL_EXPORTER_OTLP_ENDPOINT", protocol)
    endpoint = _of_signal("METRICS", "ENDPOINT")
    if endpoint is None:
        return MetricSettings()
    name = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
    temporality = os.environ.get(name, "").strip().lower() or "cumulative"
    if temporality not in {"cumulative", "delta", "lowmemory"}:
        complaints.append(f"{name}={temporality!r} is not valid: cumulative is used; or set delta or lowmemory")
    interval = _positive("OTEL_METRIC_EXPORT_INTERVAL", complaints)
    timeout = _positive("OTEL_METRIC_EXPORT_TIMEOUT", complaints)
    return MetricSettings(
        enabled=True,
        protocol=protocol,
        collector=load_collector(endpoint, "METRICS"),
        interval=_seconds(interval) or MetricSettings.interval,
        timeout=_seconds(timeout),
        delta=temporality in {"delta", "lowmemory"},
    )


def _positive(name: str, complaints: list[str]) -> int | None:
    """Return a whole number of at least 1; None where it is not set, or is none, which OpenTelemetry asks to bear."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if text.isascii() and text.isdecimal() and len(text) <= DIGITS and int(text) > 0:
        return int(text)
    complaints.append(
        f"{name}={text!r} is not valid: the default is used; it must be a whole number from 1 to 999999999"
    )
    return None


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds is not None else None


def load_collector(endpoint: str, signal: str = "TRACES") -> CollectorSettings:
    """Read how a collector of `TRACES` or `METRICS` is reached by HTTP."""
    providers = (f"OTEL_PYTHON_EXPORTER_OTLP_HTTP_{kind}CREDENTIAL_PROVIDER" for kind in ("", f"{signal}_"))
    return CollectorSettings(
        certificate=_of_signal(signal, "CERTIFICATE"),
        client_certificate=_of_signal(signal, "CLIENT_CERTIFICATE"),
        client_key=_of_signal(signal, "CLIENT_KEY"),
        proxy=_proxy(endpoint),
        trusts_environment=bool(os.environ.get("NETRC")) or any(exists(expanduser(file)) for file in NETRC),  # noqa: PTH110, PTH111 - pathlib raises without a HOME
        by_provider=any(os.environ.get(name) for name in providers),
    )


def _of_signal(signal: str, name: str) -> str | None:
    """Return a variable of the exporter, its form for one signal first."""
    prefix = "OTEL_EXPORTER_OTLP_"
    return os.environ.get(f"{prefix}{signal}_{name}") or os.environ.get(f"{prefix}{name}") or None


def _protocol(signal: str) -> str:
    """Return the protocol of a signal. Raises: SettingsError."""
    name = f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL"
    if not os.environ.get(name):
        name = "OTEL_EXPORTER_OTLP_PROTOCOL"
    protocol = os.environ.get(name) or "http/protobuf"
    if protocol not in {"http/protobuf", "grpc"}:
        raise SettingsError(f"{name}={protocol!r} is not valid: it must be http/protobuf or grpc")
    return protocol


def _proxy(endpoint: str) -> str | None:
    url, proxies = urlsplit(endpoint), getproxies()
    if not proxies or proxy_bypass(url.hostname or ""):
        return None
    return proxies.get(url.scheme) or proxies.get("all")


def _check_endpoint(name: str, protocol: str) -> None:
    url = os.environ.get(name)
    if url and protocol == "http/protobuf" and not url.lower().startswith(("http://", "https://")):
        shown = _USER_INFO.sub("(hidden)@", repr(url))
        raise SettingsError(f"{name}={shown} is not valid: it must be a url that begins with http:// or https://")


def _check_sampler(sampler: str, ratio: str | None) -> None:
    """Refuse an unknown sampler or ratio: the SDK would only warn, and trace everything."""
    if sampler and sampler not in SAMPLERS:
        raise SettingsError(f"OTEL_TRACES_SAMPLER={sampler!r} is not valid: it must be one of {', '.join(SAMPLERS)}")
    if not sampler.endswith("ratio") or not ratio:
        return
    try:
        valid = 0 <= float(ratio) <= 1
    except ValueError:
        valid = False
    if not valid:
        raise SettingsError(f"OTEL_TRACES_SAMPLER_ARG={ratio!r} is not valid: it must be a number from 0 to 1")
