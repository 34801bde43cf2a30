"""Limits of a day of several workers: kept over restarts, in the file that one process uses."""

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path

import aiohttp

from gateway.day_store import FILE
from mock_model.serve import MockModel
from mock_model.settings import Settings as MockSettings
from testkit.completions import CHAT, CHAT_PATH
from testkit.polling import until
from tests.integration.processes import PATIENCE, Program, running
from tests.integration.workers import LOCAL, health_of, metrics_of, two_workers, until_both, workers_of

LIMITS = "requests_per_day: 8, tokens_per_day: 100000, requests_per_minute: 1000"
KEY = {"authorization": "Bearer k"}


class Folder:
    """What a gateway is started with, again and again."""

    def __init__(self, path: Path, model: MockModel, limits: str = LIMITS) -> None:
        self.model = model
        self.state = path / "state"
        file = path / "gateway.yaml"
        file.write_text(
            f'backends: {{a: {{url: "{model.url}"}}}}\n'
            'routes: [{model: "*", targets: [{backend: a}]}]\n'
            f"keys: [{{name: team, key_env: TEAM, limits: {{{limits}}}}}]\n"
        )
        self.environment = {"GATEWAY_CONFIG": str(file), "TEAM": "k", "GATEWAY_STATE_DIR": str(self.state)}
        self.environment |= {"GATEWAY_QUEUE_TIMEOUT": "20"}

    @asynccontextmanager
    async def gateway(self, workers: int = 2) -> AsyncIterator[tuple[Program, str]]:
        if workers == 1:
            async with running(**(LOCAL | self.environment | {"GATEWAY_WORKERS": "1"})) as gateway:
                await gateway.up()
                yield gateway, gateway.url
        else:
            async with two_workers(self.model, **self.environment) as (gateway, url):
                yield gateway, url

    def rows(self) -> list[tuple[str, str, int, int]]:
        if not (self.state / FILE).exists():
            return []
        with closing(sqlite3.connect(self.state / FILE)) as database:
            return list(database.execute("SELECT key, name, slot, amount FROM used ORDER BY slot"))

    def saved(self, name: str = "requests_per_day") -> int:
        return sum(amount for key, limit, _, amount in self.rows() if (key, limit) == ("team", name))


async def ask(url: str) -> tuple[int, str]:
    """A request on a connection of its own: its status, and how many more may come today."""
    async with aiohttp.request("POST", url + CHAT_PATH, json=CHAT, headers=KEY) as answer:
        await answer.read()
        return answer.status, answer.headers["x-ratelimit-remaining-requests"]


async def stop(gateway: Program) -> str:
    gateway.signal(signal.SIGTERM)
    code, _, errors = await gateway.end()
    assert code == 0, errors
    return errors


async def used(url: str, limit: str) -> float | None:
    return (await metrics_of(url)).only("gateway_key_limit_used", key="team", limit=limit)


async def test_what_is_left_of_a_day_is_the_same_after_a_restart_with_any_number_of_workers(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        folder = Folder(tmp_path, model)
        tokens = 0.0
        for workers, first, more in ((2, 0, 2), (1, 3, 0), (2, 4, 5)):
            async with folder.gateway(workers) as (gateway, url):
                assert (await used(url, "requests_per_day"), await used(url, "tokens_per_day")) == (first, tokens)
                assert await ask(url) == (200, str(7 - first))
                statuses = [(await ask(url))[0] for _ in range(more)]
                assert statuses == [200] * min(more, 7 - first) + [429] * max(0, more - (7 - first))
                assert (await health_of(url))["limits"] == {"status": "ok"}
                await stop(gateway)
            tokens = float(folder.saved("tokens_per_day"))
            assert tokens > 0
            assert folder.saved() == min(8, first + 1 + more)
        assert len(model.journal.calls) == 8
        assert {name for _, name, *_ in folder.rows()} == {"requests_per_day", "tokens_per_day"}


async def test_what_was_saved_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        folder = Folder(tmp_path, model)
        async with folder.gateway() as (gateway, url):
            assert [status for status, _ in [await ask(url) for _ in range(5)]] == [200] * 5
            await until(lambda: folder.saved() == 5, "it is saved while the gateway runs", seconds=PATIENCE)
            await gateway.kill()
        async with folder.gateway() as (_, url):
            assert await ask(url) == (200, "2")
            assert [status for status, _ in [await ask(url) for _ in range(3)]] == [200, 200, 429]


async def test_what_was_used_more_than_a_day_ago_is_forgotten_over_a_restart(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        folder = Folder(tmp_path, model)
        async with folder.gateway() as (gateway, url):
            assert [status for status, _ in [await ask(url) for _ in range(9)]] == [200] * 8 + [429]
            await stop(gateway)
        with closing(sqlite3.connect(folder.state / FILE)) as database, database:
            database.execute("UPDATE used SET slot = slot - 62")  # a slot is 24 minutes
        async with folder.gateway() as (gateway, url):
            assert await ask(url) == (200, "7")
            await stop(gateway)
        assert folder.saved() == 1


async def test_a_folder_that_cannot_be_used_is_said_once_and_hurts_no_request_of_any_worker(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        folder = Folder(tmp_path, model)
        folder.state.write_text("a file")
        async with folder.gateway() as (gateway, url):
            assert [status for status, _ in [await ask(url) for _ in range(3)]] == [200] * 3
            document = await health_of(url)
            assert (document["limits"], document["status"]) == ({"status": "degraded"}, "degraded")
            assert (await metrics_of(url)).only("gateway_limits_degraded") == 1
            folder.state.unlink()
            async with asyncio.timeout(PATIENCE):
                while (await health_of(url))["limits"] != {"status": "ok"}:  # noqa: ASYNC110 - of another process
                    await asyncio.sleep(0.2)
            errors = await stop(gateway)
        assert folder.saved() == 3
        assert errors.count("the limits of a day cannot be kept in") == 1
        assert errors.count("GATEWAY_STATE_DIR must be a folder that the gateway may write to") == 1
        assert "Errno" not in errors
        assert errors.count("the limits of a day are kept again in") == 1


async def test_what_a_killed_worker_has_used_still_counts_and_what_it_held_is_free_again(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        folder = Folder(tmp_path, model, "requests_per_day: 1000, max_in_flight: 4")
        async with folder.gateway() as (gateway, url):
            assert [status for status, _ in [await ask(url) for _ in range(40)]] == [200] * 40
            await until(lambda: folder.saved() == 40, "all is reported and saved", seconds=PATIENCE)
            for pid in workers_of(gateway):
                os.kill(pid, signal.SIGKILL)
                await until(lambda pid=pid: pid not in workers_of(gateway), "it is gone", seconds=PATIENCE)  # type: ignore[misc]
                await until_both(gateway, url)
            counted = int(await used(url, "requests_per_day") or 0)
            assert 40 <= counted <= 80, "at most as much again as it used between two reports"
            assert await ask(url) == (200, str(1000 - counted - 1))
            await stop(gateway)
        assert folder.saved() == counted + 1


async def test_with_a_store_that_is_shared_there_is_no_file(tmp_path: Path) -> None:
    async with MockModel(MockSettings(port=0, control_port=0)) as model:
        folder = Folder(tmp_path, model)
        folder.environment["GATEWAY_LIMITS_URL"] = "valkey://127.0.0.1:1"
        async with folder.gateway() as (gateway, url):
            assert (await ask(url))[0] == 200
            assert (await health_of(url))["limits"] == {"status": "degraded"}
            errors = await stop(gateway)
        assert not folder.state.exists()
        assert errors.count("GATEWAY_STATE_DIR is not used: limits are kept at GATEWAY_LIMITS_URL") == 1
