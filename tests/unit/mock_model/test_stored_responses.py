# ruff: noqa: ANN401
import json
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest

from mock_model import stored_responses
from mock_model.answer import Answer
from mock_model.decoding import decode
from mock_model.errors import InvalidRequest
from mock_model.load import Pace
from mock_model.responses import ResponseRequest
from mock_model.stored_responses import CAPACITY, EARLY, StoredResponses
from mock_model.text import Writer

TOKENS = 4
FIRST, INTERVAL = 10.0, 1.0
WHOLE = FIRST + (TOKENS - 1) * INTERVAL
STREAM = {"stream": "true"}
DECODER = msgspec.json.Decoder(ResponseRequest)


class Bench:
    """Stored responses with a clock that a test sets."""

    def __init__(self, place: str = "here:1", seed: int = 0, jitter: float = 0.0) -> None:
        self.now = 1000.0
        pace = Pace(seed, FIRST, INTERVAL, jitter)
        self.responses = StoredResponses(
            writer=Writer(seed, TOKENS), pace=pace, place=lambda: place, clock=lambda: self.now
        )

    def ask(self, fingerprint: str = "00aa", **body: Any) -> Answer:
        request = decode(DECODER, json.dumps({"input": "hello", **body}).encode())
        return self.responses.create(request, "m", fingerprint)

    def make(self, fingerprint: str = "00aa", **body: Any) -> str:
        """Ask, let the answer begin, and return the id."""
        answer = begun(self.ask(fingerprint, **body))
        return str(payloads(answer)[0]["response"]["id"] if body.get("stream") else json.loads(answer.body)["id"])

    def get(self, response_id: str, query: Mapping[str, str] | None = None) -> Answer:
        return self.responses.retrieve(response_id, query or {})

    def status(self, response_id: str) -> str:
        return str(json.loads(self.get(response_id).body)["status"])


def begun(answer: Answer) -> Answer:
    """Let an answer begin, as a call does that sends it."""
    if answer.effect is not None:
        answer.effect()
    return answer


def payloads(answer: Answer) -> list[Any]:
    return [json.loads(event.data.partition(b"data: ")[2]) for event in answer.events]


def numbers(answer: Answer) -> list[int]:
    return [payload["sequence_number"] for payload in payloads(answer)]


def test_a_response_is_shown_as_it_was_told() -> None:
    bench = Bench()
    whole = begun(bench.ask())
    streamed = begun(bench.ask("00bb", stream=True))

    assert bench.get(json.loads(whole.body)["id"]).body == whole.body
    last = payloads(streamed)[-1]["response"]
    assert json.loads(bench.get(last["id"]).body) == last


def test_a_response_is_unknown_until_its_answer_begins() -> None:
    bench = Bench()
    answer = bench.ask()

    with pytest.raises(InvalidRequest, match="not found"):
        bench.get(json.loads(answer.body)["id"])


def test_what_is_not_stored_is_unknown() -> None:
    bench = Bench()
    made = bench.make(store=False)

    with pytest.raises(InvalidRequest) as caught:
        bench.get(made)
    assert (caught.value.status, str(caught.value)) == (404, f"Response with id '{made}' not found.")
    assert len(bench.responses) == 0


def test_ids_differ_from_place_to_place() -> None:
    here, again, there = (Bench(place) for place in ("here:1", "here:1", "here:2"))
    ids = [[bench.make(), bench.make("00bb")] for bench in (here, again, there)]

    assert ids[0] == ids[1]
    assert len({*ids[0], *ids[2]}) == 4
    assert Bench(seed=1).make() not in ids[0]


def test_the_same_request_again_makes_the_same_response_anew() -> None:
    bench = Bench()
    made = bench.make(background=True)
    bench.now += WHOLE
    assert bench.status(made) == "completed"

    assert bench.make(background=True) == made
    assert bench.status(made) == "in_progress"
    assert len(bench.responses) == 1


def test_a_background_response_is_complete_before_its_stream_can_end() -> None:
    bench = Bench(jitter=0.5)
    made = bench.make(background=True)
    bench.now += WHOLE / 2

    assert bench.status(made) == "completed"


def test_a_response_can_follow_one_that_is_known() -> None:
    bench = Bench()
    first = bench.make()

    assert json.loads(bench.ask(previous_response_id=first).body)["previous_response_id"] == first
    with pytest.raises(InvalidRequest) as caught:
        bench.ask(previous_response_id="resp_x")
    error = caught.value
    assert (error.status, error.param, error.code) == (404, "previous_response_id", "previous_response_not_found")
    assert str(error) == "Previous response with id 'resp_x' not found."


def test_a_deleted_response_is_unknown() -> None:
    bench = Bench()
    made = bench.make()
    answer = bench.responses.delete(made)
    assert bench.get(made).body, "until the answer begins"
    begun(answer)

    assert json.loads(answer.body) == {"id": made, "object": "response", "deleted": True}
    for call in (bench.get, bench.responses.delete, bench.responses.cancel):
        with pytest.raises(InvalidRequest, match="not found"):
            call(made)
    with pytest.raises(InvalidRequest, match="Previous response"):
        bench.ask(previous_response_id=made)


def test_a_background_response_takes_its_time() -> None:
    bench = Bench()
    answer = begun(bench.ask(background=True))
    told = json.loads(answer.body)

    assert (told["status"], told["background"], told["output"], answer.steps) == ("queued", True, [], 0)
    assert bench.status(told["id"]) == "in_progress"
    bench.now += WHOLE - EARLY - 0.01
    assert bench.status(told["id"]) == "in_progress"
    bench.now += 0.02
    assert bench.status(told["id"]) == "completed"
    assert bench.status(bench.make("00bb")) == "completed", "others are told when they are complete"


def test_a_background_response_must_be_stored() -> None:
    with pytest.raises(InvalidRequest) as caught:
        Bench().ask(background=True, store=False)

    assert caught.value.param == "store"


def test_a_stream_is_resumed_after_any_event() -> None:
    bench = Bench()
    usual = bench.ask(stream=True, background=True)
    made = bench.make(stream=True, background=True)
    bench.now += WHOLE
    rest = bench.get(made, {**STREAM, "starting_after": "3"})

    assert [payload["type"] for payload in payloads(usual)][:3] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    assert numbers(bench.get(made, STREAM)) == list(range(len(usual.events)))
    assert numbers(rest) == list(range(4, len(usual.events)))
    assert payloads(rest)[-1]["type"] == "response.completed"
    assert not any(event.step for event in rest.events), "all of it is due"
    assert rest.content_type == "text/event-stream"
    assert bench.get(made, {**STREAM, "starting_after": "1000"}).events == ()


def test_of_a_resumed_stream_what_is_not_due_yet_is_waited_for() -> None:
    bench = Bench()
    made = bench.make(stream=True, background=True)
    bench.now += FIRST + INTERVAL / 2
    steps = [event.step for event in bench.get(made, STREAM).events if event.part == "token"]

    assert steps == [False, True, True, True]


def test_a_cancelled_response_stays_cancelled() -> None:
    bench = Bench()
    made = bench.make(stream=True, background=True)
    bench.now += FIRST + INTERVAL / 2
    answer = bench.responses.cancel(made)
    assert bench.status(made) == "in_progress", "until the answer begins"
    begun(answer)
    bench.now += WHOLE

    assert json.loads(answer.body)["status"] == bench.status(made) == "cancelled"
    assert bench.responses.cancel(made).body == answer.body
    resumed = bench.get(made, STREAM)
    assert [event.part for event in resumed.events].count("token") == 1, "what was written before"
    assert not any(event.step for event in resumed.events)


@pytest.mark.parametrize(("background", "message"), [(False, "a synchronous response"), (True, "a completed response")])
def test_what_does_not_run_cannot_be_cancelled(background: bool, message: str) -> None:  # noqa: FBT001
    bench = Bench()
    made = bench.make(background=background)
    bench.now += WHOLE

    with pytest.raises(InvalidRequest, match=message) as caught:
        bench.responses.cancel(made)
    assert caught.value.status == 400


@pytest.mark.parametrize("query", [STREAM, {**STREAM, "starting_after": "1"}])
def test_what_was_not_streamed_cannot_be_streamed_later(query: dict[str, str]) -> None:
    bench = Bench()

    with pytest.raises(InvalidRequest, match="not created with stream=true"):
        bench.get(bench.make(), query)


@pytest.mark.parametrize("after", ["x", "", "1.5", "--1", "1e3"])
def test_a_wrong_starting_after_is_refused(after: str) -> None:
    bench = Bench()

    with pytest.raises(InvalidRequest) as caught:
        bench.get(bench.make(stream=True), {**STREAM, "starting_after": after})
    assert caught.value.param == "starting_after"


def test_the_oldest_are_forgotten() -> None:
    bench = Bench()
    ids = [bench.make(f"{number:04}") for number in range(CAPACITY + 2)]

    assert len(bench.responses) == CAPACITY
    for gone in ids[:2]:
        with pytest.raises(InvalidRequest):
            bench.get(gone)
    assert bench.get(ids[2]).body


def test_large_ones_are_forgotten_sooner(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_responses, "MAX_BYTES", 100_000)
    bench = Bench()
    ids = [bench.make(f"{number:04}", instructions="x" * 20_000) for number in range(4)]

    assert len(bench.responses) == 2, "each is kept as it was and as it is in the end"
    begun(bench.responses.delete(ids[2]))
    begun(bench.responses.delete(ids[3]))
    bench.make("0009", instructions="x" * 200_000)
    assert len(bench.responses) == 0, "too large by itself"
    bench.make("0010", instructions="x" * 20_000)
    bench.make("0011", instructions="x" * 20_000)
    assert len(bench.responses) == 2, "what was forgotten has left its room"


def test_all_can_be_forgotten() -> None:
    bench = Bench()
    made = bench.make()
    bench.responses.clear()

    assert len(bench.responses) == 0
    with pytest.raises(InvalidRequest, match="not found"):
        bench.get(made)
