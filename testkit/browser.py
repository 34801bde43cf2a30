"""A real browser without a window, driven by the DevTools protocol: Chromium or Chrome, whichever is installed."""

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)
START_SECONDS = 60.0
ANSWER_SECONDS = 30.0
POLL = 0.05
PHONE, DESK = (390, 844), (1280, 900)
"""Widths and heights of windows, in pixels."""
MOBILE = 800
"""Pixels; a narrower window is a phone's."""
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "End": 35, "Home": 36, "ArrowLeft": 37, "ArrowRight": 39}
"""Codes of the keys that can be pressed."""
TEXTS = {"Enter": "\r", " ": " "}
"""What some of them write."""


class BrowserError(Exception):
    """The browser did not do what it was told."""


@dataclass
class Tab:
    """A page of a browser.

    Attributes:
        requested: the addresses it asked for.
        complaints: what its console says is wrong: errors of scripts, breaches of a policy; not answers with an error.
    """

    socket: aiohttp.ClientWebSocketResponse
    number: int = 0
    requested: list[str] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    async def call(self, method: str, **params: Any) -> Any:  # noqa: ANN401
        """Return the result of a method. Raises: BrowserError."""
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            message = await self._next()
            if message.get("id") == self.number:
                if "error" in message:
                    raise BrowserError(str(message))
                return message["result"]

    async def resize(self, size: tuple[int, int]) -> None:
        """Give the window that size."""
        width, height = size
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < MOBILE,
        )

    async def open(self, url: str, size: tuple[int, int]) -> None:
        """Open a page in a window of that size and wait until it is there."""
        await self.resize(size)
        for domain in ("Network", "Page", "Runtime", "Log"):
            await self.call(f"{domain}.enable")
        self.requested.clear()
        self.complaints.clear()
        await self._load("Page.navigate", url=url)

    async def reload(self) -> None:
        """Load the page anew."""
        await self._load("Page.reload")

    async def _load(self, method: str, **params: Any) -> None:  # noqa: ANN401
        self.events.clear()
        await self.call(method, **params)
        async with asyncio.timeout(START_SECONDS):
            while "Page.loadEventFired" not in self.events:
                await self._next()

    async def value(self, expression: str) -> Any:  # noqa: ANN401
        """Return what an expression gives in the page; a promise is awaited. Raises: BrowserError."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise BrowserError(str(result))
        return result["result"].get("value")

    async def until(self, expression: str, seconds: float = ANSWER_SECONDS) -> Any:  # noqa: ANN401
        """Return the value of an expression once it is a true one; an element is.

        Raises:
            BrowserError: in place of waiting longer.
        """
        last, plain = None, f"(value => value instanceof Node ? true : value)({expression})"
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not (last := await self.value(plain)):  # noqa: ASYNC110 - the page cannot be subscribed to
                    await asyncio.sleep(POLL)
                return last
        text = await self.value("document.body.innerText")
        raise BrowserError(f"{expression} is {last!r} after {seconds:g} s; console: {self.complaints}; page: {text}")

    async def press(self, key: str, *, shift: bool = False) -> None:
        """Press one of `KEYS`."""
        modifiers = 8 if shift else 0
        code = {"key": key, "windowsVirtualKeyCode": KEYS[key], "modifiers": modifiers}
        text = {"text": TEXTS[key]} if key in TEXTS else {}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **code, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **code)

    async def write(self, text: str) -> None:
        """Write a text where the focus is."""
        await self.call("Input.insertText", text=text)

    async def click(self, selector: str) -> None:
        """Click on the first element that a CSS selector finds. Raises: BrowserError, if there is none to be seen."""
        name = json.dumps(selector)
        found = await self.value(
            f"(() => {{ const found = document.querySelector({name}); if (!found) return null;"
            " found.scrollIntoView({block: 'center'}); const box = found.getBoundingClientRect();"
            " return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()"
        )
        if found is None:
            raise BrowserError(f"{selector} cannot be seen")
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=found[0], y=found[1], button="left", clickCount=1)

    async def picture(self, file: Path, *, whole: bool = True) -> None:
        """Write a picture of the page to a PNG file; of what the window shows unless it is the `whole` one."""
        taken = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        await asyncio.to_thread(file.write_bytes, base64.b64decode(taken["data"]))

    async def _next(self) -> dict[str, Any]:
        async with asyncio.timeout(ANSWER_SECONDS):
            message: dict[str, Any] = await self.socket.receive_json()
        method, params = message.get("method", ""), message.get("params", {})
        self.events.append(method)
        if method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif (
            method == "Log.entryAdded"
            and params["entry"]["level"] == "error"
            and params["entry"]["source"] != "network"
        ):
            self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
        return message


def find_browser() -> str | None:
    """Return the path of a browser, or None where none is installed."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.asynccontextmanager
async def browser_tab(browser: str, folder: Path) -> AsyncIterator[Tab]:
    """Run a browser with a profile of its own, and give its page; nothing of it is left afterwards."""
    profile = folder / "profile"
    process = await asyncio.create_subprocess_exec(
        *(browser, *FLAGS, f"--user-data-dir={profile}", "about:blank"), stdout=-3, stderr=-3, process_group=0
    )
    try:
        async with aiohttp.ClientSession() as session:
            async with asyncio.timeout(START_SECONDS):
                port = await _port(profile / "DevToolsActivePort")
                while not (pages := await _pages(session, port)):  # noqa: ASYNC110
                    await asyncio.sleep(POLL)
                socket = await session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
            async with socket:
                yield Tab(socket)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _pages(session: aiohttp.ClientSession, port: str) -> list[dict[str, Any]]:
    """Return the pages that are open: none, when the port is open before the first one."""
    async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
        return [page for page in await response.json() if page["type"] == "page"]


async def _port(file: Path) -> str:
    """Return the port of the browser, once it listens."""
    while "\n" not in (text := _text(file)):  # noqa: ASYNC110
        await asyncio.sleep(POLL)
    return text.split("\n")[0]


def _text(file: Path) -> str:
    return file.read_text(encoding="ascii") if file.exists() else ""
