"""What the images and the configuration files are, before anything runs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from gateway import __version__
from testkit import REPOSITORY as ROOT
from tests.stack.engine import PROJECT, Stack, docker

OURS = {service: f"llm-gateway/{service}:{__version__}" for service in ("gateway", "mock-model")}
COLLECTOR = "otel/opentelemetry-collector-contrib:0.155.0"
JAEGER = "jaegertracing/jaeger:2.13.0"


def image(name: str) -> Any:  # noqa: ANN401
    return json.loads(docker("image", "inspect", name))[0]["Config"]


def layers(name: str) -> list[str]:
    found: list[str] = json.loads(docker("image", "inspect", name))[0]["RootFS"]["Layers"]
    return found


def inside(name: str, *command: str) -> str:
    return docker("run", "--rm", "--network=none", "--read-only", name, *command)


@pytest.mark.parametrize("service", OURS)
def test_an_image_says_what_it_is(built_stack: Stack, service: str) -> None:
    config = image(OURS[service])
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Cmd"] == ["python", "-m", service.replace("-", "_")]
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__


@pytest.mark.parametrize(("service", "other"), [("gateway", "mock_model"), ("mock-model", "gateway")])
def test_an_image_holds_its_own_code_and_nothing_of_the_other(built_stack: Stack, service: str, other: str) -> None:
    own = service.replace("-", "_")
    assert inside(OURS[service], "ls", "/app").split() == [own]
    found = f"u.find_spec({own!r}) is not None, u.find_spec({other!r}), u.find_spec('pip')"
    find = f"import importlib.util as u; print({found})"
    assert inside(OURS[service], "python", "-c", find).split() == ["True", "None", "None"]


@pytest.mark.parametrize("service", OURS)
def test_a_change_of_the_code_reuses_the_dependencies(built_stack: Stack, service: str, tmp_path: Path) -> None:
    code = service.replace("-", "_")
    for part in ("requirements", "docker", code):
        shutil.copytree(ROOT / part, tmp_path / part)
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    (tmp_path / code / "__init__.py").write_text('"""Changed."""\n')
    # With the same arguments as compose.yaml gives, else it is another step.
    arguments = [f"--build-arg={name}" for name in ("PYTHON_IMAGE", "PIP_INDEX_URL") if name in built_stack.env]
    dockerfile = f"{tmp_path}/docker/{service}.Dockerfile"
    changed = docker("build", "--quiet", *arguments, "--file", dockerfile, str(tmp_path), env=built_stack.env).strip()
    try:
        before, after = layers(OURS[service]), layers(changed)
    finally:
        docker("image", "rm", changed)
    assert len(before) == len(after)
    assert [number for number in range(len(before)) if before[number] != after[number]] == [len(before) - 1]


@pytest.mark.parametrize("profiles", [(), ("fallback",), ("limits",), ("metrics",)])
def test_compose_accepts_the_file_without_a_warning(profiles: tuple[str, ...]) -> None:
    stack = Stack.with_free_ports()
    stack.profiles = profiles
    assert stack.compose("config", "--quiet", complaints=True) == ""


@pytest.mark.parametrize(
    ("name", "file"), [(COLLECTOR, "collector.yaml"), (JAEGER, "jaeger.yaml")], ids=["collector", "jaeger"]
)
def test_the_collector_and_jaeger_accept_their_configuration(name: str, file: str) -> None:
    docker(
        "run", "--rm", "--network=none", "-v", f"{ROOT}/otel:/otel:ro", name, "validate", "--config", f"/otel/{file}"
    )


def test_the_collector_refuses_a_wrong_configuration() -> None:
    with pytest.raises(AssertionError, match="no_such_key"):
        docker(
            *("run", "--rm", "--network=none", "-v", f"{ROOT}/otel:/otel:ro", COLLECTOR, "validate"),
            *("--config", "/otel/collector.yaml", "--set", "exporters.otlp_http/jaeger.no_such_key=1"),
        )


def test_only_four_addresses_are_published_and_all_on_loopback(built_stack: Stack) -> None:
    ids = docker("ps", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}").split()
    published = set()
    for container in json.loads(docker("inspect", *ids)):
        service = container["Config"]["Labels"]["com.docker.compose.service"]
        for port, addresses in container["NetworkSettings"]["Ports"].items():
            published |= {(service, port, address["HostIp"]) for address in addresses or ()}
    assert published >= {
        ("gateway", "8000/tcp", "127.0.0.1"),
        ("jaeger", "16686/tcp", "127.0.0.1"),
        ("mock-model", "8002/tcp", "127.0.0.1"),
    }
    assert published <= {
        ("gateway", "8000/tcp", "127.0.0.1"),
        ("jaeger", "16686/tcp", "127.0.0.1"),
        ("mock-model", "8002/tcp", "127.0.0.1"),
        ("prometheus", "9090/tcp", "127.0.0.1"),
    }
