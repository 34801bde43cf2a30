import json
from pathlib import Path

import pytest

from mock_model.journal import MAX_TEXT, Entry, Journal, clip


def entry(model: str = "m") -> Entry:
    return Entry(
        time=1.5,
        path="/v1/chat/completions",
        model=model,
        request_id="r",
        traceparent=None,
        fingerprint="00",
        fault=None,
    )


def lines(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_call_has_the_fields_of_the_contract() -> None:
    journal = Journal()
    call = entry()
    journal.arrive(call)
    under_way = json.loads(journal.document())
    journal.end(call, "complete")

    assert under_way["calls"][0]["ended"] is None
    assert json.loads(journal.document()) == {
        "total": 1,
        "dropped": 0,
        "calls": [
            {
                "time": 1.5,
                "path": "/v1/chat/completions",
                "model": "m",
                "request_id": "r",
                "traceparent": None,
                "fingerprint": "00",
                "fault": None,
                "ended": "complete",
                "events_sent": 0,
                "method": "",
                "query": "",
            }
        ],
    }


def test_only_the_first_end_counts() -> None:
    journal, call = Journal(), entry()
    journal.arrive(call)
    journal.end(call, "caller_left")
    journal.end(call, "fault")

    assert call.ended == "caller_left"


def test_memory_is_bounded_and_the_rest_is_counted() -> None:
    journal = Journal(capacity=3)
    for number in range(10):
        journal.arrive(entry(str(number)))

    assert (journal.total, journal.dropped) == (10, 7)
    assert [call.model for call in journal.calls] == ["7", "8", "9"]


def test_clearing_forgets_everything() -> None:
    journal = Journal()
    journal.arrive(entry())
    journal.clear()

    assert json.loads(journal.document()) == {"total": 0, "dropped": 0, "calls": []}


def test_the_file_has_a_line_as_a_call_comes_and_one_as_it_ends(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    journal, first, second = Journal(file), entry("a"), entry("b")
    journal.arrive(first)
    journal.arrive(second)
    journal.end(second, "caller_left")
    written = lines(file)
    journal.end(first, "complete")
    journal.clear()
    journal.close()

    assert [(line["event"], line.get("call")) for line in written] == [
        ("started", None),
        ("arrived", 1),
        ("arrived", 2),
        ("ended", 2),
    ]
    assert written[1]["model"] == "a"
    assert written[3]["ended"] == "caller_left"
    assert len(lines(file)) == 5


def test_the_file_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "journal"
    for _ in range(2):
        journal = Journal(file)
        journal.arrive(entry())
        journal.close()

    assert [line["event"] for line in lines(file)] == ["started", "arrived"] * 2


def test_a_file_that_can_no_longer_be_written_ends_no_call(caplog: pytest.LogCaptureFixture) -> None:
    journal, call = Journal(Path("/dev/full")), entry()
    journal.arrive(call)
    journal.end(call, "complete")

    assert journal.total == 1
    assert [record.getMessage() for record in caplog.records] == [
        "cannot write the journal file; it ends here: [Errno 28] No space left on device"
    ]


def test_texts_of_callers_are_clipped_and_can_be_written() -> None:
    assert clip("x" * 1000) == "x" * MAX_TEXT
    assert clip("a\udcff") == "a?"
