"""`llm-gateway export ID`: an incident becomes a script of the mock model and an experiment, and fails the same way."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from chaos.experiment import read
from gateway.export import main, scripts_of
from testkit.completions import CHAT
from tests.integration.gateways import REFUSED, Gateway, StartGateway, StartMock, get, soon
from tests.integration.test_why_command import command

QUICK: dict[str, Any] = {"gateway_backoff_initial": 0.01}


async def incident(gateway: Gateway, *, stream: bool) -> dict[str, Any]:
    """What is kept of a request that was sent now."""
    answer = await gateway.chat(stream=stream)
    document: dict[str, Any] = json.loads((await get(gateway, f"/requests/{answer.headers['x-trace-id']}")).body)
    return document


def told(document: dict[str, Any]) -> list[tuple[str, str | None, str]]:
    """What failed, in order, and the sentence without its numbers."""
    attempts = [(each["outcome"], each["message"], "") for each in document["attempts_made"]]
    return [*attempts, ("", None, re.sub(r"\d+(\.\d+)? (ms|s)\b", "T", document["why"]))]


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "with": {"status": 502}, "times": 2},
        {"kind": "status", "with": {"status": 429, "headers": {"retry-after-ms": "50"}}, "times": 1},
        {"kind": "status", "with": {"status": 400}},
        {"kind": "status", "with": {"status": 401}},
        {"kind": "status", "with": {"status": 200, "body": {"error": {"message": "x", "code": 503}}}, "times": 1},
        {"kind": "hang_before_headers"},
        {"kind": "hang_after_headers"},
        {"kind": "stall", "with": {"after_events": 4}},
        {"kind": "cut", "with": {"after_events": 4, "how": "reset"}},
        {"kind": "cut", "with": {"after_events": 0}},
        {"kind": "malformed_event", "with": {"after_events": 4}},
        {"kind": "error_event", "with": {"after_events": 4}},
        {"kind": "error_event", "with": {"after_events": 0}, "times": 1},
        {"kind": "html", "times": 1},
        {"kind": "not_json", "times": 1},
        {"kind": "short_body", "with": {"bytes": 12}},
        {"kind": "reset", "times": 2},
    ],
    ids=lambda fault: "-".join([fault["kind"], *map(str, fault.get("with", {}).values())])[:40],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_the_script_of_an_incident_makes_the_same_incident_again(
    start_mock: StartMock, start_gateway: StartGateway, fault: dict[str, Any], *, stream: bool
) -> None:
    first = await start_mock(mock_token_interval=0.005)
    settings = QUICK | soon(fault["kind"], stream=stream)
    gateway = await start_gateway(first, **settings)
    first.set_faults([fault])
    before = await incident(gateway, stream=stream)
    scripts = scripts_of(before)
    if before["attempts"] == 1 and before["outcome"] == "ok":
        assert scripts == {}
        return
    assert list(scripts) == ["backend-1"]
    second = await start_mock(mock_token_interval=0.005)
    gateway = await start_gateway(second, **settings)
    second.set_faults(scripts["backend-1"])
    assert told(await incident(gateway, stream=stream)) == told(before)


async def test_the_files_are_written_and_the_experiment_can_be_read(
    start_mock: StartMock, start_gateway: StartGateway, tmp_path: Path
) -> None:
    one, two = await start_mock(), await start_mock()
    gateway = await start_gateway(one, two, **QUICK)
    for mock in (one, two):
        mock.set_faults([{"kind": "status", "with": {"status": 503}, "times": 1}])
    answer = await gateway.chat(headers={"x-request-id": 'it\'s/"mine"#'})
    id_ = answer.headers["x-trace-id"]
    code, out, err = await command("export", id_, "--url", gateway.url, "--out", str(tmp_path))
    assert (code, err) == (0, "")
    script, experiment = map(Path, out.splitlines())
    faults = json.loads(script.read_text())
    assert faults == [{"kind": "status", "with": {"status": 503, "headers": {}}, "times": 1}] * 2
    found = read(experiment)
    assert found.system.mocks == 2
    assert [(step.do, step.mock) for step in found.steps] == [
        ("faults", 1),
        ("faults", 2),
        ("heal", 1),
        ("heal", 2),
    ]
    assert {promise.measure: promise.at_least for promise in found.promises}["failed_attempts"] == 2
    assert CHAT["messages"][0]["content"] not in experiment.read_text()
    good = (await gateway.chat()).headers["x-request-id"]
    code, out, err = await command("export", good, "--url", gateway.url, "--out", str(tmp_path))
    assert (code, out) == (1, "")
    assert err == "export: no attempt of this request failed at a backend; there is nothing to play\n"


def test_a_gateway_that_does_not_answer_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["x", "--url", REFUSED]) == 1
    assert capsys.readouterr().err.startswith("export: no gateway answers at ")
