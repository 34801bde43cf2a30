"""The real compose.yaml on a real engine, driven through the Docker CLI as a user would."""

import contextlib
import http.client
import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from gateway import __version__
from testkit import REPOSITORY
from testkit.completions import CHAT_PATH, prompt
from testkit.http import Answer
from testkit.polling import wait_for
from testkit.ports import CONTAINERS, free_ports
from testkit.traces import Span, read_json_spans

PROJECT = "llm-gateway-test"
SERVICES = {"gateway", "mock-model", "otel-collector", "otel-collector-health", "jaeger"}
PATIENCE = 40.0
"""Seconds until something counts as missing: containers start slowly on a busy machine."""
BENT_BY = ("GATEWAY_", "EDGE_", "MOCK_", "COMPOSE_", "OTEL_", "JAEGER_", "PROMETHEUS_", "GRAFANA_", "MODEL_NAME")
"""Variables of the caller's shell that would change the stack under test."""


def docker(*args: str, env: Mapping[str, str] | None = None, seconds: float = 120, complaints: bool = False) -> str:
    """Run `docker ARGS` and return what it printed, its `complaints` too. Raises: AssertionError with its stderr."""
    done = subprocess.run(  # noqa: S603
        ["docker", *args],  # noqa: S607
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"docker {' '.join(args)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr if complaints else done.stdout


def why_no_engine() -> str | None:
    """Why there is no Docker engine to use, in a few words; None when there is one."""
    for command, missing in (("info", "no Docker engine answers"), ("compose", "no Compose v2")):
        try:
            docker(command, *(["version"] if command == "compose" else []), seconds=60)
        except FileNotFoundError:
            return "no docker command"
        except (AssertionError, subprocess.TimeoutExpired):
            return missing
    return None


def call(
    method: str,
    url: str,
    body: object = None,
    headers: Mapping[str, str] | None = None,
    seconds: float = 10,
) -> Answer:
    """One HTTP call on a connection of its own. Raises: OSError, http.client.HTTPException."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert ip_address(parts.hostname).is_private, "load goes to this machine and its own networks only"
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=seconds)
    started = time.monotonic()
    with contextlib.closing(connection):
        data = None if body is None else json.dumps(body).encode()
        target = f"{parts.path}?{parts.query}" if parts.query else parts.path or "/"
        connection.request(method, target, data, {"content-type": "application/json", **(headers or {})})
        response = connection.getresponse()
        cut = False
        try:
            received = response.read()
        except http.client.IncompleteRead as end:
            received, cut = end.partial, True
        return Answer(response.status, dict(response.getheaders()), received, time.monotonic() - started, cut)


@dataclass
class Stack:
    """One project of compose.yaml with ports of its own."""

    env: dict[str, str]
    profiles: tuple[str, ...] = ()

    @classmethod
    def with_free_ports(cls) -> "Stack":
        names = (
            "GATEWAY_PORT",
            "GATEWAY_B_PORT",
            "EDGE_PORT",
            "JAEGER_PORT",
            "MOCK_CONTROL_PORT",
            "PROMETHEUS_PORT",
            "GRAFANA_PORT",
        )
        ports = {name: str(port) for name, port in zip(names, free_ports(len(names), CONTAINERS), strict=True)}
        own = {name: value for name, value in os.environ.items() if not name.startswith(BENT_BY)}
        return cls(own | ports | {"GATEWAY_ENV_FILE": "tests/stack/gateway.env", "VERSION": __version__})

    def compose(self, *args: str, seconds: float = 120, complaints: bool = False) -> str:
        """Run `docker compose ARGS` on this project; a user's own .env and project are left out of it."""
        chosen = [f"--profile={profile}" for profile in self.profiles]
        command = ("compose", "-p", PROJECT, "--env-file", os.devnull, *chosen, *args)
        return docker(*command, env=self.env, seconds=seconds, complaints=complaints)

    def with_profile(self, profile: str, **env: str) -> "Stack":
        """The same project with one more profile."""
        return Stack(self.env | env, (*self.profiles, profile))

    def down(self) -> None:
        Stack(self.env, ("*",)).compose("down", "--volumes", "--remove-orphans", "--timeout=5")

    def inspect(self, service: str) -> dict[str, Any]:
        """What the engine says of a service's container, running or not."""
        name = self.compose("ps", "--all", "--quiet", service).strip()
        assert name, f"{service} has no container"
        found: dict[str, Any] = json.loads(docker("inspect", name))[0]
        return found

    def running(self) -> set[str]:
        """The services whose container runs."""
        label = "com.docker.compose.service"
        own = ("--filter", f"label=com.docker.compose.project={PROJECT}", "--filter", "status=running")
        return set(docker("ps", *own, "--format", f'{{{{.Label "{label}"}}}}').split())

    def addresses(self, service: str) -> set[str]:
        """The container's own addresses, one for each network."""
        networks = self.inspect(service)["NetworkSettings"]["Networks"].values()
        return {network["IPAddress"] for network in networks} - {""}

    def url(self, port: str, path: str) -> str:
        return f"http://127.0.0.1:{self.env[port]}{path}"

    def ask(self, body: object = None, *, seconds: float = 10, **headers: str) -> Answer:
        """Post a prompt through the published port; `x_request_timeout="2"` becomes a header."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = self.url("GATEWAY_PORT", CHAT_PATH)
        return call("POST", url, prompt() if body is None else body, named, seconds)

    def gateway(self, path: str, **headers: str) -> Answer:
        return call("GET", self.url("GATEWAY_PORT", path), headers=headers)

    def control(self, method: str, path: str, body: object = None) -> Answer:
        """Call the mock model's control API through its published port."""
        answer = call(method, self.url("MOCK_CONTROL_PORT", path), body)
        assert answer.status < 300, answer
        return answer

    def script(self, *faults: dict[str, Any]) -> None:
        """Replace the mock model's script of faults."""
        self.control("PUT", "/faults", list(faults))

    def spans(self, trace_id: str) -> list[Span]:
        """The spans that Jaeger's query API has for a trace, so far."""
        answer = call("GET", self.url("JAEGER_PORT", f"/api/v3/traces/{trace_id}"))
        return list(read_json_spans(answer.json["result"])) if answer.status == 200 else []

    def wait_for_spans(self, trace_id: str, services: list[str], seconds: float = PATIENCE) -> list[Span]:
        """The spans of a trace as soon as Jaeger has one for each of `services` (sorted, repeated if several)."""

        def complete() -> list[Span]:
            found = self.spans(trace_id)
            return found if sorted(span.service for span in found) == services else []

        return wait_for(complete, f"spans of {services} in trace {trace_id}", seconds, every=0.3)

    def steady(self) -> None:
        """Wait until the stack is as after a start: no fault, each backend `ok`, a prompt answered."""
        wait_for(lambda: self.control("POST", "/reset"), "the mock model's control API", PATIENCE)
        wait_for(lambda: self.ask().status == 200, "a prompt is answered", PATIENCE, every=0.25)
        wait_for(
            lambda: self.gateway("/health").json["downstream"]["status"] == "ok",
            "the gateway is healthy",
            PATIENCE,
            every=0.25,
        )
        self.control("DELETE", "/journal")
