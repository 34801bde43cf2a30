"""`python -m chaos` as a person runs it, and its report in a real browser: on a phone, on a desk, on paper.

Promises: exit code 0 when every promise was kept, 1 when one was not, 130 after Ctrl-C, and then the report holds what
was played; the page asks for nothing but itself; on a phone 390 px wide it does not scroll sideways and no text of a
picture is lower than 9 px; on paper the first experiment begins on page 1.

The browser tests need Chromium or Chrome; BROWSER_TESTS=require makes its absence a failure.
"""

import asyncio
import base64
import os
import re
import signal
import subprocess
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

import pytest
import yaml

from chaos.experiment import FOLDER
from gateway.export import experiment_of
from testkit import REPOSITORY
from testkit.browser import DESK, PHONE, Tab
from testkit.completions import CHAT, CHAT_PATH
from testkit.http import ask
from testkit.processes import python, spawn
from tests.chaos.verdict import StartArena

KEPT = """
title: The backend answers errors for a moment
story: >-
  Every call gets a 503 for a second. The breaker opens, the backend is spared, and all is well again soon after. The
  story is as long as those of a real experiment, so that the page is as full as a real one.
steady_state: {seconds: 3, rate: 10, deadline: 2}
method:
  - {at: 1, do: faults, faults: [{kind: status, with: {status: 503}}]}
  - {at: 2, do: heal}
rollback:
  - {do: heal}
promises:
  - {text: nobody hangs, measure: hung, at_most: 0}
  - {text: every answer is well-formed, measure: ill_formed, at_most: 0}
  - {text: every answer is inside its deadline, measure: seconds_over_deadline, at_most: 0.1}
  - {text: the backend is spared, measure: attempts_per_request, at_most: 5}
"""
BROKEN = KEPT.replace("hung, at_most: 0", "failures, at_least: 1000")
NO_ROLLBACK = """
title: Nobody cleans up
steady_state: {seconds: 2, rate: 10, deadline: 2, returns: false}
method:
  - {at: 1, do: faults, faults: [{kind: status, with: {status: 503}}]}
promises:
  - {text: nobody hangs, measure: hung, at_most: 0}
"""
LONG = KEPT.replace("seconds: 3", "seconds: 60").replace("at: 2", "at: 50")
LOWEST = 9.0
"""Pixels that text in a picture is high at least."""
# How high the letters of the pictures really are, in pixels of the screen.
HEIGHTS = """
[...document.querySelectorAll('svg text')].map(text =>
  parseFloat(getComputedStyle(text).fontSize) * text.getScreenCTM().a)
"""
OVERLAPS = """
(() => {
  const texts = [...document.querySelectorAll('svg text')];
  const boxes = texts.map(text => [text.textContent, text.getBoundingClientRect()]);
  const found = [];
  boxes.forEach(([one, a], number) => boxes.slice(number + 1).forEach(([other, b]) => {
    if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom)
      found.push(one + ' / ' + other);
  }));
  return found;
})()
"""


def command(*words: str | Path) -> list[str]:
    return python("chaos", *map(str, words))


def game_day(folder: Path, definition: str) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """Play it to its end."""
    experiment, page = folder / "mine.yaml", folder / "report.html"
    experiment.write_text(definition, encoding="utf-8")
    words = command(experiment, "--seed", "7", "--out", page)
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=90, check=False)  # noqa: S603
    return done, page


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple["subprocess.CompletedProcess[str]", Path]:
    return game_day(tmp_path_factory.mktemp("game-day"), KEPT)


def test_a_game_day_tells_its_progress_and_writes_a_report(
    played: tuple["subprocess.CompletedProcess[str]", Path],
) -> None:
    done, page = played
    text = page.read_text(encoding="utf-8")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "seed 7" in done.stdout
    assert "steady state: 10 good calls in a row" in done.stdout
    told = re.findall(r"^ +\d/3 s +\d+ good, +\d+ failed; breakers: backend-1 (\w+)$", done.stdout, re.MULTILINE)
    assert set(told) & {"closed", "open", "half_open"}
    assert re.search(r"^ +[1-9]\.\d s  >>> mock-1: status$", done.stdout, re.MULTILINE)
    assert "1 of 1 experiments passed" in done.stdout
    assert "Game day: 1 of 1 experiments passed" in text
    assert "--seed 7" in text
    assert "the steady state is back after the rollback" in text


def test_a_broken_promise_is_told_by_the_exit_code(tmp_path: Path) -> None:
    done, page = game_day(tmp_path, BROKEN)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN  nobody hangs (failures >= 1000)" in done.stdout
    assert "Game day: 0 of 1 experiments passed" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("wait", "code"), [("5", 0), ("0", 1)], ids=["bridged", "not-bridged"])
def test_a_short_outage_is_seen_where_nobody_waits_for_its_end(tmp_path: Path, wait: str, code: int) -> None:
    """The experiment passes, and with `GATEWAY_OUTAGE_WAIT` 0 it fails: its verdict is none that always passes."""
    definition = (FOLDER / "short-outage.yaml").read_text(encoding="utf-8")
    settings = f"system: {{gateway: {{GATEWAY_OUTAGE_WAIT: {wait}}}}}\n"
    done, _ = game_day(tmp_path, definition + settings)

    assert done.returncode == code, done.stdout + done.stderr
    verdict = "BROKEN" if code else "kept  "
    assert f"  {verdict}  no caller sees the second of 503s (failures <= 0)" in done.stdout
    assert f"  {verdict}  no caller without an answer sees the restart (unanswered <= 0)" in done.stdout
    assert "  kept    every answer is well-formed" in done.stdout


def test_an_incident_that_was_exported_is_played_again(tmp_path: Path) -> None:
    attempts = [
        {
            "number": number,
            "backend": "primary",
            "outcome": outcome,
            "status": status,
            "message": "",
            "retry_after": None,
        }
        for number, (outcome, status) in enumerate((("status_502", 502), ("connection_error", None), ("ok", 200)), 1)
    ]
    document = {
        "trace_id": "245af912", "started": "2026-11-29T20:25:51.902Z", "outcome": "ok", "stream": True, "attempts": 3,
        "first_token_seconds": 0.4, "attempts_made": attempts, "why": "Answered by primary at the third attempt.",
    }  # fmt: skip
    done, page = game_day(tmp_path, yaml.safe_dump(experiment_of(document)))

    assert done.returncode == 0, done.stdout + done.stderr
    assert ">>> mock-1: status, reset" in done.stdout
    assert "kept    the attempts fail as they did (failed_attempts >= 2)" in done.stdout
    assert "kept    callers are answered, as this one was (failures <= 0)" in done.stdout
    assert "Answered by primary at the third attempt." in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "not-guarded"])
def test_a_bad_rollout_goes_on_where_nobody_guards_it(tmp_path: Path, guarded: bool) -> None:  # noqa: FBT001
    """The experiment passes, and without its guard it fails; callers see no error either way."""
    definition = (FOLDER / "bad-rollout.yaml").read_text(encoding="utf-8")
    guard = re.search(r"\n +guard: .*", definition)
    assert guard is not None
    done, _ = game_day(tmp_path, definition if guarded else definition.replace(guard[0], ""))

    assert done.returncode == (0 if guarded else 1), done.stdout + done.stderr
    verdict = "kept  " if guarded else "BROKEN"
    assert f"  {verdict}  then it loses it (guards_tripped >= 1)" in done.stdout
    assert f"  {verdict}  and gets nothing more (arrivals_after_trip <= 0)" in done.stdout
    assert ("s  >>> new has lost its traffic" in done.stdout) == guarded
    assert "  kept    no caller sees it (failures <= 0)" in done.stdout


def test_a_gateway_that_is_not_there_is_a_problem_and_not_a_pass(tmp_path: Path) -> None:
    experiment, page = tmp_path / "mine.yaml", tmp_path / "report.html"
    experiment.write_text(KEPT, encoding="utf-8")
    words = command(experiment, "--target", "http://127.0.0.1:9", "--mock-control", "http://127.0.0.1:9", "--out", page)
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603

    assert done.returncode == 1, done.stdout + done.stderr
    assert "PROBLEM nothing answers at 127.0.0.1:9;" in done.stdout
    assert "Traceback" not in done.stderr
    assert "nothing answers at 127.0.0.1:9" in page.read_text(encoding="utf-8")


async def test_a_stack_that_runs_already_gets_its_script_back(start_arena: StartArena, tmp_path: Path) -> None:
    """The definition has no rollback; the mock model's own script is back, and a fault that was used up stays so."""
    arena = await start_arena()
    await arena.mock.faults({"kind": "html", "times": 1}, {"kind": "reset", "match": {"model": "other"}})
    control = arena.mock.control_url
    answer = await ask(arena.mock.url + CHAT_PATH, method="POST", body=CHAT)
    assert answer.headers["content-type"].startswith("text/html")
    before = (await arena.mock.control("GET", "/faults")).json
    experiment, page = tmp_path / "mine.yaml", tmp_path / "report.html"
    experiment.write_text(NO_ROLLBACK, encoding="utf-8")
    words = command(experiment, "--target", arena.gateway.url, "--mock-control", control, "--out", page)
    process = await spawn(words, env=os.environ, stdout=PIPE, stderr=STDOUT)
    async with asyncio.timeout(90):
        said = (await process.communicate())[0].decode()
    after = (await arena.mock.control("GET", "/faults")).json

    assert process.returncode == 0, said
    assert "mock-1: status" in said
    assert after == before
    assert [fault["used"] for fault in after] == [1, 0]


async def test_ctrl_c_ends_in_order_and_leaves_a_report(tmp_path: Path) -> None:
    (tmp_path / "first.yaml").write_text(KEPT, encoding="utf-8")
    (tmp_path / "second.yaml").write_text(LONG, encoding="utf-8")
    (tmp_path / "third.yaml").write_text(KEPT, encoding="utf-8")
    page = tmp_path / "report.html"
    words = command(*(tmp_path / f"{name}.yaml" for name in ("first", "second", "third")), "--out", page)
    process = await spawn(words, env=os.environ, stdout=PIPE, stderr=STDOUT)
    assert process.stdout is not None
    said = ""
    async with asyncio.timeout(90):
        async for line in process.stdout:
            said += line.decode()
            if "[2/3]" in said and ">>>" in said.rpartition("[2/3]")[2]:
                process.send_signal(signal.SIGINT)
                break
        said += (await process.stdout.read()).decode()
        code = await process.wait()
    text = page.read_text(encoding="utf-8")

    assert code == 130, said
    assert "rollback: heal mock-1" in said.rpartition("[2/3]")[2]
    assert "Traceback" not in said
    assert "Game day: 1 of 2 experiments passed" in text
    assert "1 more were chosen and not played" in text
    assert "stopped before its end" in text
    assert text.count("<svg") == 2


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
async def test_the_report_fits_the_screen_and_can_be_read(
    played: tuple["subprocess.CompletedProcess[str]", Path], tab: Tab, size: tuple[int, int]
) -> None:
    page = played[1]
    await tab.open(page.as_uri(), size)

    assert await tab.value("innerWidth") == size[0]
    assert await tab.value("document.documentElement.scrollWidth <= innerWidth")
    assert min(await tab.value(HEIGHTS)) >= LOWEST
    assert await tab.value(OVERLAPS) == []
    assert tab.requested == [page.as_uri()]


async def test_the_printed_report_begins_on_its_first_page(
    played: tuple["subprocess.CompletedProcess[str]", Path], tab: Tab
) -> None:
    await tab.open(played[1].as_uri(), DESK)
    sheet = {"paperWidth": 8.3, "paperHeight": 7}  # inches; lower than the first experiment
    printed = await tab.call("Page.printToPDF", printBackground=True, generateDocumentOutline=True, **sheet)
    pdf = base64.b64decode(printed["data"])
    first_page = re.search(rb"(\d+) 0 obj\s*<<[^>]*/Type\s*/Page\b", pdf)
    heading = re.search(rb"/Title \(The backend answers errors[^)]*\)\s*/Dest \[(\d+) 0 R", pdf)

    assert first_page is not None
    assert heading is not None
    assert heading[1] == first_page[1]
