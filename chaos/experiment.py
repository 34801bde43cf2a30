"""An experiment: a steady state, what is done to it and when, what puts it back, and what must hold meanwhile."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import yaml
from msgspec import Meta

from chaos.measures import MEASURES
from mock_model.script import Script
from testkit.fault_proxy import Network

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
    "kill-store": "SIGKILL the store of shared limits (`system.limits`)",
    "start-store": "start it again, empty",
    "freeze-store": "SIGSTOP the store of shared limits",
    "thaw-store": "SIGCONT",
    "stop-gateway": "SIGTERM the gateway, and start it again when it has ended",
}
SCRIPTED = frozenset({"faults", "heal", "crash"})
"""Actions that go through the mock model's control port."""
OF_STORE = frozenset({"kill-store", "start-store", "freeze-store", "thaw-store"})

Seconds = Annotated[float, Meta(ge=0, le=86_400)]
Positive = Annotated[float, Meta(gt=0, le=86_400)]
Count = Annotated[int, Meta(ge=1, le=100_000)]
Kinds = Annotated[tuple[Literal["answer", "stream"], ...], Meta(min_length=1)]
Variables = dict[str, str | int | float]


class ExperimentError(Exception):
    """A definition is wrong; the message is one line that names file, key and what is allowed."""


class Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of a definition."""


class Step(Struct, frozen=True):
    """One action: `at` so many seconds after time zero, on the mock model number `mock` (from 1)."""

    do: str
    at: Seconds = 0.0
    mock: Count = 1
    faults: tuple[dict[str, Any], ...] = ()
    be: str | None = None

    def __post_init__(self) -> None:
        if self.do not in ACTIONS:
            raise ValueError(f"do: {self.do!r}; allowed: {', '.join(ACTIONS)}")
        if (self.do == "faults") != bool(self.faults):
            raise ValueError("faults: a list of them belongs to `do: faults`, and only to it")
        networks = [network.value for network in Network]
        if self.be not in (networks if self.do == "network" else [None]):
            raise ValueError(f"be: {self.be!r}; `do: network` needs one of: {', '.join(networks)}; nothing else has it")
        json.dumps(self.faults)
        Script(0).replace(list(self.faults))

    def __str__(self) -> str:
        if self.do == "faults":
            return f"mock-{self.mock}: {', '.join(str(fault['kind']) for fault in self.faults)}"
        if self.do == "network":
            return f"network to mock-{self.mock}: {self.be}"
        return self.do if self.do in OF_STORE | {"stop-gateway"} else f"{self.do} mock-{self.mock}"


class Promise(Struct, frozen=True):
    """What must hold: a `measure` (of `measures.MEASURES`) at most or at least so much.

    It looks at the calls sent between `since` and `until` (seconds; None: the end of `steady_state.seconds`). What is
    sent after that end, while the gateway recovers, counts only for an `until` that reaches there, such as `.inf`.
    """

    text: str
    measure: str
    at_most: float | None = None
    at_least: float | None = None
    since: Seconds = 0.0
    until: float | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"measure: {self.measure!r}; allowed: {', '.join(MEASURES)}")
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a promise has exactly one of at_most and at_least")

    def kept(self, value: float | None) -> bool:
        """Tell whether the measured value keeps it; a value that could not be measured does not."""
        if value is None:
            return False
        return (self.at_most is None or value <= self.at_most) and (self.at_least is None or value >= self.at_least)

    @property
    def bound(self) -> str:
        """For people."""
        return f"<= {self.at_most:g}" if self.at_most is not None else f">= {self.at_least:g}"


class SteadyState(Struct, frozen=True, kw_only=True):
    """The load, and how it is with no fault: every call is good.

    That must be so for a second before time zero, or nothing is done, and again after the rollback.

    Attributes:
        seconds: of the experiment, from time zero.
        returns: whether every call must be good again after the rollback; false for a method that leaves a mark.
        rate, deadline, kinds, ...: see `load.Plan`.
    """

    seconds: Positive
    returns: bool = True
    rate: Annotated[float, Meta(gt=0, le=10_000)]
    deadline: Positive = 3.0
    kinds: Kinds = ("answer", "stream")
    burst: Count = 1
    leave_after: Count | None = None
    leave_before: Positive | None = None
    max_tokens: Count | None = None
    model: str = "demo-model"
    headers: dict[str, str] = {}
    sdk_retries: Annotated[int, Meta(ge=0, le=10)] = 0

    @property
    def plan(self) -> dict[str, Any]:
        """The fields of `load.Plan`."""
        fields = msgspec.structs.asdict(self)
        return {key: value for key, value in fields.items() if key not in {"seconds", "returns"}}

    def __str__(self) -> str:
        burst = f", {self.burst} at a time" if self.burst > 1 else ""
        return f"{self.rate:g} calls/s{burst}, each {' or '.join(self.kinds)}, deadline {self.deadline:g} s"


class System(Struct, frozen=True, kw_only=True):
    """What the experiment needs: so many mock models as replicas, and settings of gateway and mock models.

    `config`: the document of `GATEWAY_CONFIG`, in which `$0`, `$1`, ... stand for the mock models' urls.
    With `limits` all calls are made with one key that has them, and a store shares them.
    """

    mocks: Annotated[int, Meta(ge=1, le=10)] = 1
    gateway: Variables = {}
    mock: Variables = {}
    config: dict[str, Any] = {}
    limits: dict[str, Annotated[int, Meta(ge=1)]] = {}


class Experiment(Struct, frozen=True, kw_only=True):
    """A whole definition; `name` is that of its file unless it says another one."""

    name: str
    title: str
    story: str = ""
    system: System = System()
    steady_state: SteadyState
    method: tuple[Step, ...]
    rollback: tuple[Step, ...] = ()
    promises: Annotated[tuple[Promise, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        seconds = self.steady_state.seconds
        for part, steps in (("method", self.method), ("rollback", self.rollback)):
            for number, step in enumerate(steps):
                if step.mock > self.system.mocks:
                    raise ValueError(
                        f"{part}[{number}].mock: there is no mock {step.mock}; system.mocks is {self.system.mocks}"
                    )
                if step.at >= seconds:
                    raise ValueError(f"{part}[{number}].at: {step.at:g}; the experiment ends at {seconds:g}")
        if not self.system.limits and any(step.do in OF_STORE for step in self.steps):
            raise ValueError("system.limits: a store is there only for limits")
        for number, promise in enumerate(self.promises):
            if promise.since >= seconds:
                raise ValueError(f"promises[{number}].since: {promise.since:g}; the experiment ends at {seconds:g}")
            if promise.until is not None and not promise.until > promise.since:
                raise ValueError(f"promises[{number}].until: {promise.until:g}; it must be after since")

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of method and rollback."""
        return self.method + self.rollback

    @property
    def proxied(self) -> bool:
        """Whether it needs a network that fails."""
        return any(step.do == "network" for step in self.steps)

    def obstacle(self, actions: frozenset[str], mocks: int, controls: int) -> str | None:
        """Return why it cannot be played on a stack that runs already; None: it can.

        Args:
            actions: what can be done there.
            mocks: how many mock models there may be.
            controls: how many of their control ports can be reached.
        """
        if self.system.gateway or self.system.mock or self.system.config or self.system.limits:
            return "it needs settings of its own (system)"
        missing = sorted({step.do for step in self.steps} - actions)
        if missing:
            return f"it needs {', '.join(missing)}"
        if self.system.mocks > mocks:
            return f"it needs {self.system.mocks} mock models"
        if any(step.do in SCRIPTED and step.mock > controls for step in self.steps):
            return "it needs the control port of each mock model (--mock-control)"
        return None


def load_experiments(names: list[str]) -> dict[str, Experiment]:
    """Read those that are named (ours, or files by their paths); all of ours when no name is given.

    Raises:
        ExperimentError: there is no such experiment, or its definition is wrong.
    """
    names = names or sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return {name: read(Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml") for name in names}


def read(path: Path) -> Experiment:
    """Read one definition."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ExperimentError(f"{path}: a mapping is needed")
        return msgspec.convert({"name": path.stem} | document, Experiment)
    except OSError as error:
        known = ", ".join(sorted(file.stem for file in FOLDER.glob("*.yaml")))
        raise ExperimentError(f"{path}: {error.strerror}; ours are: {known}") from None
    except msgspec.ValidationError as error:
        text, _, where = str(error).partition(" - at `$")
        where = where.strip(".`")
        raise ExperimentError(f"{path}: {where}{': ' if where else ''}{_line(text)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ExperimentError(f"{path}: {_line(str(error))}") from None


def _line(text: str) -> str:
    return " ".join(text.split())
