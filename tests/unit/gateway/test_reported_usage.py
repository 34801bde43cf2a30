import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects.reported_usage import END, ReportedUsage, may_report

JSON, EVENTS = "application/json", "text/event-stream"
TOKENS = {"type": "tokens", "input_tokens": 14, "input_token_details": {"text_tokens": 4}, "output_tokens": 45}
RANKS = {"prompt_tokens": 56, "total_tokens": 56, "prompt_tokens_details": {"cached_tokens": 0}}
LONG = "word " * END
DECOY = {"usage": {"total_tokens": 999}}
GOOD: list[tuple[Any, int]] = [
    ({"text": "Hi.", "usage": {**TOKENS, "total_tokens": 60}}, 60),  # the total, whatever its parts are
    ({"text": LONG, "usage": TOKENS}, 59),
    ({"created": 1, "data": [{"b64_json": "A" * 3 * END}] * 2, "usage": TOKENS, "size": "8x8"}, 59),
    ({"id": "r", "model": "m", "usage": {"total_tokens": 7}, "results": [{"text": LONG}]}, 7),
    ({"model": "m", "usage": RANKS, "results": [{"document": {"text": LONG, **DECOY}, "score": float("nan")}]}, 56),
    ({"data": [{"score": 0.5, **DECOY}] * 1_000, "usage": {**RANKS, "completion_tokens": 0}}, 56),
    ({"results": [], "id": "c", "meta": {"billed_units": {"search_units": 1}, "tokens": {"input_tokens": 9}}}, 9),
    ({"usage": {"completion_tokens": 3}}, 3),
    ({"usage": {"total_tokens": 0}}, 0),
]
NONE: list[Any] = [
    {"text": "Hi.", "usage": {"type": "duration", "seconds": 9}},
    {"text": 'It said: "usage": {"total_tokens": 9}}', "kind": "usage"},
    {"text": LONG + '"usage":{"total_tokens": 9}}'},
    {"data": [DECOY] * 1_000},
    {"data": [[DECOY]], "more": DECOY},
    {"usage": None, "meta": 1},
    {"usage": {"total_tokens": -1}},
    {"usage": {"total_tokens": True, "input_tokens": "3"}},
    {"usage": {"total_tokens": 2**63}},
    [{"usage": {"total_tokens": 3}}],
    "usage",
    {},
]


def tokens_in(content_type: str, *pieces: bytes) -> int | None:
    usage = ReportedUsage(content_type)
    for piece in pieces:
        usage.feed(piece)
    return usage.tokens


def event(document: Any) -> bytes:  # noqa: ANN401
    return f"event: some\ndata: {json.dumps(document)}\n\n".encode()


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(("answer", "tokens"), [*GOOD, *[(answer, None) for answer in NONE]])
def test_what_an_answer_reports_at_its_top_is_found(answer: Any, tokens: int | None, indent: int | None) -> None:  # noqa: ANN401
    body = json.dumps(answer, indent=indent).encode()
    assert tokens_in(JSON, body) == tokens
    assert tokens_in("application/x+json", body + b"\n") == tokens


@given(st.sampled_from([*GOOD, *[(answer, None) for answer in NONE]]), st.lists(st.integers(1, 3 * END), max_size=9))
def test_it_does_not_matter_in_which_pieces_it_comes(found: tuple[Any, int | None], sizes: list[int]) -> None:
    body, pieces = json.dumps(found[0]).encode(), []
    for size in sizes:
        pieces.append(body[:size])
        body = body[size:]
    assert tokens_in(JSON, *pieces, body) == found[1]


@pytest.mark.parametrize("done", [b"", b"data: [DONE]\n\n", b": bye\n\n"])
def test_of_a_stream_the_last_event_with_a_usage_counts(done: bytes) -> None:
    delta, partial = {"type": "transcript.text.delta", "delta": "Hi."}, {"type": "x", "usage": {"total_tokens": 1}}
    last = {"type": "transcript.text.done", "text": LONG, "usage": TOKENS}
    assert tokens_in(EVENTS, *[event(delta)] * 3, event(partial), event(last), done) == 59
    assert tokens_in(EVENTS, event(partial), event({**delta, "usage": None}), done) == 1
    assert tokens_in(EVENTS, event(delta), event({"data": [DECOY]}), done) is None
    assert tokens_in(EVENTS, event(last).replace(b"\n", b"\r\n"), done) == 59


@pytest.mark.parametrize("body", [b"", b"{", b"}", b'"usage"', b'{"usage":' * END, b'"usage":{}}' * END])
def test_what_is_no_answer_reports_nothing_and_little_is_kept_of_it(body: bytes) -> None:
    for content_type in (JSON, EVENTS):
        usage = ReportedUsage(content_type)
        for _ in range(100):
            usage.feed(body)
            assert len(usage._first) + len(usage._last) <= 2 * END
        assert tokens_in(content_type, body) is None


def test_only_json_and_events_are_looked_into() -> None:
    assert [may_report(each) for each in (JSON, "application/problem+json", EVENTS)] == [True] * 3
    assert [may_report(each) for each in ("audio/mpeg", "text/plain", "")] == [False] * 3
