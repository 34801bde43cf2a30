"""`llm-gateway check FILE [OTHER]`: what is wrong with a configuration, and what it would change."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gateway.admin_client import NotAnswered, ask
from gateway.config import examine
from gateway.config_document import SECRET, document
from gateway.server.paths import call_at_the_end
from gateway.settings import SettingsError, load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from gateway.config import Routing


def main(arguments: list[str]) -> int:
    """Check a file; return 0 if it is valid, 2 if it, the other one or the environment is not."""
    parser = argparse.ArgumentParser(prog="llm-gateway check", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="as GATEWAY_CONFIG would name it")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("other", type=Path, metavar="OTHER", nargs="?", help="the one in force, to compare with")
    other.add_argument("--url", help="of a running gateway to compare with, by the key in GATEWAY_ADMIN_KEY")
    options = parser.parse_args(arguments)
    try:
        settings = load()
        in_force = _in_force(options.url) if options.url is not None else None
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
            print(f"warning: {line}; the gateway would not start without it, nor take it while it runs")  # noqa: T201
        for line in doubts(findings.routing):
            print(f"warning: {line}")  # noqa: T201
        valid = valid and not findings.complaints
        routings.append(findings.routing)
    if not valid:
        return 2
    print(f"{options.file} is valid.")  # noqa: T201
    new, *old = routings
    if new is not None and in_force is not None:
        _print_changes(in_force, document(new), f"generation {in_force['generation']} of {options.url}")
        print("Secrets that are set in both are not compared.")  # noqa: T201
    elif new is not None and old and old[0] is not None:
        before, after = (document(each, with_secrets=True) for each in (old[0], new))
        _print_changes(before, after, str(options.other))
    return 0


def doubts(routing: "Routing | None") -> "Iterator[str]":
    """Yield what may be in a configuration and is hardly meant, a line each."""
    for backend in routing.backends if routing is not None else ():
        for replica in backend.replicas:
            call = call_at_the_end(replica.url)
            if call is not None:
                yield f"the url of {replica.name} ends with {call}, which follows it for each call: leave {call} out"


def _print_changes(old: "Mapping[str, Any]", new: "Mapping[str, Any]", other: str) -> None:
    for line in list(differences(old, new)) or [f"It says the same as {other}."]:
        print(line)  # noqa: T201


def _in_force(url: str) -> dict[str, Any]:
    """Return the document of a running gateway. Raises: SettingsError."""
    try:
        found = ask(url, "/config")
    except NotAnswered as error:
        raise SettingsError(str(error)) from None
    if not found.keys() >= {"generation", "backends", "routes", "keys"}:
        raise SettingsError(f"what answers at {url} is not a gateway")
    return found


def differences(old: "Mapping[str, Any]", new: "Mapping[str, Any]") -> "Iterator[str]":
    """Yield what differs between two documents, a line each. Keys without a name are of the environment."""
    yield from _of("backend", *({each["name"]: each for each in found["backends"]} for found in (old, new)))
    before, after = _routes(old), _routes(new)
    yield from _of("route", before, after)
    kept = [[model for model in routes if model in before and model in after] for routes in (before, after)]
    if kept[0] != kept[1]:
        yield f"routes: the order is {', '.join(after)}"
    yield from _of("key", *({each["name"]: each for each in found["keys"] if each["name"]} for found in (old, new)))
    if bool(old["keys"]) != bool(new["keys"]):
        yield f"keys: there are {'some' if new['keys'] else 'none'} now, which needs a restart"


def _routes(found: "Mapping[str, Any]") -> dict[str, Any]:
    """Return the routes by model, in order; of two for one model the first is in force."""
    routes: dict[str, Any] = {}
    for each in found["routes"]:
        routes.setdefault(each["model"], each)
    return routes


def _of(what: str, old: "Mapping[str, Any]", new: "Mapping[str, Any]") -> "Iterator[str]":
    for name in sorted(old.keys() - new.keys()):
        yield f"{what} {name}: gone"
    for name, value in new.items():
        if name not in old:
            yield f"{what} {name}: new"
            continue
        before, after = dict(_values(old[name])), dict(_values(value))
        items = [{_item(field): None for field in values}.keys() for values in (before, after)]
        for item in sorted(items[0] ^ items[1]):
            yield f"{what} {name}: {item} {'gone' if item in items[0] else 'new'}"
        order = [[item for item in each if item in items[0] & items[1]] for each in items]
        if order[0] != order[1]:
            yield f"{what} {name}: the order is {', '.join(filter(None, items[1]))}"
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
    """Yield the values in a part of a document, each with the names that lead to it."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _values(item, f"{where}.{name}" if where else name)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for item in value:
            names = (item.get(name) for name in ("name", "backend", "model"))
            yield from _values(item, f"{where}[{' '.join(filter(None, names))}]")
    else:
        yield where, value


def _shown(value: object) -> str:
    return "none" if value is None else str(value)
