"""Each container as seen from inside, and its limits under load."""

import asyncio
import json
from typing import Any

import pytest

from chaos.promises import all_good, in_time, well_formed
from tests.chaos.verdict import keep
from tests.stack.engine import PROJECT, SERVICES, Stack, docker
from tests.stack.load import load

WITH_A_SHELL = ("jaeger", "otel-collector-health")
WITH_PYTHON = ("gateway", "mock-model")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@pytest.mark.parametrize("service", WITH_PYTHON)
def test_a_service_of_ours_can_write_nowhere_and_is_nobody(stack: Stack, service: str) -> None:
    look = """
import json, os
def writable(path):
    try:
        open(path + "/probe", "w").close()
    except OSError as error:
        return error.strerror
    os.remove(path + "/probe")
    return "writable"
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines())
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "first": status["Uid"].split()[0],
    "effective": status["CapEff"], "bounding": status["CapBnd"], "no_new_privileges": status["NoNewPrivs"],
    "paths": {path: writable(path) for path in ("/", "/app", "/opt/venv", "/etc", "/tmp")},
}))
"""
    seen = json.loads(stack.compose("exec", "-T", service, "python", "-c", look))
    assert (seen["uid"], seen["gid"], seen["first"]) == (10001, 10001, "10001")
    assert int(seen["effective"], 16) == int(seen["bounding"], 16) == 0
    assert seen["no_new_privileges"] == "1"
    assert seen["paths"].pop("/tmp") == "writable"  # noqa: S108  the container's own
    assert set(seen["paths"].values()) == {"Read-only file system"}


@pytest.mark.parametrize("service", WITH_A_SHELL)
def test_a_service_of_others_can_write_nowhere_and_is_nobody(stack: Stack, service: str) -> None:
    look = (
        "grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs)' /proc/1/status; touch /probe || touch /etc/probe || echo read-only"
    )
    seen = stack.compose("exec", "-T", service, "sh", "-c", f"{{ {look}; }} 2>&1")
    lines = dict(line.split(":\t", 1) for line in seen.splitlines() if ":\t" in line)
    assert lines["Uid"].split()[0] == "10001"
    assert int(lines["CapEff"], 16) == int(lines["CapBnd"], 16) == 0
    assert lines["NoNewPrivs"] == "1"
    assert seen.splitlines()[-1] == "read-only"
    assert seen.count("Read-only file system") == 2


@pytest.mark.parametrize("service", sorted(SERVICES))
def test_a_container_has_its_limits(stack: Stack, service: str) -> None:
    """The collector's image has no shell: the engine answers for it."""
    container = stack.inspect(service)
    host = container["HostConfig"]
    assert container["Config"]["User"] == "10001:10001"
    assert host["ReadonlyRootfs"] is True
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] > 0
    assert host["NanoCpus"] > 0
    assert host["PidsLimit"] > 0
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}


def test_the_gateway_has_longer_to_stop_than_it_takes_to_drain(stack: Stack) -> None:
    config = stack.inspect("gateway")["Config"]
    variables = dict(variable.partition("=")[::2] for variable in config["Env"])
    assert config["StopTimeout"] >= float(variables["GATEWAY_SHUTDOWN_GRACE"]) + 5


def test_what_is_inside_has_no_way_out(stack: Stack) -> None:
    """The collector is on the internal network alone, which has no route to the world."""
    assert list(stack.inspect("otel-collector")["NetworkSettings"]["Networks"]) == [f"{PROJECT}_inside"]
    assert json.loads(docker("network", "inspect", f"{PROJECT}_inside"))[0]["Internal"] is True


def memory(project: str) -> dict[str, tuple[float, float]]:
    """Bytes in use and the limit, by container."""

    def size(text: str) -> float:
        unit = next(unit for unit in ("KiB", "MiB", "GiB", "B") if text.endswith(unit))
        return float(text.removesuffix(unit)) * UNITS[unit]

    ids = docker("ps", "--quiet", "--filter", f"label=com.docker.compose.project={project}").split()
    used: dict[str, tuple[float, float]] = {}
    for line in docker("stats", "--no-stream", "--format", "{{json .}}", *ids).splitlines():
        row: dict[str, Any] = json.loads(line)
        now, limit = row["MemUsage"].split(" / ")
        used[row["Name"]] = size(now), size(limit)
    return used


@pytest.mark.timeout(150, func_only=True)
async def test_memory_stays_under_its_limit_in_a_load_of_a_minute(stack: Stack) -> None:
    highest: dict[str, float] = {}
    async with load(stack, 40) as calling:
        loop = asyncio.get_running_loop()
        end = loop.time() + 60
        while loop.time() < end:
            for name, (now, limit) in (await asyncio.to_thread(memory, PROJECT)).items():
                highest[name] = max(highest.get(name, 0), now / limit)
            await asyncio.sleep(2)
    assert len(highest) >= 5
    assert max(highest.values()) < 0.8, highest
    keep(calling.calls, in_time(calling.calls), well_formed(calling.calls), all_good(calling.calls))
    for service in SERVICES:
        state = stack.inspect(service)["State"]
        assert (state["Status"], state["OOMKilled"]) == ("running", False), service
