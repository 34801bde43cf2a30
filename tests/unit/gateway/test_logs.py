# ruff: noqa: ANN401 - fields of a record are of any type
import io
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource

from gateway.record import AttemptRecord, Record
from gateway.telemetry.logs import (
    MAX_TEXT,
    OTHERS_PER_SECOND,
    OWN_PER_SECOND,
    JsonFormatter,
    RateLimit,
    ReadableFormatter,
    RequestLog,
    setup_logs,
)
from gateway.telemetry.output import Output, write_last
from gateway.telemetry.sdk_spans import to_readable
from gateway.telemetry.spans import spans_of
from gateway.telemetry.terminal import TreePrinter


def line(
    message: str = "hello %s", *args: object, name: str = "gateway", at: float = 100.0, **fields: Any
) -> logging.LogRecord:
    made = logging.LogRecord(name, logging.WARNING, "file.py", 1, message, args or ("you",), None)
    made.created = at
    for field, value in fields.items():
        setattr(made, field, value)
    return made


@pytest.fixture
def process_logs() -> Iterator[None]:
    """Whatever is set up is undone."""
    root, own = logging.getLogger(), logging.getLogger("gateway")
    kept = root.handlers[:], root.level, own.level
    yield
    root.handlers[:], root.level = kept[0], kept[1]
    own.setLevel(kept[2])
    logging.captureWarnings(capture=False)


def boom() -> Any:
    error = ValueError("boom")
    return type(error), error, None


def test_a_json_line_has_its_fields() -> None:
    document = json.loads(JsonFormatter().format(line(at=1_700_000_000.5)))

    assert document == {
        "time": "2023-11-14T22:13:20.500Z",
        "level": "warning",
        "logger": "gateway",
        "message": "hello you",
    }


def test_a_json_line_is_one_line_whatever_it_holds() -> None:
    text = JsonFormatter().format(line("a\nb %s", '\u2028\x00"', exc_info=boom()))

    assert "\n" not in text
    document = json.loads(text)
    assert document["message"] == 'a\nb \u2028\x00"'
    assert "ValueError: boom" in document["exception"]


@pytest.mark.parametrize("exc_info", [None, False, (None, None, None)])
def test_a_line_without_an_exception_says_none(exc_info: object) -> None:
    text = JsonFormatter().format(line(exc_info=exc_info))

    assert "Traceback" not in text


@pytest.mark.parametrize("as_json", [True, False])
def test_exc_info_false_reaches_both_forms(
    capsys: pytest.CaptureFixture[str],
    process_logs: None,
    as_json: bool,  # noqa: FBT001
) -> None:
    setup_logs("INFO", as_json=as_json)
    logging.getLogger("gateway").error("broken", exc_info=False)
    logging.getLogger("gateway").error("worse", exc_info=ValueError("boom"))

    text = capsys.readouterr().err
    first, second = text.splitlines()[:2]
    assert "broken" in first
    assert "worse" in second
    assert "ValueError: boom" in text
    assert "Logging error" not in text


def test_libraries_speak_only_from_warning_on(capsys: pytest.CaptureFixture[str], process_logs: None) -> None:
    setup_logs("DEBUG", as_json=False)
    logging.getLogger("aiohttp").info("noise")
    logging.getLogger("aiohttp").warning("worth it")
    logging.getLogger("gateway").debug("own")

    text = capsys.readouterr().err
    assert "noise" not in text
    assert "worth it" in text
    assert "own" in text


def test_a_line_of_one_of_several_workers_says_which(capsys: pytest.CaptureFixture[str], process_logs: None) -> None:
    for as_json in (True, False):
        setup_logs("INFO", as_json=as_json, worker=2)
        logging.getLogger("gateway").warning("breaker of a: closed -> open")

    document, text = capsys.readouterr().err.splitlines()
    assert (json.loads(document)["worker"], json.loads(document)["message"]) == (2, "breaker of a: closed -> open")
    assert text.endswith(" WARNING worker 2: breaker of a: closed -> open")


def test_the_level_is_that_of_the_setting(capsys: pytest.CaptureFixture[str], process_logs: None) -> None:
    setup_logs("ERROR", as_json=True)
    logging.getLogger("gateway").warning("no")
    logging.getLogger("gateway").error("yes")

    assert [json.loads(each)["message"] for each in capsys.readouterr().err.splitlines()] == ["yes"]


def test_a_logger_has_so_many_lines_a_second_and_no_more() -> None:
    limit = RateLimit()

    assert sum(limit.filter(line()) for _ in range(100)) == OWN_PER_SECOND
    assert sum(limit.filter(line(name="aiohttp.server")) for _ in range(100)) == OTHERS_PER_SECOND
    assert sum(limit.filter(line(at=101.0)) for _ in range(100)) == OWN_PER_SECOND


def test_one_logger_does_not_use_up_the_lines_of_another() -> None:
    limit = RateLimit()
    for _ in range(100):
        limit.filter(line(name="noisy"))

    assert limit.filter(line(name="quiet"))
    assert limit.filter(line())


def test_the_first_line_afterwards_tells_how_many_were_lost() -> None:
    limit = RateLimit(own=2)
    for _ in range(7):
        limit.filter(line())
    after, next_one = line("again %d", 5, at=101.2), line(at=101.3)

    assert limit.filter(after)
    assert after.getMessage() == "again 5 (5 lines left out before)"
    assert limit.filter(next_one)
    assert next_one.getMessage() == "hello you"


def request(**fields: Any) -> Record:
    record = Record(
        "POST", "/v1/chat/completions", trace_id=0xAB, span_id=0xCD, request_id="r-1", started=10.0, started_ns=0
    )
    record.started_ns = 1_700_000_000_500_000_000
    record.ended, record.status = 10.25, 200
    for field, value in fields.items():
        setattr(record, field, value)
    return record


def written(record: Record, *, as_json: bool, level: str = "INFO") -> str:
    stream = io.StringIO()
    RequestLog(level=level, as_json=as_json, stream=stream).write(record)
    return stream.getvalue()


def test_a_request_is_one_json_line() -> None:
    record = request(model="m", route="*")
    attempt = AttemptRecord(1, "a-1", 7, 10.0)
    attempt.ended, attempt.outcome, attempt.status, attempt.decision = 10.2, "status_500", 500, "retry"
    record.attempts.append(attempt)
    text = written(record, as_json=True)

    assert text.count("\n") == 1
    document = json.loads(text)
    assert document["time"] == "2023-11-14T22:13:20.500Z"
    assert (document["status"], document["seconds"], document["model"]) == (200, 0.25, "m")
    assert (document["request_id"], document["trace_id"], document["span_id"]) == (
        "r-1",
        f"{0xAB:032x}",
        f"{0xCD:016x}",
    )
    assert document["attempts"][0]["outcome"] == "status_500"
    assert document["attempts"][0]["decision"] == "retry"
    assert None not in document.values()


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    "fields",
    [{}, {"path": None}, {"ended": None}, {"model": "m" * 9999}, {"error_message": "a\nb\u2028c"}, {"status": 0}],
)
def test_no_request_makes_the_log_fail(fields: dict[str, Any], as_json: bool) -> None:  # noqa: FBT001
    text = written(request(**fields), as_json=as_json)

    assert text.endswith("\n")
    assert text.count("\n") == 1
    assert len(text) < 2000


def test_a_foreign_name_costs_no_line_whatever_the_locale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with (tmp_path / "log").open("w", encoding="latin-1") as stream:
        output = Output("stdout", stream)
        monkeypatch.setattr("sys.stdout", output)
        log = RequestLog(level="INFO", as_json=True)
        log.write(request(model="日本"))
        log.write(request(model="m"))
        output.start()
        write_last(output)

    lines = (tmp_path / "log").read_text(encoding="utf-8").splitlines()
    assert [json.loads(text)["model"] for text in lines] == ["日本", "m"]


EVIL = "a\x1b[31m\x07\x7f\x85\x9b\u2028\u2029\u200e\u200f\u202e\u2066\r\nfalse line"
"""What would colour a terminal, ring its bell, turn its writing around, or forge a line."""


def commands_of(text: str) -> set[str]:
    """The characters that a terminal or a viewer obeys, but for the ends of lines."""
    return {character for character in text if not character.isprintable()} - {"\n"}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("field", ["request_id", "path", "error_message", "route", "model", "outcome", "stop_reason"])
def test_no_field_of_a_request_commands_a_terminal(field: str, as_json: bool) -> None:  # noqa: FBT001
    record = request(**{field: EVIL})
    attempt = AttemptRecord(1, "a-1", 7, 10.0)
    attempt.outcome = attempt.request_id = attempt.decision = EVIL
    record.attempts.append(attempt)
    text = written(record, as_json=as_json)

    assert not commands_of(text)
    assert text.count("\n") == 1
    assert "false line" in text
    if as_json:
        assert json.loads(text)["error" if field == "error_message" else field] == EVIL
        assert json.loads(text)["attempts"][0]["request_id"] == EVIL


@pytest.mark.parametrize("as_json", [True, False])
def test_no_line_of_the_gateway_or_a_library_commands_a_terminal(
    capsys: pytest.CaptureFixture[str],
    process_logs: None,
    as_json: bool,  # noqa: FBT001
) -> None:
    setup_logs("INFO", as_json=as_json)
    logging.getLogger("gateway").warning("of %s", EVIL)
    logging.getLogger("aiohttp").error("broken", exc_info=ValueError(EVIL))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(EVIL, stacklevel=1)

    text = capsys.readouterr().err
    assert not commands_of(text)
    assert [line for line in text.splitlines() if line.startswith("false line")] == ([] if as_json else ["false line"])
    assert text.count("a\\u001b[31m\\u0007\\u007f\\u0085") == 3


@pytest.mark.parametrize("as_json", [True, False])
def test_a_long_message_and_a_long_exception_are_cut(as_json: bool) -> None:  # noqa: FBT001
    formatter = JsonFormatter() if as_json else ReadableFormatter()
    error = ValueError("y" * 1_000_000 + " the end")
    text = formatter.format(line("x" * 1_000_000 + "%s", exc_info=(ValueError, error, None)))

    assert len(text) < 2 * MAX_TEXT + 1000
    assert "yy the end" in text


def test_the_tree_in_a_terminal_commands_nothing() -> None:
    stream = io.StringIO()
    record = request(outcome=EVIL)
    attempt = AttemptRecord(1, EVIL, 7, 10.0)
    attempt.outcome = attempt.decision = EVIL
    record.attempts.append(attempt)
    TreePrinter(stream).export([to_readable(span, Resource({})) for span in spans_of(record)])

    assert not commands_of(stream.getvalue())
    assert len(stream.getvalue().splitlines()) == 3


def test_a_readable_line_names_what_one_looks_for() -> None:
    text = written(request(), as_json=False)

    for word in ("200", "POST", "/v1/chat/completions", "250.0 ms", "ok", "request=r-1", f"trace={0xAB:032x}"):
        assert word in text


def test_above_info_only_failed_requests_are_written() -> None:
    broken = request(status=200, outcome="backend_invalid_response")

    assert written(request(), as_json=True, level="WARNING") == ""
    assert written(request(status=404, outcome="not_found"), as_json=True, level="WARNING") == ""
    assert written(request(status=499, outcome="client_closed_request"), as_json=True, level="WARNING") == ""
    assert '"level":"warning"' in written(request(status=503), as_json=True, level="WARNING")
    assert '"level":"warning"' in written(broken, as_json=True, level="WARNING")
    assert written(broken, as_json=True, level="ERROR") == ""


def test_a_readable_line_says_what_went_wrong() -> None:
    text = written(request(status=504, outcome="backend_timeout", error_message="It was late."), as_json=False)

    assert "(It was late.)" in text


def test_a_text_that_is_kept_for_traces_is_in_no_line() -> None:
    for as_json in (True, False):
        assert "s3cret" not in written(request(input_text="s3cret", output_text="s3cret"), as_json=as_json)
