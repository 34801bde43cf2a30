"""What operators do to a cluster, and what happens to it, under a steady load: nobody notices what is planned."""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence

import pytest

from chaos.promises import Verdict, at_most
from testkit.load import Call, good, now
from testkit.polling import wait_for
from tests.cluster.cluster import FULLNAME, NAMESPACE, RELEASE, RESTART_KUBELET, TAGS, Release, kubectl, run
from tests.cluster.rollouts import Rollouts

Mark = Callable[[str], None]


def test_the_chart_is_installed_and_a_prompt_is_answered_and_traced(release: Release) -> None:
    tested = run("helm", "test", RELEASE, "-n", NAMESPACE, "--logs", "--timeout", "120s", seconds=150)
    assert "/v1/chat/completions 200" in tested
    release.wait_for_trace()


def test_the_server_takes_all_that_the_chart_renders(release: Release) -> None:
    """What the cluster knows: not the kinds of the Prometheus operator and of Gateway API."""
    known = {"podMonitor.enabled=false", "httpRoute.enabled=false"}
    chosen = [part for value in sorted(known) for part in ("--set", value)]
    for example in ("production", "ingress"):
        values = f"deploy/helm/llm-gateway/ci/{example}-values.yaml"
        text = run("helm", "template", "dry", "deploy/helm/llm-gateway", "-n", NAMESPACE, "-f", values, *chosen)
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
        release.upgrade("--set", "image.tag=there-is-none")
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
        wait_for(lambda: release.ask().status == 200, "a prompt is answered", 10)
        kubectl("scale", collector, "--replicas=1")
        kubectl("rollout", "status", collector, "--timeout=120s")
        mark("collector back")
        release.wait_for_trace()

    await rollouts.play("No collector", "It is scaled to nothing and back; traces come again.", take_away)


async def test_a_killed_pod_costs_only_what_it_held(release: Release, rollouts: Rollouts) -> None:
    held: list[int] = []
    moment: list[float] = []

    def kill(mark: Mark) -> None:
        victim = min(release.names())
        held.append(in_flight(victim))
        moment.append(now())
        kubectl("delete", "pod", victim, "--grace-period=0", "--force")
        mark("pod killed")
        release.settled()

    def judge(calls: Sequence[Call]) -> list[Verdict]:
        failed = [call for call in calls if call.outcome != "ok"]
        later = [call for call in failed if call.started > moment[0] + 1]
        wrong = [call for call in failed if call.outcome == "hung" or "wrong text" in (call.flaw or "")]
        return [
            at_most("calls that fail: what the pod held when it was killed,", len(failed), held[0] + 3),
            Verdict("none of those that came later", f"{[call.outcome for call in later]}", not later),
            Verdict("no call hangs, none gets a wrong text", f"{[call.id for call in wrong]}", not wrong),
            Verdict("others were answered", f"{len(good(calls))}", len(good(calls)) > len(failed)),
        ]

    await rollouts.play("A killed pod", "kubectl delete --force --grace-period=0.", kill, judge)


def in_flight(pod: str) -> int:
    """How many requests a pod holds, as it says itself."""
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}:8000/proxy/health"
    return int(json.loads(kubectl("get", "--raw", path))["in_flight"])


async def test_the_kubelet_restarts(release: Release, rollouts: Rollouts) -> None:
    command = os.environ.get(RESTART_KUBELET)
    if not command:
        pytest.skip(f"{RESTART_KUBELET} names no command: the kubelet was not restarted")

    def restart(mark: Mark) -> None:
        before = release.names()
        subprocess.run(shlex.split(command), check=True, timeout=200)  # noqa: S603
        mark("kubelet restarted")
        wait_for(lambda: release.names() == before, "the same pods are ready", 120, 0.5)

    await rollouts.play("A restarted kubelet", "Pods live on without it.", restart)
