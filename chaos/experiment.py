"""An experiment: a steady state, what is done to it and when, what puts it back, and what must hold meanwhile."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from chaos.measures import MEASURES

FOLDER = Path(__file__).resolve().parent / "experiments"
ACTIONS = {
    "faults": "script faults at the mock model (`faults`: a list, as PUT /faults takes it)",
    "heal": "take all faults away",
    "crash": "the mock model's process ends from inside",
    "kill": "SIGKILL the mock model",
    "start": "start it again",
    "freeze": "SIGSTOP the mock model",
    "thaw": "SIGCONT",
    "network": "the network before the mock model (`be`: good, refuses, swallows, no connect)",
    "stop-gateway": "SIGTERM the gateway, and start it again when it has ended",
}
REMOTE_ACTIONS = frozenset({"faults", "heal"})
"""What can be done to a stack that this program did not start: the mock model's control port is all there is."""


class ExperimentError(Exception):
    """A definition is wrong; the message names file, key and what is allowed."""


@dataclass(frozen=True)
class Step:
    """One action: `at` so many seconds after the load began, on the mock model number `mock` (from 1)."""

    do: str
    at: float = 0.0
    mock: int = 1
    faults: tuple[dict[str, Any], ...] = ()
    be: str = "good"

    def __str__(self) -> str:
        if self.do == "faults":
            kinds = ", ".join(str(fault.get("kind")) for fault in self.faults)
            return f"mock-{self.mock}: {kinds}"
        if self.do == "network":
            return f"network to mock-{self.mock}: {self.be}"
        return self.do if self.do == "stop-gateway" else f"{self.do} mock-{self.mock}"


@dataclass(frozen=True)
class Promise:
    """What must hold: a `measure` (of `measures.MEASURES`) between `since` and `until`, at most or at least so much."""

    text: str
    measure: str
    at_most: float | None = None
    at_least: float | None = None
    since: float = 0.0
    until: float = float("inf")

    def kept(self, value: float | None) -> bool:
        """Whether the measured value keeps it; a value that could not be measured does not."""
        if value is None:
            return False
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    @property
    def bound(self) -> str:
        """For people."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


@dataclass(frozen=True)
class Experiment:
    """A whole definition; `load` is further fields of `load.Plan`, `gateway` and `mock` are environments."""

    name: str
    title: str
    story: str
    seconds: float
    rate: float
    method: tuple[Step, ...]
    rollback: tuple[Step, ...]
    promises: tuple[Promise, ...]
    mocks: int = 1
    load: dict[str, Any] = field(default_factory=dict)
    gateway: dict[str, str] = field(default_factory=dict)
    mock: dict[str, str] = field(default_factory=dict)

    @property
    def remote(self) -> bool:
        """Whether it can be played against a stack that runs already."""
        return all(step.do in REMOTE_ACTIONS and step.mock == 1 for step in (*self.method, *self.rollback))

    @property
    def proxied(self) -> bool:
        """Whether it needs a network that fails."""
        return any(step.do == "network" for step in self.method)


def load_experiments(names: list[str]) -> list[Experiment]:
    """Those of `names` (of ours, or paths of files of one's own); all of ours when there are none.

    Raises:
        ExperimentError: there is no such experiment, or its definition is wrong.
    """
    if not names:
        return [read(path) for path in sorted(FOLDER.glob("*.yaml"))]
    return [read(Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml") for name in names]


def read(path: Path) -> Experiment:
    """Read one definition. Raises: ExperimentError."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ExperimentError(f"{path}: {error.strerror}; ours are: {known}") from None
    except yaml.YAMLError as error:
        raise ExperimentError(f"{path}: {error}") from None
    try:
        return _experiment(path.stem, document)
    except (KeyError, TypeError, ValueError) as error:
        problem = f"the key {error} is missing" if isinstance(error, KeyError) else str(error)
        raise ExperimentError(f"{path}: {problem}") from None


def _experiment(name: str, document: dict[str, Any]) -> Experiment:
    if not isinstance(document, dict):
        raise TypeError("a mapping is needed")
    steady = dict(document["steady_state"])
    system = document.get("system") or {}
    experiment = Experiment(
        name=name,
        title=str(document["title"]),
        story=str(document.get("story", "")).strip(),
        seconds=float(steady.pop("seconds")),
        rate=float(steady.pop("rate")),
        method=tuple(_step(step) for step in document["method"]),
        rollback=tuple(_step(step) for step in document.get("rollback") or ()),
        promises=tuple(_promise(promise) for promise in document["promises"]),
        mocks=int(system.get("mocks", 1)),
        load=steady,
        gateway={str(key): str(value) for key, value in (system.get("gateway") or {}).items()},
        mock={str(key): str(value) for key, value in (system.get("mock") or {}).items()},
    )
    for step in (*experiment.method, *experiment.rollback):
        if not 1 <= step.mock <= experiment.mocks:
            raise ValueError(f"{step.do}: there is no mock {step.mock}; system.mocks is {experiment.mocks}")
    return experiment


def _step(document: dict[str, Any]) -> Step:
    if document.get("do") not in ACTIONS:
        raise ValueError(f"do: {document.get('do')!r}; allowed: {', '.join(ACTIONS)}")
    return Step(**{**document, "faults": tuple(document.get("faults", ()))})


def _promise(document: dict[str, Any]) -> Promise:
    if document.get("measure") not in MEASURES:
        raise ValueError(f"measure: {document.get('measure')!r}; allowed: {', '.join(MEASURES)}")
    if ("at_most" in document) == ("at_least" in document):
        raise ValueError("a promise has exactly one of at_most and at_least")
    return Promise(**document)
