"""Retries by failure class: each row of the table, counted at the backend."""

import asyncio
import json
import socket
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.trace import SpanKind

from mock_model.serve import MockModel
from testkit.http import Answer
from testkit.polling import until
from testkit.sse import Events
from tests.integration.backends_raw import ANSWER, RawCall, StartRaw, chunk, full_backlog
from tests.integration.gateways import Gateway, StartGateway, StartMock, prefer
from tests.integration.stopwatch import Stopwatch

AT_ONCE, BACKOFF, COOLDOWN, NOT = "at once", "backoff", "cooldown", "not"
QUICK: dict[str, Any] = {
    "gateway_backoff_initial": 0.02,
    "gateway_backoff_max": 0.02,
    "gateway_breaker_failures": 100,
}


def status(number: int, *, code: str | None = None, **headers: str) -> dict[str, Any]:
    """A fault: an error answer."""
    fault: dict[str, Any] = {"status": number, "headers": {name.replace("_", "-"): v for name, v in headers.items()}}
    if code is not None:
        fault["body"] = {"error": {"message": "no", "type": "oh", "param": None, "code": code}}
    return {"kind": "status", "with": fault}


@dataclass(frozen=True)
class Row:
    """A failure, and what follows.

    Attributes:
        fault: what every call of the failing replica meets.
        calls: at a replica that is alone, in one request.
        elsewhere: when another replica is tried: at once, after a backoff, or not.
        waits: what a replica that is alone is asked again after: a backoff, or its cooldown.
        status, code, param: what the caller gets in the end.
        stream: whether a stream is asked for.
        settings: of the gateway, beside `QUICK`.
    """

    fault: dict[str, Any]
    calls: int
    elsewhere: str
    status: int
    code: str | None
    param: str | None = None
    stream: bool = False
    waits: str = BACKOFF
    settings: dict[str, Any] = field(default_factory=dict)


def cut(how: str, where: str, events: int = 1) -> dict[str, Any]:
    return {"kind": "cut", "with": {"after_events": events, "how": how, "where": where}}


def stall(events: int = 1) -> dict[str, Any]:
    return {"kind": "stall", "with": {"after_events": events}}


UNREADABLE = "backend_invalid_response"
TIMEOUT = "backend_timeout"
IDLE = {"gateway_idle_timeout": 0.25}
SILENT = {"gateway_first_token_timeout": 0.3, "gateway_answer_timeout": 0.3}
ROWS = {
    "reset before headers": Row({"kind": "reset"}, 3, AT_ONCE, 502, "backend_connection_error"),
    "reset, stream": Row({"kind": "reset"}, 3, AT_ONCE, 502, "backend_connection_error", stream=True),
    "429 with retry-after": Row(status(429, retry_after="0.05"), 3, AT_ONCE, 429, "mock_429", waits=COOLDOWN),
    "503 with retry-after-ms": Row(status(503, retry_after_ms="50"), 3, AT_ONCE, 503, "mock_503", waits=COOLDOWN),
    "429 with a retry-after too long": Row(status(429, retry_after="60"), 1, AT_ONCE, 429, "mock_429"),
    "503 with a retry-after too long": Row(status(503, retry_after="60"), 1, AT_ONCE, 503, "mock_503"),
    "429": Row(status(429), 3, AT_ONCE, 429, "mock_429", waits=COOLDOWN),
    "503": Row(status(503), 3, BACKOFF, 503, "mock_503"),
    "429 with garbage": Row(status(429, retry_after="soon"), 3, AT_ONCE, 429, "mock_429", waits=COOLDOWN),
    "503 with a negative one": Row(status(503, retry_after="-1"), 3, BACKOFF, 503, "mock_503"),
    "408": Row(status(408), 3, BACKOFF, 408, "mock_408"),
    "500": Row(status(500), 3, BACKOFF, 500, "mock_500"),
    "500, stream": Row(status(500), 3, BACKOFF, 500, "mock_500", stream=True),
    "502": Row(status(502), 3, BACKOFF, 502, "mock_502"),
    "504": Row(status(504), 3, BACKOFF, 504, "mock_504"),
    "529": Row(status(529), 3, BACKOFF, 529, "mock_529"),
    "cut body": Row(cut("end", "between"), 3, BACKOFF, 502, UNREADABLE),
    "reset body": Row(cut("reset", "between"), 3, BACKOFF, 502, UNREADABLE),
    "short body": Row({"kind": "short_body"}, 3, BACKOFF, 502, UNREADABLE),
    "no json": Row({"kind": "not_json"}, 3, BACKOFF, 502, UNREADABLE),
    "html": Row({"kind": "html"}, 3, BACKOFF, 502, UNREADABLE),
    "wrong type": Row({"kind": "content_type", "with": {"value": "text/html"}}, 3, BACKOFF, 502, UNREADABLE),
    "stream for json": Row(
        {"kind": "content_type", "with": {"value": "text/event-stream"}}, 1, AT_ONCE, 502, UNREADABLE
    ),
    "stalled body": Row(stall(), 1, AT_ONCE, 504, TIMEOUT, "idle", settings=IDLE),
    "cut stream": Row(cut("end", "between"), 3, BACKOFF, 502, UNREADABLE, stream=True),
    "reset stream": Row(cut("reset", "inside_event"), 3, BACKOFF, 502, UNREADABLE, stream=True),
    "stream cut in a letter": Row(cut("end", "inside_character"), 3, BACKOFF, 502, UNREADABLE, stream=True),
    "empty stream": Row(cut("end", "between", 0), 3, BACKOFF, 502, UNREADABLE, stream=True),
    "garbage in a stream": Row({"kind": "malformed_event"}, 3, BACKOFF, 502, UNREADABLE, stream=True),
    "html for a stream": Row({"kind": "html"}, 3, BACKOFF, 502, UNREADABLE, stream=True),
    "garbage as json for a stream": Row({"kind": "not_json"}, 3, BACKOFF, 502, UNREADABLE, stream=True),
    "json for a stream": Row(
        {"kind": "status", "with": {"status": 200, "body": {"id": "x", "choices": []}}},
        1,
        AT_ONCE,
        502,
        UNREADABLE,
        stream=True,
    ),
    "stalled stream": Row(stall(), 1, AT_ONCE, 504, TIMEOUT, "idle", stream=True, settings=IDLE),
    "silent": Row({"kind": "hang_before_headers"}, 1, AT_ONCE, 504, TIMEOUT, "answer", settings=SILENT),
    "silent stream": Row(
        {"kind": "hang_before_headers"}, 1, AT_ONCE, 504, TIMEOUT, "first_token", stream=True, settings=SILENT
    ),
    "headers only": Row(
        {"kind": "hang_after_headers"}, 1, AT_ONCE, 504, TIMEOUT, "first_token", stream=True, settings=SILENT
    ),
    "role only": Row(stall(), 1, AT_ONCE, 504, TIMEOUT, "first_token", stream=True, settings=SILENT),
    "401": Row(status(401), 1, AT_ONCE, 502, "backend_auth_error"),
    "403": Row(status(403), 1, AT_ONCE, 502, "backend_auth_error"),
    "403 about the content": Row(status(403, code="content_filter"), 1, NOT, 403, "content_filter"),
    "400": Row(status(400), 1, NOT, 400, "mock_400"),
    "404": Row(status(404, code="oh"), 1, NOT, 404, "oh"),
    "404 for the model": Row(status(404, code="model_not_found"), 1, AT_ONCE, 404, "model_not_found"),
    "409": Row(status(409), 1, NOT, 409, "mock_409"),
    "422, stream": Row(status(422), 1, NOT, 422, "mock_422", stream=True),
    "quota spent": Row(status(429, code="insufficient_quota"), 1, NOT, 429, "insufficient_quota"),
    "context too long": Row(status(400, code="context_length_exceeded"), 1, NOT, 400, "context_length_exceeded"),
}
each_row = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS.keys())


def check_failure(answer: Answer, row: Row) -> None:
    assert (answer.status, answer.error["code"], answer.error["param"]) == (row.status, row.code, row.param)


@each_row
async def test_one_replica(mock: MockModel, start_gateway: StartGateway, row: Row) -> None:
    gateway = await start_gateway(mock, **QUICK | row.settings)
    mock.set_faults([row.fault])
    answer = await gateway.chat(stream=row.stream)
    assert mock.journal.total == row.calls
    assert answer.attempts == row.calls
    check_failure(answer, row)
    assert len(answer.waits(row.waits)) == row.calls - 1, "alone, it is asked again only after a sleep"
    assert not answer.waits(BACKOFF if row.waits == COOLDOWN else COOLDOWN)
    await mock.settled()
    assert {call.ended for call in mock.journal.calls} <= {"fault", "caller_left"}


@each_row
async def test_one_replica_that_recovers(mock: MockModel, start_gateway: StartGateway, row: Row) -> None:
    gateway = await start_gateway(mock, **QUICK | row.settings)
    mock.set_faults([{**row.fault, "times": 1}])
    answer = await gateway.chat(stream=row.stream)
    if row.calls == 1:
        check_failure(answer, row)
        assert mock.journal.total == 1
        return
    assert answer.status == 200
    assert mock.journal.total == answer.attempts == 2
    await mock.settled()
    assert mock.journal.calls[-1].ended == "complete"
    if row.stream:
        events = Events(answer.body)
        assert events.done == 1
        assert not events.errors
        assert len([d for d in events.documents if d["choices"][0]["delta"].get("role")]) == 1, "nothing of the first"


@each_row
async def test_another_replica(start_mock: StartMock, start_gateway: StartGateway, row: Row) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **QUICK | row.settings)
    prefer(gateway, "backend-1")
    bad.set_faults([row.fault])
    answer = await gateway.chat(stream=row.stream)
    assert bad.journal.total == 1, "a retry prefers the replica that has not failed"
    if row.elsewhere == NOT:
        assert good.journal.total == 0
        check_failure(answer, row)
        return
    assert good.journal.total == 1
    assert answer.status == 200
    assert answer.attempts == 2
    assert answer.headers["x-gateway-backend"] == "backend-2"
    assert len(answer.backoffs) == (1 if row.elsewhere == BACKOFF else 0)
    assert not answer.waits(COOLDOWN)
    await good.settled()
    assert good.journal.calls[0].ended == "complete"


@each_row
async def test_both_replicas(start_mock: StartMock, start_gateway: StartGateway, row: Row) -> None:
    mocks = [await start_mock(), await start_mock()]
    gateway = await start_gateway(*mocks, **QUICK | row.settings)
    for mock in mocks:
        mock.set_faults([row.fault])
    answer = await gateway.chat(stream=row.stream)
    totals = sorted(mock.journal.total for mock in mocks)
    check_failure(answer, row)
    if row.elsewhere == NOT:
        assert totals == [0, 1]
    elif row.calls == 1:
        assert totals == [1, 1]
    else:
        assert totals == [1, 2]
    assert answer.attempts == sum(totals)
    assert len(answer.waits(COOLDOWN)) == (1 if row.waits == COOLDOWN and row.calls > 2 else 0)


# Where nobody listens, nothing reaches a journal


async def check_unreachable(gateway: Gateway, code: str, param: str | None = None, *, status: int = 502) -> None:
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"], answer.error["param"]) == (status, code, param)
    assert answer.attempts == 3
    assert len(answer.backoffs) == 2
    assert "x-gateway-backend" not in answer.headers
    assert answer.headers["x-should-retry"] == "false"


async def test_refused(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.die()
    await check_unreachable(gateway, "backend_connection_error")
    assert mock.journal.total == 0


async def test_refused_and_another_replica(start_mock: StartMock, start_gateway: StartGateway) -> None:
    bad, good = await start_mock(), await start_mock()
    gateway = await start_gateway(bad, good, **QUICK | {"gateway_backoff_initial": 30, "gateway_backoff_max": 30})
    prefer(gateway, "backend-1")
    bad.die()
    answer = await gateway.chat()
    assert answer.status == 200
    assert answer.outcomes == ["backend-1 connection_error", "backend-2 ok"]
    assert not answer.backoffs
    assert good.journal.total == 1


async def test_refused_for_a_moment(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK | {"gateway_max_attempts": 100, "gateway_retry_floor": 100})
    mock.set_faults([{"kind": "refuse", "with": {"seconds": 0.7}, "times": 1}])
    answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == 2
    assert answer.attempts >= 3


async def test_name_that_does_not_resolve(
    mock: MockModel, start_gateway: StartGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    lookups: list[str] = []
    real = socket.getaddrinfo

    def getaddrinfo(host: str, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        if host != "backend.invalid":
            return real(host, *args, **kwargs)
        lookups.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "unknown name")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    gateway = await start_gateway("http://backend.invalid:8001", **QUICK | {"gateway_probe_interval": 60})
    before = len(lookups)
    await check_unreachable(gateway, "backend_connection_error")
    assert len(lookups) >= before + 3, "a failed lookup is not remembered"

    both = await start_gateway("http://backend.invalid:8001", mock, **QUICK | {"gateway_backoff_initial": 30})
    prefer(both, "backend-1")
    answer = await both.chat()
    assert answer.status == 200
    assert answer.attempts == 2
    assert not answer.backoffs
    assert mock.journal.total == 1


async def test_connect_timeout(mock: MockModel, start_gateway: StartGateway) -> None:
    async with full_backlog() as blackhole:
        gateway = await start_gateway(blackhole, **QUICK, gateway_connect_timeout=0.2)
        await check_unreachable(gateway, "backend_timeout", "connect", status=504)

        settings = QUICK | {"gateway_connect_timeout": 0.3, "gateway_backoff_initial": 30}
        both = await start_gateway(blackhole, mock, **settings)
        prefer(both, "backend-1")
        answer = await both.chat()
        assert answer.status == 200
        assert answer.outcomes == ["backend-1 connect_timeout", "backend-2 ok"]
        assert not answer.backoffs
    assert mock.journal.total == 1


# A kept-alive connection that has died


async def _warm(gateway: Gateway) -> None:
    answer = await gateway.chat()
    assert answer.status == 200
    assert answer.attempts == 1


NO_RETRIES: dict[str, Any] = {"gateway_max_attempts": 1, "gateway_retry_budget": 0, "gateway_breaker_failures": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_stale_connection_is_sent_again_beside_every_limit(
    mock: MockModel, start_gateway: StartGateway, *, stream: bool
) -> None:
    gateway = await start_gateway(mock, **NO_RETRIES)
    await _warm(gateway)
    mock.set_faults([{"kind": "reset", "times": 1}])
    answer = await gateway.chat(stream=stream)
    assert answer.status == 200
    assert answer.attempts == 2
    assert answer.outcomes[0] == "backend-1 stale_connection"
    assert not answer.backoffs
    assert mock.journal.total == 3
    backend = (await gateway.health())["downstream"]["backends"][0]
    assert backend["breaker"] == "closed"
    assert backend["consecutive_failures"] == 0


async def test_stale_connection_is_sent_again_once(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **NO_RETRIES | {"gateway_breaker_failures": 2})
    await _warm(gateway)
    mock.set_faults([{"kind": "reset"}])
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (502, "backend_connection_error")
    assert answer.outcomes == ["backend-1 stale_connection", "backend-1 connection_error"]
    assert mock.journal.total == 3
    backend = (await gateway.health())["downstream"]["backends"][0]
    assert backend["consecutive_failures"] == 1, "the fresh one counts, the stale one does not"


async def test_stale_connection_does_not_count_against_max_attempts(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **QUICK)
    await _warm(gateway)
    mock.set_faults([{"kind": "reset"}])
    answer = await gateway.chat()
    assert answer.status == 502
    assert answer.attempts == 1 + 3
    assert mock.journal.total == 1 + 1 + 3


async def test_connection_that_dies_after_some_bytes_of_the_answer_is_not_stale(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        if call.number == 1:
            await call.answer()
            return
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-ty")
        call.close()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, **NO_RETRIES)
    await _warm(gateway)
    answer = await gateway.chat()
    assert answer.status == 502
    assert [call.turn for call in backend.calls] == [1, 2], "sent again although an answer had begun"
    assert answer.attempts == 1


async def test_kept_alive_connection_that_answers_slowly_is_not_stale(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **NO_RETRIES, gateway_answer_timeout=0.2)
    await _warm(gateway)
    mock.set_faults([{"kind": "hang_before_headers"}])
    answer = await gateway.chat()
    assert answer.error["param"] == "answer"
    assert mock.journal.total == 2


# Retry-After


def gaps(mock: MockModel) -> list[float]:
    """Seconds between the arrivals of calls."""
    return [after.time - before.time for before, after in pairwise(mock.journal.calls)]


async def decisions(gateway: Gateway, attempts: int) -> list[Any]:
    """What was decided after each attempt so far, once so many are exported."""

    def found() -> list[Any]:
        return [
            dict(span.attributes or {})["gateway.decision"] for span in gateway.spans() if span.kind is SpanKind.CLIENT
        ]

    await until(lambda: len(found()) == attempts)
    return found()


@pytest.mark.parametrize("number", [429, 503])
@pytest.mark.parametrize(
    "headers",
    [{"retry_after": "0.3"}, {"retry_after_ms": "300"}, {"retry_after_ms": "300", "retry_after": "9"}],
    ids=["seconds", "milliseconds", "both"],
)
async def test_retry_after_is_waited_for(
    mock: MockModel, start_gateway: StartGateway, number: int, headers: dict[str, str]
) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([{**status(number, **headers), "times": 2}])
    answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == 3
    assert min(gaps(mock)) >= 0.3, "never less than it asked for"
    assert len(answer.waits(COOLDOWN)) == 2
    assert min(answer.waits(COOLDOWN)) > 250
    assert not answer.backoffs
    assert await decisions(gateway, 3) == ["waited: cooldown", "waited: cooldown", "answered"]


async def test_retry_after_as_a_date(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    date = (datetime.now(UTC) + timedelta(seconds=3)).replace(microsecond=0)
    mock.set_faults([{**status(503, retry_after=format_datetime(date, usegmt=True)), "times": 1}])
    answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == 2
    assert mock.journal.calls[1].time >= date.timestamp()
    assert len(answer.waits(COOLDOWN)) == 1


async def test_429_without_retry_after_cools_for_one_second_then_two(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([{**status(429), "times": 2}])
    async with Stopwatch() as watch:
        answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == answer.attempts == 3
    first, second = gaps(mock)
    assert 1 <= first < 2 + watch.starved, watch
    assert second >= 2
    assert len(answer.waits(COOLDOWN)) == 2
    assert not answer.backoffs


async def test_retry_after_of_a_500_is_not_waited_for(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock, **QUICK)
    mock.set_faults([{**status(500, retry_after="5"), "times": 1}])
    answer = await gateway.chat()
    assert answer.status == 200
    assert mock.journal.total == 2
    assert len(answer.backoffs) == 1
    assert max(answer.backoffs) < 5000
    assert not answer.waits(COOLDOWN)


async def test_retry_after_that_nobody_waited_for_is_passed_on_alone(
    mock: MockModel, start_gateway: StartGateway
) -> None:
    gateway = await start_gateway(mock, gateway_retry_after_max=0.1)
    mock.set_faults([status(429, retry_after="1")])
    answer = await gateway.chat()
    assert answer.status == 429
    assert answer.headers["retry-after"] == "1"
    assert "x-should-retry" not in answer.headers
    assert mock.journal.total == 1


async def test_replica_is_left_alone_until_its_retry_after_is_over(
    start_mock: StartMock, start_gateway: StartGateway
) -> None:
    busy, other = await start_mock(), await start_mock()
    gateway = await start_gateway(busy, other, **QUICK)
    prefer(gateway, "backend-1")
    busy.set_faults([status(429, retry_after="5")])
    other.set_faults([{**status(500), "times": 1}])
    answer = await gateway.chat()
    assert answer.status == 200
    assert busy.journal.total == 1
    assert other.journal.total == 2


async def test_answer_as_plain_text_around_a_json_object_is_good(mock: MockModel, start_gateway: StartGateway) -> None:
    gateway = await start_gateway(mock)
    mock.set_faults([{"kind": "content_type", "with": {"value": "text/plain"}}])
    answer = await gateway.chat()
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/plain"
    assert answer.json["choices"][0]["message"]["content"]
    assert mock.journal.total == answer.attempts == 1


# What is no HTTP

CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n"
JSON_HEAD = CHUNKED % b"application/json"
STREAM_HEAD = CHUNKED % b"text/event-stream"
WHOLE = (b"content-length: 0\r\n\r\n", b"No Content\r\n\r\n", b"content-length: 2\r\n\r\n{}")
NO_HTTP: dict[str, tuple[bytes, bool]] = {
    "another protocol": (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", False),
    "a head without an end": (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, False),
    "a length that is none": (b"HTTP/1.1 200 OK\r\ncontent-length: many\r\n\r\n{}", False),
    "a bad chunk": (JSON_HEAD + b"zz\r\n{}\r\n0\r\n\r\n", False),
    "a bad second chunk": (JSON_HEAD + b"1\r\n{\r\nzz\r\n}\r\n0\r\n\r\n", False),
    "a bad chunk in a stream": (STREAM_HEAD + b"zz\r\ndata: {}\n\n\r\n0\r\n\r\n", True),
    "a redirect": (b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n", False),
    "nothing": (b"HTTP/1.1 204 No Content\r\n\r\n", False),
    **{
        f"{status}{' for a stream' if stream else ''}": (
            b"HTTP/1.1 %s Odd\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}" % status.encode(),
            stream,
        )
        for status in ("099", "101", "205", "304", "307", "407", "600", "999")
        for stream in (False, True)
    },
}


@pytest.mark.parametrize(("answer", "stream"), NO_HTTP.values(), ids=NO_HTTP.keys())
@pytest.mark.parametrize("end", ["stays open", "closes"])
async def test_what_is_no_http_answer_is_unreadable_at_once_and_tried_again(
    start_raw: StartRaw, start_gateway: StartGateway, answer: bytes, end: str, *, stream: bool
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(answer)
        if end == "closes":
            call.close()
        elif not answer.endswith(WHOLE):
            await call.left()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, gateway_max_attempts=2, gateway_backoff_initial=0)
    told = await gateway.chat(stream=stream)
    assert (told.status, told.error["code"]) == (502, "backend_invalid_response")
    assert told.attempts == len(backend.calls) == 2


async def test_bad_chunk_after_commit_ends_the_stream_with_an_error(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.send(STREAM_HEAD)
        await call.events(chunk("word"))
        await asyncio.sleep(0.1)
        await call.send(b"zz\r\n")
        await call.left()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    events = Events((await gateway.chat(stream=True)).body)
    assert events.text == "word"
    assert events.only_error()["code"] == "backend_invalid_response"
    assert len(backend.calls) == 1


# What is passed on


async def test_error_answer_is_passed_on_byte_for_byte(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    body = b'{ "error": {"code":"odd" , "n": 1.00e2}}'
    backend = await start_raw(
        lambda call: call.answer(body, status="418 Short", headers="x-ratelimit-limit: 7\r\nx-secret: s\r\n")
    )
    gateway = await start_gateway(backend.url)
    answer = await gateway.chat()
    assert (answer.status, answer.body) == (418, body)
    assert answer.headers["x-ratelimit-limit"] == "7"
    assert "x-secret" not in answer.headers
    assert answer.headers["x-gateway-backend"] == "backend-1"
    assert "x-should-retry" not in answer.headers
    assert len(backend.calls) == 1


@pytest.mark.parametrize("number", [404, 500])
async def test_error_answer_that_is_no_json_keeps_its_status(
    mock: MockModel, start_gateway: StartGateway, number: int
) -> None:
    gateway = await start_gateway(mock, gateway_max_attempts=1)
    mock.set_faults([{"kind": "status", "with": {"status": number, "body": "<html>oh</html>"}}])
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (number, "backend_invalid_response")
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.error) == {"message", "type", "param", "code"}
    assert mock.journal.total == 1


async def test_error_answer_without_a_content_type_gets_that_of_its_json(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    body = b'{"error": {"code": "odd"}}'
    answer_bytes = b"HTTP/1.1 418 Short\r\ncontent-length: %d\r\n\r\n" % len(body) + body
    backend = await start_raw(lambda call: call.send(answer_bytes))
    gateway = await start_gateway(backend.url)
    answer = await gateway.chat()
    assert (answer.status, answer.body) == (418, body)
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    "unasked",
    [
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 15\r\n\r\n{"id": "other"}',
        b"HTTP/1.1 408 Request Time-out\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        b"garbage",
    ],
    ids=["an answer", "a timeout", "garbage"],
)
async def test_what_nobody_asked_for_on_a_kept_connection_reaches_nobody(
    start_raw: StartRaw, start_gateway: StartGateway, unasked: bytes
) -> None:
    spoiled = asyncio.Event()

    async def play(call: RawCall) -> None:
        await call.answer(b'{"id": "%d"}' % call.number)
        if call.number == 1:
            await asyncio.sleep(0.05)
            await call.send(unasked)
            await asyncio.sleep(0.05)
            spoiled.set()

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url)
    assert json.loads((await gateway.chat()).body) == {"id": "1"}
    await spoiled.wait()
    for number in (2, 3):
        answer = await gateway.chat()
        assert (answer.status, json.loads(answer.body)) == (200, {"id": f"{number}"})
        assert "status_408" not in answer.headers["server-timing"]
        assert answer.attempts == 1, "nothing was sent on the spoiled one"
    assert [call.turn for call in backend.calls] == [1, 1, 2]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_header_that_cannot_be_sent_on_is_left_out(
    start_raw: StartRaw, start_gateway: StartGateway, *, stream: bool
) -> None:
    odd = b"openai-processing-ms: 5\x01\r\nopenai-version: caf\xe9\r\nopenai-organization: a\tb\r\n"
    kind = b"text/event-stream" if stream else b"application/json"
    body = b"".join([chunk(), chunk("word"), chunk(finish="stop"), b"data: [DONE]\n\n"]) if stream else ANSWER
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-type: text/html\r\ncontent-length: %d\r\n" % (
        kind,
        len(body),
    )
    backend = await start_raw(lambda call: call.send(head + odd + b"\r\n" + body))
    gateway = await start_gateway(backend.url)
    answer = await gateway.chat(stream=stream)
    assert (answer.status, answer.body) == (200, body)
    assert answer.headers["content-type"] == kind.decode()
    assert answer.headers["openai-organization"] == "a\tb"
    assert not {"openai-processing-ms", "openai-version"} & set(answer.headers)


@pytest.mark.parametrize("status", [b"101 Switching Protocols", b"099 Odd"])
async def test_a_status_that_is_no_answer_is_unreadable_at_once(
    start_raw: StartRaw, start_gateway: StartGateway, status: bytes
) -> None:
    backend = await start_raw(lambda call: call.send(b"HTTP/1.1 " + status + b"\r\nconnection: upgrade\r\n\r\n"))
    gateway = await start_gateway(backend.url, gateway_max_attempts=1)
    answer = await gateway.chat()
    assert (answer.status, answer.error["code"]) == (502, "backend_invalid_response")


async def test_answers_with_half_a_surrogate_pair_are_good(start_raw: StartRaw, start_gateway: StartGateway) -> None:
    body = b'{"id": "\\ud83d", "choices": [{"message": {"content": "\\ud83d and more"}, "finish_reason": "\\udc00"}]}'
    backend = await start_raw(lambda call: call.answer(body))
    gateway = await start_gateway(backend.url)
    answer = await gateway.chat(messages=[{"role": "user", "content": "cut \ud83d here"}])
    assert (answer.status, answer.body) == (200, body)
    assert b"\\ud83d" in backend.calls[0].body


async def test_every_attempt_carries_the_same_body_and_idempotency_key(
    start_raw: StartRaw, start_gateway: StartGateway
) -> None:
    async def play(call: RawCall) -> None:
        await call.answer(b"{}", status="500 Oh" if call.number < 3 else "200 OK")

    backend = await start_raw(play)
    gateway = await start_gateway(backend.url, **QUICK)
    answer = await gateway.chat(headers={"idempotency-key": "once"})
    assert answer.status == 200
    assert {call.headers["idempotency-key"] for call in backend.calls} == {"once"}
    assert len({call.body for call in backend.calls}) == 1
    assert len({call.headers["x-request-id"] for call in backend.calls}) == 1
    assert len({call.headers["traceparent"] for call in backend.calls}) == 3, "each attempt has a span of its own"
    assert b'"demo-model"' in backend.calls[0].body
