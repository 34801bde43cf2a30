# ruff: noqa: ANN401
from typing import TYPE_CHECKING, Any, cast

import pytest

from mock_model.answer import DONE, Answer, Event
from mock_model.draws import fingerprint
from mock_model.faults import KINDS
from mock_model.script import MAX_ENTRIES, Script, ScriptError

if TYPE_CHECKING:
    from mock_model.call import Call

STREAM = Answer(events=(Event(b"data: {}\n\n", "token", step=True), Event(b"data: {}\n\n", "finish"), DONE))
WHOLE = Answer(body=b"{}")


class CallFacts:
    """The part of a call that a script looks at."""

    def __init__(
        self, script: Script, body: bytes, path: str = "/v1/chat/completions", model: str = "m", *, stream: bool = False
    ) -> None:
        self.path = path
        self.model = model
        self.stream = stream
        self.fingerprint = fingerprint(path, body)
        self.occurrence = script.count(self.fingerprint)
        self.answer = STREAM if stream else WHOLE


def choose(script: Script, body: bytes = b"", path: str = "/v1/chat/completions", **facts: Any) -> str | None:
    fault = script.choose(cast("Call", CallFacts(script, body, path, **facts)))
    return None if fault is None else fault.kind


def script_of(*entries: dict[str, Any], seed: int = 0) -> Script:
    script = Script(seed)
    script.replace(list(entries))
    return script


def test_no_fault_is_no_fault() -> None:
    assert choose(Script(0)) is None


def test_the_first_that_matches_and_is_not_used_up_applies() -> None:
    script = script_of(
        {"kind": "reset", "times": 1},
        {"kind": "html", "times": 2},
        {"kind": "not_json", "match": {"model": "other"}},
    )

    assert [choose(script) for _ in range(4)] == ["reset", "html", "html", None]
    assert choose(script, model="other") == "not_json"
    assert [entry["used"] for entry in script.document()] == [1, 2, 1]


def test_neither_times_nor_rate_is_every_call() -> None:
    script = script_of({"kind": "reset"})

    assert {choose(script) for _ in range(20)} == {"reset"}


@pytest.mark.parametrize(
    ("match", "facts", "expected"),
    [
        ({"path": "/v1/embeddings"}, {"path": "/v1/embeddings"}, "reset"),
        ({"path": "/v1/embeddings"}, {}, None),
        ({"stream": True}, {"stream": True}, "reset"),
        ({"stream": True}, {}, None),
        ({"stream": False}, {}, "reset"),
        ({"model": "m", "stream": False}, {}, "reset"),
        ({"model": "n"}, {}, None),
        ({}, {"path": "/health"}, None),
        ({"model": "m"}, {"path": "/health"}, None),
        ({"path": "/health"}, {"path": "/health"}, "reset"),
        ({"path": "/tokenize"}, {"path": "/tokenize"}, "reset"),
        ({"path": "/v1/responses/*"}, {"path": "/v1/responses/resp_1/cancel"}, "reset"),
        ({"path": "/v1/responses/*"}, {"path": "/v1/responses"}, None),
        ({"path": "/v1/*"}, {"path": "/health"}, None),
    ],
)
def test_match(match: dict[str, Any], facts: dict[str, Any], expected: str | None) -> None:
    assert choose(script_of({"kind": "reset", "match": match}), **facts) == expected


@pytest.mark.parametrize("kind", ["no_done", "no_finish", "malformed_event"])
def test_a_fault_of_streams_is_not_used_up_by_other_calls(kind: str) -> None:
    script = script_of({"kind": kind, "times": 1})

    assert choose(script) is None
    assert choose(script, stream=True) == kind
    assert choose(script, stream=True) is None


@pytest.mark.parametrize(
    ("kind", "parameters", "shows"),
    [
        ("cut", {"after_events": 2}, True),
        ("cut", {"after_events": 3}, False),
        ("cut", {"after_events": 3, "how": "reset"}, True),
        ("cut", {"after_events": 4, "how": "reset"}, False),
        ("cut", {"after_events": 2, "where": "inside_event"}, True),
        ("cut", {"after_events": 3, "how": "reset", "where": "inside_event"}, False),
        ("cut", {"after_events": 3, "how": "reset", "where": "inside_character"}, False),
        ("stall", {"after_events": 3}, True),
        ("stall", {"after_events": 4}, False),
        ("malformed_event", {"after_events": 100}, True),
        ("content_type", {"value": "application/json"}, True),
        ("content_type", {"value": "text/event-stream"}, False),
    ],
)
def test_a_fault_that_cannot_show_in_a_stream_is_not_used_up_by_it(
    kind: str,
    parameters: dict[str, Any],
    shows: bool,  # noqa: FBT001
) -> None:
    script = script_of({"kind": kind, "with": parameters, "times": 1}, {"kind": "reset"})

    assert choose(script, stream=True) == (kind if shows else "reset")
    assert script.document()[0]["used"] == shows


@pytest.mark.parametrize("kind", ["cut", "stall"])
def test_whole_answers_are_cut_in_their_middle_however_many_events(kind: str) -> None:
    assert choose(script_of({"kind": kind, "with": {"after_events": 100}})) == kind


def test_headers_may_be_numbers_and_hold_tabs_and_letters_of_any_script() -> None:
    headers = {"retry-after": 1, "x-share": 0.5, "x-empty": "", "x-tab": "a\tb", "x-other": "é… 東京"}
    entry = {"kind": "status", "with": {"status": 429, "headers": headers}}

    assert script_of(entry).document() == [{**entry, "used": 0}]


def bodies() -> list[bytes]:
    return [bytes([number % 50]) for number in range(400)]


def outcome(order: list[bytes], seed: int = 0) -> dict[tuple[bytes, int], str | None]:
    """Which occurrence of which body got which fault."""
    script = script_of({"kind": "reset", "rate": 0.3}, {"kind": "html", "rate": 0.5}, seed=seed)
    seen: dict[bytes, int] = {}
    result = {}
    for body in order:
        result[body, seen.setdefault(body, 0)] = choose(script, body)
        seen[body] += 1
    return result


def test_draws_do_not_depend_on_the_order_of_arrival() -> None:
    assert outcome(bodies()) == outcome(bodies()[::-1]) == outcome(sorted(bodies()))


def test_draws_depend_on_the_seed() -> None:
    assert outcome(bodies(), seed=1) == outcome(bodies(), seed=1)
    assert outcome(bodies(), seed=1) != outcome(bodies(), seed=2)


def test_draws_keep_near_their_rate() -> None:
    kinds = list(outcome(bodies()).values())

    assert 0.2 < kinds.count("reset") / 400 < 0.4
    assert 0.25 < kinds.count("html") / 400 < 0.45


def test_a_new_script_counts_anew() -> None:
    script = script_of({"kind": "reset", "rate": 0.5})
    first = [choose(script) for _ in range(30)]
    script.replace([{"kind": "reset", "rate": 0.5}])

    assert [choose(script) for _ in range(30)] == first


def test_the_document_can_be_put_again_and_goes_on() -> None:
    script = script_of({"kind": "status", "with": {"status": 503}, "times": 3, "match": {"model": "m"}})
    choose(script)
    document = script.document()
    script.replace(document)

    assert document == [
        {"kind": "status", "with": {"status": 503}, "times": 3, "match": {"model": "m"}, "used": 1},
    ]
    assert [choose(script) for _ in range(3)] == ["status", "status", None]


@pytest.mark.parametrize(
    ("entry", "where", "words"),
    [
        (3, "[1]", ["object"]),
        ({}, "[1].kind", ["kind"]),
        ({"kind": "nope"}, "[1].kind", ["nope", "hang_before_headers"]),
        ({"kind": "reset", "tims": 1}, "[1].tims", ["reset", "tims"]),
        ({"kind": "reset", "times": 0}, "[1].times", ["times", ">= 1"]),
        ({"kind": "reset", "times": 1.5}, "[1].times", ["times"]),
        ({"kind": "reset", "rate": 1.5}, "[1].rate", ["rate", "<= 1"]),
        ({"kind": "reset", "rate": 0.5, "times": 1}, "[1].rate", ["times or rate"]),
        ({"kind": "reset", "match": {"modell": "x"}}, "[1].match.modell", ["match", "modell"]),
        ({"kind": "reset", "match": {"path": "/v2"}}, "[1].match.path", ["match.path"]),
        ({"kind": "reset", "with": {"x": 1}}, "[1].with.x", ["with", "`x`"]),
        ({"kind": "status"}, "[1].with.status", ["status"]),
        ({"kind": "status", "with": {"status": "503"}}, "[1].with.status", ["with.status"]),
        ({"kind": "status", "with": {"status": 99}}, "[1].with.status", ["with.status", ">= 200"]),
        (
            {"kind": "status", "with": {"status": 503, "headers": {"a": "b\r\nc: d"}}},
            "[1].with.headers",
            ["with.headers: "],
        ),
        ({"kind": "status", "with": {"status": 503, "headers": {"a": "1\n"}}}, "[1].with.headers", ["with.headers: "]),
        (
            {"kind": "status", "with": {"status": 503, "headers": {"a": "a\u0001b"}}},
            "[1].with.headers",
            ["with.headers: "],
        ),
        (
            {"kind": "status", "with": {"status": 503, "headers": {"a": "a\u007fb"}}},
            "[1].with.headers",
            ["with.headers: "],
        ),
        ({"kind": "status", "with": {"status": 503, "headers": {"a": "\ta"}}}, "[1].with.headers", ["with.headers: "]),
        ({"kind": "status", "with": {"status": 503, "headers": {"a": "a\t"}}}, "[1].with.headers", ["with.headers: "]),
        ({"kind": "status", "with": {"status": 503, "headers": {"a\n": "1"}}}, "[1].with.headers", ["with.headers: "]),
        ({"kind": "status", "with": {"status": 503, "headers": {"a": True}}}, None, ["with.headers"]),
        (
            {"kind": "status", "with": {"status": 503, "headers": {"Content-Length": "5"}}},
            "[1].with.headers",
            ["with.headers", "Content-Length", "short_body"],
        ),
        (
            {"kind": "status", "with": {"status": 503, "headers": {"x": "y", "transfer-encoding": "chunked"}}},
            "[1].with.headers",
            ["transfer-encoding", "short_body"],
        ),
        (
            {"kind": "status", "with": {"status": 503, "headers": {"connection": "close"}}},
            "[1].with.headers",
            ["connection", "short_body"],
        ),
        ({"kind": "content_type", "with": {"value": "text/plain\n"}}, "[1].with.value", ["with.value"]),
        ({"kind": "content_type", "with": {"value": "text/\u0001"}}, "[1].with.value", ["with.value"]),
        ({"kind": "reset", "match": {"path": "/v1/x\n"}}, "[1].match.path", ["match.path"]),
        ({"kind": "reset", "match": {"path": "/health\n"}}, "[1].match.path", ["match.path"]),
        ({"kind": "latency"}, "[1].with.delay", ["delay"]),
        ({"kind": "latency", "with": {"delay": -1}}, "[1].with.delay", ["with.delay", ">= 0"]),
        ({"kind": "latency", "with": {"delay": float("nan")}}, "[1].with.delay", ["with.delay"]),
        ({"kind": "cut", "with": {"how": "rset"}}, "[1].with.how", ["with.how", "rset"]),
        ({"kind": "cut", "with": {"after_events": -1}}, "[1].with.after_events", ["with.after_events"]),
        ({"kind": "drip", "with": {"bytes": 0}}, "[1].with.bytes", ["with.bytes"]),
        ({"kind": "overload", "with": {}}, "[1].with.capacity", ["capacity"]),
    ],
)
def test_a_bad_entry_is_named_with_its_key(entry: Any, where: str | None, words: list[str]) -> None:
    script = script_of({"kind": "html"})

    with pytest.raises(ScriptError) as caught:
        script.replace([{"kind": "reset"}, entry])

    assert str(caught.value).startswith("fault [1]")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert where is None or caught.value.where == where
    assert choose(script) == "html"


@pytest.mark.parametrize("value", [None, {}, "x", [{"kind": "reset"}] * (MAX_ENTRIES + 1)])
def test_a_script_is_a_list_of_bearable_length(value: Any) -> None:
    with pytest.raises(ScriptError):
        Script(0).replace(value)


def test_the_kinds_are_those_of_the_contract() -> None:
    contract = """
        status latency hang_before_headers hang_after_headers slow_first_token stall cut no_done no_finish
        malformed_event error_event content_type html short_body not_json drip reset refuse overload crash
    """
    further = "pings one_slot"

    assert set(KINDS) == {*contract.split(), *further.split()}
