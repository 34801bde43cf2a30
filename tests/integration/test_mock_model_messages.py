# ruff: noqa: ANN401
"""Anthropic's messages of the mock model on real sockets: answers, errors, and every fault that fits."""

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from mock_model.serve import MockModel
from mock_model.settings import Settings

PATH = "/v1/messages"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 100}
STREAM = {**BODY, "stream": True}
NAMES = [
    "message_start",
    "content_block_start",
    "ping",
    *["content_block_delta"] * 4,
    "content_block_stop",
    "message_delta",
    "message_stop",
]
ERROR_KEYS = {"type", "message"}


@pytest.fixture
async def mock() -> AsyncIterator[MockModel]:
    fast: Any = {"mock_ttft": 0, "mock_token_interval": 0, "mock_tokens": 4}
    async with MockModel(Settings(port=0, control_port=0, **fast)) as running:
        yield running


@pytest.fixture
async def http(mock: MockModel) -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(mock.url) as session:
        yield session


class Got:
    """An answer, as far as it came."""

    def __init__(self, status: int, headers: Any, content: bytes, *, whole: bool) -> None:
        self.status = status
        self.headers = headers
        self.content = content
        self.whole = whole

    @property
    def names(self) -> list[str]:
        lines = self.content.decode(errors="replace").split("\n")
        return [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]

    @property
    def error(self) -> Any:
        document = json.loads(self.content)
        assert document.keys() == {"type", "error"}
        assert document["type"] == "error"
        assert document["error"].keys() == ERROR_KEYS
        return document["error"]


async def post(http: aiohttp.ClientSession, body: Any, path: str = PATH, method: str = "POST") -> Got:
    async with http.request(method, path, json=body, timeout=aiohttp.ClientTimeout(20)) as answer:
        content, whole = b"", True
        try:
            async for data in answer.content.iter_any():
                content += data
        except (aiohttp.ClientPayloadError, ConnectionResetError):
            whole = False
        return Got(answer.status, answer.headers, content, whole=whole)


def script(mock: MockModel, kind: str, **parameters: Any) -> None:
    mock.set_faults([{"kind": kind, "with": parameters}])


async def test_a_message_streamed_and_not(mock: MockModel, http: aiohttp.ClientSession) -> None:
    whole, streamed = await post(http, BODY), await post(http, STREAM)

    assert json.loads(whole.content)["content"][0]["type"] == "text"
    assert whole.headers["request-id"].startswith("req_")
    assert "anthropic-organization-id" in whole.headers
    assert "openai-version" not in whole.headers
    assert streamed.headers["content-type"] == "text/event-stream"
    assert streamed.names == NAMES
    assert [(call.path, call.model, call.events_sent) for call in mock.journal.calls] == [
        (PATH, "m", 0),
        (PATH, "m", 10),
    ]


async def test_tokens_are_counted(mock: MockModel, http: aiohttp.ClientSession) -> None:
    got = await post(http, BODY, f"{PATH}/count_tokens")

    assert json.loads(got.content) == {"input_tokens": 2}
    assert mock.journal.calls[0].path == f"{PATH}/count_tokens"


@pytest.mark.parametrize(
    ("call", "body", "status", "kind"),
    [
        (("POST", PATH), {"messages": []}, 400, "invalid_request_error"),
        (("POST", PATH), [], 400, "invalid_request_error"),
        (("GET", PATH), None, 405, "invalid_request_error"),
        (("POST", f"{PATH}/batches"), {}, 404, "not_found_error"),
        (("POST", f"{PATH}/count_tokens"), {}, 400, "invalid_request_error"),
    ],
)
async def test_errors_of_its_own_are_anthropics(
    http: aiohttp.ClientSession, call: tuple[str, str], body: Any, status: int, kind: str
) -> None:
    method, path = call
    got = await post(http, body, path, method)

    assert (got.status, got.error["type"]) == (status, kind)


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_errors_of_faults_are_anthropics(mock: MockModel, http: aiohttp.ClientSession, body: Any) -> None:
    script(mock, "status", status=529)
    overloaded = await post(http, body)
    script(mock, "overload", capacity=0, status=529, retry_after=2)
    full = await post(http, body)

    assert (overloaded.status, overloaded.error["type"]) == (529, "overloaded_error")
    assert (full.status, full.error["type"], full.headers["retry-after"]) == (529, "overloaded_error", "2")


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("after", [0, 1, 4, 9])
async def test_cut(mock: MockModel, http: aiohttp.ClientSession, how: str, after: int) -> None:
    script(mock, "cut", after_events=after, how=how)
    got = await post(http, STREAM)

    assert (got.names, got.whole) == (NAMES[:after], how == "end")


async def test_cut_inside_a_character_of_the_text(mock: MockModel, http: aiohttp.ClientSession) -> None:
    for body, name in ((STREAM, b'"text":"'), ({**STREAM, "thinking": {"type": "enabled"}}, b'"thinking":"')):
        script(mock, "cut", after_events=3, where="inside_character")
        got = await post(http, body)

        assert got.content.endswith(name + "…".encode()[:2])


@pytest.mark.parametrize(("kind", "missing"), [("no_done", 1), ("no_finish", 2)])
async def test_a_stream_without_its_end(mock: MockModel, http: aiohttp.ClientSession, kind: str, missing: int) -> None:
    script(mock, kind)
    got = await post(http, STREAM)

    assert got.whole
    assert got.names == NAMES[:-missing]


async def test_a_malformed_event_has_a_name_that_clients_know(mock: MockModel, http: aiohttp.ClientSession) -> None:
    script(mock, "malformed_event", after_events=5)
    got = await post(http, STREAM)
    data = [event.partition("data: ")[2] for event in got.content.decode().split("\n\n") if event]

    assert got.names == [*NAMES[:5], NAMES[5], *NAMES[5:]]
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(data[5])


async def test_pings_are_events_here(mock: MockModel, http: aiohttp.ClientSession) -> None:
    script(mock, "pings", count=2, interval=0)
    got = await post(http, STREAM)

    assert got.names == [*NAMES[:3], "ping", "ping", *NAMES[3:]]


@pytest.mark.parametrize("after", [0, 4])
async def test_an_error_event_is_the_last_one(mock: MockModel, http: aiohttp.ClientSession, after: int) -> None:
    script(mock, "error_event", after_events=after)
    usual = await post(http, STREAM)
    script(mock, "error_event", after_events=after, error={"type": "api_error", "message": "mine"})
    given = await post(http, STREAM)
    last = [json.loads(got.content.decode().rstrip("\n").rpartition("data: ")[2]) for got in (usual, given)]

    assert usual.names == given.names == [*NAMES[:after], "error"]
    assert last[0]["type"] == "error"
    assert last[0]["error"].keys() == ERROR_KEYS
    assert last[0]["error"]["type"] == "overloaded_error"
    assert last[1] == {"type": "error", "error": {"type": "api_error", "message": "mine"}}
    assert {(call.fault, call.ended, call.events_sent) for call in mock.journal.calls} == {
        ("error_event", "fault", after + 1)
    }


@pytest.mark.parametrize("kind", ["latency", "slow_first_token", "drip"])
@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_late_messages_are_good_ones(mock: MockModel, http: aiohttp.ClientSession, kind: str, body: Any) -> None:
    usual = await post(http, body)
    parameters: Any = {"bytes": 100, "interval": 0} if kind == "drip" else {"delay": 0.01}
    script(mock, kind, **parameters)
    got = await post(http, body)

    assert got.content == usual.content
    await mock.settled()
    assert (mock.journal.calls[-1].fault, mock.journal.calls[-1].ended) == (kind, "complete")


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_answers_that_are_none(mock: MockModel, http: aiohttp.ClientSession, body: Any) -> None:
    script(mock, "html")
    html = await post(http, body)
    script(mock, "not_json")
    garbage = await post(http, body)
    script(mock, "content_type", value="text/plain")
    plain = await post(http, body)
    script(mock, "short_body")
    short = await post(http, body)

    assert html.headers["content-type"].startswith("text/html")
    assert garbage.headers["content-type"] == "application/json"
    assert plain.headers["content-type"].startswith("text/plain")
    assert not short.whole
