"""Waiting for what no event announces."""

import asyncio
import inspect
import time
from collections.abc import Callable
from http.client import HTTPException
from typing import TypeVar

PATIENCE = 20.0
"""Seconds until something counts as missing: far more than a busy machine needs."""
STEP = 0.01
"""Seconds between two looks."""

T = TypeVar("T")


async def until(
    check: Callable[[], object],
    what: str | Callable[[], str] = "what was waited for",
    *,
    seconds: float = PATIENCE,
    every: float = STEP,
) -> None:
    """Wait until `check` returns something true, or a coroutine that does.

    Args:
        check: Called until its result is true.
        what: What is waited for, for the error message.
        seconds: How long to wait.
        every: Seconds between two calls.

    Raises:
        TimeoutError: It did not happen in time.
    """
    try:
        async with asyncio.timeout(seconds) as limit:
            while True:
                result = check()
                if await result if inspect.isawaitable(result) else result:
                    return
                await asyncio.sleep(every)
    except TimeoutError:
        if not limit.expired():
            raise
        raise TimeoutError(f"not within {seconds:g} s: {what if isinstance(what, str) else what()}") from None


def wait_for(check: Callable[[], T], what: str, seconds: float, every: float = 0.1) -> T:
    """Call `check` until it returns something true, and return that; the counterpart of `until` outside of asyncio.

    A failed connection, a failed assertion, and a document without the wanted key count as false.

    Raises:
        TimeoutError: It did not happen within `seconds`.
    """
    end = time.monotonic() + seconds
    seen: object = None
    while True:
        try:
            seen = result = check()
            if result:
                return result
        except (OSError, HTTPException, AssertionError, KeyError, ValueError) as error:
            seen = error
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds:g} s: {what}; last seen: {seen!r}")
        time.sleep(every)
