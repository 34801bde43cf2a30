"""The script of faults: which of them applies to a call."""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from mock_model.call import Call
from mock_model.draws import draw
from mock_model.faults import KINDS, Fault

HEALTH = "/health"
MODELS = "/v1/models"
ASIDE = frozenset({HEALTH, MODELS})
"""What gateways ask by themselves, at any time."""
MAX_ENTRIES = 1000
MAX_FINGERPRINTS = 100_000
"""Bodies told apart when occurrences are counted; the oldest is forgotten first."""

_FIELD = re.compile(r"(?:unknown|required) field `([^`]+)`")


class ScriptError(ValueError):
    """A script cannot be used. The text names the entry and the key; `where` is its path in the list."""

    def __init__(self, message: str, where: str | None) -> None:
        super().__init__(message)
        self.where = where


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Which calls an entry is for; what is left out matches all, and so does `*` at the end of a path."""

    model: str | None = None
    path: Annotated[str, Meta(pattern=r"\A(/v1/.+|/tokenize|/detokenize|/health)\Z")] | None = None
    stream: bool | None = None

    def covers(self, call: Call) -> bool:
        """Return whether the call is one of them; health and lists of models are, only if `path` names them."""
        return (
            self._covers(call.path)
            and (self.model is None or call.model == self.model)
            and (self.stream is None or call.stream == self.stream)
        )

    def _covers(self, path: str) -> bool:
        if self.path is None:
            return path not in ASIDE
        return path.startswith(self.path[:-1]) if self.path.endswith("*") else path == self.path


class _Entry(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """An entry as it was put."""

    kind: str
    with_: dict[str, Any] = msgspec.field(name="with", default_factory=dict)
    times: Annotated[int, Meta(ge=1)] | None = None
    rate: Annotated[float, Meta(ge=0, le=1)] | None = None
    match: Match = Match()
    used: Annotated[int, Meta(ge=0)] = 0


class Line:
    """One entry of the script, checked, and how often it has been used."""

    def __init__(self, number: int, entry: _Entry, fault: Fault) -> None:
        self.fault = fault
        self._number = number
        self._entry = entry

    def takes(self, call: Call, seed: int) -> bool:
        """Return whether the fault applies to the call; then it counts as used."""
        entry = self._entry
        if entry.times is not None and entry.used >= entry.times:
            return False
        if not entry.match.covers(call) or not self.fault.suits(call):
            return False
        if (
            entry.rate is not None
            and draw(seed, "fault", self._number, call.fingerprint, call.occurrence) >= entry.rate
        ):
            return False
        entry.used += 1
        return True

    def document(self) -> dict[str, Any]:
        """Return the entry as it was put, and `used`."""
        document: dict[str, Any] = msgspec.to_builtins(self._entry)
        return {**document, "used": self._entry.used}


class Script:
    """An ordered list of faults. The first that matches a call, and is not used up, applies.

    Whether a `rate` applies depends on the seed, the number of the entry, the call's fingerprint and how many calls
    with this fingerprint have come since the script was put; not on the order of other calls.

    Args:
        seed: decides every draw.
        kinds: the faults that there are, by their kind.
    """

    def __init__(self, seed: int, kinds: Mapping[str, type[Fault]] = KINDS) -> None:
        self._seed = seed
        self._kinds = kinds
        self._lines: list[Line] = []
        self._seen: OrderedDict[str, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._lines)

    def replace(self, entries: Any) -> None:  # noqa: ANN401
        """Replace the script, and count from 0 again.

        Raises:
            ScriptError: it cannot be used; the one before stays.
        """
        if not isinstance(entries, list):
            raise ScriptError("the script must be a list of faults", None)
        if len(entries) > MAX_ENTRIES:
            raise ScriptError(f"the script has more than {MAX_ENTRIES} faults", None)
        self._lines = [_line(number, entry, self._kinds) for number, entry in enumerate(entries)]
        self._seen.clear()

    def clear(self) -> None:
        """Remove every fault, and count from 0 again."""
        self.replace([])

    def document(self) -> list[dict[str, Any]]:
        """Return the script as it was put, each entry with how often it was `used`; it can be put again."""
        return [line.document() for line in self._lines]

    def count(self, fingerprint: str) -> int:
        """Count a call; return how many with its fingerprint came before."""
        occurrence = self._seen.get(fingerprint, 0)
        self._seen[fingerprint] = occurrence + 1
        self._seen.move_to_end(fingerprint)
        if len(self._seen) > MAX_FINGERPRINTS:
            self._seen.popitem(last=False)
        return occurrence

    def choose(self, call: Call) -> Fault | None:
        """Return the fault that applies to a call, or None."""
        return next((line.fault for line in self._lines if line.takes(call, self._seed)), None)


def _line(number: int, value: Any, kinds: Mapping[str, type[Fault]]) -> Line:  # noqa: ANN401
    where = f"[{number}]"
    kind = value.get("kind") if isinstance(value, dict) else None
    name = f'fault {where} ("{kind}")' if isinstance(kind, str) else f"fault {where}"
    try:
        entry = msgspec.convert(value, _Entry)
    except msgspec.ValidationError as error:
        raise _error(name, where, error) from None
    if entry.kind not in kinds:
        raise ScriptError(f"{name}: kind must be one of {', '.join(kinds)}", f"{where}.kind")
    if entry.times is not None and entry.rate is not None:
        raise ScriptError(f"{name}: give times or rate, not both", f"{where}.rate")
    try:
        fault = msgspec.convert(entry.with_, kinds[entry.kind])
    except msgspec.ValidationError as error:
        raise _error(name, f"{where}.with", error) from None
    if (wrong := fault.wrong()) is not None:
        raise ScriptError(f"{name}: with.{wrong[0]}: {wrong[1]}", f"{where}.with.{wrong[0]}")
    for key in fault.__struct_fields__:
        given = getattr(fault, key)
        if isinstance(given, float) and not math.isfinite(given):
            raise ScriptError(f"{name}: with.{key} must be a finite number", f"{where}.with.{key}")
    return Line(number, entry, fault)


def _error(name: str, where: str, error: msgspec.ValidationError) -> ScriptError:
    text, _, path = str(error).partition(" - at `$")
    path = path.removesuffix("`")
    field = _FIELD.search(text)
    if field is not None:
        path = f"{path}.{field[1]}"
    shown = where.partition("]")[2].lstrip(".")
    key = ".".join(part for part in (shown, path.lstrip(".")) if part)
    return ScriptError(f"{name}: {key + ': ' if key else ''}{text[:1].lower()}{text[1:]}", where + path)
