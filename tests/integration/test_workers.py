"""Several worker processes on one port: what one does, all are asked about, and what dies with one."""

import asyncio
import json
import os
import re
import signal
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.workers.metrics_of_all import LEAST, SUMMED
from mock_model.serve import MockModel
from mock_model.settings import Settings as MockSettings
from testkit.completions import CHAT, CHAT_PATH, prompt
from testkit.http import Answer
from testkit.polling import until
from testkit.process_table import lives
from tests.integration.processes import PATIENCE, run, running
from tests.integration.workers import (
    BOTH,
    LOCAL,
    beside_a_stopped_one,
    chat,
    health_of,
    metrics_of,
    metrics_text_of,
    once_whole,
    streams_under_way,
    two_workers,
    until_both,
    workers_of,
)

LARGEST = {
    "gateway_backend_cooling",
    "gateway_backend_status",
    "gateway_breaker_state",
    "gateway_build_info",
    "gateway_event_loop_lag_seconds",
    "gateway_guard_tripped",
    "gateway_key_limit",
    "gateway_limits_degraded",
    "gateway_workers",
}
"""Gauges of which the largest counts, or that the parent has for itself."""


async def test_whichever_worker_is_asked_it_speaks_for_all() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, url):
        assert await asyncio.gather(*(chat(url) for _ in range(20))) == [200] * 20
        for _ in range(4):  # new connections: not always the same worker's
            assert (await metrics_of(url)).value("gateway_requests_total", outcome="ok", route=CHAT_PATH) == 20
            await asyncio.sleep(0.3)
        assert len(model.journal.calls) == 20
        text = await metrics_text_of(url, accept="application/openmetrics-text")
        assert text.endswith("# EOF\n")
        assert text.count("# TYPE gateway_requests ") == 1
        gauges = set(re.findall("# TYPE (.*) gauge", text))
        assert gauges <= SUMMED | LEAST | LARGEST  # how each is put together has been thought of
        gateway.signal(signal.SIGTERM)
        code, _, errors = await gateway.end()
        assert code == 0, errors
        assert "Traceback" not in errors


async def test_a_worker_that_is_killed_takes_its_own_requests_alone_and_they_are_counted() -> None:
    mock = MockSettings(port=0, control_port=0, mock_token_interval=0.1)
    async with MockModel(mock) as model, two_workers(model) as (gateway, url):
        assert await asyncio.gather(*(chat(url) for _ in range(10))) == [200] * 10
        before = await metrics_of(url)
        streams = await streams_under_way(model, url, 16)
        victim, other = workers_of(gateway)
        os.kill(victim, signal.SIGKILL)
        whole = sum(await asyncio.gather(*streams))
        await until_both(gateway, url)
        after = await metrics_of(url)
        assert other in workers_of(gateway)
        assert after.value("gateway_worker_deaths_total") == 1
        assert after.value("gateway_worker_lost_requests_total") == 16 - whole
        assert after.value("gateway_requests_total", route=CHAT_PATH) == 10 + whole
        counters = {key: value for key, value in before.samples.items() if key[0].endswith(("_total", "_bucket"))}
        assert not {key for key, value in counters.items() if after.samples.get(key, 0) < value}
        assert await asyncio.gather(*(chat(url) for _ in range(4))) == [200] * 4


async def test_a_worker_that_does_not_answer_is_left_out_and_named() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, url):
        assert await asyncio.gather(*(chat(url) for _ in range(10))) == [200] * 10
        assert (await metrics_of(url)).value("gateway_requests_total", route=CHAT_PATH) == 10
        frozen, _ = workers_of(gateway)
        os.kill(frozen, signal.SIGSTOP)
        try:
            document = (await beside_a_stopped_one(f"{url}/health")).json
            assert document["workers"]["answered"] == 1
            assert len(document["workers"]["missing"]) == 1
            assert document["status"] == "degraded"
        finally:
            os.kill(frozen, signal.SIGCONT)


async def test_a_stop_lets_the_streams_of_all_workers_end() -> None:
    mock = MockSettings(port=0, control_port=0, mock_token_interval=0.05)
    async with MockModel(mock) as model, two_workers(model) as (gateway, url):
        streams = await streams_under_way(model, url, 8)
        gateway.signal(signal.SIGTERM)
        assert await asyncio.gather(*streams) == [True] * 8
        code, _, errors = await gateway.end()
        assert code == 0, errors


async def test_limits_hold_for_all_workers_together_and_go_to_the_one_that_needs_them() -> None:
    mock = MockSettings(port=0, control_port=0, mock_ttft=1.0)
    limits = {"GATEWAY_MAX_IN_FLIGHT": "8", "GATEWAY_MAX_QUEUE": "64", "GATEWAY_QUEUE_TIMEOUT": "60"}
    limits |= {"GATEWAY_API_KEYS": "0,1"}  # one caller has at most half
    async with MockModel(mock) as model, two_workers(model, **limits) as (_, url):
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, sum(call.ended is None for call in model.journal.calls))
                await asyncio.sleep(0.005)

        watching = asyncio.create_task(watch())
        keys = [{"authorization": f"Bearer {number}"} for number in range(2)]
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

            async def ask(number: int) -> int:
                async with session.post(url + CHAT_PATH, json=CHAT, headers=keys[number % 2]) as answer:
                    await answer.read()
                    return answer.status

            statuses = await asyncio.gather(*(ask(number) for number in range(32)))
        watching.cancel()
        assert statuses == [200] * 32
        assert most <= 8
        assert most > 4


async def test_a_cooldown_is_known_to_all_workers() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, url):
        model.set_faults([{"kind": "status", "with": {"status": 429, "headers": {"retry-after": "60"}}}])
        statuses = [await chat(url)]
        for _ in range(3):  # asks every worker, in the order in which they are told
            await until_both(gateway, url)
        statuses += [await chat(url) for _ in range(12)]
        assert statuses == [429] * 13
        assert len(model.journal.calls) == 1


async def test_a_limit_of_a_key_holds_for_all_workers_together(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        file.write_text(
            f'backends: {{a: {{url: "{model.url}"}}}}\n'
            'routes: [{model: "*", targets: [{backend: a}]}]\n'
            "keys: [{name: team, key_env: TEAM, limits: {requests_per_minute: 30, tokens_per_day: 1000000}}]\n"
        )
        limits = {"GATEWAY_CONFIG": str(file), "TEAM": "k", "GATEWAY_QUEUE_TIMEOUT": "1"}
        async with two_workers(model, **limits) as (_, url):
            headers = {"authorization": "Bearer k"}

            async def ask() -> tuple[int, str]:
                async with aiohttp.request("POST", url + CHAT_PATH, json=CHAT, headers=headers) as answer:
                    await answer.read()
                    return answer.status, answer.headers["x-ratelimit-limit-requests"]

            answers = [each for _ in range(8) for each in await asyncio.gather(*(ask() for _ in range(10)))]
            statuses = [status for status, _ in answers]
            assert {limit for _, limit in answers} == {"30"}
            assert set(statuses) == {200, 429}
            assert 27 <= statuses.count(200) <= 31
            assert len(model.journal.calls) == statuses.count(200)
            used = (await metrics_of(url)).only("gateway_key_limit_used", key="team", limit="requests_per_minute")
            assert used == statuses.count(200)


async def test_what_was_kept_of_requests_is_told_by_any_worker_and_a_session_is_good_at_all() -> None:
    async with (
        MockModel(MockSettings(port=0, control_port=0)) as model,
        two_workers(model, GATEWAY_ADMIN_KEY="admin") as (gateway, url),
    ):
        for number in range(12):
            headers = {"x-request-id": f"request-{number}"}
            async with aiohttp.request("POST", url + CHAT_PATH, json=CHAT, headers=headers) as answer:
                assert answer.status == 200
        body = {"key": "admin"}
        async with aiohttp.request("POST", f"{url}/ui/login", json=body) as answer:
            assert answer.status == 204
            session = answer.headers["set-cookie"].partition(";")[0]

        async def told(path: str) -> Answer:
            async with one_worker(session) as caller:
                return await once_whole(lambda: answer_of(caller, url + path), lambda answer: answer.status != 401)

        async def listed(query: str) -> dict[str, Any]:
            answer = await once_whole(
                lambda: told(f"/requests?{query}"), lambda answer: answer.json.get("kept", 12) == 12
            )
            document: dict[str, Any] = answer.json
            assert answer.status == 200, document
            return document

        for _ in range(4):
            pages, before = [], ""
            while True:
                page = await listed(f"limit=5{before}")
                pages.append([each["request_id"] for each in page["requests"]])
                if page["next"] is None:
                    break
                before = f"&before={page['next']}"
            assert [id_ for page in pages for id_ in page] == [f"request-{number}" for number in range(11, -1, -1)]
            assert page["kept"] == 12
        for number in range(12):
            found = await once_whole(
                lambda number=number: told(f"/requests/request-{number}"),  # type: ignore[misc]
                lambda answer: answer.status != 404,
            )
            assert (found.json["request_id"], found.json["status"]) == (f"request-{number}", 200)
        refusal = await once_whole(
            lambda: told("/requests/none"), lambda answer: b"among the 12 that are kept" in answer.body
        )
        assert refusal.status == 404, refusal
        async with one_worker(session) as caller:
            snapshot = await once_whole(
                lambda: next_snapshot(caller, url), lambda seen: seen["health"].get("workers") == BOTH["workers"]
            )
        assert snapshot["requests"] == {"ok": 12}
        assert sum(snapshot["latency"]) == 12
        os.kill(workers_of(gateway)[0], signal.SIGKILL)
        await until_both(gateway, url)
        for _ in range(8):  # a new worker knows the session, too
            latest = await told("/requests?limit=1")
            assert (latest.status, latest.json["kept"] <= 12) == (200, True)


def one_worker(session: str) -> aiohttp.ClientSession:
    """Somebody who has signed in, on one connection, so at one worker.

    Where the parent does not say at once whether it knows the session, that worker is asked again; but for the live
    page: it is left in the middle, so that its connection is closed.
    """
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1), headers={"cookie": session})


async def answer_of(caller: aiohttp.ClientSession, url: str) -> Answer:
    async with caller.get(url) as answer:
        return await Answer.of(answer)


async def next_snapshot(caller: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    """What the live page is sent first; of nobody where it is not opened, or closed."""
    async with caller.get(f"{url}/ui/live") as answer:
        async for line in answer.content:
            if line.startswith(b"data: ") and b'"requests"' in line:
                snapshot: dict[str, Any] = json.loads(line.removeprefix(b"data: "))
                return snapshot
    return {"health": {}}


async def test_workers_end_when_their_parent_is_killed() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model, two_workers(model) as (gateway, _):
        pids = workers_of(gateway)
        await gateway.kill()

        def ended() -> bool:
            return not any(lives(pid) for pid in pids)

        await until(ended, "the workers have ended", seconds=PATIENCE)


async def test_a_changed_configuration_comes_into_force_in_all_workers(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    text = 'backends: {{a: {{url: "{url}"}}}}\nroutes: [{{model: {model}, targets: [{{backend: a}}]}}]\n'
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        file.write_text(text.format(url=model.url, model="old"))
        async with two_workers(model, GATEWAY_CONFIG=str(file)) as (gateway, url):
            file.write_text(text.format(url=model.url, model="new"))
            gateway.signal(signal.SIGHUP)

            async def in_force() -> bool:
                return (await metrics_of(url)).only("gateway_config_generation") == 2  # the least of both

            async with asyncio.timeout(PATIENCE):
                while not await in_force():  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.2)
            for _ in range(6):
                async with aiohttp.request("GET", f"{url}/v1/models") as answer:
                    assert [each["id"] for each in (await answer.json())["data"]] == ["new"]
            os.kill(workers_of(gateway)[0], signal.SIGKILL)
            await until_both(gateway, url)
            assert (await metrics_of(url)).only("gateway_config_generation") == 2, "it counts on from the other"


async def test_a_target_that_lost_its_traffic_has_not_got_it_back_when_every_worker_has_died(tmp_path: Path) -> None:
    file = tmp_path / "gateway.json"
    mock = MockSettings(port=0, control_port=0)
    async with MockModel(mock) as old, MockModel(mock) as new:
        new.set_faults([{"kind": "status", "with": {"status": 500}}])
        route = {
            "model": "*",
            "targets": [{"backend": "old", "weight": 1}, {"backend": "new", "weight": 1}],
            "guard": {"min_requests": 5, "window": 3600},
        }
        backends = {"old": {"url": old.url}, "new": {"url": new.url}}
        file.write_text(json.dumps({"backends": backends, "routes": [route]}))

        async def lost() -> list[str]:
            guards = (await health_of(url))["downstream"]["guards"]
            return [guard["backend"] for guard in guards if guard["tripped"]]

        async with two_workers(old, GATEWAY_CONFIG=str(file)) as (gateway, url):
            async with asyncio.timeout(PATIENCE):
                for number in count():
                    if await lost() == ["new"]:
                        break
                    assert await chat(url, prompt(text=f"text {number}")) == 200  # the text draws the target
            for pid in workers_of(gateway):
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: not lives(pid), "it has died")  # type: ignore[misc]
                await until_both(gateway, url)
                assert await lost() == ["new"]
            assert (await metrics_of(url)).value("gateway_worker_deaths_total") == 2


async def test_what_is_wrong_with_the_settings_is_said_once() -> None:
    code, _, errors = await run(**LOCAL, GATEWAY_CONFIG="/nowhere.yaml")
    assert code == 2
    assert errors.count("nowhere.yaml") == 1


async def test_warnings_at_the_start_are_said_once() -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        doubtful = {"GATEWAY_NO_SUCH": "1", "GATEWAY_WORKERS": "4", "GATEWAY_MAX_IN_FLIGHT": "2"}
        async with two_workers(model, **doubtful) as (gateway, _):
            gateway.signal(signal.SIGTERM)
            _, _, errors = await gateway.end()
    assert errors.count("GATEWAY_NO_SUCH is not a setting") == 1
    assert errors.count("GATEWAY_WORKERS is 4, but GATEWAY_MAX_IN_FLIGHT 2: so many workers start") == 1


@pytest.mark.parametrize("workers", ["1", "2"])
async def test_a_port_that_another_gateway_has_is_an_error(workers: str) -> None:
    async with running(**LOCAL) as first:
        await first.up()
        port = first.url.rsplit(":", 1)[1]
        code, _, errors = await run(**(LOCAL | {"PORT": port, "GATEWAY_WORKERS": workers}))
        assert code == 1
        assert "cannot listen" in errors
