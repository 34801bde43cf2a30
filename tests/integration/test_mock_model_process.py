"""`python -m mock_model` as a real process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest

from testkit.ports import free_ports

ROOT = Path(__file__).parents[2]
BODY = {"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}]}


class Process:
    """A mock model that is up."""

    def __init__(self, **environment: str) -> None:
        self.port, self.control_port = free_ports(2)
        self.process = start(PORT=str(self.port), CONTROL_PORT=str(self.control_port), **environment)
        deadline = time.monotonic() + 40
        while True:
            try:
                self.call("/health")
            except OSError:
                assert self.process.poll() is None, self.process.communicate()
                assert time.monotonic() < deadline, "the mock model does not come up"
                time.sleep(0.05)
            else:
                break

    def call(self, path: str, body: Any = None, *, method: str | None = None, control: bool = False) -> Any:  # noqa: ANN401
        port = self.control_port if control else self.port
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            content = answer.read()
            return json.loads(content) if content else None

    def chat(self) -> Any:  # noqa: ANN401
        return self.call("/v1/chat/completions", BODY)

    def hang(self) -> socket.socket:
        """A connection whose call is under way for ever."""
        self.call("/faults", [{"kind": "stall"}], method="PUT", control=True)
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=20)
        content = json.dumps({**BODY, "stream": True}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        assert connection.recv(20).startswith(b"HTTP/1.1 200 OK")
        return connection

    def end(self) -> tuple[int, str]:
        """The exit code, and what it wrote to stderr."""
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


def start(**environment: str) -> subprocess.Popen[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "MOCK_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "mock_model"],
        cwd=ROOT,
        env={**clean, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def run() -> Iterator[Callable[..., Process]]:
    running: list[Process] = []

    def begin(**environment: str) -> Process:
        running.append(Process(**environment))
        return running[-1]

    yield begin
    for one in running:
        if one.process.poll() is None:
            one.process.kill()
            one.process.communicate(timeout=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_cleanly_whoever_hangs(run: Callable[..., Process], number: signal.Signals) -> None:
    mock = run(APP_MODE="prod")
    with mock.hang():
        begun = time.monotonic()
        mock.process.send_signal(number)
        code, errors = mock.end()

    assert code == 0
    assert time.monotonic() - begun < 10
    lines = [json.loads(line) for line in errors.splitlines()]
    assert [line["level"] for line in lines] == ["info"]
    assert "secret" not in errors


def test_the_journal_file_survives_a_kill(run: Callable[..., Process], tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    mock = run(MOCK_JOURNAL_FILE=str(file))
    for _ in range(3):
        mock.chat()
    with mock.hang():
        mock.process.kill()
        mock.end()
    again = run(MOCK_JOURNAL_FILE=str(file))
    again.chat()

    events = [json.loads(line)["event"] for line in file.read_text().splitlines()]
    assert events == ["started", *["arrived", "ended"] * 3, "arrived", "started", "arrived", "ended"]
    assert "secret" not in file.read_text()


def test_crash_ends_the_process(run: Callable[..., Process]) -> None:
    by_control, by_fault = run(), run()
    by_control.call("/crash", method="POST", control=True)
    by_fault.call("/faults", [{"kind": "crash"}], method="PUT", control=True)
    with pytest.raises((OSError, HTTPException)):
        by_fault.chat()

    assert by_control.end()[0] == 70
    assert by_fault.end()[0] == 70


def test_answers_are_the_same_in_another_process(run: Callable[..., Process]) -> None:
    assert run(MOCK_SEED="3").chat() == run(MOCK_SEED="3").chat()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"PORT": "eight"}, "PORT='eight' is not allowed: it must be a whole number from 0 to 65535"),
        ({"MOCK_TTFT": "-1"}, "MOCK_TTFT='-1' is not allowed: it must be a number of seconds from 0 to 86400"),
        ({"MOCK_JOURNAL_FILE": "/nowhere/x"}, "MOCK_JOURNAL_FILE='/nowhere/x' is not allowed: it must be a file"),
    ],
)
def test_a_bad_setting_is_one_line_and_exit_code_2(environment: dict[str, str], expected: str) -> None:
    process = start(**environment)
    _, errors = process.communicate(timeout=20)

    assert process.returncode == 2
    assert errors.startswith(f"mock_model: {expected}")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("name", ["PORT", "CONTROL_PORT"])
def test_a_port_in_use_is_one_line_and_exit_code_1(name: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process = start(**{"PORT": "0", "CONTROL_PORT": "0", name: str(port)})
        _, errors = process.communicate(timeout=20)

    assert process.returncode == 1
    assert errors == f"mock_model: cannot listen on 127.0.0.1:{port}: Address already in use\n"
