"""`llm-gateway check FILE [OTHER]`: what is wrong with a configuration, and what it would change."""

import argparse
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.config import examine
from gateway.settings import SettingsError, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gateway.config import Routing

SECRET = frozenset({"api_key", "secret_headers", "digest", "tls_digest"})
"""Fields of which only is said that they differ."""


def main(arguments: list[str]) -> int:
    """Check a file; return 0 if it is valid, 2 if it, the other one or the environment is not."""
    parser = argparse.ArgumentParser(prog="llm-gateway check", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="as GATEWAY_CONFIG would name it")
    parser.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="the one in force, to compare with")
    options = parser.parse_args(arguments)
    try:
        settings = load()
    except SettingsError as error:
        print(f"gateway: {error}", file=sys.stderr)  # noqa: T201
        return 2
    routings = []
    valid = True
    for path in (options.file, options.other):
        if path is None:
            continue
        findings = examine(path, settings)
        for line in findings.complaints:
            print(f"wrong: {line}")  # noqa: T201
        for line in findings.unset:
            print(f"warning: {line}; the gateway would not start without it")  # noqa: T201
        valid = valid and not findings.complaints
        routings.append(findings.routing)
    if not valid:
        return 2
    print(f"{options.file} is valid.")  # noqa: T201
    new, *old = routings
    if old and new is not None and old[0] is not None:
        differences = list(changes(old[0], new))
        for line in differences or [f"It says the same as {options.other}."]:
            print(line)  # noqa: T201
    return 0


def changes(old: "Routing", new: "Routing") -> "Iterator[str]":
    """Yield what differs between two configurations, a line each; of secrets only that they do."""
    yield from _of("backend", {each.name: each for each in old.backends}, {each.name: each for each in new.backends})
    before, after = ({each.model: each for each in routing.routes} for routing in (old, new))
    yield from _of("route", before, after)
    kept = [[model for model in routes if model in before and model in after] for routes in (before, after)]
    if kept[0] != kept[1]:
        yield f"routes: the order is {', '.join(after)}"
    yield from _of("key", {str(each.name): each for each in old.keys}, {str(each.name): each for each in new.keys})


def _of(what: str, old: "Mapping[str, Any]", new: "Mapping[str, Any]") -> "Iterator[str]":
    for name in sorted(old.keys() - new.keys()):
        yield f"{what} {name}: gone"
    for name, value in new.items():
        if name not in old:
            yield f"{what} {name}: new"
            continue
        before, after = dict(_values(old[name])), dict(_values(value))
        items = [{_item(field) for field in values} for values in (before, after)]
        for item in sorted(items[0] ^ items[1]):
            yield f"{what} {name}: {item} {'gone' if item in items[0] else 'new'}"
        for field in sorted(before.keys() | after.keys()):
            if _item(field) not in items[0] & items[1]:
                continue
            was, will_be = before.get(field), after.get(field)  # of a part that is not there, such as a guard, none is
            if was != will_be:
                secret = field.rpartition(".")[2] in SECRET
                words = "changes" if secret else f"{_shown(was)} -> {_shown(will_be)}"
                yield f"{what} {name}: {field} {words}"


def _item(field: str) -> str:
    """Return the item of a list to which a value belongs, such as `replicas[primary-1]`; "" for none."""
    return field[: field.find("]") + 1]


def _values(value: object, where: str = "") -> "Iterator[tuple[str, object]]":
    """Yield the values in a part of a configuration, each with the names that lead to it."""
    if is_dataclass(value):
        for field in fields(value):
            if field.name != "tls":  # a context cannot be compared
                yield from _values(getattr(value, field.name), f"{where}.{field.name}" if where else field.name)
    elif isinstance(value, tuple) and any(map(is_dataclass, value)):
        for item in value:
            names = (getattr(item, name, None) for name in ("name", "backend", "model"))
            yield from _values(item, f"{where}[{' '.join(filter(None, names))}]")
    else:
        yield where, value


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
