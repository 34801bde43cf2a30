"""What all workers have kept of the last requests."""

from operator import itemgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

Document = dict[str, Any]
_NUMBER = itemgetter("number")


def listed_of_all(answers: "Iterable[Document]", limit: int) -> Document:
    """Return the newest requests of several lists (`RequestCalls.listed`), and whether there are more."""
    lists = list(answers)
    found = sorted((each for answer in lists for each in answer["found"]), key=_NUMBER, reverse=True)
    more = len(found) > limit or any(answer["more"] for answer in lists)
    return {"found": found[:limit], "more": more, "kept": sum(answer["kept"] for answer in lists)}


def found_of_all(answers: "Iterable[Document]") -> Document:
    """Return what several workers found by an id (`RequestCalls.found`); the newest of all is the one explained."""
    lists = list(answers)
    explained = sorted((each for each in lists if each["request"]), key=_NUMBER, reverse=True)
    kept = sum(answer["kept"] for answer in lists)
    if not explained:
        return {"number": 0, "request": None, "others": [], "kept": kept}
    first, *rest = explained
    others = [*first["others"]]
    for each in rest:
        others += [{"request_id": each["request"]["request_id"], "trace_id": each["request"]["trace_id"]}]
        others += each["others"]
    return first | {"others": others, "kept": kept}
