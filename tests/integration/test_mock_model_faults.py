# ruff: noqa: ANN401
"""Each fault kind, as a caller on a raw socket sees it."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest

from mock_model.faults import ELLIPSIS, MALFORMED
from mock_model.serve import MockModel
from mock_model.settings import Settings
from testkit.polling import until

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
STREAM = {**BODY, "stream": True}
EVENTS = 1 + 4 + 1 + 1  # role, tokens, finish, [DONE]


def settings(**changes: Any) -> Settings:
    fast = {"port": 0, "control_port": 0, "mock_ttft": 0, "mock_token_interval": 0, "mock_tokens": 4}
    return Settings(**{**fast, **changes})


@pytest.fixture
async def mock() -> AsyncIterator[MockModel]:
    async with MockModel(settings()) as running:
        yield running


class Raw:
    """What came over one connection until it ended, reset, or fell silent."""

    def __init__(self, raw: bytes, end: str) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.raw = raw
        self.end = end
        self.status = int(lines[0].split()[1]) if raw else None
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}

    @property
    def chunks(self) -> list[bytes]:
        """The chunks of a chunked body; an empty one at the end says that HTTP's end of it came."""
        rest, chunks = self.body, []
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            length = int(size, 16)
            chunks.append(rest[:length])
            rest = rest[length + 2 :]
        return chunks

    @property
    def text(self) -> bytes:
        return b"".join(self.chunks)

    @property
    def events(self) -> list[bytes]:
        return [event for event in self.text.split(b"\n\n") if event]

    @property
    def ended_well(self) -> bool:
        return self.body.endswith(b"0\r\n\r\n")


async def post(
    mock: MockModel, body: Any = None, path: str = CHAT, *, silence: float | None = None, method: str = "POST"
) -> Raw:
    """Call and read to the end: `end`, `reset`, or `silence` after so many seconds of it.

    The silence is of two halves: in one of them the machine may have stood still, and what came is yet to be read.
    """
    content = json.dumps(BODY if body is None else body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", mock.port)
    head = f"{method} {path} HTTP/1.1\r\nHost: mock\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    raw, end, silent_halves = b"", "end", 0
    while True:
        try:
            data = await asyncio.wait_for(reader.read(65_536), 20 if silence is None else silence / 2)
        except ConnectionResetError:
            end = "reset"
            break
        except TimeoutError:
            assert silence is not None, "the mock model fell silent"
            silent_halves += 1
            if silent_halves == 2:
                end = "silence"
                break
            continue
        if not data:
            break
        raw, silent_halves = raw + data, 0
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)
    return Raw(raw, end)


def script(mock: MockModel, kind: str, **parameters: Any) -> None:
    mock.set_faults([{"kind": kind, "with": parameters}])


async def ended(mock: MockModel) -> tuple[str | None, str | None, int]:
    """The fault, the end and the events of the last call."""
    await mock.settled()
    call = mock.journal.calls[-1]
    return call.fault, call.ended, call.events_sent


async def good(mock: MockModel, body: Any) -> Raw:
    mock.set_faults([])
    return await post(mock, body)


async def test_a_status_has_an_openai_error_of_its_own(mock: MockModel) -> None:
    script(mock, "status", status=503)
    answer = await post(mock)

    assert answer.status == 503
    assert answer.headers["content-type"] == "application/json"
    assert json.loads(answer.body)["error"]["type"] == "server_error"
    assert await ended(mock) == ("status", "fault", 0)


async def test_a_status_can_say_what_and_with_which_headers(mock: MockModel) -> None:
    script(mock, "status", status=429, body={"x": 1}, headers={"Retry-After": "7", "retry-after-ms": 200, "x": "a\tb"})
    answer = await post(mock, STREAM)

    assert answer.status == 429
    assert (answer.headers["retry-after"], answer.headers["retry-after-ms"]) == ("7", "200")
    assert answer.headers["x"] == "a\tb"
    assert json.loads(answer.body) == {"x": 1}


async def test_a_status_can_have_a_text_and_a_content_type(mock: MockModel) -> None:
    script(mock, "status", status=502, body="<h1>no</h1>", headers={"content-type": "text/html"})
    answer = await post(mock)

    assert answer.raw.lower().count(b"content-type") == 1
    assert answer.headers["content-type"] == "text/html"
    assert answer.body == b"<h1>no</h1>"


@pytest.mark.parametrize("status", [200, 204, 304, 400, 418, 499, 500, 599])
async def test_any_status(mock: MockModel, status: int) -> None:
    script(mock, "status", status=status)

    assert (await post(mock)).status == status


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_latency_is_a_good_answer_that_comes_late(mock: MockModel, body: Any) -> None:
    usual = await good(mock, body)
    script(mock, "latency", delay=0.2, jitter=0.05)
    start = asyncio.get_running_loop().time()
    answer = await post(mock, body)

    assert asyncio.get_running_loop().time() - start >= 0.14
    assert answer.body == usual.body
    assert (await ended(mock))[:2] == ("latency", "complete")


async def test_hang_before_headers(mock: MockModel) -> None:
    script(mock, "hang_before_headers")
    answer = await post(mock, silence=0.2)

    assert (answer.raw, answer.end) == (b"", "silence")
    assert await ended(mock) == ("hang_before_headers", "caller_left", 0)


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_hang_after_headers(mock: MockModel, body: Any) -> None:
    script(mock, "hang_after_headers")
    answer = await post(mock, body, silence=0.2)

    assert (answer.status, answer.body, answer.end) == (200, b"", "silence")
    assert await ended(mock) == ("hang_after_headers", "caller_left", 0)


async def test_slow_first_token_sends_the_role_in_time(mock: MockModel) -> None:
    script(mock, "slow_first_token", delay=30)
    answer = await post(mock, STREAM, silence=0.3)

    assert len(answer.events) == 1
    assert b'"role":"assistant"' in answer.events[0]
    assert await ended(mock) == ("slow_first_token", "caller_left", 1)


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_slow_first_token_is_a_good_answer(mock: MockModel, body: Any) -> None:
    usual = await good(mock, body)
    script(mock, "slow_first_token", delay=0.1)
    answer = await post(mock, body)

    assert answer.body == usual.body
    assert (await ended(mock))[:2] == ("slow_first_token", "complete")


async def test_stall(mock: MockModel) -> None:
    script(mock, "stall", after_events=3)
    answer = await post(mock, STREAM, silence=0.2)

    assert answer.end == "silence"
    assert len(answer.events) == 3
    assert await ended(mock) == ("stall", "caller_left", 3)


async def test_stall_of_a_whole_answer_stops_in_its_middle(mock: MockModel) -> None:
    script(mock, "stall")
    answer = await post(mock, silence=0.2)

    assert answer.end == "silence"
    assert 0 < len(answer.body) < int(answer.headers["content-length"])


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("after", [0, 1, 3])
async def test_cut_between_events(mock: MockModel, how: str, after: int) -> None:
    usual = await good(mock, STREAM)
    script(mock, "cut", after_events=after, how=how)
    answer = await post(mock, STREAM)

    assert answer.status == 200
    assert answer.end == how
    assert answer.ended_well == (how == "end")
    assert answer.events == usual.events[:after]
    assert await ended(mock) == ("cut", "fault", after)


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_cut_inside_an_event(mock: MockModel, how: str) -> None:
    usual = await good(mock, STREAM)
    script(mock, "cut", after_events=2, how=how, where="inside_event")
    answer = await post(mock, STREAM)

    assert answer.end == how
    assert answer.events[:2] == usual.events[:2]
    assert usual.events[2].startswith(answer.events[2])
    assert 0 < len(answer.events[2]) < len(usual.events[2])
    assert await ended(mock) == ("cut", "fault", 2)


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize(("path", "after"), [(CHAT, 0), (CHAT, 2), ("/v1/completions", 1), ("/v1/responses", 0)])
async def test_cut_inside_a_character(mock: MockModel, how: str, path: str, after: int) -> None:
    script(mock, "cut", after_events=after, how=how, where="inside_character")
    answer = await post(mock, {**STREAM, "prompt": "x", "input": "x"}, path)

    assert answer.end == how
    assert answer.text.endswith(ELLIPSIS[:2])
    with pytest.raises(UnicodeDecodeError, match="unexpected end of data"):
        answer.text.decode()


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_cut_of_a_whole_answer_leaves_half_of_it(mock: MockModel, how: str) -> None:
    usual = await good(mock, BODY)
    script(mock, "cut", how=how)
    answer = await post(mock)

    assert answer.end == how
    assert usual.body.startswith(answer.text)
    assert len(answer.text) == len(usual.body) // 2
    with pytest.raises(ValueError, match=r"Unterminated|Expecting"):
        json.loads(answer.text)


async def test_no_done(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "no_done")
    answer = await post(mock, STREAM)

    assert answer.ended_well
    assert answer.events == usual.events[:-1]
    assert await ended(mock) == ("no_done", "fault", EVENTS - 1)


async def test_no_finish(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "no_finish")
    answer = await post(mock, STREAM)

    assert answer.ended_well
    assert answer.events == usual.events[:-2]
    assert b'"finish_reason":"stop"' not in answer.text


async def test_no_finish_in_responses_is_no_last_event(mock: MockModel) -> None:
    script(mock, "no_finish")
    answer = await post(mock, {"input": "x", "stream": True}, "/v1/responses")

    assert answer.ended_well
    assert b"response.completed" not in answer.text
    assert b"response.output_item.done" in answer.text


async def test_malformed_event(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "malformed_event", after_events=2)
    answer = await post(mock, STREAM)

    assert answer.events == [*usual.events[:2], MALFORMED.strip(b"\n"), *usual.events[2:]]
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(MALFORMED.removeprefix(b"data: "))


async def test_a_malformed_event_beyond_the_end_comes_before_done(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "malformed_event", after_events=100)
    answer = await post(mock, STREAM)

    assert answer.events == [*usual.events[:-1], MALFORMED.strip(b"\n"), usual.events[-1]]


async def test_a_cut_beyond_the_end_is_no_fault(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "cut", after_events=EVENTS)
    answer = await post(mock, STREAM)

    assert answer.body == usual.body
    assert await ended(mock) == (None, "complete", EVENTS)


async def test_a_reset_after_the_last_event_is_one(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "cut", after_events=EVENTS, how="reset")
    answer = await post(mock, STREAM)

    assert (answer.events, answer.end) == (usual.events, "reset")
    assert await ended(mock) == ("cut", "fault", EVENTS)


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_content_type(mock: MockModel, body: Any) -> None:
    usual = await good(mock, body)
    script(mock, "content_type", value="text/plain")
    answer = await post(mock, body)

    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.body == usual.body
    assert (await ended(mock))[:2] == ("content_type", "fault")


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_html(mock: MockModel, body: Any) -> None:
    script(mock, "html")
    answer = await post(mock, body)

    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/html")
    assert answer.body.startswith(b"<!DOCTYPE html>")


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_not_json(mock: MockModel, body: Any) -> None:
    script(mock, "not_json")
    answer = await post(mock, body)

    assert (answer.status, answer.headers["content-type"]) == (200, "application/json")
    with pytest.raises(ValueError, match="Expecting"):
        json.loads(answer.body)


@pytest.mark.parametrize("body", [BODY, STREAM])
@pytest.mark.parametrize("sent", [None, 0, 10, 10_000_000])
async def test_short_body(mock: MockModel, body: Any, sent: int | None) -> None:
    script(mock, "short_body", **({} if sent is None else {"bytes": sent}))
    answer = await post(mock, body)
    promised = int(answer.headers["content-length"])

    assert answer.status == 200
    assert answer.end == "end"
    assert len(answer.body) == min(promised // 2 if sent is None else sent, promised - 1)
    assert (await ended(mock))[:2] == ("short_body", "fault")


@pytest.mark.parametrize("body", [BODY, STREAM])
async def test_drip_is_a_good_answer_in_small_pieces(mock: MockModel, body: Any) -> None:
    usual = await good(mock, body)
    script(mock, "drip", bytes=100, interval=0.001)
    answer = await post(mock, body)

    assert (answer.text if body is STREAM else answer.body) == (usual.text if body is STREAM else usual.body)
    assert await ended(mock) == ("drip", "complete", EVENTS if body is STREAM else 0)
    if body is STREAM:
        assert {len(chunk) for chunk in answer.chunks[:-2]} == {100}


async def test_drip_counts_the_events_that_went_out_whole(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    first = len(usual.events[0]) + 2
    script(mock, "drip", bytes=first + 1, interval=30)
    await post(mock, STREAM, silence=0.2)

    assert await ended(mock) == ("drip", "caller_left", 1)


async def test_reset_is_a_tcp_rst_without_a_byte(mock: MockModel) -> None:
    script(mock, "reset")
    answer = await post(mock)

    assert (answer.raw, answer.end) == (b"", "reset")
    assert await ended(mock) == ("reset", "fault", 0)


async def test_refuse_closes_the_port_and_opens_the_same_one_again(mock: MockModel) -> None:
    port = mock.port
    mock.set_faults([{"kind": "refuse", "with": {"seconds": 0.5}, "times": 1}])
    _, idle = await asyncio.open_connection("127.0.0.1", port)
    first = await post(mock)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    answer = None
    async with asyncio.timeout(10):
        while answer is None:
            with suppress(ConnectionRefusedError):
                answer = await post(mock, path="/health", method="GET")
    idle.close()
    await asyncio.gather(idle.wait_closed(), return_exceptions=True)

    assert first.end == "reset"
    assert answer.status == 200
    assert mock.port == port
    assert (await post(mock)).status == 200


async def test_refuse_closes_connections_that_are_kept_and_lets_calls_under_way_end() -> None:
    body = json.dumps(BODY).encode()
    head = b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    call = head % (CHAT.encode(), len(body)) + body
    async with MockModel(settings(mock_ttft=0.5)) as slow:
        kept, idle = await asyncio.open_connection("127.0.0.1", slow.port)
        idle.write(call)
        await kept.readuntil(b"}}")
        under_way, busy = await asyncio.open_connection("127.0.0.1", slow.port)
        busy.write(call)
        await until(lambda: slow.journal.total == 2)
        slow.set_faults([{"kind": "refuse", "with": {"seconds": 0.1}, "times": 1}])
        await post(slow)
        async with asyncio.timeout(10):
            await kept.read()  # to its end
            answer = await under_way.read()
        for writer in (idle, busy):
            writer.close()
    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_overload_turns_away_what_finds_no_place() -> None:
    fault = {"kind": "overload", "with": {"capacity": 2, "queue": 1, "retry_after": 1.5}}
    async with MockModel(settings(mock_ttft=1)) as slow:
        slow.set_faults([fault])
        answers = await asyncio.gather(*(post(slow, {**BODY, "user": str(number)}) for number in range(6)))
        statuses = sorted(answer.status or 0 for answer in answers)
        shed = next(answer for answer in answers if answer.status == 503)
        calls = [(call.fault, call.ended) for call in slow.journal.calls]

    assert statuses == [200, 200, 200, 503, 503, 503]
    assert shed.headers["retry-after"] == "1.5"
    assert json.loads(shed.body)["error"]["code"] == "server_is_overloaded"
    assert calls.count(("overload", "complete")) == 3
    assert calls.count(("overload", "fault")) == 3


async def test_overload_can_be_a_429_without_a_place_at_all(mock: MockModel) -> None:
    script(mock, "overload", capacity=0, status=429)
    answer = await post(mock)

    assert answer.status == 429
    assert "retry-after" not in answer.headers
    assert json.loads(answer.body)["error"]["type"] == "rate_limit_error"


async def test_crash_calls_what_was_put_in_its_place() -> None:
    crashes: list[int] = []
    async with MockModel(settings(), crash=lambda: crashes.append(1)) as mock:
        script(mock, "crash")
        answer = await post(mock)

        assert crashes == [1]
        assert answer.raw == b""
        assert await ended(mock) == ("crash", "fault", 0)


async def test_a_crash_in_a_test_looks_like_a_dead_process_until_revived(mock: MockModel) -> None:
    mock.set_faults([{"kind": "stall", "times": 1}, {"kind": "crash", "times": 1}])
    bystander = asyncio.create_task(post(mock, STREAM))
    await mock.called(1)
    await post(mock)
    await bystander
    with pytest.raises(ConnectionRefusedError):
        await post(mock)
    await mock.revive()

    assert (await post(mock)).status == 200


@pytest.mark.parametrize("path", ["/health", "/v1/models"])
async def test_what_gateways_ask_by_themselves_fails_only_where_it_is_named(mock: MockModel, path: str) -> None:
    mock.set_faults([{"kind": "reset", "times": 1}])
    untouched = await post(mock, path=path, method="GET")
    mock.set_faults([{"kind": "status", "with": {"status": 500}, "match": {"path": path}}])
    named = await post(mock, path=path, method="GET")

    assert (untouched.status, named.status) == (200, 500)
    assert (await post(mock)).status == 200
    assert mock.journal.total == 1


async def test_faults_are_met_by_wrong_requests_too(mock: MockModel) -> None:
    script(mock, "reset")

    assert (await post(mock, [])).end == "reset"


async def test_a_match_knows_the_model_and_stream_of_wrong_requests(mock: MockModel) -> None:
    mock.set_faults([{"kind": "reset", "match": {"model": "m", "stream": True}}])
    answers = [await post(mock, {"model": model, "stream": True, "messages": 3}) for model in ("m", "n")]

    assert [answer.status for answer in answers] == [None, 400]
    assert [call.model for call in mock.journal.calls] == ["m", "n"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"messages": BODY["messages"]}, 418),
        ({"model": "", "messages": BODY["messages"]}, 418),
        ({"messages": 3}, 418),
        ({"model": "demo-model", "messages": 3}, 418),
        (BODY, 200),
        ([], 400),
    ],
)
async def test_a_match_knows_the_model_of_requests_that_name_none(mock: MockModel, body: Any, status: int) -> None:
    mock.set_faults([{"kind": "status", "with": {"status": 418}, "match": {"model": "demo-model"}}])

    assert (await post(mock, body)).status == status
    assert mock.journal.calls[0].model == (body.get("model") if isinstance(body, dict) else None)


async def test_the_same_seed_and_calls_meet_the_same_faults() -> None:
    async def run(bodies: list[int], seed: int) -> dict[tuple[int, int], str | None]:
        async with MockModel(settings(mock_seed=seed)) as mock:
            mock.set_faults([{"kind": "status", "with": {"status": 500}, "rate": 0.3}, {"kind": "html", "rate": 0.5}])
            seen: dict[int, int] = {}
            faults = {}
            for body in bodies:
                await post(mock, {**BODY, "user": str(body)})
                faults[body, seen.setdefault(body, 0)] = mock.journal.calls[-1].fault
                seen[body] += 1
        return faults

    order = [number % 10 for number in range(40)]
    first = await run(order, 5)

    assert set(first.values()) == {None, "status", "html"}
    assert first == await run(order, 5) == await run(sorted(order), 5)
    assert first != await run(order, 6)


async def test_stopping_does_not_wait_for_calls_that_hang() -> None:
    mock = MockModel(settings())
    await mock.start()
    mock.set_faults([{"kind": "hang_before_headers", "times": 3}, {"kind": "latency", "with": {"delay": 60}}])
    calls = [asyncio.create_task(post(mock)) for _ in range(6)]
    await mock.called(6)
    start = asyncio.get_running_loop().time()
    await mock.stop()

    assert asyncio.get_running_loop().time() - start < 5
    await asyncio.gather(*calls)
    assert [call.ended for call in mock.journal.calls] == ["fault"] * 6


@pytest.mark.parametrize("after", [0, 3, 100])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
async def test_an_error_event_is_the_last_of_its_stream(mock: MockModel, path: str, after: int) -> None:
    body = {**STREAM, "prompt": "x", "input": "x"}
    usual = await post(mock, body, path)
    script(mock, "error_event", after_events=after)
    answer = await post(mock, body, path)
    error = json.loads(answer.events[-1].rpartition(b"data: ")[2])

    assert answer.ended_well
    assert answer.events[:-1] == usual.events[:-1][:after]
    assert set(error["error"]) == {"message", "type", "param", "code"}
    assert await ended(mock) == ("error_event", "fault", len(answer.events))
    if path == "/v1/responses":
        assert answer.events[-1].startswith(b"event: error\n")
        assert (error["type"], error["sequence_number"]) == ("error", len(answer.events) - 1)
        assert (error["code"], error["message"]) == (error["error"]["code"], error["error"]["message"])


@pytest.mark.parametrize("error", ["no more room", {"code": 400, "message": "too long"}, None])
@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_an_error_event_can_say_anything(mock: MockModel, path: str, error: Any) -> None:
    script(mock, "error_event", after_events=0, error=error)
    answer = await post(mock, {**STREAM, "input": "x"}, path)

    assert json.loads(answer.events[0].rpartition(b"data: ")[2])["error"] == error


async def test_an_error_event_is_for_streams(mock: MockModel) -> None:
    script(mock, "error_event")
    answer = await post(mock)

    assert answer.status == 200
    assert await ended(mock) == (None, "complete", 0)


@pytest.mark.parametrize("after", [None, 0, 3, 100])
async def test_pings_are_comments_before_the_first_token(mock: MockModel, after: int | None) -> None:
    usual = await good(mock, STREAM)
    script(mock, "pings", count=2, interval=0, **({} if after is None else {"after_events": after}))
    answer = await post(mock, STREAM)
    place = 1 if after is None else min(after, EVENTS)

    assert answer.events == [*usual.events[:place], b": ping", b": ping", *usual.events[place:]]
    assert await ended(mock) == ("pings", "complete", EVENTS)


async def test_pings_of_a_whole_answer_are_blank_lines(mock: MockModel) -> None:
    usual = await good(mock, BODY)
    script(mock, "pings", count=3, interval=0)
    answer = await post(mock)

    assert answer.headers["content-type"] == "application/json"
    assert answer.text == b"\n\n\n" + usual.body
    assert await ended(mock) == ("pings", "complete", 0)


async def test_pings_end_when_the_caller_leaves(mock: MockModel) -> None:
    mock.set_faults([{"kind": "pings", "with": {"count": 1_000_000, "interval": 0.001}}])
    _, writer = await asyncio.open_connection("127.0.0.1", mock.port)
    content = json.dumps(STREAM).encode()
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: mock\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
    await mock.called(1)
    writer.close()

    assert (await ended(mock))[:2] == ("pings", "caller_left")


async def test_a_newer_stream_takes_the_slot_of_the_one_before() -> None:
    async with MockModel(settings(mock_token_interval=600, mock_tokens=2)) as mock:
        script(mock, "one_slot")
        calls = []
        for tokens in (2, 2, 1):
            calls.append(asyncio.create_task(post(mock, {**STREAM, "max_tokens": tokens})))
            async with asyncio.timeout(10):
                while len(mock.journal.calls) < len(calls) or mock.journal.calls[-1].events_sent < 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        first, second, third = await asyncio.gather(*calls)
        journal = [(call.fault, call.ended, call.events_sent) for call in mock.journal.calls]

    assert [len(answer.events) for answer in (first, second, third)] == [2, 2, 4]
    assert all(answer.ended_well for answer in (first, second, third))
    assert b"[DONE]" in third.text
    assert journal == [("one_slot", "fault", 2), ("one_slot", "fault", 2), ("one_slot", "complete", 4)]


async def test_a_stream_without_finish_reasons_can_be_done(mock: MockModel) -> None:
    usual = await good(mock, STREAM)
    script(mock, "no_finish", done=True)
    answer = await post(mock, STREAM)

    assert answer.events == [*usual.events[:-2], usual.events[-1]]
