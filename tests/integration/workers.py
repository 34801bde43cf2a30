"""Gateways of several workers, as programs."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from mock_model.serve import MockModel
from testkit.completions import CHAT, CHAT_PATH, prompt
from testkit.exposition import Exposition
from testkit.polling import until
from testkit.ports import free_port
from testkit.process_table import children_of
from tests.integration.processes import PATIENCE, Program, running

LOCAL = {"HOST": "127.0.0.1", "PORT": "0", "GATEWAY_WORKERS": "2"}
STREAM = prompt(stream=True, limit=40)
BOTH = {"workers": {"answered": 2, "missing": []}}


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
    async with aiohttp.ClientSession() as session:

        async def serve() -> bool:
            gateway.check()
            try:
                async with session.get(f"{url}/health") as answer:
                    return bool((await answer.json()).get("workers") == BOTH["workers"])
            except aiohttp.ClientError:
                return False

        async with asyncio.timeout(PATIENCE):
            while not await serve():  # noqa: ASYNC110 - of another process
                await asyncio.sleep(0.1)


def workers_of(gateway: Program) -> list[int]:
    """The process ids of its workers."""
    return children_of(gateway.pid)


async def metrics_of(url: str) -> Exposition:
    async with aiohttp.request("GET", f"{url}/metrics") as answer:
        return Exposition.parse(await answer.text())


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


async def health_of(url: str) -> dict[str, Any]:
    async with aiohttp.request("GET", f"{url}/health") as answer:
        document: dict[str, Any] = await answer.json()
        return document
