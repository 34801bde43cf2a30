"""`make demo` as somebody runs it who has just cloned the repository."""

import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from testkit.completions import CHAT, CHAT_PATH
from testkit.http import answers, ask
from testkit.polling import until
from testkit.ports import LOOPBACK, free_ports
from testkit.process_table import children_of
from testkit.processes import Process, python


class Demo(Process):
    """The demo at ports of its own; nothing of it is left at the end of a test."""

    def __init__(self, folder: Path) -> None:
        self.port, self.mock_port, self.control_port = free_ports(3)
        ports = {"PORT": self.port, "MOCK_PORT": self.mock_port, "MOCK_CONTROL_PORT": self.control_port}
        own = {name: str(port) for name, port in ports.items()} | {
            "MODEL_NAME": "a-model",
            "GATEWAY_CONFIG": "/nowhere",
        }
        self.url = f"http://{LOOPBACK}:{self.port}"
        super().__init__("demo", python("tools.demo"), env=own, folder=folder, ready_url=f"{self.url}/health")

    @property
    def said(self) -> str:
        return self.output.read_text()

    async def says(self, text: str) -> None:
        await until(lambda: text in self.said, lambda: f"{text!r} in {self.said}", seconds=40)


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    process = Demo(tmp_path)
    await process.start(wait=False)
    yield process
    await process.kill()


async def test_the_demo_tells_its_story_shows_each_trace_and_leaves_nothing_running(demo: Demo) -> None:
    await demo.says("Ctrl-C stops everything.")
    assert f"healthy   http://127.0.0.1:{demo.port}/health" in demo.said
    assert f"page      http://localhost:{demo.port}/ui" in demo.said
    assert "headers   HTTP 200" in demo.said
    page = await ask(f"{demo.url}/ui")
    assert (page.status, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    pressed = await ask(f"{demo.url}/ui/mock/heal", method="POST", body={})
    assert pressed.json == {"faults": []}
    await demo.says("└─ gateway: attempt 1, backend-1")  # it goes on if the trace has not come in for a while
    assert "   └─ mock-model: POST /v1/chat/completions" in demo.said
    fault = [{"kind": "status", "with": {"status": 500}, "times": 1}]
    await ask(f"http://{LOOPBACK}:{demo.control_port}/faults", method="PUT", body=fault)
    answer = await ask(demo.url + CHAT_PATH, method="POST", body=CHAT)
    assert (answer.status, answer.attempts) == (200, 2)
    await demo.says(f"trace     {answer.headers['x-trace-id']}")
    assert "500 status_500 -> retry" in demo.said
    for line in re.findall(r"^curl -X PUT .*/faults -d '(.*)'$", demo.said, flags=re.MULTILINE):
        put = await ask(f"http://{LOOPBACK}:{demo.control_port}/faults", method="PUT", body=json.loads(line))
        assert put.status == 200, put
    assert "   gateway |" in demo.said, "its log is shown"
    demo.signal(signal.SIGTERM)
    assert await demo.wait() == 0
    assert demo.said.endswith("stopped\n")
    for port in (demo.port, demo.mock_port):
        assert not await answers(f"http://{LOOPBACK}:{port}/health")


async def test_a_second_signal_ends_at_once_what_does_not_stop(demo: Demo) -> None:
    await demo.says("Ctrl-C stops everything.")
    mock_model = child(demo.pid, "mock_model")
    os.kill(mock_model, signal.SIGSTOP)
    demo.signal(signal.SIGINT)
    await demo.says("stopping")
    demo.signal(signal.SIGINT)
    assert await demo.wait() == 0
    assert demo.said.endswith("stopped\n")
    assert not Path(f"/proc/{mock_model}").exists()  # noqa: ASYNC240


async def test_a_gateway_that_ends_ends_the_demo(demo: Demo) -> None:
    await demo.says("Ctrl-C stops everything.")
    os.kill(child(demo.pid, "gateway"), signal.SIGKILL)
    assert await demo.wait() == 1
    assert demo.said.endswith("demo: gateway was killed by signal 9\n")


def child(pid: int, module: str) -> int:
    """The process of that module that another one has started."""
    if not sys.platform.startswith("linux"):
        pytest.skip("it looks for its children in /proc")
    (found,) = (one for one in children_of(pid) if f"-m\0{module}\0" in Path(f"/proc/{one}/cmdline").read_text())
    return found


async def test_a_port_that_is_taken_or_wrong_is_told_in_one_line(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    with socket.create_server((LOOPBACK, demo.mock_port)):
        await demo.start(wait=False)
        assert await demo.wait() == 1
    assert demo.said == (
        f"demo: port {demo.mock_port}: Address already in use; choose another one: make demo MOCK_PORT=...\n"
    )
    other = Demo(tmp_path)
    other.env = {**other.env, "PORT": "eight"}
    other.output.unlink()
    await other.start(wait=False)
    assert await other.wait() == 1
    assert other.said == "demo: PORT=eight is not a port: give a whole number from 1 to 65535\n"


async def test_a_model_that_is_not_known_is_told_with_those_that_are(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.env = {**demo.env, "MODEL": "gpt-4"}
    await demo.start(wait=False)
    assert await demo.wait() == 1
    assert demo.said == "demo: MODEL=gpt-4 is not known: give smollm2, or nothing for the mock model\n"


async def test_a_setting_that_is_wrong_is_told_with_what_the_process_said(tmp_path: Path) -> None:
    demo = Demo(tmp_path)
    demo.env = {**demo.env, "GATEWAY_IDLE_TIMEOUT": "-1"}
    await demo.start(wait=False)
    assert await demo.wait() == 1
    assert "GATEWAY_IDLE_TIMEOUT='-1'" in demo.said
    assert demo.said.endswith("demo: gateway ended with exit code 2\n")
