"""What operators do to a cluster, and what happens to it, under a steady load: nobody notices what is planned."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import pytest

from chaos.promises import Verdict, at_least, at_most
from testkit.load import Call, good, now, sent_between
from testkit.polling import wait_for
from tests.cluster.cluster import FULLNAME, NAMESPACE, RELEASE, RESTART_KUBELET, TAGS, Release, kubectl, run
from tests.cluster.rollouts import DEADLINE, Rollouts

Mark = Callable[[str], None]


def test_the_chart_is_installed_and_a_prompt_is_answered_and_traced(release: Release) -> None:
    tested = run("helm", "test", RELEASE, "-n", NAMESPACE, "--logs", "--timeout", "120s", seconds=150)
    assert "/v1/chat/completions 200" in tested
    release.wait_for_trace()


def test_the_server_takes_all_that_the_chart_renders(release: Release) -> None:
    """What the cluster knows: not the kinds of the Prometheus operator and of Gateway API, and no priority of ours."""
    known = {"podMonitor.enabled=false", "httpRoute.enabled=false", "priorityClassName="}
    chosen = [part for value in sorted(known) for part in ("--set", value)]
    for example in ("production", "ingress", "openshift"):
        values = f"deploy/helm/llm-gateway/ci/{example}-values.yaml"
        version = json.loads(run("kubectl", "version", "-o", "json"))["serverVersion"]["gitVersion"]
        where = ("-n", NAMESPACE, "--kube-version", version)
        text = run("helm", "template", "dry", "deploy/helm/llm-gateway", *where, "-f", values, *chosen)
        kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", stdin=text)


async def test_a_new_image_and_back(release: Release, rollouts: Rollouts) -> None:
    def update(mark: Mark) -> None:
        release.upgrade("--set", f"image.tag={TAGS[1]}")
        mark("helm upgrade")
        release.rolled_out()
        assert release.image().endswith(TAGS[1])

    def undo(mark: Mark) -> None:
        kubectl("rollout", "undo", f"deployment/{FULLNAME}")
        mark("rollout undo")
        release.rolled_out()
        assert release.image().endswith(TAGS[0])

    before = release.names()
    await rollouts.play("A new image", "helm upgrade to another image of the gateway.", update)
    assert not before & release.names()
    await rollouts.play("Back to the old image", "kubectl rollout undo.", undo)


async def test_two_workers_and_back(release: Release, rollouts: Rollouts) -> None:
    def update(mark: Mark) -> None:
        release.upgrade("--set", "workers=2,resources.limits.memory=896Mi")
        mark("helm upgrade")
        release.rolled_out()
        for pod in release.names():
            assert release.health(pod)["workers"] == {"answered": 2, "missing": []}
        kubectl("rollout", "undo", f"deployment/{FULLNAME}")
        mark("rollout undo")
        release.rolled_out()

    await rollouts.play("Two workers", "helm upgrade to two workers for each pod, and kubectl rollout undo.", update)


async def test_pods_are_evicted_one_after_the_other(release: Release, rollouts: Rollouts) -> None:
    def evict(mark: Mark) -> None:
        first, second = sorted(release.names())
        assert release.evict(first) is None
        mark("first pod evicted")
        refusal = release.evict(second)
        assert refusal is not None
        assert "disruption budget" in refusal
        wait_for(lambda: len(release.names()) == 2, "a new pod is ready", 120, 0.5)
        wait_for(lambda: release.evict(second) is None, "the second pod is evicted", 60, 1)
        mark("second pod evicted")
        release.settled()

    await rollouts.play(
        "Eviction", "Both pods, as a drain of their nodes does; the budget allows one at a time.", evict
    )


async def test_two_pods_five_and_two_again(release: Release, rollouts: Rollouts) -> None:
    def scale(mark: Mark) -> None:
        for replicas in (5, 2):
            kubectl("scale", f"deployment/{FULLNAME}", f"--replicas={replicas}")
            mark(f"scale to {replicas}")
            release.settled(replicas)

    await rollouts.play("Two pods, five, two", "kubectl scale.", scale)


async def test_a_bad_image_stops_its_own_rollout(release: Release, rollouts: Rollouts) -> None:
    def break_it(mark: Mark) -> None:
        before = release.names()
        release.upgrade("--set", "image.tag=there-is-none,progressDeadlineSeconds=30")
        mark("a bad image")
        with pytest.raises(AssertionError, match="exceeded its progress deadline"):
            kubectl("rollout", "status", f"deployment/{FULLNAME}", "--timeout=120s", seconds=150)
        mark("the rollout stops")
        assert release.names() == before, "the pods that serve were left alone"
        kubectl("rollout", "undo", f"deployment/{FULLNAME}")
        mark("rollout undo")
        release.rolled_out()
        assert release.names() == before

    await rollouts.play("A bad image", "It cannot be pulled; the old pods go on, and rollout undo ends it.", break_it)


async def test_the_collector_is_gone(release: Release, rollouts: Rollouts) -> None:
    collector = f"deployment/{FULLNAME}-collector"

    def take_away(mark: Mark) -> None:
        kubectl("scale", collector, "--replicas=0")
        mark("collector gone")
        wait_for(lambda: not release.pods("collector"), "the collector has gone", 60, 0.5)
        wait_for(lambda: release.ask().status == 200, "a prompt is answered", 60)
        kubectl("scale", collector, "--replicas=1")
        kubectl("rollout", "status", collector, "--timeout=120s")
        mark("collector back")
        release.wait_for_trace()

    await rollouts.play("No collector", "It is scaled to nothing and back; traces come again.", take_away)


def restarts(pod: str) -> int:
    """How often a pod's container was started anew."""
    return int(kubectl("get", "pod", pod, "-o", "jsonpath={.status.containerStatuses[0].restartCount}"))


PROXIES = 10
"""Seconds in which the cluster's proxies learn what the kubelet has noticed, on a busy machine too."""
KILL = """
import os
for number in filter(str.isdigit, os.listdir("/proc")):
    if open(f"/proc/{number}/cmdline").read().split("\\0")[:3] == ["python", "-m", "gateway"]:
        os.kill(int(number), 9)
"""


@pytest.fixture
def killable(release: Release) -> Iterator[None]:
    """Gateways that are not the first process of their pod: the kernel spares that one."""

    def share(value: str) -> None:
        patch = f'{{"spec": {{"template": {{"spec": {{"shareProcessNamespace": {value}}}}}}}}}'
        kubectl("patch", f"deployment/{FULLNAME}", "-p", patch)
        release.rolled_out()

    share("true")
    yield
    share("null")


async def test_a_killed_gateway_costs_only_what_it_held(release: Release, rollouts: Rollouts, killable: None) -> None:
    """Nobody can give its streams an error event: they break, and none looks complete.

    Until the kubelet has noticed, some callers are still sent to it and refused; an SDK connects again.
    """
    held: list[int] = []
    moments: list[float] = []

    def kill(mark: Mark) -> None:
        victim = min(release.names())
        moments.append(now())
        held.append(release.health(victim)["in_flight"])
        with suppress(AssertionError):  # the shell may end with the gateway
            kubectl("exec", victim, "--", "python", "-c", KILL)
        moments.append(now())
        mark("gateway killed")
        wait_for(lambda: restarts(victim) == 1, "the kubelet has noticed", 60, 0.2)
        moments.append(now())
        mark("restarted")
        release.settled()

    def judge(calls: Sequence[Call]) -> list[Verdict]:
        failed = [call for call in calls if call.outcome != "ok"]
        broken = [call for call in failed if call.outcome != "refused"]
        refused = [call for call in failed if call.outcome == "refused"]
        asked, killed, noticed = moments
        late = [call for call in failed if not asked - DEADLINE < call.started < noticed + PROXIES]
        hidden = [call for call in broken if call.flaw is None or call.outcome == "hung"]
        limit = held[0] + len(sent_between(calls, asked - 0.5, killed))  # and who came from the question to the signal
        return [
            at_least("calls that break", len(broken), 1),
            at_most("calls that break: those that the gateway held", len(broken), limit),
            Verdict("others are only refused, until it has been noticed", f"{len(refused)}; later {late}", not late),
            Verdict("no broken call looks whole, none hangs", f"{hidden}", not hidden),
            Verdict("all others are answered", f"{len(good(calls))}", len(good(calls)) == len(calls) - len(failed) > 0),
        ]

    await rollouts.play("A killed gateway", "SIGKILL to one of two.", kill, judge)


ROUTES: dict[str, Any] = {
    "backends": {"mock-model": {"url": f"http://{FULLNAME}-mock-model:8001"}},
    "routes": [{"model": "*", "targets": [{"backend": "mock-model"}]}],
}
RENAMED = {"model": "renamed", "targets": [{"backend": "mock-model", "model": "demo-model"}]}


async def test_routes_change_without_a_restart(release: Release, rollouts: Rollouts) -> None:
    changed = ROUTES | {"routes": [RENAMED, *ROUTES["routes"]]}

    def change(mark: Mark) -> None:
        before = release.names()
        generations = {pod: release.health(pod)["config"]["generation"] for pod in before}

        def read_by(pod: str) -> bool:
            return bool(release.health(pod)["config"]["generation"] > generations[pod])

        release.upgrade("--set-json", f"config={json.dumps(changed)}")
        mark("helm upgrade")
        for pod in sorted(before):
            wait_for(partial(read_by, pod), f"{pod} has read it", 180, 1)
            mark("read")
        assert release.names() == before
        assert "renamed" in [model["id"] for model in release.models()]

    await rollouts.play("Other routes", "helm upgrade with another config: the ConfigMap changes.", change)


KEY = "a-made-up-key-of-the-load"


async def test_valkey_is_killed_and_comes_back(release: Release, rollouts: Rollouts) -> None:
    limits = {"requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000}
    config = ROUTES | {"keys": [{"name": "load", "key_env": "LOAD_KEY", "limits": limits}]}
    release.upgrade(
        *("--set-json", f"config={json.dumps(config)}", "--set", "valkey.enabled=true"),
        *("--set", f"secrets.create.LOAD_KEY={KEY}"),
    )
    release.rolled_out()
    valkey = f"statefulset/{FULLNAME}-valkey"
    kubectl("rollout", "status", valkey, "--timeout=120s")

    def all_say(status: str) -> bool:
        pods = release.names()
        return len(pods) == 2 and {release.health(pod)["limits"]["status"] for pod in pods} == {status}

    wait_for(lambda: all_say("ok"), "both gateways share limits", 60, 0.5)

    def kill(mark: Mark) -> None:
        kubectl("scale", valkey, "--replicas=0")
        kubectl("delete", "pod", f"{FULLNAME}-valkey-0", "--grace-period=0", "--force", "--ignore-not-found")
        mark("valkey killed")
        wait_for(lambda: all_say("degraded"), "both gateways have noticed", 60, 0.5)
        mark("both gateways have noticed")
        assert release.ask(KEY).status == 200
        kubectl("scale", valkey, "--replicas=1")
        kubectl("rollout", "status", valkey, "--timeout=120s")
        mark("valkey back")
        wait_for(lambda: all_say("ok"), "both share limits again", 60, 0.5)

    await rollouts.play("No Valkey", "It is killed and comes back empty.", kill, key=KEY)


async def test_the_kubelet_restarts(release: Release, rollouts: Rollouts) -> None:
    command = os.environ.get(RESTART_KUBELET)
    if not command:
        pytest.skip(f"{RESTART_KUBELET} names no command: the kubelet was not restarted")

    def starts() -> set[str]:
        """The events of a kubelet that starts, as the cluster has them."""
        chosen = "involvedObject.kind=Node,reason=Starting,source=kubelet"
        return set(run("kubectl", "get", "events", "-n", "default", "--field-selector", chosen, "-o", "name").split())

    def restart(mark: Mark) -> None:
        before, started = release.names(), starts()
        subprocess.run(shlex.split(command), check=True, timeout=200)  # noqa: S603
        wait_for(lambda: starts() - started, "the kubelet says that it starts", 60, 0.5)
        mark("kubelet restarted")
        kubectl("scale", f"deployment/{FULLNAME}", "--replicas=3")
        release.settled(3)
        mark("it has started a third pod")
        assert before < release.names()
        assert [restarts(pod) for pod in before] == [0, 0], "it has left the others alone"
        kubectl("scale", f"deployment/{FULLNAME}", "--replicas=2")
        release.settled()

    story = "Pods live on without it; then it starts a third one, and ends one of three."
    await rollouts.play("A restarted kubelet", story, restart)
