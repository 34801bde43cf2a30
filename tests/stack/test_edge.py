"""The proxies of deploy/proxy in front of two gateways: Caddy as in the profile `edge`, HAProxy beside it."""

import asyncio
import json
import ssl
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import aiohttp
import pytest
import trustme

from chaos.promises import Verdict, all_good, well_formed
from testkit import REPOSITORY
from testkit.completions import CHAT, CHAT_PATH
from testkit.load import now
from testkit.polling import wait_for
from testkit.ports import CONTAINERS, free_ports
from tests.chaos.verdict import keep
from tests.stack.engine import PATIENCE, PROJECT, Stack, docker
from tests.stack.load import load

DELAY = 5.0
"""Seconds in which a stopping gateway takes requests: more than the proxies need to notice, on a busy machine too."""
GATEWAYS = ("gateway", "gateway-b")
HAPROXY = f"{PROJECT}-haproxy"
AUTHORITY = "/tmp/data/caddy/pki/authorities/local/root.crt"  # noqa: S108 - the container's own
TIMED_OUT = 28
"""curl's exit code."""
SLOW = {"kind": "drip", "with": {"bytes": 100, "interval": 0.5}, "match": {"stream": True}}
"""A stream takes many seconds."""


@dataclass(frozen=True)
class Edge:
    """Where a proxy listens, and the file of the authority that signed its certificate."""

    url: str
    authority: Path
    reload: tuple[str, str, str]
    """Its container, the signal that has it read its configuration anew, and what it logs then."""

    def curl(self, *args: str) -> str:
        command = ["curl", "--silent", "--show-error", "--max-time", "10", "--cacert", str(self.authority), *args]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ready(self) -> bool:
        return self.curl("--output", "/dev/null", "--write-out", "%{http_code}", self.url + "/readyz") == "200"


@pytest.fixture(scope="module")
def edge_stack(built_stack: Stack) -> Iterator[Stack]:
    """The stack with a second gateway and Caddy."""
    with_edge = built_stack.with_profile("edge", GATEWAY_SHUTDOWN_DELAY=f"{DELAY:g}")
    with_edge.compose("up", "--wait", seconds=180)
    with_edge.steady()
    yield with_edge
    with_edge.compose("rm", "--stop", "--force", "edge", "gateway-b")
    built_stack.compose("up", "--wait", seconds=180)


@pytest.fixture(scope="module")
def caddy(edge_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Edge:
    authority = tmp_path_factory.mktemp("caddy") / "root.crt"
    authority.write_text(
        wait_for(lambda: edge_stack.compose("exec", "-T", "edge", "cat", AUTHORITY), "a root", PATIENCE)
    )
    reload = (edge_stack.inspect("edge")["Id"], "USR1", "successfully reloaded config from file")
    return Edge(f"https://localhost:{edge_stack.env['EDGE_PORT']}", authority, reload)


@pytest.fixture(scope="module")
def haproxy(edge_stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    folder = tmp_path_factory.mktemp("haproxy")
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate.private_key_and_cert_chain_pem.write_to_path(folder / "localhost.pem")
    for part in (folder.parent, folder):
        part.chmod(0o755)  # another uid reads it
    (folder / "localhost.pem").chmod(0o644)
    (port,) = free_ports(1, CONTAINERS)
    etc = "/usr/local/etc/haproxy"
    docker(
        *("run", "--detach", "--name", HAPROXY, "--network", f"{PROJECT}_outside"),
        *("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges:true", "--memory=256m"),
        *(
            "--publish",
            f"127.0.0.1:{port}:8443",
            "--env",
            "GATEWAY_A=gateway:8000",
            "--env",
            "GATEWAY_B=gateway-b:8000",
        ),
        *("--volume", f"{REPOSITORY}/deploy/proxy/haproxy.cfg:{etc}/haproxy.cfg:ro"),
        *("--volume", f"{folder}/localhost.pem:{etc}/certs/localhost.pem:ro"),
        "haproxy:3.2",
    )
    try:
        yield Edge(f"https://localhost:{port}", folder / "ca.pem", (HAPROXY, "USR2", "Loading success"))
    finally:
        print(docker("logs", "--tail=20", HAPROXY, complaints=True))  # noqa: T201
        docker("rm", "--force", "--volumes", HAPROXY)


@pytest.fixture(params=["caddy", "haproxy"])
def edge(edge_stack: Stack, request: pytest.FixtureRequest) -> Edge:
    proxy: Edge = request.getfixturevalue(request.param)
    edge_stack.steady()
    wait_for(proxy.ready, "the proxy answers", PATIENCE)
    return proxy


def test_callers_get_tls_and_http_2_and_no_metrics(edge: Edge) -> None:
    def seen(path: str) -> str:
        told = "%{http_version} %{http_code} %{ssl_verify_result}"
        return edge.curl("--http2", "--output", "/dev/null", "--write-out", told, edge.url + path)

    assert seen("/readyz") == "2 200 0"
    assert seen("/metrics") == "2 404 0"


async def test_an_event_goes_on_as_it_comes(edge_stack: Stack, edge: Edge) -> None:
    edge_stack.script(SLOW)
    context = ssl.create_default_context(cafile=edge.authority)
    async with (
        aiohttp.ClientSession() as session,
        session.post(edge.url + CHAT_PATH, json=CHAT | {"stream": True}, ssl=context) as response,
    ):
        assert response.status == 200
        assert await response.content.readany()
        (call,) = (await asyncio.to_thread(edge_stack.control, "GET", "/journal")).json["calls"]
        assert call["ended"] is None, "the first event was held until the stream had ended"
        response.close()

    def left() -> bool:
        (call,) = edge_stack.control("GET", "/journal").json["calls"]
        return bool(call["ended"] == "caller_left")

    await asyncio.to_thread(wait_for, left, "the model hears that the caller has left", PATIENCE)


@pytest.mark.parametrize("version", ["--http1.1", "--http2"])
def test_the_model_hears_of_a_caller_who_leaves_before_the_answer(edge_stack: Stack, edge: Edge, version: str) -> None:
    edge_stack.script({"kind": "drip", "with": {"bytes": 2, "interval": 0.5}})
    leaving = ("--silent", "--max-time", "4", "--cacert", str(edge.authority), version)
    prompt = ("--header", "content-type: application/json", "--data", json.dumps(CHAT), edge.url + CHAT_PATH)
    left = subprocess.run(["curl", *leaving, *prompt], capture_output=True, timeout=20, check=False)  # noqa: S603, S607
    assert left.returncode == TIMED_OUT, left.stderr

    def heard() -> bool:
        (call,) = edge_stack.control("GET", "/journal").json["calls"]
        return bool(call["ended"] == "caller_left")

    wait_for(heard, "the model hears that the caller has left", PATIENCE)


def test_a_prompt_is_not_sent_again_by_the_proxy(edge_stack: Stack, edge: Edge) -> None:
    edge_stack.script({"kind": "status", "with": {"status": 503}})
    answer = edge.curl(
        *("--dump-header", "-", "--output", "/dev/null", "--header", "content-type: application/json"),
        *("--data", json.dumps(CHAT), edge.url + CHAT_PATH),
    )
    headers = dict(line.lower().split(": ", 1) for line in answer.splitlines() if ": " in line)
    assert int(headers["x-gateway-attempts"]) >= 1
    assert edge_stack.control("GET", "/journal").json["total"] == int(headers["x-gateway-attempts"])


@pytest.mark.timeout(300, func_only=True)
@pytest.mark.parametrize("keep_alive", [False, True], ids=["new connections", "kept connections"])
async def test_both_gateways_are_replaced_under_open_streams_and_nobody_notices(
    edge_stack: Stack, edge: Edge, *, keep_alive: bool
) -> None:
    """Each by `docker compose up --force-recreate`; callers do not retry."""
    edge_stack.script({"kind": "drip", "with": {"bytes": 200, "interval": 0.1}, "match": {"stream": True}})
    to = {"urls": [edge.url], "authority": str(edge.authority), "pids": [], "keep_alive": keep_alive}
    before = {service: edge_stack.inspect(service)["Id"] for service in GATEWAYS}
    async with load(edge_stack, 8, 60, **to) as calling:
        await calling.until(lambda calls: len(calls) >= 10, 60)
        for service in GATEWAYS:
            recreate = ("up", "--detach", "--no-deps", "--force-recreate", "--wait", service)
            await asyncio.to_thread(edge_stack.compose, *recreate)
        sent = len(calling.calls)
        await calling.until(lambda calls: len(calls) >= sent + 20, 60)
    after = {service: edge_stack.inspect(service)["Id"] for service in GATEWAYS}
    assert not set(before.values()) & set(after.values())
    streams = [call for call in calling.calls if call.kind == "stream" and call.events]
    keep(
        calling.calls,
        all_good(calling.calls, "callers of the proxy"),
        well_formed(calling.calls),
        Verdict("streams were open", f"{len(streams)}", len(streams) > 20),
    )


@pytest.mark.timeout(300, func_only=True)
async def test_a_killed_gateway_costs_only_what_it_held(edge_stack: Stack, edge: Edge) -> None:
    """Whoever calls after it is answered by the other one, before a check has failed too."""
    plan = {"urls": [edge.url], "authority": str(edge.authority), "pids": [], "kinds": ("answer",)}
    try:
        async with load(edge_stack, 40, 60, **plan) as calling:
            await calling.until(lambda calls: len(calls) >= 40, 60)
            await asyncio.to_thread(docker, "kill", edge_stack.inspect("gateway")["Id"])
            died = datetime.fromisoformat(edge_stack.inspect("gateway")["State"]["FinishedAt"]).timestamp()
            killed = now() - (time.time() - died)
            await calling.until(lambda calls: len([call for call in calls if call.started > killed]) >= 200, 60)
    finally:
        await asyncio.to_thread(edge_stack.compose, "up", "--detach", "--no-deps", "--wait", "gateway")
    later = [call for call in calling.calls if call.started > killed]
    keep(later, all_good(later, "who called after it"))


@pytest.mark.timeout(300, func_only=True)
async def test_a_proxy_reads_its_configuration_anew_under_open_streams(edge_stack: Stack, edge: Edge) -> None:
    """On new connections: one that is idle is closed, whatever is just being sent on it."""
    edge_stack.script({"kind": "drip", "with": {"bytes": 200, "interval": 0.1}, "match": {"stream": True}})
    container, signal, told = edge.reload
    plan = {"urls": [edge.url], "authority": str(edge.authority), "pids": []}
    async with load(edge_stack, 8, 60, **plan) as calling:
        await calling.until(lambda calls: len(calls) >= 10, 60)
        before = docker("logs", container, complaints=True).count(told)
        await asyncio.to_thread(docker, "kill", "--signal", signal, container)

        def read_anew() -> bool:
            return docker("logs", container, complaints=True).count(told) > before

        await asyncio.to_thread(wait_for, read_anew, "the proxy says so", PATIENCE)
        sent = len(calling.calls)
        await calling.until(lambda calls: len(calls) >= sent + 20, 60)
    keep(calling.calls, all_good(calling.calls, "callers of the proxy"), well_formed(calling.calls))
