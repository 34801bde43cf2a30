"""What is done to a stack that runs already, and that it is left as it was found."""

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chaos.experiment import Step
from chaos.stages import ComposeStage, RemoteStage, published, running
from testkit.processes import ProcessError

FOUND = [{"kind": "html", "match": {"model": "other"}, "used": 3}]
DOCKER = """#!/bin/sh
echo "$*" >> {log}
case "$*" in
  *" port gateway 8000") echo 127.0.0.1:18000 ;;
  *" ps "*) printf 'gateway\\nmock-model\\n' ;;
  *" pause mock-model-b") echo one >&2; echo 'no such service: mock-model-b' >&2; exit 1 ;;
esac
"""
RESET = Step("faults", faults=({"kind": "reset"},))


class Control:
    """The control port of a mock model: `script` is what is in place, `put` how often one was put."""

    def __init__(self) -> None:
        self.script: Any = FOUND
        self.put = 0
        self.crashes = 0
        self.refuses = 0

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/faults", self._get)
        app.router.add_put("/faults", self._put)
        app.router.add_post("/crash", self._crash)
        return app

    async def _get(self, request: web.Request) -> web.Response:
        return self._refuse(request) or web.json_response(self.script)

    async def _put(self, request: web.Request) -> web.Response:
        if refused := self._refuse(request):
            return refused
        self.script, self.put = await request.json(), self.put + 1
        return web.json_response(self.script)

    def _refuse(self, request: web.Request) -> web.Response | None:
        if not self.refuses:
            return None
        self.refuses -= 1
        if request.transport is not None:
            request.transport.abort()
        return web.Response()

    async def _crash(self, _request: web.Request) -> web.Response:
        self.crashes += 1
        return web.json_response({}, status=202)


@pytest.fixture
def control() -> Control:
    return Control()


@pytest.fixture
async def url(control: Control, aiohttp_server: Callable[..., Awaitable[TestServer]]) -> str:
    server = await aiohttp_server(control.app())
    return str(server.make_url("/")).rstrip("/")


@pytest.fixture
def docker_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker command that writes down how it was called."""
    log, program = tmp_path / "docker.log", tmp_path / "bin" / "docker"
    program.parent.mkdir()
    program.write_text(DOCKER.format(log=log), encoding="utf-8")
    program.chmod(0o755)
    log.touch()
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    return log


def calls(log: Path) -> list[str]:
    return [line.removeprefix("compose --profile * ") for line in log.read_text(encoding="utf-8").splitlines()]


async def test_the_script_that_was_found_is_put_back(control: Control, url: str) -> None:
    async with aiohttp.ClientSession() as session:
        stage = RemoteStage("http://127.0.0.1:9/", [url + "/"], session, "key")
        await stage.begin()
        await stage.do(RESET)
        assert control.script == [{"kind": "reset"}]
        await stage.do(Step("heal"))
        assert control.script == []
        await stage.end()

    assert control.script == FOUND
    assert (stage.url, stage.key) == ("http://127.0.0.1:9", "key")


async def test_a_script_that_nobody_touched_is_left_alone(control: Control, url: str) -> None:
    async with aiohttp.ClientSession() as session:
        stage = RemoteStage("http://127.0.0.1:9", [url], session, None)
        await stage.begin()
        await stage.end()

    assert control.put == 0


async def test_a_mock_model_that_is_still_starting_gets_its_script_back(control: Control, url: str) -> None:
    async with aiohttp.ClientSession() as session:
        stage = RemoteStage("http://127.0.0.1:9", [url], session, None)
        await stage.begin()
        await stage.do(RESET)
        control.refuses = 2
        await stage.end()

    assert control.script == FOUND


async def test_a_mock_model_that_was_started_is_waited_for_at_its_control_port(control: Control, url: str) -> None:
    async with aiohttp.ClientSession() as session:
        stage = ComposeStage("http://127.0.0.1:9", [url], session, None)
        control.refuses = 3
        await stage.revived(1)
        assert control.refuses == 0
        await stage.revived(2)  # its control port is not known


async def test_a_mock_model_that_never_answers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chaos.stages.REVIVAL_SECONDS", 0.3)
    async with aiohttp.ClientSession() as session:
        stage = ComposeStage("http://127.0.0.1:9", ["http://127.0.0.1:9"], session, None)
        with pytest.raises(ProcessError, match=r"the mock model at http://127\.0\.0\.1:9 does not answer: "):
            await stage.revived(1)


async def test_a_control_port_of_something_else_is_told(aiohttp_server: Callable[..., Awaitable[TestServer]]) -> None:
    server = await aiohttp_server(web.Application())
    async with aiohttp.ClientSession() as session:
        stage = RemoteStage("http://127.0.0.1:9", [str(server.make_url("/"))], session, None)
        with pytest.raises(ProcessError, match=r"GET http://127\.0\.0\.1:\d+/faults: 404"):
            await stage.begin()


async def test_containers_are_killed_frozen_and_stopped(control: Control, url: str, docker_log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        stage = ComposeStage("http://127.0.0.1:9", [url], session, None)
        await stage.begin()
        for do in ("kill", "start", "freeze", "thaw", "thaw", "stop-gateway", "crash"):
            await stage.do(Step(do))
        await stage.do(RESET)
        assert control.script == [{"kind": "reset"}]

    assert calls(docker_log) == [
        "kill mock-model",
        "start mock-model",
        "pause mock-model",
        "unpause mock-model",
        "stop gateway",
        "start gateway",
    ]
    assert control.crashes == 1


async def test_containers_are_left_as_they_were_found(control: Control, url: str, docker_log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        stage = ComposeStage("http://127.0.0.1:9", [url], session, None)
        await stage.begin()
        await stage.do(Step("freeze"))
        await stage.do(Step("kill", mock=2))
        before = len(calls(docker_log))
        await stage.end()
        await stage.end()

    assert calls(docker_log)[before:] == ["unpause mock-model", "start mock-model-b"]
    assert control.script == FOUND


async def test_what_compose_refuses_is_told_by_its_last_line(url: str, docker_log: Path) -> None:
    async with aiohttp.ClientSession() as session:
        stage = ComposeStage("http://127.0.0.1:9", [url], session, None)
        await stage.begin()
        with pytest.raises(ProcessError, match="docker compose pause mock-model-b: no such service: mock-model-b"):
            await stage.do(Step("freeze", mock=2))


async def test_published_ports_and_running_services_are_asked_for(docker_log: Path) -> None:
    assert await published("gateway", 8000) == "http://127.0.0.1:18000"
    with pytest.raises(ProcessError, match="docker compose port otel-collector 1: it is not published"):
        await published("otel-collector", 1)
    assert await running(["mock-model", "mock-model-b"]) == ["mock-model"]


async def test_without_docker_that_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(ProcessError, match="docker: No such file"):
        await published("gateway", 8000)
