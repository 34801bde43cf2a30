"""What becomes of an experiment whose gateway is not there, or not ours, or not well; and what the program says."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from chaos.__main__ import run
from chaos.experiment import Experiment, Step, read
from chaos.gameday import Played, play
from chaos.load import Load
from testkit.load import Call
from testkit.ports import free_port
from testkit.processes import ProcessError

DEFINITION = """
title: A title
steady_state: {seconds: 1, rate: 10, deadline: 1}
method: [{at: 0.5, do: heal}]
rollback: [{do: heal}]
promises: [{text: nobody hangs, measure: hung, at_most: 0}]
"""
HEALTH = {
    "version": "1.2.3",
    "app_mode": "prod",
    "downstream": {"backends": [{"name": "backend-1", "breaker": "closed", "retry_in_seconds": None}]},
}


class FakeStage:
    """Writes down what is asked of it."""

    def __init__(self, url: str, *, trouble: str | None = None) -> None:
        self.url = url
        self.key: str | None = None
        self.plan: dict[str, Any] = {}
        self.settings = {"GATEWAY_MAX_ATTEMPTS": "1"}
        self.done: list[str] = []
        self._trouble = trouble

    async def begin(self) -> None:
        self.done.append("begin")

    async def do(self, step: Step) -> None:
        self.done.append(step.do)

    def arrivals(self) -> dict[str, list[str]]:
        return {}

    def stalled(self, start: float, end: float) -> float:
        assert 1 < start <= end, "of the clock"
        return 0.0

    async def revived(self, mock: int) -> None:
        self.done.append(f"mock-{mock} answers")

    async def end(self) -> None:
        self.done.append("end")
        if self._trouble:
            raise ProcessError(self._trouble)


@pytest.fixture
def definition(tmp_path: Path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(DEFINITION, encoding="utf-8")
    return file


@pytest.fixture
def experiment(definition: Path) -> Experiment:
    return read(definition)


async def answer(request: web.Request) -> web.Response:
    """A gateway that has no backend to ask."""
    headers = {"x-request-id": request.headers["x-request-id"], "x-gateway-attempts": "0"}
    error = {"message": "no", "type": "server_error", "param": None, "code": "backend_unavailable"}
    return web.json_response({"error": error}, status=503, headers=headers)


async def health(_request: web.Request) -> web.Response:
    return web.json_response(HEALTH)


async def metrics(_request: web.Request) -> web.Response:
    return web.Response(text="# TYPE x counter\nx_total 1\n")


async def html(_request: web.Request) -> web.Response:
    return web.Response(text="<!doctype html>", content_type="text/html")


async def played(experiment: Experiment, stage: FakeStage) -> Played:
    result = Played(experiment, 7, "make chaos")
    async with aiohttp.ClientSession() as session:
        await play(result, stage, session, lambda _line: None)
    return result


async def test_a_gateway_that_is_not_there_is_a_problem(experiment: Experiment) -> None:
    stage = FakeStage(f"http://127.0.0.1:{free_port()}")
    result = await played(experiment, stage)

    assert not result.passed
    assert "nothing answers at 127.0.0.1" in str(result.problem)
    assert stage.done == ["begin", "end"]


@pytest.mark.parametrize(("path", "handler"), [("/health", html), ("/health", metrics), ("/metrics", html)])
async def test_something_else_than_our_gateway_is_a_problem(
    experiment: Experiment,
    path: str,
    handler: Callable[[web.Request], Awaitable[web.Response]],
    aiohttp_server: Callable[..., Awaitable[TestServer]],
) -> None:
    app = web.Application()
    for where, ours in {"/health": health, "/metrics": metrics, path: handler}.items():
        app.router.add_get(where, ours)
    server = await aiohttp_server(app)
    result = await played(experiment, FakeStage(str(server.make_url("/")).rstrip("/")))

    assert not result.passed
    assert "is not this gateway: /health or /metrics is another's" in str(result.problem)


async def test_nothing_is_done_to_a_gateway_that_is_not_well(
    experiment: Experiment,
    aiohttp_server: Callable[..., Awaitable[TestServer]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Begun(Load):
        """One whose calls are judged when the first has ended, however long that takes."""

        async def until(self, true: Callable[[Sequence[Call]], bool], seconds: float) -> None:
            await super().until(bool, 30)
            await super().until(true, seconds)

    monkeypatch.setattr("chaos.gameday.PATIENCE", 0.0)
    monkeypatch.setattr("chaos.gameday.Load", Begun)
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/v1/chat/completions", answer)
    server = await aiohttp_server(app)
    stage = FakeStage(str(server.make_url("/")).rstrip("/"))
    result = await played(experiment, stage)

    assert "no steady state before anything was done: {'503 backend_unavailable': " in str(result.problem)
    assert stage.done == ["begin", "end"]
    assert (result.gateway, result.settings) == ("1.2.3 (prod)", {"GATEWAY_MAX_ATTEMPTS": "1"})
    assert result.findings.calls


async def test_a_backend_that_is_started_is_waited_for_and_its_answer_is_remembered(
    definition: Path, aiohttp_server: Callable[..., Awaitable[TestServer]]
) -> None:
    class Slow(FakeStage):
        async def revived(self, mock: int) -> None:
            await asyncio.sleep(0.2)
            await super().revived(mock)

    async def good(request: web.Request) -> web.Response:
        headers = {"x-request-id": request.headers["x-request-id"], "x-gateway-attempts": "0"}
        return web.json_response({"choices": [{"text": "words"}]}, headers=headers)

    steps = "{at: 0.1, do: start}, {at: 0.2, do: heal}"
    definition.write_text(DEFINITION.replace("{at: 0.5, do: heal}", steps))  # noqa: ASYNC240
    app = web.Application()
    app.router.add_get("/health", health)
    app.router.add_get("/metrics", metrics)
    app.router.add_post("/v1/chat/completions", good)
    server = await aiohttp_server(app)
    stage = Slow(str(server.make_url("/")).rstrip("/"))
    result = await played(read(definition), stage)

    assert result.passed, (result.problem, result.verdicts)
    assert stage.done == ["begin", "start", "mock-1 answers", "heal", "heal", "end"]
    (revival,) = result.findings.revivals
    assert revival >= 0.3
    assert [text for _, text in result.findings.marks][:2] == ["start mock-1", "mock-1 answers"]


async def test_what_could_not_be_put_back_is_a_problem(experiment: Experiment) -> None:
    result = await played(experiment, FakeStage(f"http://127.0.0.1:{free_port()}", trouble="the script is lost"))

    assert "not left as it was found: ProcessError: the script is lost" in str(result.problem)


async def test_a_stack_that_does_not_start_is_a_problem(experiment: Experiment) -> None:
    class Broken(FakeStage):
        async def begin(self) -> None:
            raise ProcessError("gateway-1 does not serve")

    assert "gateway-1 does not serve" in str((await played(experiment, Broken("http://127.0.0.1:9"))).problem)


async def test_the_stage_ends_when_the_experiment_is_stopped(experiment: Experiment) -> None:
    class Slow(FakeStage):
        async def begin(self) -> None:
            await asyncio.sleep(60)

    stage, result = Slow("http://127.0.0.1:9"), Played(experiment, 7, "make chaos")
    async with aiohttp.ClientSession() as session:
        task = asyncio.create_task(play(result, stage, session, lambda _line: None))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert stage.done == ["end"]
    assert result.problem == "stopped before its end"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["no-such-thing"], "no-such-thing.yaml: No such file or directory; ours are: backend-frozen"),
        (["--out", "/no/such/folder/report.html"], "--out /no/such/folder/report.html: no file can be written there"),
        (["black-hole", "--target", "http://127.0.0.1:9"], "nothing is left to play"),
        (["--compose"], "docker: No such file or directory"),
    ],
)
def test_what_cannot_be_played_at_all_is_told_in_one_line(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["chaos", *words])

    assert run() == 2
    assert says in capsys.readouterr().err


def test_an_address_must_be_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--target", "localhost:8000"])

    with pytest.raises(SystemExit):
        run()
    assert "'localhost:8000' is no http:// address" in capsys.readouterr().err
