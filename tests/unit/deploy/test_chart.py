"""The Helm chart: what it renders, what it refuses, and what holds in everything that it renders."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import trustme
import yaml

from gateway import __version__
from gateway.config import load_routing
from gateway.settings import load
from testkit import REPOSITORY
from testkit.completions import CHAT_PATH
from tests.unit.deploy.chart_values import BEGIN, END, table

CHART = REPOSITORY / "deploy" / "helm" / "llm-gateway"
RENDERS = Path(__file__).parent / "renders"
EXAMPLES = sorted(path.name.removesuffix("-values.yaml") for path in (CHART / "ci").iterdir())
KUBERNETES = "1.34"
"""What is rendered for: a `helm` without a cluster may take itself for one of another version."""
TRY_OUT = ("--set", "mockModel.enabled=true")

pytestmark = pytest.mark.skipif(shutil.which("helm") is None, reason="no helm: the chart was not rendered")


def helm(*args: str, kubernetes: str = KUBERNETES) -> subprocess.CompletedProcess[str]:
    command = ["helm", *args, "--kube-version", kubernetes]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603


def render(*args: str, kubernetes: str = KUBERNETES) -> str:
    done = helm("template", "llm", str(CHART), "--namespace", "models", *args, kubernetes=kubernetes)
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


def test_the_readme_has_every_value_that_is_explained() -> None:
    readme = CHART / "README.md"
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    wanted = before + BEGIN + table((CHART / "values.yaml").read_text()) + END + after
    if os.environ.get("UPDATE_RENDERS"):
        readme.write_text(wanted)
    assert readme.read_text() == wanted, "made from values.yaml by UPDATE_RENDERS=1"


def test_the_same_values_render_the_same_wherever_they_are_rendered() -> None:
    """Argo CD renders again and again, and has no cluster to look into."""
    changing = re.compile(
        r"\b(lookup|now|date|rand\w*|uuidv4|gen\w+|derivePassword|shuffle|\.Release\.(Revision|IsUpgrade|IsInstall))\b"
    )
    for template in (CHART / "templates").rglob("*.*"):
        used = [
            code for code in re.findall(r"{{.*?}}", template.read_text()) if not code.startswith(("{{/*", "{{- /*"))
        ]
        assert not any(changing.search(code) for code in used), template


@pytest.mark.parametrize(
    ("release", "name"),
    [
        ("llm", "llm-llm-gateway"),
        ("llm-gateway", "llm-gateway"),
        ("team.llm", "team-llm-llm-gateway"),
        ("a-release-with-a-name-of-fifty-three-characters-eu-a", "a-release-with-a-name-of-fifty-th-"),
    ],
)
def test_a_release_of_any_name_has_names_that_kubernetes_takes(release: str, name: str) -> None:
    everything = ("--set", "valkey.enabled=true,collector.enabled=true,secrets.create.K=v", *TRY_OUT)
    done = helm("template", release, str(CHART), "--namespace", "models", *everything)
    assert done.returncode == 0, done.stderr
    names = {document["metadata"]["name"] for document in objects(done.stdout)}
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", each) for each in names), names
    (service,) = of_kind(done.stdout, "Service")
    assert service["metadata"]["name"].startswith(name)
    (store,) = of_kind(done.stdout, "StatefulSet", "valkey")
    assert len(store["metadata"]["name"] + "-0123456789") <= 63, "the label controller-revision-hash of its pods"


def test_two_releases_in_one_namespace_share_nothing() -> None:
    def install(release: str) -> list[dict[str, Any]]:
        example = ("-f", str(CHART / "ci" / "production-values.yaml"))
        done = helm("template", release, str(CHART), "--namespace", "models", *example)
        assert done.returncode == 0, done.stderr
        return objects(done.stdout)

    a = install("the-gateway-of-the-platform-team-in-production-eu")
    b = install("the-gateway-of-the-platform-team-in-production-us")
    assert not {(o["kind"], o["metadata"]["name"]) for o in a} & {(o["kind"], o["metadata"]["name"]) for o in b}
    (selector,) = (o["spec"]["selector"] for o in a if o["kind"] == "Service" and "valkey" not in o["metadata"]["name"])
    pods_of_b = [o["spec"]["template"]["metadata"]["labels"] for o in b if o["kind"] in {"Deployment", "StatefulSet"}]
    assert not any(selector.items() <= labels.items() for labels in pods_of_b)


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
        (("--set-json", 'secrets.existing=[{"secret":"s","keys":["A","A"]}]'), "`A` comes twice"),
        (("--set-json", 'secrets.existing=[{"secret":"s","keys":{"lower":"a"}}]'), "secrets/existing/0/keys"),
        (
            ("--set-json", 'extraEnv=[{"name":"LOG_LEVEL","value":"DEBUG"}]', "--set", "settings.LOG_LEVEL=INFO"),
            "twice",
        ),
        (("--set", "secrets.create.K=v,settings.K_FILE=/k"), "`K_FILE` comes twice"),
        (
            ("--set", "collector.enabled=true,settings.OTEL_EXPORTER_OTLP_ENDPOINT=http://c"),
            "is the chart's: set `telemetry.endpoint`",
        ),
        (("--set-json", 'podSpec={"volumes":[]}'), "`podSpec.volumes` is the chart's: set `extraVolumes`"),
        (("--set", "service.spec.type=NodePort"), "`service.spec.type` is the chart's: set `service`"),
        (("--set", "fullnameOverride=2024-llm"), "fullnameOverride"),
        (("--set", "fullnameOverride=llm.prod"), "fullnameOverride"),
        (("--set", "fullnameOverride=a-name-that-is-longer-than-forty-characters"), "fullnameOverride"),
        (("--set", "podDisruptionBudget.minAvailable=2"), "of 2 pods 2 must stay"),
        (("--set", "podDisruptionBudget.minAvailable=60%"), "of 2 pods 2 must stay"),
        (("--set", "replicas=1,podDisruptionBudget.minAvailable=1"), "of 1 pods 1 must stay"),
        (("--set", "autoscaling.enabled=true,podDisruptionBudget.minAvailable=2"), "of 2 pods 2 must stay"),
        (("--set", "podDisruptionBudget.maxUnavailable=0"), "a drain of its node never ends"),
        (("--set-json", "ingress.paths=[]"), "ingress/paths"),
        (("--set", "settings.GATEWAY_SHUTDOWN_GRACE=5"), "is the chart's: set `shutdown`"),
        (("--set", "settings.GATEWAY_WORKERS=2"), "is the chart's: set `workers`"),
        (("--set-json", 'extraEnv=[{"name":"GATEWAY_WORKERS","value":"2"}]'), "is the chart's: set `workers`"),
        (("--set", "workers=0"), "workers"),
        (("--set", "workers=2"), "`resources.limits.memory` (768Mi) must be at least 896Mi: "),
        (("--set", "settings.GATEWAY_ADMIN_KEY=k"), "`GATEWAY_ADMIN_KEY` is a secret: set it in `secrets`"),
        (
            ("--set", "valkey.enabled=true,secrets.create.GATEWAY_LIMITS_URL=valkey://v"),
            "leave it out, or set `valkey.enabled` to false",
        ),
        (("--set", "settings.PRIMARY_KEY=k,secrets.create.PRIMARY_KEY=k"), "`PRIMARY_KEY` comes twice"),
        (("--set", "shutdown.gracePeriodSeconds=20"), "at least 10 s above the sum of the other two"),
        (("--set", "settings.GATEWAY_MAX_BUFFERED_BYTES=536870912"), "must be at least 1536Mi: three times"),
        (("--set", "resources.limits.memory=512Mi"), "must be at least 768Mi: three times"),
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


def startup_probes(text: str) -> list[object]:
    return [
        container["startupProbe"]
        for _, spec in pods(text)
        for container in spec["containers"]
        if "startupProbe" in container
    ]


@pytest.mark.parametrize("name", EXAMPLES)
def test_no_pod_has_a_startup_probe_where_a_restarted_kubelet_runs_it_anew_with_the_pod_out_of_its_service(
    name: str,
) -> None:
    values = ("-f", str(CHART / "ci" / f"{name}-values.yaml"))
    assert not startup_probes(render(*values, kubernetes="1.34.4"))
    (probe,) = startup_probes(render(*values, kubernetes="1.35.0-eks-1"))
    assert probe == {"httpGet": {"path": "/livez", "port": "http"}} | {
        "periodSeconds": 1,
        "timeoutSeconds": 2,
        "failureThreshold": 60,
    }
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
    authority = tmp_path / "ca.crt"
    trustme.CA().cert_pem.write_to_path(authority)
    file.write_text(routes["data"]["routes.yaml"].replace("/etc/gateway/ca/ca.crt", str(authority)))
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


@pytest.fixture
def notes(tmp_path: Path) -> Callable[..., str]:
    """What `helm install` says after it."""
    chart = tmp_path / "chart"
    shutil.copytree(CHART, chart)
    text = (chart / "templates" / "NOTES.txt").read_text()  # `helm template` does not show it
    (chart / "templates" / "_notes.tpl").write_text('{{ define "notes" }}' + text + "{{ end }}")
    (chart / "templates" / "notes.yaml").write_text('notes: {{ include "notes" . | toJson }}')

    def notes(*args: str) -> str:
        done = helm("template", "llm", str(chart), "--show-only", "templates/notes.yaml", *args)
        assert done.returncode == 0, done.stderr
        return str(yaml.safe_load(done.stdout)["notes"])

    return notes


def test_the_notes_warn_of_limits_that_pods_do_not_share(notes: Callable[..., str]) -> None:
    production = ("-f", str(CHART / "ci" / "production-values.yaml"))
    warning = "WARNING: the limits of keys are each pod's own"
    alone = (*production, "--set", "valkey.enabled=false")
    assert warning not in notes(*production)
    assert warning in notes(*alone)
    assert warning not in notes(*alone, "--set", "secrets.create.GATEWAY_LIMITS_URL=valkey://made-up")


def test_the_notes_say_what_to_do_next_and_whom_policies_keep_out(notes: Callable[..., str]) -> None:
    open_to_all = "WARNING: there are no gateway keys"
    kept_out = "WARNING: Where network policies are enforced"
    bare = notes(*TRY_OUT)
    assert open_to_all in bare
    assert kept_out not in bare
    assert "authorization" not in bare
    assert "OPENAI_BASE_URL=http://llm-llm-gateway.default/v1\n" in bare
    behind = notes(
        *TRY_OUT, "--set", "ingress.enabled=true,ingress.hosts={llm.example.com},secrets.create.GATEWAY_API_KEYS=k"
    )
    assert open_to_all not in behind
    assert kept_out in behind
    assert '-H "authorization: Bearer $KEY"' in behind
    assert "http://llm.example.com/v1" in behind
    assert "name it in `networkPolicy.metricsFrom`" in notes(*TRY_OUT, "--set", "podMonitor.enabled=true")


def test_a_secret_that_is_there_may_name_its_keys_as_it_likes() -> None:
    text = render(*TRY_OUT, "--set-json", 'secrets.existing=[{"secret":"openai","keys":{"OPENAI_API_KEY":"api-key"}}]')
    assert environment(text)["OPENAI_API_KEY_FILE"] == "/etc/gateway/secrets/OPENAI_API_KEY"
    (volume,) = (volume for volume in gateway_pod(text)["volumes"] if volume["name"] == "secrets")
    items = [{"key": "api-key", "path": "OPENAI_API_KEY"}]
    assert volume["projected"]["sources"] == [{"secret": {"name": "openai", "items": items}}]


def test_no_variable_stands_twice_in_a_pod_and_later_ones_may_name_earlier_ones() -> None:
    for name in EXAMPLES:
        for pod, spec in pods(example(name)):
            names = [entry["name"] for entry in spec["containers"][0].get("env", [])]
            assert len(names) == len(set(names)), pod
            for entry in spec["containers"][0].get("env", []):
                for named in re.findall(r"\$\((\w+)\)", entry.get("value", "")):
                    assert names.index(named) < names.index(entry["name"]), f"{pod}: {named} is not known yet"
    attributes = environment(example("production"))["OTEL_RESOURCE_ATTRIBUTES"]
    assert attributes.startswith("service.instance.id=$(POD_NAME),")
    assert attributes.endswith(",deployment.environment.name=production,k8s.node.name=$(NODE_NAME)")


def test_who_scales_the_gateway_is_one_alone() -> None:
    def replicas(*args: str) -> object:
        (deployment,) = of_kind(render(*TRY_OUT, *args), "Deployment")
        return deployment["spec"].get("replicas")

    assert replicas() == 2
    assert replicas("--set", "autoscaling.enabled=true") is None
    assert replicas("--set", "replicas=null") is None


def test_a_pod_that_is_recreated_has_no_settings_of_a_rolling_update() -> None:
    (deployment,) = of_kind(render(*TRY_OUT, "--set", "updateStrategy.type=Recreate"), "Deployment")
    assert deployment["spec"]["strategy"] == {"type": "Recreate"}


def test_no_pod_has_ids_of_its_own_where_the_cluster_gives_them_out() -> None:
    assert not re.search(r"\b(runAsUser|runAsGroup|fsGroup):", example("openshift"))


@pytest.mark.parametrize(
    ("error", "model", "code", "said"),
    [
        (None, "", 0, "backends: {'a': 'down'}"),
        ("routes.yaml, line 3: unknown key", "", 1, "not in force: routes.yaml, line 3: unknown key"),
        (None, "unknown", 1, "no such model"),
    ],
)
def test_helm_test_tells_a_configuration_that_is_not_taken(error: str | None, model: str, code: int, said: str) -> None:
    health = {"config": {"error": error}, "downstream": {"backends": [{"name": "a", "status": "down"}]}}
    answers = {"/readyz": (200, "{}"), "/health": (503, json.dumps(health)), CHAT_PATH: (404, "no such model")}

    class Gateway(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answers[self.path]
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def do_POST(self) -> None:
            self.do_GET()

    (pod,) = (document for document in objects(render(*TRY_OUT)) if document["kind"] == "Pod")
    (container,) = pod["spec"]["containers"]
    with HTTPServer(("127.0.0.1", 0), Gateway) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        done = subprocess.run(  # noqa: S603
            [sys.executable, *container["command"][1:]],
            env={"URL": f"http://127.0.0.1:{server.server_port}", "MODEL": model},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        server.shutdown()
    assert done.returncode == code, done.stderr
    assert said in done.stdout + done.stderr


def test_where_pods_have_ipv6_addresses_only_everything_listens_there() -> None:
    text = render("-f", str(CHART / "ci" / "try-out-values.yaml"), "--set", "settings.HOST=::")
    assert environment(text)["HOST"] == "::"
    listening = {
        entry["value"]
        for _, spec in pods(text)
        for entry in spec["containers"][0].get("env", [])
        if entry["name"] == "HOST"
    }
    assert listening == {"::"}
    (collector,) = of_kind(text, "ConfigMap", "collector")
    receivers = yaml.safe_load(collector["data"]["config.yaml"])["receivers"]
    assert receivers["otlp"]["protocols"]["http"]["endpoint"] == "[::]:4318"


def test_taints_and_nodes_are_those_of_all_pods() -> None:
    placed = ("--set", "valkey.enabled=true,collector.enabled=true,priorityClassName=high,nodeSelector.pool=llm")
    text = render(*TRY_OUT, *placed, "--set-json", 'tolerations=[{"key":"dedicated","operator":"Exists"}]')
    assert len(list(pods(text))) == 5
    assert {spec["priorityClassName"] for _, spec in pods(text)} == {"high"}
    assert all(spec["nodeSelector"] and spec["tolerations"] for _, spec in pods(text))


def test_what_leads_in_from_outside_leads_to_the_api_alone() -> None:
    (ingress,) = of_kind(example("ingress"), "Ingress")
    (route,) = of_kind(example("production"), "HTTPRoute")
    assert [path["path"] for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"]] == ["/v1"]
    assert [match["path"]["value"] for rule in route["spec"]["rules"] for match in rule["matches"]] == ["/v1"]


def egress(*args: str) -> list[dict[str, Any]]:
    (policy,) = of_kind(render(*args), "NetworkPolicy")
    rules: list[dict[str, Any]] = policy["spec"]["egress"]
    return rules


def test_the_gateway_may_call_the_ports_that_its_configuration_names() -> None:
    config = {
        "backends": {
            "a": {"urls": ["http://a.models:8000/v1", "https://key@[fd00::1]/v1"]},
            "b": {"url": "http://b"},
        },
        "routes": [{"model": "*", "targets": [{"backend": "a"}]}],
    }
    given = ("--set-json", f"config={json.dumps(config)}", "--set", "telemetry.endpoint=http://collector.obs:4318")
    _, inside, outside = egress(*given)
    assert inside == {"to": [{"podSelector": {}}]}
    assert [port["port"] for port in outside["ports"]] == [4318, 443, 80, 8000]
    for peer in outside["to"]:
        assert "namespaceSelector" in peer or peer["ipBlock"]["except"], "where clouds give out credentials"
    assert egress(*given, "--set-json", "networkPolicy.egress=[]") == egress(*given)[:1], "name servers alone"
    assert [port["port"] for port in egress("--set", "existingConfigMap=ours")[-1]["ports"]] == [443]
    assert egress(*TRY_OUT)[-1] == {"to": [{"podSelector": {}}]}


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
