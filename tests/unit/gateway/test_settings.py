import inspect
import os
from pathlib import Path

import pytest

from gateway.settings import (
    SECRETS,
    CollectorSettings,
    MetricSettings,
    OtelSettings,
    Settings,
    SettingsError,
    SpanBatches,
    load,
    load_otel,
    unknown,
)

WRONG = [
    ("PORT", "x", "a whole number"),
    ("PORT", "-1", "0"),
    ("PORT", "65536", "65535"),
    ("APP_MODE", "test", "dev or prod"),
    ("LOG_LEVEL", "loud", "DEBUG, INFO, WARNING, ERROR, CRITICAL"),
    ("MODEL_NAME", "m" * 257, "256"),
    *(("MODEL_NAME", f"a{odd}b", "printable") for odd in ("\n", "\r\n", "\x1b", "\udcff")),
    *(("HOST", odd, "name of a host") for odd in ("a\nb", "a..b", "a" * 64, "\udcff")),
    *(("GATEWAY_BACKEND_URLS", f"http://host/a{odd}b", "ASCII") for odd in ("\r\n", "\x7f", "\u00e4", "\udcff")),
    ("GATEWAY_BACKEND_URLS", "http://b\u00fccher.example", "ASCII"),
    ("GATEWAY_BACKEND_URLS", "localhost:8001", "http://"),
    ("GATEWAY_UI_MOCK_CONTROL", "localhost:8002", "http://"),
    ("GATEWAY_BACKEND_URLS", "ftp://host", "http://"),
    ("GATEWAY_BACKEND_URLS", "http://", "host"),
    ("GATEWAY_BACKEND_URLS", "http://:8001", "host"),
    ("GATEWAY_BACKEND_URLS", "http://a..b:8001", "host"),
    ("GATEWAY_BACKEND_URLS", f"http://{'a' * 64}.example", "host"),
    ("GATEWAY_BACKEND_URLS", "http://host:0", "host"),
    ("GATEWAY_BACKEND_URLS", "http://host:99999", "host"),
    ("GATEWAY_BACKEND_URLS", "http://host:port", "host"),
    ("GATEWAY_BACKEND_URLS", "http://[::1", "host"),
    ("GATEWAY_BACKEND_URLS", "http://host?x=1", "query"),
    ("GATEWAY_BACKEND_URLS", "http://host#x", "fragment"),
    ("GATEWAY_BACKEND_URLS", "http://two words", "host"),
    ("GATEWAY_BACKEND_URLS", "http://host/a b", "http://"),
    ("GATEWAY_BACKEND_URLS", "http://a, nonsense", "http://"),
    ("GATEWAY_BACKEND_URLS", " , ", "one"),
    ("GATEWAY_API_KEYS", ",\n,", "one"),
    ("GATEWAY_ADMIN_KEY", "two words", "one key"),
    ("GATEWAY_KEPT_REQUESTS", "-1", "0 to 10000"),
    ("GATEWAY_KEPT_REQUESTS", "10001", "0 to 10000"),
    ("GATEWAY_STREAM_COMMIT", "last_token", "first_token, first_answer or complete"),
    ("GATEWAY_CAPTURE_CONTENT", "maybe", "true or false"),
    ("GATEWAY_TRACE_KEEP_SLOW", "never", "off"),
    ("GATEWAY_TRACE_KEEP_SLOW", "0", "greater than 0"),
    ("GATEWAY_TRACE_KEEP_SLOW", "nan", "greater than 0"),
    ("GATEWAY_RETRY_BUDGET", "-0.1", "0"),
    ("GATEWAY_LIMITS_URL", "http://store", "valkey://"),
    *(("GATEWAY_LIMITS_FALLBACK_SHARE", value, "at most 1") for value in ("0", "1.1", "nan")),
    *(("GATEWAY_PROBE_PATH", path, "begins with '/'") for path in ("health", "/a b", "/ä", "/a#b", "http://h/health")),
    *(("GATEWAY_PROBE_PATH", path, "begins with '/'") for path in ("/a\r\nx: y", "/a\tb", "/\udcff", " /a", "\n")),
]
POSITIVE = [
    *("REQUEST_DEADLINE", "CONNECT_TIMEOUT", "FIRST_TOKEN_TIMEOUT", "ANSWER_TIMEOUT", "IDLE_TIMEOUT", "BODY_TIMEOUT"),
    "WRITE_TIMEOUT",
    *("BREAKER_OPEN_SECONDS", "BREAKER_OPEN_MAX", "QUEUE_TIMEOUT", "PROBE_INTERVAL", "PROBE_TIMEOUT"),
    "KEEPALIVE_TIMEOUT",
]
NOT_NEGATIVE = [
    *(
        "HEARTBEAT",
        "BACKOFF_INITIAL",
        "BACKOFF_MAX",
        "RETRY_AFTER_MAX",
        "RETRY_BUDGET",
        "SHUTDOWN_DELAY",
        "SHUTDOWN_GRACE",
    ),
    "OUTAGE_WAIT",
]
AT_LEAST_ONE = [
    "MAX_ATTEMPTS",
    "BREAKER_FAILURES",
    "MAX_CONNECTIONS",
    "MAX_IN_FLIGHT",
    "MAX_BODY_BYTES",
    "MAX_ANSWER_BYTES",
    "MAX_BUFFERED_BYTES",
]
AT_LEAST_NONE = ["RETRY_FLOOR", "MAX_QUEUE", "WORKERS"]
WRONG += [(f"GATEWAY_{name}", value, "") for name in POSITIVE for value in ("0", "-1", "nan", "inf", "1s", "1,5")]
WRONG += [(f"GATEWAY_{name}", value, "") for name in NOT_NEGATIVE for value in ("-1", "nan", "inf", "many")]
WRONG += [(f"GATEWAY_{name}", value, "") for name in AT_LEAST_ONE for value in ("0", "-1", "1.5", "nan", "many")]
WRONG += [(f"GATEWAY_{name}", value, "") for name in AT_LEAST_NONE for value in ("-1", "1.5", "many")]
WRONG += [("GATEWAY_WORKERS", "257", "a whole number from 0 to 256")]


def complaint(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> str:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as wrong:
        load()
    return str(wrong.value)


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_bad_value_is_one_line_with_the_variable_its_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, allowed: str
) -> None:
    line = complaint(monkeypatch, name, value)

    assert "\n" not in line
    shown = "(hidden)" if name in SECRETS else repr(value)
    assert line.startswith(f"{name}={shown} is not valid: ")
    said = line.partition(" is not valid: ")[2]
    assert said
    assert allowed in said


def test_every_setting_that_can_be_wrong_is_tried() -> None:
    free = {"GATEWAY_BACKEND_API_KEY", "GATEWAY_CONFIG", "GATEWAY_STATE_DIR"}

    assert {name.upper() for name in Settings.model_fields} - free == {name for name, _, _ in WRONG}


def test_more_than_one_bad_value_is_still_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MAX_QUEUE", "x")
    line = complaint(monkeypatch, "PORT", "y")

    assert line.startswith("PORT='y'")
    assert line.endswith("(and 1 more)")


def test_neither_user_info_nor_a_key_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    line = complaint(monkeypatch, "GATEWAY_BACKEND_URLS", "http://user:s3cret@host?x, https://me:s3cret@other#y")
    assert "s3cret" not in line
    assert "host?x" in line
    for odd in ("http://user:s3cret/@host:80", "http://user:s3 cret@host", "user:s3cret@host:80"):
        assert "cret" not in complaint(monkeypatch, "GATEWAY_BACKEND_URLS", odd)
    monkeypatch.delenv("GATEWAY_BACKEND_URLS")
    assert "s3cret" not in repr(load(gateway_api_keys=["s3cret"], gateway_backend_api_key="s3cret"))


def test_without_an_environment_the_defaults_are_those_of_the_contract() -> None:
    settings = load()

    assert (settings.host, settings.port, settings.app_mode, settings.model_name) == (
        "0.0.0.0",
        8000,
        "dev",
        None,
    )
    assert settings.log_level == "INFO"
    assert settings.gateway_backend_urls == ["http://127.0.0.1:8001"]
    assert settings.gateway_backend_api_key is None
    assert settings.gateway_config is None
    assert settings.gateway_api_keys == []
    numbers = {
        "request_deadline": 600,
        "connect_timeout": 1,
        "first_token_timeout": 30,
        "answer_timeout": 120,
        "idle_timeout": 30,
        "body_timeout": 30,
        "write_timeout": 60,
        "heartbeat": 0,
        "max_attempts": 3,
        "backoff_initial": 0.1,
        "backoff_max": 2,
        "retry_after_max": 10,
        "retry_budget": 0.2,
        "retry_floor": 10,
        "breaker_failures": 5,
        "breaker_open_seconds": 5,
        "breaker_open_max": 10,
        "max_in_flight": 1024,
        "max_queue": 256,
        "queue_timeout": 2,
        "max_body_bytes": 33554432,
        "max_answer_bytes": 67108864,
        "max_buffered_bytes": 268435456,
        "stream_commit": "first_token",
        "probe_path": "/health",
        "probe_interval": 2,
        "probe_timeout": 2,
        "shutdown_delay": 0,
        "shutdown_grace": 20,
        "capture_content": False,
        "trace_keep_slow": 10,
    }
    assert {name: getattr(settings, f"gateway_{name}") for name in numbers} == numbers


def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.setenv(name.upper(), "")
    for name in SECRETS:
        monkeypatch.delenv(name)
    assert load().gateway_probe_path == ""
    monkeypatch.delenv("GATEWAY_PROBE_PATH")

    assert load() == Settings.model_construct(**{name: getattr(Settings(), name) for name in Settings.model_fields})
    assert load().gateway_api_keys == []
    assert load().port == 8000


def test_lists_are_split_at_commas_and_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BACKEND_URLS", " http://a:1 ,https://b/v1/\n\nhttp://[::1]:8001,")
    monkeypatch.setenv("GATEWAY_API_KEYS", "one, two\nthree\r\n")
    settings = load()

    assert settings.gateway_backend_urls == ["http://a:1", "https://b/v1/", "http://[::1]:8001"]
    assert [key.get_secret_value() for key in settings.gateway_api_keys] == ["one", "two", "three"]


@pytest.mark.parametrize(("name", "field"), [(name, name.lower()) for name in SECRETS])
def test_a_secret_may_be_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, field: str) -> None:
    file = tmp_path / "secret"
    secret = "valkey://:s3cret@store" if name == "GATEWAY_LIMITS_URL" else "s3cret"
    file.write_text(f"{secret}\n")
    monkeypatch.setenv(f"{name}_FILE", str(file))

    value = getattr(load(), field)
    value = value[0] if isinstance(value, list) else value
    assert value.get_secret_value() == secret


@pytest.mark.parametrize(
    "url", ["valkey://store", "valkeys://store:6380", "redis://:s3cret@store/3", "rediss://user:s3cret@[::1]:6379/0"]
)
def test_the_url_of_a_store_may_be_that_of_a_valkey_or_a_redis(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("GATEWAY_LIMITS_URL", url)
    setting = load().gateway_limits_url
    assert setting is not None
    assert setting.get_secret_value() == url
    assert "s3cret" not in repr(load())


@pytest.mark.parametrize(
    "url",
    ["http://s3cret@store", "valkey://", "s3cret", "valkey://a:s3cret", "valkey://a/s3cret", "valkey://a?s3cret=1"],
)
def test_another_url_of_a_store_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    line = complaint(monkeypatch, "GATEWAY_LIMITS_URL", url)
    assert line.startswith("GATEWAY_LIMITS_URL=(hidden) is not valid: it must be valkey://host, ")
    assert "s3cret" not in line


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_in_both_places_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    file = tmp_path / "secret"
    file.write_text("s3cret")
    monkeypatch.setenv(f"{name}_FILE", str(file))
    line = complaint(monkeypatch, name, "s3cret")

    assert f"{name} and {name}_FILE" in line
    assert "s3cret" not in line


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_secret_file_that_cannot_be_read_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes | None
) -> None:
    file = tmp_path / "secret"
    if content is not None:
        file.write_bytes(content)
    line = complaint(monkeypatch, f"{name}_FILE", str(file))

    assert line.startswith(f"{name}_FILE={str(file)!r}: ")
    assert "\n" not in line


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize("value", ["", " ", "\n", " \r\n\t"])
def test_an_empty_secret_is_an_error_and_not_none(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    line = complaint(monkeypatch, name, value)
    assert line.startswith(f"{name}=(hidden): there is nothing in it; ")
    monkeypatch.delenv(name)
    assert complaint(monkeypatch, f"{name}_FILE", "").startswith(
        f"{name}_FILE='': it is empty; give it the path of a file"
    )


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "content", [b"", b" \r\n", b"\xef\xbb\xbf", b"# a comment\n\n  # another", b"\xef\xbb\xbf# a\r\n"]
)
def test_a_secret_file_without_a_secret_is_an_error_and_not_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, content: bytes
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(content)
    assert complaint(monkeypatch, f"{name}_FILE", str(file)).startswith(f"{name}_FILE={str(file)!r}: there is nothing")


def test_a_file_of_keys_may_have_comments_line_ends_of_windows_and_a_byte_order_mark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    file.write_bytes(
        b"\xef\xbb\xbf# the team's\r\n  one \r\n\r\n\t# two, three\r\nfo#ur, five\r\n" + "schl\u00fcssel".encode()
    )
    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", str(file))
    assert [key.get_secret_value() for key in load().gateway_api_keys] == ["one", "fo#ur", "five", "schl\u00fcssel"]

    file.write_bytes(b"\xef\xbb\xbf# of the backend\r\n s3cret\t\r\n")
    monkeypatch.setenv("GATEWAY_BACKEND_API_KEY_FILE", str(file))
    key = load().gateway_backend_api_key
    assert key is not None
    assert key.get_secret_value() == "s3cret"


def test_a_comment_is_one_in_a_file_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_API_KEYS", "#one,two")
    assert [key.get_secret_value() for key in load().gateway_api_keys] == ["#one", "two"]


@pytest.mark.parametrize("name", SECRETS)
@pytest.mark.parametrize(
    "odd", [b"\0", b"\t", b"\x1b", b"\x7f", b"\r", b"\xff", b"\xc3", "\u200b".encode(), "\ufeff".encode()]
)
def test_a_secret_with_what_nobody_can_type_is_refused_by_line_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, odd: bytes
) -> None:
    file = tmp_path / "secret"
    file.write_bytes(b"# comment\n\ns3" + odd + b"cret\n")
    line = complaint(monkeypatch, f"{name}_FILE", str(file))
    assert line.startswith(f"{name}_FILE={str(file)!r}: line 3 holds")
    assert "s3" not in line
    monkeypatch.delenv(f"{name}_FILE")
    if odd != b"\0":
        line = complaint(monkeypatch, name, os.fsdecode(b"k3y\ns3" + odd + b"cret"))
        assert line.startswith(f"{name}=(hidden): line 2 holds")
        assert "s3" not in line


def test_a_directory_is_no_secret_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert str(tmp_path) in complaint(monkeypatch, "GATEWAY_API_KEYS_FILE", str(tmp_path))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, OtelSettings(disabled=False, has_endpoint=False, protocol="http/protobuf", collector=CollectorSettings())),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"},
            OtelSettings(
                disabled=False,
                has_endpoint=True,
                protocol="http/protobuf",
                collector=CollectorSettings(),
                metrics=MetricSettings(enabled=True),
            ),
        ),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            OtelSettings(disabled=False, has_endpoint=True, protocol="grpc", collector=CollectorSettings()),
        ),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            OtelSettings(disabled=False, has_endpoint=False, protocol="http/protobuf", collector=CollectorSettings()),
        ),
        (
            {"OTEL_SDK_DISABLED": "True"},
            OtelSettings(disabled=True, has_endpoint=False, protocol="http/protobuf", collector=CollectorSettings()),
        ),
        (
            {"OTEL_TRACES_EXPORTER": "none"},
            OtelSettings(disabled=True, has_endpoint=False, protocol="http/protobuf", collector=CollectorSettings()),
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_METRICS_EXPORTER": "none"},
            OtelSettings(disabled=False, has_endpoint=True, protocol="http/protobuf", collector=CollectorSettings()),
        ),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"},
            OtelSettings(disabled=True, has_endpoint=True, protocol="http/protobuf", collector=CollectorSettings()),
        ),
        (
            {
                "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "c:4317",
                "OTEL_EXPORTER_OTLP_METRICS_PROTOCOL": "grpc",
                "OTEL_EXPORTER_OTLP_METRICS_CERTIFICATE": "ca",
                "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "Delta",
                "OTEL_METRIC_EXPORT_INTERVAL": "5000",
                "OTEL_METRIC_EXPORT_TIMEOUT": "1500",
                "OTEL_BSP_SCHEDULE_DELAY": "250",
                "OTEL_BSP_MAX_QUEUE_SIZE": "100",
                "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "50",
                "OTEL_BSP_EXPORT_TIMEOUT": "2000",
            },
            OtelSettings(
                disabled=False,
                has_endpoint=False,
                protocol="http/protobuf",
                collector=CollectorSettings(),
                batches=SpanBatches(delay=0.25, queue=100, size=50, timeout=2.0),
                metrics=MetricSettings(
                    enabled=True,
                    protocol="grpc",
                    collector=CollectorSettings(certificate="ca"),
                    interval=5.0,
                    timeout=1.5,
                    delta=True,
                ),
            ),
        ),
    ],
)
def test_what_is_read_of_opentelemetrys_own_variables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, environment: dict[str, str], expected: OtelSettings
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    assert load_otel() == expected


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "127.0.0.1:4318"},
            "OTEL_EXPORTER_OTLP_ENDPOINT='127.0.0.1:4318' is not valid",
        ),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "x://u:key@c"},
            "ENDPOINT='(hidden)@c' is not valid: it must be a url that begins with",
        ),
        (
            {"OTEL_TRACES_SAMPLER": "sometimes"},
            "OTEL_TRACES_SAMPLER='sometimes' is not valid: it must be one of always_on, ",
        ),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "10%"},
            "OTEL_TRACES_SAMPLER_ARG='10%' is not valid: it must be a number from 0 to 1",
        ),
        (
            {"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "10"},
            "OTEL_TRACES_SAMPLER_ARG='10' is not valid",
        ),
    ],
)
def test_a_wrong_variable_of_opentelemetry_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], says: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        load_otel()
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "variables",
    [
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "collector:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
        {"OTEL_TRACES_SAMPLER": "Always_On", "OTEL_TRACES_SAMPLER_ARG": "whatever"},
        {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.1"},
    ],
)
def test_what_opentelemetry_takes_is_taken(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    load_otel()


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "1e3", "many", "\u0663", "9" * 10, "9" * 10_000])
@pytest.mark.parametrize(
    "name",
    [
        "OTEL_BSP_SCHEDULE_DELAY",
        "OTEL_BSP_MAX_QUEUE_SIZE",
        "OTEL_BSP_MAX_EXPORT_BATCH_SIZE",
        "OTEL_BSP_EXPORT_TIMEOUT",
        "OTEL_METRIC_EXPORT_INTERVAL",
        "OTEL_METRIC_EXPORT_TIMEOUT",
    ],
)
def test_a_number_that_opentelemetry_does_not_take_is_told_and_the_default_used(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c")
    usual = load_otel()
    monkeypatch.setenv(name, value)
    found = load_otel()

    (complaint,) = found.complaints
    assert complaint.startswith(f"{name}={value!r} is not valid")
    assert (found.batches, found.metrics) == (usual.batches, usual.metrics)


def test_a_batch_is_no_larger_than_the_queue_and_an_unknown_temporality_is_cumulative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://c")
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "11")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE", "sometimes")
    found = load_otel()

    assert found.batches.size == 10
    assert not found.metrics.delta
    assert len(found.complaints) == 2


@pytest.mark.parametrize("name", [f"OTEL_EXPORTER_OTLP_{signal}PROTOCOL" for signal in ("", "TRACES_", "METRICS_")])
def test_an_unknown_protocol_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "http/json")
    with pytest.raises(SettingsError) as wrong:
        load_otel()

    assert str(wrong.value) == f"{name}='http/json' is not valid: it must be http/protobuf or grpc"


def test_only_settings_reads_the_environment() -> None:
    package = Path(inspect.getfile(Settings)).parent
    readers = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if any(word in file.read_text() for word in ("os.environ", "getenv"))
    }

    assert readers == {"settings.py"}
    assert "PATH" in os.environ  # the search is for the real name


def test_what_looks_like_a_setting_and_is_none_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_MAX_RETRIES", "2")
    monkeypatch.setenv("GATEWAY_API_KEYS_FILE", "")
    monkeypatch.setenv("GATEWAY_MAX_QUEUE", "2")

    assert unknown() == ["GATEWAY_MAX_RETRIES"]
