"""The control API, on its own port."""

import asyncio
import io
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from mock_model.control import CRASH_DELAY, MAX_BODY
from mock_model.serve import MockModel
from mock_model.settings import Settings

BODY: Any = {"model": "m", "messages": [{"role": "user", "content": "a secret prompt"}]}


@pytest.fixture
async def mock() -> AsyncIterator[MockModel]:
    async with MockModel(Settings(port=0, control_port=0, mock_ttft=0, mock_token_interval=0)) as running:
        yield running


@pytest.fixture
async def control(mock: MockModel) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mock.control_url) as session:
        yield session


async def chat(mock: MockModel, **body: Any) -> int:  # noqa: ANN401
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{mock.url}/v1/chat/completions", json={**BODY, **body}) as answer,
    ):
        await answer.read()
        return answer.status


async def test_faults_are_put_read_and_deleted(mock: MockModel, control: aiohttp.ClientSession) -> None:
    entry = {"kind": "status", "with": {"status": 503}, "times": 2, "match": {"path": "/v1/chat/completions"}}
    async with control.put("/faults", json=[entry]) as answer:
        assert answer.status == 200
        assert await answer.json() == [{**entry, "used": 0}]
    statuses = [await chat(mock)]
    async with control.get("/faults") as answer:
        assert await answer.json() == [{**entry, "used": 1}]
    async with control.delete("/faults") as answer:
        assert answer.status == 204
    statuses.append(await chat(mock))
    async with control.get("/faults") as answer:
        assert await answer.json() == []

    assert statuses == [503, 200]


@pytest.mark.parametrize("script", [b"", b"no json", b"\xff", b"[" * 100_000])
async def test_a_script_that_is_no_json_is_a_400(control: aiohttp.ClientSession, script: bytes) -> None:
    async with control.put("/faults", data=script) as answer:
        assert answer.status == 400
        assert (await answer.json())["error"]["code"] == "invalid_json"


async def test_a_bad_script_is_a_400_that_names_entry_and_key_and_changes_nothing(
    mock: MockModel, control: aiohttp.ClientSession
) -> None:
    mock.set_faults([{"kind": "html"}])
    bad = [{"kind": "reset"}, {"kind": "cut", "with": {"how": "sideways"}}]
    async with control.put("/faults", json=bad) as answer:
        error = (await answer.json())["error"]
        assert answer.status == 400
    async with control.get("/faults") as answer:
        assert [entry["kind"] for entry in await answer.json()] == ["html"]

    assert error["message"] == "fault [1] (\"cut\"): with.how: invalid enum value 'sideways'"
    assert error["param"] == "[1].with.how"
    assert error["code"] == "invalid_faults"


async def test_the_journal_is_read_and_deleted(mock: MockModel, control: aiohttp.ClientSession) -> None:
    await chat(mock)
    async with control.get("/journal") as answer:
        journal = await answer.json()
    async with control.delete("/journal") as answer:
        assert answer.status == 204
    async with control.get("/journal") as answer:
        assert await answer.json() == {"total": 0, "dropped": 0, "calls": []}

    assert (journal["total"], journal["dropped"]) == (1, 0)
    assert journal["calls"][0]["ended"] == "complete"
    assert "secret" not in str(journal)


async def test_reset_brings_back_a_fresh_model(mock: MockModel, control: aiohttp.ClientSession) -> None:
    mock.set_faults(
        [
            {"kind": "hang_before_headers", "times": 1},
            {"kind": "refuse", "with": {"seconds": 600}, "times": 1},
            {"kind": "reset"},
        ]
    )
    hanging = asyncio.create_task(chat(mock))
    await mock.called(1)
    with pytest.raises(aiohttp.ClientError):
        await chat(mock, user="refused")
    with pytest.raises(aiohttp.ClientConnectorError):
        await chat(mock)
    async with control.post("/reset") as answer:
        assert answer.status == 204
    with pytest.raises(aiohttp.ServerDisconnectedError):
        await hanging

    assert mock.journal.total == 0
    assert mock.faults.document() == []
    assert await chat(mock) == 200


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "latency", "with": {"delay": 600}},
        {"kind": "slow_first_token", "with": {"delay": 600}},
        {"kind": "drip", "with": {"interval": 600}},
        {"kind": "hang_after_headers"},
        {"kind": "stall"},
    ],
    ids=lambda fault: str(fault["kind"]),
)
@pytest.mark.parametrize("stream", [True, False])
async def test_reset_hangs_up_on_whom_a_fault_makes_wait(
    mock: MockModel,
    control: aiohttp.ClientSession,
    fault: dict[str, Any],
    stream: bool,  # noqa: FBT001
) -> None:
    mock.set_faults([fault])
    waiting = asyncio.create_task(chat(mock, stream=stream))
    await mock.called(1)
    call = mock.journal.calls[0]
    await asyncio.sleep(0.05)
    async with control.post("/reset") as answer:
        assert answer.status == 204
    with pytest.raises(aiohttp.ClientError):
        await asyncio.wait_for(waiting, 5)
    await mock.settled()

    assert (call.fault, call.ended) == (fault["kind"], "fault")
    assert mock.journal.total == 0
    assert await chat(mock) == 200


async def test_a_call_under_way_is_forgotten_with_the_others(mock: MockModel, control: aiohttp.ClientSession) -> None:
    mock.set_faults([{"kind": "hang_before_headers", "times": 1}])
    hanging = asyncio.create_task(chat(mock))
    await mock.called(1)
    async with control.delete("/journal") as answer:
        assert answer.status == 204
    await chat(mock)
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)
    await mock.settled()
    async with control.get("/journal") as answer:
        journal = await answer.json()

    assert (journal["total"], journal["dropped"], len(journal["calls"])) == (1, 0, 1)
    assert journal["calls"][0]["ended"] == "complete"


async def test_crash_is_answered_before_it_happens() -> None:
    crashed = asyncio.Event()
    settings = Settings(port=0, control_port=0)
    async with (
        MockModel(settings, crash=crashed.set) as mock,
        aiohttp.ClientSession(mock.control_url) as control,
        control.post("/crash") as answer,
    ):
        assert answer.status == 202
        await asyncio.wait_for(crashed.wait(), 5)


async def test_metrics_begin_with_the_name_of_the_mock_model(mock: MockModel, control: aiohttp.ClientSession) -> None:
    mock.set_faults([{"kind": "reset", "times": 1}])
    with pytest.raises(aiohttp.ClientError):
        await chat(mock)
    await chat(mock, stream=True)
    async with control.get("/metrics") as answer:
        assert answer.content_type == "text/plain"
        lines = (await answer.text()).splitlines()

    samples = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert all(name.startswith("mock_model_") for name in samples)
    route = 'route="/v1/chat/completions"'
    assert samples[f'mock_model_calls_total{{ended="complete",{route}}}'] == "1.0"
    assert samples[f'mock_model_calls_total{{ended="fault",{route}}}'] == "1.0"
    assert samples['mock_model_faults_total{kind="reset"}'] == "1.0"
    assert samples["mock_model_events_sent_total"] == "19.0"
    assert samples['mock_model_tokens_total{direction="output"}'] == "16.0"
    assert samples["mock_model_in_flight_calls"] == "0.0"


async def test_a_fault_is_counted_when_it_begins(mock: MockModel, control: aiohttp.ClientSession) -> None:
    mock.set_faults([{"kind": "hang_before_headers"}])
    hanging = asyncio.create_task(chat(mock))
    await mock.called(1)
    async with control.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    hanging.cancel()
    await asyncio.gather(hanging, return_exceptions=True)

    assert 'mock_model_faults_total{kind="hang_before_headers"} 1.0' in lines
    assert "mock_model_in_flight_calls 1.0" in lines


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "not_found"),
        ("POST", "/faults", 405, "method_not_allowed"),
        ("PUT", "/faults", 413, "request_too_large"),
    ],
)
async def test_errors_have_openai_s_form(
    control: aiohttp.ClientSession, method: str, path: str, status: int, code: str
) -> None:
    body = io.BytesIO(b" " * (MAX_BODY + 1)) if status == 413 else None
    async with control.request(method, path, data=body) as answer:
        error = (await answer.json())["error"]

    assert answer.status == status
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == code
    assert answer.headers.get("allow") == ("DELETE,GET,HEAD,PUT" if status == 405 else None)


async def test_the_control_api_is_not_on_the_port_of_the_model(mock: MockModel, control: aiohttp.ClientSession) -> None:
    async with control.get(f"{mock.url}/faults") as answer:
        assert answer.status == 404
    async with control.get("/v1/models") as answer:
        assert answer.status == 404


CALLS = [("POST", "/crash"), ("POST", "/reset"), ("PUT", "/faults"), ("DELETE", "/faults"), ("DELETE", "/journal")]
READS = [("GET", "/faults"), ("GET", "/journal"), ("GET", "/metrics")]


class Untouched:
    """A mock model with a fault and a call in its journal, which are still there at the end, and which lives."""

    def __init__(self, mock: MockModel) -> None:
        self._mock = mock
        self.crashes = 0

    async def __aenter__(self) -> None:
        assert await chat(self._mock) == 200
        self._mock.set_faults([{"kind": "html", "times": 5}])
        self._mock.crash = self._count

    async def __aexit__(self, *_: object) -> None:
        await asyncio.sleep(2 * CRASH_DELAY)
        assert self.crashes == 0
        assert self._mock.journal.total == 1
        assert [entry["kind"] for entry in self._mock.faults.document()] == ["html"]

    def _count(self) -> None:
        self.crashes += 1


async def refusal(control: aiohttp.ClientSession, method: str, path: str, **more: Any) -> tuple[int, str, str]:  # noqa: ANN401
    async with control.request(method, path, **more) as answer:
        assert "access-control-allow-origin" not in answer.headers
        error = (await answer.json())["error"]
        return answer.status, error["code"], error["message"]


@pytest.mark.parametrize(("method", "path"), CALLS + READS)
@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8002",
        "127.0.0.1.evil.example",
        "localhost.evil.example:1",
        "",
        ":8002",
        "[evil.example",
    ],
)
async def test_a_name_that_may_be_rebound_is_refused(
    mock: MockModel, control: aiohttp.ClientSession, method: str, path: str, host: str
) -> None:
    async with Untouched(mock):
        status, code, message = await refusal(control, method, path, headers={"Host": host}, json=[])
        assert (status, code) == (403, "host_not_allowed")
        assert "MOCK_CONTROL_HOSTS" in message


@pytest.mark.parametrize(("method", "path"), CALLS + READS)
@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "https://evil.example", "null", "", "http://127.0.0.1", "http://127.0.0.1:1", "file://"],
)
async def test_a_page_of_another_origin_is_refused(
    mock: MockModel, control: aiohttp.ClientSession, method: str, path: str, origin: str
) -> None:
    async with Untouched(mock):
        status, code, _ = await refusal(control, method, path, headers={"Origin": origin}, json=[])
        assert (status, code) == (403, "origin_not_allowed")


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize("site", ["cross-site", "same-site"])
async def test_a_browser_that_says_the_page_is_of_elsewhere_is_believed(
    mock: MockModel, control: aiohttp.ClientSession, method: str, path: str, site: str
) -> None:
    async with Untouched(mock):
        status, code, _ = await refusal(control, method, path, headers={"Sec-Fetch-Site": site})
        assert (status, code) == (403, "origin_not_allowed")


@pytest.mark.parametrize("path", ["/crash", "/reset"])
@pytest.mark.parametrize("form", ["application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "text/plain"])
async def test_what_a_form_can_post_is_refused(
    mock: MockModel, control: aiohttp.ClientSession, path: str, form: str
) -> None:
    async with Untouched(mock):
        status, code, _ = await refusal(control, "POST", path, headers={"Content-Type": form}, data=b"a=b")
        assert (status, code) == (415, "unsupported_media_type")


async def test_a_preflight_gives_no_leave(mock: MockModel, control: aiohttp.ClientSession) -> None:
    asked = {"Origin": "http://evil.example", "Access-Control-Request-Method": "PUT"}
    async with Untouched(mock):
        assert (await refusal(control, "OPTIONS", "/faults", headers=asked))[0] == 403
        assert (await refusal(control, "OPTIONS", "/faults"))[0] == 405


@pytest.mark.parametrize(
    "host",
    [
        *("localhost", "LOCALHOST:8002", "localhost.", "127.0.0.1:1", "[::1]", "[::1]:8002", "192.168.1.5:8002"),
        *("mock-model:8002", "mock-model-b", "mock.team.example:8002", "Mock.Team.Example"),
    ],
)
async def test_programs_reach_it_by_every_name_of_its_own(host: str) -> None:
    settings = Settings(port=0, control_port=0, mock_control_hosts=["else.example", "mock.team.example"])
    async with MockModel(settings) as mock, aiohttp.ClientSession(mock.control_url) as control:
        for origin in ({}, {"Origin": f"http://{host.lower()}", "Sec-Fetch-Site": "same-origin"}):
            async with control.put("/faults", data=b"[]", headers={"Host": host, **origin}) as answer:
                assert answer.status == 200
            async with control.post("/reset", headers={"Host": host, **origin}) as answer:
                assert answer.status == 204
            async with control.post("/reset", headers={"Host": host, **origin}, json={}) as answer:
                assert answer.status == 204
