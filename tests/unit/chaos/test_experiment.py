"""The definitions of a game day: what may stand in them, and where they can be played."""

from pathlib import Path

import pytest

from chaos.__main__ import show
from chaos.experiment import FOLDER, Experiment, ExperimentError, Promise, load_experiments, read
from chaos.stages import ComposeStage, RemoteStage

GOOD = """
title: A title
steady_state: {seconds: 4, rate: 2}
method: [{at: 1, do: kill}]
promises: [{text: nobody hangs, measure: hung, at_most: 0}]
"""
SCRIPT = "{at: 1, do: faults, faults: [{kind: reset}]}"


@pytest.fixture
def definition(tmp_path: Path) -> Path:
    return tmp_path / "mine.yaml"


def written(file: Path, text: str) -> Experiment:
    file.write_text(text, encoding="utf-8")
    return read(file)


def test_all_our_experiments_can_be_read() -> None:
    experiments = load_experiments([])

    assert len(experiments) == len(list(FOLDER.glob("*.yaml"))) >= 6
    assert all(
        experiment.method and experiment.rollback
        for experiment in experiments.values()
        if "gateway" not in experiment.name
    )


def test_what_a_definition_says_arrives(definition: Path) -> None:
    experiment = written(
        definition,
        GOOD.replace("rate: 2", "rate: 2, deadline: 1.5, kinds: [stream], max_tokens: 3, returns: false")
        + "system: {mocks: 2, gateway: {GATEWAY_MAX_ATTEMPTS: 1}}\nrollback: [{do: start, mock: 2}]\n",
    )

    assert experiment.name == "mine"
    assert not experiment.steady_state.returns
    plan = experiment.steady_state.plan
    assert (plan["deadline"], plan["kinds"], plan["max_tokens"]) == (1.5, ("stream",), 3)
    assert not {"seconds", "returns"} & plan.keys()
    assert experiment.system.gateway == {"GATEWAY_MAX_ATTEMPTS": 1}
    assert [str(step) for step in experiment.steps] == ["kill mock-1", "start mock-2"]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("do: kill", "do: explode", "method[0]: do: 'explode'; allowed: faults, heal"),
        ("do: kill", "do: kill, often: 3", "method[0]: Object contains unknown field `often`"),
        ("{at: 1, do: kill}", "{at: 1, do: kill, mock: 2}", "method[0].mock: there is no mock 2"),
        ("at: 1", "at: 4", "method[0].at: 4; the experiment ends at 4"),
        ("do: kill", "do: network, be: closed", "method[0]: be: 'closed'; `do: network` needs one of: good, refuses"),
        ("do: kill", "do: kill, be: good", "method[0]: be: 'good'"),
        ("do: kill", "do: faults", "method[0]: faults: a list of them belongs to"),
        ("do: kill", "do: faults, faults: [{kind: statuss}]", 'fault [0] ("statuss"): kind must be one of status,'),
        ("do: kill", "do: faults, faults: [{kind: status}]", 'fault [0] ("status"): with.status: '),
        ("do: kill", "do: faults, faults: [{kind: html, times: x}]", 'fault [0] ("html"): times: expected'),
        ("measure: hung", "measure: luck", "promises[0]: measure: 'luck'; allowed: share_good"),
        ("at_most: 0", "at_most: 0, at_least: 1", "promises[0]: a promise has exactly one of at_most and at_least"),
        ("at_most: 0", "at_most: 0, until: '9'", "promises[0].until: Expected `float | null`, got `str`"),
        ("at_most: 0", "at_most: 0, since: 4", "promises[0].since: 4; the experiment ends at 4"),
        ("at_most: 0", "at_most: 0, since: 2, until: 2", "promises[0].until: 2; it must be after since"),
        ("at_most: 0", "at_most: 0, until: .nan", "promises[0].until: nan"),
        ("title: A title", "titel: A title", "unknown field `titel`"),
        ("title: A title", "", "missing required field `title`"),
        ("title: A title", "title: A title\nsytem: {mocks: 2}", "unknown field `sytem`"),
        ("rate: 2", "ratee: 2", "steady_state: Object contains unknown field `ratee`"),
        ("rate: 2", "rate: 0", "steady_state.rate: Expected `float` > 0"),
        ("seconds: 4", "seconds: x", "steady_state.seconds: Expected `float`, got `str`"),
        ("seconds: 4", "seconds: .inf", "steady_state.seconds: Expected `float` <= 86400"),
        ("rate: 2", "rate: 2, kinds: [song]", "steady_state.kinds[0]: Invalid enum value 'song'"),
        ("promises: [{text: nobody hangs, measure: hung, at_most: 0}]", "promises: []", "promises: Expected `array`"),
        (GOOD, "just words", "a mapping is needed"),
        (GOOD, "a: [", "while parsing"),
        (GOOD, "1: 2", "Expected `str`"),
    ],
)
def test_a_wrong_definition_is_told_in_one_line_by_file_and_key(
    definition: Path, old: str, new: str, says: str
) -> None:
    with pytest.raises(ExperimentError, match=r"mine\.yaml: ") as caught:
        written(definition, GOOD.replace(old, new))

    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_tells_those_there_are() -> None:
    with pytest.raises(ExperimentError, match=r"ours are: .*backend-killed"):
        load_experiments(["no-such-thing"])


def test_a_file_that_is_no_text_is_told(definition: Path) -> None:
    definition.write_bytes(b"\xff\xfe\xff")

    with pytest.raises(ExperimentError, match=r"mine\.yaml: .*decode"):
        read(definition)


@pytest.mark.parametrize(
    ("change", "remote", "compose"),
    [
        (("do: kill", "do: heal"), None, None),
        (("do: kill", "do: kill"), "it needs kill", None),
        (("{at: 1, do: kill}", SCRIPT), None, None),
        (("do: kill", "do: network, be: refuses"), "it needs network", "it needs network"),
        (("title: A", "system: {mocks: 2}\ntitle: A"), "it needs kill", None),
        (("title: A", "system: {mocks: 3}\ntitle: A"), "it needs kill", "it needs 3 mock models"),
        (
            ("title: A", "system: {gateway: {GATEWAY_MAX_ATTEMPTS: '1'}}\ntitle: A"),
            "it needs settings of its own (system)",
            "it needs settings of its own (system)",
        ),
        (
            ("title: A", "system: {config: {backends: {a: {url: $0}}}}\ntitle: A"),
            "it needs settings of its own (system)",
            "it needs settings of its own (system)",
        ),
    ],
)
def test_where_an_experiment_can_be_played(
    definition: Path, change: tuple[str, str], remote: str | None, compose: str | None
) -> None:
    experiment = written(definition, GOOD.replace(*change))

    assert experiment.obstacle(RemoteStage.actions, 1, 1) == remote
    assert experiment.obstacle(ComposeStage.actions, 2, 1) == compose


def test_a_store_is_there_only_for_limits_and_only_at_home(definition: Path) -> None:
    frozen = GOOD.replace("do: kill", "do: freeze-store")
    with pytest.raises(ExperimentError, match=r"system\.limits: a store is there only for limits"):
        written(definition, frozen)
    experiment = written(definition, frozen + "system: {limits: {requests_per_day: 5}}\n")
    assert experiment.obstacle(ComposeStage.actions, 2, 1) == "it needs settings of its own (system)"
    assert str(experiment.method[0]) == "freeze-store"


def test_faults_need_the_control_port_of_their_mock_model(definition: Path) -> None:
    text = GOOD.replace("{at: 1, do: kill}", SCRIPT.replace("do:", "mock: 2, do:")) + "system: {mocks: 2}\n"
    experiment = written(definition, text)

    assert experiment.obstacle(RemoteStage.actions, 2, 2) is None
    assert "--mock-control" in str(experiment.obstacle(ComposeStage.actions, 2, 1))


def test_the_list_says_where_each_can_be_played(capsys: pytest.CaptureFixture[str]) -> None:
    show(load_experiments([]))
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())

    assert "anywhere" in lines["errors-storm"]
    assert "at home or --compose" in lines["backend-killed"]
    assert "at home only: it needs network" in lines["black-hole"]
    assert "2 mock models" in lines["replica-killed"]


def test_what_could_not_be_measured_is_not_kept() -> None:
    assert not Promise("x", "hung", at_most=0).kept(None)
    assert Promise("x", "hung", at_most=0).kept(0)
    assert not Promise("x", "share_good", at_least=1).kept(0.99)
