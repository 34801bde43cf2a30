"""How exports get to a collector: by aiohttp, on an event loop of the thread that exports.

The SDK's own transports limit each read but not the whole, and take an answer of any size: a collector that never ends
its headers or its answer would hold the thread, or fill the memory. The base classes are private to the SDK, see
`otlp_exporter.py`.
"""

import asyncio
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import uvloop
from opentelemetry.exporter.http.transport._base import BaseHTTPResult, BaseHTTPTransport

from gateway.settings import CollectorSettings

MAX_ANSWER = 65_536
"""Bytes that are read of an answer: what it says of rejected data is short, and its connection can be kept."""
MAX_HEADER = 8192
"""Bytes of a header of an answer."""
MAX_REASON = 100
"""Characters kept of the words beside a status: they go to the log."""


@dataclass(frozen=True, slots=True)
class Result(BaseHTTPResult):
    """What came of an export."""

    answer_headers: Mapping[str, str] = field(default_factory=dict)

    def content(self) -> bytes:
        """Return nothing: the body goes to `answered`."""
        return b""

    def headers(self) -> Mapping[str, str]:
        """Return the headers of the answer."""
        return self.answer_headers


class Transport(BaseHTTPTransport):
    """Posts exports, each within its time limit from the first to the last byte; redirects are not followed.

    Args:
        reached: how the collector is reached.
        answered: called with the body of each answer 2xx.

    Raises:
        OSError: a certificate cannot be read.
    """

    def __init__(self, reached: CollectorSettings, answered: Callable[[bytes], None]) -> None:
        self._reached = reached
        self._answered = answered
        self._tls = _tls(reached)
        self._runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
        self._runner.get_loop()  # its descriptors are taken at the start, not when there may be none
        self._session: aiohttp.ClientSession | None = None
        self._exporting: asyncio.Task[Result] | None = None
        self._busy = threading.Lock()
        self._closed = False

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        timeout: float | None = None,
        data: bytes | None = None,
    ) -> Result:
        """Send a request and return its outcome; `timeout`: seconds for all of it."""
        with self._busy:
            if self._closed:
                return Result(error=RuntimeError("the exporter was shut down"))
            try:
                return self._runner.run(self._send(method, url, headers, timeout, data))
            except asyncio.CancelledError:
                return Result(error=RuntimeError("the exporter was shut down"))
            except Exception as error:  # whatever it is, the thread that exports goes on  # noqa: BLE001
                return Result(error=error)
            finally:
                self._exporting = None

    def is_connection_error(self, exception: Exception | None) -> bool:
        """Return whether another try may reach the collector."""
        return isinstance(exception, aiohttp.ClientConnectionError)

    def close(self) -> None:
        """End an export that is under way in another thread, and close the connection."""
        self._closed = True
        exporting = self._exporting
        if exporting is not None:
            with suppress(RuntimeError):  # it has just ended
                self._runner.get_loop().call_soon_threadsafe(exporting.cancel)
        with self._busy:
            if self._session is not None:
                self._runner.run(self._session.close())
                self._session = None
            self._runner.close()

    async def _send(
        self, method: str, url: str, headers: dict[str, str] | None, seconds: float | None, data: bytes | None
    ) -> Result:
        self._exporting = asyncio.current_task()
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=1, ssl=self._tls),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None),
                auto_decompress=False,
                trust_env=self._reached.trusts_environment,
                proxy=self._reached.proxy,
                max_line_size=MAX_HEADER,
                max_field_size=MAX_HEADER,
            )
        async with (
            asyncio.timeout(seconds),
            self._session.request(method, url, headers=headers, data=data, allow_redirects=False) as answer,
        ):
            if 300 <= answer.status < 400:  # noqa: PLR2004
                # The SDK takes it for a success; where it leads to has not got the spans.
                return Result(error=RuntimeError(f"the collector redirects ({answer.status})"))
            body = b""
            async for piece in answer.content.iter_any():
                body += piece
                if len(body) > MAX_ANSWER:
                    break
            if answer.ok and len(body) <= MAX_ANSWER and "Content-Encoding" not in answer.headers:
                self._answered(body)
            reason = answer.reason and answer.reason[:MAX_REASON]
            return Result(status_code=answer.status, reason=reason, answer_headers=answer.headers)


def _tls(reached: CollectorSettings) -> ssl.SSLContext | bool:
    if reached.certificate is None and reached.client_certificate is None:
        return True
    context = ssl.create_default_context(cafile=reached.certificate)
    if reached.client_certificate is not None:
        context.load_cert_chain(reached.client_certificate, reached.client_key)
    return context
