"""A Valkey or Redis that instances share: one server or a cluster, by redis-py. Every call ends within `TIMEOUT`."""

import asyncio
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import NoScriptError, RedisError
from redis.exceptions import TimeoutError as RedisTimeout

from gateway.store import StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

TIMEOUT = 0.5
"""Seconds for a connection, and for each exchange."""
OPENING = 4.0
"""Seconds until a new connection is of use: it takes several exchanges. Nobody waits for them."""
AT_ONCE = 16
"""Calls to the nodes of a cluster."""
MAX_MESSAGE = 300
"""Characters kept of what is wrong."""
PORT = 6379
LEDGER = Path(__file__).with_name("limits_ledger.lua")


class Valkey:
    """A connection to the store, made when it is needed, and anew after each failure.

    Args:
        url: `valkey://` or `redis://`, with an `s` before the colon for TLS; user, password, port and number of the
            database are optional. A node of a cluster stands for all of it.

    Attributes:
        name: host and port.
    """

    keeps = True

    def __init__(self, url: str) -> None:
        self._script = LEDGER.read_text(encoding="utf-8")
        self._sha = ""
        self._client: Redis | RedisCluster | None = None
        self._well = False
        self._opening = asyncio.Lock()
        self._url = ""
        self.follow(url)

    def follow(self, url: str) -> None:
        """Be there from the next call on."""
        self._has_moved = url != self._url
        self._url = url
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port or PORT
        self.name = f"{host}:{port}"
        self._options: dict[str, Any] = {
            "host": host,
            "port": port,
            "username": unquote(parts.username) if parts.username else None,
            "password": unquote(parts.password) if parts.password else None,
            "ssl": parts.scheme in {"valkeys", "rediss"},
            "socket_timeout": TIMEOUT,
            "socket_connect_timeout": TIMEOUT,
            "retry": Retry(NoBackoff(), 0),
            "client_name": "llm-gateway",
        }
        self._database = int(parts.path.strip("/") or 0)

    async def ping(self) -> None:
        """Find out whether it answers. Raises: StoreError."""
        await self._call(self._ping)

    async def exchange(self, reports: "Sequence[tuple[str, bytes]]") -> list[bytes]:
        """Run the script of the ledger for each key with its report; return the answers. Raises: StoreError."""
        answers: list[bytes] = await self._call(partial(self._exchange, reports))
        return answers

    async def publish(self, values: "Sequence[tuple[str, bytes]]", seconds: int) -> None:
        """Set values that end after so many seconds. Raises: StoreError."""
        await self._call(partial(self._publish, values, seconds))

    async def look_up(self, key: str, seconds: float) -> bytes | None:
        """Return a value; None for none, and where it does not come in time. Never where the store is unwell."""
        client = self._client
        if client is None or not self._well:
            return None
        with suppress(Exception):  # it is in nobody's way, whatever comes from there
            async with asyncio.timeout(seconds):
                value = await client.get(key)
                return value if isinstance(value, bytes) else None
        self._well = False  # nobody else waits before it has answered again
        return None

    async def close(self) -> None:
        """Close the connection."""
        client, self._client = self._client, None
        if client is not None:
            await _close(client)

    async def _call(self, call: "Callable[[Redis | RedisCluster], Coroutine[Any, Any, Any]]") -> Any:  # noqa: ANN401 - what redis-py returns
        try:
            async with asyncio.timeout(OPENING), self._opening:
                client = await self._opened()
            async with asyncio.timeout(TIMEOUT):
                result = await call(client)
        except (TimeoutError, RedisTimeout):
            error = f"no answer within {TIMEOUT:g} s"
        except Exception as failure:  # redis-py raises whatever its parser does with a strange answer  # noqa: BLE001
            error = str(failure)[:MAX_MESSAGE] or type(failure).__name__
        else:
            self._well = True
            return result
        self._well = False
        await self.close()
        raise StoreError(error)

    async def _ping(self, client: Redis | RedisCluster) -> None:
        await client.ping()

    async def _exchange(self, reports: "Sequence[tuple[str, bytes]]", client: Redis | RedisCluster) -> list[bytes]:
        if isinstance(client, RedisCluster):  # its pipelines have no scripts
            at_once = asyncio.Semaphore(AT_ONCE)
            return list(await asyncio.gather(*(self._exchange_one(client, at_once, *each) for each in reports)))
        pipe = client.pipeline(transaction=False)
        for key, report in reports:
            pipe.evalsha(self._sha, 1, key, report)
        answers = await pipe.execute(raise_on_error=False)
        for place, (key, report) in enumerate(reports):
            answer = answers[place]
            if isinstance(answer, NoScriptError):  # the store has been restarted; this brings the script along
                answer = await client.eval(self._script, 1, key, report)
            if isinstance(answer, Exception):
                raise answer
            answers[place] = answer
        return answers

    async def _exchange_one(self, client: RedisCluster, at_once: asyncio.Semaphore, key: str, report: bytes) -> bytes:
        async with at_once:
            try:
                answer: bytes = await client.evalsha(self._sha, 1, key, report)
            except NoScriptError:
                answer = await client.eval(self._script, 1, key, report)
            return answer

    async def _publish(self, values: "Sequence[tuple[str, bytes]]", seconds: int, client: Redis | RedisCluster) -> None:
        pipe = client.pipeline(transaction=False)
        for key, value in values:
            pipe.set(key, value, ex=seconds)
        await pipe.execute()

    async def _opened(self) -> Redis | RedisCluster:
        if self._has_moved:
            self._has_moved = False
            await self.close()
        if self._client is not None:
            return self._client
        client: Redis | RedisCluster = Redis(**self._options, db=self._database, protocol=2)
        try:
            info = await client.info("cluster")
            self._sha = await client.script_load(self._script)
            if info.get("cluster_enabled"):
                await client.aclose()
                client = RedisCluster(**self._options | {"retry": Retry(NoBackoff(), 1)}, protocol=2)
                await client.initialize()
        except BaseException:
            await _close(client)
            raise
        self._client = client
        return client


async def _close(client: Redis | RedisCluster) -> None:
    with suppress(RedisError, OSError, TimeoutError):
        async with asyncio.timeout(TIMEOUT):
            await client.aclose()
