"""Any split of a stream's bytes into reads gives the same events out, in order, and nothing half."""

import asyncio
import json
from contextlib import suppress
from typing import TYPE_CHECKING, Literal, cast

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gateway.dialects.openai.choices import ChoicesState
from gateway.dialects.openai.responses import ResponseState
from gateway.errors import (
    AnswerTooLarge,
    BackendError,
    CallerLeft,
    DeadlineExceeded,
    ErrorInside,
    GatewayError,
    GatewayOverloaded,
    InvalidResponse,
    Silent,
    Stalled,
    Verdict,
)
from gateway.executor import Executor
from gateway.forwarding.stream_relay import AFTER_FINISH, AFTER_LAST, StreamRelay, held_up
from gateway.phase_timer import PhaseTimer
from gateway.policy.byte_budget import ByteBudget
from tests.unit.gateway.fakes import Clock
from tests.unit.gateway.virtual import run

if TYPE_CHECKING:
    from gateway.backend.client import Exchange

DONE = b"data: [DONE]\n\n"
IDLE = 5.0
FIRST_TOKEN = 30.0
DEADLINE = 600.0
End = Literal["end", "end with the last bytes", "reset", "hang"]
Step = bytes | float
"""Bytes that are read, or seconds that pass before the next are there."""


class FakeExchange:
    """An answer whose reads are scripted. Its end: clean, clean and known with the last bytes, a reset, or never."""

    def __init__(self, steps: list[Step], end: End) -> None:
        self._steps = list(steps)
        self._end = end
        self._read_to_the_end = False
        self.largest = 0
        self.held_back = False
        self.waiting = 7

    def read_less(self, size: int) -> None:
        self.largest = max(self.largest, size)

    def hold_back(self) -> None:
        self.held_back = True

    def go_on(self) -> None:
        self.held_back = False

    @property
    def at_end(self) -> bool:
        return self._read_to_the_end or (self._end == "end with the last bytes" and not self._steps)

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, bytes):
                return step
            await asyncio.sleep(step)
        if self._end == "reset":
            raise InvalidResponse("The backend's answer was cut.")
        if self._end == "hang":
            await asyncio.sleep(1e6)
        self._read_to_the_end = True
        return b""


class Told:
    """What came out of a relay.

    Attributes:
        out: what was passed on, write by write; the first is the commit.
        failure: what it ended with, or None.
        seconds: how long it took.
        held: the bytes the share held at the end.
    """

    def __init__(self) -> None:
        self.out: list[bytes] = []
        self.failure: GatewayError | None = None
        self.seconds = 0.0
        self.held = 0

    @property
    def bytes(self) -> bytes:
        return b"".join(self.out)


def relay(
    *steps: Step,
    end: End = "end",
    choices: int = 1,
    responses: bool = False,
    hold: bool = False,
    limit: int = 1 << 24,
    memory: int = 1 << 24,
    reader: float = 0.0,
    max_event: int = 1 << 24,
    asks_usage: bool = False,
    alone: bool = False,
    idle: float = IDLE,
) -> Told:
    """Relay one stream as the forwarder does; `reader` seconds is how long the caller takes for each write.

    `alone`: nobody else can be asked.
    """

    async def story(clock: Clock) -> Told:
        told, began = Told(), clock()
        state = ResponseState() if responses else ChoicesState(choices, asks_usage=asks_usage)
        timer = PhaseTimer(clock, clock() + DEADLINE)
        share = ByteBudget(memory).share()
        exchange = cast("Exchange", FakeExchange(list(steps), end))
        subject = StreamRelay(
            exchange,
            state,
            timer,
            idle=idle,
            max_event=max_event,
            share=share,
            executor=Executor(at_once=1 << 40),
            clock=clock,
        )

        async def write(events: bytes) -> None:
            assert events
            told.out.append(events)
            await asyncio.sleep(reader)

        try:
            with timer:
                events = await subject.until_first_content(clock() + FIRST_TOKEN, FIRST_TOKEN, limit, lambda: not alone)
                if hold:
                    events += await subject.until_complete(limit)
                timer.end_at(began + DEADLINE)
                await write(events)
                if not hold:
                    await subject.pass_on(write)
        except GatewayError as failure:
            told.failure = failure
        told.seconds, told.held = clock() - began, share.held
        return told

    return run(story)


def event(document: object, line_end: bytes = b"\n") -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + 2 * line_end


def chunk(line_end: bytes = b"\n", reason: str | None = None, index: int = 0, **fields: object) -> bytes:
    return event({"choices": [{"index": index, "delta": fields, "finish_reason": reason}]}, line_end)


ROLE = chunk(role="assistant")
HELLO, WORLD = chunk(content="héllo 🌍"), chunk(content="wörld")
STOP = chunk(reason="stop")
USAGE = event({"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 2}})
PING = b": ping\n\n"
GARBAGE = b"data: {oops\n\n"
OWN_ERROR = event({"error": {"message": "no", "code": "c"}})
WHOLE = [ROLE, PING, HELLO, WORLD, STOP, USAGE, DONE]


def split(data: bytes, cuts: list[int]) -> list[Step]:
    places = sorted({cut % len(data) for cut in cuts} - {0}) if data else []
    return [data[start:end] for start, end in zip([0, *places], [*places, len(data)], strict=True)]


LINE_END = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
CUTS = st.lists(st.integers(0, 2000), max_size=25)
ENDS: "st.SearchStrategy[End]" = st.sampled_from(["end", "end with the last bytes", "reset", "hang"])


@st.composite
def events(draw: st.DrawFn) -> list[bytes]:
    """A whole stream, with comments anywhere and any line ends.

    But for one: a finish that ends with a bare CR, and then nothing more, is not known to have ended.
    """
    comment = st.just(b": ping")
    noise = st.lists(st.builds(lambda text, end: text + 2 * end, comment, LINE_END), max_size=2)
    out = [*draw(noise), chunk(draw(LINE_END), role="assistant")]
    for _ in range(draw(st.integers(1, 4))):
        out += [*draw(noise), chunk(draw(LINE_END), content=draw(TEXT))]
    out += [*draw(noise), chunk(draw(st.sampled_from([b"\n", b"\r\n"])), reason="stop"), *draw(noise)]
    if draw(st.booleans()):
        out.append(USAGE)
    if draw(st.booleans()):
        out.append(b"data: [DONE]" + 2 * draw(LINE_END))
    return out


def with_done(stream: list[bytes]) -> bytes:
    joined = b"".join(stream)
    return joined if b"[DONE]" in stream[-1] else joined + DONE


@given(events(), CUTS, ENDS, st.booleans())
@example(WHOLE, list(range(0, 2000, 3)), "end", False)
@example(WHOLE, [], "end with the last bytes", True)
def test_any_split_of_a_whole_stream_gives_it_whole(stream: list[bytes], cuts: list[int], end: End, hold: bool) -> None:  # noqa: FBT001
    told = relay(*split(b"".join(stream), cuts), end=end, hold=hold)

    assert told.failure is None
    assert told.bytes == with_done(stream)
    if hold:
        assert len(told.out) == 1


@given(events(), CUTS, st.integers(0, 2000), st.sampled_from(["end", "reset", "garbage", "error", "hang", "done"]))
def test_any_split_of_a_broken_stream_gives_a_beginning_of_whole_events(
    stream: list[bytes], cuts: list[int], at: int, how: str
) -> None:
    """Broken before its finish reason: it fails. Broken after it: the answer is whole, and gets its `[DONE]`."""
    finish = next(number for number, each in enumerate(stream) if b'"stop"' in each)
    before = stream[: at % (len(stream) + 1)]
    half = {"garbage": GARBAGE, "error": OWN_ERROR, "done": DONE}.get(how, b'data: {"choices": [{"ind')
    data = b"".join(before) + half + (HELLO if how in {"garbage", "error", "done"} else b"")
    end: End = "reset" if how == "reset" else "hang" if how == "hang" else "end"

    told = relay(*split(data, cuts), end=end)

    if how == "error" and b"[DONE]" not in b"".join(before):
        assert isinstance(told.failure, ErrorInside)  # after the finish too: a client reads on
    elif len(before) > finish:
        assert told.failure is None
        assert told.bytes == with_done(before)
        return
    elif how == "done" and any(b"content" in each for each in before):
        assert told.failure is None
        assert told.bytes == b"".join(before) + DONE
        return
    assert isinstance(told.failure, BackendError)
    assert isinstance(told.failure, Stalled if how == "hang" else ErrorInside if how == "error" else InvalidResponse)
    assert DONE not in told.bytes
    assert b"".join(before).startswith(told.bytes)
    if told.out and how != "hang":
        assert told.bytes == b"".join(before)


def test_each_event_goes_on_as_soon_as_it_is_there() -> None:
    told = relay(*WHOLE)

    assert told.out == [ROLE + PING + HELLO, WORLD, STOP, USAGE, DONE]


def test_what_comes_before_the_first_content_waits_for_it() -> None:
    told = relay(PING, ROLE, 1.0, HELLO, WORLD + STOP + DONE)

    assert told.out[0] == PING + ROLE + HELLO
    assert told.held == len(told.out[0])


@pytest.mark.parametrize("end", ["end", "end with the last bytes", "reset"])
def test_a_complete_stream_without_done_gets_one_when_the_backend_ends(end: End) -> None:
    told = relay(HELLO, STOP, end=end)

    assert told.failure is None
    assert told.bytes == HELLO + STOP + DONE
    assert told.seconds < 0.1


def test_a_finished_stream_that_stays_open_gets_its_done_after_five_seconds_without_an_event() -> None:
    told = relay(HELLO, STOP, end="hang")

    assert told.bytes == HELLO + STOP + DONE
    assert AFTER_FINISH <= told.seconds < AFTER_FINISH + 0.1


def test_each_event_after_the_finish_starts_the_five_seconds_anew() -> None:
    told = relay(HELLO, STOP, 4.9, WORLD, 4.9, USAGE, 5.1, WORLD, end="hang")

    assert told.bytes == HELLO + STOP + WORLD + USAGE + DONE


def test_comments_after_the_finish_do_not_prolong_the_stream() -> None:
    told = relay(HELLO, STOP, *[step for _ in range(100) for step in (1.1, PING)], end="hang")

    assert told.bytes == HELLO + STOP + 4 * PING + DONE
    assert told.seconds < AFTER_FINISH + 0.1


def test_a_finish_reason_on_every_chunk_does_not_end_the_stream() -> None:
    finishing = [chunk(content=word, reason="stop") for word in ("one", "two", "three")]
    told = relay(finishing[0], 1.5, finishing[1], 1.5, finishing[2], DONE)

    assert told.bytes == b"".join(finishing) + DONE
    assert told.failure is None
    assert relay(finishing[0], 1.5, finishing[1], 1.5, finishing[2], DONE, hold=True).bytes == told.bytes


def test_usage_that_was_asked_for_is_waited_for_up_to_the_idle_timeout() -> None:
    told = relay(HELLO, STOP, 7.9, USAGE, DONE, asks_usage=True, idle=8)
    assert told.bytes == HELLO + STOP + USAGE + DONE
    assert relay(HELLO, STOP, 7.9, USAGE, DONE, idle=8).bytes == HELLO + STOP + DONE, "nobody asked"

    late = relay(HELLO, STOP, end="hang", asks_usage=True)
    assert late.bytes == HELLO + STOP + DONE
    assert late.failure is None
    assert IDLE <= late.seconds < IDLE + 0.1


def test_done_is_trusted_whatever_the_finish_reasons_say() -> None:
    assert relay(HELLO, WORLD, DONE).bytes == HELLO + WORLD + DONE
    assert relay(HELLO, STOP, DONE, choices=2).bytes == HELLO + STOP + DONE
    assert relay(HELLO, WORLD, DONE).failure is None


@pytest.mark.parametrize("line_end", [b"", b"\n", b"\r\n"])
def test_the_last_event_of_a_body_that_ends_properly_may_lack_its_blank_line(line_end: bytes) -> None:
    stop = STOP.rstrip(b"\n") + line_end
    told = relay(HELLO, stop)

    assert told.failure is None
    assert told.bytes.startswith(HELLO + stop)
    assert told.bytes.endswith(b"\n\n" + DONE)
    assert told.bytes.count(b"data: ") == 3
    assert isinstance(relay(HELLO, stop, end="reset").failure, InvalidResponse)
    terminal = response("completed", 2).rstrip(b"\n") + line_end
    whole = relay(CREATED, WORD, terminal, responses=True)
    assert whole.failure is None
    assert whole.bytes.startswith(CREATED + WORD + terminal)


def test_a_byte_order_mark_before_the_first_event_is_passed_on() -> None:
    mark = b"\xef\xbb\xbf"
    for steps in ([mark + HELLO + STOP + DONE], [mark[:1], mark[1:] + HELLO, STOP, DONE]):
        assert relay(*steps).bytes == mark + HELLO + STOP + DONE


def test_an_error_field_is_an_error() -> None:
    told = relay(HELLO, b'error: {"code": 500, "message": "slot gone"}\n\n')

    assert isinstance(told.failure, ErrorInside)
    assert told.failure.words.message == "slot gone"
    assert told.failure.event is None
    early = relay(b'error: {"code": 400, "message": "no"}\n\n', DONE)
    assert isinstance(early.failure, ErrorInside)
    assert early.failure.words.number == 400


def test_where_nobody_else_can_be_asked_signs_of_life_start_the_first_token_timer_anew() -> None:
    told = relay(ROLE, *[step for _ in range(100) for step in (1.0, PING)], HELLO, STOP, DONE, alone=True)

    assert told.failure is None
    assert told.seconds > 3 * FIRST_TOKEN


def test_a_silence_with_signs_of_life_says_nothing_about_the_replica() -> None:
    told = relay(*[step for _ in range(100) for step in (1.0, PING)], end="hang")

    assert isinstance(told.failure, Silent)
    assert told.failure.verdict is Verdict.NEITHER


@pytest.mark.parametrize("steps", [[HELLO + STOP + DONE], [HELLO, STOP + DONE], [HELLO, STOP, DONE]])
def test_after_done_a_connection_that_stays_open_is_not_waited_for(steps: list[bytes]) -> None:
    told = relay(*steps, end="hang")

    assert told.bytes == HELLO + STOP + DONE
    assert told.seconds < 2 * AFTER_LAST


def test_what_comes_before_the_first_words_is_limited_as_an_answer_is() -> None:
    told = relay(ROLE, *(PING for _ in range(1000)), HELLO, STOP, DONE, limit=2000)

    assert isinstance(told.failure, AnswerTooLarge)
    assert told.out == []


def test_half_an_event_is_held_by_the_share() -> None:
    large = chunk(content="x" * 50_000)
    pieces: list[Step] = [large[start : start + 1000] for start in range(0, len(large), 1000)]

    assert relay(HELLO, *pieces, STOP, DONE).bytes == HELLO + large + STOP + DONE
    assert isinstance(relay(HELLO, *pieces, STOP, DONE, memory=40_000).failure, GatewayOverloaded)


def test_an_event_without_a_word_of_data_is_passed_on() -> None:
    assert relay(ROLE, b"data:\n\n", HELLO, b"data: \n\n", STOP, DONE).bytes.count(b"data:") == 6


@pytest.mark.parametrize(
    "odd",
    [
        b'data: {"choices": [{"index": 0, "delta": {"content": "\\ud83d"}, "finish_reason": null}]}\n\n',
        b'data: {"choices": [], "n": 1e999, "i": 1%s}\n\n' % (b"0" * 30),
    ],
    ids=["half a surrogate pair", "a number beyond a float"],
)
def test_json_that_msgspec_does_not_take_is_json(odd: bytes) -> None:
    assert relay(odd, HELLO, odd, STOP, DONE).bytes == odd + HELLO + odd + STOP + DONE


@pytest.mark.parametrize("steps", [[STOP, USAGE + GARBAGE], [STOP, USAGE, GARBAGE], [STOP + USAGE + GARBAGE]])
def test_garbage_after_the_finish_spoils_nothing_that_came_before_it(steps: list[bytes]) -> None:
    told = relay(HELLO, *steps)

    assert told.failure is None
    assert told.bytes == HELLO + STOP + USAGE + DONE


@pytest.mark.parametrize("end", ["end", "end with the last bytes"])
def test_a_stream_whose_lines_end_with_a_bare_cr_loses_nothing(end: End) -> None:
    hello, stop = chunk(b"\r", content="a"), chunk(b"\r", reason="stop")

    assert relay(hello, stop, end=end).bytes == hello + stop + DONE
    assert relay(hello, stop, b"data: [DONE]\r\r", end=end).bytes == hello + stop + b"data: [DONE]\r\r"


def test_done_alone_is_no_answer() -> None:
    for steps in ([DONE], [ROLE + DONE], [PING, DONE], []):
        told = relay(*steps)
        assert isinstance(told.failure, InvalidResponse)
        assert told.out == []


def test_what_comes_after_done_is_dropped() -> None:
    assert relay(HELLO, STOP, DONE + HELLO, USAGE).bytes == HELLO + STOP + DONE


def test_all_choices_must_finish() -> None:
    second = chunk(index=1, reason="stop")

    assert isinstance(relay(HELLO, STOP, choices=2).failure, InvalidResponse)
    assert relay(HELLO, STOP, second, choices=2).bytes == HELLO + STOP + second + DONE


def test_the_backends_own_error_event_is_kept_for_the_caller() -> None:
    told = relay(HELLO, OWN_ERROR)

    assert isinstance(told.failure, ErrorInside)
    assert told.failure.event == OWN_ERROR
    assert told.bytes == HELLO


def test_a_failure_that_arrives_with_the_first_content_comes_before_the_commit() -> None:
    told = relay(ROLE, HELLO + GARBAGE)

    assert isinstance(told.failure, InvalidResponse)
    assert told.out == []


def test_without_content_a_stream_that_talks_is_silent_at_the_first_token_timeout() -> None:
    told = relay(*[step for _ in range(100) for step in (1.0, PING)], end="hang")

    assert isinstance(told.failure, Silent)
    assert told.failure.param == "first_token"
    assert told.out == []
    assert FIRST_TOKEN <= told.seconds < FIRST_TOKEN + 0.1


def test_without_anything_a_stream_stalls_at_the_idle_timeout() -> None:
    told = relay(ROLE, end="hang")

    assert isinstance(told.failure, Stalled)
    assert IDLE <= told.seconds < IDLE + 0.1


def test_after_the_commit_a_stream_that_stands_still_stalls() -> None:
    told = relay(HELLO, 4.0, WORLD, end="hang")

    assert isinstance(told.failure, Stalled)
    assert told.failure.param == "idle"
    assert told.bytes == HELLO + WORLD
    assert 4 + IDLE <= told.seconds < 4 + IDLE + 0.1


def test_the_idle_timer_stands_still_while_the_caller_does_not_read() -> None:
    told = relay(HELLO, WORLD, STOP, DONE, reader=3 * IDLE)

    assert told.failure is None
    assert told.bytes == HELLO + WORLD + STOP + DONE


def test_a_caller_who_does_not_read_is_bound_by_the_deadline() -> None:
    told = relay(HELLO, WORLD, STOP, DONE, reader=2 * DEADLINE)

    assert isinstance(told.failure, DeadlineExceeded)
    assert DEADLINE <= told.seconds < DEADLINE + 0.1


def test_held_back_until_complete_a_broken_stream_gives_nothing() -> None:
    for steps in ([HELLO, WORLD], [HELLO, GARBAGE], [HELLO, OWN_ERROR]):
        told = relay(*steps, hold=True)
        assert isinstance(told.failure, InvalidResponse)
        assert told.out == []


def test_held_back_until_complete_a_whole_stream_is_one_write_and_all_of_it_is_held() -> None:
    told = relay(*WHOLE, hold=True)

    assert told.out == [b"".join(WHOLE)]
    assert told.held == len(told.out[0])


def test_an_answer_held_back_has_a_largest_size() -> None:
    told = relay(HELLO, *[WORLD] * 100, STOP, hold=True, limit=1000)

    assert isinstance(told.failure, AnswerTooLarge)
    assert told.out == []


@pytest.mark.parametrize("steps", [[PING] * 1000, [HELLO, *[WORLD] * 1000]])
def test_what_is_held_counts_in_the_memory_of_the_gateway(steps: list[bytes]) -> None:
    told = relay(*steps, end="hang", hold=True, memory=1000)

    assert isinstance(told.failure, GatewayOverloaded)
    assert told.held <= 1000


def test_an_event_may_be_as_long_as_an_answer() -> None:
    long = chunk(content="x" * (1 << 20))
    pieces = [long[at : at + 65_536] for at in range(0, len(long), 65_536)]
    assert relay(HELLO, *pieces, STOP, DONE).bytes == HELLO + long + STOP + DONE

    told = relay(HELLO, *pieces, STOP, max_event=1 << 20)

    assert isinstance(told.failure, InvalidResponse)
    assert told.bytes == HELLO


def response(kind: str, number: int) -> bytes:
    document = {"type": f"response.{kind}", "sequence_number": number}
    return f"event: response.{kind}\n".encode() + event(document)


CREATED, WORD = response("created", 0), response("output_text.delta", 1)


@pytest.mark.parametrize("kind", ["completed", "incomplete", "failed"])
@pytest.mark.parametrize("end", ["end", "reset", "hang"])
def test_a_response_is_whole_with_its_terminal_event_and_gets_no_done(kind: str, end: End) -> None:
    last = response(kind, 2)
    told = relay(CREATED, WORD, last, end=end, responses=True)

    assert told.failure is None
    assert told.out == [CREATED + WORD, last]


@given(CUTS, st.sampled_from(["end", "reset"]))
def test_any_split_of_a_response_gives_the_same_bytes(cuts: list[int], end: End) -> None:
    data = CREATED + PING + WORD + response("completed", 2)

    assert relay(*split(data, cuts), end=end, responses=True).bytes == data
    cut = relay(*split(CREATED + WORD, cuts), end=end, responses=True)
    assert isinstance(cut.failure, InvalidResponse)
    assert cut.bytes == CREATED + WORD


async def test_while_a_caller_does_not_read_the_backend_is_held_back_and_what_waits_is_counted_beyond_the_limit() -> (
    None
):
    exchange, budget = FakeExchange([], "end"), ByteBudget(10)
    share = budget.share()
    with suppress(CallerLeft), held_up(cast("Exchange", exchange), share, 100):
        assert exchange.held_back
        assert share.held == budget.held == 107
        raise CallerLeft
    assert not exchange.held_back
    assert share.held == budget.held == 0
