"""A release of the chart on a real cluster, driven through kubectl and helm as a user would."""

import json
import os
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from testkit import REPOSITORY
from testkit.http import Answer
from testkit.polling import wait_for
from testkit.traces import Span, read_json_spans
from tests.stack.engine import call

CHART = REPOSITORY / "deploy" / "helm" / "llm-gateway"
NAMESPACE = "llm-gateway-test"
RELEASE = "gateway"  # a Service of this name gives pods variables such as GATEWAY_PORT, unless the chart says no
FULLNAME = "gateway-llm-gateway"
TAGS = ("cluster-a", "cluster-b")
"""Of two images of the gateway that differ in a label."""
LOAD = "CLUSTER_LOAD"
"""The variable with a command that brings images, named behind it, into the cluster: `kind load docker-image`."""
RESTART_KUBELET = "CLUSTER_RESTART_KUBELET"
"""The variable with a command that restarts the kubelet of the node."""
VALUES: dict[str, Any] = {
    "image": {"tag": TAGS[0]},
    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "768Mi"}},
    "service": {"type": "NodePort"},
    "progressDeadlineSeconds": 200,
    "mockModel": {
        "enabled": True,
        "image": {"tag": TAGS[0]},
        "settings": {"MOCK_TTFT": 0.2, "MOCK_TOKEN_INTERVAL": 0.2, "MOCK_TOKENS": 100},
    },
    "collector": {"enabled": True, "exportTo": "http://jaeger:4318"},
    "test": {"model": "demo-model"},
}


def run(*command: str, stdin: str | None = None, seconds: float = 120) -> str:
    """Run a command and return what it printed. Raises: AssertionError with its stderr."""
    done = subprocess.run(  # noqa: S603
        command, cwd=REPOSITORY, input=stdin, capture_output=True, text=True, timeout=seconds, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def kubectl(*args: str, stdin: str | None = None, seconds: float = 120) -> str:
    """Run `kubectl ARGS` in the tests' namespace."""
    return run("kubectl", "--namespace", NAMESPACE, *args, stdin=stdin, seconds=seconds)


def why_no_cluster() -> str | None:
    """Why there is no cluster to use, in a few words; None when there is one."""
    for command, missing in (
        (("kubectl", "version", "--request-timeout=5s"), "no cluster answers"),
        (("helm", "version"), "no helm"),
        (("docker", "info"), "no Docker engine to build images"),
    ):
        try:
            run(*command, seconds=20)
        except FileNotFoundError:
            return f"no {command[0]}"
        except (AssertionError, subprocess.TimeoutExpired):
            return missing
    return None


def bring_images() -> None:
    """Build the images and bring them into the cluster."""
    ours = [*(_build("gateway", tag) for tag in TAGS), _build("mock-model", TAGS[0])]
    others = ["valkey/valkey:9.1", "otel/opentelemetry-collector-contrib:0.155.0", "jaegertracing/jaeger:2.13.0"]
    if command := os.environ.get(LOAD):
        run(*shlex.split(command), *ours, *filter(_is_here, others), seconds=600)


def _is_here(image: str) -> bool:
    """Whether this machine has an image; one that it has not, the cluster pulls itself."""
    done = subprocess.run(["docker", "image", "inspect", image], capture_output=True, check=False)  # noqa: S603, S607
    return done.returncode == 0


def _build(name: str, tag: str) -> str:
    image = f"llm-gateway/{name}:{tag}"
    arguments = ("--build-arg", "PYTHON_IMAGE", "--build-arg", "PIP_INDEX_URL", "--build-arg", f"REVISION={tag}")
    run("docker", "build", "--quiet", *arguments, "-f", f"docker/{name}.Dockerfile", "-t", image, ".", seconds=600)
    return image


@dataclass(frozen=True)
class Release:
    """The installed chart: its gateways behind a node port."""

    address: str
    ports: Mapping[str, int]

    @classmethod
    def install(cls, values: Path) -> "Release":
        """Install the chart, and Jaeger beside it, in a namespace of their own."""
        kubectl("create", "namespace", NAMESPACE)
        kubectl("apply", "-f", "tests/cluster/jaeger.yaml")
        values.write_text(json.dumps(VALUES))
        run("helm", "install", RELEASE, str(CHART), "-n", NAMESPACE, "-f", str(values), "--wait", "--timeout", "180s")
        kubectl("rollout", "status", "deployment/jaeger", "--timeout=120s")
        nodes = json.loads(kubectl("get", "nodes", "-o", "json"))["items"]
        address = next(a["address"] for a in nodes[0]["status"]["addresses"] if a["type"] == "InternalIP")
        services = json.loads(kubectl("get", "services", "-o", "json"))["items"]
        ports = {
            f"{service['metadata']['name']}:{port['name']}": port["nodePort"]
            for service in services
            for port in service["spec"]["ports"]
            if "nodePort" in port
        }
        return cls(address, ports)

    @property
    def url(self) -> str:
        """Of the gateways' Service."""
        return f"http://{self.address}:{self.ports[f'{FULLNAME}:http']}"

    def upgrade(self, *args: str) -> None:
        """`helm upgrade` with changed values; returns at once."""
        run("helm", "upgrade", RELEASE, str(CHART), "-n", NAMESPACE, "--reuse-values", *args)

    def ask(self, key: str | None = None) -> Answer:
        """Post a prompt."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        body = {"messages": [{"role": "user", "content": "Say something."}], "max_tokens": 3}
        return call("POST", self.url + "/v1/chat/completions", body, headers, seconds=60)

    def spans(self, trace_id: str) -> list[Span]:
        """The spans that Jaeger has for a trace, so far."""
        query = f"http://{self.address}:{self.ports['jaeger:query']}/api/v3/traces/{trace_id}"
        answer = call("GET", query)
        return list(read_json_spans(answer.json["result"])) if answer.status == 200 else []

    def wait_for_trace(self) -> None:
        """Post prompts until one's whole trace is in Jaeger: request, attempt and model."""

        def whole() -> bool:
            trace_id = self.ask().headers["x-trace-id"]
            services = ["gateway", "gateway", "mock-model"]
            return wait_for(lambda: sorted(s.service for s in self.spans(trace_id)) == services, "its spans", 10)

        wait_for(whole, "a whole trace", 120)

    def pods(self, component: str = "gateway") -> list[dict[str, Any]]:
        """All pods of a component, those that end too."""
        found: list[dict[str, Any]] = json.loads(
            kubectl("get", "pods", "-l", f"app.kubernetes.io/component={component}", "-o", "json")
        )["items"]
        return found

    def names(self) -> set[str]:
        """Of the gateway's pods that are ready and do not end."""
        return {
            pod["metadata"]["name"]
            for pod in self.pods()
            if "deletionTimestamp" not in pod["metadata"]
            and any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
        }

    def health(self, pod: str) -> dict[str, Any]:
        """What one of the gateways says of itself."""
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}:8000/proxy/health"
        document: dict[str, Any] = json.loads(kubectl("get", "--raw", path))
        return document

    def models(self) -> list[dict[str, Any]]:
        """The models that callers can ask for."""
        found: list[dict[str, Any]] = call("GET", self.url + "/v1/models").json["data"]
        return found

    def settled(self, replicas: int = 2) -> None:
        """Wait until there are so many gateways, all of them ready, and none that ends any more."""
        wait_for(
            lambda: len(self.pods()) == len(self.names()) == replicas, f"{replicas} gateways, none that ends", 240, 0.5
        )

    def rolled_out(self, replicas: int = 2) -> None:
        """Wait for the end of a rollout, and of the pods that it replaced."""
        kubectl("rollout", "status", f"deployment/{FULLNAME}", "--timeout=240s", seconds=250)
        self.settled(replicas)

    def image(self) -> str:
        """Of the gateway's deployment."""
        path = "jsonpath={.spec.template.spec.containers[0].image}"
        return kubectl("get", f"deployment/{FULLNAME}", "-o", path)

    def evict(self, pod: str) -> str | None:
        """Evict a pod as `kubectl drain` does; why it was refused, or None."""
        eviction = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": pod, "namespace": NAMESPACE},
        }
        path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
        try:
            kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))
        except AssertionError as error:
            return str(error)
        return None

    @contextmanager
    def left_as_it_was(self) -> Iterator[None]:
        """Two gateways of the first image again after the block, whatever happened in it."""
        try:
            yield
        finally:
            run(
                "helm",
                "upgrade",
                RELEASE,
                str(CHART),
                "-n",
                NAMESPACE,
                "--reset-values",
                "-f",
                "-",
                stdin=json.dumps(VALUES),
            )
            kubectl("scale", f"deployment/{FULLNAME}", "--replicas=2")
            self.rolled_out()


def remove() -> None:
    """Take everything away again."""
    run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=240s", seconds=250)
