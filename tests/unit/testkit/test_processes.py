"""Child processes: how they start, break and end."""

import asyncio
import os
import random
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from testkit import usage
from testkit.polling import until
from testkit.ports import CONTAINERS, LOOPBACK, PORTS, free_port, free_ports
from testkit.process_table import has_stopped, lives
from testkit.processes import Process, ProcessError, clean_environment, python

Make = Callable[..., Process]
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture
async def make(tmp_path: Path) -> AsyncIterator[Make]:
    """Make a process: a web server, or what `code` says; it is killed at the end."""
    async with AsyncExitStack() as stack:

        def begin(code: str | None = None) -> Process:
            port = free_port()
            server = python("http.server", str(port), "--bind", LOOPBACK)
            process = Process(
                "server",
                server if code is None else [sys.executable, "-c", code],
                env={},
                folder=tmp_path,
                ready_url=f"http://{LOOPBACK}:{port}/",
            )
            stack.push_async_callback(process.kill)
            return process

        yield begin


async def test_a_process_serves_is_stopped_and_serves_again(make: Make) -> None:
    process = make()
    assert not process.running
    for life in (1, 2):
        await process.start()
        assert (process.lives, process.running) == (life, True)
        assert await process.stop() == -15
        assert (process.running, await process.serves()) == (False, False)


async def test_a_process_ends_with_its_block(make: Make) -> None:
    async with make() as process:
        assert process.running
    assert not process.running


async def test_a_frozen_process_answers_again_when_it_is_thawed(make: Make) -> None:
    async with make() as process:
        process.freeze()
        assert has_stopped(process.pid)
        assert not await process.serves()
        process.thaw()
        await process.ready()


async def test_a_process_that_does_not_start_is_an_error_with_its_last_lines(make: Make) -> None:
    process = make("import sys; print('first'); sys.exit('the port is taken')")
    with pytest.raises(ProcessError, match="server ended with exit code 1") as caught:
        await process.start()
    assert caught.value.output.splitlines() == ["first", "the port is taken"] or "taken" in caught.value.output


async def test_a_process_that_does_not_serve_in_time_is_an_error(make: Make) -> None:
    process = make("import time; time.sleep(60)")
    await process.start(wait=False)
    with pytest.raises(ProcessError, match=r"server does not serve http://127\.0\.0\.1:\d+/ after 0\.1 s"):
        await process.ready(0.1)


async def test_a_process_that_ended_says_how(make: Make) -> None:
    process = make("import time; time.sleep(60)")
    with pytest.raises(ProcessError, match="was not started"):
        process.check()
    await process.start(wait=False)
    process.check()
    await process.kill()
    with pytest.raises(ProcessError, match="server was killed by signal 9"):
        process.check()


async def test_a_process_that_does_not_stop_is_killed(make: Make) -> None:
    process = make(STUBBORN)
    await process.start(wait=False)
    await until(lambda: process.output.read_text() == "up\n")
    with pytest.raises(ProcessError, match=r"server did not stop within 0\.2 s"):
        await process.stop(0.2)
    assert not process.running


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it looks into /proc")
async def test_what_a_process_started_ends_with_it(make: Make) -> None:
    process = make(PARENT)
    await process.start(wait=False)
    await until(lambda: process.output.read_text().endswith("\n"))
    child = int(process.output.read_text())
    assert lives(child)
    # It has memory when it has begun to run, which may be later than its parent says.
    await until(lambda: usage.resident_bytes(process.pid) > usage.resident_bytes(child) > 0)
    await process.kill()
    await until(lambda: not lives(child))


async def test_its_lines_are_read_as_they_come(make: Make) -> None:
    process = make("for word in iter(input, ''): print(word)")
    process.output.write_text("an old line\n")
    lines = process.lines()
    waiting = asyncio.ensure_future(anext(lines))
    await asyncio.sleep(0)
    with process.output.open("a") as output:
        output.write("one\ntw")
        output.flush()
        assert await waiting == "one"
        output.write("o\n")
        output.flush()
        assert await anext(lines) == "two"
    await lines.aclose()  # type: ignore[attr-defined]


def test_settings_of_the_shell_reach_no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_BACKEND_URLS", "http://somebody.example")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example")
    found = clean_environment({"PORT": "1"})
    assert found["PORT"] == "1"
    assert found["PATH"] == os.environ["PATH"]
    assert not {"GATEWAY_BACKEND_URLS", "HTTPS_PROXY"} & found.keys()


def test_free_ports_differ() -> None:
    assert len(set(free_ports(20))) == 20
    assert not set(PORTS) & set(CONTAINERS)
    assert set(free_ports(20, CONTAINERS)) < set(CONTAINERS)


def test_a_port_that_was_given_is_not_given_again_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = free_ports(2)
    draw, again = random.randint, [first, second]
    monkeypatch.setattr(random, "randint", lambda *bounds: again.pop() if again else draw(*bounds))
    assert free_port() not in {first, second}
    assert again == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="it reads /proc")
def test_what_this_process_uses() -> None:
    pid = os.getpid()
    assert usage.cpu_seconds(pid) > 0
    assert usage.resident_bytes(pid) > 1e6
    assert usage.open_files(pid).total() > 0
    assert usage.threads(pid) >= 1
    assert usage.run_delay(pid) >= 0
    nobody = 2**22 + 1
    assert usage.run_delay(nobody) == usage.cpu_seconds(nobody) == usage.resident_bytes(nobody) == 0
