# ruff: noqa: ANN401 - fields of a record are of any type
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from gateway.record import AttemptRecord, Record
from gateway.telemetry.logs import OTHERS_PER_SECOND, OWN_PER_SECOND, JsonFormatter, RateLimit, RequestLog, setup_logs


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
    log = RequestLog(level=level, as_json=as_json, stream=stream)
    log.start()
    log.write(record)
    log.stop()
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


def test_a_foreign_name_costs_no_line_whatever_the_locale(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(bytes_written, encoding="latin-1"))
    log = RequestLog(level="INFO", as_json=True)
    log.start()
    log.write(request(model="日本"))
    log.write(request(model="m"))
    log.stop()

    assert [json.loads(text)["model"] for text in bytes_written.getvalue().decode().splitlines()] == ["日本", "m"]


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
