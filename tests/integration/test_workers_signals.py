"""Workers and their parent are killed, stopped, told to stop and to read anew, at any time: the others serve on."""

import asyncio
import json
import os
import signal
import sys
from io import BytesIO
from pathlib import Path

import aiohttp
import pytest

from mock_model.serve import MockModel
from mock_model.settings import Settings as MockSettings
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import ask
from testkit.polling import until
from testkit.ports import free_port
from testkit.process_table import children_of, lives
from tests.integration.processes import PATIENCE, Program, running
from tests.integration.workers import (
    BOTH,
    LOCAL,
    beside_a_stopped_one,
    chat,
    metrics_of,
    of_one_that_runs,
    once_whole,
    streams_under_way,
    two_workers,
    until_both,
    until_workers,
    workers_of,
)

ROUTES = 'backends: {{a: {{url: "{url}"}}}}\nroutes: [{{model: "{model}", targets: [{{backend: a}}]}}]\n'


async def successor(gateway: Program, pids: list[int]) -> int:
    """The process id of the worker that takes the place of one that has died, as soon as there is one."""
    found: list[int] = []

    def is_there() -> bool:
        found[:] = [pid for pid in workers_of(gateway) if pid not in pids]
        return bool(found)

    await until(is_there, "another worker is started", seconds=PATIENCE)
    return found[0]


async def test_a_worker_that_dies_beside_a_wrong_configuration_does_not_end_the_others(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        right = ROUTES.format(url=model.url, model="*")
        file.write_text(right)
        async with two_workers(model, GATEWAY_CONFIG=str(file)) as (gateway, url):
            file.write_text("routes: [")
            os.kill(workers_of(gateway)[0], signal.SIGKILL)
            await until(lambda: "gateway: GATEWAY_CONFIG" in gateway.errors.read_text(), "it fails", seconds=PATIENCE)
            await until_place_is_closed(url)
            assert [await chat(url) for _ in range(6)] == [200] * 6
            document = await until_workers(gateway, url, {"answered": 1, "missing": [1]})
            assert document["status"] == "degraded"
            file.write_text(right)
            await until_both(gateway, url)
            gateway.signal(signal.SIGTERM)
            code, _, errors = await gateway.end()
    assert (code, errors.count("a new one is started")) == (0, 1)


async def until_place_is_closed(url: str) -> None:
    """Wait until no connection goes to a worker that is not there."""
    timeout = aiohttp.ClientTimeout(total=3)

    async def served() -> bool:
        try:
            async with aiohttp.request("GET", f"{url}/livez", timeout=timeout) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async with asyncio.timeout(PATIENCE):
        while not all(await asyncio.gather(*(served() for _ in range(16)))):
            pass


async def test_a_configuration_that_is_wrong_ends_a_gateway_of_which_nobody_serves(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        file.write_text(ROUTES.format(url=model.url, model="*"))
        async with two_workers(model, GATEWAY_CONFIG=str(file)) as (gateway, _):
            file.write_text("routes: [")
            for pid in workers_of(gateway):
                os.kill(pid, signal.SIGKILL)
            code, _, errors = await gateway.end()
    assert code == 2
    assert "GATEWAY_CONFIG" in errors


async def test_a_worker_that_starts_does_not_die_of_sighup_and_has_the_new_configuration(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        file.write_text(ROUTES.format(url=model.url, model="old"))
        async with two_workers(model, GATEWAY_CONFIG=str(file)) as (gateway, url):
            pids = workers_of(gateway)
            os.kill(pids[0], signal.SIGKILL)
            new = await successor(gateway, pids)
            file.write_text(ROUTES.format(url=model.url, model="new"))
            for _ in range(5):
                gateway.signal(signal.SIGHUP)
                await asyncio.sleep(0.01)
            await until_both(gateway, url)
            assert new in workers_of(gateway)
            assert (await metrics_of(url)).value("gateway_worker_deaths_total") == 1
            async with asyncio.timeout(PATIENCE):
                while await models(url) != {"new"}:
                    pass


async def models(url: str) -> set[str]:
    """Those that several new connections, to one worker or another, are told."""
    found = set()
    for _ in range(8):
        async with aiohttp.request("GET", f"{url}/v1/models") as answer:
            found |= {each["id"] for each in (await answer.json())["data"]}
    return found


async def test_a_stop_is_clean_also_while_a_worker_starts(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, _):
        pids = workers_of(gateway)
        os.kill(pids[0], signal.SIGKILL)
        await successor(gateway, pids)
        gateway.signal(signal.SIGTERM)
        code, _, errors = await gateway.end()
    assert code == 0, errors
    assert "cannot listen" not in errors


async def test_a_worker_that_is_told_to_stop_alone_refuses_nobody_and_ends_its_streams() -> None:
    mock = MockSettings(port=0, control_port=0, mock_token_interval=0.2)
    async with MockModel(mock) as model, two_workers(model) as (gateway, url):
        streams = await streams_under_way(model, url, 8)
        for pid in workers_of(gateway)[:1]:
            os.kill(pid, signal.SIGTERM)
        await until(lambda: "stopping: " in gateway.errors.read_text(), "it stops", seconds=PATIENCE)
        assert await asyncio.gather(*(chat(url) for _ in range(20))) == [200] * 20
        assert await asyncio.gather(*streams) == [True] * 8
        await until_both(gateway, url)


BESIDE = """
import ctypes, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
subprocess.run(sys.argv[1:])
signal.pause()
"""
"""Runs a program, and is the one to which its orphans are left, in its session, as the first of a container is."""


@pytest.mark.parametrize("left_to", ["another session", "its session"])
async def test_a_stopped_worker_ends_with_its_parent_and_the_port_is_free_again(left_to: str, tmp_path: Path) -> None:
    """Stopped groups that are left to another session are sent SIGCONT by the system itself, unless it comes first."""
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        port = free_port()
        local = LOCAL | {"PORT": str(port), "GATEWAY_BACKEND_URLS": model.url}
        gateway = Program("gateway", local, tmp_path)
        if left_to == "its session":
            gateway.command = [sys.executable, "-c", BESIDE, *gateway.command]
        await gateway.start(wait=False)
        try:
            await until_both(gateway, f"http://127.0.0.1:{port}")
            parent = gateway.pid if left_to == "another session" else children_of(gateway.pid)[0]
            pids = children_of(parent)
            os.kill(pids[0], signal.SIGSTOP)
            os.kill(parent, signal.SIGKILL)
            try:
                await until(lambda: not any(map(lives, pids)), "both have ended", seconds=PATIENCE)
            finally:
                for pid in filter(lives, pids):
                    os.kill(pid, signal.SIGKILL)
            async with running(**local) as next_one:
                await next_one.up()
        finally:
            await gateway.kill()


async def test_workers_that_start_end_with_their_parent_and_say_nothing_of_it() -> None:
    async with running(**LOCAL) as gateway:
        pids: list[int] = []

        def start() -> bool:
            pids[:] = workers_of(gateway)
            return len(pids) == 2

        await until(start, "both have begun", seconds=PATIENCE)
        await gateway.kill()
        await until(lambda: not any(map(lives, pids)), "both have ended", seconds=PATIENCE)
        assert "Traceback" not in gateway.errors.read_text()


async def test_a_gateway_whose_parent_was_killed_can_be_started_anew_while_its_streams_end() -> None:
    mock = MockSettings(port=0, control_port=0, mock_token_interval=0.3)
    async with MockModel(mock) as model, two_workers(model, GATEWAY_SHUTDOWN_GRACE="60") as (gateway, url):
        streams = await streams_under_way(model, url, 4)
        await gateway.kill()
        port = int(url.rsplit(":", 1)[1])
        async with asyncio.timeout(PATIENCE):
            while not await is_refused(port):
                pass
        assert not any(stream.done() for stream in streams)
        async with running(**(LOCAL | {"PORT": str(port)})) as next_one:
            await next_one.up()
            assert await asyncio.gather(*streams) == [True] * 4


async def is_refused(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except ConnectionError:
        return True
    writer.close()
    return False


async def test_a_parent_that_does_not_answer_is_no_reason_to_show_less_than_was_counted() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, url):
        assert await asyncio.gather(*(chat(url) for _ in range(10))) == [200] * 10
        gateway.freeze()
        try:
            answer = await ask(f"{url}/metrics", seconds=PATIENCE)
            assert (answer.status, answer.body) == (503, b"The workers' parent process does not answer. Ask again.\n")
            assert await chat(url) == 200
            alone = {"answered": 1, "missing": None}
            health, listed = [(await ask(f"{url}{path}", seconds=PATIENCE)).json for path in ("/health", "/requests")]
            assert (health["status"], health["workers"], listed["workers"]) == ("degraded", alone, alone)
            refusal = await ask(f"{url}/requests/none", seconds=PATIENCE)
            assert (refusal.status, "Not all workers answered" in refusal.error["message"]) == (404, True)
        finally:
            gateway.thaw()
        assert (await metrics_of(url)).value("gateway_requests_total", route=CHAT_PATH) == 11


async def test_a_worker_that_does_not_answer_is_named_where_its_requests_are_missing() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, url):
        assert await chat(url) == 200
        listed = await once_whole(
            lambda: ask(f"{url}/requests", seconds=PATIENCE), lambda answer: answer.json.get("kept") == 1
        )
        assert listed.json["workers"] == BOTH["workers"]
        silent = workers_of(gateway)[0]
        os.kill(silent, signal.SIGSTOP)
        try:
            listed = await beside_a_stopped_one(f"{url}/requests")
            assert listed.json["workers"] in ({"answered": 1, "missing": [1]}, {"answered": 1, "missing": [2]})
            refusal = await of_one_that_runs(f"{url}/requests/none")
            assert (refusal.status, "Not all workers answered" in refusal.error["message"]) == (404, True)
        finally:
            os.kill(silent, signal.SIGCONT)


def descriptors_of(gateway: Program) -> int:
    return len(list(Path(f"/proc/{gateway.pid}/fd").iterdir()))


async def test_nothing_stays_open_at_the_parent_of_workers_that_have_died() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, url):
        before = descriptors_of(gateway)
        pids = workers_of(gateway)
        for _ in range(6):  # after each the next one begins later: twelve would take most of a test's minute
            os.kill(pids[0], signal.SIGKILL)
            pids = [await successor(gateway, pids), *(pid for pid in workers_of(gateway) if pid in pids[1:])]
        await until_both(gateway, url)
        await until(lambda: descriptors_of(gateway) == before, "nothing more is open than before")
        told = gateway.errors.read_text()
    assert told.count("worker 1 ended with code 137; a new one is started") == 6


FIRST = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"
"""Makes a program the one to which what its descendants leave behind is left, as the first of a container is."""


async def test_what_a_dead_worker_leaves_behind_is_buried(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        port = free_port()
        gateway = Program("gateway", LOCAL | {"PORT": str(port), "GATEWAY_BACKEND_URLS": model.url}, tmp_path)
        gateway.command = [sys.executable, "-c", FIRST, *gateway.command]
        await gateway.start(wait=False)
        try:
            url = f"http://127.0.0.1:{port}"
            await until_both(gateway, url)
            large = CHAT | {"messages": [{"role": "user", "content": "x"}] * 200_000}
            body, headers = BytesIO(json.dumps(large).encode()), {"content-type": "application/json"}
            async with aiohttp.request("POST", url + CHAT_PATH, data=body, headers=headers) as answer:
                await answer.read()
            left = {child: pid for pid in workers_of(gateway) for child in children_of(pid)}
            assert left, "a process for what is very large"
            for pid in left.values():
                os.kill(pid, signal.SIGKILL)
            await until(lambda: not any(map(is_known, left)), "they are gone", seconds=PATIENCE)
            await until_both(gateway, url)
        finally:
            await gateway.kill()


def is_known(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_of_two_gateways_that_start_on_one_port_at_once_one_says_that_it_is_taken(workers: str) -> None:
    local = LOCAL | {"PORT": str(free_port())}
    async with running(**local) as first, running(**(local | {"GATEWAY_WORKERS": workers})) as second:
        ends = [asyncio.create_task(each.end()) for each in (first, second)]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for program, end in zip((first, second), ends, strict=True):
            if not end.done():
                await program.up()
                program.signal(signal.SIGTERM)
        codes = sorted([(code, errors.count("cannot listen")) for code, _, errors in await asyncio.gather(*ends)])
    assert codes == [(0, 0), (1, 1)]
