"""What aiohttp's errors become: a backend's failure, or a shortage of the gateway's own machine."""

import os
import socket
from errno import (
    EADDRNOTAVAIL,
    ECONNREFUSED,
    EHOSTUNREACH,
    EMFILE,
    ENETUNREACH,
    ENFILE,
    ENOBUFS,
    ENOMEM,
    EPERM,
    ETIMEDOUT,
)
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from gateway.backend.failures import failure_of
from gateway.errors import NoConnection, Unreachable, drop_frames
from tests.unit.gateway.fakes import Clock, target

DESCRIPTORS = Path("/proc/self/fd")
NO_NAME = socket.gaierror(socket.EAI_NONAME, "Name or service not known")


def told_of(cause: OSError, kind: type[aiohttp.ClientConnectorError] = aiohttp.ClientConnectorError) -> Any:  # noqa: ANN401
    """What becomes of it."""
    (endpoint,) = target(Clock(), 1).endpoints.values()
    key: Any = None
    try:
        return failure_of(kind(key, cause), endpoint, new=True)
    except NoConnection as shortage:
        drop_frames(shortage)
        return shortage


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (EMFILE, "descriptors"),
        (ENFILE, "descriptors"),
        (EADDRNOTAVAIL, "ports"),
        (ENOBUFS, "buffers"),
        (ENOMEM, "buffers"),
        (socket.EAI_MEMORY, "buffers"),
    ],
)
@pytest.mark.parametrize("kind", [aiohttp.ClientConnectorError, aiohttp.ClientConnectorDNSError])
def test_a_shortage_is_no_failure_of_a_backend(
    number: int, reason: str, kind: type[aiohttp.ClientConnectorError]
) -> None:
    told = told_of(OSError(number, os.strerror(abs(number))), kind)
    assert isinstance(told, NoConnection)
    assert (told.status, told.code, told.reason) == (503, "gateway_overloaded", reason)


def test_a_name_that_cannot_be_resolved_for_want_of_descriptors_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the resolver says of it."""
    unresolved = told_of(NO_NAME, aiohttp.ClientConnectorDNSError)
    assert isinstance(unresolved, Unreachable)
    left = [0]

    def open_one(*_: object) -> int:
        if not left[0]:
            raise OSError(EMFILE, os.strerror(EMFILE))
        left[0] -= 1
        return os.dup(0)

    before = len(list(DESCRIPTORS.iterdir()))
    monkeypatch.setattr(os, "open", open_one)
    for few in (0, 1, 3):
        left[0] = few
        told = told_of(NO_NAME, aiohttp.ClientConnectorDNSError)
        assert isinstance(told, NoConnection)
        assert told.reason == "descriptors"
    monkeypatch.undo()
    assert len(list(DESCRIPTORS.iterdir())) <= before


@pytest.mark.parametrize("number", [ECONNREFUSED, ENETUNREACH, EHOSTUNREACH, ETIMEDOUT, EPERM, None])
def test_why_a_backend_is_unreachable_is_told_in_our_words(number: int | None) -> None:
    words = os.strerror(number) if number is not None else "Multiple exceptions"
    told = told_of(OSError(number, words) if number is not None else OSError(words))
    assert isinstance(told, Unreachable)
    assert told.message.startswith(("a-1 refused the connection", "a-1 could not be reached"))
    assert words not in told.message
