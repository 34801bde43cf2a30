"""Stored responses: their homes, the calls for them, and what servers say of those that they do not know."""

import json

import pytest

from gateway.dialects.openai.responses import ResponseState
from gateway.dialects.openai.stored_responses import CANCEL, RESPONSE, StoredResponses
from gateway.errors import BackendError, ErrorInside, InvalidRequest, NoSuchModel, NoSuchResponse, Unreachable, Verdict
from gateway.policy.response_homes import MAX_ID, ResponseHomes
from tests.unit.gateway.fakes import error_answer
from tests.unit.gateway.scripted import Outcome, forward

STORED = StoredResponses()


def test_a_response_is_at_home_where_it_was_made_until_it_is_forgotten() -> None:
    homes = ResponseHomes()
    homes.made("r", "a-1", "m", "key 0")
    homes.found("r", "a-2")
    home = homes.of("r")

    assert home is not None
    assert (home.replica, home.model, home.owner) == ("a-1", "m", "key 0")
    homes.forget("r")
    homes.forget("r")
    assert homes.of("r") is None


def test_a_response_that_was_only_found_is_nobodys() -> None:
    homes = ResponseHomes()
    homes.found("r", "a-1")
    home = homes.of("r")

    assert home is not None
    assert (home.replica, home.model, home.owner) == ("a-1", "", None)


def test_the_oldest_is_forgotten_first() -> None:
    homes = ResponseHomes(3)
    for name in ("a", "b", "c", "a", "d"):
        homes.made(name, "r", "m", None)

    assert len(homes) == 3
    assert [name for name in "abcd" if homes.of(name) is not None] == ["a", "c", "d"]


@pytest.mark.parametrize(("replica", "owner"), [("b-1", "k1"), ("a-1", "k2"), ("a-1", None), ("b-1", "k2")])
def test_nobody_takes_over_a_response_that_is_known(replica: str, owner: str | None) -> None:
    homes = ResponseHomes()
    homes.made("r", "a-1", "m", "k1")
    homes.made("r", replica, "other", owner)
    home = homes.of("r")

    assert home is not None
    assert (home.replica, home.model, home.owner) == ("a-1", "m", "k1")
    homes.forget("r")
    homes.made("r", replica, "other", owner)
    home = homes.of("r")
    assert home is not None
    assert (home.replica, home.model, home.owner) == (replica, "other", owner)


def test_whoever_has_the_most_forgets_first() -> None:
    homes = ResponseHomes(10)
    for number in range(3):
        homes.made(f"mine-{number}", "a-1", "m", "k1")
        homes.found(f"found-{number}", "a-1")
    for number in range(100):
        homes.made(f"flood-{number}", "b-1", "m", "k2")
        assert homes.of(f"flood-{number}") is not None

    known = [f"{name}-{number}" for name in ("mine", "found") for number in range(3)]
    assert all(homes.of(name) is not None for name in known)
    assert [number for number in range(100) if homes.of(f"flood-{number}")] == [96, 97, 98, 99]
    for name in known:
        homes.forget(name)
    assert (len(homes), list(homes._of_owner)) == (4, ["k2"])


def test_what_has_no_id_or_too_long_a_one_is_not_kept() -> None:
    homes = ResponseHomes()
    for response_id in (None, "", "x" * (MAX_ID + 1)):
        homes.made(response_id, "a", "m", None)

    assert len(homes) == 0


def call(query: str, *, method: str = "GET", template: str = RESPONSE, response_id: str = "resp_1") -> object:
    return STORED.read_call(method, template, response_id, query)


@pytest.mark.parametrize("word", ["true", "True", "TRUE", "1", "yes", "on", "%74rue"])
def test_a_stream_is_asked_for_in_the_words_that_servers_take(word: str) -> None:
    assert STORED.read_call("GET", RESPONSE, "r", f"include=x&stream={word}").stream
    assert STORED.read_call("GET", RESPONSE, "r", f"s%74ream={word}").stream
    assert not STORED.read_call("DELETE", RESPONSE, "r", f"stream={word}").stream


@pytest.mark.parametrize("query", ["", "stream", "stream=", "stream=false", "stream=0", "x=stream", "streams=true"])
def test_anything_else_asks_for_none(query: str) -> None:
    assert not STORED.read_call("GET", RESPONSE, "r", query).stream


@pytest.mark.parametrize(
    ("response_id", "path"),
    [
        ("resp_1-a.b~c", "/v1/responses/resp_1-a.b~c"),
        ("a+b==:c@d;e,f", "/v1/responses/a+b==:c@d;e,f"),
        ('<"{x}">', "/v1/responses/%3C%22%7Bx%7D%22%3E"),
        ("...a", "/v1/responses/...a"),
        ("x" * MAX_ID, "/v1/responses/" + "x" * MAX_ID),
    ],
)
def test_an_id_is_one_segment_of_the_path(response_id: str, path: str) -> None:
    assert STORED.read_call("GET", RESPONSE, response_id, "").path == path
    assert STORED.read_call("POST", CANCEL, response_id, "").path == path + "/cancel"


@pytest.mark.parametrize(
    "odd",
    ["", ".", "..", "...", "a/b", "../x", "a\\b", "a%2fb", "a?b", "a#b", "a b", "a\n", "\x7f", "ä", "x" * (MAX_ID + 1)],
)
def test_what_could_be_another_path_is_no_id(odd: str) -> None:
    with pytest.raises(InvalidRequest):
        STORED.read_call("GET", RESPONSE, odd, "")


@pytest.mark.parametrize(
    ("query", "number"),
    [
        ("", 0),
        ("starting_after=41", 42),
        ("starting_after=-3", 0),
        ("starting_after=x", 0),
        ("starting_after=%C2%B2", 0),
    ],
)
def test_a_resumed_stream_is_numbered_on(query: str, number: int) -> None:
    prompt = STORED.read_call("GET", RESPONSE, "r", f"stream=true&{query}")
    state = STORED.stream_state(prompt, keep_text=False, until_answer=False)

    assert isinstance(state, ResponseState)
    assert state.sequence_number == number
    assert json.loads(STORED.error_event(Unreachable("no"), state).partition(b"data: ")[2])["sequence_number"] == number


def test_nothing_but_a_resumed_stream_may_be_empty_and_that_only_before_its_first_event() -> None:
    whole = STORED.read_call("GET", RESPONSE, "r", "stream=true")
    assert not STORED.stream_state(whole, keep_text=False, until_answer=False).finished

    resumed = STORED.read_call("GET", RESPONSE, "r", "stream=true&starting_after=2")
    state = STORED.stream_state(resumed, keep_text=False, until_answer=False)
    assert [state.finished, state.content] == [True, False]
    state.feed(b'{"type": "response.output_text.delta", "sequence_number": 3, "delta": "x"}')
    assert [state.finished, state.ended] == [False, False]
    usage = {"input_tokens": 3, "output_tokens": 4}
    end = {"type": "response.completed", "response": {"id": "r", "status": "completed", "usage": usage}}
    state.feed(json.dumps(end).encode())
    assert (state.finished, state.ended, state.response_id) == (True, True, "r")
    assert (state.input_tokens, state.output_tokens) == (None, None)


def test_the_tokens_of_a_response_that_is_read_again_do_not_count_again() -> None:
    usage = {"input_tokens": 3, "output_tokens": 4}
    body = {"id": "r", "object": "response", "model": "m", "status": "completed", "error": None, "usage": usage}
    answer = STORED.read_answer("application/json", json.dumps(body).encode())

    assert (answer.response_id, answer.model, answer.finish_reasons) == ("r", "m", ["completed"])
    assert (answer.input_tokens, answer.output_tokens) == (None, None)


def test_the_error_of_a_failed_response_is_no_error_of_the_call() -> None:
    failed = {"id": "r", "object": "response", "status": "failed", "error": {"code": "server_error", "message": "x"}}
    assert STORED.read_answer("application/json", json.dumps(failed).encode()).finish_reasons == ["failed"]
    with pytest.raises(ErrorInside):
        STORED.read_answer("application/json", b'{"error": {"message": "rate limit", "code": "rate_limit_exceeded"}}')


def test_the_first_event_of_a_stream_names_the_response_whole() -> None:
    response_id = "resp_" + "x" * 300
    state = ResponseState()
    state.feed(json.dumps({"type": "response.created", "response": {"id": response_id}}).encode())

    assert state.response_id == response_id
    assert not state.content


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (404, {"message": "Response with id 'resp_1' not found.", "type": "invalid_request_error", "code": 404}),
        (404, {"message": "Previous response with id 'resp_1' not found.", "code": "previous_response_not_found"}),
        (400, {"message": "Previous response with id 'resp_1' not found.", "code": "previous_response_not_found"}),
        (400, {"message": "Previous response with id 'resp_1' not found."}),
        (404, {"message": "Response resp-model-1 does not exist", "type": "not_found_error"}),
        (404, {"message": "Response not found", "type": "NotFoundError"}),
        (404, {"message": "No response found with id 'resp_1'."}),
    ],
)
def test_a_response_that_a_server_does_not_know_is_told_from_a_model(status: int, error: dict[str, object]) -> None:
    failure = error_answer(status, json.dumps({"error": error}).encode(), {})

    assert isinstance(failure, NoSuchResponse)
    assert (failure.status, failure.verdict) == (status, Verdict.SUCCESS)


@pytest.mark.parametrize(
    ("status", "message", "kind"),
    [
        (404, "The model `response-1` does not exist", NoSuchModel),
        (404, "The model `m` was not found for this response", NoSuchModel),
        (400, "Response blocked: personal data found", BackendError),
        (400, "Response format 'x' is not supported", BackendError),
        (500, "Previous response with id 'resp_1' not found.", BackendError),
    ],
)
def test_what_only_speaks_of_a_response_is_something_else(status: int, message: str, kind: type[BackendError]) -> None:
    failure = error_answer(status, json.dumps({"error": {"message": message, "type": "t"}}).encode(), {})

    assert isinstance(failure, kind)
    assert not isinstance(failure, NoSuchResponse)


MISSING = error_answer(404, b'{"error": {"message": "Response with id \'r\' not found.", "type": "t"}}', {})


def test_each_replica_and_target_is_asked_once_for_a_response_at_once_and_off_the_budget() -> None:
    script: dict[str, list[Outcome]] = {f"a-{number}": [MISSING] for number in range(1, 7)}
    told = forward({**script, "b-1": [MISSING]}, gateway_max_attempts=2, gateway_retry_budget=0, gateway_retry_floor=0)

    assert told.error is MISSING
    assert sorted(told.calls) == [*sorted(script), "b-1"]
    assert told.calls[-1] == "b-1"
    assert all(attempt.backoff == 0 for attempt in told.record.attempts)
    for replica in told.replicas.values():
        assert (replica.breaker.consecutive_failures, replica.last_failed, replica.is_avoided("m")) == (0, False, False)


def test_replicas_that_do_not_know_it_use_up_no_attempts_of_the_one_that_may() -> None:
    cut = error_answer(500, b"{}", {})
    told = forward(
        {"a-1": [MISSING], "a-2": [MISSING], "a-3": [cut, cut, None]}, first="a-1", gateway_backoff_initial=0.001
    )

    assert told.error is None
    assert [told.calls.count(name) for name in ("a-1", "a-2", "a-3")] == [1, 1, 3]
