import subprocess
from pathlib import Path

import pytest

from gateway import check
from testkit.processes import python

SECRET = "sk-nobody-may-read-this"
FILE = """
backends:
  primary: {urls: ["http://a:1", "http://b:1"], api_key_env: PRIMARY_KEY, timeouts: {idle: 5}, headers: {x-title: app}}
  spare: {url: "http://c:1"}
routes:
  - {model: m, targets: [{backend: primary, weight: 9}, {backend: spare, model: small, weight: 1}]}
  - {model: "*", targets: [{backend: spare}]}
keys:
  - {name: team-a, key_env: TEAM_A, models: [m], limits: {requests_per_minute: 60}}
"""
WRONG = """
backends:
  primary: {url: "ftp://a"}
  spare: {url: "http://c:1", timeout: 5}
  good: {url: "http://d:1", max_in_flight: 0}
routes:
  - {model: m, targets: [{backend: nobody}]}
  - {model: "*", targets: [{backend: primary}]}
keys:
  - {name: team-a, key_sha256: "1234"}
  - {name: team-b, key_env: TEAM_B, limits: {requests_per_hour: 5}}
"""


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRIMARY_KEY", SECRET)
    monkeypatch.setenv("TEAM_A", SECRET)


def written(folder: Path, text: str, name: str = "gateway.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


@pytest.mark.usefixtures("secrets")
def test_a_good_file_is_valid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, FILE)
    assert check.main([path]) == 0
    assert capsys.readouterr().out == f"{path} is valid.\n"
    assert check.main([path, path]) == 0
    assert capsys.readouterr().out == f"{path} is valid.\nIt says the same as {path}.\n"


def test_secrets_that_are_not_set_here_are_warnings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, FILE)
    assert check.main([path]) == 0
    first, second, last = capsys.readouterr().out.splitlines()
    assert (first.startswith("warning: "), "line 3, backends.primary.api_key_env: " in first) == (True, True)
    assert (second.startswith("warning: "), "line 9, keys[0].key_env: " in second) == (True, True)
    assert last.endswith("is valid.")


@pytest.mark.parametrize("call", ["/chat/completions", "/completions/", "/messages", "/models", "/audio/speech"])
def test_a_url_of_a_call_in_place_of_a_base_is_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], call: str
) -> None:
    urls = f'["http://a:1/v1", "http://user:s3cret@a:1/v1{call}"]'
    path = written(tmp_path, f"backends: {{a: {{urls: {urls}}}}}\nroutes: [{{model: m, targets: [{{backend: a}}]}}]")
    assert check.main([path]) == 0
    warning, last = capsys.readouterr().out.splitlines()
    assert warning.startswith(f"warning: the url of a-2 ends with {call.rstrip('/')}, ")
    assert last == f"{path} is valid."


def test_all_that_is_wrong_is_told_with_line_and_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, WRONG)
    assert check.main([path]) == 2
    told = capsys.readouterr().out.splitlines()
    wanted = (
        "line 3, backends.primary.url: ",
        "line 4, backends.spare: timeout: ",
        "line 5, backends.good.max_in_flight: ",
        "line 7, routes[0].targets[0].backend: ",
        "line 10, keys[0].key_sha256: ",
        "line 11, keys[1].limits: requests_per_hour: ",
    )
    wrong = [line for line in told if line.startswith("wrong: ")]
    assert [where in line for where, line in zip(wanted, wrong, strict=True)] == [True] * len(wanted)


def test_an_unknown_key_hides_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = 'a: {url: "http://a", api_key: k, timeout: 3, max_in_flight: ten}'
    route = "{model: m, target: b, targets: [{backend: b}]}"
    assert check.main([written(tmp_path, f"backend: {{}}\nbackends: {{{backend}}}\nroutes: [{route}]")]) == 2
    told = capsys.readouterr().out.splitlines()
    wanted = (
        "line 1, the file: backend: unknown key; allowed: backends, keys, routes",
        "line 2, backends.a: api_key: unknown key",
        "line 2, backends.a: timeout: unknown key",
        "line 2, backends.a.max_in_flight: ",
        "line 3, routes[0]: target: unknown key",
        "line 3, routes[0].targets[0].backend: there is no backend 'b'",
    )
    assert [where in line for where, line in zip(wanted, told, strict=True)] == [True] * len(wanted)


@pytest.mark.parametrize("text", ["", "backends: [", "routes: []", "- a"])
def test_what_is_no_configuration_is_one_complaint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    assert check.main([written(tmp_path, text)]) == 2
    assert capsys.readouterr().out.count("wrong: GATEWAY_CONFIG=") == 1


@pytest.mark.usefixtures("secrets")
def test_what_would_change_is_told_but_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_KEY", SECRET + "-other")
    new = (
        FILE.replace("PRIMARY_KEY", "OTHER_KEY")
        .replace("idle: 5", "idle: 7.5")
        .replace(', "http://b:1"', "")
        .replace("weight: 9", "weight: 5")
        .replace("models: [m]", "models: [m, n]")
        .replace("requests_per_minute: 60", "requests_per_minute: 30, max_in_flight: 2")
        .replace('  - {model: "*"', '  - {model: late, targets: [{backend: spare}]}\n  - {model: "*"')
    )
    assert check.main([written(tmp_path, new), written(tmp_path, FILE, "old.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1:] == [
        "backend primary: replicas[primary-2] gone",
        "backend primary: replicas[primary-1].api_key changes",
        "backend primary: replicas[primary-1].timeouts.idle 5.0 -> 7.5",
        "route m: targets[primary].weight 9 -> 5",
        "route late: new",
        "key team-a: limits.max_in_flight none -> 2",
        "key team-a: limits.requests_per_minute 60 -> 30",
        "key team-a: models ['m'] -> ['m', 'n']",
    ]
    assert SECRET not in out


def test_the_order_of_fallbacks_is_told_and_so_is_the_route_in_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backends = 'backends: {a: {url: "http://a"}, b: {url: "http://b"}, c: {url: "http://c"}}\n'
    route = "{model: m, targets: [{backend: a}, {backend: b}]}"
    old = written(tmp_path, f"{backends}routes: [{route}]", "old.yaml")
    for routes, told in {
        "{model: m, targets: [{backend: b}, {backend: c}, {backend: a}]}": [
            "route m: targets[c] new",
            "route m: the order is targets[b], targets[c], targets[a]",
        ],
        "{model: m, targets: [{backend: a}, {backend: c}, {backend: b}]}": ["route m: targets[c] new"],
        f"{route}, {{model: m, targets: [{{backend: c}}]}}": [f"It says the same as {old}."],
    }.items():
        assert check.main([written(tmp_path, f"{backends}routes: [{routes}]"), old]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == told


def test_what_a_running_gateway_would_refuse_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without = 'backends: {a: {url: "http://a"}}\nroutes: [{model: m, targets: [{backend: a}]}]\n'
    new = written(tmp_path, without)
    old = written(tmp_path, f"{without}keys: [{{name: t, key_sha256: '{'0' * 64}'}}]", "old.yaml")
    for files, told in {
        (new, old): ["key t: gone", "keys: there are none now, which needs a restart"],
        (old, new): ["key t: new", "keys: there are some now, which needs a restart"],
    }.items():
        assert check.main([*files]) == 0
        assert capsys.readouterr().out.splitlines()[1:] == told
    monkeypatch.setenv("GATEWAY_API_KEYS", "of the environment")
    assert check.main([new, old]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["key t: gone"]


@pytest.mark.usefixtures("secrets")
def test_a_part_that_appears_or_goes_is_told_value_by_value(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with_guard = FILE.replace("small, weight: 1}]", "small, weight: 1}], guard: {window: 30}")
    other = with_guard.replace("spare: {", "spare: {probe: false, ")
    assert with_guard != FILE
    assert other != with_guard
    old, new = written(tmp_path, FILE, "old.yaml"), written(tmp_path, other)
    assert check.main([new, old]) == 0
    told = capsys.readouterr().out.splitlines()[1:]
    guard = {"max_error_rate": 0.05, "min_requests": 20, "window": 30.0}
    assert told[:3] == [
        "backend spare: replicas[spare].probe.interval 2.0 -> none",
        "backend spare: replicas[spare].probe.path /health -> none",
        "backend spare: replicas[spare].probe.timeout 2.0 -> none",
    ]
    assert told[3:] == [f"route m: guard.{name} none -> {value}" for name, value in guard.items()]
    assert check.main([old, new]) == 0
    told = capsys.readouterr().out.splitlines()[1:]
    assert told[3:] == [f"route m: guard.{name} {value} -> none" for name, value in guard.items()]


def test_the_command_needs_no_running_gateway(tmp_path: Path) -> None:
    command = python("gateway", "check", written(tmp_path, WRONG))
    ended = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert (ended.returncode, ended.stdout.count("wrong: ")) == (2, 6)
