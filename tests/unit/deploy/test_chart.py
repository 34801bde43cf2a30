"""The Helm chart: what it renders, what it refuses, and what holds in everything that it renders."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway import __version__
from gateway.config import load_routing
from gateway.settings import load
from testkit import REPOSITORY

CHART = REPOSITORY / "deploy" / "helm" / "llm-gateway"
RENDERS = Path(__file__).parent / "renders"
EXAMPLES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir())
KUBERNETES = "1.34"
"""What is rendered for: a `helm` without a cluster may take itself for one of another version."""
TRY_OUT = ("--set", "mockModel.enabled=true")

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="no helm: the chart was not rendered")


def helm(*args: str) -> subprocess.CompletedProcess[str]:
    command = ["helm", *args, "--kube-version", KUBERNETES]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603


def render(*args: str) -> str:
    done = helm("template", "llm", str(CHART), "--namespace", "models", *args)
    assert done.returncode == 0, done.stderr
    return done.stdout.rstrip("\n") + "\n"


@cache
def example(name: str) -> str:
    return render("-f", str(CHART / "ci" / f"{name}-values.yaml"))


def objects(text: str) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(text) if document]


def of_kind(text: str, kind: str, component: str = "gateway") -> list[dict[str, Any]]:
    return [
        document
        for document in objects(text)
        if document["kind"] == kind and document["metadata"]["labels"]["app.kubernetes.io/component"] == component
    ]


def pods(text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The name and the pod's specification of everything that runs."""
    for document in objects(text):
        if document["kind"] == "Pod":
            yield document["metadata"]["name"], document["spec"]
        elif document["kind"] in {"Deployment", "StatefulSet"}:
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def gateway_pod(text: str) -> dict[str, Any]:
    (deployment,) = of_kind(text, "Deployment")
    spec: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return spec


def environment(text: str) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in gateway_pod(text)["containers"][0]["env"]}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_chart_renders_as_it_did(name: str) -> None:
    expected = RENDERS / f"{name}.yaml"
    if os.environ.get("UPDATE_RENDERS"):
        expected.write_text(example(name), encoding="utf-8")
    assert example(name) == expected.read_text(encoding="utf-8"), (
        "if that is meant: UPDATE_RENDERS=1, and read the diff"
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_linter_has_nothing_to_say(name: str) -> None:
    done = helm("lint", "--strict", str(CHART), "-f", str(CHART / "ci" / f"{name}-values.yaml"))
    assert done.returncode == 0, done.stdout


def test_chart_and_gateway_have_one_version() -> None:
    assert yaml.safe_load((CHART / "Chart.yaml").read_text())["appVersion"] == __version__
    assert gateway_pod(render(*TRY_OUT))["containers"][0]["image"] == f"llm-gateway/gateway:{__version__}"


def test_every_value_is_in_the_schema_and_every_property_in_the_values() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) - {"global"} == set(values)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ((), "set `config` (backends and routes), `existingConfigMap`, or `mockModel.enabled: true`"),
        (("--set", "replica=3"), "additional properties 'replica' not allowed"),
        (("--set", "image.tagg=1"), "additional properties 'tagg' not allowed"),
        (("--set", "replicas=two"), "replicas"),
        (("--set", "image.digest=sha256:12"), "image/digest"),
        (("--set-json", 'config={"backends":{"a":{"url":"http://a"}}}'), "missing property 'routes'"),
        (("--set-json", 'secrets.existing=[{"secret":"s","keys":["lower"]}]'), "secrets/existing/0/keys/0"),
        (("--set-json", 'secrets.existing=[{"secret":"s","keys":["A","A"]}]'), "twice"),
        (("--set", "settings.GATEWAY_SHUTDOWN_GRACE=5"), "is the chart's: set `shutdown`"),
        (("--set", "settings.GATEWAY_WORKERS=2"), "is the chart's: set `workers`"),
        (("--set-json", 'extraEnv=[{"name":"GATEWAY_WORKERS","value":"2"}]'), "is the chart's: set `workers`"),
        (("--set", "workers=0"), "workers"),
        (("--set", "workers=2"), "`resources.limits.memory` (768Mi) must be at least 939524096 bytes"),
        (
            ("--set", "valkey.enabled=true,secrets.create.GATEWAY_LIMITS_URL=valkey://v"),
            "leave it out, or set `valkey.enabled` to false",
        ),
        (("--set", "settings.PRIMARY_KEY=k,secrets.create.PRIMARY_KEY=k"), "set only one of them"),
        (("--set", "shutdown.gracePeriodSeconds=20"), "at least 10 s above the sum of the other two"),
        (("--set", "settings.GATEWAY_MAX_BUFFERED_BYTES=536870912"), "three times `settings.GATEWAY_MAX_BUFFERED"),
        (("--set", "resources.limits.memory=512Mi"), "three times `settings.GATEWAY_MAX_BUFFERED"),
        (("--set", "ingress.enabled=true"), "`ingress.hosts` is empty"),
        (("--set", "httpRoute.enabled=true"), "`httpRoute.parentRefs` is empty"),
        (
            ("--set", "existingConfigMap=ours", "--set-json", 'config={"backends":{"a":{}},"routes":[{"targets":[]}]}'),
            "Both",
        ),
    ],
)
def test_wrong_values_are_refused_with_the_reason(wrong: tuple[str, ...], complaint: str) -> None:
    done = helm("template", "llm", str(CHART), *(TRY_OUT if wrong else ()), *wrong)
    assert done.returncode != 0
    assert complaint in done.stderr, done.stderr


@pytest.mark.parametrize("name", EXAMPLES)
def test_everything_that_runs_is_locked_down(name: str) -> None:
    found = dict(pods(example(name)))
    assert len(found) >= 3
    for pod, spec in found.items():
        assert spec["automountServiceAccountToken"] is False, pod
        assert spec["enableServiceLinks"] is False, pod
        assert spec["securityContext"]["runAsNonRoot"] is True, pod
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, pod
        for container in spec["containers"]:
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True, pod
            assert own["allowPrivilegeEscalation"] is False, pod
            assert own["capabilities"] == {"drop": ["ALL"]}, pod
            assert container["resources"]["limits"]["memory"], pod
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}, pod
            assert not container["image"].endswith(":latest"), pod
            assert not any("subPath" in mount for mount in container.get("volumeMounts", [])), pod


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_pod_has_a_startup_probe_which_a_restarted_kubelet_runs_anew_with_the_pod_out_of_its_service(
    name: str,
) -> None:
    for pod, spec in pods(example(name)):
        assert not [container for container in spec["containers"] if "startupProbe" in container], pod
    liveness = gateway_pod(example(name))["containers"][0]["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] >= 60, "a start on a busy node takes long"


@pytest.mark.parametrize(("grace", "sleep", "delay"), [(120, 5, 10), (600, 30, 0), (12, 0, 2)])
def test_the_gateway_gives_up_before_the_kubelet_does(grace: int, sleep: int, delay: int) -> None:
    of = {"gracePeriodSeconds": grace, "preStopSeconds": sleep, "delaySeconds": delay}
    text = render(*TRY_OUT, "--set-json", f"shutdown={json.dumps(of)}")
    pod = gateway_pod(text)
    slept = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    variables = environment(text)
    taken = sleep + float(variables["GATEWAY_SHUTDOWN_DELAY"]) + float(variables["GATEWAY_SHUTDOWN_GRACE"])
    assert (pod["terminationGracePeriodSeconds"], slept) == (grace, sleep)
    assert taken == grace - 5, "the last answers and spans need some time"


def test_a_change_of_routes_or_of_a_key_restarts_nothing_and_one_of_a_setting_does() -> None:
    def template(**values: object) -> str:
        arguments = [part for name, value in values.items() for part in ("--set-json", f"{name}={json.dumps(value)}")]
        (deployment,) = of_kind(render(*TRY_OUT, *arguments), "Deployment")
        return json.dumps(deployment["spec"]["template"])

    routes = {"backends": {"a": {"url": "http://a"}}, "routes": [{"model": "*", "targets": [{"backend": "a"}]}]}
    other = routes | {"backends": {"a": {"url": "http://b"}}}
    assert template(config=routes) == template(config=other)
    assert template(**{"secrets.create": {"K": "1"}}) == template(**{"secrets.create": {"K": "2"}})
    assert template(settings={"LOG_LEVEL": "INFO"}) != template(settings={"LOG_LEVEL": "DEBUG"})


def test_secrets_reach_the_gateway_as_files_and_stand_nowhere_else() -> None:
    text = render(*TRY_OUT, "--set", "secrets.create.GATEWAY_API_KEYS=made-up-key")
    (secret,) = of_kind(text, "Secret")
    assert secret["stringData"] == {"GATEWAY_API_KEYS": "made-up-key"}
    assert text.count("made-up-key") == 1
    assert environment(text)["GATEWAY_API_KEYS_FILE"] == "/etc/gateway/secrets/GATEWAY_API_KEYS"
    assert "GATEWAY_API_KEYS" not in environment(text)


@pytest.mark.parametrize("name", ["try-out", "production"])
def test_the_gateway_takes_what_the_chart_gives_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (routes,) = of_kind(example(name), "ConfigMap")
    file = tmp_path / "routes.yaml"
    file.write_text(routes["data"]["routes.yaml"])
    for variable, value in environment(example(name)).items():
        if variable.endswith("_FILE"):
            secret = tmp_path / variable
            secret.write_text("made-up-key-" + variable)
            monkeypatch.setenv(variable, str(secret))
        elif variable != "GATEWAY_LIMITS_URL":
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("GATEWAY_CONFIG", str(file))

    settings = load()
    assert settings.gateway_shutdown_grace == 100
    assert load_routing(settings).routes


def test_a_pod_has_one_worker_or_as_many_as_are_asked_for() -> None:
    assert environment(render(*TRY_OUT))["GATEWAY_WORKERS"] == "1"
    text = render(*TRY_OUT, "--set", "workers=4,resources.limits.memory=1Gi")
    assert environment(text)["GATEWAY_WORKERS"] == "4"


def test_a_store_of_limits_of_your_own_is_named_by_a_file() -> None:
    text = render(*TRY_OUT, "--set", "secrets.create.GATEWAY_LIMITS_URL=valkeys://made-up:password@host")
    assert environment(text)["GATEWAY_LIMITS_URL_FILE"] == "/etc/gateway/secrets/GATEWAY_LIMITS_URL"
    assert "GATEWAY_LIMITS_URL" not in environment(text)
    assert text.count("made-up:password") == 1


def test_the_notes_warn_of_limits_that_pods_do_not_share(tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    text = (chart / "templates" / "NOTES.txt").read_text()  # `helm template` does not show it
    (chart / "templates" / "_notes.tpl").write_text('{{ define "notes" }}' + text + "{{ end }}")
    (chart / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}')

    def notes(*args: str) -> str:
        values = ("-f", str(CHART / "ci" / "production-values.yaml"), *args)
        done = helm("template", "llm", str(chart), "--show-only", "templates/notes.yaml", *values)
        assert done.returncode == 0, done.stderr
        return str(yaml.safe_load(done.stdout)["notes"])

    warning = "WARNING: the limits of keys are each pod's own"
    alone = ("--set", "valkey.enabled=false")
    assert warning not in notes()
    assert warning in notes(*alone)
    assert warning not in notes(*alone, "--set", "secrets.create.GATEWAY_LIMITS_URL=valkey://made-up")


def test_numbers_of_settings_stay_as_they_are_written() -> None:
    assert environment(example("production"))["GATEWAY_MAX_BODY_BYTES"] == "33554432"
    text = render(*TRY_OUT, "--set", "settings.GATEWAY_HEARTBEAT=0.5,settings.GATEWAY_CAPTURE_CONTENT=false")
    assert environment(text)["GATEWAY_HEARTBEAT"] == "0.5"
    assert environment(text)["GATEWAY_CAPTURE_CONTENT"] == "false"


def test_every_pod_of_the_chart_has_a_network_policy_of_both_directions() -> None:
    text = render("-f", str(CHART / "ci" / "try-out-values.yaml"), "--set", "valkey.enabled=true")
    policies = [document["spec"] for document in objects(text) if document["kind"] == "NetworkPolicy"]
    selected = {policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] for policy in policies}
    assert selected == {"gateway", "mock-model", "collector", "valkey"}
    assert all(policy["policyTypes"] == ["Ingress", "Egress"] for policy in policies)
    for policy in policies:
        for rule in policy["ingress"]:
            assert rule["from"], "an empty list lets everybody in"


def test_selectors_find_the_gateway_and_nothing_else() -> None:
    for name in EXAMPLES:
        labels = {
            document["metadata"]["name"]: document["spec"]["template"]["metadata"]["labels"]
            for document in objects(example(name))
            if document["kind"] in {"Deployment", "StatefulSet"}
        }
        (service,) = of_kind(example(name), "Service")
        (deployment,) = of_kind(example(name), "Deployment")
        (budget,) = of_kind(example(name), "PodDisruptionBudget")
        for selector in (
            service["spec"]["selector"],
            deployment["spec"]["selector"]["matchLabels"],
            budget["spec"]["selector"]["matchLabels"],
        ):
            found = {pod for pod, own in labels.items() if selector.items() <= own.items()}
            assert found == {deployment["metadata"]["name"]}
