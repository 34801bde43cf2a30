"""The configuration is read anew while requests are under way: whole or not at all, and no request fails of it."""

import asyncio
import gc
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from time import time_ns
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from gateway import check
from gateway.files import Files
from mock_model.serve import MockModel
from testkit.completions import CHAT_PATH, RESPONSES_PATH
from testkit.polling import until
from tests.integration.gateways import REFUSED, Gateway, StartGateway, StartMock, config, get
from tests.integration.streaming import streaming

if TYPE_CHECKING:
    from gateway.policy.pool import Pool
    from gateway.policy.replica import Replica
    from testkit.http import Answer

HEALTH = {"path": "/health"}
ONE = "model: '*', targets: [{backend: a}]"


def text(*urls: str | MockModel, more: str = "", routes: str = ONE, keys: str = "") -> str:
    """A configuration with one backend `a`, and one route."""
    found = json.dumps([url if isinstance(url, str) else url.url for url in urls])
    return f"backends: {{a: {{urls: {found}{more}}}}}\nroutes: [{{{routes}}}]\n{keys}"


def generation(gateway: Gateway) -> int:
    return gateway.parts.generations.current.number


async def follows(gateway: Gateway, file: Path, content: str) -> None:
    """Write a configuration in place, and wait until it is in force."""
    wanted = generation(gateway) + 1
    in_place(file, content)
    await until(lambda: generation(gateway) == wanted, lambda: f"not {wanted}: {gateway.parts.generations.error}")


def prompts(mock: MockModel) -> int:
    return sum(call.path == CHAT_PATH for call in mock.journal.calls)


async def test_a_stream_under_way_ends_where_it_began_and_new_requests_go_elsewhere(
    slow_mock: MockModel, mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(tmp_path, text(slow_mock))
    gateway = await start_gateway(gateway_config=file)
    async with streaming(gateway) as caller:
        await caller.next()
        await follows(gateway, file, text(mock))
        assert (await gateway.chat()).status == 200
        rest = await caller.rest()
    assert rest.endswith(b"data: [DONE]\n\n")
    assert not caller.cut
    assert [call.ended for call in slow_mock.journal.calls if call.path == CHAT_PATH] == ["complete"]
    assert (prompts(slow_mock), prompts(mock)) == (1, 1)


async def test_a_request_that_is_retried_goes_on_with_the_replicas_with_which_it_began(
    mock: MockModel, start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    other = await start_mock()
    mock.set_faults([{"kind": "hang_before_headers", "times": 1}])
    file = config(tmp_path, text(mock, more=", timeouts: {answer: 1}"))
    gateway = await start_gateway(gateway_config=file, gateway_backoff_initial=0)
    asking = asyncio.create_task(gateway.chat())
    await until(lambda: prompts(mock) == 1)
    await follows(gateway, file, text(other, more=", timeouts: {answer: 100}"))
    answer = await asking
    assert answer.status == 504  # a silent replica is not asked again, and no other one was there when it came
    assert "within 1 s" in answer.error["message"]
    assert prompts(other) == 0


async def test_the_generation_is_in_health_metrics_spans_and_the_log(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gateway")
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file)
    await gateway.chat()
    await follows(gateway, file, text(mock, more=", timeouts: {idle: 7}"))
    await gateway.chat()
    document = (await gateway.health())["config"]
    assert (document.pop("loaded_seconds_ago") >= 0, document) == (True, {"generation": 2, "error": None})
    assert "\ngateway_config_generation 2.0\n" in await gateway.metrics()
    assert "configuration generation 2 is in force" in caplog.text

    def numbers() -> list[Any]:
        spans = [span.attributes or {} for span in gateway.spans()]
        return [each["gateway.config_generation"] for each in spans if each.get("gateway.outcome") == "ok"]

    await until(lambda: numbers() == [1, 2], lambda: str(numbers()))
    lines = [json.loads(line) for line in gateway.log.getvalue().splitlines()]
    assert [line["config_generation"] for line in lines] == [1, 2]


WRONG = [
    pytest.param(
        b"backends: {a: {url: 'http://h', colour: red}}\nroutes: []\n", "line 1, backends.a: colour", id="key"
    ),
    pytest.param(b"backends: {a: {url: 'http://h'}}\nroutes: [", "line 2", id="half"),
    pytest.param(b"\x00\xff\xfe\x01", "line 1", id="binary"),
    pytest.param(b"", "the file is empty", id="empty"),
    pytest.param(
        b"backends: {a: {url: 'http://h', api_key_env: NOT_SET}}\nroutes: [{model: m, targets: [{backend: a}]}]",
        "line 1, backends.a.api_key_env: neither NOT_SET nor NOT_SET_FILE",
        id="secret",
    ),
    pytest.param(
        b"backends: {a: {url: 'http://h'}}\nroutes: [{model: m, targets: [{backend: a}]}]\n"
        b"keys: [{name: k, key_sha256: '" + b"0" * 64 + b"'}]",
        "open since its start",
        id="closes",
    ),
    pytest.param(None, "No such file", id="absent"),
]


@pytest.mark.parametrize(("content", "words"), WRONG)
async def test_a_wrong_file_changes_nothing_and_is_told_once(  # noqa: PLR0917 - fixtures
    mock: MockModel,
    start_gateway: StartGateway,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: bytes | None,
    words: str,
) -> None:
    good = text(mock)
    file = config(tmp_path, good)
    gateway = await start_gateway(gateway_config=file)
    before = gateway.parts.generations.current
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    await until(lambda: gateway.parts.generations.error)
    for _ in range(2):  # a look without a change, and one at another time of the same content
        await gateway.parts.reload._look()
        if content is not None:
            os.utime(file)
    health = (await gateway.health())["config"]
    assert words in health["error"]
    assert health["generation"] == 1
    assert gateway.parts.generations.current is before
    assert "\ngateway_config_errors_total 1.0\n" in await gateway.metrics()
    assert [record.getMessage().count(words) for record in caplog.records if words in record.getMessage()] == [1]
    assert (await gateway.chat()).status == 200

    file.write_text(good)
    await until(lambda: gateway.parts.generations.error is None)
    assert gateway.parts.generations.current is before  # it says what is in force
    assert (await gateway.health())["config"]["error"] is None
    await follows(gateway, file, text(mock, REFUSED))


async def test_a_stranger_is_not_told_why_a_file_is_wrong(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file, gateway_api_keys="k")
    file.write_text("colour: red")
    await until(lambda: gateway.parts.generations.error)
    assert "colour" not in json.dumps(await gateway.health())
    known = await get(gateway, "/health", authorization="Bearer k")
    assert "line 1" in known.json["config"]["error"]


def in_place(file: Path, content: str) -> None:
    file.write_text(content)


def moved_over(file: Path, content: str) -> None:
    draft = file.with_suffix(".new")
    draft.write_text(content)
    draft.replace(file)


def deleted_and_back(file: Path, content: str) -> None:
    file.unlink()
    file.write_text(content)


def folder_renamed(file: Path, content: str) -> None:
    folder = file.parent
    folder.rename(folder.with_name("old"))
    folder.mkdir()
    file.write_text(content)


def as_kubernetes_does(file: Path, content: str) -> None:
    """A new folder beside the old one, and `..data` leads to it (the kubelet's AtomicWriter)."""
    folder = file.parent
    new = folder / f"..{time_ns()}"
    new.mkdir()
    (new / file.name).write_text(content)
    old = (folder / "..data").resolve()
    (folder / "..data_tmp").symlink_to(new.name)
    (folder / "..data_tmp").replace(folder / "..data")
    shutil.rmtree(old)


@pytest.mark.parametrize("change", [in_place, moved_over, deleted_and_back, folder_renamed, as_kubernetes_does])
async def test_each_way_to_change_a_file_is_noticed_again_and_again(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, change: Callable[[Path, str], None]
) -> None:
    folder = tmp_path / "mounted"
    file = folder / "gateway.yaml"
    if change is as_kubernetes_does:
        (folder / "..1").mkdir(parents=True)
        (folder / "..1" / file.name).write_text(text(mock))
        (folder / "..data").symlink_to("..1")
        file.symlink_to(f"..data/{file.name}")
    else:
        folder.mkdir()
        file.write_text(text(mock))
    gateway = await start_gateway(gateway_config=file)
    for number in range(2, 5):
        change(file, text(mock, more=f", timeouts: {{idle: {number}}}"))
        await until(lambda number=number: generation(gateway) == number)  # type: ignore[misc]
        shutil.rmtree(tmp_path / "old", ignore_errors=True)
    (endpoint,) = gateway.parts.pool.endpoints.values()
    assert endpoint.timeouts.idle == 4


async def test_a_link_to_another_folder_is_followed(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gateway.yaml").write_text(text(mock, more=f", query: {{from: {name}}}"))
    (tmp_path / "current").symlink_to("one")
    gateway = await start_gateway(gateway_config=tmp_path / "current" / "gateway.yaml")
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").replace(tmp_path / "current")
    await until(lambda: generation(gateway) == 2)
    (tmp_path / "two" / "gateway.yaml").write_text(text(mock, more=", query: {from: three}"))
    await until(lambda: generation(gateway) == 3)


async def test_what_a_wrong_file_names_is_watched_too(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, key = config(tmp_path, text(mock)), tmp_path / "elsewhere" / "key"
    monkeypatch.setenv("LATE_KEY_FILE", str(key))
    gateway = await start_gateway(gateway_config=file)
    file.write_text(text(mock, more=", api_key_env: LATE_KEY"))
    await until(lambda: "LATE_KEY" in (gateway.parts.generations.error or ""))
    key.parent.mkdir()
    key.write_text("late")
    await until(lambda: generation(gateway) == 2)


async def test_a_pipe_is_not_read_again(mock: MockModel, start_gateway: StartGateway, tmp_path: Path) -> None:
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file)
    file.unlink()
    os.mkfifo(file)
    await until(lambda: gateway.parts.generations.error)
    assert "cannot be read again" in (gateway.parts.generations.error or "")


async def test_a_file_of_any_size_is_wrong_and_the_next_one_is_in_force(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file)
    with file.open("ab") as more:
        more.truncate(1 << 40)
    await until(lambda: gateway.parts.generations.error)
    assert "it has more than 1048576 bytes" in (gateway.parts.generations.error or "")
    file.unlink()
    file.write_text(text(mock, more=", headers: {x-title: app}"))
    await until(lambda: generation(gateway) == 2)


async def test_without_a_file_the_question_is_answered(
    mock: MockModel, start_gateway: StartGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="gateway")
    gateway = await start_gateway(mock)
    for _ in range(2):
        gateway.parts.reload.ask()
    await until(lambda: "nothing has changed" in caplog.text)
    assert generation(gateway) == 1


async def test_a_file_that_cannot_be_watched_is_looked_at(
    mock: MockModel,
    start_gateway: StartGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def refuse(*_: object, **__: object) -> AsyncIterator[None]:
        for error in [OSError("OS file watch limit reached")]:
            raise error
        yield

    monkeypatch.setattr("gateway.reload.awatch", refuse)
    monkeypatch.setattr("gateway.reload.LOOK", 10)
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file)
    for number in range(3):
        await follows(gateway, file, text(mock, more=f", timeouts: {{idle: {number + 5}}}"))
    assert caplog.text.count("watch limit") == 1


async def test_what_is_known_about_a_replica_stays_and_how_it_is_asked_does_not(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 500}}])
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(
        gateway_config=file, gateway_breaker_failures=1, gateway_max_attempts=1, gateway_breaker_open_seconds=1000,
        gateway_breaker_open_max=1000,
    )  # fmt: skip
    assert (await gateway.chat()).status == 500
    before = (await gateway.health())["downstream"]["backends"][0]
    await follows(gateway, file, text(mock, more=", timeouts: {idle: 7}, headers: {x-a: b}"))
    after = (await gateway.health())["downstream"]["backends"][0]
    for key in ("name", "url", "status", "breaker", "consecutive_failures"):
        assert before[key] == after[key]
    assert after["breaker"] == "open"
    assert after["last_error"]["trace_id"] == before["last_error"]["trace_id"]
    answer = await gateway.chat()
    assert (answer.status, answer.attempts) == (503, 0)
    assert prompts(mock) == 1

    mock.set_faults([])
    await follows(gateway, file, text(mock.url.replace("127.0.0.1", "localhost")))
    assert (await gateway.chat()).status == 200  # another url is another server, as far as anybody knows


async def test_connections_of_a_replica_that_stays_are_kept_and_those_of_one_that_goes_are_closed(
    start_gateway: StartGateway, tmp_path: Path
) -> None:
    callers: list[tuple[str, int, str | None]] = []

    async def answer(request: web.Request) -> web.Response:
        peer = (request.transport.get_extra_info("peername") if request.transport else None) or ("", 0)
        callers.append((request.host, peer[1], request.headers.get("x-a")))
        return web.json_response({"id": "1", "object": "chat.completion", "choices": []})

    async with AsyncExitStack() as stack:
        urls = []
        for _ in range(2):
            app = web.Application()
            app.router.add_post(CHAT_PATH, answer)
            server = await stack.enter_async_context(TestServer(app))
            urls.append(str(server.make_url("/")))
        file = config(tmp_path, text(urls[0], more=", headers: {x-a: '1'}"))
        gateway = await start_gateway(gateway_config=file, gateway_probe_path="")
        await gateway.chat()
        await follows(gateway, file, text(urls[0], more=", headers: {x-a: '2'}"))
        await gateway.chat()
        assert [header for _, _, header in callers] == ["1", "2"]
        assert callers[0][:2] == callers[1][:2]
        kept = gateway.parts.client._kept._conns
        assert sum(map(len, kept.values())) == 1
        await follows(gateway, file, text(urls[1]))
        assert sum(map(len, kept.values())) == 0


@pytest.mark.parametrize("reloaded", [False, True])
async def test_what_fails_of_the_generation_before_trips_no_guard(
    mock: MockModel,
    start_gateway: StartGateway,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    *,
    reloaded: bool,
) -> None:
    waiting, fails = 0, asyncio.Event()

    async def fail_when_told(_: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        await fails.wait()
        return web.json_response({"error": {"message": "No."}}, status=503)

    app = web.Application()
    app.router.add_post(CHAT_PATH, fail_when_told)
    async with TestServer(app) as bad:
        weighted = f"""
backends: {{a: {{url: "{mock.url}"}}, b: {{url: "{bad.make_url("/")}"}}}}
routes: [{{model: "*", targets: [{{backend: a, weight: 1}}, {{backend: b, weight: %d}}], guard: {{min_requests: 3}}}}]
"""
        file = config(tmp_path, weighted % 1)
        gateway = await start_gateway(gateway_config=file, gateway_probe_path="")
        asking: list[asyncio.Task[Answer]] = []
        while waiting < 4 or prompts(mock) < 4:
            asking.append(asyncio.create_task(gateway.chat()))
            await until(lambda: waiting + prompts(mock) == len(asking))
        if reloaded:
            await follows(gateway, file, weighted % 2)
        fails.set()
        assert {(await task).status for task in asking} == {200}
        guards = (await gateway.health())["downstream"]["guards"]
        assert [guard["tripped"] for guard in guards] == [False, not reloaded]
        assert ("GUARD TRIPPED" in caplog.text) is not reloaded


async def test_names_of_replicas_move_and_what_is_known_moves_with_their_urls(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    mocks = [await start_mock() for _ in range(3)]
    file = config(tmp_path, text(*mocks))
    gateway = await start_gateway(gateway_config=file)
    async with gateway.sdk as sdk:
        made: dict[str, list[str]] = {}
        while len(made) < 3:
            response = await sdk.responses.with_raw_response.create(model="m", input="Hello")
            made.setdefault(response.headers["x-gateway-backend"], []).append(response.parse().id)
        await follows(gateway, file, text(*mocks[1:]))
        for name, ids in made.items():
            for id_ in ids:
                found = await get(gateway, f"{RESPONSES_PATH}/{id_}")
                if name == "a-1":  # it is gone, and what it made with it
                    assert found.status == 404
                else:
                    assert found.headers["x-gateway-backend"] == {"a-2": "a-1", "a-3": "a-2"}[name]
                    assert found.attempts == 1


async def test_a_new_replica_is_probed_before_it_is_preferred(
    mock: MockModel, start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    new = await start_mock()
    new.set_faults([{"kind": "hang_before_headers", "match": HEALTH}])
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file, gateway_probe_timeout=3000)
    await until(lambda: gateway.parts.health.ready)
    await follows(gateway, file, text(mock, new))
    for _ in range(10):
        assert (await gateway.chat()).status == 200
        assert (await get(gateway, "/readyz")).status == 200
    assert (prompts(mock), prompts(new)) == (10, 0)
    mock.die()
    assert (await gateway.chat()).status == 200  # where nobody else can answer it is asked all the same
    assert prompts(new) == 1


async def test_a_new_first_target_comes_after_the_known_one_until_it_has_been_probed(
    mock: MockModel, start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    new = await start_mock()
    new.set_faults([{"kind": "hang_before_headers", "match": HEALTH}])
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file, gateway_probe_timeout=3000)
    await until(lambda: gateway.parts.health.ready)
    await follows(
        gateway,
        file,
        f"backends: {{a: {{urls: ['{mock.url}']}}, b: {{url: '{new.url}'}}}}\n"
        "routes: [{model: '*', targets: [{backend: b}, {backend: a}]}]",
    )
    assert (await gateway.chat()).headers["x-gateway-backend"] == "a-1"
    new.set_faults([])
    new.die()  # the probe that hangs ends
    await new.revive()
    await until(lambda: not any(replica.awaits_probe for replica in gateway.parts.pool.replicas))
    assert (await gateway.chat()).headers["x-gateway-backend"] == "b"


async def test_of_a_replica_that_goes_nothing_is_left(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(tmp_path, text(mock, REFUSED))
    gateway = await start_gateway(gateway_config=file, gateway_max_attempts=3, gateway_backoff_initial=0)
    await until(lambda: gateway.parts.health.ready)
    for _ in range(20):
        assert (await gateway.chat()).status == 200
    assert 'backend="a-2"' in await gateway.metrics()
    gone = gateway.parts.pool.replicas[1]
    await follows(gateway, file, text(mock))
    assert 'backend="a-2"' not in await gateway.metrics()
    assert [each["name"] for each in (await gateway.health())["downstream"]["backends"]] == ["a-1"]
    probed = gone.probe
    assert gone not in {replica for replica, _ in gateway.parts.health._tasks._tasks}
    gateway.parts.telemetry.metrics.breaker_changed("a-2", gone.breaker.state)
    gateway.parts.telemetry.metrics.retry_refused("a-2")
    assert 'backend="a-2"' not in await gateway.metrics()
    assert gone.probe is probed


async def in_an_outage(
    mock: MockModel, start_gateway: StartGateway, file: Path, number: int
) -> "tuple[Gateway, list[asyncio.Task[Answer]]]":
    """A gateway whose one replica has died, and so many requests that wait for it."""
    gateway = await start_gateway(gateway_config=file, gateway_outage_wait=1000)
    await until(lambda: gateway.parts.health.ready)
    mock.die()
    waiting = [asyncio.create_task(gateway.chat()) for _ in range(number)]
    await until(lambda: len(gateway.parts.admission.waiting) == number)
    return gateway, waiting


async def test_a_request_that_waits_for_a_backend_that_goes_ends_as_if_it_were_there(
    mock: MockModel, start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    other = await start_mock()
    file = config(tmp_path, text(mock))
    gateway, waiting = await in_an_outage(mock, start_gateway, file, 5)
    await follows(gateway, file, text(other))
    assert (await gateway.chat()).status == 200
    await mock.revive()
    assert [(await each).status for each in waiting] == [200] * 5
    assert (prompts(mock), prompts(other)) == (5, 1)


async def test_a_replica_that_comes_in_an_outage_answers_at_once(
    mock: MockModel, start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    other = await start_mock()
    file = config(tmp_path, text(mock))
    gateway, waiting = await in_an_outage(mock, start_gateway, file, 20)
    await follows(gateway, file, text(mock, other))
    answer = await gateway.chat()
    assert (answer.status, "bridging" in answer.headers["server-timing"]) == (200, False)
    await mock.revive()
    assert [(await each).status for each in waiting] == [200] * 20
    assert prompts(mock) == 20


async def test_who_waits_for_a_full_replica_goes_on_when_more_may_be_under_way(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    mock.set_faults([{"kind": "hang_before_headers", "times": 1}])
    file = config(tmp_path, text(mock, more=", max_in_flight: 1"))
    gateway = await start_gateway(gateway_config=file, gateway_queue_timeout=1000)
    first = asyncio.create_task(gateway.chat())
    await until(lambda: prompts(mock) == 1)
    waiting = [asyncio.create_task(gateway.chat()) for _ in range(5)]
    await until(lambda: len(gateway.parts.admission.waiting) == 5)
    await follows(gateway, file, text(mock, more=", max_in_flight: 3"))
    assert [(await each).status for each in waiting] == [200] * 5
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)


KEY = "keys: [{name: team, key_env: TEAM_KEY, limits: {requests_per_minute: %d}}]"


async def test_a_key_s_file_is_read_anew_and_what_was_used_still_counts(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "team"
    secret.write_text("old")
    monkeypatch.setenv("TEAM_KEY_FILE", str(secret))
    file = config(tmp_path, text(mock, keys=KEY % 3))
    gateway = await start_gateway(gateway_config=file, gateway_queue_timeout=0.01)
    for _ in range(2):
        assert (await gateway.chat(headers={"x-api-key": "old"})).status == 200
    secret.write_text("new")
    await until(lambda: generation(gateway) == 2)
    assert (await gateway.chat(headers={"x-api-key": "old"})).status == 401
    assert (await gateway.chat(headers={"x-api-key": "new"})).status == 200
    assert (await gateway.chat(headers={"x-api-key": "new"})).status == 429
    await follows(gateway, file, text(mock, keys=KEY % 4))
    answer = await gateway.chat(headers={"x-api-key": "new"})
    assert (answer.status, answer.headers["x-ratelimit-remaining-requests"]) == (200, "0")
    assert (await gateway.chat(headers={"x-api-key": "new"})).status == 429
    assert prompts(mock) == 4


@pytest.mark.parametrize("limits", ["max_in_flight: %d", "requests_per_minute: %d"])
async def test_who_waits_for_a_limit_goes_on_when_it_is_raised(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: str
) -> None:
    monkeypatch.setenv("TEAM_KEY", "t")
    keys = f"keys: [{{name: team, key_env: TEAM_KEY, limits: {{{limits}}}}}]"
    file = config(tmp_path, text(mock, keys=keys % 1))
    gateway = await start_gateway(gateway_config=file, gateway_queue_timeout=120)
    mock.set_faults([{"kind": "hang_before_headers"}])
    asking = [asyncio.create_task(gateway.chat(headers={"x-api-key": "t"})) for _ in range(2)]
    await until(lambda: (prompts(mock), gateway.parts.admission.queued) == (1, 1))
    await follows(gateway, file, text(mock, keys=keys % 2))
    await until(lambda: prompts(mock) == 2)
    for task in asking:
        task.cancel()
    await asyncio.gather(*asking, return_exceptions=True)


async def test_a_request_of_a_key_that_goes_ends_well(
    slow_mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_KEY", "t")
    monkeypatch.setenv("OTHER_KEY", "o")
    other = "{name: other, key_env: OTHER_KEY}"
    both = f"keys: [{other}, {{name: team, key_env: TEAM_KEY, limits: {{tokens_per_minute: 900}}}}]"
    file = config(tmp_path, text(slow_mock, keys=both))
    gateway = await start_gateway(gateway_config=file)
    asking = asyncio.create_task(gateway.chat(stream=True, headers={"x-api-key": "t"}))
    await until(lambda: prompts(slow_mock) == 1)
    await follows(gateway, file, text(slow_mock, keys=f"keys: [{other}]"))
    assert (await gateway.chat(headers={"x-api-key": "t"})).status == 401
    answer = await asking
    assert (answer.status, answer.events[-1], answer.cut) == (200, "[DONE]", False)
    assert 'key="team"' not in await gateway.metrics()


async def test_a_gateway_with_keys_is_not_opened(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEAM_KEY", "t")
    file = config(tmp_path, text(mock, keys=KEY % 9))
    gateway = await start_gateway(gateway_config=file)
    file.write_text(text(mock))
    await until(lambda: gateway.parts.generations.error)
    assert "open to everybody" in (gateway.parts.generations.error or "")
    assert (await gateway.chat()).status == 401


async def test_the_files_are_read_off_the_event_loop(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path
) -> None:
    file = config(tmp_path, text(mock))
    gateway = await start_gateway(gateway_config=file)
    read, loops = gateway.parts.reload._read, []

    def noted(files: Files) -> Any:  # noqa: ANN401
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        loops.append(1)
        return read(files)

    gateway.parts.reload._read = noted
    await follows(gateway, file, text(mock, REFUSED))
    assert loops


RELOADS = int(os.environ.get("RELOADS", "100"))
"""How many the next test makes; 1,000 by hand."""


async def test_many_reloads_under_load_cost_no_request_and_leave_nothing(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    seed = int(os.environ.get("SEED", "21"))
    rng = Random(seed)
    mocks = [await start_mock(mock_token_interval=0.002 * number) for number in range(4)]
    file = config(tmp_path, text(REFUSED))
    gateway = await start_gateway(gateway_config=file, gateway_connect_timeout=30, gateway_retry_budget=0)
    await until(lambda: gateway.parts.health.ready)
    statuses: list[tuple[int, bool, int]] = []
    ending = False
    pools: WeakSet[Pool] = WeakSet()
    replicas: WeakSet[Replica] = WeakSet()

    async def call_again_and_again(stream: bool) -> None:  # noqa: FBT001
        while not ending:
            answer = await gateway.chat(stream=stream)
            whole = answer.events[-1] == "[DONE]" if stream else bool(answer.text)
            statuses.append((answer.status, whole and not answer.cut, answer.attempts))

    async def reload(content: str) -> None:
        file.write_text(content)
        wanted = generation(gateway) + 1
        gateway.parts.reload.ask()
        await until(lambda: generation(gateway) >= wanted)
        pools.add(gateway.parts.pool)
        replicas.update(gateway.parts.pool.replicas)

    def open_now() -> tuple[int, int]:
        return len(asyncio.all_tasks()), len(list(Path("/proc/self/fd").iterdir()))

    tasks, files = open_now()
    await reload(text(*mocks))
    callers = [asyncio.create_task(call_again_and_again(number % 2 == 0)) for number in range(16)]
    for number in range(RELOADS):
        chosen = rng.sample(mocks, rng.randint(1, 4))
        await reload(text(*chosen, more=f", timeouts: {{idle: {number + 10}}}"))
    gc.collect()
    under_load = len(pools)
    ending = True
    await asyncio.gather(*callers)
    print(  # noqa: T201 - shown when it fails
        f"seed {seed}: {len(statuses)} requests, {generation(gateway)} generations, {under_load} pools at the end"
    )
    assert set(statuses) == {(200, True, 1)}
    assert sum(map(prompts, mocks)) == len(statuses)
    assert {call.ended for mock in mocks for call in mock.journal.calls if call.path == CHAT_PATH} == {"complete"}
    assert under_load <= len(callers) + 5, "a generation is there as long as requests of it are under way"

    await gateway.client.session.close()
    await reload(text(REFUSED))

    def at_rest() -> bool:
        gc.collect()
        nothing_else = (list(pools), set(replicas)) == ([gateway.parts.pool], set(gateway.parts.pool.replicas))
        now = open_now()
        return nothing_else and now[0] <= tasks + 5 and now[1] <= files + 5

    await until(at_rest, lambda: f"{list(pools)}, {list(replicas)}, {open_now()} in place of {(tasks, files)}")


async def test_an_admin_sees_the_configuration_in_force_without_its_secrets(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"BACKEND_KEY": "s3cret-b", "HEADER": "s3cret-h", "TEAM_KEY": "s3cret-t"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    more = ", api_key_env: BACKEND_KEY, headers: {x-a: plain, x-b: {env: HEADER}}, query: {key: s3cret-q}"
    url = mock.url.replace("http://", "http://me:s3cret-p@")
    file = config(tmp_path, text(url, more=more, keys=KEY % 9))
    gateway = await start_gateway(gateway_config=file, gateway_admin_key="s3cret-a")
    assert (await get(gateway, "/config")).status == 401
    assert (await get(gateway, "/config", authorization="Bearer s3cret-t")).status == 401
    answer = await get(gateway, "/config", authorization="Bearer s3cret-a")
    document = answer.json
    assert (document["generation"], document["error"]) == (1, None)
    (replica,) = document["backends"][0]["replicas"]
    assert replica["url"] == mock.url
    assert replica["headers"] == [["x-a", "plain"]]
    assert replica["secret_headers"] == [["x-b", "(set)"]]
    assert (replica["api_key"], replica["user_info"], replica["query"]) == ("(set)", "(set)", [["key", "(set)"]])
    assert document["keys"][0]["limits"]["requests_per_minute"] == 9
    assert document["routes"] == [
        {"model": "*", "targets": [{"backend": "a", "model": None, "weight": None}], "guard": None},
    ]
    assert "s3cret" not in answer.body.decode()
    async with gateway.client.put("/config", headers={"authorization": "Bearer s3cret-a"}) as refused:
        assert (refused.status, refused.headers["allow"]) == (405, "GET,HEAD")


async def test_an_admin_key_s_file_is_read_anew(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "admin"
    secret.write_text("old")
    monkeypatch.setenv("GATEWAY_ADMIN_KEY_FILE", str(secret))
    gateway = await start_gateway(mock)
    assert (await get(gateway, "/config", authorization="Bearer old")).status == 200
    secret.write_text("new")
    await until(lambda: generation(gateway) == 2)
    assert (await get(gateway, "/config", authorization="Bearer old")).status == 401
    assert (await get(gateway, "/config", authorization="Bearer new")).status == 200


async def test_another_admin_key_ends_the_live_pages_that_are_open(
    mock: MockModel, start_gateway: StartGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = tmp_path / "admin"
    secret.write_text("old")
    monkeypatch.setenv("GATEWAY_ADMIN_KEY_FILE", str(secret))
    gateway = await start_gateway(mock)
    async with gateway.client.post("/ui/login", json={"key": "old"}) as signed_in:
        session = f"llm-gateway-admin={signed_in.cookies['llm-gateway-admin'].value}"
    gateway.client.session.cookie_jar.clear()
    for headers in ({"cookie": session}, {"authorization": "Bearer old"}):
        async with gateway.client.get("/ui/live", headers=headers) as page, asyncio.timeout(30):
            assert page.status == 200
            assert await page.content.readuntil(b"event: now")
            secret.write_text("new")
            while await page.content.readany():
                pass
        assert (await get(gateway, "/ui/live", **headers)).status == 401
        number = generation(gateway)
        secret.write_text("old")
        await until(lambda number=number: generation(gateway) > number)  # type: ignore[misc]


async def test_check_tells_what_would_change_against_a_running_gateway(
    mock: MockModel,
    start_gateway: StartGateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TEAM_KEY", "t")
    file = config(tmp_path, text(mock, keys=KEY % 9))
    gateway = await start_gateway(gateway_config=file, gateway_admin_key="admin")

    async def checked(key: str, url: str = gateway.url) -> tuple[int, str]:
        monkeypatch.setenv("GATEWAY_ADMIN_KEY", key)
        code = await asyncio.to_thread(check.main, [str(file), "--url", url])
        return code, "".join(capsys.readouterr())

    same = await checked("admin")
    assert same[0] == 0
    assert f"It says the same as generation 1 of {gateway.url}." in same[1]
    other = tmp_path / "next.yaml"
    other.write_text(text(mock, REFUSED, keys=KEY % 8))
    monkeypatch.setenv("TEAM_KEY", "changed")
    file = other
    code, said = await checked("admin")
    assert code == 0
    assert said.splitlines()[1:] == [
        "backend a: replicas[a-2] new",
        "key team: limits.requests_per_minute 9 -> 8",
        "Secrets that are set in both are not compared.",
    ]
    code, said = await checked("wrong")
    assert (code, said.count("\n"), "the gateway answered 401" in said) == (2, 1, True)
    assert (await checked("admin", mock.url))[0] == 2
    assert "no gateway answers at" in (await checked("admin", REFUSED))[1]
    assert "is needed" in (await checked("admin", "ftp://x"))[1]
    monkeypatch.delenv("GATEWAY_ADMIN_KEY")
