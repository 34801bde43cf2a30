from hashlib import sha256
from pathlib import Path
from textwrap import dedent

import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from gateway.config import (
    GuardConfig,
    LimitsConfig,
    ProbeConfig,
    ReplicaConfig,
    Routing,
    TargetConfig,
    Timeouts,
    load_routing,
)
from gateway.settings import SettingsError, load

GOOD = """
    backends:
      primary:   {urls: ["http://mock-a:8001", "http://mock-b:8001"]}
      secondary: {url: "http://other:8001/v1", api_key_env: OTHER_KEY, probe: false}
      third:
        url: http://third
        probe: /livez
    routes:
      - model: demo-model
        targets: [{backend: primary}, {backend: secondary, model: small-model}]
      - model: "*"
        targets: [{backend: third}]
"""


USUAL = Timeouts(connect=1, first_token=30, answer=120, idle=30)
HEALTH = ProbeConfig("/health", timeout=2, interval=2)


def routing(tmp_path: Path, text: str) -> Routing:
    file = tmp_path / "gateway.yaml"
    file.write_text(dedent(text).lstrip("\n"))
    return load_routing(load(gateway_config=file))


def complaint(tmp_path: Path, text: str) -> str:
    with pytest.raises(SettingsError) as wrong:
        routing(tmp_path, text)
    line = str(wrong.value)
    assert "\n" not in line
    head = f"GATEWAY_CONFIG={str(tmp_path / 'gateway.yaml')!r}"
    assert line.startswith(head)
    return line.removeprefix(head)


def test_the_file_of_the_contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", "k3y")
    found = routing(tmp_path, GOOD)

    replicas = {replica.name: replica for backend in found.backends for replica in backend.replicas}
    assert replicas == {
        "primary-1": ReplicaConfig("primary-1", "http://mock-a:8001", USUAL, HEALTH),
        "primary-2": ReplicaConfig("primary-2", "http://mock-b:8001", USUAL, HEALTH),
        "secondary": ReplicaConfig("secondary", "http://other:8001/v1", USUAL, None, "k3y"),
        "third": ReplicaConfig("third", "http://third", USUAL, ProbeConfig("/livez", 2, 2)),
    }
    assert [route.model for route in found.routes] == ["demo-model", "*"]
    assert found.routes[0].targets == (TargetConfig("primary", None), TargetConfig("secondary", "small-model"))


def test_the_key_of_a_backend_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("k3y\n")
    monkeypatch.setenv("OTHER_KEY_FILE", str(tmp_path / "key"))

    assert routing(tmp_path, GOOD).backends[1].replicas[0].api_key == "k3y"


def test_one_url_in_a_list_is_a_numbered_replica(tmp_path: Path) -> None:
    found = routing(tmp_path, "backends: {a: {urls: [http://h]}}\nroutes: [{model: m, targets: [{backend: a}]}]")

    assert [replica.name for replica in found.backends[0].replicas] == ["a-1"]


def test_the_file_replaces_the_urls_and_the_key_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_BACKEND_URLS", "http://unused")
    monkeypatch.setenv("GATEWAY_BACKEND_API_KEY", "unused")
    found = routing(tmp_path, "backends: {a: {url: http://h}}\nroutes: [{model: m, targets: [{backend: a}]}]")

    assert [backend.replicas for backend in found.backends] == [(ReplicaConfig("a", "http://h", USUAL, HEALTH),)]


def test_without_a_file_the_urls_are_replicas_behind_one_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BACKEND_URLS", "http://a,http://b")
    monkeypatch.setenv("GATEWAY_BACKEND_API_KEY", "k3y")
    found = load_routing(load())

    assert [(each.name, each.url, each.api_key, each.probe) for each in found.backends[0].replicas] == [
        ("backend-1", "http://a", "k3y", HEALTH),
        ("backend-2", "http://b", "k3y", HEALTH),
    ]
    assert [(route.model, len(route.targets)) for route in found.routes] == [("*", 1)]
    monkeypatch.delenv("GATEWAY_BACKEND_URLS")
    assert [each.name for each in load_routing(load()).backends[0].replicas] == ["backend-1"]


@pytest.mark.parametrize("key", ["two words", "new\nline", "ümlaut", "tab\tkey"])
def test_a_key_that_fits_no_header_is_refused_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    with pytest.raises(SettingsError) as wrong:
        load_routing(load(gateway_backend_api_key=key))
    assert str(wrong.value).startswith("GATEWAY_BACKEND_API_KEY=(hidden)")
    monkeypatch.setenv("OTHER_KEY", key)
    line = complaint(tmp_path, GOOD)
    assert ", line 3, backends.secondary.api_key_env: " in line
    assert key not in line


@pytest.mark.parametrize("value", ["", " ", "\n"])
def test_a_key_that_is_set_but_empty_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OTHER_KEY", value)
    assert ", line 3, backends.secondary.api_key_env: OTHER_KEY=(hidden): there is nothing in it" in complaint(
        tmp_path, GOOD
    )
    monkeypatch.delenv("OTHER_KEY")
    (tmp_path / "key").write_text(f"# no key\n{value}")
    monkeypatch.setenv("OTHER_KEY_FILE", str(tmp_path / "key"))
    assert ", line 3, backends.secondary.api_key_env: OTHER_KEY_FILE=" in complaint(tmp_path, GOOD)


A = "{url: http://h}"
D1, D2 = "ab" * 32, "cd" * 32
"""What could be the SHA-256 of two keys."""


def written(keys: str) -> str:
    """Keys with digests in place of their names."""
    named = {"SHORT": D1[1:], "UPPER": D1.upper(), "D1": D1, "D2": D2}
    for name, digest in named.items():
        keys = keys.replace(name, digest)
    return keys


ROUTES = "routes: [{model: m, targets: [{backend: a}]}]"
WRONG = [
    ("", "", "empty"),
    ("# nothing\n", "", "empty"),
    ("5", ", line 1, the file: ", "mapping"),
    ("[]", ", line 1, the file: ", "mapping"),
    ("backends: {}\nextra: 1\n", ", line 2, the file: extra: ", "unknown key; allowed: backends, keys, routes"),
    (f"backends: {{a: {A}}}\n", ", line 1, the file: ", "'routes' is missing"),
    (f"{ROUTES}\n", ", line 1, the file: ", "'backends' is missing"),
    (f"backends: {{}}\n{ROUTES}", ", line 1, backends: ", "at least one backend"),
    (f"backends: []\n{ROUTES}", ", line 1, backends: ", "mapping"),
    (f"backends:\n  a: {A}\n  a: {A}\n{ROUTES}", ", line 3, backends: a: ", "twice"),
    (f"backends:\n  a:\n{ROUTES}", ", line 2, backends.a: ", "mapping"),
    (f"backends:\n  a: http://h\n{ROUTES}", ", line 2, backends.a: ", "mapping"),
    (f"backends:\n  'a b': {A}\n{ROUTES}", ", line 2, backends.a b: ", "letters"),
    (f"backends:\n  'ä': {A}\n{ROUTES}", ", line 2, backends.ä: ", "letters"),
    (f"backends:\n  '': {A}\n{ROUTES}", ", line 2, backends.: ", "letters"),
    (f"backends:\n  a: {{}}\n{ROUTES}", ", line 2, backends.a: ", "exactly one of url and urls"),
    (f"backends:\n  a:\n    url: http://h\n    urls: [http://h]\n{ROUTES}", ", line 3, backends.a: ", "exactly one"),
    (
        f"backends:\n  a:\n    url: http://h\n    key: x\n{ROUTES}",
        ", line 4, backends.a: key: ",
        "allowed: api_key_env",
    ),
    (f"backends:\n  a:\n    url: nonsense\n{ROUTES}", ", line 3, backends.a.url: ", "http://"),
    (f"backends:\n  a:\n    url: 5\n{ROUTES}", ", line 3, backends.a.url: ", "text"),
    (f"backends:\n  a:\n    url:\n{ROUTES}", ", line 3, backends.a.url: ", "text"),
    (f"backends:\n  a:\n    urls: []\n{ROUTES}", ", line 3, backends.a.urls: ", "at least one"),
    (f"backends:\n  a:\n    urls: http://h\n{ROUTES}", ", line 3, backends.a.urls: ", "list"),
    (
        f"backends:\n  a:\n    urls:\n      - http://h\n      - nonsense\n{ROUTES}",
        ", line 5, backends.a.urls[1]: ",
        "http://",
    ),
    (f"backends:\n  a:\n    url: http://h\n    probe: true\n{ROUTES}", ", line 4, backends.a.probe: ", "text"),
    (f"backends:\n  a:\n    url: http://h\n    probe: health\n{ROUTES}", ", line 4, backends.a.probe: ", "'/'"),
    (
        f"backends:\n  a:\n    url: http://h\n    api_key_env: NOPE\n{ROUTES}",
        ", line 4, backends.a.api_key_env: ",
        "NOPE_FILE",
    ),
    (f"backends:\n  b-1: {A}\n  b:\n    urls: [http://h]\n{ROUTES}", ", line 4, backends.b: ", "'b-1'"),
    (f"backends: {{a: {A}}}\nroutes: []", ", line 2, routes: ", "at least one"),
    (f"backends: {{a: {A}}}\nroutes: {{m: a}}", ", line 2, routes: ", "list"),
    (f"backends: {{a: {A}}}\nroutes:\n  - m", ", line 3, routes[0]: ", "mapping"),
    (f"backends: {{a: {A}}}\nroutes:\n  - model: m\n", ", line 3, routes[0]: ", "'targets' is missing"),
    (f"backends: {{a: {A}}}\nroutes:\n  - targets: [{{backend: a}}]\n", ", line 3, routes[0]: ", "'model' is missing"),
    (
        f"backends: {{a: {A}}}\nroutes:\n  - model: 5\n    targets: [{{backend: a}}]",
        ", line 3, routes[0].model: ",
        "text",
    ),
    (f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: []", ", line 4, routes[0].targets: ", "at least one"),
    (f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [a]", ", line 4, routes[0].targets[0]: ", "mapping"),
    (
        f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{model: x}}]",
        ", line 4, routes[0].targets[0]: ",
        "missing",
    ),
    (
        f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{backend: x}}]",
        "targets[0].backend: ",
        "there are: a",
    ),
    (
        f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{backend: a, to: x}}]",
        "targets[0]: to: ",
        "allowed: backend, model, weight",
    ),
    (f"backends: {{a: {A}}}\nroutes:\n  - model: 'a*b'\n    targets: [{{backend: a}}]", "3, routes[0].model: ", "last"),
    *(
        (
            f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{backend: a, weight: {weight}}}]",
            ", line 4, routes[0].targets[0].weight: ",
            "whole number of at least 0",
        )
        for weight in ("-1", "0.5", "'1'", "true", "", "0x10", "1_000", "[1]")
    ),
    (
        f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{backend: a, weight: 1}}, {{backend: a}}]",
        ", line 4, routes[0].targets[1]: ",
        "needs a weight",
    ),
    (
        f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{backend: a, weight: 0}}]",
        ", line 4, routes[0].targets: ",
        "above 0",
    ),
    *(
        (
            f"backends: {{a: {A}}}\nroutes:\n  - model: m\n    targets: [{{backend: a{weight}}}]\n    guard: {guard}",
            f", line 5, routes[0].guard{key}: ",
            why,
        )
        for weight, guard, key, why in (
            ("", "{}", "", "needs a weight on each"),
            (", weight: 1", "true", "", "mapping"),
            (", weight: 1", "{rate: 0.1}", ": rate", "allowed: max_error_rate, min_requests, window"),
            *(
                (", weight: 1", f"{{max_error_rate: {rate}}}", ".max_error_rate", "greater than 0 and at most 1")
                for rate in ("0", "-0.1", "1.01", "5", "'0.1'", "5%", "true", ".nan", ".inf", "")
            ),
            *(
                (", weight: 1", f"{{window: {window}}}", ".window", "a number of seconds greater than 0")
                for window in ("0", "-1", "1m", ".inf", ".nan", "")
            ),
            (", weight: 1", "{window: 86401}", ".window", "at most 86400 seconds"),
            *(
                (", weight: 1", f"{{min_requests: {least}}}", ".min_requests", "whole number of at least 1")
                for least in ("0", "-1", "1.5", "'1'", "1_000", "")
            ),
        )
    ),
    *(
        (f"backends: {{a: {A}}}\n{ROUTES}\nkeys:\n{written(keys)}", where, why)
        for keys, where, why in (
            ("  []", "keys: ", "at least one entry"),
            ("  a: b", "keys: ", "list"),
            ("  - {key_sha256: D1}", "keys[0]: ", "'name' is missing"),
            ("  - {name: a}", "keys[0]: ", "exactly one of key_env and key_sha256"),
            ("  - {name: a, key_env: HOME, key_sha256: D1}", "keys[0]: ", "exactly one of key_env and key_sha256"),
            ("  - {name: a, key_env: NOPE}", "keys[0].key_env: ", "neither NOPE nor NOPE_FILE"),
            ("  - {name: a, key: x}", "keys[0]: key: ", "unknown key; allowed: key_env, key_sha256, limits"),
            ("  - {name: a b, key_sha256: D1}", "keys[0].name: ", "letters, digits"),
            (f"  - {{name: {'a' * 65}, key_sha256: D1}}", "keys[0].name: ", "up to 64"),
            ("  - {name: 5, key_sha256: D1}", "keys[0].name: ", "text"),
            ("  - {name: a, key_sha256: SHORT}", "keys[0].key_sha256: ", "64 hexadecimal digits"),
            ("  - {name: a, key_sha256: SHORTg}", "keys[0].key_sha256: ", "64 hexadecimal digits"),
            ("  - {name: a, key_sha256: [x]}", "keys[0].key_sha256: ", "64 hexadecimal digits"),
            ("  - {name: a, key_sha256: D1}\n  - {name: a, key_sha256: D2}", "keys[1].name: ", "same name"),
            (
                "  - {name: a, key_sha256: D1}\n  - {name: b, key_sha256: UPPER}",
                "keys[1]: ",
                "same key",
            ),
            ("  - {name: a, key_sha256: D1, models: []}", "keys[0].models: ", "at least one entry"),
            ("  - {name: a, key_sha256: D1, models: [b, '*c']}", "keys[0].models[1]: ", "last"),
            ("  - {name: a, key_sha256: D1, limits: 5}", "keys[0].limits: ", "mapping"),
            ("  - {name: a, key_sha256: D1, limits: {rpm: 5}}", "keys[0].limits: rpm: ", "requests_per_minute"),
            *(
                (
                    f"  - {{name: a, key_sha256: D1, limits: {{tokens_per_day: {value}}}}}",
                    "keys[0].limits.tokens_per_day: ",
                    "a whole number of at least 1 and at most 12 digits",
                )
                for value in ("0", "-1", "1.5", "many", "1e6", "1_000", "1000000000000", "")
            ),
        )
    ),
    ("backends: {a: [\n", ", line 2: ", ""),
    ("backends:\n\ta: 1\n", ", line 2: ", ""),
    ("a: 1\n---\nb: 2\n", ", line 2: ", ""),
    ("a: \x01", "", "UTF-8"),
    ("a: *nowhere", ", line 1: ", ""),
    ("[" * 5000, ": it is nested too deep", ""),
]


@pytest.mark.parametrize(("text", "where", "why"), WRONG)
def test_an_error_names_its_line_and_its_key(tmp_path: Path, text: str, where: str, why: str) -> None:
    line = complaint(tmp_path, text)

    assert where in line
    assert why in line


def test_a_file_that_is_no_utf_8(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_bytes(b"a: \xff")
    with pytest.raises(SettingsError, match="UTF-8"):
        load_routing(load(gateway_config=tmp_path / "gateway.yaml"))


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="readable YAML file"):
        load_routing(load(gateway_config=tmp_path / name))


def test_no_error_shows_user_info(tmp_path: Path) -> None:
    line = complaint(tmp_path, f"backends:\n  a:\n    url: http://me:s3cret@h?x\n{ROUTES}")

    assert "s3cret" not in line


@pytest.mark.parametrize("no", ["false", "no", "off", "False", "OFF"])
def test_a_probe_may_be_switched_off(tmp_path: Path, no: str) -> None:
    found = routing(tmp_path, f"backends: {{a: {{url: http://h, probe: {no}}}}}\n{ROUTES}")

    assert found.backends[0].replicas[0].probe is None


def backend(tmp_path: Path, more: str, url: str = "http://h") -> ReplicaConfig:
    """The backend `a` with further keys."""
    return routing(tmp_path, f"backends:\n  a:\n    url: {url}\n    {more}\n{ROUTES}").backends[0].replicas[0]


def test_a_backend_has_headers_a_query_timeouts_and_a_limit_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "k3y")
    monkeypatch.setenv("OTHER", "s3cret")
    file = tmp_path / "gateway.yaml"
    file.write_text(
        dedent("""
            backends:
              a:
                urls: [http://h, http://i]
                api_key_env: A_KEY
                api_key_header: Api-Key
                headers: {X-Title: my app, x-count: 5, CF-Access-Client-Secret: {env: OTHER}, x-api-key: written}
                query: {api-version: 2024-10-21, deployment: "a b&c"}
                timeouts: {connect: 2, first_token: 0.5, answer: 300}
                max_in_flight: 64
                probe: {path: /up, timeout: 5}
            routes: [{model: m, targets: [{backend: a}]}]
        """)
    )
    (config,) = load_routing(load(gateway_config=file, gateway_idle_timeout=7, gateway_probe_interval=9)).backends
    first, second = config.replicas

    assert (first.name, first.url, second.name, second.url) == ("a-1", "http://h", "a-2", "http://i")
    for replica in config.replicas:
        assert (replica.api_key, replica.api_key_header) == ("k3y", "api-key")
        assert replica.headers == (("x-title", "my app"), ("x-count", "5"))
        assert replica.secret_headers == (("cf-access-client-secret", "s3cret"), ("x-api-key", "written"))
        assert replica.query == (("api-version", "2024-10-21"), ("deployment", "a b&c"))
        assert replica.timeouts == Timeouts(connect=2, first_token=0.5, answer=300, idle=7)
        assert replica.max_in_flight == 64
        assert replica.probe == ProbeConfig("/up", timeout=5, interval=9)
    assert "s3cret" not in repr(config)
    assert "k3y" not in repr(config)


def test_the_environment_says_what_a_probe_is_where_the_file_does_not(tmp_path: Path) -> None:
    (tmp_path / "gateway.yaml").write_text(
        f"backends: {{a: {A}, b: {{url: http://h, probe: {{interval: 5}}}},\n c: {{url: http://h, probe: /up}}}}\n"
        + ROUTES
    )
    settings = {"gateway_config": tmp_path / "gateway.yaml", "gateway_probe_timeout": 3}

    found = load_routing(load(**settings, gateway_probe_path="/livez")).backends
    assert [each.replicas[0].probe for each in found] == [
        ProbeConfig("/livez", 3, 2),
        ProbeConfig("/livez", 3, 5),
        ProbeConfig("/up", 3, 2),
    ]
    with pytest.raises(
        SettingsError, match=r"line 1, backends\.b\.probe: needs a path, since GATEWAY_PROBE_PATH is empty"
    ):
        load_routing(load(**settings, gateway_probe_path=""))


def test_without_a_probe_path_there_are_no_probes() -> None:
    assert load_routing(load(gateway_probe_path="")).backends[0].replicas[0].probe is None


WRONG_KEYS = [
    *((f"max_in_flight: {value}", "max_in_flight: ", "at least 1") for value in ("0", "-1", "1.5", "many", "true")),
    *(
        (f"timeouts: {{idle: {value}}}", "timeouts.idle: ", "seconds greater than 0")
        for value in ("0", "-1", ".inf", ".nan", "'5'", "true", "[]", "1:30")
    ),
    ("timeouts: 5", "timeouts: ", "mapping"),
    ("timeouts: {total: 5}", "timeouts: total: ", "allowed: answer, connect, first_token, idle"),
    ("probe: {path: health}", "probe.path: ", "begins with '/'"),
    ("probe: {path: /a b}", "probe.path: ", "begins with '/'"),
    ("probe: {every: 5}", "probe: every: ", "allowed: interval, path, timeout"),
    *((f"probe: {{{key}: 0}}", f"probe.{key}: ", "greater than 0") for key in ("timeout", "interval")),
    ("query: [a]", "query: ", "mapping"),
    ("query: {a: [1]}", "query.a: ", "text"),
    ("query: {a: }", "query.a: ", "text"),
    ("query: {a: 1, a: 2}", "query: a: ", "twice"),
    ("headers: {'x y': 1}", "headers.x y: ", "cannot be the name"),
    ("headers: {'': 1}", "headers.: ", "cannot be the name"),
    ("headers: {x: }", "headers.x: ", "text"),
    ("headers: {x: 'a\u0308'}", "headers.x: ", "ASCII"),
    ('headers: {x: "a\\r\\nb: c"}', "headers.x: ", "line ends"),
    ("headers: {x: ' a'}", "headers.x: ", "outer spaces"),
    ("headers: {x: 1, X: 2}", "headers.X: ", "twice"),
    ("headers: {x: {env: NOPE}}", "headers.x.env: ", "neither NOPE nor NOPE_FILE"),
    ("headers: {x: {file: NOPE}}", "headers.x: file: ", "allowed: env"),
    ("headers: {x: {env: LINES}}", "headers.x: ", "the value of LINES"),
    *(
        (f"headers: {{{name}: x}}", f"headers.{name}: ", "sets this header itself")
        for name in ("Host", "content-length", "Connection", "transfer-encoding", "traceparent", "X-Request-Id", "te")
    ),
    ("api_key_header: api-key", "api_key_header: ", "api_key_env"),
    ("api_key_env: A_KEY, api_key_header: host", "api_key_header: ", "sets this header itself"),
    ("api_key_env: A_KEY, headers: {Authorization: x}", "headers.Authorization: ", "api_key_env"),
    ("api_key_env: A_KEY, api_key_header: X-Key, headers: {x-key: x}", "headers.x-key: ", "api_key_env"),
    ("ask_usage: true", "ask_usage: ", "unknown key"),
    ("tls: {ca: nowhere.pem}", "tls.ca: ", "No such file"),
    ("tls: {ca: gateway.yaml}", "tls.ca: ", "no certificate"),
    ("tls: {cert: gateway.yaml}", "tls.cert: ", "a certificate and its key"),
    ("tls: {key: gateway.yaml}", "tls: ", "needs cert"),
    ("tls: {pem: x}", "tls: pem: ", "allowed: ca, cert, key"),
    ("tls: {}", "tls: ", "https://"),
]


@pytest.mark.parametrize(("more", "where", "why"), WRONG_KEYS)
def test_a_wrong_key_of_a_backend_names_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str, where: str, why: str
) -> None:
    monkeypatch.setenv("A_KEY", "k3y")
    monkeypatch.setenv("LINES", "a\nb")
    line = complaint(tmp_path, f"backends:\n  a: {{url: http://h,\n    {more}}}\n{ROUTES}")

    assert line.startswith(", line 3, backends.a")
    assert where in line
    assert why in line


def test_client_certificates_are_loaded_with_the_file(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    own, other = authority.issue_cert("gateway"), authority.issue_cert("other")
    own.cert_chain_pems[0].write_to_path(str(tmp_path / "cert.pem"))
    own.private_key_pem.write_to_path(str(tmp_path / "key.pem"))
    other.private_key_pem.write_to_path(str(tmp_path / "other.pem"))

    locked = load_pem_private_key((tmp_path / "key.pem").read_bytes(), None)
    (tmp_path / "locked.pem").write_bytes(
        locked.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    )

    context = backend(tmp_path, "tls: {ca: ca.pem, cert: cert.pem, key: key.pem}", "https://h").tls
    assert context is not None
    assert len(context.get_ca_certs()) == 1
    assert backend(tmp_path, "probe: false", "https://h").tls is None
    for key, why in (("other", "the key is for another certificate"), ("locked", "needs a certificate and its key")):
        text = f"backends:\n  a:\n    url: https://h\n    tls: {{cert: cert.pem, key: {key}.pem}}\n{ROUTES}"
        assert complaint(tmp_path, text).startswith(f", line 4, backends.a.tls.cert: {why}")


def test_weights_and_prefixes_are_read(tmp_path: Path) -> None:
    found = routing(
        tmp_path,
        f"""
        backends: {{a: {A}, b: {A}}}
        routes:
          - model: "qwen-*"
            targets: [{{backend: a, weight: 9}}, {{backend: b, model: x, weight: 1}}, {{backend: b, weight: 0}}]
        """,
    )

    assert found.routes[0].model == "qwen-*"
    assert found.routes[0].targets == (
        TargetConfig("a", None, 9),
        TargetConfig("b", "x", 1),
        TargetConfig("b", None, 0),
    )


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{}", GuardConfig(0.05, 60, 20)),
        ("{max_error_rate: 1, window: 0.5, min_requests: 1}", GuardConfig(1, 0.5, 1)),
        ("{window: 86400}", GuardConfig(0.05, 86400, 20)),
    ],
)
def test_a_guard_is_read(tmp_path: Path, written: str, read: GuardConfig) -> None:
    found = routing(
        tmp_path,
        f"""
        backends: {{a: {A}}}
        routes:
          - {{model: m, targets: [{{backend: a, weight: 1}}], guard: {written}}}
          - {{model: n, targets: [{{backend: a, weight: 1}}]}}
        """,
    )

    assert [route.guard for route in found.routes] == [read, None]


B = "backends:\n  a:\n    url: http://h\n"
"""A backend whose next lines are 4 and on."""
ODD = [
    # whole files
    (f"{GOOD}\n---\n{GOOD}", ", line ", "single document"),
    ("---\n", ", line 2, the file: ", "mapping"),
    ("null\n", ", line 1, the file: ", "mapping"),
    (f"backends: {'[' * 5000}", "", "too deep"),
    (f"backends: {'{a: ' * 5000}", "", "too deep"),
    ("a: &a [*a]\n", ", line 1: ", "holds itself"),
    ("&a\nbackends: *a\n", ", line 1: ", "holds itself"),
    ('"\\UFFFFFFFF": 1\n', ", line 1: ", "out of range"),
    ('a: 1\nb: "\\U00110000"\n', ", line 2: ", "out of range"),
    (f"%YAML {'9' * 5000}.1\n---\n{GOOD}", ", line 1: ", "out of range"),
    ("a: 1\nb: \0\n", ", line 2: ", "not allowed"),
    ("a: *nobody\n", ", line 1: ", "undefined alias"),
    ("!!python/object/apply:os.system [echo]\n", ", line 1, the file: ", "mapping"),
    (f"!!python/object:os.stat_result\nbackends: {{a: {A}}}\n{ROUTES}", ", the file: ", "mapping"),
    # keys
    (f"{B}    ? [url]\n    : x\n{ROUTES}", ", line 4, backends.a: ", "texts as keys"),
    (f"{B}    ? {{url: 1}}\n    : x\n{ROUTES}", ", line 4, backends.a: ", "texts as keys"),
    (f"{B}    5: x\n{ROUTES}", ", line 4, backends.a: ", "texts as keys"),
    (f"{B}    null: x\n{ROUTES}", ", line 4, backends.a: ", "texts as keys"),
    (f"{B}    headers: {{yes: x}}\n{ROUTES}", ", line 4, backends.a.headers: ", "in quotes"),
    (f"{B}    query: {{2024-10-21: x}}\n{ROUTES}", ", line 4, backends.a.query: ", "in quotes"),
    (f'{B}    query: {{"\\ud800": x}}\n{ROUTES}', ", line 4, backends.a.query: ", "surrogate"),
    (f'{B}    headers: {{"x\\r\\ny": z}}\n{ROUTES}', ", line 4, backends.a.headers: ", "line ends"),
    (f'backends:\n  "a\\n": {A}\n{ROUTES}', ", line 2, backends: ", "line ends"),
    (f"{B}    url: http://h\n{ROUTES}", ", line 4, backends.a: url: ", "twice"),
    (f"{B}    headers: {{a: x, a: y}}\n{ROUTES}", ", line 4, backends.a.headers: a: ", "twice"),
    (f"x: &x {{url: http://h}}\nbackends:\n  a:\n    <<: *x\n{ROUTES}", ", line 1, the file: x: ", "unknown key"),
    # tags
    (f"{B}    headers: {{x: !!python/name:os.system ''}}\n{ROUTES}", ", line 4, backends.a.headers.x: ", "text"),
    (f"{B}    query: {{x: !!binary aGk=}}\n{ROUTES}", ", line 4, backends.a.query.x: ", "text"),
    (f"{B}    timeouts: !!omap {{connect: 1}}\n{ROUTES}", ", line 4, backends.a.timeouts: ", "mapping"),
    (f"backends:\n  a:\n    urls: !!set [http://h]\n{ROUTES}", ", line 3, backends.a.urls: ", "list"),
    # numbers
    *(
        (f"{B}    timeouts: {{connect: {number}}}\n{ROUTES}", ", line 4, backends.a.timeouts.connect: ", "seconds")
        for number in ("9" * 5000, "1.0e+400", ".inf", ".nan", "0x10", "1:30", "-1", "0", "1e5", "\u0663", '"1"')
    ),
    *(
        (f"{B}    max_in_flight: {number}\n{ROUTES}", ", line 4, backends.a.max_in_flight: ", "whole number")
        for number in ("9" * 5000, "1000000000", "0x10", "1_000", "1.0", "0", "-1", "true", '"1"')
    ),
    # texts
    *(
        (f'{B}    probe: "{path}"\n{ROUTES}', ", line 4, backends.a.probe: ", "")
        for path in ("/\\ud800", "/\\0", "/a b", "/a\\r\\nx: y", "/\u00e4", "a")
    ),
    *(
        (f'{B}    probe: {{path: "{path}"}}\n{ROUTES}', ", line 4, backends.a.probe.path: ", "")
        for path in ("/\\ud800", "/\\0", "/a b", "/a\\r\\nx: y", "/\u00e4", "a")
    ),
    *(
        (f'{B}    headers: {{x: "{value}"}}\n{ROUTES}', ", line 4, backends.a.headers.x: ", "")
        for value in ("\\ud800", "\\0", "a\\r\\nx: y", "a\\n", "\u00e4", " a", "a\\t")
    ),
    *(
        (f'{B}    query: {{x: "{value}"}}\n{ROUTES}', ", line 4, backends.a.query.x: ", "")
        for value in ("\\ud800", "\\0", "a\\r\\nx: y")
    ),
    *(
        (f'backends:\n  a:\n    url: "http://h/{path}"\n{ROUTES}', ", line 3, backends.a.url: ", "")
        for path in ("\\ud800", "\\0", "a b", "a\\r\\nx: y", "\u00e4")
    ),
    *(
        (f'{B}routes: [{{model: "{model}", targets: [{{backend: a}}]}}]', ", line 4, routes[0].model: ", "surrogate")
        for model in ("\\ud800", "m\\0", "m\\r\\n")
    ),
    *(
        (
            f'{B}routes: [{{model: m, targets: [{{backend: a, model: "{model}"}}]}}]',
            ", routes[0].targets[0].model: ",
            "",
        )
        for model in ("\\ud800", "m\\0", "m\\r\\n")
    ),
    (f'{B}    api_key_env: "\\ud800"\n{ROUTES}', ", line 4, backends.a.api_key_env: ", "surrogate"),
    (f'{B}    tls: {{ca: "a\\0"}}\n{ROUTES}', ", line 4, backends.a.tls.ca: ", "control"),
]


@pytest.mark.parametrize(("text", "where", "why"), ODD)
def test_what_is_odd_is_an_error_with_line_and_key(tmp_path: Path, text: str, where: str, why: str) -> None:
    line = complaint(tmp_path, text)
    assert where in line
    assert why in line
    assert line.isprintable()


def test_aliases_may_repeat_values_but_not_without_end(tmp_path: Path) -> None:
    shared = "{url: http://h, timeouts: &t {connect: 3}}"
    found = routing(tmp_path, f"backends: {{a: {shared}, b: {{url: http://i, timeouts: *t}}}}\n{ROUTES}")
    assert [backend.replicas[0].timeouts.connect for backend in found.backends] == [3, 3]
    laughs = "".join(f"  - &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    line = complaint(tmp_path, f"laughs:\n  - &l0 [lol]\n{laughs}")
    assert line.startswith(", line 7: it stands for more than 100000 values")


def test_a_model_may_have_a_name_in_any_script(tmp_path: Path) -> None:
    found = routing(tmp_path, f'{B}routes: [{{model: "\u6a21\u578b \u00fc", targets: [{{backend: a}}]}}]')
    assert found.routes[0].model == "\u6a21\u578b \u00fc"


# Keys


def test_keys_have_names_models_and_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "s3cret-of-a")
    (tmp_path / "b").write_text("# of team b\ns3cret-of-b\n")
    monkeypatch.setenv("B_KEY_FILE", str(tmp_path / "b"))
    found = routing(
        tmp_path,
        f"""
        backends: {{a: {A}}}
        routes: [{{model: m, targets: [{{backend: a}}]}}]
        keys:
          - name: team-a
            key_env: A_KEY
            models: [m, "qwen*"]
            limits: {{requests_per_minute: 600, max_in_flight: 20}}
          - {{name: team-b, key_env: B_KEY, limits: {{}}}}
          - name: team.c
            key_sha256: {"12" * 32}
            limits: {{requests_per_day: 1, tokens_per_minute: 2, tokens_per_day: 999999999999}}
        """,
    )
    first, second, third = found.keys
    assert (first.name, first.digest, first.models) == ("team-a", sha256(b"s3cret-of-a").digest(), ("m", "qwen*"))
    assert first.limits == LimitsConfig(requests_per_minute=600, max_in_flight=20)
    assert (second.name, second.digest, second.models) == ("team-b", sha256(b"s3cret-of-b").digest(), None)
    assert second.limits == LimitsConfig()
    assert (third.name, third.digest) == ("team.c", bytes.fromhex("12" * 32))
    assert third.limits == LimitsConfig(requests_per_day=1, tokens_per_minute=2, tokens_per_day=999_999_999_999)
    assert "s3cret" not in repr(found)
    assert first.digest.hex() not in repr(found)
    assert repr(first.digest) not in repr(found)


def test_keys_of_the_file_are_in_place_of_those_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    text = f"backends: {{a: {A}}}\n{ROUTES}\n"
    file.write_text(text)
    assert [key.name for key in load_routing(load(gateway_config=file, gateway_api_keys="x,y")).keys] == [None, None]
    file.write_text(text + f"keys: [{{name: a, key_sha256: {D1}}}]\n")
    assert [key.name for key in load_routing(load(gateway_config=file, gateway_api_keys="x,y")).keys] == ["a"]
    assert [key.digest for key in load_routing(load(gateway_api_keys="x")).keys] == [sha256(b"x").digest()]
    assert load_routing(load()).keys == ()
