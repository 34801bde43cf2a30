"""Gateways of several workers, as programs."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import aiohttp

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH, prompt
from testkit.exposition import Exposition
from testkit.http import Answer, ask
from testkit.polling import until
from testkit.ports import free_port
from testkit.process_table import children_of
from tests.integration.processes import PATIENCE, Program, running

LOCAL = {"HOST": "127.0.0.1", "PORT": "0", "GATEWAY_WORKERS": "2"}
STREAM = prompt(stream=True, limit=40)
BOTH = {"workers": {"answered": 2, "missing": []}}

T = TypeVar("T")


@asynccontextmanager
async def two_workers(model: MockModel, **environment: str) -> AsyncIterator[tuple[Program, str]]:
    """A gateway of two workers that both serve, and its url."""
    port = free_port()
    more = {"PORT": str(port), "GATEWAY_BACKEND_URLS": model.url, **environment}
    async with running(**(LOCAL | more)) as gateway:
        url = f"http://127.0.0.1:{port}"
        await until_both(gateway, url)
        yield gateway, url


async def until_both(gateway: Program, url: str) -> None:
    """Wait until both serve, and answer for both."""
    await until_workers(gateway, url, BOTH["workers"])


async def until_workers(gateway: Program, url: str, workers: object) -> dict[str, Any]:
    """Wait until `/health` says so of its workers; the whole document."""
    async with aiohttp.ClientSession() as session:

        async def ask() -> dict[str, Any]:
            gateway.check()
            try:
                async with session.get(f"{url}/health") as answer:
                    document: dict[str, Any] = await answer.json()
                    return document
            except aiohttp.ClientError:
                return {}

        return await once_whole(ask, lambda document: document.get("workers") == workers)


async def once_whole(ask: Callable[[], Awaitable[T]], is_whole: Callable[[T], bool]) -> T:
    """Ask until all workers have their part in the answer: those who do not give it in time are left out."""
    async with asyncio.timeout(PATIENCE):
        while not is_whole(answer := await ask()):  # noqa: ASYNC110 - of other processes
            await asyncio.sleep(0.1)
    return answer


def workers_of(gateway: Program) -> list[int]:
    """The process ids of its workers."""
    return children_of(gateway.pid)


async def metrics_of(url: str) -> Exposition:
    """What all workers count."""
    return Exposition.parse(await metrics_text_of(url))


async def metrics_text_of(url: str, **headers: str) -> str:
    """The page of metrics of all workers, or of the only process there is."""

    def is_of_all(answer: Answer) -> bool:
        missing = re.search(rb'gateway_workers{state="missing"} (\d+)', answer.body)
        return answer.status == 200 and (missing is None or not int(missing[1]))

    answer = await once_whole(lambda: ask(f"{url}/metrics", headers=headers, seconds=PATIENCE), is_of_all)
    return answer.body.decode()


async def stream_of(url: str) -> bool:
    """Whether a stream, on a connection of its own, comes whole."""
    try:
        async with aiohttp.request("POST", url + CHAT_PATH, json=STREAM) as answer:
            return (await answer.text()).endswith("data: [DONE]\n\n")
    except aiohttp.ClientError:
        return False


async def streams_under_way(model: MockModel, url: str, number: int) -> list[asyncio.Task[bool]]:
    """So many streams, all of which have begun."""
    begun = len(model.journal.calls) + number
    streams = [asyncio.create_task(stream_of(url)) for _ in range(number)]
    await until(lambda: len(model.journal.calls) == begun, "all streams have begun", seconds=PATIENCE)
    return streams


async def chat(url: str, body: dict[str, Any] = CHAT) -> int:
    """The status of a call on a connection of its own."""
    async with aiohttp.request("POST", url + CHAT_PATH, json=body) as answer:
        await answer.read()
        return answer.status


async def beside_a_stopped_one(url: str) -> Answer:
    """What is said of all workers while one is stopped, by the other, as soon as it has given its part in time."""
    return await once_whole(lambda: of_one_that_runs(url), lambda answer: bool(answer.json["workers"]["missing"]))


async def of_one_that_runs(url: str) -> Answer:
    """The first answer to the same call on 16 connections: those that go to a worker that is stopped get none.

    One after another would take too long where several do: a worker that is stopped is killed after half a minute.
    """
    calls = [asyncio.create_task(ask(url, seconds=PATIENCE)) for _ in range(16)]
    try:
        return await next(asyncio.as_completed(calls))
    finally:
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def health_of(url: str) -> dict[str, Any]:
    """What `/health` says of all of them, or of the only process there is."""

    def is_of_all(answer: Answer) -> bool:
        return "workers" not in answer.json or answer.json["workers"]["missing"] == []

    document: dict[str, Any] = (await once_whole(lambda: ask(f"{url}/health", seconds=PATIENCE), is_of_all)).json
    return document
