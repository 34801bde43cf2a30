from pathlib import Path
from textwrap import dedent

import pytest

from gateway.config import ReplicaConfig, Routing, TargetConfig, load_routing
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
        "primary-1": ReplicaConfig("primary-1", "http://mock-a:8001", None, "/health"),
        "primary-2": ReplicaConfig("primary-2", "http://mock-b:8001", None, "/health"),
        "secondary": ReplicaConfig("secondary", "http://other:8001/v1", "k3y", None),
        "third": ReplicaConfig("third", "http://third", None, "/livez"),
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

    assert [backend.replicas for backend in found.backends] == [(ReplicaConfig("a", "http://h", None, "/health"),)]


def test_without_a_file_the_urls_are_replicas_behind_one_route(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BACKEND_URLS", "http://a,http://b")
    monkeypatch.setenv("GATEWAY_BACKEND_API_KEY", "k3y")
    found = load_routing(load())

    assert [(each.name, each.url, each.api_key, each.probe) for each in found.backends[0].replicas] == [
        ("backend-1", "http://a", "k3y", "/health"),
        ("backend-2", "http://b", "k3y", "/health"),
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


A = "{url: http://h}"
ROUTES = "routes: [{model: m, targets: [{backend: a}]}]"
WRONG = [
    ("", "", "empty"),
    ("# nothing\n", "", "empty"),
    ("5", ", line 1, the file: ", "mapping"),
    ("[]", ", line 1, the file: ", "mapping"),
    ("backends: {}\nextra: 1\n", ", line 2, the file: extra: ", "unknown key; allowed: backends, routes"),
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
        "allowed: backend, model",
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
