"""curl tells by its exit code whether an answer is whole."""

import asyncio
import json
import shutil
from asyncio.subprocess import DEVNULL, PIPE

import pytest

from testkit.completions import CHAT, CHAT_PATH
from testkit.polling import until
from testkit.processes import clean_environment, spawn
from testkit.servers import Gateway, MockModel
from tests.real.conftest import journal

pytestmark = pytest.mark.asyncio(loop_scope="session")

PARTIAL_FILE, HTTP_ERROR, TIMED_OUT = 18, 22, 28
"""Exit codes of curl."""


async def curl(gateway: Gateway, *options: str, **changes: object) -> tuple[int, str]:
    """Post a prompt; return the exit code and what curl wrote."""
    program = shutil.which("curl")
    assert program is not None, "curl is needed"
    data = json.dumps(CHAT | changes)
    command = [program, "-sN", *options, gateway.url + CHAT_PATH, "-H", "content-type: application/json", "-d", data]
    process = await spawn(command, env=clean_environment({}), stdout=PIPE, stderr=DEVNULL)
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("version", ["--http1.1", "--http1.0"])
async def test_a_whole_answer_is_a_success(mock: MockModel, behind: Gateway, *, stream: bool, version: str) -> None:
    code, output = await curl(behind, version, stream=stream)

    assert code == 0
    assert output.endswith("data: [DONE]\n\n" if stream else "}")


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_a_cut_stream_is_a_failure_though_the_model_may_have_ended_it_properly(
    mock: MockModel, behind: Gateway, how: str
) -> None:
    await mock.faults({"kind": "cut", "with": {"after_events": 3, "how": how}})

    code, output = await curl(behind, stream=True)

    assert code == PARTIAL_FILE
    assert '"code":"backend_invalid_response"' in output.splitlines()[-2] + output.splitlines()[-1]
    assert "[DONE]" not in output


async def test_an_error_answer_fails_where_that_is_asked_for(mock: MockModel, behind: Gateway) -> None:
    await mock.faults({"kind": "status", "with": {"status": 400}})

    code, _ = await curl(behind, "--fail")

    assert code == HTTP_ERROR


async def test_a_curl_that_gives_up_stops_the_model(mock: MockModel, behind: Gateway) -> None:
    await mock.faults({"kind": "stall", "with": {"after_events": 3}})

    code, output = await curl(behind, "--max-time", "2", stream=True)

    async def left() -> bool:
        return [call["ended"] for call in await journal(mock)] == ["caller_left"]

    assert code == TIMED_OUT
    assert output
    await until(left, "the model sees it")
