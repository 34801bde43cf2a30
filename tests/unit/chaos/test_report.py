"""The page about a game day, and its pictures."""

from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from chaos.experiment import Experiment, read
from chaos.gameday import Played
from chaos.measures import Findings, Sample
from chaos.picture import FONT, LETTER, picture
from chaos.promises import Verdict
from chaos.report import report
from testkit.load import Call

DEFINITION = """
title: A title
steady_state: {seconds: 4, rate: 2, deadline: 1.5, kinds: [stream]}
method: [{at: 1, do: kill}]
promises: [{text: nobody hangs, measure: hung, at_most: 0}]
"""
SVG = "{http://www.w3.org/2000/svg}"


def call(*, sent: float, took: float, outcome: str = "ok") -> Call:
    return Call(id="c", kind="stream", started=sent, ended=sent + took, deadline=1.5, outcome=outcome)


def findings() -> Findings:
    calls = [call(sent=99.2, took=0.1), call(sent=101, took=0.2, outcome="backend_timeout"), call(sent=104.5, took=0.2)]
    samples = [Sample(0.5 + step, {"backend-1": "open" if step == 1 else "closed"}, step, step) for step in range(4)]
    marks = [(1.0, "kill <mock-1>"), (1.1, "freeze mock-1"), (4.0, "rollback: start mock-1")]
    return Findings(100.0, calls, samples, marks)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    file = tmp_path / "mine.yaml"
    file.write_text(DEFINITION, encoding="utf-8")
    return read(file)


def played(experiment: Experiment, *, kept: bool) -> Played:
    verdicts = [Verdict("nobody <hangs> & waits", "0", kept)]
    settings = {"GATEWAY_MAX_ATTEMPTS": "1"}
    return Played(experiment, 7, "make chaos ARGS='mine --seed 7'", findings(), verdicts, "1.2.3 (prod)", settings)


def page_of(*results: Played, chosen: int | None = None) -> str:
    number = len(results) if chosen is None else chosen
    return report(results, chosen=number, where="here", when="now", command="make chaos ARGS='a b --seed 7'")


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "srcset", "data", "action"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_report_is_one_page_that_loads_nothing(experiment: Experiment) -> None:
    page = Page(page_of(played(experiment, kept=True), played(experiment, kept=False)))

    assert page.links == [f"#{one}" for one in page.ids]
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "Game day: 1 of 2 experiments passed" in page.text
    assert "nobody <hangs> & waits" in page.text


def test_the_report_says_where_it_was_played_and_how_to_play_it_again(experiment: Experiment) -> None:
    page = Page(page_of(played(experiment, kept=True)))

    for words in (
        "now; here; Python 3",
        "CPUs",
        "make chaos ARGS='a b --seed 7'",
        "make chaos ARGS='mine --seed 7'",
        "2 calls/s, each stream, deadline 1.5 s; seed 7",
        "Gateway 1.2.3 (prod)",
        "GATEWAY_MAX_ATTEMPTS=1",
    ):
        assert words in page.text


def test_the_report_of_a_game_day_that_was_stopped_says_so(experiment: Experiment) -> None:
    assert "2 more were chosen and not played" in page_of(played(experiment, kept=True), chosen=3)
    assert "not played" not in page_of(played(experiment, kept=True))


def test_an_experiment_that_could_not_be_played_did_not_pass(experiment: Experiment) -> None:
    broken = Played(experiment, 7, "make chaos", problem="the stack did not start")

    assert not broken.passed
    assert "the stack did not start" in page_of(broken)


def test_the_pictures_are_well_formed(experiment: Experiment) -> None:
    drawn = ET.fromstring(picture(played(experiment, kept=True)))  # noqa: S314 - our own text
    texts = ["".join(node.itertext()) for node in drawn.iter(f"{SVG}text")]

    assert {"kill <mock-1>", "rollback: start mock-1", "backend-1", "calls per second", "0 s", "4 s"} <= set(texts)
    assert all(float(box.attrib["height"]) > 0 and float(box.attrib["width"]) > 0 for box in drawn.iter(f"{SVG}rect"))


def test_labels_of_steps_at_nearly_the_same_time_do_not_touch(experiment: Experiment) -> None:
    drawn = ET.fromstring(picture(played(experiment, kept=True)))  # noqa: S314 - our own text
    places = {
        "".join(node.itertext()): (float(node.attrib["x"]), float(node.attrib["y"]))
        for node in drawn.iter(f"{SVG}text")
    }
    (x, y), (other_x, other_y) = places["kill <mock-1>"], places["freeze mock-1"]

    assert other_y - y >= FONT or other_x - x >= len("kill <mock-1>") * LETTER


def test_a_picture_needs_no_samples(experiment: Experiment) -> None:
    dead = Played(experiment, 7, "make chaos", Findings(100.0, [call(sent=100, took=0.1, outcome="refused")]))

    assert "<svg" in picture(dead)
