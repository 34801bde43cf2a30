"""The definitions of a game day, its measures, and its report."""

from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree as ET

import pytest

from chaos.experiment import FOLDER, Experiment, ExperimentError, Promise, load_experiments, read
from chaos.gameday import Played
from chaos.load import Call
from chaos.measures import MEASURES, Findings, Sample
from chaos.promises import Verdict
from chaos.report import report

GOOD = """
title: A title
steady_state: {seconds: 4, rate: 2}
method: [{at: 1, do: kill}]
promises: [{text: nobody hangs, measure: hung, at_most: 0}]
"""


def call(number: int, *, sent: float, took: float, outcome: str = "ok") -> Call:
    return Call(id=f"c-{number}", kind="answer", started=sent, ended=sent + took, deadline=3, outcome=outcome)


def findings() -> Findings:
    calls = [call(0, sent=100, took=0.1), call(1, sent=101, took=0.2, outcome="backend_timeout")]
    calls.append(call(2, sent=102.5, took=0.25))
    samples = [Sample(0.5, {"backend-1": "closed"}, 0, 0), Sample(1.5, {"backend-1": "open"}, 3, 2)]
    return Findings(100.0, calls, samples, [(1.0, "kill <mock-1>")])


def played(*, kept: bool) -> Played:
    experiment = read_text(GOOD)
    return Played(experiment, 7, findings(), [Verdict("nobody <hangs> & waits", "0", kept)])


def read_text(text: str) -> Experiment:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "mine.yaml"
        file.write_text(text, encoding="utf-8")
        return read(file)


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src", "srcset", "data", "action"}]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_all_our_experiments_can_be_read() -> None:
    experiments = load_experiments([])

    assert len(experiments) == len(list(FOLDER.glob("*.yaml"))) >= 6
    assert all(experiment.promises and experiment.method for experiment in experiments)
    assert any(experiment.remote for experiment in experiments)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("do: kill", "do: explode", "'explode'; allowed: faults, heal"),
        ("measure: hung", "measure: luck", "'luck'; allowed: share_good"),
        ("at_most: 0", "at_most: 0, at_least: 1", "exactly one of at_most and at_least"),
        ("title: A title", "name: A title", "'title' is missing"),
        ("{at: 1, do: kill}", "{at: 1, do: kill, mock: 2}", "there is no mock 2"),
    ],
)
def test_a_wrong_definition_is_told_by_file_and_key(old: str, new: str, says: str) -> None:
    with pytest.raises(ExperimentError, match=r"mine\.yaml") as caught:
        read_text(GOOD.replace(old, new))

    assert says in str(caught.value)


def test_an_unknown_name_tells_those_there_are() -> None:
    with pytest.raises(ExperimentError, match=r"ours are: .*backend-killed"):
        load_experiments(["no-such-thing"])


@pytest.mark.parametrize(
    ("measure", "since", "until", "value"),
    [
        ("share_good", 0, 9, 2 / 3),
        ("failures", 0, 9, 1),
        ("failures", 2, 9, 0),
        ("recovery_seconds", 1, 9, 1.75),
        ("attempts_per_request", 0, 9, 1.5),
        ("attempts_per_request", 1, 9, None),
        ("share_good", 5, 9, None),
        ("hung", 0, 9, 0),
    ],
)
def test_measures_look_at_their_span(measure: str, since: float, until: float, value: float | None) -> None:
    assert MEASURES[measure](findings(), since, until) == (None if value is None else pytest.approx(value))


def test_what_could_not_be_measured_is_not_kept() -> None:
    assert not Promise("x", "hung", at_most=0).kept(None)
    assert Promise("x", "hung", at_most=0).kept(0)
    assert not Promise("x", "share_good", at_least=1).kept(0.99)


def test_the_report_is_one_page_that_loads_nothing() -> None:
    page = Page()
    page.feed(report([played(kept=True), played(kept=False)], where="here", when="now"))

    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert "Game day: 1 of 2 experiments passed" in page.text
    assert "nobody <hangs> & waits" in page.text
    assert "seed 7" in page.text


def test_the_pictures_are_well_formed() -> None:
    text = report([played(kept=True)], where="here", when="now")
    picture = ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])  # noqa: S314 - our own text

    texts = ["".join(node.itertext()) for node in picture.iter() if node.tag.endswith("text")]
    assert "kill <mock-1>" in texts
    assert "backend-1" in texts
    heights = [float(node.attrib["height"]) for node in picture.iter() if node.tag.endswith("rect")]
    assert all(height > 0 for height in heights)


def test_an_experiment_that_could_not_be_played_did_not_pass() -> None:
    broken = Played(read_text(GOOD), 7, Findings(100.0), problem="the stack did not start")

    assert not broken.passed
    assert "the stack did not start" in report([broken], where="here", when="now")
